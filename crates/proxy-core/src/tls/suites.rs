//! Lists of cipher suites and of key exchanges, as BoringSSL reads them (`ssl_cipher.cc`, `ssl_key_share.cc`).

use mesh_types::ArcStr;

use crate::rejected::{Compiled, Invalid};

/// The suites of TLS 1.2 that BoringSSL has, its favourites first, with the standard's names. Not all of them are served here.
const SUITES: [(&str, &str); 21] = [
    ("ECDHE-ECDSA-AES128-GCM-SHA256", "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"),
    ("ECDHE-RSA-AES128-GCM-SHA256", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"),
    ("ECDHE-ECDSA-AES256-GCM-SHA384", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"),
    ("ECDHE-RSA-AES256-GCM-SHA384", "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384"),
    ("ECDHE-ECDSA-CHACHA20-POLY1305", "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"),
    ("ECDHE-RSA-CHACHA20-POLY1305", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256"),
    ("ECDHE-PSK-CHACHA20-POLY1305", "TLS_ECDHE_PSK_WITH_CHACHA20_POLY1305_SHA256"),
    ("ECDHE-ECDSA-AES128-SHA", "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA"),
    ("ECDHE-RSA-AES128-SHA", "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA"),
    ("ECDHE-PSK-AES128-CBC-SHA", "TLS_ECDHE_PSK_WITH_AES_128_CBC_SHA"),
    ("ECDHE-ECDSA-AES256-SHA", "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA"),
    ("ECDHE-RSA-AES256-SHA", "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA"),
    ("ECDHE-PSK-AES256-CBC-SHA", "TLS_ECDHE_PSK_WITH_AES_256_CBC_SHA"),
    ("ECDHE-RSA-AES128-SHA256", "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256"),
    ("AES128-GCM-SHA256", "TLS_RSA_WITH_AES_128_GCM_SHA256"),
    ("AES256-GCM-SHA384", "TLS_RSA_WITH_AES_256_GCM_SHA384"),
    ("AES128-SHA", "TLS_RSA_WITH_AES_128_CBC_SHA"),
    ("PSK-AES128-CBC-SHA", "TLS_PSK_WITH_AES_128_CBC_SHA"),
    ("AES256-SHA", "TLS_RSA_WITH_AES_256_CBC_SHA"),
    ("PSK-AES256-CBC-SHA", "TLS_PSK_WITH_AES_256_CBC_SHA"),
    ("DES-CBC3-SHA", "TLS_RSA_WITH_3DES_EDE_CBC_SHA"),
];

/// Known by name, although there is no choice among them.
const OF_13: [&str; 3] = ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"];

/// Aliases that stand for no suite any more.
const EMPTY: [&str; 2] = ["SHA256", "SHA384"];

const CURVES: [(&str, &str); 6] = [
    ("P-256", "prime256v1"),
    ("P-384", "secp384r1"),
    ("P-521", "secp521r1"),
    ("X25519", "x25519"),
    ("X25519MLKEM768", "X25519MLKEM768"),
    ("MLKEM1024", "MLKEM1024"),
];

/// What an alias stands for; `None`: it is none.
fn alias(name: &str) -> Option<fn(&str) -> bool> {
    let ecdhe = |suite: &str| suite.starts_with("ECDHE-");
    Some(match name {
        "ALL" | "HIGH" | "FIPS" => |_| true,
        "kRSA" | "RSA" => |suite| !suite.contains("PSK") && !suite.starts_with("ECDHE-"),
        "kECDHE" | "kEECDH" | "ECDHE" | "EECDH" | "ECDH" => ecdhe,
        "kPSK" => |suite| suite.starts_with("PSK-"),
        "PSK" | "aPSK" => |suite| suite.contains("PSK"),
        "aECDSA" | "ECDSA" => |suite| suite.contains("ECDSA"),
        "aRSA" => |suite| !suite.contains("PSK") && !suite.contains("ECDSA"),
        "3DES" => |suite| suite.starts_with("DES-"),
        "AES" => |suite| suite.contains("AES"),
        "AES128" => |suite| suite.contains("AES128"),
        "AES256" => |suite| suite.contains("AES256"),
        "AESGCM" => |suite| suite.contains("GCM"),
        "CHACHA20" => |suite| suite.contains("CHACHA20"),
        "SHA" | "SHA1" | "SSLv3" | "TLSv1" => |suite| suite.ends_with("-SHA"),
        "TLSv1.2" => |suite| !suite.ends_with("-SHA"),
        _ => return None,
    })
}

/// These are meant by their names only.
fn is_deprecated(suite: &str) -> bool {
    matches!(suite, "DES-CBC3-SHA" | "ECDHE-RSA-AES128-SHA256")
}

fn strength(suite: &str) -> u16 {
    match suite {
        suite if suite.contains("AES128") => 128,
        suite if suite.starts_with("DES-") => 112,
        _ => 256,
    }
}

/// The list while it is being worked out, in order; `true`: chosen.
struct List(Vec<(&'static str, bool)>);

impl List {
    /// Applies a rule to the suites that `fits` says.
    fn apply(&mut self, operator: Option<char>, fits: impl Fn(&str) -> bool) {
        let (hit, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.0).into_iter().partition(|(suite, on)| {
            let concerned = match operator {
                None => !on,
                Some('!') => true,
                Some(_) => *on,
            };
            concerned && fits(suite)
        });
        let hit = hit.into_iter().map(|(suite, _)| suite);
        self.0 = match operator {
            Some('!') => rest,
            // To the front, so that they come back in the same order.
            Some('-') => hit.map(|suite| (suite, false)).chain(rest).collect(),
            _ => rest.into_iter().chain(hit.map(|suite| (suite, true))).collect(),
        };
    }

    fn sort(&mut self) {
        let (mut on, off): (Vec<_>, Vec<_>) = std::mem::take(&mut self.0).into_iter().partition(|(_, on)| *on);
        on.sort_by_key(|(suite, _)| std::cmp::Reverse(strength(suite)));
        self.0 = off.into_iter().chain(on).collect();
    }
}

/// The suites of TLS 1.2 that the rules of a context name, in their order; none where nothing is said.
pub(super) fn suites(rules: &[String]) -> Compiled<Vec<ArcStr>> {
    let text = rules.join(":");
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let unknown = |rule: &str| Invalid::new("tls_params.cipher_suites", format!("{rule:?} is no known cipher suite"));
    let mut list = List(SUITES.iter().map(|(name, _)| (*name, false)).collect());
    // Only at the beginning it means anything.
    let rest = match text.strip_prefix("DEFAULT") {
        Some(rest) if rest.is_empty() || rest.starts_with(':') => {
            list.apply(None, |suite| !is_deprecated(suite));
            rest
        }
        _ => &text[..],
    };
    let mut in_group = false;
    for part in rest.split(':').filter(|part| !part.is_empty()) {
        let opened = part.strip_prefix('[');
        let closed = opened.unwrap_or(part).strip_suffix(']');
        if (opened.is_some() && in_group) || (opened.is_none() && !in_group && (closed.is_some() || part.contains('|')))
        {
            return Err(unknown(part));
        }
        in_group = (in_group || opened.is_some()) && closed.is_none();
        let grouped = in_group || closed.is_some();
        for rule in closed.or(opened).unwrap_or(part).split('|') {
            let operator = rule.chars().next().filter(|c| "-+!@".contains(*c));
            let names = &rule[operator.map_or(0, char::len_utf8)..];
            if (grouped && operator.is_some()) || (operator == Some('@') && names != "STRENGTH") {
                return Err(unknown(rule));
            }
            if operator == Some('@') {
                list.sort();
                continue;
            }
            let by_name =
                |suite: &str| SUITES.iter().any(|(own, standard)| *own == suite && [*own, *standard].contains(&names));
            if SUITES.iter().any(|(own, _)| by_name(own)) {
                list.apply(operator, by_name);
                continue;
            }
            if OF_13.contains(&names) || EMPTY.contains(&names) {
                continue;
            }
            let all: Option<Vec<_>> = names.split('+').map(alias).collect();
            let all = all.ok_or_else(|| unknown(rule))?;
            list.apply(operator, |suite| !is_deprecated(suite) && all.iter().all(|fits| fits(suite)));
        }
    }
    let chosen: Vec<ArcStr> = list.0.into_iter().filter(|(_, on)| *on).map(|(suite, _)| suite.into()).collect();
    if in_group || chosen.is_empty() {
        return Err(Invalid::new("tls_params.cipher_suites", format!("{text:?} stands for no cipher suite")));
    }
    Ok(chosen)
}

/// The key exchanges of a context by their first names; none where nothing is said.
pub(super) fn curves(names: &[String]) -> Compiled<Vec<ArcStr>> {
    let text = names.join(":");
    let mut curves: Vec<ArcStr> = Vec::new();
    for name in text.split(':').filter(|_| !text.is_empty()) {
        let known = CURVES.iter().find(|(own, other)| [*own, *other].contains(&name));
        let (curve, _) =
            known.ok_or_else(|| Invalid::new("tls_params.ecdh_curves", format!("{name:?} is no known curve")))?;
        if curves.iter().any(|other| **other == **curve) {
            return Err(Invalid::new("tls_params.ecdh_curves", format!("{name:?} is there twice")));
        }
        curves.push((*curve).into());
    }
    Ok(curves)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rules: &[&str]) -> Option<Vec<String>> {
        let rules: Vec<String> = rules.iter().map(|rule| (*rule).to_owned()).collect();
        Some(suites(&rules).ok()?.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn rules_of_boringssl() {
        let one = ["ECDHE-RSA-AES128-GCM-SHA256"];
        for same in [one[0], "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "[ECDHE-RSA-AES128-GCM-SHA256]"] {
            assert_eq!(of(&[same]).unwrap(), one, "{same}");
        }
        assert_eq!(of(&["TLS_AES_128_GCM_SHA256", one[0]]).unwrap(), one);
        assert_eq!(of(&[""]).unwrap(), [""; 0]);
        assert_eq!(of(&["ALL"]).unwrap().len(), SUITES.len() - 2);
        assert_eq!(of(&["ALL"]), of(&["DEFAULT"]));
        assert_eq!(of(&["3DES+SHA", one[0]]).unwrap(), one);
        assert_eq!(of(&["ECDHE+AESGCM", "!aECDSA"]).unwrap(), [one[0], "ECDHE-RSA-AES256-GCM-SHA384"]);
        assert_eq!(of(&["aRSA+AESGCM:-kRSA:+AES128"]).unwrap(), ["ECDHE-RSA-AES256-GCM-SHA384", one[0]]);
        assert_eq!(of(&["aRSA+AESGCM:-kRSA:@STRENGTH"]).unwrap(), ["ECDHE-RSA-AES256-GCM-SHA384", one[0]]);
        assert_eq!(of(&["DES-CBC3-SHA"]).unwrap(), ["DES-CBC3-SHA"]);
        for bad in
            ["FOO", "TLS_AES_128_GCM_SHA256", "a b", "[ALL", "ALL]", "[-ALL]", "ecdhe", "NULL-SHA", "@FOO", "SHA256"]
        {
            assert!(of(&[bad]).is_none(), "{bad}");
        }
    }

    #[test]
    fn curves_have_two_names() {
        let of = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            Some(curves(&names).ok()?.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(of(&["x25519:P-256", "secp384r1"]).unwrap(), ["X25519", "P-256", "P-384"]);
        assert_eq!(of(&[""]).unwrap(), [""; 0]);
        for bad in [&["P-256", "prime256v1"][..], &["P-224"], &["P-256", ""], &["X448"]] {
            assert!(of(bad).is_none(), "{bad:?}");
        }
    }
}
