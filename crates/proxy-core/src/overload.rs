//! The overload manager: resources that are watched, and what is done when they run short.

use std::time::Duration;

use mesh_types::ArcStr;

use crate::any::Typed;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::{fields, pb};

/// A compiled `config.overload.v3.OverloadManager`.
#[derive(Clone, Debug)]
pub struct OverloadConfig {
    /// How often the resources are looked at.
    pub refresh: Duration,
    /// The resources, by name.
    pub monitors: Vec<(ArcStr, Monitor)>,
    /// What is done, and when.
    pub actions: Vec<Action>,
    /// Downstream connections in sum, and the resource's name.
    pub max_connections: Option<(ArcStr, u64)>,
    /// What Envoy knows and has no counterpart here: a proxy that does not start helps nobody, so it is only said.
    pub skipped: Vec<String>,
}

/// A resource.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Monitor {
    /// Memory in use, as a share of this many bytes.
    Heap(u64),
    /// A number in a file.
    File(ArcStr),
}

/// What can be done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ActionKind {
    /// New requests are answered 503.
    StopRequests,
    /// New connections wait in the kernel.
    StopConnections,
    /// New connections are closed.
    RejectConnections,
    /// Connections of HTTP end with their request.
    DisableKeepalive,
    /// Memory that is free goes back to the kernel.
    ShrinkHeap,
}

impl ActionKind {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::StopRequests, Self::StopConnections, Self::RejectConnections, Self::DisableKeepalive, Self::ShrinkHeap];

    /// Envoy's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::StopRequests => "envoy.overload_actions.stop_accepting_requests",
            Self::StopConnections => "envoy.overload_actions.stop_accepting_connections",
            Self::RejectConnections => "envoy.overload_actions.reject_incoming_connections",
            Self::DisableKeepalive => "envoy.overload_actions.disable_http_keepalive",
            Self::ShrinkHeap => "envoy.overload_actions.shrink_heap",
        }
    }
}

/// One action with its triggers, the strongest of which counts.
#[derive(Clone, Debug)]
pub struct Action {
    /// What is done.
    pub kind: ActionKind,
    triggers: Vec<(ArcStr, Trigger)>,
}

/// Shares of a resource in use, 0 to 1.
#[derive(Clone, Copy, Debug)]
enum Trigger {
    /// Fully from here on.
    Threshold(f64),
    /// More and more between these two.
    Scaled(f64, f64),
}

impl Trigger {
    fn strength(self, pressure: f64) -> f64 {
        match self {
            Self::Threshold(value) => f64::from(u8::from(pressure >= value)),
            Self::Scaled(from, to) => ((pressure - from) / (to - from)).clamp(0.0, 1.0),
        }
    }
}

impl Action {
    /// How strongly it is done, 0 to 1, at these pressures.
    pub fn strength(&self, pressure: impl Fn(&str) -> Option<f64>) -> f64 {
        let each = self.triggers.iter().filter_map(|(name, trigger)| Some(trigger.strength(pressure(name)?)));
        each.fold(0.0, f64::max)
    }
}

impl OverloadConfig {
    pub(crate) fn compile(config: &pb::overload::OverloadManager) -> Compiled<Self> {
        let mut compiled = Self {
            refresh: fields::duration("refresh_interval", config.refresh_interval.as_ref())?
                .map_or(Duration::from_secs(1), |refresh| refresh.max(Duration::from_millis(1))),
            monitors: Vec::new(),
            actions: Vec::new(),
            max_connections: None,
            skipped: config.loadshed_points.iter().map(|point| point.name.clone()).collect(),
        };
        compiled.skipped.extend(config.buffer_factory_config.map(|_| "buffer_factory_config".to_owned()));
        let mut names: Vec<&str> = Vec::new();
        for (i, monitor) in config.resource_monitors.iter().enumerate() {
            if names.contains(&monitor.name.as_str()) {
                return Err(Invalid::new("resource_monitors", format!("{} is there twice", monitor.name)));
            }
            names.push(&monitor.name);
            compiled.monitor(monitor).at_index("resource_monitors", i)?;
        }
        let mut taken = std::collections::HashSet::new();
        for (i, action) in config.actions.iter().enumerate() {
            let mut triggers = action.triggers.iter().map(|trigger| (&action.name, Some(&trigger.name)));
            if !taken.insert((&action.name, None)) || !triggers.all(|pair| taken.insert(pair)) {
                return Err(Invalid::new(format!("actions[{i}]"), "is there twice, or has a trigger twice"));
            }
            let action = Action::compile(action, &names, &mut compiled.skipped).at_index("actions", i)?;
            compiled.actions.extend(action);
        }
        Ok(compiled)
    }

    fn monitor(&mut self, monitor: &pb::overload::ResourceMonitor) -> Compiled<()> {
        use pb::overload::resource_monitor::ConfigType;
        let typed = match &monitor.config_type {
            Some(ConfigType::TypedConfig(any)) => Typed::open(Some(any))?,
            None => return Err(Invalid::new("typed_config", "is missing")),
        };
        let name: ArcStr = monitor.name.as_str().into();
        match typed.name.strip_prefix("envoy.extensions.resource_monitors.").unwrap_or_default() {
            "fixed_heap.v3.FixedHeapConfig" => {
                let config: pb::ext::resource_monitors::fixed_heap::v3::FixedHeapConfig = typed.decode()?;
                if config.max_heap_size_bytes == 0 {
                    return Err(Invalid::new("max_heap_size_bytes", "must be greater than 0"));
                }
                self.monitors.push((name, Monitor::Heap(config.max_heap_size_bytes)));
            }
            "injected_resource.v3.InjectedResourceConfig" => {
                let config: pb::ext::resource_monitors::injected_resource::v3::InjectedResourceConfig =
                    typed.decode()?;
                self.monitors.push((name, Monitor::File(fields::required("filename", &config.filename)?)));
            }
            "downstream_connections.v3.DownstreamConnectionsConfig" => {
                let config: pb::ext::resource_monitors::downstream_connections::v3::DownstreamConnectionsConfig =
                    typed.decode()?;
                let most = u64::try_from(config.max_active_downstream_connections).ok().filter(|n| *n > 0);
                let bad = || Invalid::new("max_active_downstream_connections", "must be greater than 0");
                self.max_connections = Some((name, most.ok_or_else(bad)?));
            }
            "cgroup_memory.v3.CgroupMemoryConfig" | "cpu_utilization.v3.CpuUtilizationConfig" => {
                self.skipped.push(monitor.name.clone());
            }
            _ => return Err(typed.unknown()),
        }
        Ok(())
    }
}

impl Action {
    fn compile(
        action: &pb::overload::OverloadAction,
        monitors: &[&str],
        skipped: &mut Vec<String>,
    ) -> Compiled<Option<Self>> {
        use pb::overload::trigger::TriggerOneof;
        if ["envoy.overload_actions.reduce_timeouts", "envoy.overload_actions.reset_high_memory_stream"]
            .contains(&action.name.as_str())
        {
            skipped.push(action.name.clone());
            return Ok(None);
        }
        refuse!("typed_config": action.typed_config.is_some());
        let kind = ActionKind::ALL.into_iter().find(|kind| kind.name() == action.name);
        let kind = kind.ok_or_else(|| Invalid::new("name", format!("{} is not supported", action.name)))?;
        let share = |field: &str, value: f64| match value {
            share if (0.0..=1.0).contains(&share) => Ok(share),
            other => Err(Invalid::new(field, format!("{other} is not between 0 and 1"))),
        };
        let mut triggers = Vec::new();
        for trigger in &action.triggers {
            if !monitors.contains(&trigger.name.as_str()) {
                return Err(Invalid::new("triggers", format!("there is no resource monitor {}", trigger.name)));
            }
            let compiled = match &trigger.trigger_oneof {
                Some(TriggerOneof::Threshold(threshold)) => Trigger::Threshold(share("value", threshold.value)?),
                Some(TriggerOneof::Scaled(scaled)) => {
                    let from = share("scaling_threshold", scaled.scaling_threshold)?;
                    let to = share("saturation_threshold", scaled.saturation_threshold)?;
                    if from >= to {
                        return Err(Invalid::new("scaling_threshold", "must be below saturation_threshold"));
                    }
                    Trigger::Scaled(from, to)
                }
                None => return Err(Invalid::new("triggers", "one has no threshold")),
            };
            triggers.push((trigger.name.as_str().into(), compiled));
        }
        if triggers.is_empty() {
            return Err(Invalid::new("triggers", "is empty"));
        }
        Ok(Some(Self { kind, triggers }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn compile(actions: serde_json::Value) -> Result<OverloadConfig, String> {
        let monitor = json!({"name": "m", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
            "max_heap_size_bytes": 1000}});
        let config = json!({"resource_monitors": [monitor], "actions": actions});
        let of = "type.googleapis.com/envoy.config.overload.v3.OverloadManager";
        let bytes = envoy_api::json::from_json(of, &config).unwrap();
        let message = prost::Message::decode(bytes.as_slice()).unwrap();
        OverloadConfig::compile(&message).map_err(|e| e.of("overload manager", "").to_string())
    }

    #[test]
    fn the_strongest_trigger_counts() {
        let name = "envoy.overload_actions.stop_accepting_requests";
        let config = compile(json!([{"name": name, "triggers": [
            {"name": "m", "scaled": {"scaling_threshold": 0.5, "saturation_threshold": 0.9}}]}]))
        .unwrap();
        let action = &config.actions[0];
        assert_eq!(action.kind, ActionKind::StopRequests);
        for (pressure, strength) in [(0.4, 0.0), (0.7, 0.5), (0.95, 1.0)] {
            assert!((action.strength(|_| Some(pressure)) - strength).abs() < 1e-9, "{pressure}");
        }
        // A resource of which nothing is known has no say.
        assert!(action.strength(|_| None) == 0.0);
    }

    #[test]
    fn what_is_unknown_is_refused_by_name() {
        let triggers = |name: &str| json!([{"name": name, "threshold": {"value": 0.9}}]);
        let refused = compile(json!([{"name": "nonsense", "triggers": triggers("m")}])).unwrap_err();
        assert!(refused.contains("nonsense"), "{refused}");
        let shrink = "envoy.overload_actions.shrink_heap";
        let refused = compile(json!([{"name": shrink, "triggers": triggers("other")}])).unwrap_err();
        assert!(refused.contains("other"), "{refused}");
    }
}
