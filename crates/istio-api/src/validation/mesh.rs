use super::destination_rule::{locality, zones};
use super::{Check, text};
use crate::Violation;
use crate::extension_provider::ExtensionProvider;
use crate::mesh_config::MeshConfig;
use crate::mesh_networks::MeshNetworks;
use crate::mesh_proxy::ProxyConfig;

impl MeshConfig {
    /// What istiod would refuse (`ValidateMeshConfig`).
    pub fn validate(&self) -> Vec<Violation> {
        Check::walk("", |check| {
            check.port("proxyListenPort", self.proxy_listen_port);
            check.port("proxyInboundListenPort", self.proxy_inbound_listen_port);
            if self.proxy_http_port != 0 {
                check.port("proxyHttpPort", self.proxy_http_port);
            }
            check.duration("connectTimeout", self.connect_timeout);
            check.at("trustDomain", |check| check.refuse(trust_domain(&self.trust_domain)));
            check.each("trustDomainAliases", &self.trust_domain_aliases, |check, alias| {
                check.refuse(trust_domain(alias))
            });
            check.at("rootNamespace", |check| {
                check.require(text::is_dns_label(&self.root_namespace), "is not a namespace")
            });
            check.some("localityLbSetting", &self.locality_lb_setting, |check, lb| locality(check, lb, true));
            check.some("defaultConfig", &self.default_config, proxy_config);
            check.some("zoneAwareLbSetting", &self.zone_aware_lb_setting, |check, lb| zones(check, lb, true));
            // That of outbound requests is not looked at.
            let inbound = &self.default_inbound_http_retry_policy;
            check.some("defaultInboundHttpRetryPolicy", inbound, super::virtual_service::retry);
            let mut names: Vec<&str> = Vec::new();
            for (index, provider) in self.extension_providers.iter().enumerate() {
                // istiod only warns of them.
                check.leniently(format_args!("extensionProviders[{index}]"), |check| {
                    check.require(!provider.name.is_empty(), "name must not be empty");
                    check.require(!names.contains(&provider.name.as_str()), "duplicate extension provider name");
                    extension_provider(check, provider);
                });
                names.push(&provider.name);
            }
        })
    }
}

impl ProxyConfig {
    /// What an agent would refuse to start with (`ValidateMeshConfigProxyConfig`).
    pub fn validate(&self) -> Vec<Violation> {
        Check::walk("", |check| proxy_config(check, self))
    }
}

/// istiod `ValidateTrustDomain`.
fn trust_domain(domain: &str) -> Result<(), String> {
    if domain.is_empty() {
        return Err("empty domain name not allowed".into());
    }
    for label in domain.trim_end_matches('.').split('.') {
        if !text::is_dns_label(label) {
            return Err(format!("domain name {domain:?} invalid (label {label:?} invalid)"));
        }
    }
    Ok(())
}

fn proxy_config(check: &mut Check, config: &ProxyConfig) {
    check.at("configPath", |check| check.require(!config.config_path.is_empty(), "must be set"));
    check.port("proxyAdminPort", config.proxy_admin_port);
    check.port("statusPort", config.status_port);
    check.require(
        config.concurrency.is_none_or(|concurrency| concurrency >= 0),
        "concurrency must be greater than or equal to 0",
    );
    check.duration("drainDuration", config.drain_duration);
    if !config.discovery_address.is_empty() {
        check.at("discoveryAddress", |check| check.refuse(proxy_address(&config.discovery_address)));
    }
    if !config.statsd_udp_address.is_empty() {
        check.at("statsdUdpAddress", |check| check.refuse(proxy_address(&config.statsd_udp_address)));
    }
}

/// istiod `ValidateProxyAddress`: `HOST:PORT`.
fn proxy_address(address: &str) -> Result<(), String> {
    let invalid = || format!("{address:?} is not of the form HOST:PORT");
    let (host, port) = address.rsplit_once(':').ok_or_else(invalid)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let valid = port.parse::<u16>().is_ok_and(|port| port > 0) && (text::is_ip(host) || text::fqdn(host).is_ok());
    if valid { Ok(()) } else { Err(invalid()) }
}

fn extension_provider(check: &mut Check, provider: &ExtensionProvider) {
    let kinds = [
        ("envoyExtAuthzHttp", provider.envoy_ext_authz_http.is_some()),
        ("envoyExtAuthzGrpc", provider.envoy_ext_authz_grpc.is_some()),
        ("zipkin", provider.zipkin.is_some()),
        ("lightstep", provider.lightstep.is_some()),
        ("datadog", provider.datadog.is_some()),
        ("stackdriver", provider.stackdriver.is_some()),
        ("opencensus", provider.opencensus.is_some()),
        ("skywalking", provider.skywalking.is_some()),
        ("opentelemetry", provider.opentelemetry.is_some()),
        ("prometheus", provider.prometheus.is_some()),
        ("envoyFileAccessLog", provider.envoy_file_access_log.is_some()),
        ("envoyHttpAls", provider.envoy_http_als.is_some()),
        ("envoyTcpAls", provider.envoy_tcp_als.is_some()),
        ("envoyOtelAls", provider.envoy_otel_als.is_some()),
        ("sds", provider.sds.is_some()),
    ];
    check.one_of(&kinds);
    check.require(kinds.iter().any(|(_, set)| *set), "no provider is set");
    let mut service = |field: &str, service: &str, port: u32| {
        check.at(field, |check| {
            let host = service.rsplit_once('/').map_or(service, |(_, host)| host);
            check.at("service", |check| check.refuse(text::fqdn(host)));
            check.port("port", port);
        });
    };
    if let Some(http) = &provider.envoy_ext_authz_http {
        service("envoyExtAuthzHttp", &http.service, http.port);
    }
    if let Some(grpc) = &provider.envoy_ext_authz_grpc {
        service("envoyExtAuthzGrpc", &grpc.service, grpc.port);
    }
    if let Some(zipkin) = &provider.zipkin {
        service("zipkin", &zipkin.service, zipkin.port);
    }
    if let Some(otel) = &provider.opentelemetry {
        service("opentelemetry", &otel.service, otel.port);
    }
    if let Some(als) = &provider.envoy_otel_als {
        service("envoyOtelAls", &als.service, als.port);
    }
}

impl MeshNetworks {
    /// What istiod would refuse (`ValidateMeshNetworks`).
    pub fn validate(&self) -> Vec<Violation> {
        Check::walk("", |check| {
            check.entries("networks", &self.networks, |check, name, network| {
                check.require(!name.is_empty(), "network name must not be empty");
                check.each("endpoints", &network.endpoints, |check, endpoints| {
                    let kinds = [
                        ("fromCidr", endpoints.from_cidr.is_some()),
                        ("fromRegistry", endpoints.from_registry.is_some()),
                    ];
                    check.one_of(&kinds);
                    if let Some(range) = &endpoints.from_cidr {
                        check.at("fromCidr", |check| check.refuse(text::subnet(range)));
                    }
                    if let Some(name) = endpoints.from_registry.as_deref().filter(|name| !text::is_dns_label(name)) {
                        check.at("fromRegistry", |check| check.error(format!("invalid registry name: {name}")));
                    }
                });
                check.each("gateways", &network.gateways, |check, gateway| {
                    let kinds = [
                        ("registryServiceName", gateway.registry_service_name.is_some()),
                        ("address", gateway.address.is_some()),
                    ];
                    check.one_of(&kinds);
                    if let Some(service) = &gateway.registry_service_name {
                        check.at("registryServiceName", |check| check.refuse(text::fqdn(service)));
                    }
                    if let Some(address) = gateway.address.as_deref().filter(|address| !text::is_ip(address))
                        && text::fqdn(address).is_err()
                    {
                        let message = format!("{address} is not a valid IP address or DNS name");
                        check.at("address", |check| check.error(message));
                    }
                    check.port("port", gateway.port);
                });
            });
        })
    }
}
