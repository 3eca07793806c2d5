//! Tests of what depends on time and on answers that come late, which no front-end's test waits for.

use super::*;
use crate::observe::disk::Kind;

#[test]
fn request_deferred_too_long_fails_and_is_counted() {
    const USED: u64 = 0x2000;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    let counts = Arc::new(WorkerCounters::default());
    let mut ring = Ring::new(0, Arc::clone(&counts));
    ring.phase = Phase::Running;
    ring.slots.resize_with(16, Slot::default);
    (ring.slots[3].kind, ring.slots[3].status) = (Kind::Write, GuestAddress(0x3000));
    ring.defer(3);
    ring.tick(&mut queue, &memory, Instant::now());
    assert_eq!((ring.gauges(), memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap()), ((0, 1), 0));
    ring.tick(&mut queue, &memory, Instant::now() + DEFERRAL_TIMEOUT + Duration::from_secs(1));
    assert_eq!((ring.gauges(), memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap()), ((0, 0), 1));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), STATUS_IOERR);
    let mut disk = crate::observe::disk::Disk::default();
    counts.add_to(&mut disk);
    assert_eq!((disk.holds, disk.refused), (1, [0, 1]));
    assert_eq!(disk.requests[Kind::Write as usize], [0, 1, 0]);
    // A late answer is ignored.
    ring.query_answered(&mut queue, &memory, 3, 1, DmaAccess::Never);
    assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 1);
}

/// The session reports the pages as open, and they are not when the request is submitted again.
#[test]
fn deferral_timeout_counts_from_the_first_deferral() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
    let mut ring = Ring::new(0, Arc::new(WorkerCounters::default()));
    ring.slots.resize_with(16, Slot::default);
    ring.slots[3].status = GuestAddress(0x3000);
    ring.defer(3);
    let deferred = Instant::now();
    let between = std::iter::repeat_with(Instant::now).find(|now| *now > deferred).unwrap();
    let ticket = ring.queries.pop().unwrap().ticket;
    ring.query_answered(&mut queue, &memory, 3, ticket, DmaAccess::Open);
    ring.retries.clear();
    ring.defer(3);
    ring.tick(&mut queue, &memory, between + DEFERRAL_TIMEOUT);
    assert_eq!((ring.gauges(), queue.next_used()), ((0, 0), 1), "it may be deferred for ever");
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), STATUS_IOERR);
}

/// A query may be answered after its request was answered otherwise and another one with the same head was deferred, in this
/// generation of the ring or in the next.
#[test]
fn answer_to_an_earlier_query_is_ignored() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
    let mut ring = Ring::new(0, Arc::new(WorkerCounters::default()));
    let defer = |ring: &mut Ring| {
        ring.slots.resize_with(16, Slot::default);
        ring.slots[3].status = GuestAddress(0x3000);
        ring.defer(3);
        ring.queries.pop().unwrap().ticket
    };
    let first = defer(&mut ring);
    ring.query_answered(&mut queue, &memory, 3, first, DmaAccess::Open);
    assert_eq!(ring.gauges(), (0, 1), "its retry is pending");
    ring.retries.clear();
    let second = defer(&mut ring);
    ring.query_answered(&mut queue, &memory, 3, first, DmaAccess::Never);
    assert_eq!((ring.gauges(), queue.next_used()), ((0, 1), 0), "it is still deferred");
    ring.abandon();
    let third = defer(&mut ring);
    ring.query_answered(&mut queue, &memory, 3, second, DmaAccess::Never);
    assert_eq!((ring.gauges(), queue.next_used()), ((0, 1), 0), "it is still deferred");
    ring.query_answered(&mut queue, &memory, 3, third, DmaAccess::Never);
    assert_eq!((ring.gauges(), queue.next_used()), ((0, 0), 1));
}

/// The pages may have been unmapped by a fence or for a short time: the session is queried once, and a second fault is an error.
#[test]
fn memory_fault_is_queried_once_then_fails() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
    let mut ring = Ring::new(0, Arc::new(WorkerCounters::default()));
    ring.slots.resize_with(16, Slot::default);
    ring.slots[3].status = GuestAddress(0x3000);
    for queried in [true, false] {
        (ring.slots[3].state, ring.outstanding) = (SlotState::Outstanding, 1);
        ring.completed(&mut queue, &memory, (ring.generation, 3), Err(Fault::Memory));
        assert_eq!((ring.gauges(), queue.next_used()), ((0, queried.into()), (!queried).into()));
        if let Some(PageQuery { ticket, .. }) = ring.queries.pop() {
            ring.query_answered(&mut queue, &memory, 3, ticket, DmaAccess::Open);
            ring.retries.clear();
        }
    }
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), STATUS_IOERR);
}

/// A request that is unmarked before its used buffer is written would be lost if the process died in between.
#[test]
fn request_stays_marked_until_its_used_buffer_is_written() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut queue = Queue::new(16).unwrap();
    let (inflight, _fd) = super::super::inflight::Inflight::new(1, 16).unwrap();
    let marked = || inflight.queue(0, 16).unwrap().recover(0).unwrap();
    let mut ring = Ring::new(0, Arc::new(WorkerCounters::default()));
    ring.phase = Phase::Running;
    ring.slots.resize_with(16, Slot::default);
    ring.slots[3].status = GuestAddress(0x3000);
    let mut tracked = inflight.queue(0, 16).unwrap();
    assert!(tracked.recover(0).is_none());
    tracked.mark(3);
    ring.inflight = Some(tracked);
    // The used ring is not in guest memory.
    queue.try_set_used_ring_address(GuestAddress(0x10_0000)).unwrap();
    ring.answer(&mut queue, &memory, 3, STATUS_OK);
    assert_eq!((ring.phase, marked()), (Phase::Broken, vec![3]));
    queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
    ring.answer(&mut queue, &memory, 3, STATUS_OK);
    assert_eq!(marked(), Vec::<u16>::new());
}
