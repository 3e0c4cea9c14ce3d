use std::fmt;
use std::str::FromStr;

/// The identity of a workload: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
///
/// Parsing and printing round-trip. Source: istio `pkg/spiffe`, SPIFFE-ID specification section 2.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SpiffeId {
    trust_domain: String,
    namespace: String,
    service_account: String,
}

/// Text that is no workload identity.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("{text:?} is not of the form spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT")]
pub struct InvalidSpiffeId {
    /// The text as it was given.
    pub text: String,
}

impl SpiffeId {
    /// An identity from its parts; every part must be non-empty and free of `/`.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<SpiffeId, InvalidSpiffeId> {
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The trust domain, such as `cluster.local`.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, InvalidSpiffeId> {
        let parts = || {
            let mut parts = text.strip_prefix("spiffe://")?.split('/');
            let trust_domain = parts.next()?;
            let (ns, namespace, sa, account) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
            let clean =
                |part: &str| !part.is_empty() && !part.bytes().any(|b| b.is_ascii_whitespace() || b.is_ascii_control());
            let valid = ns == "ns" && sa == "sa" && parts.next().is_none();
            (valid && clean(trust_domain) && clean(namespace) && clean(account)).then_some((
                trust_domain,
                namespace,
                account,
            ))
        };
        let (trust_domain, namespace, account) = parts().ok_or_else(|| InvalidSpiffeId { text: text.to_owned() })?;
        Ok(SpiffeId {
            trust_domain: trust_domain.to_owned(),
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_and_refuses() {
        let text = "spiffe://cluster.local/ns/default/sa/bookinfo-reviews";
        assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        for bad in ["", "spiffe://a/ns/b/sa/", "spiffe://a/ns/b/sa/c/d", "http://a/ns/b/sa/c", "spiffe:///ns/b/sa/c"] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad:?}");
        }
    }
}
