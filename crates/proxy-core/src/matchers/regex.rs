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
        let engine = build(&format!(r"\A(?:{})\z", translated(source)?), source)?;
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

/// A regular expression of RE2's syntax that is looked for anywhere in a text; in an error, what RE2 says if that is known.
pub fn searched(source: &str) -> Result<meta::Regex, String> {
    build(&translated(source)?, source)
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

/// Most repetitions that RE2 takes (`kMaxRepeat`).
const MOST_REPETITIONS: u32 = 1000;

/// The same expression in this engine's syntax, where that differs from RE2's; what RE2 refuses is refused.
fn translated(pattern: &str) -> Result<String, String> {
    let mut out = String::with_capacity(pattern.len());
    let mut rest = pattern;
    let mut in_class = false;
    // Where the repetition starts that has just ended.
    let mut after_repetition = None;
    while let Some(c) = rest.chars().next() {
        let (mut taken, mut repetition) = (c.len_utf8(), false);
        match c {
            '\\' if !in_class && rest.starts_with("\\Q") => {
                let (literal, behind) = rest[2..].split_once("\\E").unwrap_or((&rest[2..], ""));
                literal.chars().for_each(|c| push_literal(&mut out, c));
                taken = rest.len() - behind.len();
            }
            '\\' if !in_class && rest.starts_with("\\C") => {
                out.push_str("(?s-u:.)");
                taken = 2;
            }
            '\\' => {
                taken += rest[1..].chars().next().map_or(0, char::len_utf8);
                // `\p{Greek}` and `\x{41}`.
                if matches!(rest.as_bytes(), [_, b'p' | b'P' | b'x', b'{', ..]) {
                    taken = rest.find('}').map_or(rest.len(), |end| end + 1);
                }
                out.push_str(&rest[..taken]);
            }
            // Inside a class these are operators of this engine only.
            '[' if in_class && !rest.starts_with("[:") => out.push_str("\\["),
            '[' if in_class => {
                taken = rest.find(":]").map_or(1, |end| end + 2);
                out.push_str(&rest[..taken]);
            }
            '&' | '~' if in_class => push_literal(&mut out, c),
            '[' => {
                in_class = true;
                // A bracket that comes first is a member.
                taken =
                    ["[^]", "[]", "[^"].iter().find(|start| rest.starts_with(**start)).map_or(1, |start| start.len());
                out.push_str(&rest[..taken].replace(']', "\\]"));
            }
            ']' if in_class => {
                in_class = false;
                out.push(c);
            }
            _ if in_class => out.push(c),
            '(' if rest.starts_with("(?") => {
                let flags = rest[2..].split([':', ')', '<', '>', '=', '!']).next().unwrap_or_default();
                if flags.contains(['x', 'u', 'R']) {
                    return Err(format!("invalid perl operator: (?{flags}"));
                }
                taken = 2;
                out.push_str("(?");
            }
            '{' => match counted(rest) {
                Some((len, most)) if most <= MOST_REPETITIONS => {
                    (taken, repetition) = (len, true);
                    out.push_str(&rest[..len]);
                }
                Some((len, _)) => return Err(format!("invalid repetition size: {}", &rest[..len])),
                None => out.push_str("\\{"),
            },
            '*' | '+' | '?' => {
                repetition = true;
                out.push(c);
            }
            _ => out.push(c),
        }
        let at = pattern.len() - rest.len();
        if let Some(start) = after_repetition.filter(|_| repetition) {
            return Err(format!("bad repetition operator: {}", &pattern[start..at + taken]));
        }
        rest = &rest[taken..];
        if repetition && rest.starts_with('?') {
            out.push('?');
            rest = &rest[1..];
        }
        after_repetition = repetition.then_some(at);
    }
    Ok(out)
}

fn push_literal(out: &mut String, c: char) {
    if c.is_ascii_punctuation() {
        out.push('\\');
    }
    out.push(c);
}

/// The length of a counted repetition (`{2}`, `{2,}`, `{2,3}`) and its largest number; anything else is text.
fn counted(text: &str) -> Option<(usize, u32)> {
    let inner = text[1..].split_once('}')?.0;
    let (low, high) = inner.split_once(',').unwrap_or((inner, ""));
    let number = |digits: &str| match !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
        true => Some(digits.parse().unwrap_or(u32::MAX)),
        false => None,
    };
    let low = number(low)?;
    let high = if high.is_empty() { low } else { number(high)? };
    Some((inner.len() + 2, low.max(high)))
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
        let engine = translated(&pattern.regex).and_then(|translated| build(&translated, &pattern.regex));
        let engine = engine.map_err(|r| Invalid::new("regex", r)).at("pattern")?;
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
    fn what_re2_reads_in_another_way() {
        for (source, text) in [
            ("a{,3}", "a{,3}"),
            ("{", "{"),
            (r"\Qa.b\E+", "a.bb"),
            (r"\Qa)", "a)"),
            (r"a\Cb", "a\nb"),
            ("[[a]", "["),
            ("[]a]+", "a]"),
            ("[a&&b]+", "a&b"),
            ("[[:alpha:]]", "x"),
            ("a+?b{1000}?", &format!("aa{}", "b".repeat(1000))),
            (r"\p{Greek}{2}", "αβ"),
            (r"\x{41}[\]{2}]{2}", "A]{"),
            ("(?P<n>a)(?i:B)", "ab"),
        ] {
            assert!(Regex::new(source).unwrap().matches(text.as_bytes()), "{source}");
        }
        for source in ["a++", "a**", "a??+", "a{2}{3}", "a{1001}", "(?x)a", "(?u:a)"] {
            assert!(Regex::new(source).is_err(), "{source}");
        }
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
