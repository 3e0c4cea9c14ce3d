//! ProxyConfig, the resource: settings of proxies by selector.

use std::collections::BTreeMap;

use crate::selector::WorkloadSelector;
use crate::wire::message;

message! {
    /// `networking.v1beta1.ProxyConfig`.
    ProxyConfig {
        selector: Option<WorkloadSelector>,
        concurrency: Option<i32>,
        environment_variables "environmentVariables": BTreeMap<String, String>,
        image: Option<ProxyImage>,
    }
}

message! {
    /// `networking.v1beta1.ProxyImage`.
    ProxyImage {
        image_type "imageType": String,
    }
}
