//! One virtqueue while it is served: requests from the guest to the drive, and their completions back to the guest. A ring
//! belongs to one worker.
//!
//! A request is *outstanding* at the drive, *pending* until there is room there, or *deferred* (`held` in status and metrics):
//! a page of it is not mapped for the drive at present. A deferred request waits for the session's answer about its pages. It
//! fails only if they are not the guest's to give ([`DmaAccess::Never`]), or after [`DEFERRAL_TIMEOUT`].

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

use super::counts::WorkerCounters;
use super::inflight::QueueInflight;
use super::request::{self, Action, Chain, Limits};
use super::slot::{Slot, SlotState, pages, tag};
use crate::gate::DmaAccess;
use crate::observe::disk::Refusal;

/// The guest's memory, which the front-end replaces when its memory table changes.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
/// A virtqueue, shared by front-end and worker under a lock.
pub(super) type Vring = VringMutex<Memory>;

/// The number of descriptors of a virtqueue, at most. A tag has ten bits for a head ([`super::slot::tag`]).
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;
/// The number of virtqueues, at most. A tag has six bits for a ring ([`super::slot::tag`]).
pub(super) const MAX_QUEUES: u16 = 64;
/// The number of requests that are taken from a ring before the other rings' turn.
const MAX_REQUESTS_PER_PULL: usize = 128;
/// The time from the first deferral of a request to its failure.
const DEFERRAL_TIMEOUT: Duration = Duration::from_secs(30);
/// The time after which a request is submitted again whose pages were reported as open although the drive could not use them.
const RETRY_DELAY: Duration = Duration::from_millis(1);

const STATUS_OK: u8 = VIRTIO_BLK_S_OK as u8;
pub(super) const STATUS_IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;

/// The drive's queue and properties, as all rings of one worker use them.
#[derive(Debug)]
pub(super) struct RingContext {
    pub(super) drive: DriveQueue,
    pub(super) geometry: Geometry,
    pub(super) read_only: bool,
    /// True while a write must be on the medium before it is answered. Read after the available ring, so that it applies to
    /// every write that is offered after it was set.
    pub(super) write_through: Arc<AtomicBool>,
}

/// A query of the session about the pages of a deferred request.
#[derive(Debug)]
pub(super) struct PageQuery {
    pub(super) head: u16,
    /// Identifies the query: the answer to an earlier one of the same head is ignored.
    pub(super) ticket: u64,
    pub(super) pages: Vec<PageRange<Iova>>,
    /// True if the drive would write to the pages.
    pub(super) writes: bool,
}

/// The state of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It takes requests from the guest.
    Running,
    /// It takes none.
    Stopped,
    /// The guest has written something invalid into it: it takes no requests until it is set up again.
    Broken,
}

/// A virtqueue while it is served.
#[derive(Debug)]
pub(super) struct Ring {
    index: u16,
    /// Grows with every start and end of the ring. Completions of an earlier generation are dropped.
    generation: u16,
    phase: Phase,
    /// The requests, by head.
    slots: Vec<Slot>,
    /// The heads of requests to submit, in order.
    pending: VecDeque<u16>,
    /// The heads of requests to submit again, and when, in order.
    retries: VecDeque<(Instant, u16)>,
    /// The number of requests in flight at the drive.
    outstanding: u32,
    /// The number of requests that wait for the answer to their query.
    deferred: u32,
    inflight: Option<QueueInflight>,
    chain: Chain,
    /// True if a used buffer has been added since the guest was last notified.
    notify: bool,
    last_ticket: u64,
    counts: Arc<WorkerCounters>,
    /// The queries that the worker has not sent to the session yet.
    pub(super) queries: Vec<PageQuery>,
}

impl Ring {
    pub(super) fn new(index: u16, counts: Arc<WorkerCounters>) -> Self {
        Self {
            index,
            generation: 0,
            phase: Phase::Stopped,
            slots: Vec::new(),
            pending: VecDeque::new(),
            retries: VecDeque::new(),
            outstanding: 0,
            deferred: 0,
            inflight: None,
            chain: Chain::default(),
            notify: false,
            last_ticket: 0,
            counts,
            queries: Vec::new(),
        }
    }

    /// Returns true while it takes requests from the guest.
    pub(super) fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// Returns the number of its requests that are in flight at the drive.
    pub(super) fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// Returns true while one of its requests waits for room at the drive.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Returns the number of requests in flight at the drive, and of those that are deferred or wait for their retry.
    pub(super) fn gauges(&self) -> (u64, u64) {
        (self.outstanding.into(), u64::from(self.deferred) + self.retries.len() as u64)
    }

    /// Returns the time by which [`Ring::tick`] must be called although nothing happens; none if there is no need.
    pub(super) fn next_tick(&self, now: Instant) -> Option<Instant> {
        const TICK_INTERVAL: Duration = Duration::from_millis(100);
        let retry = self.retries.front().map(|(when, _)| *when);
        retry
            .into_iter()
            .chain((self.deferred > 0 || self.outstanding > 0).then(|| now + TICK_INTERVAL))
            .min()
    }

    /// Starts the ring. Requests that an earlier back-end had in flight are served first, where they were tracked.
    pub(super) fn start(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        inflight: Option<QueueInflight>,
        context: &RingContext,
    ) {
        self.reset();
        self.slots.resize_with(queue.size().into(), Slot::default);
        self.inflight = inflight;
        self.phase = Phase::Running;
        if !queue.is_valid(memory) {
            return self.mark_broken(&"its parts are not in guest memory");
        }
        let Ok(Wrapping(used)) = queue.used_idx(memory, Ordering::Acquire) else {
            return self.mark_broken(&"its used ring is not in guest memory");
        };
        queue.set_next_used(used);
        let Some(recovered) = self.inflight.as_mut().and_then(|tracked| tracked.recover(used)) else {
            return;
        };
        // The requests taken from the available ring so far are those in the used ring and those in flight.
        queue.set_next_avail(used.wrapping_add(recovered.len() as u16));
        for head in recovered {
            self.accept(queue, memory, head, context);
        }
    }

    /// Takes no more requests from the guest.
    pub(super) fn stop(&mut self) {
        self.phase = Phase::Stopped;
    }

    /// Ends the ring once no request is in flight at the drive. Unfinished requests are left to the next back-end if they are
    /// tracked, and fail otherwise.
    pub(super) fn finish(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap) {
        if self.inflight.is_none() {
            for head in 0..self.slots.len() as u16 {
                if self.slots.get(usize::from(head)).is_some_and(|slot| slot.state != SlotState::Free) {
                    self.answer(queue, memory, head, STATUS_IOERR);
                }
            }
        }
        self.reset();
    }

    /// Ends the ring although requests are in flight at the drive. From now on their completions write nothing to guest memory.
    pub(super) fn abandon(&mut self) {
        self.reset();
        self.notify = false;
    }

    fn reset(&mut self) {
        // `notify` survives: the guest is not notified yet of answers that were written before.
        let Self { index, generation, last_ticket, notify, .. } = *self;
        let new = Self::new(index, Arc::clone(&self.counts));
        *self = Self { generation: generation.wrapping_add(1), last_ticket, notify, ..new };
    }

    /// Submits pending requests, then takes and submits new ones from the guest, up to [`MAX_REQUESTS_PER_PULL`], so that a guest
    /// that offers requests as fast as they are answered does not starve other rings. Returns true if there was anything to do.
    pub(super) fn pull(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        context: &mut RingContext,
        enabled: bool,
    ) -> bool {
        let mut progress = self.submit(queue, memory, context);
        for _ in 0..MAX_REQUESTS_PER_PULL {
            if !enabled || self.phase != Phase::Running {
                break;
            }
            let head = match queue.iter(memory) {
                Ok(mut chains) => chains.next().map(|chain| chain.head_index()),
                Err(error) => {
                    self.mark_broken(&error);
                    break;
                }
            };
            let Some(head) = head else { break };
            progress = true;
            let free = self.slots.get(usize::from(head)).is_some_and(|slot| slot.state == SlotState::Free);
            if !free {
                self.mark_broken(&format_args!("descriptor {head} is offered twice, or there is none"));
                break;
            }
            // Before anything is done for the request (vhost-user protocol, "Inflight I/O tracking").
            if let Some(tracked) = &mut self.inflight {
                tracked.mark(head);
            }
            self.accept(queue, memory, head, context);
            self.submit(queue, memory, context);
        }
        progress
    }

    /// Handles a completion of the drive. One of an earlier generation of the ring is dropped.
    pub(super) fn completed(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        (generation, head): (u16, u16),
        result: Result<(), Fault>,
    ) {
        if generation != self.generation {
            return;
        }
        let Some(slot) =
            self.slots.get_mut(usize::from(head)).filter(|slot| slot.state == SlotState::Outstanding)
        else {
            return;
        };
        self.outstanding -= 1;
        match result {
            Ok(()) => self.answer(queue, memory, head, STATUS_OK),
            Err(Fault::Withheld) => self.defer(head),
            // The pages were unmapped by a fence, or for a short time while others of their mapping were unmapped. The session
            // is queried once; a second fault is an error.
            Err(Fault::Memory) if slot.deferred_since.is_none() => self.defer(head),
            Err(fault) => {
                log::warn!("queue {}: request {head} has failed: {fault:?}", self.index);
                self.answer(queue, memory, head, STATUS_IOERR);
            }
        }
    }

    /// Handles the session's answer about the pages of a deferred request. The answer to an earlier query is ignored.
    pub(super) fn query_answered(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        head: u16,
        ticket: u64,
        admits: DmaAccess,
    ) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return };
        if slot.state != SlotState::Deferred(ticket) {
            return;
        }
        self.deferred -= 1;
        slot.state = SlotState::Pending;
        match admits {
            DmaAccess::Never => {
                self.counts.count_refusal(Refusal::NotShared);
                self.answer(queue, memory, head, STATUS_IOERR);
            }
            DmaAccess::Open | DmaAccess::Later => {
                self.retries.push_back((Instant::now() + RETRY_DELAY, head))
            }
        }
    }

    /// Queues the retries that are due, and fails requests that have been deferred for too long.
    pub(super) fn tick(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, now: Instant) {
        while self.retries.front().is_some_and(|(when, _)| *when <= now) {
            let Some((_, head)) = self.retries.pop_front() else { break };
            // The time counts from the first deferral: the session may report the pages as open each time, while the drive is
            // fenced and accepts nothing.
            match self.is_deferral_expired(head, now) {
                true => self.fail_deferred(queue, memory, head),
                false => self.pending.push_back(head),
            }
        }
        if self.deferred == 0 {
            return;
        }
        for head in 0..self.slots.len() as u16 {
            let deferred = self
                .slots
                .get(usize::from(head))
                .is_some_and(|slot| matches!(slot.state, SlotState::Deferred(_)));
            if deferred && self.is_deferral_expired(head, now) {
                self.deferred -= 1;
                self.fail_deferred(queue, memory, head);
            }
        }
    }

    /// Returns true if a request was deferred first more than [`DEFERRAL_TIMEOUT`] ago.
    fn is_deferral_expired(&self, head: u16, now: Instant) -> bool {
        let since = self.slots.get(usize::from(head)).and_then(|slot| slot.deferred_since);
        since.is_some_and(|since| now.saturating_duration_since(since) > DEFERRAL_TIMEOUT)
    }

    fn fail_deferred(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, head: u16) {
        let seconds = DEFERRAL_TIMEOUT.as_secs();
        log::warn!("queue {}: a request has failed whose memory was withheld for {seconds} s", self.index);
        self.counts.count_refusal(Refusal::HeldTooLong);
        self.answer(queue, memory, head, STATUS_IOERR);
    }

    /// Returns true if the guest is to be notified of used buffers, and clears that.
    pub(super) fn take_notify(&mut self) -> bool {
        std::mem::take(&mut self.notify)
    }

    /// Reads a request from guest memory. It is pending then, or is answered at once if it is not for the drive.
    fn accept(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, head: u16, context: &RingContext) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return };
        let write_through = context.write_through.load(Ordering::Acquire);
        let limits = Limits { drive: &context.geometry, read_only: context.read_only, write_through };
        let table = GuestAddress(queue.desc_table());
        let read = self.chain.read(memory, table, queue.size(), head, limits, &mut slot.segments);
        let request = match read {
            Ok(request) => request,
            Err(error) => return self.mark_broken(&error),
        };
        *slot = Slot {
            state: SlotState::Pending,
            deferred_since: None,
            kind: request.kind,
            op: None,
            bytes: 0,
            status: request.status,
            written: request.written,
            segments: std::mem::take(&mut slot.segments),
        };
        match request.action {
            Action::Drive(op) => {
                slot.op = Some(op);
                if let Op::Read { blocks, .. } | Op::Write { blocks, .. } = op {
                    slot.bytes = u64::from(blocks) * u64::from(context.geometry.block);
                }
                self.pending.push_back(head);
            }
            Action::Id => {
                let status = if write_id(memory, &slot.segments, &context.geometry) {
                    STATUS_OK
                } else {
                    STATUS_IOERR
                };
                self.answer(queue, memory, head, status);
            }
            Action::Status(status) => self.answer(queue, memory, head, status),
        }
    }

    /// Submits pending requests while the drive has room. Returns true if there was anything to do.
    fn submit(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, context: &mut RingContext) -> bool {
        let mut progress = false;
        while let Some(head) = self.pending.front().copied() {
            let slot = self.slots.get_mut(usize::from(head)).filter(|slot| slot.state == SlotState::Pending);
            let Some((slot, op)) = slot.and_then(|slot| slot.op.map(|op| (slot, op))) else {
                self.pending.pop_front();
                continue;
            };
            match context.drive.submit(tag(self.generation, self.index, head), &op, &slot.segments) {
                Submitted::Full => break,
                Submitted::Started => {
                    slot.state = SlotState::Outstanding;
                    self.outstanding += 1;
                }
                Submitted::Closed => self.defer(head),
                Submitted::Lost | Submitted::Wrong => self.answer(queue, memory, head, STATUS_IOERR),
            }
            self.pending.pop_front();
            progress = true;
        }
        progress
    }

    /// Defers a request of which a page is not open to the drive, and queries the session about its pages.
    fn defer(&mut self, head: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return };
        self.last_ticket += 1;
        slot.state = SlotState::Deferred(self.last_ticket);
        if slot.deferred_since.is_none() {
            slot.deferred_since = Some(Instant::now());
            self.counts.count_deferral();
        }
        self.deferred += 1;
        self.queries.push(PageQuery {
            head,
            ticket: self.last_ticket,
            pages: slot.segments.iter().filter_map(pages).collect(),
            writes: matches!(slot.op, Some(Op::Read { .. })),
        });
    }

    /// Writes the status of a request, adds its used buffer, and frees its slot.
    fn answer(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, head: u16, status: u8) {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return };
        slot.state = SlotState::Free;
        // Before the guest can see the answer, so that an answer that was seen is also counted.
        self.counts.count_answer(slot.kind, status, slot.bytes);
        // The status byte's memory may have been removed meanwhile. Then the guest does not read it either.
        let _ = memory.write_obj(status, slot.status);
        let len = if status == STATUS_OK { slot.written.saturating_add(1) } else { 1 };
        if let Some(tracked) = &self.inflight {
            tracked.set_last_batch_head(head);
        }
        if let Err(error) = queue.add_used(memory, head, len) {
            return self.mark_broken(&error);
        }
        // Only now: a request whose mark goes before its used buffer is visible would be lost if this process died in between.
        if let Some(tracked) = &self.inflight {
            tracked.unmark(head, queue.next_used());
        }
        self.notify = true;
    }

    /// Takes no more requests until the ring is set up again: a chain without a status byte cannot be answered.
    fn mark_broken(&mut self, why: &dyn Display) {
        if self.phase == Phase::Running {
            log::warn!("queue {}: {why}; it is stopped until the guest sets it up again", self.index);
        }
        self.phase = Phase::Broken;
    }
}

/// Writes the drive's serial number to guest memory (`VIRTIO_BLK_T_GET_ID`). Returns true if all of it was written.
fn write_id(memory: &GuestMemoryMmap, segments: &[Segment], drive: &Geometry) -> bool {
    let id = request::serial_id(drive);
    let mut rest = &id[..];
    for segment in segments {
        let (part, remaining) = rest.split_at(rest.len().min(segment.len as usize));
        if memory.write_slice(part, GuestAddress(segment.iova.0)).is_err() {
            return false;
        }
        rest = remaining;
    }
    rest.is_empty()
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
