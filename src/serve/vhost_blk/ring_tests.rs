//! What only time brings.

use super::*;
use crate::observe::disk::Kind;

#[test]
fn what_is_held_too_long_is_refused_and_counted() {
    const USED: u64 = 0x2000;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    let counts = Arc::new(Counts::default());
    let mut ring = Ring::new(0, Arc::clone(&counts));
    ring.phase = Phase::On;
    ring.slots.resize_with(16, Slot::default);
    (ring.slots[3].kind, ring.slots[3].status) = (Kind::Write, GuestAddress(0x3000));
    ring.hold(3);
    ring.tick(&mut queue, &memory, Instant::now());
    assert_eq!((ring.now(), memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap()), ((0, 1), 0));
    ring.tick(&mut queue, &memory, Instant::now() + PATIENCE + Duration::from_secs(1));
    assert_eq!((ring.now(), memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap()), ((0, 0), 1));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), FAILED);
    let mut disk = crate::observe::disk::Disk::default();
    counts.add_to(&mut disk);
    assert_eq!((disk.holds, disk.refused), (1, [0, 1]));
    assert_eq!(disk.requests[Kind::Write as usize], [0, 1, 0]);
    // An answer that comes after all finds nothing.
    ring.answered(&mut queue, &memory, 3, 1, Admits::Never);
    assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 1);
}

/// Its pages are said to be open, and are not when the drive is given it again.
#[test]
fn time_of_a_request_that_is_held_again_counts_from_the_first_hold() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
    let mut ring = Ring::new(0, Arc::new(Counts::default()));
    ring.slots.resize_with(16, Slot::default);
    ring.slots[3].status = GuestAddress(0x3000);
    ring.hold(3);
    let held = Instant::now();
    let between = std::iter::repeat_with(Instant::now).find(|now| *now > held).unwrap();
    let ticket = ring.questions.pop().unwrap().ticket;
    ring.answered(&mut queue, &memory, 3, ticket, Admits::Open);
    ring.delayed.clear();
    ring.hold(3);
    ring.tick(&mut queue, &memory, between + PATIENCE);
    assert_eq!((ring.now(), queue.next_used()), ((0, 0), 1), "it may be held for ever");
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), FAILED);
}

/// A question may be answered after its request was answered otherwise, and another was held by the same number: in this
/// life of the ring or in the next.
#[test]
fn answer_to_an_earlier_question_decides_no_later_one() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
    let mut ring = Ring::new(0, Arc::new(Counts::default()));
    let hold = |ring: &mut Ring| {
        ring.slots.resize_with(16, Slot::default);
        ring.slots[3].status = GuestAddress(0x3000);
        ring.hold(3);
        ring.questions.pop().unwrap().ticket
    };
    let first = hold(&mut ring);
    ring.answered(&mut queue, &memory, 3, first, Admits::Open);
    assert_eq!(ring.now(), (0, 1), "it is about to be tried again");
    ring.delayed.clear();
    let second = hold(&mut ring);
    ring.answered(&mut queue, &memory, 3, first, Admits::Never);
    assert_eq!((ring.now(), queue.next_used()), ((0, 1), 0), "it is held still");
    ring.abandon();
    let third = hold(&mut ring);
    ring.answered(&mut queue, &memory, 3, second, Admits::Never);
    assert_eq!((ring.now(), queue.next_used()), ((0, 1), 0), "it is held still");
    ring.answered(&mut queue, &memory, 3, third, Admits::Never);
    assert_eq!((ring.now(), queue.next_used()), ((0, 0), 1));
}

/// Its pages went by force, or for a moment: who knows is asked, and a second fault is the guest's answer.
#[test]
fn request_whose_memory_faulted_is_asked_about_once() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
    let mut ring = Ring::new(0, Arc::new(Counts::default()));
    ring.slots.resize_with(16, Slot::default);
    ring.slots[3].status = GuestAddress(0x3000);
    for asked in [true, false] {
        (ring.slots[3].state, ring.flying) = (State::Flying, 1);
        ring.completed(&mut queue, &memory, (ring.life, 3), Err(Fault::Memory));
        assert_eq!((ring.now(), queue.next_used()), ((0, asked.into()), (!asked).into()));
        if let Some(Question { ticket, .. }) = ring.questions.pop() {
            ring.answered(&mut queue, &memory, 3, ticket, Admits::Open);
            ring.delayed.clear();
        }
    }
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), FAILED);
}

/// The process may end between the two: a request whose mark has gone before its answer was written is done by nobody.
#[test]
fn mark_of_a_request_outlives_an_answer_that_cannot_be_written() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut queue = Queue::new(16).unwrap();
    let (inflight, _fd) = super::super::inflight::Inflight::new(1, 16).unwrap();
    let marked = || inflight.queue(0, 16).unwrap().recover(0).unwrap();
    let mut ring = Ring::new(0, Arc::new(Counts::default()));
    ring.phase = Phase::On;
    ring.slots.resize_with(16, Slot::default);
    ring.slots[3].status = GuestAddress(0x3000);
    let mut tracked = inflight.queue(0, 16).unwrap();
    assert!(tracked.recover(0).is_none());
    tracked.begin(3);
    ring.inflight = Some(tracked);
    // The used ring is not in guest memory.
    queue.try_set_used_ring_address(GuestAddress(0x10_0000)).unwrap();
    ring.answer(&mut queue, &memory, 3, OK);
    assert_eq!((ring.phase, marked()), (Phase::Broken, vec![3]));
    queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
    ring.answer(&mut queue, &memory, 3, OK);
    assert_eq!(marked(), Vec::<u16>::new());
}
