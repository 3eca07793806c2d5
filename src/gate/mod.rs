//! The gate of one VM: it decides what is mapped for devices, and when a range may be converted. Pure: no system call, no
//! clock, no thread, no log. An event in, effects out. The memory that its ledger lies in is given to it ([`ledger::Arena`]).
//!
//! Principles that every file here keeps:
//! - *Done is read off the ledger.* An invalidation is granted when no mapping in any state overlaps it, in any
//!   domain, at any alias. There is no second bookkeeping that could disagree.
//! - *A mapping leaves the ledger only by proof*: an unmap that returned its full length with nothing in flight.
//! - *What should be mapped is derived*, never queued: shared pages, of a region, that nothing excludes.
//!
//! [`Gate::handle`] is the one way in; the daemon, the property tests and `replay` all go through it. The state lies in
//! components whose fields are their own: `memory` (regions, files, page states, exclusions), `mappings` (domains and
//! their budgets), `calls` (what is in progress), `invalidations`, `devices`, `quarantine`, `clients`. The
//! other files here are the rules by which an event changes them.

mod adopt;
mod calls;
mod canonical;
mod clients;
mod conversion;
mod devices;
mod dma_access;
pub mod effect;
pub mod event;
mod fencing;
pub mod ids;
mod invalidations;
mod ladder;
pub mod ledger;
mod mapping;
mod mappings;
mod memory;
mod merge;
pub mod policy;
mod proof;
mod quarantine;
mod ranges;
pub mod receipt;
mod regions;
mod results;
pub mod resume;
mod rung;
pub mod status;
mod sweep;
pub mod verdict;

pub use adopt::Unended;
pub use dma_access::DmaAccess;
pub use effect::{Answer, Effect, Effects, FilePages, Notice};
pub use event::{
    Backing, Caller, Door, Event, MapResult, Outcome, OutcomeKind, Performer, RegionSpec, ReportedEnd,
    UnmapResult,
};
pub use ids::{ClientId, DeviceId, DomainId, FileId, InvalidationId, JobId, ORPHANS, RegionId};
pub use ledger::ExcludedBy;
pub use ledger::PageState;
pub use passgate_backends::{DeviceTraits, DomainCaps, Step, Steps};
pub use policy::{CallLimits, Hitless, OnStuckDma, Platform, Policy};
pub(crate) use policy::{MAX_CALL_BYTES, MAX_CALL_MAPPINGS};
pub use ranges::{Ranges, RangesError};
pub use receipt::{Evidence, Receipt};
pub use regions::CloseWait;
pub use resume::{RecordedState, RegionRecord};
pub use rung::Rung;
pub use status::{DeviceStatus, MappingStatus, QuarantineStatus, RegionStatus, Snapshot};
pub use verdict::{Cause, Reason, Refusal, Verdict};

use calls::Calls;
use clients::Clients;
use devices::Devices;
use invalidations::Invalidations;
use ledger::Arena;
use mappings::Mappings;
use memory::Memory;
use quarantine::Quarantine;

/// The gate of one VM.
#[derive(Debug)]
pub struct Gate {
    policy: Policy,
    limits: CallLimits,
    memory: Memory,
    mappings: Mappings,
    calls: Calls,
    invalidations: Invalidations,
    devices: Devices,
    quarantine: Quarantine,
    clients: Clients,
    /// The number of contradictions that were found in its own records.
    inconsistencies: u64,
}

impl Gate {
    /// Returns a gate without domains, devices or memory. Its ledger will lie in memory of `arena`, unless it is kept in a store
    /// ([`Gate::use_store`]).
    pub fn new(policy: Policy, arena: Arena) -> Self {
        Self {
            policy,
            limits: CallLimits::default(),
            memory: Memory::new(arena),
            mappings: Mappings::default(),
            calls: Calls::default(),
            invalidations: Invalidations::default(),
            devices: Devices::default(),
            quarantine: Quarantine::default(),
            clients: Clients::default(),
            inconsistencies: 0,
        }
    }

    /// Sets the sizes in which it asks for calls. On a gate without memory.
    pub fn set_call_limits(&mut self, limits: CallLimits) {
        self.limits = limits;
    }

    /// Takes one event; appends to `effects` what it wants done, in order.
    pub fn handle(&mut self, event: Event, effects: &mut Effects) {
        match event {
            Event::DomainAdded { domain, caps } => self.mappings.add_domain(domain, caps, &self.memory),
            Event::DeviceAdded { device, domain, steps, traits } => {
                self.devices.add(device, domain, steps, traits);
            }
            Event::AddRegion { caller, spec } => self.add_region(caller, spec, effects),
            Event::RemoveRegion { caller, region } => self.remove_region(caller, region, effects),
            Event::Begin { caller, ranges, to, performer, deadline_ns } => {
                self.begin(caller, ranges, to, performer, deadline_ns, effects);
            }
            Event::End { caller, invalidation, outcome } => self.end(caller, invalidation, outcome, effects),
            Event::Converted { invalidation, outcome } => self.converted(invalidation, outcome, effects),
            Event::Mapped { job, result } => self.mapped(job, result, effects),
            Event::Unmapped { job, result, took_ns } => self.unmapped(job, result, took_ns, effects),
            Event::FlightEnded { job } => self.flight_ended(job, effects),
            Event::Fenced { job, errno, took_ns } => self.fenced(job, errno, took_ns, effects),
            Event::Attached { job, errno } => self.attached(job, errno, effects),
            Event::DeviceTraits { device, ats, tdi } => self.device_traits(device, ats, tdi, effects),
            Event::Expired { invalidation, rung } => self.expired(invalidation, rung, effects),
            Event::Quiet => self.merge_quiet(effects),
            Event::ClientGone { client } => self.client_gone(client, effects),
            Event::Quarantine { file, range, invalidation, reason } => {
                self.restore_quarantine(file, range, invalidation, reason);
            }
            Event::Release { caller, invalidation, to } => {
                self.operator_release(caller, invalidation, to, effects);
            }
            Event::Adopt { caller } => self.adopt(caller, effects),
            Event::MustUnmap { client } => self.clients.set_must_unmap(client),
        }
        self.attach_stopped(effects);
    }
}

#[cfg(test)]
mod tests;
