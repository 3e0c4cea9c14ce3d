use super::*;

fn policy(retry_on: &str, retries: u32) -> Arc<RetryPolicy> {
    let policy = pb::route::RetryPolicy {
        retry_on: retry_on.into(),
        num_retries: Some(pb::UInt32Value { value: retries }),
        retriable_status_codes: vec![418],
        ..Default::default()
    };
    Arc::new(RetryPolicy::compile(&policy).unwrap())
}

fn status(code: &str) -> Headers {
    Headers::of([(":status", code)])
}

#[test]
fn limits_and_pauses() {
    let mut random = Random::new(1);
    let mut state = RetryState::new(Some(&policy("5xx", 2)), &mut Headers::new(), &RetryRuntime::default()).unwrap();
    for upper in [25, 50] {
        let RetryVerdict::Retry { after, .. } = state.on_response(&status("503"), &mut random, UNIX_EPOCH) else {
            panic!()
        };
        assert!(after < Duration::from_millis(upper), "{after:?}");
    }
    assert_eq!(state.on_response(&status("503"), &mut random, UNIX_EPOCH), RetryVerdict::LimitExceeded);
    assert_eq!(state.on_response(&status("200"), &mut random, UNIX_EPOCH), RetryVerdict::No);
}

use std::time::UNIX_EPOCH;

#[test]
fn conditions() {
    let mut random = Random::new(1);
    let mut check = |on: &str, outcome: Result<&Headers, (ResetReason, bool)>| {
        let mut state = RetryState::new(Some(&policy(on, 9)), &mut Headers::new(), &RetryRuntime::default())?;
        let verdict = match outcome {
            Ok(response) => state.on_response(response, &mut random, UNIX_EPOCH),
            Err((reason, started)) => state.on_reset(reason, started, &mut random),
        };
        Some(verdict != RetryVerdict::No)
    };
    assert_eq!(check("gateway-error", Ok(&status("500"))), Some(false));
    assert_eq!(check("gateway-error", Ok(&status("502"))), Some(true));
    assert_eq!(check("retriable-status-codes", Ok(&status("418"))), Some(true));
    assert_eq!(check("unavailable", Ok(&Headers::of([(":status", "200"), ("grpc-status", "14")]))), Some(true));
    assert_eq!(check("5xx", Ok(&Headers::of([(":status", "503"), ("x-envoy-ratelimited", "true")]))), Some(false));
    assert_eq!(check("connect-failure", Err((ResetReason::ConnectTimeout, false))), Some(true));
    assert_eq!(check("connect-failure", Err((ResetReason::RemoteReset, true))), Some(false));
    assert_eq!(check("reset-before-request", Err((ResetReason::ConnectionTermination, false))), Some(true));
    assert_eq!(check("reset-before-request", Err((ResetReason::ConnectionTermination, true))), Some(false));
    assert_eq!(check("5xx", Err((ResetReason::Overflow, false))), Some(false));
    assert_eq!(check("503", Ok(&status("503"))), None);
}

#[test]
fn the_request_may_ask_for_retries_and_the_headers_are_used_up() {
    let mut headers = Headers::of([("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "3")]);
    let state = RetryState::new(None, &mut headers, &RetryRuntime::default()).unwrap();
    assert_eq!((state.left, headers.len()), (3, 0));
    assert!(RetryState::new(None, &mut Headers::new(), &RetryRuntime::default()).is_none());
}
