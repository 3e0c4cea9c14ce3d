//! What Envoy's API asks of fields by themselves (the options of protoc-gen-validate): presence, lengths, ranges, characters.
//!
//! Envoy looks at a message and all within it when it takes it, and at what is packed in an `Any` when that is opened; so is it
//! done here. The rules are a table (`rules.txt`, written by `envoy-api`'s example `validation_rules`), and messages are read as they
//! are encoded.

use std::ops::RangeInclusive;
use std::sync::{LazyLock, OnceLock};

use foldhash::HashMap;
use prost::{Message, Name};

use crate::matchers::Regex;
use crate::rejected::{At, Compiled, Invalid};

/// Numbers and durations are compared in billionths.
const UNIT: i128 = 1_000_000_000;

/// What Envoy takes as a duration (`DurationUtil::durationToMilliseconds`).
const DURATIONS: RangeInclusive<i128> = 0..=(9_223_372_036 * UNIT + UNIT - 1);

struct Table {
    by_name: HashMap<&'static str, usize>,
    messages: Vec<Entry>,
}

/// A message's lines, and what they say: few of the messages are ever met.
struct Entry {
    lines: &'static str,
    rules: OnceLock<Box<Rules>>,
}

/// The rules of one message.
#[derive(Default)]
struct Rules {
    fields: Vec<Field>,
    /// Names of oneofs of which one field must be set, and their fields' numbers.
    oneofs: Vec<(&'static str, Vec<u32>)>,
}

struct Field {
    number: u32,
    name: &'static str,
    label: Label,
    kind: Kind,
    rules: Vec<Rule>,
    /// Of each item of a list or value of a map.
    items: Vec<Rule>,
    /// Of each key of a map.
    keys: (Kind, Vec<Rule>),
}

#[derive(Clone, Copy, PartialEq)]
enum Label {
    /// A value that cannot be told from its default.
    Plain,
    Optional,
    List,
    Map,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Text,
    Bytes,
    Varint,
    /// Of 32 bits, two's complement.
    Signed,
    Double,
    Float,
    Fixed,
    Duration,
    /// A number, text or truth in a message of its own.
    Wrapped(&'static Kind),
    /// Rules of a message by their place, if it has any.
    Message(Option<usize>),
}

/// One rule; counts, lengths and bounds as numbers.
enum Rule {
    Required,
    /// What is inside is not looked at.
    Skip,
    /// The default is exempt from the rules.
    IgnoreEmpty,
    Unique,
    MinItems(usize),
    MaxItems(usize),
    MinLength(usize),
    MaxLength(usize),
    MinBytes(usize),
    MaxBytes(usize),
    Prefix(&'static str),
    Suffix(&'static str),
    Contains(&'static str),
    Pattern(Regex),
    HeaderName,
    HeaderValue,
    /// A header's name or value where rules are not strict.
    HeaderText,
    OneOf(Vec<&'static str>),
    /// Bounds, and whether they are allowed themselves.
    Above(i128, bool),
    Below(i128, bool),
    Values(Vec<i128>),
    NotValues(Vec<i128>),
}

static TABLE: LazyLock<Table> = LazyLock::new(|| Table::parse(include_str!("rules.txt")));

/// Looks at a message.
pub(crate) fn check<M: Message + Name>(message: &M) -> Compiled<()> {
    check_encoded(&M::full_name(), &message.encode_to_vec())
}

/// Looks at a message that is known to be well formed.
pub(crate) fn check_encoded(name: &str, bytes: &[u8]) -> Compiled<()> {
    match TABLE.by_name.get(name) {
        Some(&index) => TABLE.message(index, bytes),
        None => Ok(()),
    }
}

/// Whether a message keeps the rules, apart from what is packed in it.
pub fn are_kept(name: &str, bytes: &[u8]) -> bool {
    check_encoded(name, bytes).is_ok()
}

impl Table {
    /// Finds the messages in the table, whose form the program that writes it tells.
    fn parse(text: &'static str) -> Self {
        let (mut by_name, mut messages) = (HashMap::default(), Vec::new());
        let mut rest = text;
        while let Some((name, behind)) = rest.split_once('\n') {
            let mut length = 0;
            for line in behind.split_inclusive('\n').take_while(|line| line.contains('\t')) {
                length += line.len();
            }
            let (lines, others) = behind.split_at(length);
            by_name.insert(name, messages.len());
            messages.push(Entry { lines, rules: OnceLock::new() });
            rest = others;
        }
        Self { by_name, messages }
    }

    fn rules(&self, index: usize) -> &Rules {
        let entry = &self.messages[index];
        entry.rules.get_or_init(|| Box::new(Rules::parse(&self.by_name, entry.lines)))
    }

    fn message(&self, index: usize, bytes: &[u8]) -> Compiled<()> {
        let rules = self.rules(index);
        // How often each field is there, and the last value of what has no items.
        let mut found: Vec<(usize, Value<'_>)> = rules.fields.iter().map(|f| (0, f.kind.default())).collect();
        let mut set = Vec::new();
        let mut rest = bytes;
        while let Some((number, value)) = next(&mut rest) {
            if !rules.oneofs.is_empty() {
                set.push(number);
            }
            let Some(place) = rules.fields.iter().position(|f| f.number == number) else { continue };
            let (field, (count, last)) = (&rules.fields[place], &mut found[place]);
            match field.label {
                Label::Map => {
                    self.entry(field, value).at(field.name)?;
                    *count += 1;
                }
                Label::List => {
                    for item in field.kind.unpacked(value) {
                        self.value(field.kind, &field.items, item).at_index(field.name, *count)?;
                        *count += 1;
                    }
                }
                Label::Plain | Label::Optional => {
                    *last = value;
                    *count += 1;
                }
            }
        }
        for (field, (count, last)) in rules.fields.iter().zip(&found) {
            field.sizes(*count).at(field.name)?;
            let there = match field.label {
                Label::Plain => true,
                Label::Optional => *count > 0,
                Label::List | Label::Map => false,
            };
            if there {
                self.value(field.kind, &field.rules, *last).at(field.name)?;
            }
            if field.label == Label::List && field.rules.iter().any(|rule| matches!(rule, Rule::Unique)) {
                unique(field, bytes).at(field.name)?;
            }
        }
        match rules.oneofs.iter().find(|(_, numbers)| !numbers.iter().any(|n| set.contains(n))) {
            Some((name, _)) => Err(Invalid::new(*name, "is missing")),
            None => Ok(()),
        }
    }

    /// A map's key and value.
    fn entry(&self, field: &Field, entry: Value<'_>) -> Compiled<()> {
        let (mut key, mut value) = (field.keys.0.default(), field.kind.default());
        let Value::Bytes(mut rest) = entry else { return Ok(()) };
        while let Some((number, part)) = next(&mut rest) {
            match number {
                1 => key = part,
                2 => value = part,
                _ => {}
            }
        }
        self.value(field.keys.0, &field.keys.1, key)?;
        self.value(field.kind, &field.items, value)
    }

    fn value(&self, kind: Kind, rules: &[Rule], value: Value<'_>) -> Compiled<()> {
        match (kind, value) {
            (Kind::Message(Some(index)), Value::Bytes(bytes)) => {
                match rules.iter().any(|rule| matches!(rule, Rule::Skip)) {
                    true => Ok(()),
                    false => self.message(index, bytes),
                }
            }
            (Kind::Message(_), _) => Ok(()),
            (Kind::Wrapped(&kind), Value::Bytes(mut rest)) => {
                let inner = std::iter::from_fn(|| next(&mut rest)).last().map_or(kind.default(), |(_, value)| value);
                self.value(kind, rules, inner)
            }
            (Kind::Text | Kind::Bytes, Value::Bytes(text)) => text_rules(rules, text),
            _ => match kind.number(value) {
                Some(number) if kind == Kind::Duration && !DURATIONS.contains(&number) => {
                    Err(Invalid::new("", "is no duration that can be counted in nanoseconds"))
                }
                Some(number) => number_rules(rules, number),
                None => Ok(()),
            },
        }
    }
}

impl Rules {
    fn parse(messages: &HashMap<&'static str, usize>, lines: &'static str) -> Self {
        let mut rules = Self::default();
        for line in lines.lines() {
            let mut parts = line.split('\t');
            match (parts.next(), parts.next(), parts.next()) {
                (Some("oneof"), Some(name), Some(numbers)) => {
                    let numbers = numbers.split(',').filter_map(|n| n.parse().ok()).collect();
                    rules.oneofs.push((name, numbers));
                }
                (Some(number), Some(name), Some(kind)) => {
                    rules.fields.push(Field::parse(messages, number, name, kind, parts));
                }
                _ => unreachable!("a line of the table without its columns: {line}"),
            }
        }
        rules
    }
}

impl Field {
    fn parse(
        messages: &HashMap<&'static str, usize>,
        number: &str,
        name: &'static str,
        kind: &'static str,
        rules: impl Iterator<Item = &'static str>,
    ) -> Self {
        let (label, key, kind) = if let Some(item) = kind.strip_prefix('*') {
            (Label::List, Kind::Text, item)
        } else if let Some(item) = kind.strip_prefix('?') {
            (Label::Optional, Kind::Text, item)
        } else if let Some((key, value)) = kind.strip_prefix("map ").and_then(|types| types.split_once(' ')) {
            (Label::Map, Kind::parse(messages, key), value)
        } else {
            (Label::Plain, Kind::Text, kind)
        };
        let number = number.parse().expect("a field's number");
        let kind = Kind::parse(messages, kind);
        let mut field =
            Self { number, name, label, kind, rules: Vec::new(), items: Vec::new(), keys: (key, Vec::new()) };
        // Whether a header's name or value is looked at strictly stands beside the rule.
        let rules: Vec<&str> = rules.collect();
        let strict = !rules.iter().any(|rule| rule.ends_with("strict=false"));
        for rule in rules {
            let (name, value) = rule.split_once('=').expect("a rule and its value");
            let (list, name) = match name.split_once('.') {
                Some(("items" | "values", name)) => (&mut field.items, name),
                Some((_, name)) => (&mut field.keys.1, name),
                None => (&mut field.rules, name),
            };
            list.extend(Rule::parse(name, value, strict));
        }
        field
    }

    /// How often a field is there.
    fn sizes(&self, count: usize) -> Compiled<()> {
        let fits = |rule: &Rule| match *rule {
            Rule::Required => count > 0,
            Rule::MinItems(least) => count >= least,
            Rule::MaxItems(most) => count <= most,
            _ => true,
        };
        match self.rules.iter().find(|rule| !fits(rule)) {
            None => Ok(()),
            Some(Rule::Required) => Err(Invalid::new("", "is missing")),
            Some(_) => Err(Invalid::new("", format!("cannot have {count} items"))),
        }
    }
}

impl Kind {
    fn parse(messages: &HashMap<&'static str, usize>, name: &str) -> Self {
        match name {
            "string" => Self::Text,
            "bytes" => Self::Bytes,
            "bool" | "uint32" | "uint64" => Self::Varint,
            "enum" | "int32" | "int64" => Self::Signed,
            "double" => Self::Double,
            "float" => Self::Float,
            "fixed32" | "fixed64" | "sfixed32" | "sfixed64" => Self::Fixed,
            "duration" => Self::Duration,
            ".google.protobuf.StringValue" => Self::Wrapped(&Self::Text),
            ".google.protobuf.BytesValue" => Self::Wrapped(&Self::Bytes),
            ".google.protobuf.BoolValue" | ".google.protobuf.UInt32Value" | ".google.protobuf.UInt64Value" => {
                Self::Wrapped(&Self::Varint)
            }
            ".google.protobuf.Int32Value" | ".google.protobuf.Int64Value" => Self::Wrapped(&Self::Signed),
            ".google.protobuf.DoubleValue" => Self::Wrapped(&Self::Double),
            ".google.protobuf.FloatValue" => Self::Wrapped(&Self::Float),
            name => Self::Message(name.strip_prefix('.').and_then(|name| messages.get(name)).copied()),
        }
    }

    fn default(self) -> Value<'static> {
        match self {
            Self::Varint | Self::Signed => Value::Varint(0),
            Self::Double | Self::Fixed => Value::Eight([0; 8]),
            Self::Float => Value::Four([0; 4]),
            _ => Value::Bytes(&[]),
        }
    }

    /// The items of a list's field, which may be several numbers at once.
    fn unpacked(self, value: Value<'_>) -> Vec<Value<'_>> {
        let Value::Bytes(mut rest) = value else { return vec![value] };
        let mut out = Vec::new();
        while !rest.is_empty() {
            let item = match self {
                Self::Varint | Self::Signed => varint(&mut rest).map(Value::Varint),
                Self::Double => eight(&mut rest),
                Self::Float => four(&mut rest),
                _ => return vec![value],
            };
            match item {
                Some(item) => out.push(item),
                None => break,
            }
        }
        match self {
            Self::Varint | Self::Signed | Self::Double | Self::Float => out,
            _ => vec![value],
        }
    }

    /// A number in billionths.
    fn number(self, value: Value<'_>) -> Option<i128> {
        Some(match (self, value) {
            (Self::Varint, Value::Varint(v)) => i128::from(v) * UNIT,
            (Self::Signed, Value::Varint(v)) => i128::from(v.cast_signed()) * UNIT,
            (Self::Double, Value::Eight(v)) => billionths(f64::from_le_bytes(v)),
            (Self::Float, Value::Four(v)) => billionths(f64::from(f32::from_le_bytes(v))),
            (Self::Duration, Value::Bytes(mut rest)) => {
                let mut out = 0;
                while let Some((number, Value::Varint(v))) = next(&mut rest) {
                    out += i128::from(v.cast_signed()) * if number == 1 { UNIT } else { 1 };
                }
                out
            }
            _ => return None,
        })
    }
}

/// Saturates, as conversions do.
#[expect(clippy::cast_possible_truncation, reason = "rules' bounds are small, and what is beyond them stays beyond")]
fn billionths(value: f64) -> i128 {
    (value * 1e9) as i128
}

impl Rule {
    fn parse(name: &str, value: &'static str, strict: bool) -> Option<Self> {
        let count = || value.parse().expect("a count");
        Some(match (name, value) {
            ("required", "true") => Self::Required,
            ("skip", "true") => Self::Skip,
            ("ignore_empty", "true") => Self::IgnoreEmpty,
            ("unique", "true") => Self::Unique,
            ("min_items" | "min_pairs", _) => Self::MinItems(count()),
            ("max_items" | "max_pairs", _) => Self::MaxItems(count()),
            ("min_len", _) => Self::MinLength(count()),
            ("max_len", _) => Self::MaxLength(count()),
            ("min_bytes", _) => Self::MinBytes(count()),
            ("max_bytes", _) => Self::MaxBytes(count()),
            ("prefix", _) => Self::Prefix(value),
            ("suffix", _) => Self::Suffix(value),
            ("contains", _) => Self::Contains(value),
            ("pattern", _) => Self::Pattern(Regex::new(value).expect("an expression of Envoy's")),
            ("well_known_regex", _) if !strict => Self::HeaderText,
            ("well_known_regex", "1") => Self::HeaderName,
            ("well_known_regex", _) => Self::HeaderValue,
            ("gt", _) => Self::Above(bound(value), false),
            ("gte", _) => Self::Above(bound(value), true),
            ("lt", _) => Self::Below(bound(value), false),
            ("lte", _) => Self::Below(bound(value), true),
            ("const", "true") => Self::Values(vec![UNIT]),
            ("defined", _) => Self::Values(value.split(',').map(bound).collect()),
            ("not_in", _) => Self::NotValues(value.split(',').map(bound).collect()),
            ("in", _) => Self::OneOf(value.split(',').collect()),
            ("strict", _) => return None,
            _ => panic!("no such rule: {name}={value}"),
        })
    }
}

/// A bound in billionths, whose fraction has nine digits where it is a duration's.
fn bound(text: &str) -> i128 {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let whole: i128 = whole.parse().expect("a number");
    let fraction: i128 = format!("{fraction:0<9}").parse().expect("a fraction");
    whole * UNIT + fraction
}

fn text_rules(rules: &[Rule], text: &[u8]) -> Compiled<()> {
    if text.is_empty() && rules.iter().any(|rule| matches!(rule, Rule::IgnoreEmpty)) {
        return Ok(());
    }
    let length = || String::from_utf8_lossy(text).chars().count();
    for rule in rules {
        let wrong = match rule {
            Rule::MinLength(least) if length() < *least => "is too short".to_owned(),
            Rule::MaxLength(most) if length() > *most => format!("is longer than {most} characters"),
            Rule::MinBytes(least) if text.len() < *least => "is too short".to_owned(),
            Rule::MaxBytes(most) if text.len() > *most => format!("is longer than {most} bytes"),
            Rule::Prefix(prefix) if !text.starts_with(prefix.as_bytes()) => format!("does not begin with {prefix:?}"),
            Rule::Suffix(suffix) if !text.ends_with(suffix.as_bytes()) => format!("does not end with {suffix:?}"),
            Rule::Contains(part) if !text.windows(part.len()).any(|w| w == part.as_bytes()) => {
                format!("does not contain {part:?}")
            }
            Rule::Pattern(regex) if !regex.matches(text) => format!("is not of the form {}", regex.source()),
            Rule::HeaderText if text.iter().any(|b| matches!(b, 0 | b'\r' | b'\n')) => {
                "must not contain NUL, CR or LF".to_owned()
            }
            Rule::HeaderName if !header_name(text) => "is no header's name".to_owned(),
            Rule::HeaderValue if text.iter().any(|b| matches!(b, 0..=8 | 10..=31 | 127)) => {
                "is no header's value".to_owned()
            }
            Rule::OneOf(names) if !names.iter().any(|name| name.as_bytes() == text) => {
                format!("is none of {}", names.join(", "))
            }
            _ => continue,
        };
        let wrong = if text.is_empty() { "is empty".to_owned() } else { wrong };
        return Err(Invalid::new("", wrong));
    }
    Ok(())
}

/// `HTTP_HEADER_NAME`; its class has a range from `+` to `.` in it, and so the comma.
fn header_name(text: &[u8]) -> bool {
    let name = text.strip_prefix(b":").unwrap_or(text);
    !name.is_empty() && name.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+,-.^_|~`".contains(b))
}

fn number_rules(rules: &[Rule], number: i128) -> Compiled<()> {
    if number == 0 && rules.iter().any(|rule| matches!(rule, Rule::IgnoreEmpty)) {
        return Ok(());
    }
    let fits = |rule: &Rule| match rule {
        Rule::Above(bound, true) => number >= *bound,
        Rule::Above(bound, false) => number > *bound,
        Rule::Below(bound, true) => number <= *bound,
        Rule::Below(bound, false) => number < *bound,
        Rule::Values(values) => values.contains(&number),
        Rule::NotValues(values) => !values.contains(&number),
        _ => true,
    };
    match rules.iter().find(|rule| !fits(rule)) {
        None => Ok(()),
        Some(rule) => Err(Invalid::new("", rule.broken_by(number))),
    }
}

impl Rule {
    fn broken_by(&self, number: i128) -> String {
        let shown = |value: i128| match value % UNIT {
            0 => (value / UNIT).to_string(),
            fraction => format!("{}.{:09}", value / UNIT, fraction.abs()).trim_end_matches('0').to_owned(),
        };
        let value = shown(number);
        match self {
            Self::Above(bound, true) => format!("{value} is less than {}", shown(*bound)),
            Self::Above(bound, false) => format!("{value} is not more than {}", shown(*bound)),
            Self::Below(bound, true) => format!("{value} is more than {}", shown(*bound)),
            Self::Below(bound, false) => format!("{value} is not less than {}", shown(*bound)),
            _ => format!("{value} is not allowed"),
        }
    }
}

/// Items of a list that must all be different.
fn unique(field: &Field, bytes: &[u8]) -> Compiled<()> {
    let (mut seen, mut rest) = (Vec::new(), bytes);
    while let Some((number, value)) = next(&mut rest) {
        if number != field.number {
            continue;
        }
        for item in field.kind.unpacked(value) {
            if seen.contains(&item) {
                return Err(Invalid::new("", "has an item twice"));
            }
            seen.push(item);
        }
    }
    Ok(())
}

/// A field's value as it is encoded.
#[derive(Clone, Copy, PartialEq)]
enum Value<'a> {
    Varint(u64),
    Eight([u8; 8]),
    Four([u8; 4]),
    Bytes(&'a [u8]),
}

/// Takes the next field, or nothing at the end.
fn next<'a>(rest: &mut &'a [u8]) -> Option<(u32, Value<'a>)> {
    let key = varint(rest)?;
    let value = match key & 7 {
        0 => Value::Varint(varint(rest)?),
        1 => eight(rest)?,
        2 => {
            let length = usize::try_from(varint(rest)?).ok()?;
            let (content, behind) = rest.split_at_checked(length)?;
            *rest = behind;
            Value::Bytes(content)
        }
        5 => four(rest)?,
        _ => return None,
    };
    Some((u32::try_from(key >> 3).ok()?, value))
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    prost::encoding::decode_varint(rest).ok()
}

fn eight<'a>(rest: &mut &[u8]) -> Option<Value<'a>> {
    let (value, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(Value::Eight(*value))
}

fn four<'a>(rest: &mut &[u8]) -> Option<Value<'a>> {
    let (value, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(Value::Four(*value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb;

    fn refused<M: Message + Name>(message: &M) -> String {
        check(message).unwrap_err().of("x", "").to_string()
    }

    fn seconds(seconds: i64) -> Option<pb::Duration> {
        Some(pb::Duration { seconds, nanos: 0 })
    }

    #[test]
    fn the_table_has_what_envoys_messages_ask() {
        assert!(TABLE.by_name.len() > 500);
        let cluster = TABLE.by_name["envoy.config.cluster.v3.Cluster"];
        // All of it can be read.
        let fields: usize = (0..TABLE.messages.len()).map(|index| TABLE.rules(index).fields.len()).sum();
        assert!(fields > 2000, "{fields}");
        let timeout = TABLE.rules(cluster).fields.iter().find(|f| f.name == "connect_timeout").unwrap();
        assert!(matches!(timeout.rules[..], [Rule::Above(0, false)]));
        assert!(check_encoded("a.message.without.Rules", b"\xff").is_ok());
    }

    #[test]
    fn text_numbers_and_durations() {
        let mut cluster = pb::cluster::Cluster::default();
        assert_eq!(refused(&cluster), "x : name: is empty");
        cluster.name = "c".to_owned();
        assert!(check(&cluster).is_ok());
        cluster.connect_timeout = seconds(0);
        assert_eq!(refused(&cluster), "x : connect_timeout: 0 is not more than 0");
        // Without any rule of its own.
        cluster.connect_timeout = seconds(9_223_372_036);
        cluster.dns_jitter = seconds(9_223_372_037);
        assert_eq!(refused(&cluster), "x : dns_jitter: is no duration that can be counted in nanoseconds");
        cluster.dns_jitter = seconds(-1);
        assert!(check(&cluster).is_err());
        cluster.dns_jitter = None;
        cluster.dns_lookup_family = 99;
        assert_eq!(refused(&cluster), "x : dns_lookup_family: 99 is not allowed");
        let options = |streams| pb::core::Http2ProtocolOptions {
            max_concurrent_streams: Some(pb::UInt32Value { value: streams }),
            ..Default::default()
        };
        assert!(check(&options(1)).is_ok());
        assert_eq!(refused(&options(0)), "x : max_concurrent_streams: 0 is less than 1");
        assert_eq!(refused(&options(1 << 31)), "x : max_concurrent_streams: 2147483648 is more than 2147483647");
        let share = |value| pb::kind::Percent { value };
        assert!(check(&share(100.0)).is_ok());
        assert_eq!(refused(&share(100.5)), "x : value: 100.5 is more than 100");
    }

    #[test]
    fn messages_lists_and_choices() {
        let mut host = pb::route::VirtualHost { name: "v".to_owned(), ..Default::default() };
        assert_eq!(refused(&host), "x : domains: cannot have 0 items");
        host.domains = vec!["a\n".to_owned()];
        assert_eq!(refused(&host), "x : domains[0]: must not contain NUL, CR or LF");
        host.domains = vec!["a".to_owned()];
        host.routes.push(pb::route::Route::default());
        assert_eq!(refused(&host), "x : routes[0].match: is missing");
        host.routes[0].r#match = Some(pb::route::RouteMatch::default());
        assert_eq!(refused(&host), "x : routes[0].match.path_specifier: is missing");
        let twice = vec!["a".to_owned(), "b".to_owned(), "a".to_owned()];
        let policy = pb::route::InternalRedirectPolicy { response_headers_to_copy: twice, ..Default::default() };
        assert_eq!(refused(&policy), "x : response_headers_to_copy: has an item twice");
    }

    #[test]
    fn one_of_several_is_required_only_where_it_is_chosen() {
        use pb::route::route_match::PathSpecifier;
        let chosen = PathSpecifier::Prefix("/".to_owned());
        let matcher = pb::route::RouteMatch { path_specifier: Some(chosen), ..Default::default() };
        assert!(check(&matcher).is_ok(), "safe_regex is not asked for");
    }

    #[test]
    fn names_and_values_of_headers() {
        assert!([&b":path"[..], b"x-a_b", b"a,b"].iter().all(|name| header_name(name)));
        assert!([&b""[..], b":", b"a b", b"a:b", b"a/b"].iter().all(|name| !header_name(name)));
    }

    #[test]
    fn what_is_no_message_is_left_alone() {
        for bytes in [&b"\xff"[..], b"\x0a\x7f", b"\x0b", b"\x0a\xff\xff\xff\xff\xff\x7f"] {
            // Whatever comes of it: nothing panics.
            let _ = check_encoded("envoy.config.cluster.v3.Cluster", bytes);
        }
    }
}
