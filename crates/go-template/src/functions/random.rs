//! sprig's functions whose results differ from call to call.

use std::net::ToSocketAddrs;

use super::{Args, Functions, Outcome};
use crate::value::Value;

/// Characters or bytes that one call makes.
const COUNT_LIMIT: i64 = 1 << 20;

/// Those that need ciphers, key derivation or certificates.
const UNAVAILABLE: [&str; 12] = [
    "bcrypt",
    "buildCustomCert",
    "decryptAES",
    "derivePassword",
    "encryptAES",
    "genCA",
    "genCAWithKey",
    "genPrivateKey",
    "genSelfSignedCert",
    "genSelfSignedCertWithKey",
    "genSignedCert",
    "genSignedCertWithKey",
];

pub(super) fn define(functions: &mut Functions) {
    functions.define("randAlphaNum", 1, Some(1), |args| characters(args, |c| c.is_ascii_alphanumeric()));
    functions.define("randAlpha", 1, Some(1), |args| characters(args, |c| c.is_ascii_alphabetic()));
    functions.define("randNumeric", 1, Some(1), |args| characters(args, |c| c.is_ascii_digit()));
    functions.define("randAscii", 1, Some(1), |args| characters(args, |c| (32..127).contains(c)));
    functions.define("randBytes", 1, Some(1), |args| {
        let mut bytes = vec![0; count(args)?];
        getrandom::fill(&mut bytes).map_err(|error| error.to_string())?;
        Ok(Value::from(data_encoding::BASE64.encode(&bytes)))
    });
    functions.define("randInt", 2, Some(2), |args| {
        let (from, to) = (args.int(0)?, args.int(1)?);
        let span = to.checked_sub(from).and_then(|span| u64::try_from(span).ok()).filter(|span| *span > 0);
        let span = span.ok_or_else(|| "invalid argument to Intn".to_owned())?;
        Ok(Value::int(from + below(span)? as i64))
    });
    functions.define("uuidv4", 0, Some(0), |_| {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| error.to_string())?;
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let hex = data_encoding::HEXLOWER.encode(&bytes);
        Ok(Value::from([&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")))
    });
    functions.define("shuffle", 1, Some(1), |args| {
        let mut letters: Vec<char> = args.text(0)?.chars().collect();
        for last in (1..letters.len()).rev() {
            letters.swap(last, below(last as u64 + 1)? as usize);
        }
        Ok(Value::from(letters.into_iter().collect::<String>()))
    });
    functions.define("getHostByName", 1, Some(1), |args| {
        let name = args.text(0)?;
        let mut found = (name, 0).to_socket_addrs().map_err(|error| format!("lookup {name}: {error}"))?;
        let address = found.next().ok_or_else(|| format!("lookup {name}: no such host"))?;
        Ok(Value::from(address.ip().to_string()))
    });
    // DIFFERS: these fail when they are called. No template of a sidecar needs keys of its own.
    functions.define("htpasswd", 2, Some(2), |_| Err(refusal()));
    for name in UNAVAILABLE {
        functions.define(name, 0, None, |_| Err(refusal()));
    }
}

fn refusal() -> String {
    "it is not available: templates make no keys, passwords or certificates".to_owned()
}

/// How much is asked for.
fn count(args: Args<'_, '_>) -> Result<usize, String> {
    let count = args.int(0)?;
    if !(0..=COUNT_LIMIT).contains(&count) {
        return Err(format!("{count} is not between 0 and {COUNT_LIMIT}"));
    }
    Ok(count as usize)
}

/// As many characters as the argument says, of those that fit.
fn characters<'a>(args: Args<'a, '_>, fits: fn(&u8) -> bool) -> Outcome<'a> {
    let alphabet: Vec<u8> = (0..128).filter(fits).collect();
    let mut out = String::new();
    for _ in 0..count(args)? {
        out.push(char::from(alphabet[below(alphabet.len() as u64)? as usize]));
    }
    Ok(Value::from(out))
}

/// A number below `bound`, each equally likely.
fn below(bound: u64) -> Result<u64, String> {
    // What is left over of the last whole multiple would make small numbers likelier.
    let usable = u64::MAX - u64::MAX % bound;
    loop {
        let number = getrandom::u64().map_err(|error| error.to_string())?;
        if number < usable {
            return Ok(number % bound);
        }
    }
}
