//! Cluster addresses of services: stable while the service exists, and the same in every run where nothing collides.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use k8s_openapi::api::core::v1::Service;

use super::Key;
use crate::network::{SERVICES_V4, SERVICES_V6};

/// Assigned addresses.
#[derive(Default)]
pub(super) struct Addresses {
    by_service: BTreeMap<Key, Vec<IpAddr>>,
    used: BTreeSet<u16>,
}

impl Addresses {
    /// The addresses of a service, assigned at first sight. Headless and ExternalName services have none.
    pub(super) fn of(&mut self, key: &Key, service: &Service, dual_stack: bool) -> Vec<IpAddr> {
        let spec = service.spec.as_ref();
        let written = spec.and_then(|spec| spec.cluster_ip.as_deref()).filter(|ip| !ip.is_empty());
        if written == Some("None") || spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName") {
            self.release(key);
            return Vec::new();
        }
        if let Some(known) = self.by_service.get(key) {
            return known.clone();
        }
        let slot =
            written.and_then(|text| text.parse().ok()).and_then(slot_of).filter(|slot| !self.used.contains(slot));
        let slot = slot.unwrap_or_else(|| self.free_slot(key));
        self.used.insert(slot);
        let mut ips = vec![v4(slot)];
        let families = spec.and_then(|spec| spec.ip_family_policy.as_deref());
        if dual_stack && families != Some("SingleStack") {
            ips.push(v6(slot));
        }
        self.by_service.insert(key.clone(), ips.clone());
        ips
    }

    /// Frees the addresses of a deleted service.
    pub(super) fn release(&mut self, key: &Key) {
        for ip in self.by_service.remove(key).into_iter().flatten() {
            if let Some(slot) = slot_of(ip) {
                self.used.remove(&slot);
            }
        }
    }

    fn free_slot(&self, key: &Key) -> u16 {
        // FNV-1a of the name, then the next free one: the same YAML gets the same addresses every time.
        let text = format!("{}/{}", key.0, key.1);
        let hash = text.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let first = (hash % 65_000) as u16 + 256;
        (0..65_000u16)
            .map(|step| first.wrapping_add(step).max(256))
            .find(|slot| !self.used.contains(slot))
            .unwrap_or(first)
    }
}

fn slot_of(ip: IpAddr) -> Option<u16> {
    match (ip, SERVICES_V4.ip) {
        (IpAddr::V4(ip), IpAddr::V4(base)) if ip.octets()[..2] == base.octets()[..2] => {
            Some(u16::from_be_bytes([ip.octets()[2], ip.octets()[3]]))
        }
        _ => None,
    }
}

fn v4(slot: u16) -> IpAddr {
    match SERVICES_V4.ip {
        IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from(u32::from(base) + u32::from(slot))),
        other => other,
    }
}

fn v6(slot: u16) -> IpAddr {
    match SERVICES_V6.ip {
        IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from(u128::from(base) + u128::from(slot))),
        other => other,
    }
}
