//! The last receipts, for `Explain`.
//!
//! Receipts of successful conversions come by the thousand, so they have a ring of their own: the receipt of a failed one stays
//! available until [`RECEIPT_HISTORY`] later ones have failed.

use std::collections::VecDeque;

use crate::gate::{InvalidationId, Outcome, Receipt, Verdict};

/// The maximum number of receipts of each kind, successful and failed.
const RECEIPT_HISTORY: usize = 4096;

/// The last receipts of each kind, oldest first.
#[derive(Debug, Default)]
pub(super) struct Receipts {
    /// Those with the verdict *done* and a known outcome.
    successful: VecDeque<Receipt>,
    /// All others.
    failed: VecDeque<Receipt>,
}

impl Receipts {
    /// Adds a receipt, and drops the oldest of its kind if there are [`RECEIPT_HISTORY`] already.
    pub(super) fn push(&mut self, receipt: Receipt) {
        let unknown = matches!(receipt.outcome, Some(Outcome::Unknown { .. }));
        let successful = receipt.verdict == Some(Verdict::Done) && receipt.outcome.is_some() && !unknown;
        let ring = if successful { &mut self.successful } else { &mut self.failed };
        if ring.len() == RECEIPT_HISTORY {
            ring.pop_front();
        }
        ring.push_back(receipt);
    }

    /// Returns the receipt of this invalidation; none if there is none, or it was dropped.
    pub(super) fn get(&self, id: InvalidationId) -> Option<&Receipt> {
        let last = |ring: &'_ VecDeque<Receipt>| ring.iter().rposition(|receipt| receipt.invalidation == id);
        let of = |ring| last(ring).and_then(|at| VecDeque::get(ring, at));
        of(&self.failed).or_else(|| of(&self.successful))
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
    fn successful_receipts_displace_no_failed_ones() {
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
