//! Under which names calls of gRPC are counted (`filters.http.grpc_stats.v3.FilterConfig`).

use std::borrow::Cow;

use crate::matchers::path_without_query;
use crate::pb::ext::filters::http::grpc_stats::v3 as pb;

/// What the `grpc_stats` filter counts and says.
#[derive(Clone, Debug)]
pub struct GrpcStats {
    /// The numbers of messages become filter state.
    pub emit_filter_state: bool,
    names: Names,
}

/// Which calls are counted by service and method.
#[derive(Clone, Debug)]
enum Names {
    /// All, `true`: without dots in names of services.
    All(bool),
    /// These methods of these services; others are counted without a name.
    Listed(Vec<Service>),
}

/// A service with its methods that are counted by name.
#[derive(Clone, Debug)]
struct Service {
    name: Box<str>,
    methods: Vec<Box<str>>,
}

impl GrpcStats {
    pub(super) fn compile(config: &pb::FilterConfig) -> Self {
        use pb::filter_config::PerMethodStatSpecifier as Specifier;
        let names = match &config.per_method_stat_specifier {
            Some(Specifier::StatsForAllMethods(all)) if all.value => {
                Names::All(config.replace_dots_in_grpc_service_name)
            }
            Some(Specifier::IndividualMethodStatsAllowlist(list)) => {
                let service = |service: &crate::pb::core::grpc_method_list::Service| Service {
                    name: service.name.as_str().into(),
                    methods: service.method_names.iter().map(|name| name.as_str().into()).collect(),
                };
                Names::Listed(list.services.iter().map(service).collect())
            }
            _ => Names::Listed(Vec::new()),
        };
        Self { emit_filter_state: config.emit_filter_state, names }
    }

    /// Service and method of a call (Envoy `Grpc::Common::resolveServiceAndMethod`).
    pub fn call(path: &str) -> Option<(&str, &str)> {
        let mut parts = path_without_query(path).split('/').filter(|part| !part.is_empty());
        match (parts.next(), parts.next(), parts.next()) {
            (Some(service), Some(method), None) => Some((service, method)),
            _ => None,
        }
    }

    /// What stands before a counter of a call, behind the cluster's name. `None`: the path names no call.
    pub fn prefix(&self, path: &str) -> Option<Cow<'static, str>> {
        let (service, method) = Self::call(path)?;
        let is_named = match &self.names {
            Names::All(true) => return Some(format!("grpc.{}.{method}.", service.replace('.', "_")).into()),
            Names::All(false) => true,
            Names::Listed(listed) => listed
                .iter()
                .filter(|listed| *listed.name == *service)
                .any(|listed| listed.methods.iter().any(|name| **name == *method)),
        };
        Some(match is_named {
            true => format!("grpc.{service}.{method}.").into(),
            false => "grpc.".into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::core::{GrpcMethodList, grpc_method_list};
    use pb::filter_config::PerMethodStatSpecifier as Specifier;

    fn prefix(specifier: Option<Specifier>, dotless: bool, path: &str) -> Option<String> {
        let config = pb::FilterConfig {
            per_method_stat_specifier: specifier,
            replace_dots_in_grpc_service_name: dotless,
            ..Default::default()
        };
        GrpcStats::compile(&config).prefix(path).map(Cow::into_owned)
    }

    #[test]
    fn calls_are_named_as_configured() {
        let all = || Some(Specifier::StatsForAllMethods(crate::pb::BoolValue { value: true }));
        assert_eq!(prefix(all(), false, "/a.B/C?x").as_deref(), Some("grpc.a.B.C."));
        assert_eq!(prefix(all(), true, "//a.B//C").as_deref(), Some("grpc.a_B.C."));
        assert_eq!(prefix(all(), false, "/a.B"), None);
        assert_eq!(prefix(all(), false, "/a/b/c"), None);
        assert_eq!(prefix(None, false, "/a.B/C").as_deref(), Some("grpc."));
        assert_eq!(prefix(None, false, "/a"), None);
        let service = grpc_method_list::Service { name: "a.B".into(), method_names: vec!["C".into()] };
        let list =
            || Some(Specifier::IndividualMethodStatsAllowlist(GrpcMethodList { services: vec![service.clone()] }));
        assert_eq!(prefix(list(), true, "/a.B/C").as_deref(), Some("grpc.a.B.C."));
        assert_eq!(prefix(list(), false, "/a.B/D").as_deref(), Some("grpc."));
    }
}
