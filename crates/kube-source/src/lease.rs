//! Leases: of several control planes one does what only one may do.

use std::future::Future;
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};
use tracing::{debug, info, warn};

use crate::Cluster;
use crate::watch::chain;

/// How long a leader that says nothing stays one, how often it speaks, and when it stops by itself because the API server
/// does not hear it. As istiod's leader election.
const TTL: Duration = Duration::from_secs(30);
const PERIOD: Duration = Duration::from_millis(7500);
const RENEWED_WITHIN: Duration = Duration::from_secs(15);

/// What was seen of a lease, and since when it looks so: clocks of other machines prove nothing.
#[derive(Debug, Default)]
struct Seen {
    state: Option<(Option<String>, Option<MicroTime>)>,
    since: Option<Instant>,
}

impl Seen {
    /// Whether `me` may take or keep the lease.
    fn may_take(&mut self, spec: &LeaseSpec, me: &str, now: Instant) -> bool {
        let state = (spec.holder_identity.clone(), spec.renew_time.clone());
        if self.state.as_ref() != Some(&state) {
            (self.state, self.since) = (Some(state), Some(now));
        }
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let lasts = seconds.map_or(TTL, Duration::from_secs);
        holder.is_empty() || holder == me || self.since.is_some_and(|since| now.duration_since(since) >= lasts)
    }
}

impl Cluster {
    /// Does `work` whenever, and only while, the lease `name` is held by `me`, a name that nobody else has. Ends never.
    pub async fn lead<F: Future<Output = ()>>(&self, namespace: &str, name: &str, me: &str, work: impl Fn() -> F) {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), namespace);
        let mut seen = Seen::default();
        loop {
            if take(&leases, name, me, &mut seen).await {
                info!(lease = name, "leading");
                tokio::select! {
                    () = async { work().await; std::future::pending().await } => {}
                    () = keep(&leases, name, me, &mut seen) => warn!(lease = name, "no longer leading"),
                }
            }
            tokio::time::sleep(PERIOD).await;
        }
    }
}

/// Renews until that fails for too long.
async fn keep(leases: &Api<Lease>, name: &str, me: &str, seen: &mut Seen) {
    let mut renewed = Instant::now();
    while renewed.elapsed() < RENEWED_WITHIN {
        tokio::time::sleep(PERIOD).await;
        // A server that does not answer must not keep us from giving up in time.
        let left = RENEWED_WITHIN.saturating_sub(renewed.elapsed());
        if tokio::time::timeout(left, take(leases, name, me, seen)).await == Ok(true) {
            renewed = Instant::now();
        }
    }
}

/// Takes or renews the lease; false if somebody else has it, or nobody knows.
async fn take(leases: &Api<Lease>, name: &str, me: &str, seen: &mut Seen) -> bool {
    match try_take(leases, name, me, seen).await {
        Ok(held) => held,
        // Somebody was faster.
        Err(kube::Error::Api(status)) if status.code == 409 => false,
        Err(error) => {
            debug!(lease = name, error = %chain(&error), "the lease cannot be had");
            false
        }
    }
}

async fn try_take(leases: &Api<Lease>, name: &str, me: &str, seen: &mut Seen) -> Result<bool, kube::Error> {
    let now = MicroTime(Timestamp::now());
    let mut spec = LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: i32::try_from(TTL.as_secs()).ok(),
        acquire_time: Some(now.clone()),
        renew_time: Some(now),
        lease_transitions: Some(0),
        ..LeaseSpec::default()
    };
    let Some(old) = leases.get_opt(name).await? else {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        leases.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await?;
        return Ok(true);
    };
    let old_spec = old.spec.clone().unwrap_or_default();
    if !seen.may_take(&old_spec, me, Instant::now()) {
        return Ok(false);
    }
    let transitions = old_spec.lease_transitions.unwrap_or_default();
    if old_spec.holder_identity.as_deref() == Some(me) {
        (spec.acquire_time, spec.lease_transitions) = (old_spec.acquire_time, Some(transitions));
    } else {
        spec.lease_transitions = Some(transitions + 1);
    }
    // With the version that was read: of two who try at once the server takes one.
    leases.replace(name, &PostParams::default(), &Lease { spec: Some(spec), ..old }).await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_free_when_its_holder_was_silent_for_as_long_as_we_looked() {
        let start = Instant::now();
        let spec = |holder: &str, renewed: i64| LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(30),
            renew_time: Some(MicroTime(Timestamp::from_second(renewed).unwrap())),
            ..LeaseSpec::default()
        };
        let mut seen = Seen::default();
        let mut may = |spec: &LeaseSpec, after: u64| seen.may_take(spec, "me", start + Duration::from_secs(after));
        assert!(may(&spec("me", 1), 0) && may(&spec("", 1), 0) && may(&LeaseSpec::default(), 0));
        // However old the other's clock says that it is.
        assert!(!may(&spec("other", 1), 100));
        assert!(!may(&spec("other", 1), 129));
        assert!(!may(&spec("other", 2), 131), "it was renewed");
        assert!(!may(&spec("other", 2), 160));
        assert!(may(&spec("other", 2), 161));
    }
}
