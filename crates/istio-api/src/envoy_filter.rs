//! Patches over the generated Envoy configuration.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::selector::PolicyTargetReference;
use crate::sidecar::WorkloadSelector;
use crate::wire::{enumeration, message};

message! {
    /// `networking.v1alpha3.EnvoyFilter`.
    EnvoyFilter {
        workload_selector "workloadSelector": Option<WorkloadSelector>,
        target_refs "targetRefs": Vec<PolicyTargetReference>,
        config_patches "configPatches": Vec<EnvoyConfigObjectPatch>,
        priority: i32,
    }
}

enumeration! {
    /// `networking.v1alpha3.EnvoyFilter.ApplyTo`.
    ApplyTo {
        Invalid = 0 "INVALID",
        Listener = 1 "LISTENER",
        FilterChain = 2 "FILTER_CHAIN",
        NetworkFilter = 3 "NETWORK_FILTER",
        HttpFilter = 4 "HTTP_FILTER",
        RouteConfiguration = 5 "ROUTE_CONFIGURATION",
        VirtualHost = 6 "VIRTUAL_HOST",
        HttpRoute = 7 "HTTP_ROUTE",
        Cluster = 8 "CLUSTER",
        ExtensionConfig = 9 "EXTENSION_CONFIG",
        Bootstrap = 10 "BOOTSTRAP",
        ListenerFilter = 11 "LISTENER_FILTER",
    }
}

enumeration! {
    /// `networking.v1alpha3.EnvoyFilter.PatchContext`.
    PatchContext {
        Any = 0 "ANY",
        SidecarInbound = 1 "SIDECAR_INBOUND",
        SidecarOutbound = 2 "SIDECAR_OUTBOUND",
        Gateway = 3 "GATEWAY",
        Waypoint = 4 "WAYPOINT",
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.ProxyMatch`.
    ProxyMatch {
        proxy_version "proxyVersion": String,
        metadata: BTreeMap<String, String>,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.ClusterMatch`.
    ClusterMatch {
        port_number "portNumber": u32,
        service: String,
        subset: String,
        name: String,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.RouteConfigurationMatch`.
    RouteConfigurationMatch {
        port_number "portNumber": u32,
        port_name "portName": String,
        gateway: String,
        vhost: Option<VirtualHostMatch>,
        name: String,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.RouteConfigurationMatch.RouteMatch`.
    RouteMatch {
        name: String,
        action: RouteAction,
    }
}

enumeration! {
    /// `networking.v1alpha3.EnvoyFilter.RouteConfigurationMatch.RouteMatch.Action`.
    RouteAction {
        Any = 0 "ANY",
        Route = 1 "ROUTE",
        Redirect = 2 "REDIRECT",
        DirectResponse = 3 "DIRECT_RESPONSE",
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.RouteConfigurationMatch.VirtualHostMatch`.
    VirtualHostMatch {
        name: String,
        domain_name "domainName": String,
        route: Option<RouteMatch>,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.ListenerMatch`.
    ListenerMatch {
        port_number "portNumber": u32,
        port_name "portName": String,
        filter_chain "filterChain": Option<FilterChainMatch>,
        listener_filter "listenerFilter": String,
        name: String,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.ListenerMatch.FilterChainMatch`.
    FilterChainMatch {
        name: String,
        sni: String,
        transport_protocol "transportProtocol": String,
        application_protocols "applicationProtocols": String,
        filter: Option<FilterMatch>,
        destination_port "destinationPort": u32,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.ListenerMatch.FilterMatch`.
    FilterMatch {
        name: String,
        sub_filter "subFilter": Option<SubFilterMatch>,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.ListenerMatch.SubFilterMatch`.
    SubFilterMatch {
        name: String,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.WaypointMatch`.
    WaypointMatch {
        port_number "portNumber": u32,
        route: Option<WaypointRouteMatch>,
        filter: Option<WaypointFilterMatch>,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.WaypointMatch.RouteMatch`.
    WaypointRouteMatch {
        name: String,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.WaypointMatch.FilterMatch`.
    WaypointFilterMatch {
        name: String,
        sub_filter "subFilter": Option<WaypointSubFilterMatch>,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.WaypointMatch.FilterMatch.SubFilterMatch`.
    WaypointSubFilterMatch {
        name: String,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.Patch`.
    Patch {
        operation: Operation,
        value: Option<Map<String, Value>>,
        filter_class "filterClass": FilterClass,
    }
}

enumeration! {
    /// `networking.v1alpha3.EnvoyFilter.Patch.Operation`.
    Operation {
        Invalid = 0 "INVALID",
        Merge = 1 "MERGE",
        Add = 2 "ADD",
        Remove = 3 "REMOVE",
        InsertBefore = 4 "INSERT_BEFORE",
        InsertAfter = 5 "INSERT_AFTER",
        InsertFirst = 6 "INSERT_FIRST",
        Replace = 7 "REPLACE",
        MergeAndReplaceList = 8 "MERGE_AND_REPLACE_LIST",
    }
}

enumeration! {
    /// `networking.v1alpha3.EnvoyFilter.Patch.FilterClass`.
    FilterClass {
        Unspecified = 0 "UNSPECIFIED",
        Authn = 1 "AUTHN",
        Authz = 2 "AUTHZ",
        Stats = 3 "STATS",
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.EnvoyConfigObjectMatch`.
    EnvoyConfigObjectMatch {
        context: PatchContext,
        proxy: Option<ProxyMatch>,
        listener: Option<ListenerMatch>,
        route_configuration "routeConfiguration": Option<RouteConfigurationMatch>,
        cluster: Option<ClusterMatch>,
        waypoint: Option<WaypointMatch>,
    }
}

message! {
    /// `networking.v1alpha3.EnvoyFilter.EnvoyConfigObjectPatch`.
    EnvoyConfigObjectPatch {
        apply_to "applyTo": ApplyTo,
        r#match: Option<EnvoyConfigObjectMatch>,
        patch: Option<Patch>,
    }
}
