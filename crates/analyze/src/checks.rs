//! What is looked for, one file for each kind of object.

mod annotations;
mod authorization;
mod conditions;
mod destination_rule;
mod envoy_filter;
mod hosts;
mod injection;
mod routes;
mod schema;
mod service;
mod service_entry;
mod sidecar;
mod telemetry;
mod virtual_service;
mod webhook;
mod workload;

use crate::message::Message;
use crate::world::World;

/// Looks at everything and adds what it finds.
type Check = fn(&World<'_>, &mut Vec<Message>);

/// All checks, by istioctl's names.
pub(crate) const ALL: &[(&str, Check)] = &[
    ("annotations.K8sAnalyzer", annotations::check),
    ("auth.AuthorizationPoliciesAnalyzer", authorization::check),
    ("applicationUID.Analyzer", workload::user),
    ("conditions.ConditionAnalyzer", conditions::check),
    ("deployment.MultiServiceAnalyzer", workload::ports),
    ("deprecation.DeprecationAnalyzer", schema::deprecated),
    ("destinationrule.CaCertificateAnalyzer", destination_rule::certificates),
    ("destinationrule.SubsetSelectPodAnalyzer", destination_rule::subsets),
    ("envoyfilter.EnvoyPatchAnalyzer", envoy_filter::check),
    ("externalcontrolplane.ExternalControlPlaneAnalyzer", webhook::external),
    ("injection.Analyzer", injection::check),
    ("injection.ImageAutoAnalyzer", injection::automatic_images),
    ("schema.ValidationAnalyzer", schema::valid),
    ("schema.ValidationAnalyzer.VirtualService", routes::check),
    ("service.PortNameAnalyzer", service::check),
    ("serviceentry.Analyzer", service_entry::addresses),
    ("serviceentry.ConflictingServiceEntryProtocolAnalyzer", service_entry::protocols),
    ("sidecar.SelectorAnalyzer", sidecar::check),
    ("telemetry.ProviderAnalyzer", telemetry::providers),
    ("telemetry.DefaultSelectorAnalyzer", telemetry::defaults),
    ("telemetry.SelectorAnalyzer", telemetry::selectors),
    ("virtualservice.ConflictingMeshGatewayHostsAnalyzer", virtual_service::conflicts),
    ("virtualservice.DestinationHostAnalyzer", virtual_service::destinations),
    ("virtualservice.DestinationRuleAnalyzer", virtual_service::subsets),
    ("virtualservice.GatewayAnalyzer", virtual_service::gateways),
    ("webhook.Analyzer", webhook::injectors),
];
