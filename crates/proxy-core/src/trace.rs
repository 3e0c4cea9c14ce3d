//! Trace contexts: read from a request, made for the next hop. B3 (Zipkin) and W3C trace context.

use crate::headers::Headers;
use crate::random::Random;

/// How contexts travel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Propagation {
    /// `b3`, or `x-b3-traceid` and its family; sent as the family.
    B3,
    /// `traceparent` and `tracestate`.
    W3c,
    /// B3 or else W3C is read, and both are sent (`USE_B3_WITH_W3C_PROPAGATION`).
    B3AndW3c,
}

/// The place of one span in a trace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TraceContext {
    /// The trace.
    pub trace: u128,
    /// The trace's id has 128 bits on the wire (B3 knows both).
    pub long: bool,
    /// The span.
    pub span: u64,
    /// Its parent.
    pub parent: Option<u64>,
    /// Whether spans are recorded; `None`: nobody has decided.
    pub sampled: Option<bool>,
}

fn number(text: &str, digits: usize) -> Option<u64> {
    (text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit())).then(|| u64::from_str_radix(text, 16).ok())?
}

fn trace_id(text: &str) -> Option<(u128, bool)> {
    let valid = matches!(text.len(), 16 | 32) && text.bytes().all(|b| b.is_ascii_hexdigit());
    let id = valid.then(|| u128::from_str_radix(text, 16).ok())??;
    (id != 0).then_some((id, text.len() == 32))
}

fn b3_flag(text: &str) -> Option<bool> {
    match text {
        "1" | "d" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

impl TraceContext {
    /// The context that a request brings.
    pub fn extract(how: Propagation, headers: &Headers) -> Option<Self> {
        match how {
            Propagation::B3 => match headers.get_str("b3") {
                Some(single) => Self::from_b3(single),
                None => {
                    let (trace, long) = trace_id(headers.get_str("x-b3-traceid")?)?;
                    Some(Self {
                        trace,
                        long,
                        span: number(headers.get_str("x-b3-spanid")?, 16)?,
                        parent: headers.get_str("x-b3-parentspanid").and_then(|p| number(p, 16)),
                        sampled: Self::b3_sampled(headers),
                    })
                }
            },
            Propagation::W3c => Self::from_traceparent(headers.get_str("traceparent")?),
            Propagation::B3AndW3c => {
                Self::extract(Propagation::B3, headers).or_else(|| Self::extract(Propagation::W3c, headers))
            }
        }
    }

    /// What a request without ids may still say: `x-b3-sampled` or a `b3` of one letter. As Envoy, `x-b3-flags` say nothing.
    pub fn b3_sampled(headers: &Headers) -> Option<bool> {
        headers.get_str("x-b3-sampled").or(headers.get_str("b3")).and_then(b3_flag)
    }

    /// `TRACE-SPAN[-SAMPLED[-PARENT]]`
    fn from_b3(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (trace, long) = trace_id(parts.next()?)?;
        let span = number(parts.next()?, 16)?;
        let sampled = parts.next().and_then(b3_flag);
        let parent = parts.next().and_then(|p| number(p, 16));
        Some(Self { trace, long, span, parent, sampled })
    }

    /// `00-TRACE-SPAN-FLAGS`
    fn from_traceparent(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let version = parts.next().filter(|v| v.len() == 2 && *v != "ff")?;
        let (trace, long) = trace_id(parts.next().filter(|id| id.len() == 32)?)?;
        let span = number(parts.next()?, 16).filter(|id| *id != 0)?;
        let flags = u8::from_str_radix(parts.next().filter(|f| f.len() == 2)?, 16).ok()?;
        if version == "00" && parts.next().is_some() {
            return None;
        }
        Some(Self { trace, long, span, parent: None, sampled: Some(flags & 1 == 1) })
    }

    /// A span without a parent.
    pub fn root(long: bool, sampled: bool, random: &mut Random) -> Self {
        let span = random.next();
        let high = if long { u128::from(random.next()) << 64 } else { 0 };
        Self { trace: high | u128::from(span), long, span, parent: None, sampled: Some(sampled) }
    }

    /// A span below this one.
    pub fn child(&self, sampled: bool, random: &mut Random) -> Self {
        Self { span: random.next(), parent: Some(self.span), sampled: Some(sampled), ..*self }
    }

    /// The trace's id as it is printed.
    pub fn trace_id(&self) -> String {
        if self.long { format!("{:032x}", self.trace) } else { format!("{:016x}", self.trace) }
    }

    /// Whether a request has a context that cannot be read; it is passed on as it is, and no span is made.
    pub fn is_broken(how: Propagation, headers: &Headers) -> bool {
        let is_there = match (how, headers.get_str("b3")) {
            (Propagation::W3c, _) => headers.contains("traceparent"),
            // One letter says whether, and not where.
            (_, Some(single)) => b3_flag(single).is_none(),
            (_, None) => {
                let parent = headers.get_str("x-b3-parentspanid").filter(|parent| !parent.is_empty());
                if parent.is_some_and(|parent| number(parent, 16).is_none()) {
                    return true;
                }
                headers.contains("x-b3-traceid") && headers.contains("x-b3-spanid")
            }
        };
        is_there && Self::extract(how, headers).is_none()
    }

    /// Writes the context into the request for the next hop.
    pub fn inject(&self, how: Propagation, headers: &mut Headers) {
        let sampled = self.sampled.unwrap_or(false);
        match how {
            // Whoever speaks the short form gets the short form.
            Propagation::B3 if headers.contains("b3") => {
                let mut text = format!("{}-{:016x}-{}", self.trace_id(), self.span, u8::from(sampled));
                if let Some(parent) = self.parent {
                    text.push_str(&format!("-{parent:016x}"));
                }
                headers.set("b3", text.as_bytes());
            }
            Propagation::B3 => {
                headers.set("x-b3-traceid", self.trace_id().as_bytes());
                headers.set("x-b3-spanid", format!("{:016x}", self.span).as_bytes());
                if let Some(parent) = self.parent {
                    headers.set("x-b3-parentspanid", format!("{parent:016x}").as_bytes());
                }
                headers.set("x-b3-sampled", if sampled { b"1" } else { b"0" });
            }
            Propagation::W3c => {
                let text = format!("00-{:032x}-{:016x}-0{}", self.trace, self.span, u8::from(sampled));
                headers.set("traceparent", text.as_bytes());
            }
            Propagation::B3AndW3c => {
                self.inject(Propagation::B3, headers);
                self.inject(Propagation::W3c, headers);
            }
        }
    }
}

/// What the 15th character of a request id says (Envoy `UUIDRequestIDExtension`): whether, and why, it is traced.
pub fn packed_reason(request_id: &str) -> Option<bool> {
    match (request_id.len(), request_id.as_bytes().get(14)?) {
        (36, b'9' | b'a' | b'b') => Some(true),
        _ => None,
    }
}

/// Writes the reason into a request id: `9` sampled, `a` forced, `b` asked for by the client, `4` not traced.
pub fn pack_reason(request_id: &str, reason: char) -> Option<String> {
    if request_id.len() != 36 || !request_id.is_ascii() {
        return None;
    }
    Some(format!("{}{reason}{}", &request_id[..14], &request_id[15..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b3_in_both_forms() {
        let family = Headers::of([
            ("x-b3-traceid", "463ac35c9f6413ad48485a3953bb6124"),
            ("x-b3-spanid", "a2fb4a1d1a96d312"),
            ("x-b3-parentspanid", "0020000000000001"),
            ("x-b3-sampled", "1"),
        ]);
        let single = Headers::of([("b3", "463ac35c9f6413ad48485a3953bb6124-a2fb4a1d1a96d312-1-0020000000000001")]);
        let context = TraceContext::extract(Propagation::B3, &family).unwrap();
        assert_eq!(TraceContext::extract(Propagation::B3, &single), Some(context));
        let mut next = Headers::new();
        context.inject(Propagation::B3, &mut next);
        assert_eq!(TraceContext::extract(Propagation::B3, &next), Some(context));
        for bad in ["", "-", "0", "x-y", "463ac35c9f6413ad-zz"] {
            assert_eq!(TraceContext::extract(Propagation::B3, &Headers::of([("b3", bad)])), None);
        }
    }

    #[test]
    fn w3c_round_trips() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = TraceContext::extract(Propagation::W3c, &Headers::of([("traceparent", text)])).unwrap();
        let mut next = Headers::new();
        context.inject(Propagation::W3c, &mut next);
        assert_eq!(next.get_str("traceparent"), Some(text));
        let child = context.child(true, &mut Random::new(1));
        assert_eq!((child.trace, child.parent), (context.trace, Some(context.span)));
        for bad in [
            "00-0-0-0",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        ] {
            assert_eq!(TraceContext::extract(Propagation::W3c, &Headers::of([("traceparent", bad)])), None);
        }
    }

    #[test]
    fn reasons_are_packed_into_request_ids() {
        let id = pack_reason("0f8fad5b-d9cb-469f-a165-70867728950e", '9').unwrap();
        assert_eq!(packed_reason(&id), Some(true));
        assert_eq!(packed_reason("0f8fad5b-d9cb-469f-a165-70867728950e"), None);
        assert_eq!(pack_reason("short", '9'), None);
    }
}
