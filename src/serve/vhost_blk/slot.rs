//! One request of a ring while it is not answered, and its name at the drive.

use std::time::Instant;

use passgate_backends::nvme::Op;
use passgate_backends::window::Segment;
use passgate_bindings::{Iova, PAGE, PageRange};
use vm_memory::GuestAddress;

use super::ring::{LONGEST, MOST};
use crate::observe::disk::Kind;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum State {
    #[default]
    Free,
    /// For room at the drive, or to be tried again.
    Waiting,
    /// By the question that was asked.
    Held(u64),
    /// At the drive.
    Flying,
}

/// A request, by the number of its first descriptor.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) state: State,
    /// Since when it was held, if it was.
    pub(super) since: Option<Instant>,
    pub(super) kind: Kind,
    pub(super) op: Option<Op>,
    /// What moves between the drive and guest memory where all goes well.
    pub(super) bytes: u64,
    pub(super) status: GuestAddress,
    pub(super) written: u32,
    pub(super) segments: Vec<Segment>,
}

/// A request's name at the drive: the life of its ring, the ring, the request. What outlives a ring's life is nobody's.
pub(super) fn tag(life: u16, ring: u16, head: u16) -> u32 {
    u32::from(life) << 16 | u32::from(ring % MOST) << 10 | u32::from(head % LONGEST)
}

/// The ring's life, the ring and the request that a name at the drive is of.
pub(super) fn of_tag(tag: u32) -> (u16, u16, u16) {
    ((tag >> 16) as u16, (tag >> 10) as u16 % MOST, tag as u16 % LONGEST)
}

/// The pages that a segment lies in; none where it is in no address space.
pub(super) fn pages(segment: &Segment) -> Option<PageRange<Iova>> {
    let first = segment.iova.0 / PAGE * PAGE;
    let end = segment.iova.0.checked_add(segment.len.into())?.checked_next_multiple_of(PAGE)?;
    PageRange::new(first, end - first).ok()
}
