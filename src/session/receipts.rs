//! The receipts that are remembered, for `Explain`.
//!
//! Those of conversions that went well come by the thousand, and displace none of the others: who finds a range in quarantine
//! can ask why as long as fewer than [`RECEIPT_HISTORY`] others have failed since.

use std::collections::VecDeque;

use crate::gate::{InvalidationId, Outcome, Receipt, Verdict};

/// Receipts of each kind that are remembered.
const RECEIPT_HISTORY: usize = 4096;

/// The last receipts.
#[derive(Debug, Default)]
pub(super) struct Receipts {
    good: VecDeque<Receipt>,
    failed: VecDeque<Receipt>,
}

impl Receipts {
    /// Remembers one; the oldest of its kind goes where it is one too many.
    pub(super) fn push(&mut self, receipt: Receipt) {
        let unknown = matches!(receipt.outcome, Some(Outcome::Unknown { .. }));
        let good = receipt.verdict == Some(Verdict::Done) && receipt.outcome.is_some() && !unknown;
        let ring = if good { &mut self.good } else { &mut self.failed };
        if ring.len() == RECEIPT_HISTORY {
            ring.pop_front();
        }
        ring.push_back(receipt);
    }

    /// Returns that of this invalidation, while it is remembered.
    pub(super) fn get(&self, id: InvalidationId) -> Option<&Receipt> {
        let last = |ring: &'_ VecDeque<Receipt>| ring.iter().rposition(|receipt| receipt.invalidation == id);
        let of = |ring| last(ring).and_then(|at| VecDeque::get(ring, at));
        of(&self.failed).or_else(|| of(&self.good))
    }
}

#[cfg(test)]
mod tests {
    use passgate_bindings::PageRange;

    use super::*;
    use crate::gate::{Caller, ClientId, Door, PageState};

    fn receipt(invalidation: u64, outcome: Option<Outcome>) -> Receipt {
        Receipt {
            invalidation: InvalidationId(invalidation),
            caller: Caller { client: ClientId(1), door: Door::Channel, cookie: 0 },
            ranges: PageRange::new(0, 4096).unwrap().into(),
            to: PageState::Private,
            steps: Vec::new(),
            more_steps: 0,
            verdict: Some(Verdict::Done),
            outcome,
        }
    }

    #[test]
    fn receipts_of_what_went_well_displace_none_of_what_failed() {
        let mut receipts = Receipts::default();
        receipts.push(receipt(1, Some(Outcome::Unknown { errno: 14, offset: 0 })));
        receipts.push(receipt(2, None));
        let history = RECEIPT_HISTORY as u64;
        (3..3 + 10 * history).for_each(|id| receipts.push(receipt(id, Some(Outcome::Committed))));
        assert!(receipts.get(InvalidationId(1)).is_some() && receipts.get(InvalidationId(2)).is_some());
        let oldest = 3 + 9 * history;
        assert!(
            receipts.get(InvalidationId(oldest)).is_some()
                && receipts.get(InvalidationId(oldest - 1)).is_none()
        );
    }
}
