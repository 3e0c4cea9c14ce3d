//! Logs to standard error, as text or JSON, with Istio's way of naming levels.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// How to log.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// One JSON object a line instead of text.
    pub json: bool,
    /// Istio's `--log_output_level`: `default:info,ads:debug`, or one level; empty means info.
    ///
    /// Scopes are module paths here; scopes of Istio that do not exist match nothing.
    pub levels: String,
}

/// A level that is none.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("log level {text:?} is none of none, error, warn, info, debug, trace")]
pub struct UnknownLevel {
    text: String,
}

/// Starts logging. `OUTRIGGER_LOG`, in tracing's filter syntax, wins over the options. A second call changes nothing.
pub fn init(options: &Options) -> Result<(), UnknownLevel> {
    let directives = directives(&options.levels)?;
    let filter = std::env::var("OUTRIGGER_LOG").ok().and_then(|text| EnvFilter::try_new(text).ok());
    let filter = filter.unwrap_or_else(|| EnvFilter::new(directives));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_span_events(FmtSpan::NONE)
        // Where a line cannot be written (a full disk, a reader that is gone), neither can a complaint about it: that would panic.
        .log_internal_errors(false);
    // A second initialisation happens in tests and when roles share a process; the first one stays.
    let _ = if options.json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_ansi(std::io::stderr().is_terminal()).try_init()
    };
    Ok(())
}

/// Istio's levels as tracing's directives.
fn directives(levels: &str) -> Result<String, UnknownLevel> {
    let mut out = vec!["info".to_owned()];
    for part in levels.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (scope, level) = part.rsplit_once(':').unwrap_or(("default", part));
        let level = match level {
            "none" => "off",
            "fatal" | "error" => "error",
            "warn" | "warning" => "warn",
            "info" | "debug" | "trace" => level,
            "critical" => "error",
            _ => return Err(UnknownLevel { text: level.to_owned() }),
        };
        if scope == "default" || scope == "all" {
            out[0] = level.to_owned();
        } else if scope.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
            out.push(format!("{}={level}", scope.replace('-', "_")));
        }
    }
    Ok(out.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istio_levels_become_directives() {
        assert_eq!(directives("").unwrap(), "info");
        assert_eq!(directives("default:debug,ads:warning, xds-gen:none").unwrap(), "debug,ads=warn,xds_gen=off");
        assert_eq!(directives("error").unwrap(), "error");
        assert_eq!(directives("ads:loud"), Err(UnknownLevel { text: "loud".to_owned() }));
    }
}
