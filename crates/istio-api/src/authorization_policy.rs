//! Who may do what to a workload.

use crate::selector::PolicyTargetReference;
use crate::selector::WorkloadSelector;
use crate::wire::{enumeration, message};

message! {
    /// `security.v1beta1.AuthorizationPolicy`.
    AuthorizationPolicy {
        selector: Option<WorkloadSelector>,
        target_ref "targetRef": Option<PolicyTargetReference>,
        target_refs "targetRefs": Vec<PolicyTargetReference>,
        rules: Vec<Rule>,
        action: Action,
        provider: Option<ExtensionProvider>,
    }
}

enumeration! {
    /// `security.v1beta1.AuthorizationPolicy.Action`.
    Action {
        Allow = 0 "ALLOW",
        Deny = 1 "DENY",
        Audit = 2 "AUDIT",
        Custom = 3 "CUSTOM",
    }
}

message! {
    /// `security.v1beta1.AuthorizationPolicy.ExtensionProvider`.
    ExtensionProvider {
        name: String,
    }
}

message! {
    /// `security.v1beta1.Rule`.
    Rule {
        from: Vec<From>,
        to: Vec<To>,
        when: Vec<Condition>,
    }
}

message! {
    /// `security.v1beta1.Rule.From`.
    From {
        source: Option<Source>,
    }
}

message! {
    /// `security.v1beta1.Rule.To`.
    To {
        operation: Option<Operation>,
    }
}

message! {
    /// `security.v1beta1.Source`.
    Source {
        principals: Vec<String>,
        not_principals "notPrincipals": Vec<String>,
        request_principals "requestPrincipals": Vec<String>,
        not_request_principals "notRequestPrincipals": Vec<String>,
        namespaces: Vec<String>,
        not_namespaces "notNamespaces": Vec<String>,
        service_accounts "serviceAccounts": Vec<String>,
        not_service_accounts "notServiceAccounts": Vec<String>,
        ip_blocks "ipBlocks": Vec<String>,
        not_ip_blocks "notIpBlocks": Vec<String>,
        remote_ip_blocks "remoteIpBlocks": Vec<String>,
        not_remote_ip_blocks "notRemoteIpBlocks": Vec<String>,
        trust_domains "trustDomains": Vec<String>,
        not_trust_domains "notTrustDomains": Vec<String>,
    }
}

message! {
    /// `security.v1beta1.Operation`.
    Operation {
        hosts: Vec<String>,
        not_hosts "notHosts": Vec<String>,
        ports: Vec<String>,
        not_ports "notPorts": Vec<String>,
        methods: Vec<String>,
        not_methods "notMethods": Vec<String>,
        paths: Vec<String>,
        not_paths "notPaths": Vec<String>,
    }
}

message! {
    /// `security.v1beta1.Condition`.
    Condition {
        key: String,
        values: Vec<String>,
        not_values "notValues": Vec<String>,
    }
}
