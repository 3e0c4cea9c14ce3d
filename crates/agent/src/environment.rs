//! The environment of an injected pod: which variables there are, and what became of each.

use std::collections::BTreeMap;
use std::time::Duration;

/// A copy of the environment, so that everything that reads it can be tested with a map.
#[derive(Clone, Debug, Default)]
pub struct Environment(BTreeMap<String, String>);

/// A variable whose value cannot be used.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("environment variable {name}={value:?}: {reason}")]
pub struct BadVariable {
    name: String,
    value: String,
    reason: String,
}

/// Variables of pilot-agent that have no effect here, with the reason.
///
/// Source: istio `pilot/cmd/pilot-agent/options/options.go` and the injection templates.
const IGNORED: [(&str, &str); 25] = [
    ("GOMEMLIMIT", "there is no Go runtime"),
    ("GOMAXPROCS", "there is no Go runtime"),
    ("GODEBUG", "there is no Go runtime"),
    ("COMPLIANCE_POLICY", "cipher suites follow the mesh configuration"),
    ("CA_PROVIDER", "only Istio's CA protocol is spoken"),
    ("CREDENTIAL_FETCHER_TYPE", "only mounted tokens are used"),
    ("CREDENTIAL_IDENTITY_PROVIDER", "only mounted tokens are used"),
    ("ENABLE_PROBE_KEEPALIVE_CONNECTIONS", "probes never keep connections, as kubelets do not"),
    ("ENVOY_SECURE_METRICS_PORT", "not supported"),
    ("ENVOY_SECURE_MERGED_METRICS_PORT", "not supported"),
    ("ENVOY_SKIP_DEPRECATED_LOGS", "there are none"),
    ("FILE_DEBOUNCE_DURATION", "files are compared as a whole"),
    ("GRPC_XDS_BOOTSTRAP", "proxyless gRPC is not supported"),
    ("ISTIO_ENABLE_HTTP2_PROBING", "probes speak HTTP/1.1"),
    ("PEER_METADATA_DISCOVERY", "ambient only"),
    ("PKCS8_KEY", "keys are always PKCS #8"),
    ("PROXY_CONFIG_XDS_AGENT", "not supported"),
    ("STS_PORT", "there is no token exchange"),
    ("WASM_HTTP_REQUEST_MAX_RETRIES", "modules are not fetched by the agent"),
    ("WASM_HTTP_REQUEST_TIMEOUT", "modules are not fetched by the agent"),
    ("WASM_INSECURE_REGISTRIES", "modules are not fetched by the agent"),
    ("WASM_MODULE_EXPIRY", "modules are not fetched by the agent"),
    ("WASM_PURGE_INTERVAL", "modules are not fetched by the agent"),
    ("WORKLOAD_IDENTITY_SOCKET_FILE", "identities of SPIRE are not supported"),
    ("XDS_AUTH_PROVIDER", "only certificates and tokens are used"),
];

impl Environment {
    /// The process's environment. Variables that are not UTF-8 are left out.
    pub fn of_process() -> Environment {
        let text = |s: std::ffi::OsString| s.into_string().ok();
        Environment(std::env::vars_os().filter_map(|(name, value)| Some((text(name)?, text(value)?))).collect())
    }

    /// The value of a variable; empty counts as unset, as in Go's `env` package.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
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
        self.0.iter().filter_map(move |(name, value)| Some((name.strip_prefix(prefix)?, value.as_str())))
    }

    /// The variables that are set and have no effect, each with the reason: one log line's worth.
    pub fn ignored(&self) -> Vec<(&'static str, &'static str)> {
        IGNORED.into_iter().filter(|(name, _)| self.get(name).is_some()).collect()
    }

    fn bad(&self, name: &str, reason: &str) -> BadVariable {
        BadVariable { name: name.to_owned(), value: self.or(name, ""), reason: reason.to_owned() }
    }
}

impl FromIterator<(String, String)> for Environment {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(pairs: T) -> Environment {
        Environment(pairs.into_iter().collect())
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(pairs: [(&str, &str); N]) -> Environment {
        Environment(pairs.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
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
        ]);
        assert_eq!(env.flag("A", false), Ok(true));
        assert_eq!(env.flag("E", true), Ok(true));
        assert_eq!(
            env.flag("B", true).unwrap_err().to_string(),
            "environment variable B=\"maybe\": expected true or false"
        );
        assert_eq!(env.duration("D", Duration::ZERO), Ok(Duration::from_secs(90)));
        assert!(env.number::<u16>("N", 1).is_err());
        assert_eq!(env.ignored(), [("GOMEMLIMIT", "there is no Go runtime")]);
    }
}
