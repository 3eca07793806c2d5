//! The simulated controller's life: what it is up to, and its thread.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use passgate_bindings::Iova;

use super::super::registers::ASQ;
use super::commands::{Outcome, Told, status};
use super::faults::{Does, Rules, Turn};
use super::queues::{Completions, Entry, Submission};
use super::{Core, Taken};

/// Commands that are remembered.
const HISTORY: usize = 8192;
/// Complaints that are.
const COMPLAINTS: usize = 100;

/// Everything of a controller that changes.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) gone: bool,
    pub(super) leaving: bool,
    pub(super) ready: bool,
    pub(super) fatal: bool,
    pub(super) is_shut_down: bool,
    pub(super) cc: u32,
    pub(super) aqa: u32,
    asq: u64,
    acq: u64,
    /// What it is becoming (ready or not), and when.
    turning: Option<(bool, Instant)>,
    pub(super) rules: Rules,
    pub(super) vectors: Vec<Option<OwnedFd>>,
    pub(super) submissions: BTreeMap<u16, Submission>,
    pub(super) completions: BTreeMap<u16, Completions>,
    pub(super) pending: Vec<Pending>,
    /// I/O queues that it was asked for.
    pub(super) granted: u16,
    /// The queue that was served last.
    served: u16,
    pub(super) complaints: Vec<String>,
    pub(super) taken: u64,
    pub(super) history: VecDeque<Taken>,
    pub(super) enabled: u64,
}

/// A command that was taken and is not completed.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) told: Told,
    /// How it went, where it was done.
    done: Option<Outcome>,
    /// When it goes on; none for not by itself.
    until: Option<Instant>,
    /// It was completed once.
    is_twin: bool,
}

impl Machine {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            gone: false,
            leaving: false,
            ready: false,
            fatal: false,
            is_shut_down: false,
            cc: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            turning: None,
            rules,
            vectors: Vec::new(),
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            pending: Vec::new(),
            granted: 0,
            served: 0,
            complaints: Vec::new(),
            taken: 0,
            history: VecDeque::new(),
            enabled: 0,
        }
    }

    pub(super) fn complain(&mut self, what: String) {
        log::warn!("simulated controller: {what}");
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(what);
        }
    }

    /// ASQ or ACQ.
    pub(super) fn base(&self, at: u64) -> u64 {
        if at == ASQ { self.asq } else { self.acq }
    }

    pub(super) fn base_mut(&mut self, at: u64) -> &mut u64 {
        if at == ASQ { &mut self.asq } else { &mut self.acq }
    }

    /// Begins to become ready, or not ready.
    pub(super) fn turn(&mut self, ready: bool, how: Turn, now: Instant) {
        self.turning = match how {
            Turn::Prompt => {
                self.become_ready(ready);
                None
            }
            Turn::After(time) => Some((ready, now + time)),
            Turn::Never => None,
            Turn::Fatal => {
                self.fatal = true;
                None
            }
        };
    }

    fn become_ready(&mut self, ready: bool) {
        self.forget();
        self.ready = ready;
        self.fatal = false;
        if !ready {
            return;
        }
        self.enabled += 1;
        for (what, base) in [("ASQ", self.asq), ("ACQ", self.acq)] {
            if base % 4096 != 0 {
                self.complain(format!("{what} is {base:#x}"));
            }
        }
        let slots = |count: u32| (count & 0xfff) + 1;
        self.submissions.insert(0, Submission::new(self.asq, slots(self.aqa), 0));
        self.completions.insert(0, Completions::new(self.acq, slots(self.aqa >> 16), Some(0)));
    }

    /// Its queues go, with all that was in them.
    pub(super) fn forget(&mut self) {
        self.submissions.clear();
        self.completions.clear();
        self.pending.clear();
        self.granted = 0;
    }

    /// As after power on, or a reset of the function.
    pub(super) fn reset_function(&mut self) {
        self.forget();
        self.turning = None;
        (self.ready, self.fatal, self.is_shut_down) = (false, false, false);
        (self.cc, self.aqa, self.asq, self.acq) = (0, 0, 0, 0);
    }

    pub(super) fn vanish(&mut self) {
        self.reset_function();
        self.gone = true;
    }

    pub(super) fn release(&mut self) -> usize {
        let now = Instant::now();
        self.pending.iter_mut().for_each(|pending| pending.until = Some(now));
        self.pending.len()
    }

    pub(super) fn release_next(&mut self) -> bool {
        let next = self.pending.iter_mut().find(|pending| pending.until.is_none());
        next.is_some_and(|next| {
            next.until = Some(Instant::now());
            true
        })
    }

    pub(super) fn held(&self) -> usize {
        self.pending.len()
    }

    /// A doorbell: a submission queue's tail, or a completion queue's head.
    pub(super) fn doorbell(&mut self, queue: u16, is_head: bool, value: u32) {
        if !self.ready {
            return;
        }
        if is_head {
            let Some(completions) = self.completions.get_mut(&queue) else {
                return self.complain(format!("the head of completion queue {queue}, which is not there"));
            };
            let taken = (value + completions.slots - completions.head) % completions.slots;
            if value >= completions.slots || taken > completions.posted() {
                return self.complain(format!("head {value} of completion queue {queue} is nothing posted"));
            }
            completions.head = value;
            return;
        }
        match self.submissions.get_mut(&queue) {
            Some(submission) if value < submission.slots => submission.tail = value,
            Some(_) => self.complain(format!("tail {value} of submission queue {queue} is beyond it")),
            None => self.complain(format!("the tail of submission queue {queue}, which is not there")),
        }
    }

    /// A command is over; its completion is posted once there is room.
    pub(super) fn complete(&mut self, queue: u16, id: u16, Outcome { status, result }: Outcome) {
        let to = self.submissions.get(&queue).map(|submission| submission.to);
        if let Some(completions) = to.and_then(|to| self.completions.get_mut(&to)) {
            completions.backlog.push_back(Entry { queue, id, status, result });
        }
    }

    /// The next submission queue with something in it, in turn.
    fn next_queue(&mut self) -> Option<u16> {
        let busy = |(id, queue): (&u16, &Submission)| (queue.head != queue.tail).then_some(*id);
        let later = self.submissions.range(self.served.saturating_add(1)..).find_map(busy);
        let next = later.or_else(|| self.submissions.iter().find_map(busy))?;
        self.served = next;
        Some(next)
    }

    fn remember(&mut self, told: &Told) {
        let blocks = told.blocks();
        self.taken += 1;
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(Taken {
            queue: told.queue,
            opcode: told.opcode(),
            first: blocks.start,
            blocks: blocks.end - blocks.start,
        });
    }
}

impl Core {
    /// The controller, until it is told to leave. Its lock is held through each step, and so through every DMA.
    pub(super) fn run(&self) {
        let mut machine = self.lock();
        while !machine.leaving {
            let now = Instant::now();
            if self.step(&mut machine, now) {
                self.changed.notify_all();
                drop(machine);
                machine = self.lock();
                continue;
            }
            let turn = machine.turning.map(|(_, due)| due);
            let due = machine.pending.iter().filter_map(|pending| pending.until).chain(turn).min();
            machine = match due.filter(|_| !machine.gone && !machine.fatal) {
                Some(due) => {
                    let left = due.saturating_duration_since(now);
                    self.changed.wait_timeout(machine, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(machine).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Does one thing, if there is one to do.
    fn step(&self, machine: &mut Machine, now: Instant) -> bool {
        if machine.gone {
            return false;
        }
        if let Some((ready, _)) = machine.turning.filter(|(_, due)| *due <= now) {
            machine.turning = None;
            machine.become_ready(ready);
            return true;
        }
        if !machine.ready || machine.fatal {
            return false;
        }
        let due = |pending: &Pending| pending.until.is_some_and(|until| until <= now);
        if let Some(nth) = machine.pending.iter().position(due) {
            let Pending { told, done, .. } = machine.pending.remove(nth);
            let outcome = done.unwrap_or_else(|| self.execute(machine, &told));
            machine.complete(told.queue, told.id(), outcome);
            return true;
        }
        if self.post(machine) {
            return true;
        }
        let Some(queue) = machine.next_queue() else { return false };
        self.take(machine, queue);
        true
    }

    /// Takes a command off its queue, and does it, or what it meets instead.
    fn take(&self, machine: &mut Machine, queue: u16) {
        let Some(submission) = machine.submissions.get_mut(&queue) else { return };
        let at = submission.at + u64::from(submission.head) * 64;
        submission.head = (submission.head + 1) % submission.slots;
        let mut words = [0; 8];
        for (nth, word) in (0..).zip(&mut words) {
            let Ok(loaded) = self.load(at + nth * 8) else {
                machine.fatal = true;
                return;
            };
            *word = loaded;
        }
        let told = Told { queue, words };
        let same = |pending: &Pending| {
            !pending.is_twin && pending.told.queue == queue && pending.told.id() == told.id()
        };
        if machine.pending.iter().any(same) {
            machine.complain(format!("command {} of queue {queue} is there already", told.id()));
            return machine.complete(queue, told.id(), Outcome::failed(status::ID_CONFLICT));
        }
        if queue > 0 {
            machine.remember(&told);
        }
        let now = Instant::now();
        let (until, early) = match machine.rules.meets(queue, told.opcode(), &told.blocks()) {
            None => {
                let outcome = self.execute(machine, &told);
                return machine.complete(queue, told.id(), outcome);
            }
            Some(Does::Status(status)) => {
                return machine.complete(queue, told.id(), Outcome::failed(status));
            }
            Some(Does::Twice) => {
                let outcome = self.execute(machine, &told);
                machine.complete(queue, told.id(), outcome);
                return machine.complete(queue, told.id(), outcome);
            }
            Some(Does::Foreign(id)) => {
                let outcome = self.execute(machine, &told);
                return machine.complete(queue, id, outcome);
            }
            Some(Does::Fatal) => {
                machine.fatal = true;
                return;
            }
            Some(Does::Vanish) => return machine.vanish(),
            Some(Does::Again) => {
                let outcome = self.execute(machine, &told);
                machine.complete(queue, told.id(), outcome);
                machine.pending.push(Pending { told, done: Some(outcome), until: None, is_twin: true });
                return;
            }
            Some(Does::HoldData) => (None, false),
            Some(Does::HoldCompletion) => (None, true),
            Some(Does::DelayData(time)) => (Some(now + time), false),
            Some(Does::DelayCompletion(time)) => (Some(now + time), true),
        };
        let done = early.then(|| self.execute(machine, &told));
        machine.pending.push(Pending { told, done, until, is_twin: false });
    }

    /// Posts what has room.
    fn post(&self, machine: &mut Machine) -> bool {
        let ready = |queue: &&mut Completions| !queue.backlog.is_empty() && queue.has_room();
        let Some(queue) = machine.completions.values_mut().find(ready) else { return false };
        let Some(entry) = queue.backlog.pop_front() else { return false };
        let head = machine.submissions.get(&entry.queue).map_or(0, |submission| submission.head);
        let at = queue.at + u64::from(queue.tail) * 16;
        let first = u64::from(entry.result);
        let second = u64::from(head)
            | u64::from(entry.queue) << 16
            | u64::from(entry.id) << 32
            | u64::from(queue.phase) << 48
            | u64::from(entry.status) << 49;
        queue.tail = (queue.tail + 1) % queue.slots;
        queue.phase ^= queue.tail == 0;
        let vector = queue.vector;
        if self.store(at, first).and_then(|()| self.store(at + 8, second)).is_err() {
            machine.fatal = true;
            return true;
        }
        if machine.rules.mute {
            return true;
        }
        let eventfd = vector.and_then(|vector| machine.vectors.get(usize::from(vector))?.as_ref());
        if let Some(eventfd) = eventfd {
            // Full (EAGAIN) is as good as written.
            _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
        }
        true
    }

    /// Reads a word of memory; else the status of a command whose data it was.
    pub(super) fn load(&self, at: u64) -> Result<u64, u16> {
        self.port.dma_load(Iova(at)).map_err(|_| self.faulted())
    }

    fn store(&self, at: u64, word: u64) -> Result<(), u16> {
        self.port.dma_store(Iova(at), word).map_err(|_| self.faulted())
    }

    /// Counts a fault; its status.
    pub(super) fn faulted(&self) -> u16 {
        self.dma_faults.fetch_add(1, Ordering::Relaxed);
        status::TRANSFER
    }
}
