use std::fmt;

macro_rules! kinds {
    ($( $name:ident $groups:expr, $namespaced:literal; )*) => {
        /// The kinds of object that reach a proxy.
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub enum Kind {
            $(
                #[doc = concat!("`", stringify!($name), "`")]
                $name,
            )*
        }

        impl Kind {
            /// All of them.
            pub const ALL: &[Kind] = &[$( Kind::$name, )*];

            /// The kind of an object with this API group ("" is the core group) and `kind`, whatever its version.
            /// `None` for what the control plane has no use for.
            pub fn of(group: &str, kind: &str) -> Option<Kind> {
                match kind {
                    $( stringify!($name) if $groups.contains(&group) => Some(Kind::$name), )*
                    _ => None,
                }
            }

            /// As in a manifest's `kind`.
            pub fn as_str(self) -> &'static str {
                match self {
                    $( Kind::$name => stringify!($name), )*
                }
            }

            /// The API group; "" is the core group.
            pub fn group(self) -> &'static str {
                match self {
                    $( Kind::$name => $groups[0], )*
                }
            }

            /// Whether its objects live in namespaces.
            pub fn is_namespaced(self) -> bool {
                match self {
                    $( Kind::$name => $namespaced, )*
                }
            }
        }
    };
}

const CORE: &[&str] = &[""];
const NETWORKING: &[&str] = &["networking.istio.io"];
const SECURITY: &[&str] = &["security.istio.io"];
const GATEWAY_API: &[&str] = &["gateway.networking.k8s.io"];

kinds! {
    Namespace CORE, false;
    Node CORE, false;
    Pod CORE, true;
    Service CORE, true;
    EndpointSlice &["discovery.k8s.io"], true;
    ServiceAccount CORE, true;
    ConfigMap CORE, true;
    Secret CORE, true;
    VirtualService NETWORKING, true;
    DestinationRule NETWORKING, true;
    ServiceEntry NETWORKING, true;
    Sidecar NETWORKING, true;
    WorkloadEntry NETWORKING, true;
    WorkloadGroup NETWORKING, true;
    EnvoyFilter NETWORKING, true;
    Gateway NETWORKING, true;
    ProxyConfig NETWORKING, true;
    PeerAuthentication SECURITY, true;
    RequestAuthentication SECURITY, true;
    AuthorizationPolicy SECURITY, true;
    Telemetry &["telemetry.istio.io"], true;
    WasmPlugin &["extensions.istio.io"], true;
    TrafficExtension &["extensions.istio.io"], true;
    HTTPRoute GATEWAY_API, true;
    GRPCRoute GATEWAY_API, true;
}

impl Kind {
    /// The custom kind that was probably meant by one that does not exist: the same in another group, or one with a letter or two changed.
    pub fn like(group: &str, kind: &str) -> Option<Kind> {
        let custom = || Kind::ALL.iter().copied().filter(|known| known.is_custom());
        custom()
            .find(|known| known.as_str().eq_ignore_ascii_case(kind))
            .or_else(|| custom().find(|known| known.group() == group && distance(known.as_str(), kind) <= 2))
    }

    /// Whether it is one of Istio's own kinds.
    pub fn is_istio(self) -> bool {
        self.group().ends_with(".istio.io")
    }

    /// Whether a CustomResourceDefinition must exist for it: Istio's own kinds and the Gateway API's.
    pub fn is_custom(self) -> bool {
        self.is_istio() || self.group() == GATEWAY_API[0]
    }

    pub(crate) fn index(self) -> usize {
        self as usize
    }
}

/// Letters to insert, remove or replace until one word is the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_kinds_are_recognized() {
        assert_eq!(Kind::like("networking.istio.io", "VirtualServce"), Some(Kind::VirtualService));
        assert_eq!(Kind::like("security.istio.io", "VirtualService"), Some(Kind::VirtualService));
        assert_eq!(Kind::like("networking.istio.io", "virtualservice"), Some(Kind::VirtualService));
        assert_eq!(Kind::like("networking.istio.io", "Frob"), None);
    }

    #[test]
    fn group_and_kind_decide() {
        assert_eq!(Kind::of("networking.istio.io", "Sidecar"), Some(Kind::Sidecar));
        assert_eq!(Kind::of("gateway.networking.k8s.io", "Gateway"), None);
        assert_eq!(Kind::of("serving.knative.dev", "Service"), None);
        assert_eq!(Kind::of("", "Service"), Some(Kind::Service));
        for (index, kind) in Kind::ALL.iter().enumerate() {
            assert_eq!(kind.index(), index);
            assert_eq!(Kind::of(kind.group(), kind.as_str()), Some(*kind));
        }
    }
}
