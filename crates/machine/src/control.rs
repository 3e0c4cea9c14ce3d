//! The control socket of a running mesh: one JSON request per connection, one JSON answer.
//!
//! The socket is in a folder of mode 0700 and has mode 0600 itself: whoever may connect may do anything the mesh's owner may.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{oneshot, watch};

use crate::cluster::Remote;
use crate::cluster::command::{Command, Found, PodRow, Report};
use crate::load;
use crate::objects::id_of;
use crate::plane::{Rotation, SyncWatch};

/// Manifests of a large mesh, with room to spare.
const REQUEST_MAX: u64 = 64 << 20;

/// The longest that a rotation of the root waits, in seconds.
const SETTLE_MAX: u64 = 3600;

/// What a client asks.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Apply {
        files: Vec<TextFile>,
        /// Of objects that name none.
        namespace: Option<String>,
        dry_run: bool,
    },
    Delete {
        files: Vec<TextFile>,
        /// Kind, namespace and name.
        objects: Vec<(String, String, String)>,
        /// Of objects in files that name none.
        namespace: Option<String>,
        ignore_missing: bool,
    },
    Ps,
    Find {
        pod: String,
        namespace: Option<String>,
        container: Option<String>,
    },
    RunCron {
        name: String,
        namespace: String,
    },
    /// Waits until all sidecars have accepted a revision of the control plane.
    Wait {
        revision: u64,
        seconds: u64,
    },
    /// Replaces the CA's root; `settle` is how long the sidecars have to take notice of the new one.
    RotateRoot {
        settle: u64,
    },
    /// What a machine outside needs to join as a workload of a WorkloadGroup.
    Workload {
        namespace: String,
        group: String,
    },
    /// How far an object's last change got, or all of them: the revision that holds it, and each sidecar's.
    Distribution {
        object: Option<(String, String, String)>,
    },
    /// Everything that its control plane was told: what was applied, with addresses, and the pods and endpoints made of it.
    Objects,
    Info,
    Down,
}

/// A manifest as the client read it, so that relative paths and `-` mean what they mean there.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TextFile {
    pub(crate) path: PathBuf,
    pub(crate) text: String,
}

/// What it gets.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Response {
    Done(Report, Vec<String>),
    Pods(Vec<PodRow>),
    Found(Box<Found>),
    Text(String),
    /// Names and texts.
    Files(std::collections::BTreeMap<String, String>),
    Info(Info),
    Distribution(crate::ask::Distribution),
    Objects(crate::ask::Objects),
    /// Sentences; nothing was changed.
    Refused(Vec<String>),
}

/// About the mesh as a whole.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Info {
    pub(crate) pid: u32,
    /// All pods were ready once, or the time for it is over.
    pub(crate) settled: bool,
    pub(crate) urls: Vec<String>,
    /// Addresses that agents and metrics are asked at, by pod.
    pub(crate) revision: u64,
}

/// Binds the socket.
pub(crate) fn bind(path: &std::path::Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves clients until dropped. `down` is set when one asks for the end.
pub(crate) async fn serve(
    listener: UnixListener,
    remote: Remote,
    sync: SyncWatch,
    info: watch::Receiver<Info>,
    down: watch::Sender<bool>,
) -> std::convert::Infallible {
    let mut clients = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    let (remote, sync, info, down) = (remote.clone(), sync.clone(), info.clone(), down.clone());
                    clients.spawn(async move {
                        if let Err(error) = client(stream, &remote, &sync, &info, &down).await {
                            tracing::debug!(%error, "control client");
                        }
                    });
                } else {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            Some(_) = clients.join_next() => {}
        }
    }
}

async fn client(
    mut stream: UnixStream,
    remote: &Remote,
    sync: &SyncWatch,
    info: &watch::Receiver<Info>,
    down: &watch::Sender<bool>,
) -> io::Result<()> {
    let mut text = Vec::new();
    (&mut stream).take(REQUEST_MAX).read_to_end(&mut text).await?;
    let response = match serde_json::from_slice(&text) {
        Ok(Request::Info) => Response::Info(info.borrow().clone()),
        Ok(Request::Down) => {
            down.send_replace(true);
            Response::Text("ending".to_owned())
        }
        Ok(Request::Wait { revision, seconds }) => match sync.wait(revision, Duration::from_secs(seconds)).await {
            Ok(count) => Response::Text(format!("all {count} proxies in sync")),
            Err(laggards) => Response::Refused(vec![laggards]),
        },
        Ok(Request::Distribution { object }) => match sync.distribution(object.as_ref()) {
            Ok(distribution) => Response::Distribution(distribution),
            Err(error) => Response::Refused(vec![error]),
        },
        Ok(request) => answer(request, remote).await.unwrap_or_else(|error| Response::Refused(vec![error])),
        Err(error) => Response::Refused(vec![format!("not understood: {error}")]),
    };
    stream.write_all(&serde_json::to_vec(&response)?).await?;
    stream.shutdown().await
}

async fn answer(request: Request, remote: &Remote) -> Result<Response, String> {
    let gone = |_| "the mesh is ending".to_owned();
    match request {
        Request::Apply { files, namespace, dry_run } => {
            let input = match parse(&files, namespace.as_deref()) {
                Ok(input) => input,
                Err(errors) => return Ok(Response::Refused(errors)),
            };
            let (reply, answer) = oneshot::channel();
            remote.send(Command::Apply { documents: input.documents, dry_run, reply }).await?;
            Ok(Response::Done(answer.await.map_err(gone)?, input.skipped))
        }
        Request::Delete { files, objects, namespace, ignore_missing } => {
            let input = match parse(&files, namespace.as_deref()) {
                Ok(input) => input,
                Err(errors) if !files.is_empty() => return Ok(Response::Refused(errors)),
                Err(_) => load::Input::default(),
            };
            let mut ids: Vec<_> = input.documents.iter().map(id_of).collect();
            ids.extend(objects.into_iter().map(|(kind, namespace, name)| crate::objects::Id { kind, namespace, name }));
            let (reply, answer) = oneshot::channel();
            remote.send(Command::Delete { ids, reply }).await?;
            let mut report = answer.await.map_err(gone)?;
            if ignore_missing {
                report.missing.clear();
            }
            Ok(Response::Done(report, input.skipped))
        }
        Request::Ps => {
            let (reply, answer) = oneshot::channel();
            remote.send(Command::Ps { reply }).await?;
            Ok(Response::Pods(answer.await.map_err(gone)?))
        }
        Request::Find { pod, namespace, container } => {
            let (reply, answer) = oneshot::channel();
            remote.send(Command::Find { pod, namespace, container, reply }).await?;
            Ok(Response::Found(Box::new(answer.await.map_err(gone)??)))
        }
        Request::RunCron { name, namespace } => {
            let (reply, answer) = oneshot::channel();
            remote.send(Command::RunCron { name, namespace, reply }).await?;
            Ok(Response::Text(answer.await.map_err(gone)??))
        }
        Request::Objects => {
            let (reply, answer) = oneshot::channel();
            remote.send(Command::Objects { reply }).await?;
            Ok(Response::Objects(answer.await.map_err(gone)?))
        }
        Request::Workload { namespace, group } => {
            let (reply, answer) = oneshot::channel();
            remote.send(Command::Workload { namespace, group, reply }).await?;
            Ok(Response::Files(answer.await.map_err(gone)??))
        }
        Request::RotateRoot { settle } => {
            for step in [Rotation::Announce, Rotation::Activate] {
                let (reply, answer) = oneshot::channel();
                remote.send(Command::RotateRoot { step, reply }).await?;
                answer.await.map_err(gone)??;
                if matches!(step, Rotation::Announce) {
                    tokio::time::sleep(Duration::from_secs(settle.min(SETTLE_MAX))).await;
                }
            }
            let text = "the new root signs; the old one is trusted until all it has signed has expired";
            Ok(Response::Text(text.to_owned()))
        }
        Request::Wait { .. } | Request::Distribution { .. } | Request::Info | Request::Down => {
            Err("not understood".to_owned())
        }
    }
}

/// All documents of the files, or all that is wrong with them. Objects without a namespace get `namespace`.
fn parse(files: &[TextFile], namespace: Option<&str>) -> Result<load::Input, Vec<String>> {
    let mut documents = Vec::new();
    let mut errors = Vec::new();
    for file in files {
        match manifest::parse(&file.path, &file.text) {
            Ok(parsed) => documents.extend(parsed),
            Err(error) => errors.push(error.to_string()),
        }
    }
    if documents.is_empty() && errors.is_empty() {
        let named: Vec<String> = files.iter().map(|file| file.path.display().to_string()).collect();
        return Err(vec![match named.is_empty() {
            true => "there are no YAML files here".to_owned(),
            false => format!("{}: there are no objects here", named.join(", ")),
        }]);
    }
    if let Some(namespace) = namespace {
        errors.extend(documents.iter_mut().filter_map(|document| put_into(document, namespace).err()));
    }
    let input = load::check_all(documents);
    errors.extend(input.errors.iter().map(ToString::to_string));
    if errors.is_empty() { Ok(input) } else { Err(errors) }
}

/// Gives a document without a namespace this one; as with kubectl, one of another namespace is refused.
fn put_into(document: &mut manifest::Document, namespace: &str) -> Result<(), String> {
    if id_of(document).namespace.is_empty() {
        return Ok(()); // a kind without namespaces
    }
    match document.namespace() {
        Some(own) if own != namespace => {
            let message = format!("is {own:?}, while --namespace says {namespace:?}");
            Err(document.error("metadata.namespace", message).to_string())
        }
        Some(_) => Ok(()),
        None => {
            if let Some(metadata) = document.value.get_mut("metadata").and_then(serde_json::Value::as_object_mut) {
                metadata.insert("namespace".to_owned(), namespace.into());
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> [TextFile; 1] {
        [TextFile { path: "x.yaml".into(), text: text.to_owned() }]
    }

    #[test]
    fn a_namespace_that_is_asked_for_is_the_objects() {
        let object = |more: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: a{more}}}\n");
        let input = parse(&file(&object("")), Some("shop")).ok().unwrap();
        assert_eq!(input.documents[0].namespace(), Some("shop"));
        let refused = parse(&file(&object(", namespace: other")), Some("shop")).err().unwrap();
        assert!(refused[0].contains("x.yaml:3") && refused[0].contains("other"), "{refused:?}");
        let namespace = parse(&file("apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n"), Some("shop"));
        assert_eq!(namespace.ok().unwrap().documents[0].namespace(), None);
    }

    #[test]
    fn files_without_objects_are_said() {
        let refused = parse(&file("# nothing\n---\n"), None).err().unwrap();
        assert_eq!(refused, ["x.yaml: there are no objects here"]);
    }
}
