//! Telling everybody: endpoints to the rules and to DNS, objects to the control plane, progress to the user.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use manifest::Document;
use serde_json::{Value, json};

use super::pods::chain;
use super::{Cluster, Key};
use crate::network::dns::{PodName, Zone};
use crate::network::publish::Destination;
use crate::objects::Id;
use crate::plane::Change;
use crate::pod;
use crate::pod::state::PodState;
use crate::services::{self, PodView, ServiceView};

impl Cluster {
    /// Recomputes what follows from objects and pods, and passes on what changed, to the control plane in one batch.
    pub(super) async fn publish(&mut self) {
        let views = self.views();
        let places = self.pods.values().map(|entry| &entry.place);
        let ips: Vec<_> = places.clone().map(|place| place.ips.clone()).collect();
        let attached: Vec<_> = places.flat_map(|place| place.attached.iter().copied()).collect();
        if views != self.services || ips != self.known_ips || attached != self.known_attached {
            self.program(&views, &ips, &attached);
            self.zone.send_replace(Arc::new(self.new_zone(&views)));
            self.slices_changed(&views);
            for ((namespace, name, port), target) in &self.published {
                let now = self.destination(&views, namespace, name, *port);
                target.send_if_modified(|old| std::mem::replace(old, now) != now);
            }
            self.services = views;
            self.known_ips = ips;
            self.known_attached = attached;
        }
        self.pods_changed();
        if self.pending.is_empty() {
            return;
        }
        let changes = std::mem::take(&mut self.pending);
        let outcome = self.parts.plane.update(changes).await;
        self.revision = outcome.revision;
        for rejected in outcome.rejected {
            self.parts.progress.warn(&rejected);
        }
    }

    fn program(&mut self, views: &[ServiceView], ips: &[Vec<IpAddr>], attached: &[IpAddr]) {
        let translations: Vec<_> = views.iter().flat_map(ServiceView::translations).collect();
        if let Err(error) = self.parts.network.program(&translations, ips, attached) {
            self.parts.progress.warn(&format!("services: {}", chain(&error)));
        }
    }

    fn views(&mut self) -> Vec<ServiceView> {
        let states: Vec<(Option<PodState>, &super::Entry)> =
            self.pods.values().map(|entry| (entry.handle.as_ref().map(pod::PodHandle::state), entry)).collect();
        let pods: Vec<PodView<'_>> = states
            .iter()
            .filter(|(state, _)| {
                !state
                    .as_ref()
                    .is_some_and(|s| matches!(s.phase, pod::state::Phase::Succeeded | pod::state::Phase::Failed))
            })
            .map(|(state, entry)| PodView {
                pod: &entry.pod,
                ips: &entry.place.ips,
                ready: state.as_ref().is_some_and(PodState::ready),
                terminating: state.as_ref().is_some_and(|state| state.stopping),
            })
            .collect();
        let dual = self.parts.network.dual_stack();
        let mut views = Vec::new();
        for (key, service) in self.objects.services() {
            let ips = self.addresses.of(key, service, dual);
            let external =
                if service.spec.as_ref().is_some_and(|spec| spec.selector.as_ref().is_none_or(BTreeMap::is_empty)) {
                    self.objects.external(&key.0, &key.1)
                } else {
                    Vec::new()
                };
            views.push(services::view(service, &ips, &pods, &external));
        }
        views
    }

    fn new_zone(&self, views: &[ServiceView]) -> Zone {
        let pods: Vec<PodName> = self
            .pods
            .iter()
            .flat_map(|(key, entry)| entry.place.ips.iter().map(|ip| PodName { namespace: key.0.clone(), ip: *ip }))
            .collect();
        Zone::new(views, &pods)
    }

    fn slices_changed(&mut self, views: &[ServiceView]) {
        let mut now: BTreeMap<Key, Value> = BTreeMap::new();
        for slice in views.iter().flat_map(ServiceView::slices) {
            let text = |field: &str| slice["metadata"][field].as_str().unwrap_or_default().to_owned();
            now.insert((text("namespace"), text("name")), slice);
        }
        for key in self.slices.keys().filter(|key| !now.contains_key(*key)) {
            self.pending.push(Change::Delete(Id {
                kind: "EndpointSlice".to_owned(),
                namespace: key.0.clone(),
                name: key.1.clone(),
            }));
        }
        for (key, slice) in &now {
            if self.slices.get(key) != Some(slice) {
                self.pending.push(Change::Apply(Box::new(Document::from_value(slice.clone(), "<cluster>"))));
            }
        }
        self.slices = now;
    }

    /// Tells the control plane of pods whose phase or readiness changed.
    fn pods_changed(&mut self) {
        let mut news = Vec::new();
        for (key, entry) in &mut self.pods {
            let state = entry.handle.as_ref().map(pod::PodHandle::state);
            let told = match &state {
                Some(state) => (state.ready(), state.phase.as_str()),
                None => (false, "Pending"),
            };
            if entry.told == Some(told) {
                continue;
            }
            entry.told = Some(told);
            news.push(key.clone());
        }
        if news.is_empty() {
            return;
        }
        let told = news.iter().filter_map(|key| self.pods.get(key)).map(|entry| self.with_status(entry));
        let told: Vec<Change> = told.map(|document| Change::Apply(Box::new(document))).collect();
        self.pending.extend(told);
        // A rollout goes on when what it made is known to others.
        self.changed.send_modify(|count| *count += 1);
    }

    /// The pod as an API server would show it.
    pub(super) fn with_status(&self, entry: &super::Entry) -> Document {
        let node_ip = self.parts.network.gateway();
        let mut object = entry.object.clone();
        object["status"] = match entry.handle.as_ref().map(pod::PodHandle::state) {
            Some(state) => state.status(&entry.place.ips, node_ip),
            None => json!({
                "phase": "Pending",
                "hostIP": node_ip.to_string(),
                "podIP": entry.place.ips.first().map(ToString::to_string),
                "podIPs": entry.place.ips.iter().map(|ip| json!({"ip": ip.to_string()})).collect::<Vec<_>>(),
            }),
        };
        Document::from_value(object, "<cluster>")
    }

    /// Prints what changed about the pods.
    pub(super) fn announce(&mut self) {
        let mut warnings = Vec::new();
        for (key, entry) in &mut self.pods {
            let Some(handle) = &entry.handle else { continue };
            let state = handle.state();
            let line = match state.message() {
                Some(message) if !state.ready() => message,
                _ if state.ready() => "ready".to_owned(),
                _ => continue,
            };
            if entry.announced.as_ref() == Some(&line) {
                continue;
            }
            // Probes that fail while a program starts are no news.
            let young = state.age().as_secs() < 10 && state.summary() == "Running";
            if line != "ready" && young {
                continue;
            }
            if line == "ready" {
                let (ready, all) = state.ready_count();
                self.parts.progress.step(&format!(
                    "pod {} ready ({ready}/{all}) after {:.1} s",
                    key.1,
                    state.age().as_secs_f64()
                ));
            } else {
                warnings.push(format!("pod {}: {line}", key.1));
            }
            entry.announced = Some(line);
        }
        for warning in warnings {
            self.parts.progress.warn(&warning);
        }
    }

    /// Where a published port leads.
    fn destination(&self, views: &[ServiceView], namespace: &str, name: &str, port: u16) -> Destination {
        let Some(view) = views.iter().find(|view| view.namespace == namespace && view.name == name) else {
            return Destination::default();
        };
        let has_sidecar = |endpoint: &services::EndpointView| {
            self.pods.get(&(namespace.to_owned(), endpoint.pod.clone())).is_some_and(|e| e.injected)
        };
        let mesh = view.serving().next().is_some() && view.serving().all(has_sidecar);
        if let Some(ip) = view.cluster_ips.first() {
            return Destination { address: Some(SocketAddr::new(*ip, port)), mesh };
        }
        // Headless: the first endpoint.
        let index = view.ports.iter().position(|p| p.port == port);
        let address = index.zip(view.serving().next()).and_then(|(index, endpoint)| {
            Some(SocketAddr::new(*endpoint.ips.first()?, endpoint.ports.get(index).copied().flatten()?))
        });
        Destination { address, mesh }
    }
}
