//! Changing between writings of several words, as huandu/xstrings.

/// Kinds of runs of characters.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Nothing is left.
    None,
    Number,
    /// Upper case letters, or one with lower case letters after it.
    Upper,
    Letters,
    /// Blanks, hyphens, underscores.
    Connector,
    Punctuation,
    Other,
}

fn is_connector(c: char) -> bool {
    c == '-' || c == '_' || c.is_whitespace()
}

/// Chinese characters count as other.
fn is_letter(c: char) -> bool {
    c.is_alphabetic() && c < '\u{3400}'
}

fn is_punctuation(c: char) -> bool {
    // Go's category P: ASCII punctuation without the symbols of category S.
    if c.is_ascii() {
        return c.is_ascii_punctuation() && !"$+<=>^`|~".contains(c);
    }
    matches!(c, '\u{a1}' | '\u{a7}' | '\u{ab}' | '\u{b6}' | '\u{b7}' | '\u{bb}' | '\u{bf}' | '\u{2010}'..='\u{2027}' | '\u{2030}'..='\u{205e}' | '\u{3001}'..='\u{3003}')
}

/// Length of the characters at the start that fit.
fn run(text: &str, fits: impl Fn(char) -> bool) -> usize {
    text.find(|c| !fits(c)).unwrap_or(text.len())
}

/// The first word of `text`, and the rest.
fn word(text: &str) -> (Kind, &str, &str) {
    let Some(first) = text.chars().next() else { return (Kind::None, "", "") };
    let lower = |c: char| is_letter(c) && !c.is_uppercase();
    let (kind, length) = if is_connector(first) {
        (Kind::Connector, run(text, is_connector))
    } else if is_punctuation(first) {
        (Kind::Punctuation, run(text, is_punctuation))
    } else if first.is_uppercase() {
        let capitals = run(text, char::is_uppercase);
        let after = text[capitals..].chars().next();
        let last = text[..capitals].chars().next_back().map_or(0, char::len_utf8);
        let length = match after {
            // One capital and what follows it.
            Some(c) if capitals == first.len_utf8() && is_letter(c) => capitals + run(&text[capitals..], lower),
            // The last capital starts the next word.
            Some(c) if capitals > first.len_utf8() && is_letter(c) => capitals - last,
            _ => capitals,
        };
        (Kind::Upper, length)
    } else if is_letter(first) {
        (Kind::Letters, run(text, lower))
    } else if first.is_numeric() {
        (Kind::Number, run(text, char::is_numeric))
    } else {
        let other = |c: char| !(is_connector(c) || is_letter(c) || c.is_numeric() || is_punctuation(c));
        (Kind::Other, first.len_utf8() + run(&text[first.len_utf8()..], other))
    };
    (kind, &text[..length], &text[length..])
}

fn push(out: &mut String, kind: Kind, word: &str, connector: char) {
    if !matches!(kind, Kind::Upper | Kind::Connector) {
        out.push_str(word);
        return;
    }
    for c in word.chars() {
        match c {
            c if is_connector(c) => out.push(connector),
            c => out.extend(c.to_lowercase()),
        }
    }
}

/// `ToSnakeCase` and `ToKebabCase`: words in lower case with connectors between them.
pub(super) fn separated(text: &str, connector: char) -> String {
    let mut out = String::with_capacity(text.len() + 4);
    let (mut kind, mut part, mut rest) = word(text);
    while !rest.is_empty() {
        if kind != Kind::Connector {
            push(&mut out, kind, part, connector);
        }
        let (before, last) = (kind, part);
        (kind, part, rest) = word(rest);
        match before {
            Kind::Number => {
                while matches!(kind, Kind::Letters | Kind::Number) {
                    push(&mut out, kind, part, connector);
                    (kind, part, rest) = word(rest);
                }
                if !matches!(kind, Kind::None | Kind::Punctuation | Kind::Connector) {
                    out.push(connector);
                }
            }
            Kind::Connector => push(&mut out, before, last, connector),
            Kind::Punctuation => {}
            _ if kind != Kind::Number => {
                if !matches!(kind, Kind::Connector | Kind::Punctuation) {
                    out.push(connector);
                }
            }
            _ if rest.is_empty() => {}
            _ => {
                // A number belongs to the word before it, unless lower case letters follow.
                let number = part;
                (kind, part, rest) = word(rest);
                if kind != Kind::Letters {
                    out.push_str(number);
                    if !matches!(kind, Kind::Connector | Kind::Punctuation) {
                        out.push(connector);
                    }
                    continue;
                }
                out.push(connector);
                out.push_str(number);
                while matches!(kind, Kind::Letters | Kind::Number) {
                    push(&mut out, kind, part, connector);
                    (kind, part, rest) = word(rest);
                }
                if !matches!(kind, Kind::None | Kind::Connector | Kind::Punctuation) {
                    out.push(connector);
                }
            }
        }
    }
    push(&mut out, kind, part, connector);
    out
}

/// `ToPascalCase`: each word starts with a capital; connectors at the start stay.
pub(super) fn pascal(text: &str) -> String {
    let start = run(text, is_connector);
    let (lead, rest) = text.split_at(start);
    let mut out = String::with_capacity(text.len());
    let mut chars = rest.chars();
    out.push_str(lead);
    let Some(first) = chars.next() else {
        // The original writes the last connector of nothing else twice.
        out.extend(lead.chars().next_back());
        return out;
    };
    use super::upper;
    let lower = |c: char| c.to_lowercase().next().unwrap_or(c);
    let mut first_was_upper = first.is_uppercase();
    let mut last = upper(first);
    for c in chars {
        let before = std::mem::replace(&mut last, c);
        if is_connector(c) && is_connector(before) {
            out.push(before);
            continue;
        }
        if is_connector(before) {
            first_was_upper = c.is_uppercase();
            last = upper(c);
        } else {
            if first_was_upper {
                if c.is_uppercase() {
                    last = lower(c);
                } else {
                    first_was_upper = false;
                }
            }
            out.push(before);
        }
    }
    out.push(last);
    out
}
