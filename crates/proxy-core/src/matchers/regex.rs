use regex_automata::meta;
use regex_automata::util::syntax;

use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// A regular expression of RE2's syntax that must match the whole text.
#[derive(Clone, Debug)]
pub struct Regex {
    source: Box<str>,
    engine: meta::Regex,
}

/// How much a compiled program may take. Envoy bounds RE2 programs at 100 instructions' worth of warning only; this
/// bounds memory against a hostile `EnvoyFilter`.
const SIZE_LIMIT: usize = 1 << 20;

impl Regex {
    pub(crate) fn compile(matcher: &pb::matcher::RegexMatcher) -> Compiled<Self> {
        if matcher.regex.is_empty() {
            return Err(Invalid::new("regex", "is empty"));
        }
        Self::new(&matcher.regex).map_err(|reason| Invalid::new("regex", reason))
    }

    /// Compiles, or says why it cannot.
    pub fn new(source: &str) -> Result<Self, String> {
        let engine = build(&format!(r"\A(?:{source})\z"), source)?;
        Ok(Self { source: source.into(), engine })
    }

    /// Whether all of the text is matched.
    pub fn matches(&self, text: &[u8]) -> bool {
        self.engine.is_match(text)
    }

    /// The expression as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }
}

/// RE2's `\d`, `\w`, `\s` and `\b` are ASCII, so Unicode is tried only where the expression needs it.
fn build(pattern: &str, source: &str) -> Result<meta::Regex, String> {
    let config =
        || meta::Config::new().nfa_size_limit(Some(SIZE_LIMIT)).hybrid_cache_capacity(64 << 10).utf8_empty(false);
    let with = |unicode: bool| {
        let syntax = syntax::Config::new().unicode(unicode).utf8(false);
        meta::Builder::new().configure(config()).syntax(syntax).build(pattern).map_err(|e| match e.syntax_error() {
            Some(_) => format!("invalid regex {source:?}"),
            None => format!("regex {source:?} is too large"),
        })
    };
    with(false).or_else(|_| with(true))
}

/// A regular expression, searched for anywhere, and what to put in the place of each match
/// (`RegexMatchAndSubstitute`; `\0` is the match, `\1`… the groups).
#[derive(Clone, Debug)]
pub struct Substitution {
    engine: meta::Regex,
    /// `None`: it names a group that does not exist, and nothing is ever replaced.
    parts: Option<Box<[Part]>>,
}

#[derive(Clone, Debug)]
enum Part {
    Text(Box<str>),
    Group(usize),
}

impl Substitution {
    pub(crate) fn compile(rule: &pb::matcher::RegexMatchAndSubstitute) -> Compiled<Self> {
        let pattern = rule.pattern.as_ref().ok_or_else(|| Invalid::new("pattern", "is missing"))?;
        let engine = build(&pattern.regex, &pattern.regex).map_err(|r| Invalid::new("regex", r)).at("pattern")?;
        let parts = parts(&rule.substitution, engine.captures_len());
        Ok(Self { engine, parts })
    }

    /// Texts and groups in turn, and the text behind them, for what matches as a whole.
    pub(crate) fn of_groups(pattern: &str, groups: Vec<(String, usize)>, end: &str) -> Result<Self, String> {
        let parts = groups.into_iter().flat_map(|(text, group)| [Part::Text(text.into()), Part::Group(group)]);
        let parts = parts.chain([Part::Text(end.into())]).collect();
        Ok(Self { engine: build(&format!(r"\A(?:{pattern})\z"), pattern)?, parts: Some(parts) })
    }

    /// The text with every match replaced (RE2 `GlobalReplace`).
    pub fn apply(&self, text: &[u8]) -> Vec<u8> {
        let Some(parts) = &self.parts else { return text.to_vec() };
        let mut out = Vec::with_capacity(text.len());
        let mut copied = 0;
        let mut captures = self.engine.create_captures();
        for found in self.engine.find_iter(text) {
            out.extend_from_slice(&text[copied..found.start()]);
            let input = regex_automata::Input::new(text).range(found.start()..);
            self.engine.captures(input, &mut captures);
            for part in parts {
                match part {
                    Part::Text(literal) => out.extend_from_slice(literal.as_bytes()),
                    Part::Group(group) => out.extend(captures.get_group(*group).map_or(&[][..], |s| &text[s.range()])),
                }
            }
            copied = found.end();
        }
        out.extend_from_slice(&text[copied..]);
        out
    }
}

/// As RE2 reads it, which Envoy does not ask before the first match: a group that does not exist keeps everything as it
/// is (`None`), a backslash before anything else ends what is put in.
fn parts(text: &str, groups: usize) -> Option<Box<[Part]>> {
    let mut all = Vec::new();
    let mut literal = String::new();
    let mut ended = false;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, if c == '\\' { chars.next() } else { None }) {
            ('\\', Some(digit)) if digit.is_ascii_digit() => {
                let group = digit as usize - '0' as usize;
                if group >= groups {
                    return None;
                }
                if !ended {
                    all.extend((!literal.is_empty()).then(|| Part::Text(std::mem::take(&mut literal).into())));
                    all.push(Part::Group(group));
                }
            }
            _ if ended => {}
            ('\\', Some('\\')) => literal.push('\\'),
            ('\\', _) => ended = true,
            (c, _) => literal.push(c),
        }
    }
    if !literal.is_empty() {
        all.push(Part::Text(literal.into()));
    }
    Some(all.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_text_only() {
        let regex = Regex::new("/api/v[2-9]/.*").unwrap();
        assert!(regex.matches(b"/api/v2/x"));
        assert!(!regex.matches(b"/x/api/v2/x"));
        assert!(Regex::new("(").is_err());
        assert!(Regex::new(".*").unwrap().matches(b"\xff\xfe"));
        assert!(!Regex::new(r"\d").unwrap().matches("٣".as_bytes()));
        assert!(Regex::new(r"\pL").unwrap().matches("é".as_bytes()));
    }

    #[test]
    fn substitution_replaces_every_match() {
        let rule = |regex: &str, substitution: &str| {
            Substitution::compile(&pb::matcher::RegexMatchAndSubstitute {
                pattern: Some(pb::matcher::RegexMatcher { regex: regex.into(), ..Default::default() }),
                substitution: substitution.into(),
            })
        };
        assert_eq!(rule("^/re/([^/]+)(/.*)$", r"\2/\1").unwrap().apply(b"/re/a/b/c"), b"/b/c/a");
        assert_eq!(rule("one", "two").unwrap().apply(b"/one/one"), b"/two/two");
        assert_eq!(rule("a", r"\\\0").unwrap().apply(b"a"), b"\\a");
        // Without the group nothing is replaced; a lone backslash ends the text.
        assert_eq!(rule("a", r"x\1").unwrap().apply(b"bab"), b"bab");
        assert_eq!(rule("a", r"x\").unwrap().apply(b"bab"), b"bxb");
        assert_eq!(rule("a", r"x\y\0").unwrap().apply(b"bab"), b"bxb");
    }
}
