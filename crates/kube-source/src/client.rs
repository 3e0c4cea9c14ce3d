use std::path::PathBuf;
use std::sync::Arc;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// Which API server, and as whom.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A kubeconfig file; without, the pod's service account, or `KUBECONFIG` and `~/.kube/config` outside of pods.
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig; its current one if absent.
    pub context: Option<String>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be read, or names no such context.
    #[error("the kubeconfig cannot be used")]
    Kubeconfig(#[source] kube::config::KubeconfigError),
    /// There is neither a kubeconfig nor a service account.
    #[error("there is neither a kubeconfig nor a pod's service account")]
    Infer(#[source] Box<kube::config::InferConfigError>),
    /// TLS or authentication cannot be set up.
    #[error("a client of the API server cannot be made")]
    Client(#[source] Box<kube::Error>),
}

/// An API server. Cheap to clone; nothing is sent before something is asked.
#[derive(Clone)]
pub struct Cluster {
    pub(crate) client: Client,
    observer: Option<Arc<Observer>>,
}

type Observer = dyn Fn(&Notice<'_>) + Send + Sync;

/// Something between us and the API server that somebody may count.
#[derive(Clone, Copy, Debug)]
pub enum Notice<'a> {
    /// A list or a watch ended with an error.
    WatchFailed,
    /// The webhooks of a MutatingWebhookConfiguration were to be given our roots. The error is Kubernetes' reason.
    InjectorWritten { object: &'a str, result: Result<(), &'a str> },
    /// A MutatingWebhookConfiguration of our revision has no webhook for injection.
    InjectorLacksWebhook { object: &'a str },
    /// The webhooks of a ValidatingWebhookConfiguration were to be given our roots. The error is Kubernetes' reason.
    ValidatorWritten { result: Result<(), &'a str> },
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").finish_non_exhaustive()
    }
}

impl Cluster {
    /// Reads the configuration; the server need not be there yet.
    ///
    /// # Errors
    /// When the configuration cannot be read or used.
    pub async fn connect(options: &Options) -> Result<Cluster, ConnectError> {
        let selected = KubeConfigOptions { context: options.context.clone(), ..KubeConfigOptions::default() };
        let mut config = match &options.kubeconfig {
            Some(path) => {
                let kubeconfig = Kubeconfig::read_from(path).map_err(ConnectError::Kubeconfig)?;
                Config::from_custom_kubeconfig(kubeconfig, &selected).await.map_err(ConnectError::Kubeconfig)?
            }
            None if options.context.is_some() => {
                Config::from_kubeconfig(&selected).await.map_err(ConnectError::Kubeconfig)?
            }
            None => Config::infer().await.map_err(|error| ConnectError::Infer(Box::new(error)))?,
        };
        // Watches are silent for minutes; their own timeout says when one is dead.
        config.read_timeout = None;
        let client = Client::try_from(config).map_err(|error| ConnectError::Client(Box::new(error)))?;
        Ok(Cluster { client, observer: None })
    }

    /// The same server; `observer` hears what this one and its clones do from now on.
    pub fn observed(self, observer: impl Fn(&Notice<'_>) + Send + Sync + 'static) -> Cluster {
        Cluster { observer: Some(Arc::new(observer)), ..self }
    }

    pub(crate) fn notice(&self, notice: &Notice<'_>) {
        if let Some(observer) = &self.observer {
            observer(notice);
        }
    }
}
