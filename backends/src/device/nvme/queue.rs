//! One I/O queue pair, for the one thread that owns it.
//!
//! [`Queue::submit`] and [`Queue::complete`] take no lock, make no system call except for a doorbell that is not
//! mapped, and allocate nothing once their buffers have grown. A request is in the admission window from before its
//! commands are written until the last of them has completed, so that no page that it accesses is unmapped meanwhile.
//!
//! A request may need several commands; its owner gets one completion. A request that needs more commands than it may
//! have takes *turns*: some of its commands, and more when the last of these has completed. Between two turns it
//! leaves the window, so that an unmap waits for one turn and not for all of a long request. After the controller was
//! initialized anew, every request that was in flight enters the window again and is submitted again. A block may so
//! be written twice with the same bytes; that cannot be observed, because the first write was never reported to the
//! owner.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::cids::{self, Cids};
use super::command::{Command, Completion, dsm_range};
use super::controller::Doorbell;
use super::data::{LIST_WORDS, Part, Position, data_pointer, plan};
use super::drive::{Generation, IdleQueue, Inner};
use super::queue_pair::QueuePair;
use super::request::{Completed, Fault, Op, Submitted};
use super::watchdog::WatchdogEvent;
use crate::window::{Entered, Segment};

/// The size of a command's list, in bytes.
pub(super) const LIST_BYTES: u64 = LIST_WORDS as u64 * 8;
/// The number of attempts after which a request fails.
const MAX_ATTEMPTS: u8 = 3;
/// The time after which requests of a drive that is stopped by a fence are returned to their owner.
const STOPPED_TIMEOUT: Duration = Duration::from_secs(5);
/// The interval between two scans for overdue commands, in milliseconds.
const SCAN_INTERVAL_MS: u64 = 100;

/// The state of a request slot.
#[derive(Debug)]
struct Request {
    tag: u32,
    op: Op,
    segments: Vec<Segment>,
    /// The number of commands that have not completed; 0 if the slot is free.
    outstanding: u16,
    /// The position of this turn in the request's memory.
    turn_from: Position,
    /// The number of blocks that the turns before this one have transferred.
    blocks_done: u64,
    /// The number of blocks that this turn transfers.
    turn_blocks: u64,
    /// The position of the next turn, if there is one.
    next_from: Option<Position>,
    /// The first error of a command of this turn; a memory fault replaces another error.
    fault: Option<Fault>,
    /// The number of attempts that ended by a timeout, an interruption or a recovery. Fences are not counted.
    attempts: u8,
    /// The time at which this turn was submitted, in milliseconds of [`now_ms`].
    submitted_ms: u64,
    /// Set once the watchdog has been notified that the request is overdue.
    overdue: bool,
}

/// An I/O queue, for one thread.
#[derive(Debug)]
pub struct Queue {
    inner: Arc<Inner>,
    index: u16,
    /// The generation in which the queue pair was created.
    generation: Generation,
    queue_pair: QueuePair,
    requests: Vec<Request>,
    /// The free request slots.
    free: Vec<u16>,
    /// The CIDs, and the requests of the outstanding commands.
    cids: Cids,
    /// The commands of the turn that is being planned.
    parts: Vec<Part>,
    /// The position of the turn after the one that is being planned, if there is one.
    next_from: Option<Position>,
    /// True while the controller has not been notified of the last commands.
    doorbell_pending: bool,
    /// Set after a completion whose CID was not outstanding: all completions are ignored until the controller has
    /// been reset.
    ignores_completions: bool,
    /// The number of recoveries ([`Inner::recoveries`]) up to which attempts are counted.
    recoveries: u32,
    /// Requests that have ended, not yet returned to the owner.
    ended: Vec<Completed>,
    /// The time of the last scan for overdue commands, in milliseconds of [`now_ms`].
    last_scan_ms: u64,
    /// The queue pair of the previous owner and its generation, until it is known whether this generation is still
    /// current.
    inherited: Option<(Generation, QueuePair)>,
}

impl Queue {
    /// Returns a queue that continues where the previous owner stopped, if there was one.
    pub(super) fn new(inner: Arc<Inner>, index: u16, inherited: Option<IdleQueue>) -> Self {
        let entries = inner.entries;
        let requests = entries - 1; // a full queue has one empty entry
        let (inherited, cids) = match inherited {
            Some(IdleQueue { generation, queue_pair, cids }) => (Some((generation, queue_pair)), cids),
            None => (None, Cids::new(requests)),
        };
        let request = |_| Request {
            tag: 0,
            op: Op::Flush,
            segments: Vec::new(),
            outstanding: 0,
            turn_from: Position::default(),
            blocks_done: 0,
            turn_blocks: 0,
            next_from: None,
            fault: None,
            attempts: 0,
            submitted_ms: 0,
            overdue: false,
        };
        Self {
            generation: Generation::NONE,
            queue_pair: QueuePair::new(index + 1, entries, inner.queue_offset(index)),
            index,
            requests: (0..requests).map(request).collect(),
            free: (0..requests).rev().collect(),
            cids,
            parts: Vec::new(),
            next_from: None,
            doorbell_pending: false,
            ignores_completions: false,
            recoveries: inner.recoveries.load(Ordering::Acquire),
            ended: Vec::new(),
            last_scan_ms: 0,
            inherited,
            inner,
        }
    }

    /// Submits a request; `tag` identifies it in its completion. The controller sees it at the next [`Queue::ring`].
    pub fn submit(&mut self, tag: u32, op: &Op, segments: &[Segment]) -> Submitted {
        match self.sync_generation() {
            DriveState::Up => {}
            DriveState::Halted => return Submitted::Closed,
            DriveState::Lost => return Submitted::Lost,
        }
        // The slot stays in the list until the request is in the window: on any return before, nothing has happened.
        let Some(&slot) = self.free.last() else { return Submitted::Full };
        let Some(max_commands) = self.command_budget() else { return Submitted::Full };
        if !self.plan(op, segments, Position::default(), max_commands) {
            return Submitted::Wrong;
        }
        if self.inner.window.enter(self.window_slot(slot), segments) != Entered::In {
            return Submitted::Closed;
        }
        self.free.pop();
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return Submitted::Full };
        (request.tag, request.op, request.attempts) = (tag, *op, 0);
        (request.turn_from, request.blocks_done) = (Position::default(), 0);
        request.segments.clear();
        request.segments.extend_from_slice(segments);
        self.issue(slot);
        Submitted::Started
    }

    /// Notifies the controller of all commands since the last call.
    pub fn ring(&mut self) {
        if std::mem::take(&mut self.doorbell_pending) {
            self.doorbell(Doorbell::Submission, self.queue_pair.tail());
        }
    }

    /// Appends the requests that have ended to `done`.
    pub fn complete(&mut self, done: &mut Vec<Completed>) {
        if matches!(self.sync_generation(), DriveState::Up) {
            self.reap(done);
            self.report_overdue();
        }
        done.append(&mut self.ended);
    }

    /// Returns an eventfd that is readable when there may be completions, and at least every second besides. The
    /// owner reads it and then calls [`Queue::complete`] soon: a reset of the controller waits for that.
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        self.inner.queue_slot(self.index).interrupt.as_fd()
    }

    /// Returns the number of requests in flight.
    pub fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    fn window_slot(&self, slot: u16) -> usize {
        usize::from(self.index) * usize::from(self.inner.entries) + usize::from(slot)
    }

    /// Returns the number of commands that a request may have in one turn; None if no CID is free. At most half of a
    /// queue, so that there is room for other requests.
    fn command_budget(&self) -> Option<usize> {
        let free = self.cids.available();
        (free > 0).then(|| free.min(self.cids.len().div_ceil(2)))
    }

    /// Plans a turn of at most `max_commands` commands, with the request's memory from `from` on. False if the
    /// request is malformed.
    fn plan(&mut self, op: &Op, segments: &[Segment], from: Position, max_commands: usize) -> bool {
        let geometry = &self.inner.geometry;
        self.next_from = None;
        match *op {
            Op::Read { first, blocks } | Op::Write { first, blocks, .. } => {
                let bytes: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
                let inside = first.checked_add(blocks.into()).is_some_and(|end| end <= geometry.blocks);
                if blocks == 0 || bytes != u64::from(blocks) * u64::from(geometry.block) || !inside {
                    return false;
                }
                let planned = plan(self.inner.limits, segments, from, max_commands, &mut self.parts);
                self.next_from = planned.unwrap_or(None);
                planned.is_ok() && !self.parts.is_empty()
            }
            Op::Flush => true,
            Op::WriteZeroes { first, blocks, .. } | Op::Discard { first, blocks } => {
                let max_blocks = match op {
                    Op::Discard { .. } => geometry.discard,
                    _ => geometry.write_zeroes,
                };
                let inside = first.checked_add(blocks.into()).is_some_and(|end| end <= geometry.blocks);
                blocks > 0 && blocks <= max_blocks && inside
            }
        }
    }

    /// Writes the commands of the planned turn of a request, which is in the window.
    fn issue(&mut self, slot: u16) {
        let (inner, now) = (Arc::clone(&self.inner), now_ms());
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        (request.outstanding, request.fault, request.submitted_ms, request.overdue) = (0, None, now, false);
        (request.turn_blocks, request.next_from) = (0, self.next_from);
        let (namespace, block) = (inner.geometry.namespace, u64::from(inner.geometry.block));
        let transfers = matches!(request.op, Op::Read { .. } | Op::Write { .. });
        for nth in 0..if transfers { self.parts.len() } else { 1 } {
            let Some(cid) = self.cids.allocate(slot) else { break };
            let at = inner.list_offset(self.index, cids::index(cid));
            let store = |word: usize, value| inner.memory.file().store(at + word as u64 * 8, value);
            let iova = inner.memory.iova(at);
            let command = match (request.op, self.parts.get(nth)) {
                // `Queue::plan` has checked that the whole request lies in the namespace and in its memory.
                (Op::Read { first, .. } | Op::Write { first, .. }, Some(part)) => {
                    let blocks = (part.bytes / block) as u32;
                    let from = first + request.blocks_done + request.turn_blocks;
                    request.turn_blocks += u64::from(blocks);
                    data_pointer(*part, &request.segments, iova, store).map(|data| match request.op {
                        Op::Write { fua, .. } => Command::write(namespace, from, blocks, data, fua),
                        _ => Command::read(namespace, from, blocks, data),
                    })
                }
                (Op::WriteZeroes { first, blocks, unmap, fua }, _) => {
                    Ok(Command::write_zeroes(namespace, first, blocks, unmap, fua))
                }
                (Op::Discard { first, blocks }, _) => {
                    let words = dsm_range(first, blocks);
                    let stored = words.into_iter().enumerate().try_for_each(|(nth, word)| store(nth, word));
                    stored.map(|()| Command::discard(namespace, iova))
                }
                _ => Ok(Command::flush(namespace)),
            };
            let pushed = command.and_then(|command| self.queue_pair.push(&inner.memory, command, cid));
            if let Err(failed) = pushed {
                log::error!("{}: {failed}", inner.name);
                self.cids.retire(cid);
                request.fault = Some(Fault::Lost);
                break;
            }
            request.outstanding += 1;
            self.doorbell_pending = true;
        }
        if request.outstanding == 0 {
            self.end_request(slot, Err(Fault::Lost));
        }
    }

    /// Takes completions from the completion queue.
    fn reap(&mut self, done: &mut Vec<Completed>) {
        let mut head = None;
        // At most one pass through the queue: a controller that posts without end must not block the owner.
        for _ in 0..self.inner.entries {
            if self.ignores_completions {
                break;
            }
            let (completion, next) = match self.queue_pair.pop(&self.inner.memory) {
                Ok(Some(taken)) => taken,
                Ok(None) => break,
                Err(failed) => {
                    log::error!("{}: {failed}", self.inner.name);
                    break;
                }
            };
            head = Some(next);
            self.complete_command(completion);
        }
        if let Some(head) = head {
            self.doorbell(Doorbell::Completion, head);
            self.ring();
        }
        done.append(&mut self.ended);
    }

    fn complete_command(&mut self, completion: Completion) {
        let Completion { cid, status, .. } = completion;
        let retired = self.cids.retire(cid);
        let request = retired.and_then(|slot| Some((slot, self.requests.get_mut(usize::from(slot))?)));
        let Some((slot, request)) = request else {
            log::error!(
                "{}: queue {}: a completion has CID {cid:#x}, which is not outstanding",
                self.inner.name,
                self.queue_pair.qid
            );
            // Its other completions may be wrong as well: none is believed before the controller has been reset.
            self.ignores_completions = true;
            self.inner.notify_watchdog(WatchdogEvent::ProtocolError { generation: self.generation });
            return;
        };
        request.outstanding = request.outstanding.saturating_sub(1);
        match status {
            0 => {}
            Completion::TRANSFER_ERROR => request.fault = Some(Fault::Memory),
            status => _ = request.fault.get_or_insert(Fault::Status(status)),
        }
        if request.outstanding > 0 {
            return;
        }
        match request.fault {
            // Aborted after its deadline, or interrupted by the controller, which expects a retry.
            Some(Fault::Status(Completion::ABORTED | Completion::INTERRUPTED)) => {
                self.retry(slot, true, usize::MAX);
            }
            None if request.next_from.is_some() => self.next_turn(slot),
            fault => self.end_request(slot, fault.map_or(Ok(()), Err)),
        }
    }

    /// Ends a request that accesses no memory any more: it leaves the window.
    fn end_request(&mut self, slot: u16, result: Result<(), Fault>) {
        self.inner.window.leave(self.window_slot(slot));
        self.report_result(slot, result);
    }

    /// Returns a request to the owner. It stays in the window if its memory may still be accessed.
    fn report_result(&mut self, slot: u16, result: Result<(), Fault>) {
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        request.outstanding = 0;
        if std::mem::take(&mut request.overdue) {
            self.inner.queue_slot(self.index).overdue.fetch_sub(1, Ordering::AcqRel);
        }
        self.ended.push(Completed { tag: request.tag, result });
        self.free.push(slot);
    }

    /// Notifies the watchdog of commands that have exceeded the deadline.
    fn report_overdue(&mut self) {
        if self.in_flight() == 0 {
            return;
        }
        let now = now_ms();
        if now.saturating_sub(self.last_scan_ms) < SCAN_INTERVAL_MS {
            return;
        }
        self.last_scan_ms = now;
        for (cid, slot) in self.cids.outstanding() {
            let Some(request) = self.requests.get_mut(usize::from(slot)) else { continue };
            if request.overdue || now.saturating_sub(request.submitted_ms) < self.inner.deadline_ms {
                continue;
            }
            request.overdue = true;
            self.inner.queue_slot(self.index).overdue.fetch_add(1, Ordering::AcqRel);
            let (generation, qid) = (self.generation, self.queue_pair.qid);
            self.inner.notify_watchdog(WatchdogEvent::CommandOverdue { generation, qid, cid });
        }
    }

    fn doorbell(&self, which: Doorbell, value: u16) {
        let at = self.inner.doorbell(self.queue_pair.qid, which);
        if let Err(error) = self.inner.registers.ring(at, value.into()) {
            log::warn!("{error}");
            self.inner.notify_watchdog(WatchdogEvent::ProtocolError { generation: self.generation });
        }
    }

    /// Follows the controller's generation: parks while it is halted, and starts the queue anew once it is
    /// initialized.
    fn sync_generation(&mut self) -> DriveState {
        let generation = self.inner.generation();
        if generation == self.generation && generation.is_up() {
            return DriveState::Up;
        }
        self.enter_generation()
    }

    /// The part of [`Queue::sync_generation`] for a generation that has changed, or is not up.
    #[cold]
    fn enter_generation(&mut self) -> DriveState {
        let inner = Arc::clone(&self.inner);
        let queue_slot = inner.queue_slot(self.index);
        loop {
            let generation = inner.generation();
            if !generation.is_up() {
                self.doorbell_pending = false;
                queue_slot.parked.store(true, Ordering::SeqCst);
                if !generation.is_lost() {
                    // It is unknown if the drive will be attached again: after a while the owner decides.
                    if inner.is_stopped_for(STOPPED_TIMEOUT) {
                        self.fail_all(Fault::Withheld, Self::end_request);
                    }
                    return DriveState::Halted;
                }
                // A controller that is given up but not stopped may still access the memory: the requests stay in the
                // window.
                self.fail_all(
                    Fault::Lost,
                    if generation.is_unstopped() { Self::report_result } else { Self::end_request },
                );
                return DriveState::Lost;
            }
            // Unparked is stored before the generation is read again, as `Inner::set_generation` stores the
            // generation before `halt` reads `parked`, each with a SeqCst fence in between. So a thread that halts
            // the controller now either finds this queue unparked and waits for it, or its new generation is read
            // here.
            queue_slot.parked.store(false, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if inner.generation() != generation {
                continue;
            }
            // The queue of the previous owner continues only in the generation in which it was created.
            if let Some((_, queue_pair)) =
                self.inherited.take().filter(|(created_in, _)| *created_in == generation)
            {
                (self.generation, self.queue_pair) = (generation, queue_pair);
            }
            if generation != self.generation {
                self.generation = generation;
                self.queue_pair =
                    QueuePair::new(self.index + 1, inner.entries, inner.queue_offset(self.index));
                self.resubmit_all();
            }
            return DriveState::Up;
        }
    }

    /// Ends all requests in flight, by `end`.
    fn fail_all(&mut self, fault: Fault, end: impl Fn(&mut Self, u16, Result<(), Fault>)) {
        self.reset_commands();
        for slot in 0..self.requests.len() as u16 {
            if !self.free.contains(&slot) {
                end(self, slot, Err(fault));
            }
        }
    }

    /// Submits all requests again that were in flight, in the new generation.
    fn resubmit_all(&mut self) {
        self.reset_commands();
        // An attempt that a fence has ended is not counted: any number of fences may come. A recovery is, because
        // each of the requests may be its cause.
        let recoveries = self.inner.recoveries.load(Ordering::Acquire);
        let count_attempt = std::mem::replace(&mut self.recoveries, recoveries) != recoveries;
        let mut remaining = self.in_flight();
        for slot in 0..self.requests.len() as u16 {
            if !self.free.contains(&slot) {
                remaining -= 1;
                // Leaves a CID for each request that follows, which is enough: there are as many CIDs as requests.
                self.retry(slot, count_attempt, self.cids.available().saturating_sub(remaining));
            }
        }
        self.ring();
    }

    /// Submits a request again from its beginning, of which nothing is in flight; its first turn has at most
    /// `max_commands` commands. With `count_attempt` it fails after [`MAX_ATTEMPTS`].
    fn retry(&mut self, slot: u16, count_attempt: bool, max_commands: usize) {
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        request.attempts += u8::from(count_attempt);
        (request.turn_from, request.blocks_done) = (Position::default(), 0);
        if request.attempts >= MAX_ATTEMPTS {
            return self.end_request(slot, Err(Fault::TimedOut));
        }
        self.begin_turn(slot, max_commands);
    }

    /// Begins the next turn of a request whose current turn has completed.
    fn next_turn(&mut self, slot: u16) {
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        let Some(next) = request.next_from.take() else { return };
        (request.turn_from, request.blocks_done) = (next, request.blocks_done + request.turn_blocks);
        self.begin_turn(slot, usize::MAX);
    }

    /// Begins a turn of a request of which nothing is in flight, if its pages are still open.
    fn begin_turn(&mut self, slot: u16, max_commands: usize) {
        let (window_slot, budget) = (self.window_slot(slot), self.command_budget());
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        if std::mem::take(&mut request.overdue) {
            self.inner.queue_slot(self.index).overdue.fetch_sub(1, Ordering::AcqRel);
        }
        let (op, from, segments) = (request.op, request.turn_from, std::mem::take(&mut request.segments));
        // Leaves the window and enters it again: an unmap that waits for the request may proceed in between.
        self.inner.window.leave(window_slot);
        let entered = self.inner.window.enter(window_slot, &segments);
        let planned = budget.map(|budget| self.plan(&op, &segments, from, budget.min(max_commands)));
        if let Some(request) = self.requests.get_mut(usize::from(slot)) {
            request.segments = segments;
        }
        match (entered, planned) {
            (Entered::In, Some(true)) => self.issue(slot),
            (Entered::In, Some(false)) => self.end_request(slot, Err(Fault::Wrong)),
            (Entered::In, None) => self.end_request(slot, Err(Fault::Lost)),
            (Entered::Paused | Entered::Closed, _) => self.end_request(slot, Err(Fault::Withheld)),
        }
    }

    /// Forgets all commands, after a reset of the controller.
    fn reset_commands(&mut self) {
        self.ignores_completions = false;
        self.cids.retire_all();
        self.doorbell_pending = false;
    }
}

impl Drop for Queue {
    /// Returns a queue with nothing in flight to its slot, for another owner. Otherwise the slot stays taken, and
    /// what is in flight stays in the window until a fence stops the controller.
    fn drop(&mut self) {
        let queue_slot = self.inner.queue_slot(self.index);
        queue_slot.parked.store(true, Ordering::SeqCst);
        if self.in_flight() == 0 {
            let (generation, queue_pair) =
                self.inherited.take().unwrap_or((self.generation, self.queue_pair));
            queue_slot.return_queue(IdleQueue {
                generation,
                queue_pair,
                cids: std::mem::take(&mut self.cids),
            });
        }
    }
}

/// The state of the drive, as the owner of a queue sees it.
enum DriveState {
    Up,
    Halted,
    Lost,
}

/// Returns the monotonic time in milliseconds, by the coarse clock, which is cheap to read.
pub(super) fn now_ms() -> u64 {
    let time = clock_gettime(ClockId::MonotonicCoarse);
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}
