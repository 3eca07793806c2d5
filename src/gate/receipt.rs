//! The recorded evidence of one invalidation: what was asked, what each step returned, what was said.

use passgate_bindings::{Iova, PageRange};

use super::event::{Caller, DeviceId, DomainId, InvalidationId, Outcome};
use super::fence::Step;
use super::ledger::PageState;
use super::ranges::Ranges;
use super::verdict::Verdict;

/// Steps that one receipt records; further ones are only counted.
pub const MAX_STEPS: usize = 32;

/// One step of the evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evidence {
    /// Which rung.
    pub step: Step,
    /// In which domain.
    pub domain: DomainId,
    /// On which device, for a fence.
    pub device: Option<DeviceId>,
    /// Over which addresses, for an unmap of one range.
    pub iova: Option<PageRange<Iova>>,
    /// Bytes that had to go, for an unmap.
    pub asked: u64,
    /// Bytes that went.
    pub gone: u64,
    /// Whether operations were still in flight when the call returned.
    pub in_flight: bool,
    /// The kernel's answer; 0 for success.
    pub errno: i32,
    /// How long the call took, in nanoseconds.
    pub took_ns: u64,
}

/// The recorded evidence of one invalidation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The invalidation.
    pub invalidation: InvalidationId,
    /// Who asked.
    pub caller: Caller,
    /// For what.
    pub ranges: Ranges,
    /// What the pages were to become.
    pub to: PageState,
    /// What each step returned, in order; at most [`MAX_STEPS`].
    pub steps: Vec<Evidence>,
    /// Steps beyond those.
    pub more_steps: u32,
    /// What was answered; none where the client went away before.
    pub verdict: Option<Verdict>,
    /// How the owner's side ended; none where it never came to that.
    pub outcome: Option<Outcome>,
}

impl Receipt {
    /// Takes down one step.
    pub fn record(&mut self, evidence: Evidence) {
        if self.steps.len() < MAX_STEPS {
            self.steps.push(evidence);
        } else {
            self.more_steps += 1;
        }
    }
}
