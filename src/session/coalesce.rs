//! Coalescing: unmaps or maps of adjacent ranges are made by one kernel call. A burst of conversions of single pages asks for
//! many of them side by side.
//!
//! The gate is not involved: it asks for each request by itself and gets a result for each. The result of a coalesced call is
//! believed only if it accounts for exactly the bytes of all its requests. Otherwise each request is tried again by a call of its
//! own, so that one that fails does not fail the others. The bytes that a coalesced unmap had removed before it failed are
//! credited to its requests from the lowest address on; so unmaps are coalesced only in domains that report them
//! ([`DomainCaps::counts_partial`](passgate_backends::DomainCaps::counts_partial)). Unmaps are not coalesced either if one of
//! them would wait for operations in flight, which would delay the others, or if it is not known how much of a range is mapped.

use std::sync::Arc;

use passgate_backends::Domain;
use passgate_bindings::{Iova, PageRange};

use super::Session;
use super::call::{self, Call, Returned};
use crate::gate::{
    DomainId, Effect, Event, JobId, MAX_CALL_BYTES, MAX_CALL_MAPPINGS, MapResult, UnmapResult,
};

/// The maximum number of unmaps in one call.
const MAX_COALESCED_UNMAPS: usize = 4096;

/// The result of a map whose file or domain the session does not have.
const EBADF: i32 = 9;

/// An unmap or a map that is made by one call together with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoalescedRequest {
    /// The number of the call that the gate asked for.
    pub(super) job: JobId,
    /// The whole range.
    pub(super) iova: PageRange<Iova>,
    /// Bytes of it that are to be unmapped or mapped.
    pub(super) bytes: u64,
}

impl Session {
    /// Returns the call for `first`, the effect just taken out, and for the effects behind it that can be done by the same call.
    /// If the session does not have the domain, device or file, `Err` has a failed result for each of them.
    pub(super) fn coalesce(&mut self, first: Effect) -> Result<Call, Vec<Event>> {
        self.execute_without_call();
        match first {
            Effect::Unmap { job, domain, mut iova, bytes } => {
                let id = domain;
                let Some(domain) = self.hardware.domain(id).cloned() else {
                    return Err(vec![call::failed_unmap(job)]);
                };
                let capabilities = domain.capabilities();
                // One ticket would stand for the operations of all requests.
                let coalesces = capabilities.counts_partial && !capabilities.tickets;
                let mut shares = Vec::new();
                while coalesces
                    && let Some(Effect::Unmap { job: other, domain: at, iova: next, bytes: Some(more) }) =
                        self.effects.next()
                    && let (at, Some(bytes)) = (*at, bytes)
                    && at == id
                    && let Some(both) = adjacent_union(iova, *next)
                    && both.len() <= MAX_CALL_BYTES
                    && !domain.may_wait(both)
                    && shares.len() < MAX_COALESCED_UNMAPS
                {
                    if shares.is_empty() {
                        shares.push(CoalescedRequest { job, iova, bytes });
                    }
                    shares.push(CoalescedRequest { job: *other, iova: *next, bytes: *more });
                    iova = both;
                    self.take_coalesced();
                }
                Ok(Call::Unmap { job, id, domain, iova, shares, already: 0 })
            }
            Effect::Map { job, domain, mut iova, piece, file, offset, writable } => {
                let mut shares = Vec::new();
                while let Some(Effect::Map {
                    job: other,
                    domain: next_domain,
                    iova: next,
                    piece: next_piece,
                    file: next_file,
                    offset: next_offset,
                    writable: next_writable,
                }) = self.effects.next()
                    && (*next_domain, *next_piece, *next_file, *next_writable)
                        == (domain, piece, file, writable)
                    && next_offset.0 == offset.0 + iova.len()
                    && iova.end() == next.start()
                    // Else one mapping would cross the border: the domain would make one less than the gate counts.
                    && iova.end().0.is_multiple_of(piece)
                    && let Some(both) = adjacent_union(iova, *next)
                    && both.len() <= MAX_CALL_BYTES
                    && both.len().div_ceil(piece) <= MAX_CALL_MAPPINGS
                {
                    if shares.is_empty() {
                        shares.push(CoalescedRequest { job, iova, bytes: iova.len() });
                    }
                    shares.push(CoalescedRequest { job: *other, iova: *next, bytes: next.len() });
                    iova = both;
                    self.take_coalesced();
                }
                let (Some(file), Some(domain)) =
                    (self.files.get(file), self.hardware.domain(domain).cloned())
                else {
                    let result = MapResult::Refused { errno: EBADF };
                    let others = shares.iter().skip(1).map(|share: &CoalescedRequest| share.job);
                    let all = std::iter::once(job).chain(others);
                    return Err(all.map(|job| Event::Mapped { job, result }).collect());
                };
                Ok(Call::Map { job, domain, iova, piece, file, offset, writable, shares })
            }
            other => Call::of(other, self).map_err(|failed| failed.into_iter().collect()),
        }
    }

    /// Takes the next effect out: it is part of a coalesced call.
    fn take_coalesced(&mut self) {
        self.effects.take();
        self.execute_without_call();
    }

    /// Executes the alarms and receipts that come next, which may stand between requests that can be coalesced. It stops at
    /// any other effect: the order of calls, answers and notices must not change.
    fn execute_without_call(&mut self) {
        while let Some(Effect::Arm { .. } | Effect::Receipt(_)) = self.effects.next() {
            match self.effects.take() {
                Some(Effect::Arm { invalidation, rung, after_ns }) => self.arm(invalidation, rung, after_ns),
                Some(Effect::Receipt(receipt)) => self.record_receipt(*receipt),
                _ => return,
            }
        }
    }
}

/// Returns the union of two ranges if they are adjacent.
fn adjacent_union(one: PageRange<Iova>, other: PageRange<Iova>) -> Option<PageRange<Iova>> {
    let adjacent = one.end() == other.start() || other.end() == one.start();
    let start = one.start().min(other.start());
    adjacent.then(|| PageRange::between(start, one.end().max(other.end()))).flatten()
}

/// Splits the result of a coalesced unmap: a result for each request if it accounts for every byte, else a call for each
/// request.
pub(super) fn split_result(
    (id, domain): (DomainId, Arc<dyn Domain>),
    result: UnmapResult,
    mut shares: Vec<CoalescedRequest>,
    took_ns: u64,
) -> Returned {
    let asked: u64 = shares.iter().map(|share| share.bytes).sum();
    let mut removed = match result {
        UnmapResult::Gone { bytes } if bytes == asked => {
            let event = |share: &CoalescedRequest| {
                let result = UnmapResult::Gone { bytes: share.bytes };
                Event::Unmapped { job: share.job, result, took_ns }
            };
            return Returned::Facts(shares.iter().map(event).collect());
        }
        UnmapResult::Failed { bytes, .. } if bytes <= asked => bytes,
        // A success that is short or too long, or a ticket from a domain that has none: the order in which it removed the
        // bytes is unknown, so none are credited.
        _ => 0,
    };
    // A failed unmap removes mappings from the lowest address on.
    shares.sort_unstable_by_key(|share| share.iova.start());
    let call = |share: &CoalescedRequest| {
        let already = share.bytes.min(removed);
        removed -= already;
        let (job, iova, domain) = (share.job, share.iova, Arc::clone(&domain));
        Call::Unmap { job, id, domain, iova, shares: Vec::new(), already }
    };
    Returned::Separate(shares.iter().map(call).collect())
}

/// Returns the result of an unmap after `already` bytes of the range were removed by an earlier call.
pub(super) fn add_bytes(already: u64, result: UnmapResult) -> UnmapResult {
    match result {
        UnmapResult::Gone { bytes } => UnmapResult::Gone { bytes: bytes.saturating_add(already) },
        UnmapResult::InFlight { bytes } => UnmapResult::InFlight { bytes: bytes.saturating_add(already) },
        UnmapResult::Failed { errno, bytes } => {
            UnmapResult::Failed { errno, bytes: bytes.saturating_add(already) }
        }
    }
}

#[cfg(test)]
mod tests;
