//! The request's body on its way up, over several tries.

use crate::hcm::encode;
use crate::hcm::exchange::Exchange;
use crate::hcm::grpc_web::TextBody;
use crate::hcm::mirror::Feed;
use crate::hcm::{Http, h2};
use crate::stream::{BodyError, Frame, RecvBody};
use bytes::BytesMut;
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
    /// Nothing goes up before the tunnel is there, and what comes is kept.
    pub(super) paused: bool,
    /// It became too long to be sent again.
    pub(super) overflowed: bool,
    pub(super) ended: bool,
    /// There never was a body, be it an empty one.
    pub(super) bodiless: bool,
    /// There was an interim answer: no other try is made then (Envoy `Filter::onUpstream1xxHeaders`).
    pub(super) answered: bool,
    /// Body bytes of the client.
    pub(super) received: u64,
    /// HTTP/1 trailers are dropped unless they are enabled.
    pub(super) drop_trailers: bool,
    /// HTTP/2 trailers are held to the limits of heads.
    pub(super) limits: Option<Rc<Http>>,
    /// Copies of the request, which get the body as well.
    pub(super) feeds: Vec<Feed>,
    /// Counts gRPC messages.
    pub(super) messages: Option<encode::GrpcMessages>,
    /// Reads a body that is base64.
    pub(super) text: Option<TextBody>,
}

impl Outgoing<'_> {
    /// As [`Self::poll`], with the trailers as the filters want them; kept ones stay as they came.
    pub(super) fn poll_changed(
        &mut self,
        cx: &mut Context<'_>,
        exchange: &Exchange,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        if self.paused {
            return self.poll_paused(cx);
        }
        let mut polled = self.poll(cx);
        if let Poll::Ready(Some(Ok(Frame::Trailers(trailers)))) = &mut polled {
            encode::request_trailers(exchange, trailers);
        }
        polled
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        if let Some(frame) = self.kept.get(self.at) {
            self.at += 1;
            return Poll::Ready(Some(Ok(frame.clone())));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        self.poll_rest(cx)
    }

    /// Takes what comes, as far as there is room for it. Only an error is ready.
    pub(super) fn poll_paused(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        while !self.ended && self.size < self.limit {
            match std::task::ready!(self.poll_rest(cx)) {
                Some(Ok(frame)) => self.kept.push(frame),
                Some(Err(e)) => return Poll::Ready(Some(Err(e))),
                None => {}
            }
        }
        Poll::Pending
    }

    /// The next frame that has not been seen.
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        for feed in &self.feeds {
            std::task::ready!(feed.poll_room(cx));
        }
        match self.rest.poll_frame(cx) {
            Poll::Ready(Some(Ok(Frame::Trailers(_)))) if self.drop_trailers => self.poll_rest(cx),
            Poll::Ready(Some(Ok(mut frame))) => {
                if let (Frame::Trailers(fields), Some(http)) = (&mut frame, &self.limits)
                    && let Err(details) = h2::check(http, fields)
                {
                    return Poll::Ready(Some(Err(BodyError::Refused(details))));
                }
                if let Frame::Data(data) = &mut frame {
                    self.received += data.len() as u64;
                    if let Some(text) = &mut self.text {
                        match text.read(data) {
                            Ok(read) if read.is_empty() => return self.poll_rest(cx),
                            Ok(read) => *data = read,
                            Err(e) => return Poll::Ready(Some(Err(e))),
                        }
                    }
                    if let Some(messages) = &mut self.messages {
                        messages.look(data);
                    }
                    self.size += data.len();
                }
                if self.keeping && self.size > self.limit {
                    self.keeping = false;
                    self.overflowed = true;
                    self.kept = Vec::new();
                    self.at = 0;
                }
                if self.keeping {
                    self.kept.push(frame.clone());
                    self.at += 1;
                }
                for feed in &self.feeds {
                    feed.push(frame.clone());
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                if let Some(Err(e)) = self.text.as_ref().map(TextBody::end) {
                    return Poll::Ready(Some(Err(e)));
                }
                self.ended = true;
                self.feeds.iter().for_each(Feed::end);
                Poll::Ready(None)
            }
            other => other,
        }
    }

    /// Makes one piece of what came while the request waited, as it is in Envoy's buffer. An HTTP/1 host sees it as one chunk.
    pub(super) fn gather(&mut self, exchange: &mut Exchange) {
        if !self.ended && self.at == self.kept.len() {
            let came = self.rest.gather(self.limit.saturating_sub(self.size));
            exchange.info.bytes_received = exchange.info.bytes_received.max(self.received + came as u64);
        }
    }

    /// Gives the copies what came while the request itself failed: theirs go on, with all of it.
    pub(super) fn leave_to_copies(&mut self) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        while !self.feeds.is_empty() && !self.ended && matches!(self.poll_rest(&mut cx), Poll::Ready(Some(Ok(_)))) {}
    }

    /// For another try, which gets what is there at once.
    pub(super) fn rewind(&mut self) {
        self.at = 0;
        let data = |frame: &Frame| matches!(frame, Frame::Data(_));
        let pieces = self.kept.iter().take_while(|frame| data(frame)).count();
        if pieces > 1 {
            let mut all = BytesMut::with_capacity(self.size);
            for frame in self.kept.drain(..pieces) {
                if let Frame::Data(piece) = frame {
                    all.extend_from_slice(&piece);
                }
            }
            self.kept.insert(0, Frame::Data(all.freeze()));
        }
    }

    /// Whether another try can send the same body.
    pub(super) fn repeatable(&self) -> bool {
        self.keeping || self.paused || self.received == 0
    }

    /// Whether the head said that no body follows, as it says again on every try.
    pub(super) fn is_empty(&self) -> bool {
        self.bodiless
    }
}
