//! A pod's volumes as folders below the state folder, and where its containers mount them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{
    Container, DownwardAPIVolumeFile, KeyToPath, ServiceAccountTokenProjection, Volume, VolumeProjection,
};

use super::facts::{Data, Facts};
use super::{env, security};
use crate::container::Mount;

/// Default life of a projected token (core/v1 `ServiceAccountTokenProjection.expirationSeconds`).
const TOKEN_TTL: Duration = Duration::from_secs(3600);
/// Least life the API server accepts.
const TOKEN_TTL_MIN: Duration = Duration::from_secs(600);

/// Signs service account tokens.
pub(crate) trait Tokens: Send + Sync {
    /// A token of the pod's service account for `audience`.
    fn issue(&self, pod: &Facts, audience: &str, ttl: Duration) -> Result<String, String>;
}

/// The volumes of one pod.
pub(crate) struct Volumes {
    /// `…/pods/UID/volumes`; claims live beside all pods.
    folder: PathBuf,
    claims: PathBuf,
    tokens: Arc<dyn Tokens>,
    places: HashMap<String, PathBuf>,
}

struct File {
    path: String,
    content: Vec<u8>,
    mode: u32,
}

impl Volumes {
    pub(crate) fn new(pod_folder: &Path, claims: &Path, tokens: Arc<dyn Tokens>) -> Self {
        Self { folder: pod_folder.join("volumes"), claims: claims.to_owned(), tokens, places: HashMap::new() }
    }

    /// Makes all volumes, or brings the content of those that reflect something up to date. Returns the shortest time after which a
    /// token needs renewal.
    pub(crate) fn write(&mut self, facts: &Facts, data: &Data) -> Result<Option<Duration>, String> {
        let mut renewal: Option<Duration> = None;
        let volumes = facts.pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
        for volume in volumes.into_iter().flatten() {
            let place = self
                .one(volume, facts, data, &mut renewal)
                .map_err(|error| format!("volume {}: {error}", volume.name))?;
            self.places.insert(volume.name.clone(), place);
        }
        Ok(renewal)
    }

    fn one(
        &self,
        volume: &Volume,
        facts: &Facts,
        data: &Data,
        renewal: &mut Option<Duration>,
    ) -> Result<PathBuf, String> {
        let place = self.folder.join(&volume.name);
        // The API server makes a volume without a source an emptyDir; Istio's template has such.
        let sourceless = *volume == Volume { name: volume.name.clone(), ..Volume::default() };
        let files = if volume.empty_dir.is_some() || volume.ephemeral.is_some() || sourceless {
            return writable_folder(&place, facts);
        } else if let Some(claim) = &volume.persistent_volume_claim {
            return writable_folder(&self.claims.join(facts.namespace()).join(&claim.claim_name), facts);
        } else if let Some(host) = &volume.host_path {
            let path = PathBuf::from(&host.path);
            return if path.exists() {
                Ok(path)
            } else if host.type_.as_deref().is_some_and(|kind| kind.ends_with("OrCreate")) {
                // DIFFERS: Kubernetes makes the missing path on the host; here the host's files stay untouched.
                writable_folder(&place, facts)
            } else {
                Err(format!("hostPath {} does not exist", host.path))
            };
        } else if let Some(source) = &volume.config_map {
            let values = data.config_maps.get(&(facts.namespace().to_owned(), source.name.clone()));
            selected("configmap", &source.name, values, source.items.as_deref(), source.optional, source.default_mode)?
        } else if let Some(source) = &volume.secret {
            let name = source.secret_name.clone().unwrap_or_default();
            let values = data.secrets.get(&(facts.namespace().to_owned(), name.clone()));
            selected("secret", &name, values, source.items.as_deref(), source.optional, source.default_mode)?
        } else if let Some(source) = &volume.downward_api {
            downward(source.items.as_deref().unwrap_or_default(), facts, source.default_mode)?
        } else if let Some(source) = &volume.projected {
            let mut files = Vec::new();
            for projection in source.sources.iter().flatten() {
                files.extend(self.projection(projection, facts, data, source.default_mode, renewal)?);
            }
            files
        } else if serde_json::to_value(volume)
            .is_ok_and(|value| value.as_object().is_some_and(|fields| fields.len() <= 1))
        {
            // As the API server's defaults: a volume that says nothing but its name is an emptyDir.
            return writable_folder(&place, facts);
        } else {
            return Err("this kind of volume is not supported on one machine".to_owned());
        };
        write_files(&place, &files, security::fs_group(&facts.pod))?;
        Ok(place)
    }

    fn projection(
        &self,
        projection: &VolumeProjection,
        facts: &Facts,
        data: &Data,
        mode: Option<i32>,
        renewal: &mut Option<Duration>,
    ) -> Result<Vec<File>, String> {
        if let Some(source) = &projection.config_map {
            let values = data.config_maps.get(&(facts.namespace().to_owned(), source.name.clone()));
            selected("configmap", &source.name, values, source.items.as_deref(), source.optional, mode)
        } else if let Some(source) = &projection.secret {
            let values = data.secrets.get(&(facts.namespace().to_owned(), source.name.clone()));
            selected("secret", &source.name, values, source.items.as_deref(), source.optional, mode)
        } else if let Some(source) = &projection.downward_api {
            downward(source.items.as_deref().unwrap_or_default(), facts, mode)
        } else if let Some(source) = &projection.service_account_token {
            let (file, ttl) = self.token(source, facts, mode)?;
            // As kubelet: renewed at 80 % of its life.
            let due = ttl.mul_f64(0.8);
            *renewal = Some(renewal.map_or(due, |other| other.min(due)));
            Ok(vec![file])
        } else {
            Err("this kind of projection is not supported on one machine".to_owned())
        }
    }

    fn token(
        &self,
        source: &ServiceAccountTokenProjection,
        facts: &Facts,
        mode: Option<i32>,
    ) -> Result<(File, Duration), String> {
        let ttl = source
            .expiration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map_or(TOKEN_TTL, Duration::from_secs)
            .max(TOKEN_TTL_MIN);
        let audience = source.audience.as_deref().unwrap_or("https://kubernetes.default.svc.cluster.local");
        let token = self.tokens.issue(facts, audience, ttl)?;
        // The folders above are root's alone, so the mode only concerns users inside the pod (kubelet: 0600 with the owner's uid when
        // all containers share one, else 0644).
        Ok((File { path: source.path.clone(), content: token.into_bytes(), mode: file_mode(mode, 0o644) }, ttl))
    }

    /// The mounts of one container, parents before children.
    pub(crate) fn mounts(&self, container: &Container, env: &[(String, String)]) -> Result<Vec<Mount>, String> {
        let mut mounts = Vec::new();
        for mount in container.volume_mounts.iter().flatten() {
            let source = self.places.get(&mount.name).ok_or_else(|| {
                format!("container {} mounts volume {:?}, which the pod does not have", container.name, mount.name)
            })?;
            let sub_path = match (&mount.sub_path, &mount.sub_path_expr) {
                (Some(path), _) if !path.is_empty() => Some(path.clone()),
                (_, Some(expression)) if !expression.is_empty() => {
                    env::expand_all(std::slice::from_ref(expression), env).into_iter().next()
                }
                _ => None,
            };
            if let Some(sub) = &sub_path {
                make_sub_path(source, sub)?;
            }
            mounts.push(Mount {
                source: source.clone(),
                sub_path,
                target: mount.mount_path.clone(),
                read_only: mount.read_only == Some(true),
            });
        }
        mounts.sort_by_key(|mount| Path::new(&mount.target).components().count());
        Ok(mounts)
    }
}

/// Kubelet makes a missing `subPath` folder. Plain names only: the volume's content is the containers', who may have put links there.
fn make_sub_path(source: &Path, sub: &str) -> Result<(), String> {
    let mut path = source.to_owned();
    for part in Path::new(sub).components() {
        let std::path::Component::Normal(name) = part else {
            return Err(format!("subPath {sub:?} must stay inside the volume"));
        };
        path.push(name);
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.file_type().is_symlink() => return Ok(()),
            Ok(_) => {}
            Err(_) => {
                fs::create_dir(&path).map_err(|error| format!("subPath {sub:?}: {error}"))?;
                let _ = fs::set_permissions(&path, fs::Permissions::from_mode(0o777));
            }
        }
    }
    Ok(())
}

fn writable_folder(place: &Path, facts: &Facts) -> Result<PathBuf, String> {
    if !place.exists() {
        fs::create_dir_all(place).map_err(|error| error.to_string())?;
        let group = security::fs_group(&facts.pod);
        if let Some(group) = group {
            chown(place, None, Some(group)).map_err(|error| format!("give it to fsGroup {group}: {error}"))?;
        }
        let mode = if group.is_some() { 0o2777 } else { 0o777 };
        fs::set_permissions(place, fs::Permissions::from_mode(mode)).map_err(|error| error.to_string())?;
    }
    Ok(place.to_owned())
}

fn file_mode(mode: Option<i32>, default: u32) -> u32 {
    mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(default) & 0o777
}

fn selected(
    kind: &str,
    name: &str,
    values: Option<&Arc<BTreeMap<String, Vec<u8>>>>,
    items: Option<&[KeyToPath]>,
    optional: Option<bool>,
    mode: Option<i32>,
) -> Result<Vec<File>, String> {
    let optional = optional == Some(true);
    let Some(values) = values else {
        return if optional { Ok(Vec::new()) } else { Err(format!("{kind} {name:?} not found")) };
    };
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        return Ok(values
            .iter()
            .map(|(key, value)| File { path: key.clone(), content: value.clone(), mode: file_mode(mode, 0o644) })
            .collect());
    };
    let mut files = Vec::new();
    for item in items {
        match values.get(&item.key) {
            Some(value) => {
                files.push(File {
                    path: item.path.clone(),
                    content: value.clone(),
                    mode: file_mode(item.mode.or(mode), 0o644),
                });
            }
            None if optional => {}
            None => return Err(format!("{kind} {name:?} has no key {:?}", item.key)),
        }
    }
    Ok(files)
}

fn downward(items: &[DownwardAPIVolumeFile], facts: &Facts, mode: Option<i32>) -> Result<Vec<File>, String> {
    let first = facts.pod.spec.as_ref().and_then(|spec| spec.containers.first());
    items
        .iter()
        .map(|item| {
            let value = if let Some(field) = &item.field_ref {
                facts.field(field).ok_or_else(|| format!("fieldPath {:?} is not supported", field.field_path))?
            } else if let (Some(resource), Some(container)) = (&item.resource_field_ref, first) {
                facts
                    .resource(container, resource)
                    .ok_or_else(|| format!("resource {:?} is not supported", resource.resource))?
            } else {
                return Err(format!("item {:?} refers to nothing", item.path));
            };
            Ok(File {
                path: item.path.clone(),
                content: value.into_bytes(),
                mode: file_mode(item.mode.or(mode), 0o644),
            })
        })
        .collect()
}

/// Writes files into a volume, each replaced in one step, so that readers see the old or the new content.
fn write_files(place: &Path, files: &[File], group: Option<u32>) -> Result<(), String> {
    fs::create_dir_all(place).map_err(|error| error.to_string())?;
    for file in files {
        let inside = Path::new(&file.path);
        if inside.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
            return Err(format!("path {:?} must stay inside the volume", file.path));
        }
        let target = place.join(inside);
        let failed = |error: std::io::Error| format!("write {:?}: {error}", file.path);
        if fs::read(&target).is_ok_and(|old| old == file.content) {
            continue;
        }
        let folder = target.parent().unwrap_or(place);
        fs::create_dir_all(folder).map_err(failed)?;
        let temporary = folder.join(format!("..new-{}", inside.file_name().unwrap_or_default().to_string_lossy()));
        let _ = fs::remove_file(&temporary);
        let mut out =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(failed)?;
        out.write_all(&file.content).map_err(failed)?;
        if let Some(group) = group {
            chown(&temporary, None, Some(group)).map_err(failed)?;
        }
        out.set_permissions(fs::Permissions::from_mode(file.mode | if group.is_some() { 0o040 } else { 0 }))
            .map_err(failed)?;
        fs::rename(&temporary, &target).map_err(failed)?;
    }
    Ok(())
}
