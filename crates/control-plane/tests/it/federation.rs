//! Roots of other meshes, as PEM in the mesh configuration and as SPIFFE bundles, reach workloads with their certificates.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ca::{CertificateRequest, CertificateResponse};
use data_encoding::BASE64;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Request;

use crate::mesh::Mesh;

/// A certificate authority of somebody else.
fn other() -> (String, CertificateDer<'static>, Issuer<'static, KeyPair>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).unwrap();
    (certificate.pem(), certificate.der().clone(), Issuer::new(params, key))
}

/// Serves a bundle over TLS, with a certificate of `issuer`.
async fn serve(bundle: String, issuer: &Issuer<'static, KeyPair>) -> u16 {
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["localhost".into()]).unwrap().signed_by(&key, issuer).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut head = [0; 1024];
            let length = stream.read(&mut head).await.unwrap_or_default();
            assert!(head[..length].starts_with(b"GET /bundle HTTP/1.1\r\n"));
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{bundle}", bundle.len());
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    port
}

/// The roots that come with a workload's certificate.
async fn roots(mesh: &Mesh) -> Vec<CertificateDer<'static>> {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let mut request = Request::new(CertificateRequest { csr, validity_duration: 3600 });
    let token = format!("Bearer {}", mesh.token("sleep"));
    request.metadata_mut().insert("authorization", token.parse().unwrap());
    let mut client = tonic::client::Grpc::new(mesh.tls_channel(None).await);
    client.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<CertificateRequest, CertificateResponse>::default();
    let path = http::uri::PathAndQuery::from_static(ca::METHOD);
    let response = client.unary(request, path, codec).await.unwrap().into_inner();
    let last = response.cert_chain.last().unwrap();
    CertificateDer::pem_slice_iter(last.as_bytes()).collect::<Result<_, _>>().unwrap()
}

#[tokio::test]
async fn workloads_trust_the_roots_of_other_meshes() {
    let mesh = Mesh::start().await;
    let own = CertificateDer::from_pem_slice(mesh.authority.root_pem().as_bytes()).unwrap();
    assert_eq!(roots(&mesh).await, std::slice::from_ref(&own));

    let (written, written_der, issuer) = other();
    let (_, fetched_der, _) = other();
    let bundle = json!({"keys": [{"use": "x509-svid", "x5c": [BASE64.encode(&fetched_der)]}]});
    let port = serve(bundle.to_string(), &issuer).await;
    let url = format!("https://localhost:{port}/bundle");
    let settings = json!({"caCertificates": [{"pem": written}, {"spiffeBundleUrl": url, "trustDomains": ["other"]}]});
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
        "data": {"mesh": settings.to_string()},
    });
    mesh.apply(&map.to_string()).await;
    let asked = Instant::now();
    loop {
        let roots = roots(&mesh).await;
        if roots == [own.clone(), written_der.clone(), fetched_der.clone()] {
            break;
        }
        assert!(asked.elapsed() < Duration::from_secs(20), "{} roots", roots.len());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // What is no longer wanted is no longer trusted.
    let mut map = map;
    map["data"]["mesh"] = "{}".into();
    mesh.apply(&map.to_string()).await;
    let asked = Instant::now();
    while roots(&mesh).await.len() > 1 {
        assert!(asked.elapsed() < Duration::from_secs(20), "still trusted");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
