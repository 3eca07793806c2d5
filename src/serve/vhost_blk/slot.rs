//! The state of one request until it is answered, and its tag at the drive.

use std::time::Instant;

use passgate_backends::nvme::Op;
use passgate_backends::window::Segment;
use passgate_bindings::{Iova, PAGE, PageRange};
use vm_memory::GuestAddress;

use super::ring::{MAX_QUEUE_SIZE, MAX_QUEUES};
use crate::observe::disk::Kind;

/// The state of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum SlotState {
    /// There is no request with this head.
    #[default]
    Free,
    /// It waits for room at the drive, or for its retry.
    Pending,
    /// It waits for the answer to the access query with this ticket.
    Deferred(u64),
    /// It is in flight at the drive.
    Outstanding,
}

/// A request, by the index of its first descriptor (head).
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) state: SlotState,
    /// The time at which it was deferred first, if it was.
    pub(super) deferred_since: Option<Instant>,
    pub(super) kind: Kind,
    pub(super) op: Option<Op>,
    /// The number of bytes that the drive transfers if it succeeds.
    pub(super) bytes: u64,
    /// The address of the status byte.
    pub(super) status: GuestAddress,
    /// The number of bytes that the drive writes to guest memory if it succeeds, without the status byte.
    pub(super) written: u32,
    pub(super) segments: Vec<Segment>,
}

/// Returns the tag of a request at the drive: the generation of its ring (16 bits), the ring (6 bits), the head (10 bits).
/// By its generation a completion that belongs to an earlier start of the ring is recognised; it is dropped.
pub(super) fn tag(generation: u16, ring: u16, head: u16) -> u32 {
    u32::from(generation) << 16 | u32::from(ring % MAX_QUEUES) << 10 | u32::from(head % MAX_QUEUE_SIZE)
}

/// Returns the generation, the ring and the head of a tag.
pub(super) fn from_tag(tag: u32) -> (u16, u16, u16) {
    ((tag >> 16) as u16, (tag >> 10) as u16 % MAX_QUEUES, tag as u16 % MAX_QUEUE_SIZE)
}

/// Returns the pages that a segment touches; none if it ends beyond the address space.
pub(super) fn pages(segment: &Segment) -> Option<PageRange<Iova>> {
    let first = segment.iova.0 / PAGE * PAGE;
    let end = segment.iova.0.checked_add(segment.len.into())?.checked_next_multiple_of(PAGE)?;
    PageRange::new(first, end - first).ok()
}
