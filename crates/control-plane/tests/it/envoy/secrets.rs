//! The agent's part for Envoy: certificates under whatever names it asks for.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ads::server::{Event, Names, Peer, Source};
use envoy_api::Message;
use envoy_api::Resource;
use envoy_api::core::{DataSource, Node, data_source::Specifier};
use envoy_api::tls::{CertificateValidationContext, Secret, TlsCertificate, secret::Type};
use rcgen::{CertificateParams, KeyPair};
use tokio::sync::watch;

pub(super) struct Secrets {
    certificate: String,
    key: String,
    revision: watch::Sender<u64>,
}

impl Secrets {
    /// Answers on a socket in `folder`, as long as the runtime lives.
    pub(super) async fn serve(folder: &Path) -> PathBuf {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["test".to_owned()]).unwrap().self_signed(&key).unwrap();
        let secrets =
            Secrets { certificate: certificate.pem(), key: key.serialize_pem(), revision: watch::Sender::new(1) };
        let path = folder.join("sds");
        let socket = tokio::net::UnixListener::bind(&path).unwrap();
        let service = ads::server::secret_service(Arc::new(secrets));
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(socket)));
        path
    }

    fn secret(&self, name: &str) -> Secret {
        let inline = |text: &str| {
            let specifier = Some(Specifier::InlineString(text.to_owned()));
            Some(DataSource { specifier, ..DataSource::default() })
        };
        let is_root = name == "ROOTCA" || name.starts_with("file-root:") || name.ends_with("-cacert");
        let r#type = if is_root {
            let trusted_ca = inline(&self.certificate);
            Type::ValidationContext(CertificateValidationContext { trusted_ca, ..Default::default() })
        } else {
            let (certificate_chain, private_key) = (inline(&self.certificate), inline(&self.key));
            Type::TlsCertificate(TlsCertificate { certificate_chain, private_key, ..TlsCertificate::default() })
        };
        Secret { name: name.to_owned(), r#type: Some(r#type) }
    }
}

impl Source for Secrets {
    type Proxy = ();

    fn connect(&self, _: &Node, _: &Peer) -> Result<(), tonic::Status> {
        Ok(())
    }

    fn resources(&self, (): &(), _: &str, names: Names<'_>) -> Arc<[Resource]> {
        let Names::List(names) = names else { return Arc::default() };
        let resource =
            |name: &mesh_types::ArcStr| Resource::with_version(name.clone(), "1", self.secret(name).encode_to_vec());
        names.iter().map(resource).collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    fn report(&self, (): &(), _: &Event) {}
}
