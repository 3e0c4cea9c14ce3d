//! Do the names of ports say what they speak?

use mesh_types::Protocol;

use crate::message::{Level, Message};
use crate::world::World;

pub(super) fn check(world: &World<'_>, out: &mut Vec<Message>) {
    for service in world.all("", "Service").iter().filter(|s| !s.is_control_plane()) {
        if service.labels.get("gateway.istio.io/managed").is_some_and(|by| by.starts_with("istio.io-")) {
            continue;
        }
        let external = service.text("/spec/type") == "ExternalName";
        for (index, port) in service.list("/spec/ports").iter().enumerate() {
            let text = |key: &str| port[key].as_str().unwrap_or_default();
            let number = port["port"].as_u64().and_then(|n| u16::try_from(n).ok()).unwrap_or_default();
            let protocol =
                Protocol::of_service_port(number, text("name"), text("protocol"), port["appProtocol"].as_str());
            let tcp_by_name = external && text("name") == "tcp";
            if !protocol.is_unsupported() && !tcp_by_name {
                continue;
            }
            let message = if external {
                let text = "Port name for ExternalName service is invalid. Proxy may prevent tcp named ports and unmatched \
                            traffic for ports serving TCP protocol from being forwarded correctly";
                Message::new("IST0150", Level::Warning, service, text)
            } else {
                let target = match &port["targetPort"] {
                    serde_json::Value::String(name) => name.clone(),
                    serde_json::Value::Number(number) => number.to_string(),
                    _ => "0".to_owned(),
                };
                let text = format!(
                    "Port name {} (port: {number}, targetPort: {target}) doesn't follow the naming convention of Istio port.",
                    text("name")
                );
                Message::new("IST0118", Level::Info, service, text)
            };
            out.push(message.at(service, &format!("spec.ports[{index}].port")));
        }
    }
}
