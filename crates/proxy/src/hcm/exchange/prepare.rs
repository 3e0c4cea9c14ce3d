//! The head of a request before its filters: checked, completed, and whether it may upgrade.

use super::{Exchange, Stop};
use crate::hcm::local_reply::LocalReply;
use proxy_core::Headers;
use proxy_core::hcm::{self, PathVerdict};
use proxy_core::stream_info::HttpProtocol;

impl Exchange {
    /// A 400, which ends the connection unless only streams are to end.
    fn malformed_request(&self, details: &'static str) -> Stop {
        LocalReply::new(400, "", details).into()
    }

    /// Checks and completes the head, as `ConnectionManagerImpl::ActiveStream::decodeHeaders` does before the filters. A refusal
    /// gets what the head's route says, as far as there is one.
    pub(super) fn prepare(&mut self) -> Result<(), Stop> {
        let completed = self.complete_head();
        let said = |name| self.request.get_str(name).filter(|value| !value.is_empty());
        if completed.is_err() {
            // Without the protocol, which may not have been added yet, Envoy finds the virtual host alone.
            match said("x-forwarded-proto") {
                Some(_) => self.find_route(),
                None => {
                    let host = said(":authority").unwrap_or_default();
                    let table = self.http.route_table();
                    self.info.virtual_host = table.and_then(|table| table.virtual_host(host).cloned());
                }
            }
        }
        completed
    }

    fn complete_head(&mut self) -> Result<(), Stop> {
        let http = self.http.clone();
        let config = &http.config;
        if self.hints.expect_continue && !config.proxy_100_continue {
            self.request.remove("expect");
            http.stats.downstream_rq.inc(100);
            http.of_listener.downstream_rq.inc(100);
            self.info.response_code = Some(100);
            self.answer.interim(100, &Headers::new());
        }
        if self.info.protocol == Some(HttpProtocol::Http10)
            && let Some(host) = &config.http1.default_host_for_http_10
            && !self.request.contains(":authority")
        {
            self.request.set(":authority", host.as_bytes());
        }
        let authority = self.request.get(":authority");
        if authority.is_none() {
            return Err(self.malformed_request("missing_host_header"));
        }
        if let Some(scheme) = self.hints.absolute {
            self.request.set(":scheme", scheme.as_bytes());
        }
        if self.hints.upgrade && self.upgrade_kind() == "connect-udp" {
            let path = self.request.get(":path").unwrap_or_default();
            let Some(target) = hcm::connect_udp_target(path) else {
                let text = "The path is incorrect for CONNECT-UDP";
                return Err(LocalReply::new(404, text, "invalid_path").into());
            };
            self.request.set(":authority", target.as_bytes());
        }
        let path = self.request.get(":path").unwrap_or_default();
        if path.is_empty() && !self.hints.connect {
            return Err(LocalReply::new(404, "", "missing_path_rejected").into());
        }
        if !path.is_empty() && path[0] != b'/' && !self.hints.connect {
            http.stats.downstream_rq_non_relative_path.inc();
            return Err(LocalReply::new(404, "", "absolute_path_rejected").into());
        }
        if self.request.get(":method") == Some(b"QUERY") && !self.request.contains("content-type") {
            return Err(self.malformed_request("query_missing_content_type"));
        }
        if self.request.get(":path").is_some_and(|p| p.contains(&b'#')) {
            // RFC 3986 has no fragment in a request target.
            http.stats.downstream_rq_failed_path_normalization.inc();
            return Err(self.malformed_request("path_normalization_failed"));
        }
        match hcm::normalize(config, &mut self.request) {
            PathVerdict::Ok => {}
            PathVerdict::Reject(details) => {
                http.stats.downstream_rq_failed_path_normalization.inc();
                return Err(self.malformed_request(details));
            }
            // Clients of gRPC follow no redirects.
            PathVerdict::Redirect(_) if self.grpc => {
                http.stats.downstream_rq_failed_path_normalization.inc();
                return Err(self.malformed_request("path_normalization_failed"));
            }
            PathVerdict::Redirect(location) => {
                http.stats.downstream_rq_redirected_with_normalized_path.inc();
                let mut reply = LocalReply::new(307, "", "path_normalization_failed");
                reply.headers.push(("location".into(), location.into_bytes()));
                return Err(reply.into());
            }
        }
        self.peer.take_from(&mut self.request, &http);
        let identity =
            hcm::conform_request(config, &mut self.request, &self.info, || uuid(&mut http.worker.random.borrow_mut()));
        self.conformed = true;
        if let Some(status) = identity.refuse {
            http.stats.downstream_rq_rejected_via_ip_detection.inc();
            return Err(LocalReply::new(status, "", "rejecting_because_detection_failed").into());
        }
        self.info.remote = identity.remote;
        if !identity.internal
            && let Some(table) = http.route_table()
        {
            for name in &table.common.internal_only_headers {
                self.request.remove(name);
            }
        }
        Ok(())
    }

    fn upgrade_kind(&self) -> String {
        if self.hints.connect {
            return "CONNECT".to_owned();
        }
        let value = self.request.get_str(":protocol").or_else(|| self.request.get_str("upgrade"));
        value.unwrap_or_default().to_ascii_lowercase()
    }

    /// Route first, then the connection manager, says whether an upgrade or CONNECT passes, and the latter through
    /// which filters (Envoy `HttpConnectionManagerConfig::createUpgradeFilterChain`).
    pub(super) fn check_upgrade(&mut self) -> Result<(), Stop> {
        if !(self.hints.upgrade || self.hints.connect) || self.upgraded.is_some() {
            return Ok(());
        }
        let kind = self.upgrade_kind();
        let by_route =
            self.matched.as_ref().and_then(|m| m.forward()).and_then(|f| f.upgrade(&kind.to_ascii_lowercase()));
        let upgrades = &self.http.config.upgrades;
        let own = upgrades.iter().position(|u| u.kind.eq_ignore_ascii_case(&kind));
        if by_route.unwrap_or_else(|| own.is_some_and(|own| upgrades[own].enabled)) {
            self.upgraded = Some(own.filter(|own| upgrades[*own].filters.is_some()));
            self.http.stats.downstream_cx_upgrades_total.inc();
            self.http.stats.downstream_cx_upgrades_active.inc();
            return Ok(());
        }
        if self.matched.is_none() && self.redirect_to_tls.is_none() {
            // There is no route to refuse it; that none was found is answered later.
            return Ok(());
        }
        self.http.stats.downstream_rq_ws_on_non_ws_route.inc();
        if !self.answer.is_h1() {
            self.http.leave();
        }
        let mut reply = LocalReply::new(403, "", "upgrade_failed");
        // What follows is not of HTTP, and must not be taken for it.
        reply.close = true;
        Err(reply.into())
    }
}

/// A random UUID (version 4).
fn uuid(random: &mut proxy_core::Random) -> [u8; 36] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    // Version 4, variant 1.
    let high = random.next() & !0xf000 | 0x4000;
    let low = random.next() & !(0b11 << 62) | 0b10 << 62;
    let mut text = [b'-'; 36];
    let mut group = |start: usize, digits: usize, bits: u64| {
        for (index, place) in text[start..start + digits].iter_mut().rev().enumerate() {
            *place = DIGITS[(bits >> (4 * index)) as usize & 0xf];
        }
    };
    group(0, 8, high >> 32);
    group(9, 4, high >> 16);
    group(14, 4, high);
    group(19, 4, low >> 48);
    group(24, 12, low);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_random_uuids() {
        let id = uuid(&mut proxy_core::Random::new(7));
        let parts: Vec<&[u8]> = id.split(|b| *b == b'-').collect();
        assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
        assert!(parts.concat().iter().all(u8::is_ascii_hexdigit));
        assert!(parts[2][0] == b'4' && b"89ab".contains(&parts[3][0]));
        assert_eq!(uuid(&mut proxy_core::Random::new(7)), id);
    }
}
