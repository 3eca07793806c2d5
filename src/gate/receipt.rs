//! The recorded evidence of one invalidation: what was asked, what each step returned, what was said.

use passgate_bindings::{Iova, PageRange};

use super::event::{Caller, Outcome};
use super::ids::{DeviceId, DomainId, InvalidationId};
use super::ledger::PageState;
use super::ranges::Ranges;
use super::rung::Rung;
use super::verdict::Verdict;

/// The maximum number of steps that one receipt records; further ones are only counted.
pub const MAX_STEPS: usize = 32;

/// One step of the evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evidence {
    /// The rung.
    pub step: Rung,
    /// The domain.
    pub domain: DomainId,
    /// The device, for a fence.
    pub device: Option<DeviceId>,
    /// The addresses, for an unmap of one range.
    pub iova: Option<PageRange<Iova>>,
    /// Bytes that had to be unmapped.
    pub asked: u64,
    /// Bytes that were unmapped.
    pub gone: u64,
    /// True if operations were still in flight when the call returned.
    pub in_flight: bool,
    /// The kernel's errno; 0 for success.
    pub errno: i32,
    /// The duration of the call in nanoseconds.
    pub took_ns: u64,
}

/// The recorded evidence of one invalidation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The invalidation.
    pub invalidation: InvalidationId,
    /// The caller.
    pub caller: Caller,
    /// The ranges.
    pub ranges: Ranges,
    /// The state that the pages were to have.
    pub to: PageState,
    /// The result of each step, in order; at most [`MAX_STEPS`].
    pub steps: Vec<Evidence>,
    /// The number of further steps.
    pub more_steps: u32,
    /// The verdict; none where the client was gone before.
    pub verdict: Option<Verdict>,
    /// The outcome that the owner reported; none where there was no conversion.
    pub outcome: Option<Outcome>,
}

impl Receipt {
    /// Records one step.
    pub fn record(&mut self, evidence: Evidence) {
        if self.steps.len() < MAX_STEPS {
            self.steps.push(evidence);
        } else {
            self.more_steps += 1;
        }
    }
}
