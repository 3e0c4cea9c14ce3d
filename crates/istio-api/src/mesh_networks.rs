//! MeshNetworks: which endpoints are in which network, and the gateways between networks.

use std::collections::BTreeMap;
use std::path::Path;

use crate::wire::message;
use crate::{Severity, Violation};

message! {
    /// `mesh.v1alpha1.Network`.
    Network {
        endpoints: Vec<NetworkEndpoints>,
        gateways: Vec<IstioNetworkGateway>,
    }
}

message! {
    /// `mesh.v1alpha1.Network.NetworkEndpoints`.
    NetworkEndpoints {
        from_cidr "fromCidr": Option<String>,
        from_registry "fromRegistry": Option<String>,
    }
}

message! {
    /// `mesh.v1alpha1.Network.IstioNetworkGateway`.
    IstioNetworkGateway {
        registry_service_name "registryServiceName": Option<String>,
        address: Option<String>,
        port: u32,
        locality: String,
    }
}

message! {
    /// `mesh.v1alpha1.MeshNetworks`.
    MeshNetworks {
        networks: BTreeMap<String, Network>,
    }
}

impl MeshNetworks {
    /// Reads the YAML of MeshNetworks. Empty text means no networks.
    ///
    /// # Errors
    /// A syntax error, a field of the wrong type, or a setting that [`MeshNetworks::validate`] refuses.
    pub fn load(file: &Path, yaml: &str) -> Result<Self, manifest::Error> {
        let documents = manifest::parse_plain(file, yaml)?;
        let Some(document) = documents.first() else { return Ok(Self::default()) };
        let networks: Self = document.decode()?;
        match networks.validate().into_iter().find(|violation| violation.severity == Severity::Error) {
            Some(Violation { path, message, .. }) => Err(document.error(&path, message)),
            None => Ok(networks),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_file_line_and_field() {
        let load = |yaml: &str| MeshNetworks::load(Path::new("n.yaml"), yaml).map_err(|error| error.to_string());
        assert_eq!(load("").unwrap(), MeshNetworks::default());
        let good = "networks: {net: {endpoints: [{fromCidr: 10.0.0.0/8}], gateways: [{address: gw.example.com, port: 15443}]}}";
        assert_eq!(load(good).unwrap().networks["net"].gateways[0].address.as_deref(), Some("gw.example.com"));
        let network = |fields: &str| load(&format!("networks:\n  net:\n    {fields}\n")).unwrap_err();
        assert_eq!(
            network("gateways: [{address: 10.0.0.1}]"),
            "n.yaml:3:16: networks[\"net\"].gateways[0].port: port number 0 must be in the range 1..65535"
        );
        assert!(network("gateways: [{address: not_a_name, port: 1}]").contains("not a valid IP address or DNS name"));
        assert!(network("gateways: [{registryServiceName: '-', port: 1}]").contains("registryServiceName"));
        assert!(network("endpoints: [{fromCidr: 10.0.0.0/33}]").contains("fromCidr"));
        assert!(network("endpoints: [{fromRegistry: a.b}]").contains("invalid registry name: a.b"));
    }
}
