//! The request's body on its way up, over several tries.

use crate::hcm::{Http, h2};
use crate::stream::{BodyError, Frame, RecvBody};
use bytes::Bytes;
use std::rc::Rc;
use std::task::{Context, Poll};

/// The request body over several tries: what was sent is kept while it may be needed again.
pub(super) struct Outgoing<'a> {
    pub(super) rest: &'a mut RecvBody,
    pub(super) kept: Vec<Frame>,
    pub(super) at: usize,
    pub(super) size: usize,
    pub(super) limit: usize,
    pub(super) keeping: bool,
    pub(super) ended: bool,
    /// Body bytes of the client.
    pub(super) received: u64,
    /// HTTP/1 trailers are dropped unless they are enabled.
    pub(super) drop_trailers: bool,
    /// HTTP/2 trailers are held to the limits of heads.
    pub(super) limits: Option<Rc<Http>>,
    /// Counts gRPC messages.
    pub(super) messages: Option<crate::hcm::encode::GrpcMessages>,
}

impl Outgoing<'_> {
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        if let Some(frame) = self.kept.get(self.at) {
            self.at += 1;
            return Poll::Ready(Some(Ok(frame.clone())));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        match self.rest.poll_frame(cx) {
            Poll::Ready(Some(Ok(Frame::Trailers(_)))) if self.drop_trailers => self.poll(cx),
            Poll::Ready(Some(Ok(mut frame))) => {
                if let (Frame::Trailers(fields), Some(http)) = (&mut frame, &self.limits)
                    && let Err(details) = h2::check(http, fields)
                {
                    return Poll::Ready(Some(Err(BodyError::Refused(details))));
                }
                if let Frame::Data(data) = &frame {
                    self.received += data.len() as u64;
                    if let Some(messages) = &mut self.messages {
                        messages.look(data);
                    }
                    self.size += data.len();
                }
                if self.keeping && self.size > self.limit {
                    self.keeping = false;
                    self.kept = Vec::new();
                    self.at = 0;
                }
                if self.keeping {
                    self.kept.push(frame.clone());
                    self.at += 1;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                self.ended = true;
                Poll::Ready(None)
            }
            other => other,
        }
    }

    pub(super) fn rewind(&mut self) {
        self.at = 0;
    }

    /// Whether another try can send the same body.
    pub(super) fn repeatable(&self) -> bool {
        self.keeping || self.received == 0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ended && self.kept.is_empty()
    }
}

/// The bytes of a body that was kept.
pub(in crate::hcm) fn joined(frames: &[Frame]) -> Bytes {
    let mut all = Vec::new();
    for frame in frames {
        if let Frame::Data(data) = frame {
            all.extend_from_slice(data);
        }
    }
    all.into()
}
