//! Calls in progress: every effect whose result the gate waits for.

use std::collections::BTreeMap;

use passgate_backends::Step;
use passgate_bindings::{Iova, PageRange};

use super::ids::{DeviceId, DomainId, InvalidationId, JobId, RegionId};

/// A call in progress.
#[derive(Debug, Clone)]
pub(super) enum Call {
    /// A map over `iova` of `region`; `rest` is mapped after it.
    Map { domain: DomainId, region: RegionId, iova: PageRange<Iova>, rest: Option<PageRange<Iova>> },
    /// An unmap over `iova`, of which `already` bytes were reported gone before (none where nobody knows how many were
    /// mapped); `invalidation` asked for it.
    Unmap { domain: DomainId, iova: PageRange<Iova>, already: Option<u64>, invalidation: InvalidationId },
    /// A replace that takes `gone` out: one call over every run that is [`super::ledger::RunState::Removing`] by it;
    /// `invalidation` asked for it.
    Replace { domain: DomainId, gone: Vec<PageRange<Iova>>, invalidation: InvalidationId },
    /// An unmap of all that an earlier process left at `iova`.
    Leftover { domain: DomainId, iova: PageRange<Iova> },
    /// A fence on `device`; `invalidation` asked for it first.
    Fence { device: DeviceId, domain: DomainId, step: Step, invalidation: InvalidationId },
    /// `device` is attached to its domain again.
    Attach { device: DeviceId },
}

/// All calls in progress.
#[derive(Debug, Default)]
pub(super) struct Calls {
    pending: BTreeMap<JobId, Call>,
    last: u64,
}

impl Calls {
    /// Returns a new number for a call.
    pub(super) fn number(&mut self) -> JobId {
        self.last += 1;
        JobId(self.last)
    }

    /// Records a call under a number from [`Calls::number`], or what is new of it.
    pub(super) fn record(&mut self, job: JobId, call: Call) {
        self.pending.insert(job, call);
    }

    /// Returns the number of a new call.
    pub(super) fn start(&mut self, call: Call) -> JobId {
        let job = self.number();
        self.record(job, call);
        job
    }

    pub(super) fn get(&self, job: JobId) -> Option<&Call> {
        self.pending.get(&job)
    }

    /// The call has returned.
    pub(super) fn end(&mut self, job: JobId) -> Option<Call> {
        self.pending.remove(&job)
    }

    /// Returns the number of the latest call.
    pub(super) fn last(&self) -> JobId {
        JobId(self.last)
    }

    /// Returns its state as text ([`super::Gate::canonical`]).
    pub(super) fn canonical(&self) -> String {
        format!("{:?}\n", self.pending)
    }
}
