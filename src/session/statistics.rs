//! The counts and records of a session for those who watch it: the totals, the metrics, and the last receipts.

use super::receipts::Receipts;
use crate::gate::{Effect, InvalidationId, Receipt, Verdict};
use crate::observe::metrics::{Begun, Meter};
use crate::protocol::verbs::Totals;

/// The counters of a session, and the last receipts.
#[derive(Debug)]
pub(super) struct Statistics {
    totals: Totals,
    meter: Meter,
    receipts: Receipts,
}

impl Statistics {
    /// Returns counters of a session over this backend, all 0.
    pub(super) fn new(backend: &'static str) -> Self {
        Self { totals: Totals::default(), meter: Meter::new(backend), receipts: Receipts::default() }
    }

    /// Counts an event, and the effects that it had.
    pub(super) fn handled(&mut self, begun: Option<Begun>, effects: &[Effect]) {
        self.meter.begun(begun, effects);
    }

    /// Counts a request that was refused.
    pub(super) fn request_refused(&mut self) {
        self.meter.wrong();
    }

    /// Counts a verdict that is about to be sent.
    pub(super) fn answered(&mut self, invalidation: InvalidationId, verdict: Verdict) {
        self.meter.answered(invalidation, verdict);
        match verdict {
            Verdict::Done => self.totals.done += 1,
            Verdict::Refused { .. } => self.totals.refused += 1,
            Verdict::Unknown { .. } => self.totals.unknown += 1,
        }
    }

    /// Stores the receipt of an invalidation that is over.
    pub(super) fn add_receipt(&mut self, receipt: Receipt) {
        self.meter.receipt(&receipt);
        if receipt.steps.iter().any(|step| step.in_flight) {
            self.totals.late_dma_waited += 1;
        }
        self.receipts.push(receipt);
    }

    /// Returns the totals since the start.
    pub(super) fn totals(&self) -> Totals {
        Totals { wrong: self.meter.requests_wrong(), ..self.totals }
    }

    /// Returns the counters and histograms.
    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Returns the receipt of an invalidation; none if it is not over, or its receipt was dropped.
    pub(super) fn receipt(&self, id: InvalidationId) -> Option<&Receipt> {
        self.receipts.get(id)
    }
}
