//! Frames that cost a server more than their sender, counted as Envoy counts them (`ProtocolConstraints`).

use crate::frame::{ACK, CONTINUATION, DATA, END_STREAM, HEADERS, Head, PING, PRIORITY, SETTINGS, WINDOW_UPDATE};
use proxy_core::cluster::Http2Options;

/// Bounds of one connection (`envoy.config.core.v3.Http2ProtocolOptions`).
#[derive(Clone, Copy, Debug)]
pub struct Limits {
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
    pub fn of(options: &Http2Options) -> Self {
        Self {
            empty: options.max_consecutive_empty_frames.into(),
            priority: options.max_priority_frames_per_stream.into(),
            window_updates: options.max_window_updates_per_data_frame.into(),
            control: options.max_outbound_control_frames.into(),
        }
    }
}

/// Answers to SETTINGS and PINGs that the codec below Envoy lets wait (nghttp2's `NGHTTP2_DEFAULT_MAX_OBQ_FLOOD_ITEM`),
/// whatever `max_outbound_control_frames` says.
const CODEC_ACKS: u64 = 1000;

/// What there was one too many of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flooded {
    /// Frames without a payload, the last on this stream.
    Empty(u32),
    Priority,
    WindowUpdates,
    /// `own`: more than the configuration allows, not only more than the codec does.
    Control {
        own: bool,
    },
}

impl Flooded {
    /// Its counter; the codec has none.
    pub fn counter(self) -> Option<&'static str> {
        match self {
            Self::Empty(_) => Some(EMPTY_FRAMES),
            Self::Priority => Some("http2.inbound_priority_frames_flood"),
            Self::WindowUpdates => Some("http2.inbound_window_update_frames_flood"),
            Self::Control { own } => own.then_some("http2.outbound_control_flood"),
        }
    }

    /// What is logged of the streams that end with the connection.
    pub fn details(self) -> &'static str {
        match self {
            Self::Empty(_) => "codec_error:Too_many_consecutive_frames_with_an_empty_payload",
            Self::Priority => "codec_error:Too_many_PRIORITY_frames",
            Self::WindowUpdates => "codec_error:Too_many_WINDOW_UPDATE_frames",
            Self::Control { own: true } => "codec_error:Too_many_control_frames_in_the_outbound_queue.",
            Self::Control { own: false } => {
                "codec_error:Flooding_was_detected_in_this_HTTP/2_session,_and_it_must_be_closed"
            }
        }
    }

    /// The stream that did it, and what is logged of that one.
    pub fn blames(self) -> Option<(u32, &'static str)> {
        match self {
            Self::Empty(stream) => Some((stream, EMPTY_FRAMES)),
            _ => None,
        }
    }
}

const EMPTY_FRAMES: &str = "http2.inbound_empty_frames_flood";

/// What one connection did so far.
#[derive(Debug)]
pub(crate) struct Flood {
    limits: Limits,
    empty: u64,
    priority: u64,
    window_updates: u64,
    control: u64,
    streams: u64,
    data_sent: u64,
}

impl Flood {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, empty: 0, priority: 0, window_updates: 0, control: 0, streams: 0, data_sent: 0 }
    }

    /// Takes note of a frame; an error when there were too many.
    pub(crate) fn received(&mut self, head: Head) -> Result<(), Flooded> {
        let (calm, of) = match head.kind {
            HEADERS | DATA | CONTINUATION => {
                self.streams += u64::from(head.kind == HEADERS);
                let ends = head.kind != CONTINUATION && head.flags & END_STREAM != 0;
                self.empty = if head.length == 0 && !ends { self.empty + 1 } else { 0 };
                (self.empty <= self.limits.empty, Flooded::Empty(head.stream))
            }
            PRIORITY => {
                self.priority += 1;
                (self.priority <= self.limits.priority * (1 + self.streams), Flooded::Priority)
            }
            WINDOW_UPDATE => {
                self.window_updates += 1;
                let most = 5 + 2 * (self.streams + self.limits.window_updates * self.data_sent);
                (self.window_updates <= most, Flooded::WindowUpdates)
            }
            SETTINGS | PING if head.flags & ACK == 0 => {
                self.control += 1;
                (self.control <= CODEC_ACKS, Flooded::Control { own: false })
            }
            _ => return Ok(()),
        };
        if calm { Ok(()) } else { Err(of) }
    }

    /// Whether there are more answers to SETTINGS and PINGs than the configuration allows. They are looked at together.
    pub(crate) fn answers(&self) -> Result<(), Flooded> {
        let fine = self.control <= self.limits.control;
        if fine { Ok(()) } else { Err(Flooded::Control { own: true }) }
    }

    /// A frame of data was sent.
    pub(crate) fn sent_data(&mut self) {
        self.data_sent += 1;
    }

    /// The peer waits for us: what it asked for is answered.
    pub(crate) fn rests(&mut self) {
        self.control = 0;
    }
}

/// Whether requests that their client took back at once are so many that the connection ends (CVE-2023-44487; Envoy's
/// `overload.premature_reset_total_stream_count`, 500): half of those, or of all requests if there were more.
pub fn is_rapid_reset(premature: u32, requests: u32) -> bool {
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
        assert_eq!(flood.received(head(DATA, 0, 0)), Err(Flooded::Empty(1)), "two in a row");
        assert!((0..200).all(|_| flood.takes(head(PRIORITY, 5, 0))) && !flood.takes(head(PRIORITY, 5, 0)));
        assert!((0..7).all(|_| flood.takes(head(WINDOW_UPDATE, 4, 0))) && !flood.takes(head(WINDOW_UPDATE, 4, 0)));
        (0..10).for_each(|_| flood.sent_data());
        assert!((0..199).all(|_| flood.takes(head(WINDOW_UPDATE, 4, 0))));
        assert!(!flood.takes(head(WINDOW_UPDATE, 4, 0)));
        assert!((0..1000).all(|_| flood.takes(head(PING, 8, 0))) && flood.takes(head(PING, 8, ACK)));
        flood.rests();
        assert!((0..1000).all(|_| flood.takes(head(SETTINGS, 0, 0))));
        assert_eq!(flood.received(head(SETTINGS, 0, 0)).unwrap_err().counter(), None, "the codec's own limit");
        let options = Http2Options { max_outbound_control_frames: 10, ..Http2Options::default() };
        let mut flood = Flood::new(Limits::of(&options));
        assert!((0..10).all(|_| flood.takes(head(PING, 8, 0))) && flood.answers().is_ok());
        assert!(flood.takes(head(PING, 8, 0)));
        assert_eq!(flood.answers(), Err(Flooded::Control { own: true }));
    }

    #[test]
    fn half_of_many_requests_taken_back_is_too_much() {
        assert!(!is_rapid_reset(249, 249) && is_rapid_reset(250, 250));
        assert!(!is_rapid_reset(400, 1000) && is_rapid_reset(500, 1000));
    }
}
