//! Certificates of Kubernetes Secrets and ConfigMaps for proxies, as `credentialName` of a DestinationRule names them.
//!
//! As istiod, `pilot/pkg/xds/sds.go` and `pilot/pkg/credentials/kube`.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use config_store::{Body, Kind, Snapshot};
use envoy_api::tls::{CertificateValidationContext, Secret, TlsCertificate, secret};
use envoy_api::{Resource, core};
use kube_source::{Account, Cluster};
use mesh_types::ArcStr;
use tracing::warn;

/// How long an answer holds: longer if it allows, since nobody is in a hurry to take that back. As istiod's `cacheTTL`.
const DENIED: Duration = Duration::from_secs(60);
const ALLOWED: Duration = Duration::from_secs(300);

/// Which service accounts may have the keys in Secrets of their namespaces.
#[derive(Clone, Debug)]
pub(crate) enum Keys {
    /// Nobody, where nobody has proved who they are.
    Nobody,
    /// Everybody: who writes the folders decides what is in them.
    Everybody,
    /// Those who may list Secrets by the API server's rules.
    Review(Arc<Reviews>),
}

/// Answers of the API server.
#[derive(Debug)]
pub(crate) struct Reviews {
    cluster: Cluster,
    /// Until when an answer holds, and whether it allows. Never held across a question.
    answers: Mutex<HashMap<Account, (Instant, bool)>>,
}

impl Reviews {
    pub(crate) fn new(cluster: Cluster) -> Reviews {
        Reviews { cluster, answers: Mutex::default() }
    }

    fn known(&self, account: &Account, now: Instant) -> Option<bool> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.retain(|_, (until, _)| *until > now);
        answers.get(account).map(|(_, allowed)| *allowed)
    }

    /// Asks, unless the answer is known.
    async fn ask(&self, account: &Account) {
        if self.known(account, Instant::now()).is_some() {
            return;
        }
        let asked = self.cluster.may_read_secrets(account).await;
        let allowed = asked.unwrap_or_else(|error| {
            let (namespace, name) = (&account.namespace, &account.name);
            warn!(namespace, name, error = %error, "nobody says whether a service account may read Secrets");
            false
        });
        let until = Instant::now() + if allowed { ALLOWED } else { DENIED };
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.insert(account.clone(), (until, allowed));
    }
}

impl Keys {
    /// Gets ready to be asked about an account that wants these.
    pub(crate) async fn prepare(&self, account: &Account, names: &[ArcStr]) {
        if let Keys::Review(reviews) = self
            && names.iter().any(|name| is_private(name))
        {
            reviews.ask(account).await;
        }
    }

    pub(crate) fn allows(&self, account: &Account) -> bool {
        match self {
            Keys::Nobody => false,
            Keys::Everybody => true,
            Keys::Review(reviews) => reviews.known(account, Instant::now()).unwrap_or(false),
        }
    }
}

/// Whether the name is that of a key: roots are no secret.
fn is_private(name: &str) -> bool {
    name.starts_with("kubernetes://") && !name.ends_with(ROOTS)
}

/// With this behind its name only a Secret's root certificates are meant.
const ROOTS: &str = "-cacert";

/// The secrets of these names that a proxy of `namespace` may have. `private`: those with keys, too.
pub(crate) fn resources(
    snapshot: &Snapshot,
    namespace: &str,
    private: bool,
    names: impl Iterator<Item = ArcStr>,
) -> Arc<[Resource]> {
    let found = names.filter_map(|name| match find(snapshot, namespace, private, &name) {
        Ok(content) => Some(Resource::new(name.clone(), &Secret { name: name.to_string(), r#type: Some(content) })),
        Err(reason) => {
            warn!(name = &*name, namespace, reason, "a proxy is not given a secret");
            None
        }
    });
    found.collect()
}

fn find(snapshot: &Snapshot, namespace: &str, private: bool, resource: &str) -> Result<secret::Type, String> {
    if let Some(place) = resource.strip_prefix("configmap://") {
        let (of, name) = place.split_once('/').ok_or("a ConfigMap is named configmap://NAMESPACE/NAME")?;
        let name = name.strip_suffix(ROOTS).unwrap_or(name);
        let object = snapshot.find(Kind::ConfigMap, of, name).ok_or("there is no such ConfigMap")?;
        let Body::ConfigMap(map) = &object.body else { return Err("not a ConfigMap".to_owned()) };
        let data = map.data.iter().flatten().map(|(key, text)| (key.as_str(), text.as_bytes())).collect();
        return roots(&data);
    }
    let place = resource.strip_prefix("kubernetes://").ok_or("only kubernetes:// and configmap:// are known")?;
    let (of, name) = place.split_once('/').unwrap_or((namespace, place));
    if of != namespace {
        return Err("it is of another namespace".to_owned());
    }
    let data = |name: &str| -> Option<BTreeMap<&str, &[u8]>> {
        let Body::Secret(secret) = &snapshot.find(Kind::Secret, namespace, name)?.body else { return None };
        Some(secret.data.iter().flatten().map(|(key, bytes)| (key.as_str(), bytes.0.as_slice())).collect())
    };
    let none = || "there is no such Secret".to_owned();
    if let Some(whole) = name.strip_suffix(ROOTS) {
        // A Secret of that very name, or the roots in the one that has the key.
        return roots(&data(name).or_else(|| data(whole)).ok_or_else(none)?);
    }
    if !private {
        return Err("its service account may not read Secrets".to_owned());
    }
    let data = data(name).ok_or_else(none)?;
    for (chain, key, staple) in [("cert", "key", None), ("tls.crt", "tls.key", Some("tls.ocsp-staple"))] {
        if let (Some(chain), Some(key)) = (value(&data, chain), value(&data, key)) {
            return Ok(secret::Type::TlsCertificate(TlsCertificate {
                certificate_chain: inline(chain),
                private_key: inline(key),
                ocsp_staple: staple.and_then(|staple| value(&data, staple)).and_then(inline),
                ..TlsCertificate::default()
            }));
        }
    }
    Err("it has neither cert and key nor tls.crt and tls.key".to_owned())
}

fn roots(data: &BTreeMap<&str, &[u8]>) -> Result<secret::Type, String> {
    let known = [("cacert", "crl"), ("ca.crt", "ca.crl")].into_iter();
    let trusted = known.filter_map(|(roots, revoked)| Some((value(data, roots)?, revoked))).next();
    let (trusted, revoked) = trusted.ok_or("it has neither cacert nor ca.crt")?;
    Ok(secret::Type::ValidationContext(CertificateValidationContext {
        trusted_ca: inline(trusted),
        crl: value(data, revoked).and_then(inline),
        ..CertificateValidationContext::default()
    }))
}

fn value<'a>(data: &BTreeMap<&str, &'a [u8]>, key: &str) -> Option<&'a [u8]> {
    data.get(key).copied().filter(|bytes| !bytes.is_empty())
}

fn inline(bytes: &[u8]) -> Option<core::DataSource> {
    let specifier = Some(core::data_source::Specifier::InlineBytes(bytes.to_vec()));
    Some(core::DataSource { specifier, ..core::DataSource::default() })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use config_store::Store;

    use super::*;

    const OBJECTS: &str = "
apiVersion: v1
kind: Secret
metadata: {name: client, namespace: a}
stringData: {tls.crt: chain, tls.key: key, ca.crt: roots, ca.crl: revoked}
---
apiVersion: v1
kind: Secret
metadata: {name: half, namespace: a}
stringData: {tls.crt: chain, tls.key: ''}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: roots, namespace: b}
data: {ca.crt: public}
";

    #[test]
    fn a_proxy_gets_what_its_namespace_has() {
        let mut store = Store::new();
        for document in manifest::parse(Path::new("a.yaml"), OBJECTS).unwrap() {
            store.apply(&document).unwrap();
        }
        let snapshot = store.snapshot();
        let find = |name: &str| find(&snapshot, "a", true, name);
        let Ok(secret::Type::TlsCertificate(certificate)) = find("kubernetes://client") else { panic!("no key") };
        assert_eq!((certificate.certificate_chain, certificate.private_key), (inline(b"chain"), inline(b"key")));
        for name in ["kubernetes://client-cacert", "kubernetes://a/client-cacert"] {
            let Ok(secret::Type::ValidationContext(context)) = find(name) else { panic!("{name}") };
            assert_eq!((context.trusted_ca, context.crl), (inline(b"roots"), inline(b"revoked")));
        }
        assert!(matches!(find("configmap://b/roots"), Ok(secret::Type::ValidationContext(_))));
        for (name, said) in [
            ("kubernetes://b/client", "it is of another namespace"),
            ("kubernetes://none", "there is no such Secret"),
            ("kubernetes://half", "it has neither cert and key nor tls.crt and tls.key"),
            ("file-root:/etc/passwd", "only kubernetes:// and configmap:// are known"),
        ] {
            assert_eq!(find(name).unwrap_err(), said);
        }
        let denied = super::find(&snapshot, "a", false, "kubernetes://client").unwrap_err();
        assert_eq!(denied, "its service account may not read Secrets");
        assert!(super::find(&snapshot, "a", false, "kubernetes://client-cacert").is_ok(), "roots are no secret");
        let names = ["kubernetes://client", "kubernetes://none"].map(ArcStr::from).into_iter();
        assert_eq!(resources(&snapshot, "a", true, names).len(), 1);
    }
}
