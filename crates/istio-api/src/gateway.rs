//! Gateways; sidecars need only the server side TLS settings from here.

use std::collections::BTreeMap;

use crate::wire::{enumeration, message};

message! {
    /// `networking.v1alpha3.Gateway`.
    Gateway {
        servers: Vec<Server>,
        selector: BTreeMap<String, String>,
    }
}

message! {
    /// `networking.v1alpha3.Server`.
    Server {
        port: Option<Port>,
        bind: String,
        hosts: Vec<String>,
        tls: Option<ServerTlsSettings>,
        default_endpoint "defaultEndpoint": String,
        name: String,
    }
}

message! {
    /// `networking.v1alpha3.Port`.
    Port {
        number: u32,
        protocol: String,
        name: String,
        target_port "targetPort": u32,
    }
}

message! {
    /// `networking.v1alpha3.ServerTLSSettings`.
    ServerTlsSettings {
        https_redirect "httpsRedirect": bool,
        mode: ServerTlsMode,
        server_certificate "serverCertificate": String,
        private_key "privateKey": String,
        ca_certificates "caCertificates": String,
        ca_crl "caCrl": String,
        credential_name "credentialName": String,
        credential_names "credentialNames": Vec<String>,
        ca_cert_credential_name "caCertCredentialName": String,
        tls_certificates "tlsCertificates": Vec<TlsCertificate>,
        subject_alt_names "subjectAltNames": Vec<String>,
        verify_certificate_spki "verifyCertificateSpki": Vec<String>,
        verify_certificate_hash "verifyCertificateHash": Vec<String>,
        min_protocol_version "minProtocolVersion": TlsProtocol,
        max_protocol_version "maxProtocolVersion": TlsProtocol,
        cipher_suites "cipherSuites": Vec<String>,
        ecdh_curves "ecdhCurves": Vec<String>,
        insecure_skip_verify "insecureSkipVerify": Option<bool>,
    }
}

enumeration! {
    /// `networking.v1alpha3.ServerTLSSettings.TLSmode`.
    ServerTlsMode {
        Passthrough = 0 "PASSTHROUGH",
        Simple = 1 "SIMPLE",
        Mutual = 2 "MUTUAL",
        AutoPassthrough = 3 "AUTO_PASSTHROUGH",
        IstioMutual = 4 "ISTIO_MUTUAL",
        OptionalMutual = 5 "OPTIONAL_MUTUAL",
    }
}

enumeration! {
    /// `networking.v1alpha3.ServerTLSSettings.TLSProtocol`.
    TlsProtocol {
        TlsAuto = 0 "TLS_AUTO",
        Tlsv1_0 = 1 "TLSV1_0",
        Tlsv1_1 = 2 "TLSV1_1",
        Tlsv1_2 = 3 "TLSV1_2",
        Tlsv1_3 = 4 "TLSV1_3",
    }
}

message! {
    /// `networking.v1alpha3.ServerTLSSettings.TLSCertificate`.
    TlsCertificate {
        server_certificate "serverCertificate": String,
        private_key "privateKey": String,
        ca_certificates "caCertificates": String,
    }
}
