use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::parse_x509_pem;
use x509_parser::prelude::X509Certificate;

use crate::Dump;
use crate::table::Table;

#[derive(Default)]
struct Secret {
    name: String,
    kind: &'static str,
    state: &'static str,
    is_valid: bool,
    serial: String,
    not_after: String,
    not_before: String,
    trust_domain: String,
}

/// Certificates of the workload and roots; keys are in no dump.
pub(super) fn table(dump: &Dump, typed: bool) -> anyhow::Result<String> {
    let section = dump.section("SecretsConfigDump").context("the dump has no secrets")?;
    let mut secrets = Vec::new();
    for (list, state) in [("dynamic_warming_secrets", "WARMING"), ("dynamic_active_secrets", "ACTIVE")] {
        for entry in section.get(list).and_then(Value::as_array).into_iter().flatten() {
            secrets.push(secret(entry, state));
        }
    }
    if secrets.is_empty() {
        return Ok("No active or warming secrets found.\n".to_owned());
    }
    let with_domains = secrets.iter().all(|secret| !secret.trust_domain.is_empty());
    let head =
        ["RESOURCE NAME", "TYPE", "STATUS", "VALID CERT", "SERIAL NUMBER", "NOT AFTER", "NOT BEFORE", "TRUST DOMAIN"];
    let mut table = Table::new(5, if with_domains { &head } else { &head[..7] });
    for secret in secrets {
        let name = if typed { format!("secret/{}", secret.name) } else { secret.name };
        let [kind, state] = [secret.kind, secret.state].map(str::to_owned);
        let valid = secret.is_valid.to_string();
        match with_domains {
            true => table.row([
                name,
                kind,
                state,
                valid,
                secret.serial,
                secret.not_after,
                secret.not_before,
                secret.trust_domain,
            ]),
            false => table.row([name, kind, state, valid, secret.serial, secret.not_after, secret.not_before]),
        }
    }
    Ok(table.render())
}

fn secret(entry: &Value, state: &'static str) -> Secret {
    let text = |path: &str| entry.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let mut out = Secret { name: text("/name").to_owned(), state, ..Secret::default() };
    let bytes = [
        "/secret/tls_certificate/certificate_chain/inline_bytes",
        "/secret/validation_context/trusted_ca/inline_bytes",
    ];
    let pem = bytes.iter().map(|path| text(path)).find(|text| !text.is_empty());
    let pem = pem.and_then(|text| STANDARD.decode(text).ok());
    let Some(pem) = pem else { return out };
    if let Ok((_, block)) = parse_x509_pem(&pem)
        && let Ok(certificate) = block.parse_x509()
    {
        describe(&certificate, &mut out);
    }
    out
}

fn describe(certificate: &X509Certificate<'_>, out: &mut Secret) {
    let now = OffsetDateTime::now_utc();
    let (from, to) = (certificate.validity().not_before.to_datetime(), certificate.validity().not_after.to_datetime());
    out.kind = if certificate.is_ca() { "CA" } else { "Cert Chain" };
    out.is_valid = from < now && now < to;
    out.serial = format!("{:032x}", certificate.serial);
    out.not_after = rfc3339(to);
    out.not_before = rfc3339(from);
    let names = certificate.subject_alternative_name().ok().flatten();
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        if let GeneralName::URI(uri) = name
            && let Some(rest) = uri.strip_prefix("spiffe://")
        {
            out.trust_domain = rest.split('/').next().unwrap_or_default().to_owned();
        }
    }
}

fn rfc3339(time: OffsetDateTime) -> String {
    let (date, clock) = (time.date(), time.time());
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        clock.hour(),
        clock.minute(),
        clock.second()
    )
}

/// What runs there, as `istioctl proxy-config bootstrap` tells.
pub(super) fn versions(dump: &Dump) -> anyhow::Result<String> {
    let bootstrap = dump.section("BootstrapConfigDump").context("the dump has no bootstrap")?;
    let text = |path: &str| bootstrap.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let number = |path: &str| bootstrap.pointer(path).and_then(Value::as_u64).unwrap_or_default();
    let build = "/bootstrap/node/user_agent_build_version";
    let version =
        ["major_number", "minor_number", "patch"].map(|part| number(&format!("{build}/version/{part}")).to_string());
    let label = text(&format!("{build}/metadata/build.label"));
    let mut envoy = version.join(".");
    if !label.is_empty() {
        envoy = format!("{envoy}-{label}");
    }
    for part in ["revision.status", "build.type", "ssl.version"] {
        let value = text(&format!("{build}/metadata/{part}"));
        if !value.is_empty() {
            envoy = format!("{envoy}/{value}");
        }
    }
    let sha = text("/bootstrap/node/metadata/ISTIO_PROXY_SHA");
    let rows = [
        ("Istio Version:", text("/bootstrap/node/metadata/ISTIO_VERSION")),
        ("Istio Proxy Version:", sha.split(':').nth(1).unwrap_or(sha)),
        ("Envoy Version:", envoy.as_str()),
    ];
    let rows: Vec<_> = rows.iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = rows.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    Ok(rows.iter().map(|(label, value)| format!("{label:width$} {value}\n")).collect())
}
