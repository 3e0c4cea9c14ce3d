//! The HTTP filters before the router, in their configured order. Decisions are proxy-core's; this carries them out.

use super::authz;
use super::exchange::{Exchange, Stop};
use super::local_reply::LocalReply;
use crate::stream::{Frame, RecvBody};
use bytes::Bytes;
use proxy_core::filters::{Abort, CorsDecision, HttpFilter, PerFilter};
use proxy_core::rbac::RbacInput;
use proxy_core::{Headers, ResponseFlags};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Instant;

/// Runs them all; an error is the answer instead of the router's.
pub(super) async fn run(exchange: &mut Exchange, body: &mut RecvBody) -> Result<(), Stop> {
    let config = exchange.http.config.clone();
    for entry in &config.filters {
        let per = exchange.matched.as_ref().and_then(|m| m.per_filter(&entry.name)).cloned();
        let disabled = match &per {
            Some(PerFilter::Disabled) => true,
            Some(_) => false,
            None => entry.disabled,
        };
        let per = per.as_ref().and_then(|p| p.settings()).cloned();
        if disabled {
            continue;
        }
        match &entry.filter {
            HttpFilter::Router(_) => return Ok(()),
            HttpFilter::Fault(fault) => {
                let fault = match &per {
                    Some(PerFilter::Fault(own)) => own,
                    _ => fault,
                };
                run_fault(exchange, fault).await?;
            }
            HttpFilter::Cors => cors(exchange)?,
            HttpFilter::Rbac(rbac) => {
                let rbac = match &per {
                    Some(PerFilter::Rbac(own)) => own,
                    _ => rbac,
                };
                run_rbac(exchange, rbac)?;
            }
            HttpFilter::LocalRateLimit(limit) => {
                let limit = match &per {
                    Some(PerFilter::LocalRateLimit(own)) => own,
                    _ => limit,
                };
                rate_limit(exchange, limit)?;
            }
            HttpFilter::Buffer(limit) => {
                let limit = match &per {
                    Some(PerFilter::Buffer(own)) => *own,
                    _ => *limit,
                };
                buffer(exchange, body, limit).await?;
            }
            HttpFilter::Jwt(jwt) => authz::jwt(exchange, jwt, per.as_ref()).await?,
            HttpFilter::ExtAuthz(config) => authz::ext_authz(exchange, config, per.as_ref(), body).await?,
            HttpFilter::HeaderMutation(mutation) => {
                let cx = proxy_core::FormatContext::new(&exchange.info, None, None);
                mutation.request.apply(&mut exchange.request, &cx);
            }
            HttpFilter::HealthCheck(check) => {
                if let Some(status) = check.answer(
                    &exchange.request,
                    exchange.http.worker.shared.health_failed.load(std::sync::atomic::Ordering::Relaxed),
                ) {
                    exchange.info.health_check = true;
                    return Err(LocalReply::new(status, "", "health_check_ok").into());
                }
            }
            // These act in the router (ALPN, sessions), at the end (metrics), or not at all.
            HttpFilter::GrpcStats(_)
            | HttpFilter::IstioAlpn(_)
            | HttpFilter::PeerMetadata(_)
            | HttpFilter::IstioStats(_)
            | HttpFilter::StatefulSession(_)
            | HttpFilter::SetFilterState(_)
            | HttpFilter::DynamicForwardProxy(_)
            | HttpFilter::NoOp { .. } => {}
        }
    }
    Ok(())
}

async fn run_fault(exchange: &mut Exchange, fault: &Arc<proxy_core::filters::Fault>) -> Result<(), Stop> {
    let worker = exchange.http.worker.clone();
    let cluster = exchange.info.upstream.cluster.clone();
    let decision = fault.decide(
        &exchange.request,
        cluster.as_deref(),
        &mut worker.random.borrow_mut(),
        worker.active_faults.get(),
    );
    if let Some(delay) = decision.delay {
        exchange.http.stats.other.inc("fault.delays_injected");
        exchange.info.flags.insert(ResponseFlags::FAULT_DELAY);
        worker.active_faults.set(worker.active_faults.get() + 1);
        let waited = exchange.wait(tokio::time::sleep(delay)).await;
        worker.active_faults.set(worker.active_faults.get() - 1);
        waited?;
    }
    if let Some(abort) = decision.abort {
        exchange.http.stats.other.inc("fault.aborts_injected");
        let mut reply =
            LocalReply::new(200, "fault filter abort", "fault_filter_abort").flagged(ResponseFlags::FAULT_ABORT);
        match abort {
            Abort::Http(status) => reply.status = status,
            Abort::Grpc(status) => reply.grpc_status = Some(status),
        }
        return Err(reply.into());
    }
    Ok(())
}

fn cors(exchange: &mut Exchange) -> Result<(), Stop> {
    let policy = exchange.matched.as_ref().and_then(|m| m.cors_policy()).cloned();
    let stats = exchange.http.stats.clone();
    match proxy_core::filters::cors_decide(policy.as_deref(), &exchange.request) {
        CorsDecision::NotCors => {}
        CorsDecision::Invalid => stats.other.inc("cors.origin_invalid"),
        CorsDecision::Preflight(headers) => {
            stats.other.inc("cors.origin_valid");
            let mut reply = LocalReply::new(200, "", "cors_response");
            reply.direct = true;
            reply.headers = headers.into_iter().map(|(n, v)| (n.to_string(), v.to_vec())).collect();
            return Err(reply.into());
        }
        CorsDecision::Actual(headers) => {
            stats.other.inc("cors.origin_valid");
            exchange.add_to_response.extend(headers.into_iter().map(|(n, v)| (n.to_string(), v.to_vec())));
        }
    }
    Ok(())
}

fn run_rbac(exchange: &mut Exchange, rbac: &Arc<proxy_core::Rbac>) -> Result<(), Stop> {
    if rbac.is_empty() {
        return Ok(());
    }
    let verdict = rbac.check(&RbacInput {
        headers: Some(&exchange.request),
        connection: &exchange.http.info,
        remote: &exchange.info.remote,
        metadata: &exchange.info.dynamic_metadata,
        filter_state: &exchange.info.filter_state,
        route_metadata: exchange.matched.as_ref().map(|m| &m.route.metadata),
    });
    let stats = &exchange.http.stats.other;
    if let Some(shadow) = &verdict.shadow {
        stats.inc(if shadow.allowed { "rbac.shadow_allowed" } else { "rbac.shadow_denied" });
    }
    if verdict.allowed {
        stats.inc("rbac.allowed");
        return Ok(());
    }
    stats.inc("rbac.denied");
    let reply = LocalReply::new(403, "RBAC: access denied", verdict.details());
    Err(reply.into())
}

fn rate_limit(exchange: &mut Exchange, limit: &Arc<proxy_core::filters::LocalRateLimit>) -> Result<(), Stop> {
    let worker = exchange.http.worker.clone();
    let stats = worker.named_stats();
    let prefix = format!("{}.http_local_rate_limit", limit.stat_prefix);
    for what in ["enabled", "enforced", "ok", "rate_limited"] {
        stats.touch(&format!("{prefix}.{what}"));
    }
    let mut random = worker.random.borrow_mut();
    if !limit.enabled.hit(&mut random) {
        return Ok(());
    }
    stats.inc(&format!("{prefix}.enabled"));
    let key = Arc::as_ptr(limit) as usize;
    let now = Instant::now();
    let mut buckets = worker.buckets.borrow_mut();
    let bucket = buckets.entry(key).or_insert_with(|| proxy_core::filters::TokenBucket::new(&limit.bucket, now));
    let taken = bucket.take(1, now);
    if limit.ratelimit_headers {
        let left = bucket.remaining(now);
        // Until there is one token again.
        let per_token = limit.bucket.fill_interval.as_secs_f64() / f64::from(limit.bucket.tokens_per_fill.max(1));
        let reset = if left == 0 { per_token.ceil() as u64 } else { 0 };
        let max = limit.bucket.max_tokens;
        for (name, value) in [
            ("x-ratelimit-limit", u64::from(max)),
            ("x-ratelimit-remaining", left.into()),
            ("x-ratelimit-reset", reset),
        ] {
            exchange.add_to_response.push((name.to_owned(), value.to_string().into_bytes()));
        }
    }
    if taken {
        stats.inc(&format!("{prefix}.ok"));
        return Ok(());
    }
    stats.inc(&format!("{prefix}.rate_limited"));
    if !limit.enforced.hit(&mut random) {
        return Ok(());
    }
    stats.inc(&format!("{prefix}.enforced"));
    let mut reply =
        LocalReply::new(limit.status, "local_rate_limited", "local_rate_limited").flagged(ResponseFlags::RATE_LIMITED);
    let mut extra = Headers::new();
    let cx = proxy_core::FormatContext::new(&exchange.info, Some(&exchange.request), None);
    limit.response_headers.apply(&mut extra, &cx);
    reply.headers = extra.iter_regular().map(|(n, v)| (String::from_utf8_lossy(n).into_owned(), v.to_vec())).collect();
    Err(reply.into())
}

/// Holds the request until all of it is there.
async fn buffer(exchange: &mut Exchange, body: &mut RecvBody, limit: u64) -> Result<(), Stop> {
    if body.is_empty() {
        return Ok(());
    }
    let mut frames = VecDeque::new();
    let mut size = 0u64;
    loop {
        let frame = poll_fn(|cx| exchange.poll_with(cx, |cx| body.poll_frame(cx).map(Ok))).await?;
        match frame {
            None => break,
            Some(Ok(Frame::Data(data))) => {
                size += data.len() as u64;
                if size > limit {
                    exchange.http.stats.downstream_rq_too_large.inc();
                    return Err(LocalReply::new(413, "Payload Too Large", "request_payload_too_large").into());
                }
                frames.push_back(Frame::Data(data));
            }
            Some(Ok(trailers)) => frames.push_back(trailers),
            Some(Err(_)) => return Err(Stop::Gone(false)),
        }
    }
    exchange.request_complete();
    exchange.info.bytes_received = size;
    // Envoy's buffer filter sets the length that is known now.
    if !exchange.request.contains("content-length") {
        exchange.request.set("content-length", size.to_string().as_bytes());
    }
    exchange.request.remove("transfer-encoding");
    *body = RecvBody::Memory(frames);
    Ok(())
}

/// The first `limit` bytes of the request's body, which stays readable.
pub(super) async fn peek_body(
    exchange: &mut Exchange,
    body: &mut RecvBody,
    limit: usize,
    allow_partial: bool,
) -> Result<Bytes, Stop> {
    let mut frames = VecDeque::new();
    let mut seen = Vec::new();
    let mut ended = body.is_empty();
    while !ended {
        let frame = poll_fn(|cx| exchange.poll_with(cx, |cx| body.poll_frame(cx).map(Ok))).await?;
        match frame {
            None => ended = true,
            Some(Ok(frame)) => {
                if let Frame::Data(data) = &frame {
                    seen.extend_from_slice(data);
                }
                frames.push_back(frame);
                if seen.len() > limit && !allow_partial {
                    return Err(LocalReply::new(413, "Payload Too Large", "request_payload_too_large").into());
                }
                if seen.len() >= limit {
                    break;
                }
            }
            Some(Err(_)) => return Err(Stop::Gone(false)),
        }
    }
    if ended {
        exchange.request_complete();
    }
    seen.truncate(limit);
    if !frames.is_empty() {
        let rest = std::mem::replace(body, RecvBody::Empty);
        *body = if ended { RecvBody::Memory(frames) } else { RecvBody::Then(frames, Box::new(rest)) };
    }
    Ok(seen.into())
}
