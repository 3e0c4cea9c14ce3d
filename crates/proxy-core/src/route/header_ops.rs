use crate::constraints;
use crate::format::{Dialect, Format, FormatContext};
use crate::headers::Headers;
use crate::matchers::StringMatcher;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// Headers to remove and to add (Envoy `HeaderParser`).
#[derive(Clone, Debug, Default)]
pub struct HeaderOps {
    remove: Box<[Box<str>]>,
    /// All whose names match go, too.
    remove_matching: Option<Box<StringMatcher>>,
    add: Box<[Add]>,
}

#[derive(Clone, Debug)]
struct Add {
    name: Box<str>,
    value: Format,
    how: How,
    keep_empty: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum How {
    Append,
    IfAbsent,
    Overwrite,
    OverwriteIfPresent,
}

/// What the changed headers are, for formats.
#[derive(Clone, Copy, Debug)]
enum Target {
    Request,
    Response,
    Other,
}

impl Target {
    fn context<'h>(self, headers: &'h Headers, cx: &FormatContext<'h>) -> FormatContext<'h> {
        match self {
            Self::Request => FormatContext { request: Some(headers), ..*cx },
            Self::Response => FormatContext { response: Some(headers), ..*cx },
            Self::Other => *cx,
        }
    }
}

/// Pseudo headers and the host are changed by rewrites only.
fn is_modifiable(name: &str) -> bool {
    !name.starts_with(':') && !name.eq_ignore_ascii_case("host")
}

impl HeaderOps {
    pub(crate) fn compile(add: &[pb::core::HeaderValueOption], remove: &[String]) -> Compiled<Self> {
        constraints::header_options(add)?;
        for name in remove {
            if !is_modifiable(name) {
                return Err(Invalid::new("", format!(":-prefixed or host headers may not be removed: {name:?}")));
            }
        }
        Ok(Self {
            remove_matching: None,
            remove: remove.iter().map(|n| n.to_ascii_lowercase().into()).collect(),
            add: add.iter().enumerate().map(|(i, a)| Add::compile(a).at_index("", i)).collect::<Compiled<_>>()?,
        })
    }

    /// From `HeaderMutation` lists, in which removals and additions may alternate; applied in order.
    pub(crate) fn compile_mutations(mutations: &[pb::mutation::HeaderMutation]) -> Compiled<Vec<Self>> {
        use pb::mutation::header_mutation::Action;
        mutations
            .iter()
            .enumerate()
            .map(|(i, mutation)| match &mutation.action {
                Some(Action::Append(add)) => Self::compile(std::slice::from_ref(add), &[]).at_index("mutations", i),
                // No field of a request has such a name; the filter takes them, unlike routes.
                Some(Action::Remove(name)) if name.is_empty() || name.eq_ignore_ascii_case("host") => {
                    Ok(Self::default())
                }
                Some(Action::Remove(name)) => Self::compile(&[], std::slice::from_ref(name)).at_index("mutations", i),
                Some(Action::RemoveOnMatch(matching)) => {
                    let matcher =
                        matching.key_matcher.as_ref().ok_or_else(|| Invalid::new("key_matcher", "is missing"));
                    let matcher =
                        matcher.and_then(StringMatcher::compile).at("remove_on_match").at_index("mutations", i)?;
                    Ok(Self { remove_matching: Some(Box::new(matcher)), ..Self::default() })
                }
                None => Err(Invalid::unsupported(format!("mutations[{i}]"))),
            })
            .collect()
    }

    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty() && self.remove_matching.is_none()
    }

    /// As [`apply`](HeaderOps::apply) to a request; formats see its headers as they are now.
    pub fn apply_to_request(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        self.run(headers, cx, Target::Request);
    }

    /// As [`apply`](HeaderOps::apply) to a response; formats see its headers as they are now.
    pub fn apply_to_response(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        self.run(headers, cx, Target::Response);
    }

    /// Removes, then overwrites, then appends. Values are formatted before anything of this level is added.
    pub fn apply(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        self.run(headers, cx, Target::Other);
    }

    fn run(&self, headers: &mut Headers, cx: &FormatContext<'_>, target: Target) {
        if self.is_empty() {
            return;
        }
        for name in &self.remove {
            headers.remove(name);
        }
        if let Some(matcher) = &self.remove_matching {
            headers.retain(|name, _| name.starts_with(b":") || !matcher.matches(name));
        }
        let mut appended: Vec<(&str, Vec<u8>)> = Vec::new();
        let mut overwritten: Vec<(&str, Vec<u8>)> = Vec::new();
        for add in &self.add {
            let constant = add.value.constant();
            let value = match constant {
                Some(text) => text.as_bytes().to_vec(),
                None => {
                    let mut value = Vec::new();
                    add.value.write(&target.context(headers, cx), &mut value);
                    value
                }
            };
            if value.is_empty() && !add.keep_empty {
                continue;
            }
            match add.how {
                How::Append => appended.push((&add.name, value)),
                How::IfAbsent if !headers.contains(&add.name) => appended.push((&add.name, value)),
                How::Overwrite => overwritten.push((&add.name, value)),
                How::OverwriteIfPresent if headers.contains(&add.name) => overwritten.push((&add.name, value)),
                How::IfAbsent | How::OverwriteIfPresent => {}
            }
        }
        for (name, value) in overwritten {
            headers.set(name, &value);
        }
        for (name, value) in appended {
            headers.add(name, &value);
        }
    }
}

impl Add {
    fn compile(option: &pb::core::HeaderValueOption) -> Compiled<Self> {
        use pb::core::header_value_option::HeaderAppendAction as Action;
        let header = option.header.as_ref().ok_or_else(|| Invalid::new("header", "is missing"))?;
        if header.key.is_empty() || header.key.contains(['\r', '\n', '\0']) {
            return Err(Invalid::new("header.key", format!("{:?} is no header name", header.key)));
        }
        if !is_modifiable(&header.key) {
            return Err(Invalid::new(
                "header.key",
                format!(":-prefixed or host headers may not be modified: {}", header.key),
            ));
        }
        let raw = String::from_utf8_lossy(&header.raw_value);
        let value = if header.value.is_empty() { &raw } else { header.value.as_str() };
        let how = match (&option.append, Action::try_from(option.append_action)) {
            (Some(append), _) if append.value => How::Append,
            (Some(_), _) => How::Overwrite,
            (None, Ok(Action::AppendIfExistsOrAdd)) => How::Append,
            (None, Ok(Action::AddIfAbsent)) => How::IfAbsent,
            (None, Ok(Action::OverwriteIfExistsOrAdd)) => How::Overwrite,
            (None, Ok(Action::OverwriteIfExists)) => How::OverwriteIfPresent,
            (None, Err(_)) => return Err(Invalid::new("append_action", "is no known value")),
        };
        Ok(Self {
            name: header.key.to_ascii_lowercase().into(),
            // A value that does not exist leaves the header out, or its part empty.
            value: Format::in_dialect(value, true, Dialect { old_forms: true, ..Dialect::default() })
                .at("header.value")?,
            how,
            keep_empty: option.keep_empty_value,
        })
    }
}
