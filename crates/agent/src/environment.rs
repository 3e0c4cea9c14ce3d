//! The environment of an injected pod: which variables there are, and what became of each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A copy of the environment, so that everything that reads it can be tested with a map. It remembers what was read: what nobody
/// reads is named as ignored.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    values: BTreeMap<String, String>,
    /// Locked for one insertion.
    read: Arc<Mutex<BTreeSet<String>>>,
}

/// A variable whose value cannot be used.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("environment variable {name}={value:?}: {reason}")]
pub struct BadVariable {
    name: String,
    value: String,
    reason: String,
}

/// Why variables of pilot-agent have no effect here.
///
/// Source: istio `pilot/cmd/pilot-agent/options/options.go`, `pkg/features`, and the injection templates.
const REASONS: [(&str, &str); 33] = [
    ("CA_PROVIDER", "only Istio's CA protocol is spoken"),
    ("CLOUD_PLATFORM", "metadata of clouds is not asked for"),
    ("COMPLIANCE_POLICY", "cipher suites follow the mesh configuration"),
    ("CREDENTIAL_FETCHER_TYPE", "only mounted tokens are used"),
    ("CREDENTIAL_IDENTITY_PROVIDER", "only mounted tokens are used"),
    ("ENABLE_PROBE_KEEPALIVE_CONNECTIONS", "probes never keep connections, as kubelets do not"),
    ("FILE_DEBOUNCE_DURATION", "files are compared as a whole"),
    ("GCP_METADATA", "metadata of clouds is not asked for"),
    ("GODEBUG", "there is no Go runtime"),
    ("GOMAXPROCS", "there is no Go runtime"),
    ("GOMEMLIMIT", "there is no Go runtime"),
    ("HOST_IP", "only a bootstrap override of Envoy uses it"),
    ("ISTIO_AGENT_ENABLE_WASM_REMOTE_LOAD_CONVERSION", "modules are not fetched by the agent"),
    ("ISTIO_BOOTSTRAP", "the bootstrap is generated; --templateFile replaces it"),
    ("ISTIO_BOOTSTRAP_OVERRIDE", "only Envoy takes it; see --proxy"),
    ("ISTIO_ENABLE_HTTP2_PROBING", "probes speak HTTP/1.1"),
    ("ISTIO_ENVOY_ENABLE_CORE_DUMP", "only Envoy takes it; see --proxy"),
    ("ISTIO_KUBE_CLIENT_CONTENT_TYPE", "the agent does not speak to Kubernetes"),
    ("ISTIO_MULTIROOT_MESH", "several roots are always trusted"),
    ("MUTEX_PROFILE_FRACTION", "there is no Go runtime"),
    ("OTEL_RESOURCE_ATTRIBUTES", "the control plane puts resource attributes into tracing configuration"),
    ("PEER_METADATA_DISCOVERY", "ambient only"),
    ("PKCS8_KEY", "keys are always PKCS #8"),
    ("PROXY_CONFIG_XDS_AGENT", "roots of the trust bundle come with the certificate and in its root file"),
    ("STS_PORT", "there is no token exchange"),
    ("TOKEN_AUDIENCES", "the control plane checks audiences"),
    ("WASM_HTTP_REQUEST_MAX_RETRIES", "modules are not fetched by the agent"),
    ("WASM_HTTP_REQUEST_TIMEOUT", "modules are not fetched by the agent"),
    ("WASM_INSECURE_REGISTRIES", "modules are not fetched by the agent"),
    ("WASM_MODULE_EXPIRY", "modules are not fetched by the agent"),
    ("WASM_PURGE_INTERVAL", "modules are not fetched by the agent"),
    ("WORKLOAD_IDENTITY_SOCKET_FILE", "identities of SPIRE are not supported"),
    ("XDS_AUTH_PROVIDER", "only certificates and tokens are used"),
];

/// Names that start so are meant for the agent or the proxy, whether we know them or not.
const OURS: [&str; 16] = [
    "CA_",
    "CREDENTIAL_",
    "DNS_",
    "ECC_",
    "ENVOY_",
    "FILE_",
    "GRPC_XDS_",
    "ISTIO_",
    "JWT_",
    "OUTRIGGER_",
    "PILOT_",
    "PROXY_",
    "SECRET_",
    "WASM_",
    "WORKLOAD_",
    "XDS_",
];

/// Read elsewhere: by the command line and by logging.
const ELSEWHERE: [&str; 2] = ["OUTRIGGER_DATA_PLANE", "OUTRIGGER_LOG"];

impl Environment {
    /// The process's environment. Variables that are not UTF-8 are left out.
    pub fn of_process() -> Environment {
        let text = |s: std::ffi::OsString| s.into_string().ok();
        std::env::vars_os().filter_map(|(name, value)| Some((text(name)?, text(value)?))).collect()
    }

    /// The value of a variable; empty counts as unset, as in Go's `env` package.
    pub fn get(&self, name: &str) -> Option<&str> {
        let value = self.values.get(name)?;
        self.mark(name);
        Some(value.as_str()).filter(|value| !value.is_empty())
    }

    /// The same, owned, or a default.
    pub fn or(&self, name: &str, default: &str) -> String {
        self.get(name).unwrap_or(default).to_owned()
    }

    /// A boolean as Go's `strconv.ParseBool` reads it.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool, BadVariable> {
        match self.get(name) {
            None => Ok(default),
            Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
            Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
            Some(_) => Err(self.bad(name, "expected true or false")),
        }
    }

    /// A number.
    pub fn number<T: std::str::FromStr>(&self, name: &str, default: T) -> Result<T, BadVariable> {
        self.get(name)
            .map_or(Ok(default), |value| value.trim().parse().map_err(|_| self.bad(name, "expected a number")))
    }

    /// A duration as Go writes it.
    pub fn duration(&self, name: &str, default: Duration) -> Result<Duration, BadVariable> {
        let Some(value) = self.get(name) else { return Ok(default) };
        let parsed = value.parse::<istio_api::Duration>().ok().and_then(istio_api::Duration::to_std);
        parsed.ok_or_else(|| self.bad(name, "expected a duration such as 5s"))
    }

    /// Names and values of all variables that start with `prefix`, without it.
    pub fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.values.iter().filter_map(move |(name, value)| {
            let rest = name.strip_prefix(prefix)?;
            self.mark(name);
            Some((rest, value.as_str()))
        })
    }

    fn mark(&self, name: &str) {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    }

    /// The variables of an agent that are set and that nobody has read so far, each with the reason. To be asked when all is read.
    pub fn ignored(&self) -> Vec<(&str, &'static str)> {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let unread = self.values.iter().filter(|(name, value)| !value.is_empty() && !read.contains(*name));
        let ours = unread.filter_map(|(name, _)| {
            let reason = REASONS.iter().find(|(known, _)| known == name).map(|(_, reason)| *reason);
            let unknown = || {
                let ours = OURS.iter().any(|prefix| name.starts_with(prefix)) && !ELSEWHERE.contains(&name.as_str());
                ours.then_some("not known, or without effect in this mode")
            };
            Some((name.as_str(), reason.or_else(unknown)?))
        });
        ours.collect()
    }

    fn bad(&self, name: &str, reason: &str) -> BadVariable {
        BadVariable { name: name.to_owned(), value: self.or(name, ""), reason: reason.to_owned() }
    }
}

impl FromIterator<(String, String)> for Environment {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(pairs: T) -> Environment {
        Environment { values: pairs.into_iter().collect(), read: Arc::default() }
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(pairs: [(&str, &str); N]) -> Environment {
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_go_does_and_names_bad_values() {
        let env = Environment::from([
            ("A", "true"),
            ("B", "maybe"),
            ("D", "1m30s"),
            ("E", ""),
            ("GOMEMLIMIT", "1"),
            ("N", "x"),
            ("ISTIO_META_X", "y"),
            ("ISTIO_NEW", "z"),
            ("PATH", "/bin"),
        ]);
        assert_eq!(env.flag("A", false), Ok(true));
        assert_eq!(env.flag("E", true), Ok(true));
        assert_eq!(
            env.flag("B", true).unwrap_err().to_string(),
            "environment variable B=\"maybe\": expected true or false"
        );
        assert_eq!(env.duration("D", Duration::ZERO), Ok(Duration::from_secs(90)));
        assert!(env.number::<u16>("N", 1).is_err());
        assert_eq!(env.with_prefix("ISTIO_META_").collect::<Vec<_>>(), [("X", "y")]);
        let unknown = "not known, or without effect in this mode";
        assert_eq!(env.ignored(), [("GOMEMLIMIT", "there is no Go runtime"), ("ISTIO_NEW", unknown)]);
    }
}
