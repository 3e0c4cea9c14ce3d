use mesh_types::ArcStr;

/// What the control plane knows about itself; not part of MeshConfig.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Settings {
    /// Name of the Kubernetes cluster, as proxies report it in `CLUSTER_ID`.
    pub cluster_id: ArcStr,
    /// Network of workloads that do not name one.
    pub network: ArcStr,
    /// DNS domain of the cluster.
    pub domain: ArcStr,
    /// Listen and send on both address families (istiod's `ISTIO_DUAL_STACK`).
    pub dual_stack: bool,
    /// Accept HTTP/1.0 everywhere (istiod's `PILOT_HTTP10`).
    pub http10: bool,
    /// Parse MongoDB, for its statistics (istiod's `PILOT_ENABLE_MONGO_FILTER`).
    pub mongo_filter: bool,
    /// Terminate TLS that a Sidecar's ingress listener declares (istiod's `ENABLE_TLS_ON_SIDECAR_INGRESS`).
    pub tls_on_ingress: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            cluster_id: "Kubernetes".into(),
            network: "".into(),
            domain: "cluster.local".into(),
            dual_stack: false,
            http10: false,
            mongo_filter: true,
            tls_on_ingress: false,
        }
    }
}

impl Settings {
    /// Reads one of istiod's environment variables. Returns whether it is known.
    pub fn set_env(&mut self, name: &str, value: &str) -> bool {
        let on = matches!(value, "1" | "t" | "T" | "true" | "TRUE" | "True");
        match name {
            "ISTIO_DUAL_STACK" => self.dual_stack = on,
            "PILOT_HTTP10" => self.http10 = on,
            "PILOT_ENABLE_MONGO_FILTER" => self.mongo_filter = on,
            "ENABLE_TLS_ON_SIDECAR_INGRESS" => self.tls_on_ingress = on,
            "CLUSTER_ID" => self.cluster_id = value.into(),
            _ => return false,
        }
        true
    }
}
