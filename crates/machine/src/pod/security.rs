//! Who a container runs as: `securityContext` of pod and container put together.

use k8s_openapi::api::core::v1::{Container, Pod, PodSecurityContext};

use crate::container::credentials::{self, Credentials};

/// The user of containers that must not be root and name no user. (In a cluster their image does.)
const NOBODY_SPECIAL: u32 = 1000;

/// User and group of a container. Without any statement it is root, like an image without `USER`.
pub(crate) fn user(pod: &Pod, container: &Container) -> (u32, u32) {
    let outer = pod_context(pod);
    let inner = container.security_context.as_ref();
    let number = |inner: Option<i64>, outer: Option<i64>| inner.or(outer).and_then(|id| u32::try_from(id).ok());
    let non_root = inner.and_then(|c| c.run_as_non_root).or(outer.and_then(|c| c.run_as_non_root)) == Some(true);
    let uid = number(inner.and_then(|c| c.run_as_user), outer.and_then(|c| c.run_as_user)).unwrap_or(if non_root {
        NOBODY_SPECIAL
    } else {
        0
    });
    let gid = number(inner.and_then(|c| c.run_as_group), outer.and_then(|c| c.run_as_group)).unwrap_or(if non_root {
        NOBODY_SPECIAL
    } else {
        0
    });
    (uid, gid)
}

/// `fsGroup` of the pod: the group that owns its volumes.
pub(crate) fn fs_group(pod: &Pod) -> Option<u32> {
    pod_context(pod).and_then(|context| context.fs_group).and_then(|id| u32::try_from(id).ok())
}

/// `privileged: true`.
pub(crate) fn privileged(container: &Container) -> bool {
    container.security_context.as_ref().and_then(|context| context.privileged) == Some(true)
}

/// The rights of a container's process; an error is a sentence for `CreateContainerConfigError`.
pub(crate) fn credentials(pod: &Pod, container: &Container) -> Result<Credentials, String> {
    let (uid, gid) = user(pod, container);
    let inner = container.security_context.as_ref();
    let outer = pod_context(pod);
    let non_root = inner.and_then(|c| c.run_as_non_root).or(outer.and_then(|c| c.run_as_non_root)) == Some(true);
    if non_root && uid == 0 {
        return Err(format!("container {} has runAsNonRoot and would run as root", container.name));
    }
    let mut groups: Vec<u32> = outer
        .into_iter()
        .flat_map(|context| context.supplemental_groups.iter().flatten().copied().chain(context.fs_group))
        .filter_map(|id| u32::try_from(id).ok())
        .filter(|group| *group != gid)
        .collect();
    groups.sort_unstable();
    groups.dedup();
    let listed = inner.and_then(|context| context.capabilities.as_ref());
    let capabilities = if privileged(container) {
        credentials::ALL
    } else {
        let add = listed.and_then(|c| c.add.as_deref()).unwrap_or_default();
        let drop = listed.and_then(|c| c.drop.as_deref()).unwrap_or_default();
        let (set, unknown) = credentials::capability_set(add, drop);
        if let Some(name) = unknown.first() {
            return Err(format!("container {}: unknown capability {name:?}", container.name));
        }
        set
    };
    let no_new_privileges = inner.and_then(|context| context.allow_privilege_escalation) == Some(false);
    Ok(Credentials { uid, gid, groups, capabilities, no_new_privileges })
}

fn pod_context(pod: &Pod) -> Option<&PodSecurityContext> {
    pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref())
}
