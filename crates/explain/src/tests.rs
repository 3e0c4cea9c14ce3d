//! Small meshes of YAML, a request in each, and what is told of it.

mod limits;
mod lost;
mod refused;
mod unused;

use std::path::PathBuf;

use crate::mesh::Mesh;
use crate::request::Request;
use crate::text::{Paint, render};
use crate::trace::Explanation;
use crate::{Files, Sources, walk};

/// Two services: `a` with a pod, and a client; `bare` has no sidecar.
const BASE: &str = "
apiVersion: v1
kind: Service
metadata: {name: a}
spec:
  selector: {app: a}
  ports:
  - {name: http, port: 80}
  - {name: tcp-x, port: 90}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: a}
spec: {template: {metadata: {labels: {app: a, version: v1}}, spec: {serviceAccountName: a, containers: []}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: client}
spec: {template: {metadata: {labels: {app: client}}, spec: {serviceAccountName: client, containers: []}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: bare}
spec: {template: {metadata: {labels: {app: bare, sidecar.istio.io/inject: 'false'}}, spec: {containers: []}}}
";

/// What is told of a request, as people read it. Lines of `yaml` are those of `mesh.yaml`.
pub(crate) struct Told {
    pub(crate) explanation: Explanation,
    pub(crate) text: String,
}

impl Told {
    /// Each part is in the text.
    #[track_caller]
    pub(crate) fn says(&self, parts: &[&str]) -> &Self {
        for part in parts {
            assert!(self.text.contains(part), "{part:?} is not in\n{}", self.text);
        }
        self
    }

    #[track_caller]
    pub(crate) fn says_not(&self, part: &str) -> &Self {
        assert!(!self.text.contains(part), "{part:?} is in\n{}", self.text);
        self
    }

    /// The request fails, and the verdict itself has all parts.
    #[track_caller]
    pub(crate) fn fails(&self, parts: &[&str]) -> &Self {
        let outcome = &self.explanation.outcome;
        assert!(!outcome.delivered, "{}", self.text);
        for part in parts {
            assert!(outcome.summary.contains(part), "{part:?} is not the verdict of\n{}", self.text);
        }
        self
    }

    #[track_caller]
    pub(crate) fn arrives(&self) -> &Self {
        assert!(self.explanation.outcome.delivered, "{}", self.text);
        self
    }
}

/// The base and more objects, with a MeshConfig if that is not empty.
pub(crate) fn mesh(yaml: &str, mesh_config: &str) -> (tempfile::TempDir, Mesh) {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let input = vec![write("base.yaml", BASE), write("mesh.yaml", yaml)];
    let mesh_config = (!mesh_config.is_empty()).then(|| write("config.yaml", mesh_config));
    let sources = Sources { input, mesh_config, ..Sources::default() };
    let mesh = Mesh::new(Files::load(&sources, true).unwrap()).unwrap();
    (folder, mesh)
}

/// What is told of a request from a pod.
pub(crate) fn ask_of(mesh: &Mesh, from: &str, url: &str) -> Told {
    let request = Request { method: "GET".to_owned(), url: url.parse().unwrap(), headers: Vec::new(), http2: false };
    let explanation = walk::from_pod(mesh, &mesh.pod(from).unwrap(), &request, 0);
    Told { text: render(&explanation, Paint::Plain), explanation }
}

/// The same of the base and more objects.
pub(crate) fn ask(yaml: &str, from: &str, url: &str) -> Told {
    ask_of(&mesh(yaml, "").1, from, url)
}
