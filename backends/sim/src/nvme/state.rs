//! The state of the simulated controller, and its thread.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use passgate_bindings::Iova;

use super::commands::{Outcome, SimCommand, status};
use super::faults::{FaultAction, FaultRules, ReadyChange};
use super::queues::{CompletionEntry, CompletionQueue, SubmissionQueue};
use super::registers::ASQ;
use super::{Core, FetchedCommand};

/// The number of fetched commands that are remembered.
const MAX_HISTORY: usize = 8192;
/// The number of violations that are remembered.
const MAX_VIOLATIONS: usize = 100;

/// All state of a controller that changes.
#[derive(Debug)]
pub(super) struct State {
    pub(super) gone: bool,
    pub(super) stopping: bool,
    pub(super) ready: bool,
    pub(super) fatal: bool,
    pub(super) is_shut_down: bool,
    pub(super) cc: u32,
    pub(super) aqa: u32,
    asq: u64,
    acq: u64,
    /// The value that CSTS.RDY is about to take, and when.
    ready_change: Option<(bool, Instant)>,
    pub(super) faults: FaultRules,
    pub(super) vectors: Vec<Option<OwnedFd>>,
    pub(super) submissions: BTreeMap<u16, SubmissionQueue>,
    pub(super) completions: BTreeMap<u16, CompletionQueue>,
    pub(super) pending: Vec<Pending>,
    /// The number of I/O queues of each kind that were allocated to the driver.
    pub(super) granted: u16,
    /// The submission queue from which the last command was fetched.
    last_served: u16,
    pub(super) violations: Vec<String>,
    pub(super) fetched: u64,
    pub(super) history: VecDeque<FetchedCommand>,
    pub(super) enabled: u64,
}

/// A command that was fetched and has not completed.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) command: SimCommand,
    /// Its result, if it was executed already.
    outcome: Option<Outcome>,
    /// The time at which it proceeds; None while it is stalled.
    due: Option<Instant>,
    /// Set if it has completed once already.
    is_duplicate: bool,
}

impl State {
    pub(super) fn new(faults: FaultRules) -> Self {
        Self {
            gone: false,
            stopping: false,
            ready: false,
            fatal: false,
            is_shut_down: false,
            cc: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            ready_change: None,
            faults,
            vectors: Vec::new(),
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            pending: Vec::new(),
            granted: 0,
            last_served: 0,
            violations: Vec::new(),
            fetched: 0,
            history: VecDeque::new(),
            enabled: 0,
        }
    }

    pub(super) fn record_violation(&mut self, what: String) {
        log::warn!("simulated controller: {what}");
        if self.violations.len() < MAX_VIOLATIONS {
            self.violations.push(what);
        }
    }

    /// Returns ASQ or ACQ.
    pub(super) fn base(&self, at: u64) -> u64 {
        if at == ASQ { self.asq } else { self.acq }
    }

    pub(super) fn base_mut(&mut self, at: u64) -> &mut u64 {
        if at == ASQ { &mut self.asq } else { &mut self.acq }
    }

    /// Begins a change of CSTS.RDY.
    pub(super) fn change_ready(&mut self, ready: bool, change: ReadyChange, now: Instant) {
        self.ready_change = match change {
            ReadyChange::Immediate => {
                self.set_ready(ready);
                None
            }
            ReadyChange::After(time) => Some((ready, now + time)),
            ReadyChange::Never => None,
            ReadyChange::Fatal => {
                self.fatal = true;
                None
            }
        };
    }

    fn set_ready(&mut self, ready: bool) {
        self.clear_queues();
        self.ready = ready;
        self.fatal = false;
        if !ready {
            return;
        }
        self.enabled += 1;
        for (what, base) in [("ASQ", self.asq), ("ACQ", self.acq)] {
            if base % 4096 != 0 {
                self.record_violation(format!("{what} is {base:#x}, not at a page boundary"));
            }
        }
        let entries = |count: u32| (count & 0xfff) + 1;
        self.submissions.insert(0, SubmissionQueue::new(self.asq, entries(self.aqa), 0));
        self.completions.insert(0, CompletionQueue::new(self.acq, entries(self.aqa >> 16), Some(0)));
    }

    /// Deletes all queues and the commands in them.
    pub(super) fn clear_queues(&mut self) {
        self.submissions.clear();
        self.completions.clear();
        self.pending.clear();
        self.granted = 0;
    }

    /// Resets everything, as at power-on or by a reset of the function.
    pub(super) fn reset_function(&mut self) {
        self.clear_queues();
        self.ready_change = None;
        (self.ready, self.fatal, self.is_shut_down) = (false, false, false);
        (self.cc, self.aqa, self.asq, self.acq) = (0, 0, 0, 0);
    }

    pub(super) fn unplug(&mut self) {
        self.reset_function();
        self.gone = true;
    }

    pub(super) fn resume_all(&mut self) -> usize {
        let now = Instant::now();
        self.pending.iter_mut().for_each(|pending| pending.due = Some(now));
        self.pending.len()
    }

    pub(super) fn resume_next(&mut self) -> bool {
        let next = self.pending.iter_mut().find(|pending| pending.due.is_none());
        next.is_some_and(|next| {
            next.due = Some(Instant::now());
            true
        })
    }

    pub(super) fn pending_count(&self) -> usize {
        self.pending.len()
    }

    /// Handles a write of a doorbell: the tail of a submission queue, or the head of a completion queue.
    pub(super) fn doorbell(&mut self, queue: u16, is_head: bool, value: u32) {
        if !self.ready {
            return;
        }
        if is_head {
            let Some(completions) = self.completions.get_mut(&queue) else {
                return self.record_violation(format!("head doorbell of unknown completion queue {queue}"));
            };
            let taken = (value + completions.entries - completions.head) % completions.entries;
            if value >= completions.entries || taken > completions.posted() {
                return self.record_violation(format!(
                    "head {value} of completion queue {queue}: not posted so far"
                ));
            }
            completions.head = value;
            return;
        }
        match self.submissions.get_mut(&queue) {
            Some(submission) if value < submission.entries => submission.tail = value,
            Some(_) => {
                self.record_violation(format!("tail {value} of submission queue {queue}: beyond its end"))
            }
            None => self.record_violation(format!("tail doorbell of unknown submission queue {queue}")),
        }
    }

    /// Completes a command; the completion is posted once its queue has room.
    pub(super) fn complete(&mut self, queue: u16, cid: u16, Outcome { status, result }: Outcome) {
        let cqid = self.submissions.get(&queue).map(|submission| submission.cqid);
        if let Some(completions) = cqid.and_then(|cqid| self.completions.get_mut(&cqid)) {
            completions.backlog.push_back(CompletionEntry { queue, cid, status, result });
        }
    }

    /// Returns the next submission queue with a command in it, in round-robin order.
    fn next_queue(&mut self) -> Option<u16> {
        let busy = |(id, queue): (&u16, &SubmissionQueue)| (queue.head != queue.tail).then_some(*id);
        let later = self.submissions.range(self.last_served.saturating_add(1)..).find_map(busy);
        let next = later.or_else(|| self.submissions.iter().find_map(busy))?;
        self.last_served = next;
        Some(next)
    }

    fn record(&mut self, command: &SimCommand) {
        let blocks = command.blocks();
        self.fetched += 1;
        if self.history.len() == MAX_HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(FetchedCommand {
            queue: command.queue,
            opcode: command.opcode(),
            first: blocks.start,
            blocks: blocks.end - blocks.start,
        });
    }
}

impl Core {
    /// Runs the controller until it is dropped. It has the lock for a whole step, and so during every DMA.
    pub(super) fn run(&self) {
        let mut state = self.lock();
        while !state.stopping {
            let now = Instant::now();
            if self.step(&mut state, now) {
                self.changed.notify_all();
                drop(state);
                state = self.lock();
                continue;
            }
            let turn = state.ready_change.map(|(_, due)| due);
            let due = state.pending.iter().filter_map(|pending| pending.due).chain(turn).min();
            state = match due.filter(|_| !state.gone && !state.fatal) {
                Some(due) => {
                    let remaining = due.saturating_duration_since(now);
                    self.changed.wait_timeout(state, remaining).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Does one step. False if there is nothing to do.
    fn step(&self, state: &mut State, now: Instant) -> bool {
        if state.gone {
            return false;
        }
        if let Some((ready, _)) = state.ready_change.filter(|(_, due)| *due <= now) {
            state.ready_change = None;
            state.set_ready(ready);
            return true;
        }
        if !state.ready || state.fatal {
            return false;
        }
        let due = |pending: &Pending| pending.due.is_some_and(|due| due <= now);
        if let Some(nth) = state.pending.iter().position(due) {
            let Pending { command, outcome, .. } = state.pending.remove(nth);
            let outcome = outcome.unwrap_or_else(|| self.execute(state, &command));
            state.complete(command.queue, command.cid(), outcome);
            return true;
        }
        if self.post(state) {
            return true;
        }
        let Some(queue) = state.next_queue() else { return false };
        self.fetch(state, queue);
        true
    }

    /// Fetches a command from a submission queue, and executes it or applies its fault.
    fn fetch(&self, state: &mut State, queue: u16) {
        let Some(submission) = state.submissions.get_mut(&queue) else { return };
        let at = submission.base + u64::from(submission.head) * 64;
        submission.head = (submission.head + 1) % submission.entries;
        let mut words = [0; 8];
        for (nth, word) in (0..).zip(&mut words) {
            let Ok(loaded) = self.load(at + nth * 8) else {
                state.fatal = true;
                return;
            };
            *word = loaded;
        }
        let command = SimCommand { queue, words };
        let same = |pending: &Pending| {
            !pending.is_duplicate && pending.command.queue == queue && pending.command.cid() == command.cid()
        };
        if state.pending.iter().any(same) {
            state.record_violation(format!("CID {} of queue {queue} is outstanding already", command.cid()));
            return state.complete(queue, command.cid(), Outcome::failed(status::ID_CONFLICT));
        }
        if queue > 0 {
            state.record(&command);
        }
        let now = Instant::now();
        let (due, data_moves_first) =
            match state.faults.next_fault(queue, command.opcode(), &command.blocks()) {
                None => {
                    let outcome = self.execute(state, &command);
                    return state.complete(queue, command.cid(), outcome);
                }
                Some(FaultAction::Status(status)) => {
                    return state.complete(queue, command.cid(), Outcome::failed(status));
                }
                Some(FaultAction::CompleteTwice) => {
                    let outcome = self.execute(state, &command);
                    state.complete(queue, command.cid(), outcome);
                    return state.complete(queue, command.cid(), outcome);
                }
                Some(FaultAction::CompleteWrongCid(cid)) => {
                    let outcome = self.execute(state, &command);
                    return state.complete(queue, cid, outcome);
                }
                Some(FaultAction::Fatal) => {
                    state.fatal = true;
                    return;
                }
                Some(FaultAction::Unplug) => return state.unplug(),
                Some(FaultAction::CompleteAgainLate) => {
                    let outcome = self.execute(state, &command);
                    state.complete(queue, command.cid(), outcome);
                    state.pending.push(Pending {
                        command,
                        outcome: Some(outcome),
                        due: None,
                        is_duplicate: true,
                    });
                    return;
                }
                Some(FaultAction::StallData) => (None, false),
                Some(FaultAction::StallCompletion) => (None, true),
                Some(FaultAction::DelayData(time)) => (Some(now + time), false),
                Some(FaultAction::DelayCompletion(time)) => (Some(now + time), true),
            };
        let outcome = data_moves_first.then(|| self.execute(state, &command));
        state.pending.push(Pending { command, outcome, due, is_duplicate: false });
    }

    /// Posts one completion to a queue with room, and signals its interrupt. False if there is none.
    fn post(&self, state: &mut State) -> bool {
        let ready = |queue: &&mut CompletionQueue| !queue.backlog.is_empty() && queue.has_room();
        let Some(queue) = state.completions.values_mut().find(ready) else { return false };
        let Some(entry) = queue.backlog.pop_front() else { return false };
        let head = state.submissions.get(&entry.queue).map_or(0, |submission| submission.head);
        let at = queue.base + u64::from(queue.tail) * 16;
        let first = u64::from(entry.result);
        let second = u64::from(head)
            | u64::from(entry.queue) << 16
            | u64::from(entry.cid) << 32
            | u64::from(queue.phase) << 48
            | u64::from(entry.status) << 49;
        queue.tail = (queue.tail + 1) % queue.entries;
        queue.phase ^= queue.tail == 0;
        let vector = queue.vector;
        if self.store(at, first).and_then(|()| self.store(at + 8, second)).is_err() {
            state.fatal = true;
            return true;
        }
        if state.faults.suppress_interrupts {
            return true;
        }
        let eventfd = vector.and_then(|vector| state.vectors.get(usize::from(vector))?.as_ref());
        if let Some(eventfd) = eventfd {
            // A failure means that the counter is full (EAGAIN), so the eventfd is readable already.
            _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
        }
        true
    }

    /// Reads a word of memory. A fault is returned as the status of the command whose data it is.
    pub(super) fn load(&self, at: u64) -> Result<u64, u16> {
        self.port.dma_load(Iova(at)).map_err(|_| self.count_fault())
    }

    fn store(&self, at: u64, word: u64) -> Result<(), u16> {
        self.port.dma_store(Iova(at), word).map_err(|_| self.count_fault())
    }

    /// Counts a DMA fault and returns the status for it.
    pub(super) fn count_fault(&self) -> u16 {
        self.dma_faults.fetch_add(1, Ordering::Relaxed);
        status::TRANSFER
    }
}
