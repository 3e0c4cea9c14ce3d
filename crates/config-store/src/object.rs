use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use istio_api as istio;
use istio_api::authorization_policy::Action;
use istio_api::envoy_filter::{ApplyTo, EnvoyConfigObjectPatch, PatchContext};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use manifest::{Document, Error};
use mesh_types::{ArcStr, Labels};

use crate::{Compact, InvalidValue, Kind};

/// What identifies an object.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Key {
    /// The kind.
    pub kind: Kind,
    /// The namespace; "" for kinds that live in none.
    pub namespace: ArcStr,
    /// The name.
    pub name: ArcStr,
}

impl Key {
    /// A key from its parts. For kinds that live in no namespace, `namespace` is dropped.
    pub fn new(kind: Kind, namespace: &str, name: &str) -> Self {
        let namespace = if kind.is_namespaced() { namespace } else { "" };
        Self { kind, namespace: namespace.into(), name: name.into() }
    }

    /// The key of the object in `document`, in namespace `default` if it names none; `None` for a kind that we
    /// have no use for.
    pub fn of(document: &Document) -> Option<Self> {
        let kind = Kind::of(document.group(), document.kind())?;
        Some(Self::new(kind, document.namespace().unwrap_or("default"), document.name()))
    }
}

/// `VirtualService default/reviews`.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind)?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// Where an object was written.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Origin {
    /// The file as the user named it.
    pub file: PathBuf,
    /// Line of the first field; 0 when unknown.
    pub line: u32,
}

/// One object.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Its identity.
    pub key: Key,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `metadata.annotations`.
    pub annotations: Labels,
    /// Unix seconds. The older of two conflicting objects wins.
    pub created: i64,
    /// Revision of the store when this object last changed; 0 before it is stored.
    pub resource_version: u64,
    /// Where it was written, if it was.
    pub origin: Option<Origin>,
    /// The condition `Healthy` in the status of a WorkloadEntry; `None` without one.
    pub healthy: Option<bool>,
    /// Host and address, from the status of a ServiceEntry: what was allocated to hosts without address.
    pub allocated: Vec<(ArcStr, IpAddr)>,
    /// The typed rest.
    pub body: Body,
}

impl Object {
    /// An object that a program made; the store dates it on arrival.
    pub fn new(namespace: &str, name: &str, body: Body) -> Self {
        Self {
            key: Key::new(body.kind(), namespace, name),
            labels: Labels::new(),
            annotations: Labels::new(),
            created: 0,
            resource_version: 0,
            origin: None,
            healthy: None,
            allocated: Vec::new(),
            body,
        }
    }

    /// The same as far as any reader can tell: everything but version and place of writing.
    pub(crate) fn says_the_same(&self, other: &Object) -> bool {
        self.labels == other.labels
            && self.annotations == other.annotations
            && self.healthy == other.healthy
            && self.allocated == other.allocated
            && self.body == other.body
    }
}

macro_rules! bodies {
    ($( $kind:ident($type:ty) = $field:literal; )*) => {
        /// What an object says, typed by kind.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Body {
            $(
                #[doc = concat!("`", stringify!($kind), "`")]
                $kind(Box<$type>),
            )*
        }

        impl Body {
            /// The kind.
            pub fn kind(&self) -> Kind {
                match self {
                    $( Body::$kind(_) => Kind::$kind, )*
                }
            }

            /// Decodes the typed part of a document of this kind.
            pub(crate) fn decode(kind: Kind, document: &Document) -> Result<Self, Error> {
                Ok(match kind {
                    $( Kind::$kind => Body::$kind(Box::new(read(document, $field)?)), )*
                })
            }
        }
    };
}

bodies! {
    Namespace(core::Namespace) = "";
    Node(core::Node) = "";
    Pod(Compact<core::Pod>) = "";
    Service(core::Service) = "";
    EndpointSlice(discovery::EndpointSlice) = "";
    ServiceAccount(core::ServiceAccount) = "";
    ConfigMap(core::ConfigMap) = "";
    Secret(core::Secret) = "";
    VirtualService(istio::VirtualService) = "spec";
    DestinationRule(istio::DestinationRule) = "spec";
    ServiceEntry(istio::ServiceEntry) = "spec";
    Sidecar(istio::Sidecar) = "spec";
    WorkloadEntry(istio::WorkloadEntry) = "spec";
    WorkloadGroup(istio::WorkloadGroup) = "spec";
    EnvoyFilter(istio::EnvoyFilter) = "spec";
    Gateway(istio::Gateway) = "spec";
    ProxyConfig(istio::ProxyConfig) = "spec";
    PeerAuthentication(istio::PeerAuthentication) = "spec";
    RequestAuthentication(istio::RequestAuthentication) = "spec";
    AuthorizationPolicy(istio::AuthorizationPolicy) = "spec";
    Telemetry(istio::Telemetry) = "spec";
    WasmPlugin(istio::WasmPlugin) = "spec";
    TrafficExtension(istio::TrafficExtension) = "spec";
    HTTPRoute(istio::HttpRoute) = "spec";
    GRPCRoute(istio::GrpcRoute) = "spec";
}

/// Istio's kinds are their `spec`; Kubernetes' own types hold the whole object.
fn read<T: serde::de::DeserializeOwned>(document: &Document, field: &str) -> Result<T, Error> {
    if field.is_empty() { document.decode() } else { document.decode_field(field) }
}

impl Body {
    /// Fills in what the Kubernetes API server would have before anybody saw the object.
    pub(crate) fn set_defaults(&mut self) {
        match self {
            Body::Service(service) => {
                let Some(spec) = &mut service.spec else { return };
                spec.type_.get_or_insert_with(|| "ClusterIP".into());
                for port in spec.ports.iter_mut().flatten() {
                    port.protocol.get_or_insert_with(|| "TCP".into());
                    let number = port.port;
                    port.target_port
                        .get_or_insert(k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(number));
                }
            }
            Body::EndpointSlice(slice) => {
                for port in slice.ports.iter_mut().flatten() {
                    port.protocol.get_or_insert_with(|| "TCP".into());
                    port.name.get_or_insert_with(String::new);
                }
            }
            Body::Secret(secret) => {
                for (key, text) in secret.string_data.take().unwrap_or_default() {
                    let bytes = k8s_openapi::ByteString(text.into_bytes());
                    secret.data.get_or_insert_with(Default::default).insert(key, bytes);
                }
            }
            _ => {}
        }
    }
}

impl Body {
    /// What istiod's validation says about an object of Istio's; nothing about Kubernetes' own.
    pub(crate) fn validate(&self, key: &Key, labels: &Labels, annotations: &Labels) -> Vec<istio::Violation> {
        let namespace = &key.namespace;
        let mut found = match self {
            Body::VirtualService(spec) => spec.validate(namespace),
            Body::DestinationRule(spec) => spec.validate(namespace),
            Body::ServiceEntry(spec) => spec.validate(namespace, labels),
            Body::Sidecar(spec) => spec.validate(namespace),
            Body::WorkloadEntry(spec) => spec.validate(namespace),
            Body::WorkloadGroup(spec) => spec.validate(namespace),
            Body::EnvoyFilter(spec) => spec.validate(namespace),
            Body::Gateway(spec) => spec.validate(namespace),
            Body::ProxyConfig(spec) => spec.validate(namespace),
            Body::PeerAuthentication(spec) => spec.validate(namespace),
            Body::RequestAuthentication(spec) => spec.validate(namespace),
            Body::AuthorizationPolicy(spec) => spec.validate(namespace),
            Body::Telemetry(spec) => spec.validate(namespace),
            Body::WasmPlugin(spec) => spec.validate(namespace),
            Body::TrafficExtension(spec) => spec.validate(namespace),
            Body::HTTPRoute(spec) => spec.validate(namespace),
            Body::GRPCRoute(spec) => spec.validate(namespace),
            Body::Namespace(_)
            | Body::Node(_)
            | Body::Pod(_)
            | Body::Service(_)
            | Body::EndpointSlice(_)
            | Body::ServiceAccount(_)
            | Body::ConfigMap(_)
            | Body::Secret(_) => return Vec::new(),
        };
        found.extend(self.dry_run(annotations));
        found.extend(self.patch_values());
        found
    }

    /// The values of an EnvoyFilter that are none of Envoy's messages.
    fn patch_values(&self) -> Vec<istio::Violation> {
        let Body::EnvoyFilter(filter) = self else { return Vec::new() };
        let fault = |(index, config): (usize, &EnvoyConfigObjectPatch)| {
            let for_waypoint = config.r#match.as_ref().is_some_and(|m| m.context == PatchContext::Waypoint);
            let value = config.patch.as_ref()?.value.as_ref()?;
            if for_waypoint || config.apply_to == ApplyTo::Invalid {
                return None;
            }
            let InvalidValue { path, reason } = crate::patch_value(config.apply_to, value).err()?;
            let path = format!("spec.configPatches[{index}].patch.value{path}");
            Some(istio::Violation { path, message: reason, severity: istio::Severity::Error })
        };
        filter.config_patches.iter().enumerate().filter_map(fault).collect()
    }

    /// istiod `checkDryRunAnnotation`.
    fn dry_run(&self, annotations: &Labels) -> Option<istio::Violation> {
        let value = annotations.get("istio.io/dry-run")?;
        let message = match self {
            Body::AuthorizationPolicy(policy) => match policy.action {
                Action::Allow | Action::Deny => match value.as_str() {
                    "1" | "t" | "T" | "true" | "TRUE" | "True" | "0" | "f" | "F" | "false" | "FALSE" | "False" => {
                        return None;
                    }
                    _ => format!("{value:?} is not a boolean"),
                },
                action => format!("only ALLOW and DENY can be run dry, not {action}"),
            },
            _ => "only an AuthorizationPolicy can be run dry".to_owned(),
        };
        let path = "metadata.annotations[\"istio.io/dry-run\"]".to_owned();
        Some(istio::Violation { path, message, severity: istio::Severity::Error })
    }
}
