//! One virtqueue at work: requests from the guest to the drive, and answers back. It belongs to one worker.
//!
//! A request is *in flight* at the drive, *waiting* for room there, or *held*: a page of it is not open to the drive
//! just now. What is held waits for what the session says of its pages. It is failed only where they are nobody's to
//! give ([`Admits::Never`]), or after [`PATIENCE`].

use std::collections::VecDeque;
use std::fmt::Display;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use passgate_backends::nvme::{Fault, Geometry, Op, Queue as DriveQueue, Submitted};
use passgate_backends::window::Segment;
use passgate_bindings::{Iova, PageRange};
use vhost_user_backend::VringMutex;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use super::counts::Counts;
use super::inflight::QueueInflight;
use super::request::{self, Chain, Limits, Wanted};
use super::slot::{Slot, State, pages, tag};
use crate::gate::Admits;
use crate::observe::disk::Refusal;

/// Guest memory, as it changes.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
/// A virtqueue, as front-end and worker share it.
pub(super) type Vring = VringMutex<Memory>;

/// Descriptors of a virtqueue at most.
pub(super) const LONGEST: u16 = 1024;
/// Virtqueues at most.
pub(super) const MOST: u16 = 64;
/// Requests that are taken from a ring before others have their turn.
const TURN: usize = 128;
/// How long a request is held at most.
const PATIENCE: Duration = Duration::from_secs(30);
/// How soon a request is tried again whose pages are said to be open and were not.
const AGAIN: Duration = Duration::from_millis(1);

const OK: u8 = VIRTIO_BLK_S_OK as u8;
pub(super) const FAILED: u8 = VIRTIO_BLK_S_IOERR as u8;

/// What the rings of one worker share.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) drive: DriveQueue,
    pub(super) geometry: Geometry,
    pub(super) read_only: bool,
    /// True while a write must be on the medium before it is answered. It is read after the available ring: who has set it
    /// before offering a write finds it set for that write.
    pub(super) write_through: Arc<AtomicBool>,
}

/// A question about the pages of a held request: what they are for the drive.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) head: u16,
    pub(super) ticket: u64,
    pub(super) pages: Vec<PageRange<Iova>>,
    /// Whether the drive would write to them.
    pub(super) writes: bool,
}

/// What has become of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It takes requests from the guest.
    On,
    /// It takes none.
    Off,
    /// The guest has written nonsense into it: it takes none until it is set up anew.
    Broken,
}

/// A virtqueue at work.
#[derive(Debug)]
pub(super) struct Ring {
    index: u16,
    /// Which it is since this process began.
    life: u16,
    phase: Phase,
    slots: Vec<Slot>,
    /// To be submitted, in order.
    waiting: VecDeque<u16>,
    /// To be tried again, and when.
    delayed: VecDeque<(Instant, u16)>,
    flying: u32,
    held: u32,
    inflight: Option<QueueInflight>,
    chain: Chain,
    /// Whether the guest is to be told of something.
    told: bool,
    last_ticket: u64,
    counts: Arc<Counts>,
    /// Questions that are to be asked.
    pub(super) questions: Vec<Question>,
}

impl Ring {
    pub(super) fn new(index: u16, counts: Arc<Counts>) -> Self {
        Self {
            index,
            life: 0,
            phase: Phase::Off,
            slots: Vec::new(),
            waiting: VecDeque::new(),
            delayed: VecDeque::new(),
            flying: 0,
            held: 0,
            inflight: None,
            chain: Chain::default(),
            told: false,
            last_ticket: 0,
            counts,
            questions: Vec::new(),
        }
    }

    /// Whether it takes requests from the guest.
    pub(super) fn is_on(&self) -> bool {
        self.phase == Phase::On
    }

    /// Requests that the drive has of it.
    pub(super) fn flying(&self) -> u32 {
        self.flying
    }

    /// Whether something of it waits for room at the drive.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// How many requests are at the drive, and how many are held, or were and are about to be tried again.
    pub(super) fn now(&self) -> (u64, u64) {
        (self.flying.into(), u64::from(self.held) + self.delayed.len() as u64)
    }

    /// When it wants to be looked at although nothing happens.
    pub(super) fn next_look(&self, now: Instant) -> Option<Instant> {
        const OFTEN: Duration = Duration::from_millis(100);
        let delayed = self.delayed.front().map(|(when, _)| *when);
        delayed.into_iter().chain((self.held > 0 || self.flying > 0).then(|| now + OFTEN)).min()
    }

    /// Begins: first with what an earlier back-end had in flight, where that is known.
    pub(super) fn start(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        inflight: Option<QueueInflight>,
        desk: &Desk,
    ) {
        self.forget();
        self.slots.resize_with(queue.size().into(), Slot::default);
        self.inflight = inflight;
        self.phase = Phase::On;
        if !queue.is_valid(memory) {
            return self.breaks(&"its parts are not in guest memory");
        }
        let Ok(Wrapping(used)) = queue.used_idx(memory, Ordering::Acquire) else {
            return self.breaks(&"its used ring is not in guest memory");
        };
        queue.set_next_used(used);
        let Some(again) = self.inflight.as_mut().and_then(|tracked| tracked.recover(used)) else { return };
        queue.set_next_avail(used.wrapping_add(again.len() as u16));
        for head in again {
            self.take(queue, memory, head, desk);
        }
    }

    /// Takes no more from the guest.
    pub(super) fn stop(&mut self) {
        self.phase = Phase::Off;
    }

    /// Ends, with nothing at the drive any more. What was not done is done by whoever goes on with the ring, where
    /// somebody can know of it; else it has failed.
    pub(super) fn end(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap) {
        if self.inflight.is_none() {
            for head in 0..self.slots.len() as u16 {
                if self.slots.get(usize::from(head)).is_some_and(|slot| slot.state != State::Free) {
                    self.answer(queue, memory, head, FAILED);
                }
            }
        }
        self.forget();
    }

    /// Ends at once, whatever the drive has of it. Nothing is written for it any more.
    pub(super) fn abandon(&mut self) {
        self.forget();
        self.told = false;
    }

    fn forget(&mut self) {
        // What was answered before is still to be told.
        let Self { index, life, last_ticket, told, .. } = *self;
        let new = Self::new(index, Arc::clone(&self.counts));
        *self = Self { life: life.wrapping_add(1), last_ticket, told, ..new };
    }

    /// Submits what waits, takes what the guest offers, and submits that; whether there was anything. It takes [`TURN`]
    /// at most: a guest that offers as fast as it is answered keeps nobody here.
    pub(super) fn pull(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        desk: &mut Desk,
        enabled: bool,
    ) -> bool {
        let mut did = self.submit(queue, memory, desk);
        for _ in 0..TURN {
            if !enabled || self.phase != Phase::On {
                break;
            }
            let head = match queue.iter(memory) {
                Ok(mut chains) => chains.next().map(|chain| chain.head_index()),
                Err(error) => {
                    self.breaks(&error);
                    break;
                }
            };
            let Some(head) = head else { break };
            did = true;
            let free = self.slots.get(usize::from(head)).is_some_and(|slot| slot.state == State::Free);
            if !free {
                self.breaks(&format_args!("descriptor {head} is offered twice, or there is none"));
                break;
            }
            if let Some(tracked) = &mut self.inflight {
                tracked.begin(head);
            }
            self.take(queue, memory, head, desk);
            self.submit(queue, memory, desk);
        }
        did
    }

    /// The drive has done, or not done, what it was given in this life of the ring.
    pub(super) fn completed(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        (life, head): (u16, u16),
        result: Result<(), Fault>,
    ) {
        if life != self.life {
            return;
        }
        let Some(slot) = self.slots.get_mut(usize::from(head)).filter(|slot| slot.state == State::Flying)
        else {
            return;
        };
        self.flying -= 1;
        match result {
            Ok(()) => self.answer(queue, memory, head, OK),
            Err(Fault::Withheld) => self.hold(head),
            // Its pages went by force, or for a moment while others of their mapping went. Who knows is asked, once.
            Err(Fault::Memory) if slot.since.is_none() => self.hold(head),
            Err(fault) => {
                log::warn!("queue {}: request {head} has failed: {fault:?}", self.index);
                self.answer(queue, memory, head, FAILED);
            }
        }
    }

    /// What the session said of a held request's pages.
    pub(super) fn answered(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        head: u16,
        ticket: u64,
        admits: Admits,
    ) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return };
        if slot.state != State::Held(ticket) {
            return;
        }
        self.held -= 1;
        slot.state = State::Waiting;
        match admits {
            Admits::Never => {
                self.counts.refused(Refusal::NotShared);
                self.answer(queue, memory, head, FAILED);
            }
            Admits::Open | Admits::Later => self.delayed.push_back((Instant::now() + AGAIN, head)),
        }
    }

    /// Looks at what time has brought.
    pub(super) fn tick(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, now: Instant) {
        while self.delayed.front().is_some_and(|(when, _)| *when <= now) {
            let Some((_, head)) = self.delayed.pop_front() else { break };
            // Its pages are said to be open, again and again, and the drive takes nothing.
            match self.is_over(head, now) {
                true => self.give_up(queue, memory, head),
                false => self.waiting.push_back(head),
            }
        }
        if self.held == 0 {
            return;
        }
        for head in 0..self.slots.len() as u16 {
            let held =
                self.slots.get(usize::from(head)).is_some_and(|slot| matches!(slot.state, State::Held(_)));
            if held && self.is_over(head, now) {
                self.held -= 1;
                self.give_up(queue, memory, head);
            }
        }
    }

    /// Whether a request was held for too long.
    fn is_over(&self, head: u16, now: Instant) -> bool {
        let since = self.slots.get(usize::from(head)).and_then(|slot| slot.since);
        since.is_some_and(|since| now.saturating_duration_since(since) > PATIENCE)
    }

    fn give_up(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, head: u16) {
        let seconds = PATIENCE.as_secs();
        log::warn!("queue {}: a request has failed whose memory was withheld for {seconds} s", self.index);
        self.counts.refused(Refusal::HeldTooLong);
        self.answer(queue, memory, head, FAILED);
    }

    /// Whether the guest is to be told that there are answers; asked once.
    pub(super) fn take_told(&mut self) -> bool {
        std::mem::take(&mut self.told)
    }

    /// Reads a request: it waits then, or is answered at once.
    fn take(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, head: u16, desk: &Desk) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return };
        let write_through = desk.write_through.load(Ordering::Acquire);
        let limits = Limits { drive: &desk.geometry, read_only: desk.read_only, write_through };
        let table = GuestAddress(queue.desc_table());
        let read = self.chain.read(memory, table, queue.size(), head, limits, &mut slot.segments);
        let request = match read {
            Ok(request) => request,
            Err(error) => return self.breaks(&error),
        };
        *slot = Slot {
            state: State::Waiting,
            since: None,
            kind: request.kind,
            op: None,
            bytes: 0,
            status: request.status,
            written: request.written,
            segments: std::mem::take(&mut slot.segments),
        };
        match request.wanted {
            Wanted::Drive(op) => {
                slot.op = Some(op);
                if let Op::Read { blocks, .. } | Op::Write { blocks, .. } = op {
                    slot.bytes = u64::from(blocks) * u64::from(desk.geometry.block);
                }
                self.waiting.push_back(head);
            }
            Wanted::Id => {
                let status = if tell_id(memory, &slot.segments, &desk.geometry) { OK } else { FAILED };
                self.answer(queue, memory, head, status);
            }
            Wanted::Status(status) => self.answer(queue, memory, head, status),
        }
    }

    /// Gives the drive what waits, as far as it has room; whether there was anything.
    fn submit(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, desk: &mut Desk) -> bool {
        let mut did = false;
        while let Some(head) = self.waiting.front().copied() {
            let slot = self.slots.get_mut(usize::from(head)).filter(|slot| slot.state == State::Waiting);
            let Some((slot, op)) = slot.and_then(|slot| slot.op.map(|op| (slot, op))) else {
                self.waiting.pop_front();
                continue;
            };
            match desk.drive.submit(tag(self.life, self.index, head), &op, &slot.segments) {
                Submitted::Full => break,
                Submitted::Started => {
                    slot.state = State::Flying;
                    self.flying += 1;
                }
                Submitted::Closed => self.hold(head),
                Submitted::Lost | Submitted::Wrong => self.answer(queue, memory, head, FAILED),
            }
            self.waiting.pop_front();
            did = true;
        }
        did
    }

    /// A page of a request is not open: whoever knows why is asked.
    fn hold(&mut self, head: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return };
        self.last_ticket += 1;
        slot.state = State::Held(self.last_ticket);
        if slot.since.is_none() {
            slot.since = Some(Instant::now());
            self.counts.holds();
        }
        self.held += 1;
        self.questions.push(Question {
            head,
            ticket: self.last_ticket,
            pages: slot.segments.iter().filter_map(pages).collect(),
            writes: matches!(slot.op, Some(Op::Read { .. })),
        });
    }

    /// Answers a request.
    fn answer(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, head: u16, status: u8) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return };
        slot.state = State::Free;
        // Before the guest can know of it: whoever has seen an answer finds it counted.
        self.counts.answered(slot.kind, status, slot.bytes);
        // Where the place for the status has gone meanwhile, nobody reads it.
        let _ = memory.write_obj(status, slot.status);
        let len = if status == OK { slot.written.saturating_add(1) } else { 1 };
        if let Some(tracked) = &self.inflight {
            tracked.telling(head);
        }
        if let Err(error) = queue.add_used(memory, head, len) {
            return self.breaks(&error);
        }
        if let Some(tracked) = &self.inflight {
            tracked.told(head, queue.next_used());
        }
        self.told = true;
    }

    fn breaks(&mut self, why: &dyn Display) {
        if self.phase == Phase::On {
            log::warn!("queue {}: {why}; it rests until the guest sets it up anew", self.index);
        }
        self.phase = Phase::Broken;
    }
}

/// Writes the drive's name into the guest's memory; whether it is all there.
fn tell_id(memory: &GuestMemoryMmap, segments: &[Segment], drive: &Geometry) -> bool {
    let id = request::id(drive);
    let mut rest = &id[..];
    for segment in segments {
        let (now, then) = rest.split_at(rest.len().min(segment.len as usize));
        if memory.write_slice(now, GuestAddress(segment.iova.0)).is_err() {
            return false;
        }
        rest = then;
    }
    rest.is_empty()
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
