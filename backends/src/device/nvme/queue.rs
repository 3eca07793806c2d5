//! One I/O queue pair, for the one thread that owns it.
//!
//! [`Queue::submit`] and [`Queue::complete`] take no lock, make no system call but for doorbells that cannot be mapped,
//! and allocate nothing once they have run for a while. A request is in the window from before its commands are written
//! until the last of them has completed, so that nothing it touches is taken away meanwhile.
//!
//! A request may be several commands; its owner sees one completion. Where it is more than there is room for, it takes
//! turns: some of its commands, and when the last of these has completed, more. Between two turns it leaves the window
//! for a moment, so that nobody waits for all of a long request. After the controller was brought up anew, every
//! request that was in flight is entered again and submitted again: blocks are written with the same bytes twice, which
//! nobody can tell, because its owner has not been told of the first time.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::cids::{self, Cids};
use super::command::{Command, Completion, range};
use super::controller::Doorbell;
use super::data::{Part, Place, WORDS, plan, pointer};
use super::drive::{Inner, LeftQueue, Life};
use super::keeper::Trouble;
use super::pair::Pair;
use super::request::{Completed, Fault, Op, Submitted};
use crate::window::{Entered, Segment};

/// Bytes of a command's list.
pub(super) const LIST: u64 = WORDS as u64 * 8;
/// How often a request is submitted at most.
const TRIES: u8 = 3;
/// How long requests stay with a drive that a fence has stopped.
const STOPPED: Duration = Duration::from_secs(5);
/// How often overdue commands are looked for, in milliseconds.
const LOOK_MS: u64 = 100;

/// A request in flight.
#[derive(Debug)]
struct Request {
    tag: u32,
    op: Op,
    segments: Vec<Segment>,
    /// Commands that have not completed; none where the slot is free.
    left: u16,
    /// Where the memory of this turn begins, and how many blocks the turns before it have moved.
    from: Place,
    moved: u64,
    /// Blocks of this turn, and where the next one begins.
    moving: u64,
    goes_on: Option<Place>,
    fault: Option<Fault>,
    /// How often the drive had to be brought to its senses with it under way.
    tries: u8,
    /// When it was submitted, in milliseconds.
    since: u64,
    /// Whether somebody was told that it is overdue.
    overdue: bool,
}

/// A queue pair, for one thread.
#[derive(Debug)]
pub struct Queue {
    inner: Arc<Inner>,
    nth: u16,
    /// The life of the controller in which the pair was created.
    life: Life,
    pair: Pair,
    requests: Vec<Request>,
    free: Vec<u16>,
    /// The commands that are outstanding.
    cids: Cids,
    /// The turn that is being planned, and where the next one begins.
    parts: Vec<Part>,
    goes_on: Option<Place>,
    /// Whether the controller has not been told of the last commands.
    unrung: bool,
    /// Whether the controller has completed what it was never asked for: what else it completes counts for nothing.
    distrusted: bool,
    /// The recoveries that its requests have seen ([`Inner::recoveries`]).
    recoveries: u32,
    /// What came to its end otherwise than by a completion.
    ended: Vec<Completed>,
    looked: u64,
    /// The pair as an earlier owner left it, until it is known whether the controller still has it.
    left: Option<(Life, Pair)>,
}

impl Queue {
    /// A queue where an earlier owner has left it, if there was one.
    pub(super) fn new(inner: Arc<Inner>, nth: u16, left: Option<LeftQueue>) -> Self {
        let slots = inner.slots;
        let requests = slots - 1; // a full queue has one empty entry
        let (left, cids) = match left {
            Some(LeftQueue { life, pair, cids }) => (Some((life, pair)), cids),
            None => (None, Cids::new(requests)),
        };
        let request = |_| Request {
            tag: 0,
            op: Op::Flush,
            segments: Vec::new(),
            left: 0,
            from: Place::default(),
            moved: 0,
            moving: 0,
            goes_on: None,
            fault: None,
            tries: 0,
            since: 0,
            overdue: false,
        };
        Self {
            life: Life::NONE,
            pair: Pair::emptied(nth + 1, slots, inner.offset(nth)),
            nth,
            requests: (0..requests).map(request).collect(),
            free: (0..requests).rev().collect(),
            cids,
            parts: Vec::new(),
            goes_on: None,
            unrung: false,
            distrusted: false,
            recoveries: inner.recoveries.load(Ordering::Acquire),
            ended: Vec::new(),
            looked: 0,
            left,
            inner,
        }
    }

    /// Begins a request; `tag` names it in its completion. The drive sees it at the next [`Queue::ring`].
    pub fn submit(&mut self, tag: u32, op: &Op, segments: &[Segment]) -> Submitted {
        match self.settle() {
            Settled::Up => {}
            Settled::Halted => return Submitted::Closed,
            Settled::Lost => return Submitted::Lost,
        }
        let Some(&slot) = self.free.last() else { return Submitted::Full };
        let Some(most) = self.room() else { return Submitted::Full };
        if !self.plan(op, segments, Place::default(), most) {
            return Submitted::Wrong;
        }
        if self.inner.window.enter(self.window_slot(slot), segments) != Entered::In {
            return Submitted::Closed;
        }
        self.free.pop();
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return Submitted::Full };
        (request.tag, request.op, request.tries) = (tag, *op, 0);
        (request.from, request.moved) = (Place::default(), 0);
        request.segments.clear();
        request.segments.extend_from_slice(segments);
        self.issue(slot);
        Submitted::Started
    }

    /// Tells the controller of everything that was submitted since the last time.
    pub fn ring(&mut self) {
        if std::mem::take(&mut self.unrung) {
            self.doorbell(Doorbell::Submission, self.pair.tail());
        }
    }

    /// Appends what is over.
    pub fn complete(&mut self, done: &mut Vec<Completed>) {
        if matches!(self.settle(), Settled::Up) {
            self.take(done);
            self.look();
        }
        done.append(&mut self.ended);
    }

    /// Readable when there may be something to complete, and every second or so besides; its owner empties it, and then
    /// completes soon: a controller that must be reset waits for him.
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        self.inner.seat(self.nth).interrupt.as_fd()
    }

    /// Requests under way.
    pub fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    fn window_slot(&self, slot: u16) -> usize {
        usize::from(self.nth) * usize::from(self.inner.slots) + usize::from(slot)
    }

    /// Commands that a request may have at a time; none where there is no room at all. Half a queue: the rest is for
    /// requests that have not had their turn yet.
    fn room(&self) -> Option<usize> {
        let free = self.cids.free();
        (free > 0).then(|| free.min(self.cids.len().div_ceil(2)))
    }

    /// Plans a request's turn of at most `most` commands, with its memory from `from` on; whether it can be made.
    fn plan(&mut self, op: &Op, segments: &[Segment], from: Place, most: usize) -> bool {
        let geometry = &self.inner.geometry;
        self.goes_on = None;
        match *op {
            Op::Read { first, blocks } | Op::Write { first, blocks, .. } => {
                let bytes: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
                let inside = first.checked_add(blocks.into()).is_some_and(|end| end <= geometry.blocks);
                if blocks == 0 || bytes != u64::from(blocks) * u64::from(geometry.block) || !inside {
                    return false;
                }
                let planned = plan(self.inner.rules, segments, from, most, &mut self.parts);
                self.goes_on = planned.unwrap_or(None);
                planned.is_ok() && !self.parts.is_empty()
            }
            Op::Flush => true,
            Op::WriteZeroes { first, blocks, .. } | Op::Discard { first, blocks } => {
                let most = match op {
                    Op::Discard { .. } => geometry.discard,
                    _ => geometry.write_zeroes,
                };
                let inside = first.checked_add(blocks.into()).is_some_and(|end| end <= geometry.blocks);
                blocks > 0 && blocks <= most && inside
            }
        }
    }

    /// Writes the commands of a request, which has been planned and is in the window.
    fn issue(&mut self, slot: u16) {
        let (inner, now) = (Arc::clone(&self.inner), now());
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        (request.left, request.fault, request.since, request.overdue) = (0, None, now, false);
        (request.moving, request.goes_on) = (0, self.goes_on);
        let (namespace, block) = (inner.geometry.namespace, u64::from(inner.geometry.block));
        let transfers = matches!(request.op, Op::Read { .. } | Op::Write { .. });
        for nth in 0..if transfers { self.parts.len() } else { 1 } {
            let Some(cid) = self.cids.take(slot) else { break };
            let at = inner.list(self.nth, cids::index(cid));
            let store = |word: usize, value| inner.memory.file().store(at + word as u64 * 8, value);
            let iova = inner.memory.iova(at);
            let command = match (request.op, self.parts.get(nth)) {
                (Op::Read { first, .. } | Op::Write { first, .. }, Some(part)) => {
                    let blocks = (part.bytes / block) as u32;
                    let from = first + request.moved + request.moving;
                    request.moving += u64::from(blocks);
                    pointer(*part, &request.segments, iova, store).map(|data| match request.op {
                        Op::Write { fua, .. } => Command::write(namespace, from, blocks, data, fua),
                        _ => Command::read(namespace, from, blocks, data),
                    })
                }
                (Op::WriteZeroes { first, blocks, unmap, fua }, _) => {
                    Ok(Command::write_zeroes(namespace, first, blocks, unmap, fua))
                }
                (Op::Discard { first, blocks }, _) => {
                    let words = range(first, blocks);
                    let stored = words.into_iter().enumerate().try_for_each(|(nth, word)| store(nth, word));
                    stored.map(|()| Command::discard(namespace, iova))
                }
                _ => Ok(Command::flush(namespace)),
            };
            let put = command.and_then(|command| self.pair.put(&inner.memory, command, cid));
            if let Err(failed) = put {
                log::error!("{}: {failed}", inner.name);
                self.cids.give_back(cid);
                request.fault = Some(Fault::Lost);
                break;
            }
            request.left += 1;
            self.unrung = true;
        }
        if request.left == 0 {
            self.end(slot, Err(Fault::Lost));
        }
    }

    /// Takes completions off the queue.
    fn take(&mut self, done: &mut Vec<Completed>) {
        let mut head = None;
        // There are no more than that: a controller that writes for ever does not keep anybody here.
        for _ in 0..self.inner.slots {
            if self.distrusted {
                break;
            }
            let (completion, next) = match self.pair.take(&self.inner.memory) {
                Ok(Some(taken)) => taken,
                Ok(None) => break,
                Err(failed) => {
                    log::error!("{}: {failed}", self.inner.name);
                    break;
                }
            };
            head = Some(next);
            self.taken(completion);
        }
        if let Some(head) = head {
            self.doorbell(Doorbell::Completion, head);
            self.ring();
        }
        done.append(&mut self.ended);
    }

    fn taken(&mut self, completion: Completion) {
        let Completion { id, status, .. } = completion;
        let owner = self.cids.give_back(id);
        let request = owner.and_then(|slot| Some((slot, self.requests.get_mut(usize::from(slot))?)));
        let Some((slot, request)) = request else {
            log::error!(
                "{}: queue {}: a completion names command {id:#x}, which is not outstanding",
                self.inner.name,
                self.pair.id
            );
            // What else it has posted may be as wrong: nothing ends before the controller has been reset.
            self.distrusted = true;
            self.inner.trouble(Trouble::Nonsense { life: self.life });
            return;
        };
        request.left = request.left.saturating_sub(1);
        match status {
            0 => {}
            Completion::TRANSFER_ERROR => request.fault = Some(Fault::Memory),
            status => _ = request.fault.get_or_insert(Fault::Status(status)),
        }
        if request.left > 0 {
            return;
        }
        match request.fault {
            // It took too long; or the controller wants it again.
            Some(Fault::Status(Completion::ABORTED | Completion::INTERRUPTED)) => {
                self.retry(slot, true, usize::MAX);
            }
            None if request.goes_on.is_some() => self.go_on(slot),
            fault => self.end(slot, fault.map_or(Ok(()), Err)),
        }
    }

    /// A request is over, and touches no memory any more.
    fn end(&mut self, slot: u16, result: Result<(), Fault>) {
        self.inner.window.leave(self.window_slot(slot));
        self.finish(slot, result);
    }

    /// The owner gets a request back.
    fn finish(&mut self, slot: u16, result: Result<(), Fault>) {
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        request.left = 0;
        if std::mem::take(&mut request.overdue) {
            self.inner.seat(self.nth).overdue.fetch_sub(1, Ordering::AcqRel);
        }
        self.ended.push(Completed { tag: request.tag, result });
        self.free.push(slot);
    }

    /// Looks for commands that take too long.
    fn look(&mut self) {
        if self.in_flight() == 0 {
            return;
        }
        let now = now();
        if now.saturating_sub(self.looked) < LOOK_MS {
            return;
        }
        self.looked = now;
        for (cid, slot) in self.cids.outstanding() {
            let Some(request) = self.requests.get_mut(usize::from(slot)) else { continue };
            if request.overdue || now.saturating_sub(request.since) < self.inner.deadline_ms {
                continue;
            }
            request.overdue = true;
            self.inner.seat(self.nth).overdue.fetch_add(1, Ordering::AcqRel);
            let (life, queue) = (self.life, self.pair.id);
            self.inner.trouble(Trouble::Overdue { life, queue, cid });
        }
    }

    fn doorbell(&self, which: Doorbell, value: u16) {
        let at = self.inner.doorbell(self.pair.id, which);
        if let Err(error) = self.inner.registers.ring(at, value.into()) {
            log::warn!("{error}");
            self.inner.trouble(Trouble::Nonsense { life: self.life });
        }
    }

    /// Falls in with the controller's life: parks while it is halted, begins anew after it was brought up.
    fn settle(&mut self) -> Settled {
        let life = self.inner.life();
        if life == self.life && life.is_up() {
            return Settled::Up;
        }
        self.settle_anew()
    }

    #[cold]
    fn settle_anew(&mut self) -> Settled {
        let inner = Arc::clone(&self.inner);
        let seat = inner.seat(self.nth);
        loop {
            let life = inner.life();
            if !life.is_up() {
                self.unrung = false;
                seat.parked.store(true, Ordering::SeqCst);
                if !life.is_lost() {
                    // Whether and when the drive comes back nobody knows: their owner shall decide.
                    if inner.is_stopped_for(STOPPED) {
                        self.forget(Fault::Withheld, Self::end);
                    }
                    return Settled::Halted;
                }
                // Where it was given up without being stopped it may still touch the memory.
                self.forget(Fault::Lost, if life.is_loose() { Self::finish } else { Self::end });
                return Settled::Lost;
            }
            // Who halts the controller now either sees this queue unparked, and waits for it, or is seen.
            seat.parked.store(false, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if inner.life() != life {
                continue;
            }
            if let Some((_, pair)) = self.left.take().filter(|(left, _)| *left == life) {
                (self.life, self.pair) = (life, pair);
            }
            if life != self.life {
                self.life = life;
                self.pair = Pair::emptied(self.nth + 1, inner.slots, inner.offset(self.nth));
                self.again();
            }
            return Settled::Up;
        }
    }

    /// Ends everything that is in flight.
    fn forget(&mut self, fault: Fault, end: impl Fn(&mut Self, u16, Result<(), Fault>)) {
        self.reset_commands();
        for slot in 0..self.requests.len() as u16 {
            if !self.free.contains(&slot) {
                end(self, slot, Err(fault));
            }
        }
    }

    /// Submits everything again that was in flight.
    fn again(&mut self) {
        self.reset_commands();
        // A fence says nothing against what was under way, however many come.
        let recoveries = self.inner.recoveries.load(Ordering::Acquire);
        let blamed = std::mem::replace(&mut self.recoveries, recoveries) != recoveries;
        let mut others = self.in_flight();
        for slot in 0..self.requests.len() as u16 {
            if !self.free.contains(&slot) {
                others -= 1;
                // Each of them has room for one command at least: there are as many identifiers as requests.
                self.retry(slot, blamed, self.cids.free().saturating_sub(others));
            }
        }
        self.ring();
    }

    /// Submits a request again of which nothing is in flight, if it may be, with at most `most` commands at first;
    /// `blamed`: it may be what is wrong.
    fn retry(&mut self, slot: u16, blamed: bool, most: usize) {
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        request.tries += u8::from(blamed);
        (request.from, request.moved) = (Place::default(), 0);
        if request.tries >= TRIES {
            return self.end(slot, Err(Fault::TimedOut));
        }
        self.begin(slot, most);
    }

    /// A request's turn is over, and it has another.
    fn go_on(&mut self, slot: u16) {
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        let Some(next) = request.goes_on.take() else { return };
        (request.from, request.moved) = (next, request.moved + request.moving);
        self.begin(slot, usize::MAX);
    }

    /// Begins the turn of a request of which nothing is in flight, if it may be done still.
    fn begin(&mut self, slot: u16, most: usize) {
        let (window, room) = (self.window_slot(slot), self.room());
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        if std::mem::take(&mut request.overdue) {
            self.inner.seat(self.nth).overdue.fetch_sub(1, Ordering::AcqRel);
        }
        let (op, from, segments) = (request.op, request.from, std::mem::take(&mut request.segments));
        self.inner.window.leave(window);
        let entered = self.inner.window.enter(window, &segments);
        let planned = room.map(|room| self.plan(&op, &segments, from, room.min(most)));
        if let Some(request) = self.requests.get_mut(usize::from(slot)) {
            request.segments = segments;
        }
        match (entered, planned) {
            (Entered::In, Some(true)) => self.issue(slot),
            (Entered::In, Some(false)) => self.end(slot, Err(Fault::Wrong)),
            (Entered::In, None) => self.end(slot, Err(Fault::Lost)),
            (Entered::Paused | Entered::Closed, _) => self.end(slot, Err(Fault::Withheld)),
        }
    }

    fn reset_commands(&mut self) {
        self.distrusted = false;
        self.cids.give_all_back();
        self.unrung = false;
    }
}

impl Drop for Queue {
    /// A queue with nothing in flight may be taken again. Else that stays in the window until the controller is stopped.
    fn drop(&mut self) {
        let seat = self.inner.seat(self.nth);
        seat.parked.store(true, Ordering::SeqCst);
        if self.in_flight() == 0 {
            let (life, pair) = self.left.take().unwrap_or((self.life, self.pair));
            seat.give_back(LeftQueue { life, pair, cids: std::mem::take(&mut self.cids) });
        }
    }
}

enum Settled {
    Up,
    Halted,
    Lost,
}

/// Milliseconds, by a clock that costs next to nothing.
pub(super) fn now() -> u64 {
    let time = clock_gettime(ClockId::MonotonicCoarse);
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}
