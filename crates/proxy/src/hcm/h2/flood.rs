//! Frames that cost a server more than their sender, counted as Envoy counts them (`ProtocolConstraints`).

use crate::frames::{ACK, CONTINUATION, DATA, END_STREAM, HEADERS, Head, PING, PRIORITY, SETTINGS, WINDOW_UPDATE};
use proxy_core::cluster::Http2Options;

/// Bounds of one connection (`envoy.config.core.v3.Http2ProtocolOptions`).
#[derive(Clone, Copy, Debug)]
pub(in crate::hcm) struct Limits {
    /// `max_consecutive_inbound_frames_with_empty_payload`.
    empty: u64,
    /// `max_inbound_priority_frames_per_stream`.
    priority: u64,
    /// `max_inbound_window_update_frames_per_data_frame_sent`.
    window_updates: u64,
    /// `max_outbound_control_frames`: SETTINGS and PINGs that want an answer, without a pause between.
    control: u64,
}

impl Limits {
    pub(super) fn of(options: &Http2Options) -> Self {
        Self {
            empty: options.max_consecutive_empty_frames.into(),
            priority: options.max_priority_frames_per_stream.into(),
            window_updates: options.max_window_updates_per_data_frame.into(),
            control: options.max_outbound_control_frames.into(),
        }
    }
}

/// What one connection did so far.
#[derive(Debug)]
pub(super) struct Flood {
    limits: Limits,
    empty: u64,
    priority: u64,
    window_updates: u64,
    control: u64,
    streams: u64,
    data_sent: u64,
}

impl Flood {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, empty: 0, priority: 0, window_updates: 0, control: 0, streams: 0, data_sent: 0 }
    }

    /// What there was one too many of, as its counter is named.
    pub(super) fn received(&mut self, head: Head) -> Result<(), &'static str> {
        let (calm, counter) = self.judge(head);
        if calm { Ok(()) } else { Err(counter) }
    }

    fn judge(&mut self, head: Head) -> (bool, &'static str) {
        match head.kind {
            HEADERS | DATA | CONTINUATION => {
                self.streams += u64::from(head.kind == HEADERS);
                let ends = head.kind != CONTINUATION && head.flags & END_STREAM != 0;
                self.empty = if head.length == 0 && !ends { self.empty + 1 } else { 0 };
                (self.empty <= self.limits.empty, "http2.inbound_empty_frames_flood")
            }
            PRIORITY => {
                self.priority += 1;
                (self.priority <= self.limits.priority * (1 + self.streams), "http2.inbound_priority_frames_flood")
            }
            WINDOW_UPDATE => {
                self.window_updates += 1;
                let most = 5 + 2 * (self.streams + self.limits.window_updates * self.data_sent);
                (self.window_updates <= most, "http2.inbound_window_update_frames_flood")
            }
            SETTINGS | PING if head.flags & ACK == 0 => {
                self.control += 1;
                (self.control <= self.limits.control, "http2.outbound_control_flood")
            }
            _ => (true, ""),
        }
    }

    pub(super) fn sent(&mut self, head: Head) {
        self.data_sent += u64::from(head.kind == DATA);
    }

    /// The peer waits for us: what it asked for is answered.
    pub(super) fn rests(&mut self) {
        self.control = 0;
    }
}

/// Whether requests that their client took back at once are so many that the connection ends (CVE-2023-44487; Envoy's
/// `overload.premature_reset_total_stream_count`, 500): half of those, or of all requests if there were more.
pub(super) fn is_rapid_reset(premature: u32, requests: u32) -> bool {
    u64::from(premature) * 2 >= u64::from(requests.max(500))
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Flood {
        fn takes(&mut self, head: Head) -> bool {
            self.received(head).is_ok()
        }
    }

    fn head(kind: u8, length: usize, flags: u8) -> Head {
        let [_, a, b, c] = (length as u32).to_be_bytes();
        Head::read(&[a, b, c, kind, flags, 0, 0, 0, 1])
    }

    #[test]
    fn counts_are_envoys() {
        let mut flood = Flood::new(Limits::of(&Http2Options::default()));
        assert!(flood.takes(head(HEADERS, 9, 4)) && flood.takes(head(DATA, 0, 0)));
        assert!(flood.takes(head(DATA, 1, 0)) && flood.takes(head(DATA, 0, 0)), "not in a row");
        assert_eq!(flood.received(head(DATA, 0, 0)), Err("http2.inbound_empty_frames_flood"), "two in a row");
        assert!((0..200).all(|_| flood.takes(head(PRIORITY, 5, 0))) && !flood.takes(head(PRIORITY, 5, 0)));
        assert!((0..7).all(|_| flood.takes(head(WINDOW_UPDATE, 4, 0))) && !flood.takes(head(WINDOW_UPDATE, 4, 0)));
        (0..10).for_each(|_| flood.sent(head(DATA, 10, 0)));
        assert!((0..199).all(|_| flood.takes(head(WINDOW_UPDATE, 4, 0))));
        assert!(!flood.takes(head(WINDOW_UPDATE, 4, 0)));
        assert!((0..1000).all(|_| flood.takes(head(PING, 8, 0))) && flood.takes(head(PING, 8, ACK)));
        flood.rests();
        assert!((0..1000).all(|_| flood.takes(head(SETTINGS, 0, 0))) && !flood.takes(head(SETTINGS, 0, 0)));
    }

    #[test]
    fn half_of_many_requests_taken_back_is_too_much() {
        assert!(!is_rapid_reset(249, 249) && is_rapid_reset(250, 250));
        assert!(!is_rapid_reset(400, 1000) && is_rapid_reset(500, 1000));
    }
}
