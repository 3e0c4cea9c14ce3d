//! Response flags and details in words, with what usually is behind them.

/// Envoy's response flags, `UH` or `URX,UF`, in a sentence; `None` for none. With `by_name`, the cluster's endpoints are what DNS says.
pub fn of_flags(flags: &str, by_name: bool) -> Option<String> {
    let word = |flag: &str| match flag {
        "UH" if by_name => {
            Some("DNS gives no address for the cluster's host; is the name right, and can the pod resolve it?")
        }
        flag => of_flag(flag),
    };
    let words: Vec<&str> = flags.split(',').filter_map(word).collect();
    if words.is_empty() { None } else { Some(words.join("; ")) }
}

fn of_flag(flag: &str) -> Option<&'static str> {
    Some(match flag {
        "NR" => "no route applies to the request, or no filter chain to the connection",
        "NC" => {
            "the route's cluster does not exist: a subset that no DestinationRule defines, or a service that is gone"
        }
        "UH" => "the cluster has no endpoint that may be chosen: none is ready, or the subset's labels fit no pod",
        "UF" => {
            "the connection to the endpoint could not be made: nothing listens there, or one side wants TLS and the other does not"
        }
        "UC" => {
            "the server closed the connection before it answered: its keep-alive is shorter than ours, or it wants mutual TLS and gets plain text"
        }
        "UO" => "a limit of the DestinationRule's connectionPool is reached",
        "UT" => "the route's timeout is over",
        "URX" => "all retries are used up",
        "UR" => "the server reset the request",
        "LR" => "the proxy reset the request",
        "LH" => "the proxy's own health check failed",
        "DC" => "the client left before the answer was complete",
        "DI" => "an injected fault delayed the request",
        "FI" => "an injected fault answered",
        "RL" => "a rate limit answered",
        "RLSE" => "the rate limit service failed",
        "UAEX" => "an authorization filter denied the request",
        "DPE" => "the client's bytes are no HTTP",
        "UPE" => "the server's bytes are no HTTP; is the port's protocol right?",
        "IH" => "a header that is checked has a value that is not allowed",
        "SI" => "the stream was idle for too long",
        "DT" => "the request took longer than a connection or stream may last",
        "UMSDR" => "the stream lasted longer than it may",
        "OM" => "the proxy is out of memory",
        "DF" => "the endpoint's name could not be resolved",
        _ => return None,
    })
}

/// `response_code_details` in words; those that are not known stay as they are.
pub fn of_details(details: &str) -> String {
    match details {
        "direct_response" => {
            "the route says so itself (redirect, directResponse, or REGISTRY_ONLY for unknown hosts)".to_owned()
        }
        details if details.starts_with("rbac_access_denied") => match details.split_once('[') {
            Some((_, "none]")) => "there are ALLOW policies, and no rule of theirs applies".to_owned(),
            Some((_, policy)) => format!("denied by {}", policy.strip_suffix(']').unwrap_or(policy)),
            None => details.to_owned(),
        },
        details => details.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_flags_are_one_sentence() {
        assert_eq!(of_flags("-", false), None);
        assert!(of_flags("UH", true).is_some_and(|text| text.contains("DNS")));
        assert!(
            of_flags("URX,UF", false).is_some_and(|text| text.starts_with("all retries are used up; the connection"))
        );
        assert_eq!(
            of_details("rbac_access_denied_matched_policy[none]"),
            "there are ALLOW policies, and no rule of theirs applies"
        );
    }
}
