//! THE HEART. Pure: no system call, no clock, no thread, no log. An event in, effects out.
//!
//! Principles that every file here keeps:
//! - *Done is read off the ledger.* An invalidation is granted when no mapping in any state overlaps it, in any
//!   domain, at any alias. There is no second bookkeeping that could disagree.
//! - *A mapping leaves the ledger only by proof*: an unmap that returned its full length with nothing in flight.
//! - *What should be mapped is derived*, never queued: shared pages, of a region, that nothing holds.
//!
//! [`Gate::handle`] is the one way in; the daemon, the property tests and `replay` all go through it.

pub mod effect;
pub mod event;
pub mod fence;
pub mod ledger;
pub mod receipt;
pub mod verdict;

pub use effect::{Answer, Effect, Effects, FilePages, Notice};
pub use event::{
    Backing, Caller, ClientId, DeviceId, DomainId, Door, Event, FileId, InvalidationId, JobId, MapResult,
    Outcome, Performer, RegionId, RegionSpec, UnmapResult,
};
pub use fence::{OnStuckDma, Step, Steps};
pub use ledger::PageState;
pub use receipt::{Evidence, Receipt};
pub use verdict::{Cause, Reason, Refusal, Verdict};

/// What a gate is told once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// How far to go by itself when DMA does not stop.
    pub on_stuck_dma: OnStuckDma,
    /// Regions at most, over all clients.
    pub max_regions: u32,
    /// Invalidations that one client may have open at most.
    pub max_open: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self { on_stuck_dma: OnStuckDma::Refuse, max_regions: 512, max_open: 65_536 }
    }
}

/// The gate of one VM.
#[derive(Debug)]
pub struct Gate {
    policy: Policy,
}

impl Gate {
    /// A gate without domains, devices or memory.
    pub fn new(policy: Policy) -> Self {
        Self { policy }
    }

    /// Takes one event; appends to `effects` what it wants done.
    pub fn handle(&mut self, event: Event, effects: &mut Effects) {
        let _ = (event, effects, self.policy);
        // (being written)
    }

    /// What is known now, for `status` (sizes are counts or bytes).
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::default()
    }
}

/// The state of a gate at one moment, for `status`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The regions.
    pub regions: Vec<RegionStatus>,
    /// The devices.
    pub devices: Vec<DeviceStatus>,
    /// What must not be handed out.
    pub quarantine: Vec<QuarantineStatus>,
    /// Invalidations begun and not ended.
    pub open: u64,
    /// Kernel mappings in use, per domain, and their limit.
    pub mappings: Vec<(DomainId, u64, u64)>,
}

/// One region, for `status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionStatus {
    /// Its name.
    pub region: RegionId,
    /// Its owner.
    pub owner: ClientId,
    /// As it was described.
    pub spec: RegionSpec,
    /// Bytes shared, private, hole and unknown.
    pub bytes: [u64; 4],
    /// Whether it is being closed.
    pub closing: bool,
}

/// One device, for `status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Its name.
    pub device: DeviceId,
    /// Its domain.
    pub domain: DomainId,
    /// The strongest fence that it is under; none while its DMA works.
    pub fenced: Option<Step>,
}

/// One quarantined range, for `status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuarantineStatus {
    /// The file.
    pub file: FileId,
    /// The pages.
    pub range: passgate_bindings::PageRange<passgate_bindings::units::Offset>,
    /// Where the guest sees them, while a region covers the first.
    pub gpa: Option<passgate_bindings::Gpa>,
    /// Why, and since which invalidation.
    pub reason: Reason,
    /// The invalidation.
    pub invalidation: InvalidationId,
}
