use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use mesh_types::ArcStr;

use crate::address::Address;
use crate::metadata::Metadata;
use crate::pb;
use crate::tlv::AddedTlv;

/// One host of a cluster. Immutable but for its [`HostState`].
#[derive(Debug)]
pub struct Host {
    /// Where it is.
    pub address: Address,
    /// Its further addresses (the other family).
    pub additional_addresses: Vec<Address>,
    /// Its name, if it has one.
    pub hostname: ArcStr,
    /// Its metadata.
    pub metadata: Arc<Metadata>,
    /// Its locality's metadata.
    pub locality_metadata: Option<Arc<Metadata>>,
    /// What PROXY headers tell it besides.
    pub tlvs: Arc<[AddedTlv]>,
    /// Its share.
    pub weight: u32,
    /// Where it stands.
    pub locality: Arc<Locality>,
    /// Its priority, 0 is the most wanted.
    pub priority: u32,
    /// Where active health checks go.
    pub health_check: HealthCheckTarget,
    /// What the control plane says of its health (`HealthStatus`).
    pub(super) said: i32,
    /// What changes; survives updates of the host.
    pub state: Arc<HostState>,
}

impl Host {
    /// A host that stands in no assignment: an original destination or a resolved name. It is in use.
    pub fn made(address: Address, hostname: ArcStr, epoch: &Arc<AtomicU64>) -> Self {
        Self {
            health_check: HealthCheckTarget { address: Some(address.clone()), ..HealthCheckTarget::default() },
            address,
            additional_addresses: Vec::new(),
            hostname,
            metadata: Arc::default(),
            locality_metadata: None,
            tlvs: Arc::default(),
            weight: 1,
            locality: Arc::default(),
            priority: 0,
            said: 0,
            state: Arc::new(HostState::new(Arc::clone(epoch), &[])),
        }
    }

    pub(super) fn same_as(&self, other: &Host) -> bool {
        self.weight == other.weight
            && self.priority == other.priority
            && self.said == other.said
            && self.additional_addresses == other.additional_addresses
            && self.metadata == other.metadata
            && self.locality_metadata == other.locality_metadata
            && self.health_check == other.health_check
            && Arc::ptr_eq(&self.state, &other.state)
    }

    /// Whether the one is still the other, with its connections and all that was found out about it, whatever else is
    /// said of it now. `checked`: the cluster has active checks (Envoy `BaseDynamicClusterImpl::updateDynamicHostList`).
    pub(super) fn is_still(&self, old: &Host, checked: bool) -> bool {
        self.address == old.address
            && self.hostname == old.hostname
            && self.locality == old.locality
            && (!checked || self.health_check == old.health_check)
    }

    /// Whether it may get traffic.
    pub fn health(&self) -> Health {
        self.state.health()
    }

    /// How it is, as the number of a `HealthStatus` (Envoy `HostImplBase::healthStatus`): what active checks and outlier
    /// detection find bad before what the control plane says, and that before what checks call degraded.
    pub fn status(&self) -> u32 {
        use pb::core::HealthStatus as Status;
        let has = |flag| self.state.has(flag);
        let said = Status::try_from(self.said).unwrap_or(Status::Unknown);
        let status = match said {
            _ if has(HealthFlag::FailedActive) && has(HealthFlag::ActiveTimeout) => Status::Timeout,
            _ if has(HealthFlag::FailedActive) || has(HealthFlag::FailedOutlier) => Status::Unhealthy,
            Status::Unhealthy | Status::Draining | Status::Timeout => said,
            _ if has(HealthFlag::DegradedActive) || has(HealthFlag::DegradedOutlier) => Status::Degraded,
            _ => said,
        };
        status as u32
    }

    /// Whether its metadata calls it a canary.
    pub fn is_canary(&self) -> bool {
        self.metadata.get("envoy.lb", &["canary"]).and_then(serde_json::Value::as_bool).unwrap_or(false)
    }
}

/// Where a host is checked.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct HealthCheckTarget {
    /// Its address, or one of its own; `None`: it is not checked.
    pub address: Option<Address>,
    /// Host header of checks.
    pub hostname: ArcStr,
}

impl HealthCheckTarget {
    pub(super) fn compile(config: Option<&pb::endpoint::endpoint::HealthCheckConfig>, address: &Address) -> Self {
        let Some(config) = config else {
            return Self { address: Some(address.clone()), hostname: "".into() };
        };
        if config.disable_active_health_check {
            return Self::default();
        }
        let mut target =
            config.address.as_ref().and_then(|a| Address::compile(Some(a)).ok()).unwrap_or_else(|| address.clone());
        if let (Address::Ip(socket), Ok(port @ 1..)) = (&mut target, u16::try_from(config.port_value)) {
            socket.set_port(port);
        }
        Self { address: Some(target), hostname: config.hostname.as_str().into() }
    }
}

/// Region, zone and sub-zone; any may be empty.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Locality {
    /// Region.
    pub region: ArcStr,
    /// Zone.
    pub zone: ArcStr,
    /// Sub-zone.
    pub sub_zone: ArcStr,
}

impl fmt::Display for Locality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.region)?;
        for part in [&self.zone, &self.sub_zone] {
            if !part.is_empty() {
                write!(f, "/{part}")?;
            }
        }
        Ok(())
    }
}

/// Whether a host may get traffic.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Health {
    /// Yes.
    Healthy,
    /// If there are too few healthy ones.
    Degraded,
    /// Only in panic.
    Unhealthy,
}

/// A reason why a host is not healthy.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum HealthFlag {
    /// Active checks fail.
    FailedActive = 1,
    /// Outlier detection ejected it.
    FailedOutlier = 2,
    /// The control plane says so.
    EdsUnhealthy = 4,
    /// Active checks say degraded.
    DegradedActive = 8,
    /// The control plane says degraded.
    EdsDegraded = 16,
    /// It is in the configuration no more, but still passes active checks.
    PendingRemoval = 32,
    /// It waits for its first active check, and does not count before.
    PendingActive = 64,
    /// It said itself that it fails (`x-envoy-immediate-health-check-fail`), and does not count.
    Excluded = 128,
    /// Its last active check had no answer in time.
    ActiveTimeout = 256,
    /// The control plane lets it drain.
    EdsDraining = 512,
    /// It called itself degraded in an answer to a request.
    DegradedOutlier = 1024,
}

/// Names of the flags as `/clusters` prints them.
pub(crate) const FLAG_NAMES: [(HealthFlag, &str); 11] = [
    (HealthFlag::FailedActive, "/failed_active_hc"),
    (HealthFlag::FailedOutlier, "/failed_outlier_check"),
    (HealthFlag::EdsUnhealthy, "/failed_eds_health"),
    (HealthFlag::DegradedActive, "/degraded_active_hc"),
    (HealthFlag::EdsDegraded, "/degraded_eds_health"),
    (HealthFlag::PendingRemoval, "/pending_dynamic_removal"),
    (HealthFlag::PendingActive, "/pending_active_hc"),
    (HealthFlag::Excluded, "/excluded_via_immediate_hc_fail"),
    (HealthFlag::ActiveTimeout, "/active_hc_timeout"),
    (HealthFlag::EdsDraining, "/eds_status_draining"),
    (HealthFlag::DegradedOutlier, "/degraded_outlier_detection"),
];

/// What changes about a host. Shared by all workers; single counters, no invariant between them.
#[derive(Debug)]
pub struct HostState {
    flags: AtomicU32,
    /// How many times it was found to fail; connections from before the last time are not used again.
    failures: AtomicU32,
    /// How many answers to requests said that it fails.
    own_words: AtomicU32,
    checked: AtomicBool,
    epoch: Arc<AtomicU64>,
    /// Requests under way (connections, for TCP). The least request balancer reads it.
    pub active: AtomicU32,
    /// For `/clusters` and statistics.
    pub stats: HostStats,
    /// For outlier detection.
    pub outlier: OutlierCounters,
    first_seen: OnceLock<Instant>,
    /// Of hosts that are made as connections need them.
    usage: AtomicU8,
}

/// Nobody chose a made host since that was last looked for; it may go.
const IDLE: u8 = 1;
/// It went, and is chosen no more.
const GONE: u8 = 2;

/// A host's counters, named as Envoy's.
#[derive(Debug, Default)]
pub struct HostStats {
    /// Connections open.
    pub cx_active: AtomicU64,
    /// Connections that could not be made.
    pub cx_connect_fail: AtomicU64,
    /// Connections made.
    pub cx_total: AtomicU64,
    /// Requests answered with 5xx, or not.
    pub rq_error: AtomicU64,
    /// Requests that wait for a connection.
    pub rq_pending_active: AtomicU64,
    /// Requests answered with another status.
    pub rq_success: AtomicU64,
    /// Requests that took too long.
    pub rq_timeout: AtomicU64,
    /// Requests.
    pub rq_total: AtomicU64,
}

impl HostStats {
    /// Counts a request that is over.
    pub fn count(&self, success: bool) {
        let counter = if success { &self.rq_success } else { &self.rq_error };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// What outlier detection counts on every result. See `outlier`.
#[derive(Debug, Default)]
pub struct OutlierCounters {
    pub(crate) consecutive_5xx: AtomicU32,
    pub(crate) consecutive_gateway: AtomicU32,
    pub(crate) consecutive_local: AtomicU32,
    pub(crate) window_success: AtomicU32,
    pub(crate) window_total: AtomicU32,
    pub(crate) window_local_success: AtomicU32,
    pub(crate) window_local_total: AtomicU32,
    /// Success rates of the last interval, as bits; zero: there was too little traffic.
    rates: [AtomicU64; 2],
}

impl OutlierCounters {
    /// The rate is stored as one more than it is, so that none is zero.
    pub(crate) fn set_rate(&self, local: bool, percent: Option<f64>) {
        self.rates[usize::from(local)].store(percent.map_or(0, |rate| (rate + 1.0).to_bits()), Ordering::Relaxed);
    }

    /// The success rate of the last interval in percent: of answers, or (`local`) of what the host took at all.
    pub fn rate(&self, local: bool) -> Option<f64> {
        match self.rates[usize::from(local)].load(Ordering::Relaxed) {
            0 => None,
            bits => Some(f64::from_bits(bits) - 1.0),
        }
    }
}

impl Default for HostState {
    fn default() -> Self {
        Self::new(Arc::default(), &[])
    }
}

impl HostState {
    /// What stands for a host that is another one now: only what active checks found holds for it, too.
    pub(super) fn succeeding(old: &Self, epoch: Arc<AtomicU64>) -> Self {
        const ACTIVE: u32 = HealthFlag::FailedActive as u32
            | HealthFlag::DegradedActive as u32
            | HealthFlag::PendingActive as u32
            | HealthFlag::ActiveTimeout as u32;
        let new = Self::new(epoch, &[]);
        new.flags.store(old.flags.load(Ordering::Relaxed) & ACTIVE, Ordering::Relaxed);
        new
    }

    /// With these flags.
    pub(super) fn new(epoch: Arc<AtomicU64>, flags: &[HealthFlag]) -> Self {
        Self {
            flags: AtomicU32::new(flags.iter().fold(0, |all, flag| all | *flag as u32)),
            failures: AtomicU32::new(0),
            own_words: AtomicU32::new(0),
            checked: AtomicBool::new(false),
            epoch,
            active: AtomicU32::new(0),
            stats: HostStats::default(),
            outlier: OutlierCounters::default(),
            first_seen: OnceLock::new(),
            usage: AtomicU8::new(0),
        }
    }

    /// Chooses a made host. False: it is gone, and there must be another one for its address.
    pub fn choose(&self) -> bool {
        match self.usage.load(Ordering::Relaxed) {
            0 => true,
            // Whoever looks after hosts may be about to let this one go.
            IDLE => self.usage.compare_exchange(IDLE, 0, Ordering::Relaxed, Ordering::Relaxed) != Err(GONE),
            _ => false,
        }
    }

    /// Looks whether a made host was chosen since the last time. True: it was not, and it is gone now unless it is
    /// `held` by connections (Envoy `OriginalDstCluster::cleanup`).
    pub fn lapses(&self, held: impl FnOnce(&Self) -> bool) -> bool {
        if self.usage.compare_exchange(0, IDLE, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return false;
        }
        !held(self) && self.usage.compare_exchange(IDLE, GONE, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Whether a made host has not gone.
    pub fn is_there(&self) -> bool {
        self.usage.load(Ordering::Relaxed) != GONE
    }

    /// A made host goes, whoever uses it.
    pub fn leave(&self) {
        self.usage.store(GONE, Ordering::Relaxed);
    }

    /// Sets or clears a flag; says whether that changed anything.
    pub fn set(&self, flag: HealthFlag, on: bool) -> bool {
        let bit = flag as u32;
        let old = if on {
            self.flags.fetch_or(bit, Ordering::Relaxed)
        } else {
            self.flags.fetch_and(!bit, Ordering::Relaxed)
        };
        let changed = (old & bit != 0) != on;
        if changed && on && matches!(flag, HealthFlag::FailedActive | HealthFlag::FailedOutlier) {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
        if changed {
            // Balancers look at this number before each choice and sort their hosts anew when it moved.
            self.epoch.fetch_add(1, Ordering::Release);
        }
        changed
    }

    /// An answer to a request says that the host fails (Envoy `HealthCheckHostMonitorImpl::setUnhealthy`): for hosts with
    /// active checks only. Says whether it counted.
    pub fn on_own_word(&self) -> bool {
        if !self.checked.load(Ordering::Relaxed) {
            return false;
        }
        self.own_words.fetch_add(1, Ordering::Relaxed);
        self.set(HealthFlag::Excluded, true);
        self.set(HealthFlag::FailedActive, true);
        true
    }

    /// How many answers to requests said that it fails.
    pub fn own_words(&self) -> u32 {
        self.own_words.load(Ordering::Relaxed)
    }

    pub(crate) fn set_checked(&self) {
        self.checked.store(true, Ordering::Relaxed);
    }

    /// Whether an active check of it ever ended.
    pub fn was_checked(&self) -> bool {
        self.checked.load(Ordering::Relaxed)
    }

    /// How many times active checks or outlier detection found that it fails.
    pub fn failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Whether it is left out where hosts are counted (Envoy `HostSet::excludedHosts`).
    pub fn is_excluded(&self) -> bool {
        [HealthFlag::PendingActive, HealthFlag::Excluded, HealthFlag::EdsDraining]
            .into_iter()
            .any(|flag| self.has(flag))
    }

    /// Whether a flag is set.
    pub fn has(&self, flag: HealthFlag) -> bool {
        self.flags.load(Ordering::Relaxed) & flag as u32 != 0
    }

    /// The flags together (Envoy `HostImplBase::coarseHealth`).
    pub fn health(&self) -> Health {
        let flags = self.flags.load(Ordering::Relaxed);
        let unhealthy = HealthFlag::FailedActive as u32
            | HealthFlag::FailedOutlier as u32
            | HealthFlag::EdsUnhealthy as u32
            | HealthFlag::EdsDraining as u32;
        let degraded =
            HealthFlag::DegradedActive as u32 | HealthFlag::EdsDegraded as u32 | HealthFlag::DegradedOutlier as u32;
        match flags {
            flags if flags & unhealthy != 0 => Health::Unhealthy,
            flags if flags & degraded != 0 => Health::Degraded,
            _ => Health::Healthy,
        }
    }

    /// As `/clusters` prints it: `healthy`, or the flags.
    pub fn describe(&self) -> String {
        let flags: String = FLAG_NAMES.iter().filter(|(flag, _)| self.has(*flag)).map(|(_, name)| *name).collect();
        if flags.is_empty() { "healthy".to_owned() } else { flags }
    }

    /// When a balancer first saw it; for slow start.
    pub(crate) fn since(&self, now: Instant) -> Instant {
        *self.first_seen.get_or_init(|| now)
    }
}
