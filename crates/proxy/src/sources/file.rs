//! Resources out of a file that holds a `DiscoveryResponse`, read again when it changes.

use super::Demand;
use crate::control::{Control, Incoming};
use bytes::Bytes;
use envoy_api::discovery::{DiscoveryResponse, Resource};
use envoy_api::{Any, Message, type_url};
use mesh_types::ArcStr;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// How often a file is looked at. Renamed files and changed symbolic links (Kubernetes' volumes) are seen as well.
const PERIOD: Duration = Duration::from_millis(250);

const RESPONSE: &str = "type.googleapis.com/envoy.service.discovery.v3.DiscoveryResponse";
const RESOURCE: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";

/// Which file it is, when it was written, and how long it is.
type Stamp = (u64, SystemTime, u64);

fn stamp(path: &str) -> Option<Stamp> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.ino(), meta.modified().ok()?, meta.len()))
}

/// Follows a file. What cannot be used leaves in place what was there before.
pub(super) async fn follow(path: ArcStr, demand: Demand, control: Arc<Mutex<Control>>) {
    let mut seen = None;
    let mut known = BTreeSet::new();
    loop {
        let now = stamp(&path);
        if now != seen {
            seen = now;
            if now.is_some() {
                take(&path, &demand, &control, &mut known);
            } else {
                tracing::warn!(file = &*path, "a file of the configuration does not exist (yet)");
            }
        }
        tokio::time::sleep(PERIOD).await;
    }
}

fn take(path: &str, demand: &Demand, control: &Mutex<Control>, known: &mut BTreeSet<ArcStr>) {
    let locked = || control.lock().unwrap_or_else(PoisonError::into_inner);
    let Held { version, found, is_empty } = match read(path, demand) {
        Ok(held) => held,
        Err(reason) => {
            tracing::warn!(file = path, reason, "keeping what the file held before");
            locked().count_failure(demand.type_url, demand.name.as_ref());
            return;
        }
    };
    let names: BTreeSet<ArcStr> = found.iter().map(|f| f.name.clone()).collect();
    // Only lists of everything say what is gone.
    let removed: Vec<ArcStr> = match demand.name {
        None => known.difference(&names).cloned().collect(),
        Some(_) => Vec::new(),
    };
    let mut control = locked();
    if let Some(name) = demand.name.as_ref().filter(|_| found.is_empty()) {
        // Envoy's `onConfigUpdate` of endpoints and routes lets an empty answer pass, that of secrets none.
        match is_empty && demand.type_url != type_url::SECRET {
            true => control.count_empty(demand.type_url, name),
            false => control.count_refused_one(demand.type_url, name),
        }
    }
    for (name, reason) in control.update(&demand.origin, demand.type_url, &version, found, &removed) {
        tracing::warn!(file = path, resource = &*name, reason, "a resource of a file is refused");
    }
    *known = names;
}

/// What a file holds.
struct Held {
    version: ArcStr,
    /// Of its resources those that were asked for.
    found: Vec<Incoming>,
    /// There are no others either.
    is_empty: bool,
}

fn read(path: &str, demand: &Demand) -> Result<Held, String> {
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    let response = parse(path, &bytes)?;
    let version = ArcStr::from(response.version_info);
    let is_empty = response.resources.is_empty();
    let mut found = Vec::new();
    for any in response.resources {
        let (any, name) = unwrapped(any)?;
        if any.type_url != demand.type_url {
            return Err(format!("holds {} where {} belongs", any.type_url, demand.type_url));
        }
        let body = Bytes::from(any.value);
        let name = match name {
            Some(name) => name,
            None => ads::client::resource_name(&any.type_url, &body).unwrap_or_else(|| "".into()),
        };
        if demand.name.as_ref().is_none_or(|wanted| *wanted == name) {
            found.push(Incoming { name, version: version.clone(), body });
        }
    }
    Ok(Held { version, found, is_empty })
}

/// By its ending, as Envoy does: `.pb` is binary, everything else YAML, of which JSON is a part.
fn parse(path: &str, bytes: &[u8]) -> Result<DiscoveryResponse, String> {
    if path.ends_with(".pb") {
        return DiscoveryResponse::decode(bytes).map_err(|e| e.to_string());
    }
    if path.ends_with(".pb_text") {
        return Err("protobuf's text format is not supported".to_owned());
    }
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let mut documents = manifest::parse_envoy(Path::new(path), text).map_err(|e| e.to_string())?;
    if documents.is_empty() {
        return Ok(DiscoveryResponse::default());
    }
    let encoded = envoy_api::json::from_json(RESPONSE, &documents.swap_remove(0).value).map_err(|e| e.to_string())?;
    DiscoveryResponse::decode(&encoded[..]).map_err(|e| e.to_string())
}

/// Resources may be wrapped, which gives them a name of their own.
fn unwrapped(any: Any) -> Result<(Any, Option<ArcStr>), String> {
    if any.type_url != RESOURCE {
        return Ok((any, None));
    }
    let wrapped = Resource::decode(&any.value[..]).map_err(|e| e.to_string())?;
    let inner = wrapped.resource.ok_or_else(|| format!("resource {:?} is empty", wrapped.name))?;
    Ok((inner, Some(wrapped.name.into())))
}
