use bytes::Bytes;
use mesh_types::ArcStr;

use crate::access_log::LogFilter;
use crate::format::{FormatContext, FormatString};
use crate::headers::Headers;
use crate::pb;
use crate::random::Random;
use crate::rejected::{At, Compiled, Invalid};
use crate::route::HeaderOps;
use crate::runtime::Runtime;

/// Changes to answers that this proxy makes itself.
#[derive(Debug, Default)]
pub struct LocalReply {
    mappers: Vec<Mapper>,
    format: Option<BodyFormat>,
}

#[derive(Debug)]
struct Mapper {
    filter: LogFilter,
    status: Option<u16>,
    body: Option<Bytes>,
    format: Option<BodyFormat>,
    headers: HeaderOps,
}

#[derive(Debug)]
struct BodyFormat {
    format: FormatString,
    content_type: Option<ArcStr>,
}

/// An answer after its changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Rewritten {
    /// The body.
    pub body: Vec<u8>,
    /// The body's type.
    pub content_type: ArcStr,
}

impl BodyFormat {
    fn compile(format: &pb::core::SubstitutionFormatString) -> Compiled<Self> {
        let content_type = match format.content_type.as_str() {
            "" => None,
            content_type => Some(content_type.into()),
        };
        Ok(Self { format: FormatString::compile(format)?, content_type })
    }

    fn content_type(&self) -> ArcStr {
        match (&self.content_type, &self.format) {
            (Some(content_type), _) => content_type.clone(),
            (None, FormatString::Json(_)) => "application/json".into(),
            (None, FormatString::Text(_)) => "text/plain".into(),
        }
    }
}

impl LocalReply {
    pub(super) fn compile(config: Option<&pb::hcm::LocalReplyConfig>, runtime: &Runtime) -> Compiled<Self> {
        let Some(config) = config else { return Ok(Self::default()) };
        let mut mappers = Vec::new();
        for (i, mapper) in config.mappers.iter().enumerate() {
            mappers.push(Mapper::compile(mapper, runtime).at_index("mappers", i)?);
        }
        Ok(Self {
            mappers,
            format: config.body_format.as_ref().map(BodyFormat::compile).transpose().at("body_format")?,
        })
    }

    /// The answer by the first mapper that fits and by the body format, with its head changed; `None`: it stays as it is.
    pub fn rewrite(&self, status: u16, body: &str, headers: &mut Headers, cx: &FormatContext<'_>) -> Option<Rewritten> {
        // Shares make no sense here; the filter's randomness is fixed by the status.
        let mut random = Random::new(status.into());
        let answered = FormatContext { response: Some(headers), ..*cx };
        let mapper = self.mappers.iter().find(|m| m.filter.matches(&answered, &mut random));
        let format = mapper.and_then(|m| m.format.as_ref()).or(self.format.as_ref());
        if mapper.is_none() && format.is_none() {
            return None;
        }
        let mut rewritten = Rewritten {
            body: mapper.and_then(|m| m.body.as_deref()).unwrap_or(body.as_bytes()).to_vec(),
            content_type: "text/plain".into(),
        };
        headers.remove("content-type");
        if let Some(mapper) = mapper {
            mapper.headers.apply_to_response(headers, cx);
        }
        let changed = mapper.and_then(|m| m.status);
        if let Some(status) = changed {
            headers.set_status(status);
        }
        if let Some(format) = format {
            let body = String::from_utf8_lossy(&rewritten.body).into_owned();
            let mut info = cx.info.clone();
            info.response_code = Some(changed.unwrap_or(status));
            let mut out = Vec::new();
            let cx = FormatContext { info: &info, local_reply_body: &body, response: Some(headers), ..*cx };
            format.format.write(&cx, &mut out);
            rewritten.body = out;
            rewritten.content_type = format.content_type();
        }
        Some(rewritten)
    }
}

impl Mapper {
    fn compile(mapper: &pb::hcm::ResponseMapper, runtime: &Runtime) -> Compiled<Self> {
        let filter = mapper.filter.as_ref().ok_or_else(|| Invalid::new("filter", "is missing"))?;
        let status = mapper.status_code.as_ref().map(|s| u16::try_from(s.value));
        Ok(Self {
            filter: LogFilter::compile(filter, runtime).at("filter")?,
            status: status.transpose().map_err(|_| Invalid::new("status_code", "is no status"))?,
            body: mapper.body.as_ref().map(|b| crate::tls::inline_bytes(Some(b))).transpose().at("body")?,
            format: mapper
                .body_format_override
                .as_ref()
                .map(BodyFormat::compile)
                .transpose()
                .at("body_format_override")?,
            headers: HeaderOps::compile(&mapper.headers_to_add, &[]).at("headers_to_add")?,
        })
    }
}
