//! A worker: one thread with one queue of the drive, which serves the virtqueues assigned to it.
//!
//! It never waits for another thread but at a ring's lock: it polls its rings and its queue, and sleeps when there is nothing
//! to do. It takes a ring's lock in each pass, and accesses guest memory only under it. So a thread that has taken every
//! ring's lock once knows that no worker accesses memory that was replaced before ([`replace_memory`]). Checking and accounting
//! a request takes no lock.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use passgate_backends::nvme::Completed;
use passgate_bindings::Failed;
use rustix::event::{EventfdFlags, eventfd};
use vhost_user_backend::{VringStateMutGuard, VringT};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::counts::WorkerCounters;
use super::inflight::QueueInflight;
use super::poll::{AdaptivePoll, Polling};
use super::ring::{Memory, PageQuery, Ring, RingContext, Vring};
use super::slot::from_tag;
use crate::error::{Error, Result};
use crate::gate::DmaAccess;
use crate::serve::Inside;
use crate::serve::poller::{Interest, Poller};

// Tokens of the poller: a command has come; the drive has completed something; from the last one on, kicks by ring.
const WAKE_TOKEN: u64 = 0;
const DRIVE_TOKEN: u64 = 1;
const FIRST_KICK_TOKEN: u64 = 2;

/// A command to a worker.
#[derive(Debug)]
pub(super) enum WorkerCommand {
    /// Use this eventfd as the kick of the ring; none for no kick.
    Kick { ring: u16, kick: Option<OwnedFd> },
    /// Start the ring, which has been set up.
    Start { ring: u16, inflight: Option<QueueInflight> },
    /// Poll the rings: there may be something to do.
    Poll,
    /// Take no more requests from the ring. Once none of its requests is in flight at the drive, send the next index of its
    /// available ring to `ended`.
    Stop { ring: u16, ended: Sender<u16> },
    /// End the ring although requests may be in flight at the drive; their completions are dropped. A message to `done`, or
    /// its end, says that nothing more is written for the ring.
    Abandon { ring: u16, done: Sender<()> },
    /// The session's answer about the pages of a deferred request.
    Answer { ring: u16, head: u16, ticket: u64, admits: DmaAccess },
    /// End the thread.
    Exit,
}

/// The sending end of a worker's commands.
#[derive(Debug, Clone)]
pub(super) struct Mailbox {
    commands: Sender<WorkerCommand>,
    wake: Arc<OwnedFd>,
}

impl Mailbox {
    /// Sends a command and wakes the worker. A command to a worker that has ended is dropped.
    pub(super) fn send(&self, command: WorkerCommand) {
        if self.commands.send(command).is_ok() {
            // It fails only if the counter is at its limit, and then the worker has been woken already.
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// A ring that is assigned to this worker.
struct AssignedRing {
    index: u16,
    vring: Vring,
    ring: Ring,
    /// The worker's own descriptor of the kick eventfd.
    kick: Option<OwnedFd>,
    /// The receiver of the ring's end, while the ring is stopping.
    ended: Option<Sender<u16>>,
}

/// The state of a worker's thread.
pub(super) struct Worker {
    context: RingContext,
    memory: Memory,
    rings: Vec<AssignedRing>,
    /// The position in `rings` of the ring that is served first.
    first: usize,
    commands: Receiver<WorkerCommand>,
    mailbox: Mailbox,
    inside: Inside,
    poller: Poller,
    adaptive_poll: AdaptivePoll,
    counts: Arc<WorkerCounters>,
    completions: Vec<Completed>,
}

impl Worker {
    /// Starts a worker's thread for these rings, each with its index.
    pub(super) fn spawn(
        context: RingContext,
        memory: Memory,
        rings: Vec<(u16, Vring)>,
        inside: Inside,
        polling: Polling,
        counts: Arc<WorkerCounters>,
    ) -> Result<(Mailbox, JoinHandle<()>)> {
        let failed = |call| move |errno| Error::Call(Failed::new(call, errno));
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed("eventfd"))?;
        let (sender, commands) = mpsc::channel();
        let mailbox = Mailbox { commands: sender, wake: Arc::new(wake) };
        let poller = Poller::new().map_err(Error::Poll)?;
        poller.add(&*mailbox.wake, Interest::Read, WAKE_TOKEN).map_err(Error::Poll)?;
        poller.add(context.drive.interrupt(), Interest::Read, DRIVE_TOKEN).map_err(Error::Poll)?;
        let assign = |(index, vring)| {
            let ring = Ring::new(index, Arc::clone(&counts));
            AssignedRing { index, vring, ring, kick: None, ended: None }
        };
        let worker = Self {
            context,
            memory,
            rings: rings.into_iter().map(assign).collect(),
            counts,
            first: 0,
            commands,
            mailbox: mailbox.clone(),
            inside,
            poller,
            adaptive_poll: AdaptivePoll::new(polling),
            completions: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("vhost-blk".into()).spawn(move || worker.run());
        Ok((mailbox, thread.map_err(Error::Thread)?))
    }

    fn run(mut self) {
        let (mut tokens, mut last_progress, mut slept) = (Vec::new(), Instant::now(), None::<Duration>);
        loop {
            let Ok(commanded) = self.run_commands() else { return };
            let progress = self.poll_once() | commanded;
            let now = Instant::now();
            if progress {
                if let Some(slept) = slept.take() {
                    self.adaptive_poll.woke_after(slept);
                }
                last_progress = now;
                continue;
            }
            if self.adaptive_poll.continues(now - last_progress) {
                std::hint::spin_loop();
                continue;
            }
            // From here on guests kick. A request that was offered before that came without a kick and is served first (virtio
            // 1.2, 2.7.10).
            if self.enable_notifications() {
                continue;
            }
            if let Err(error) = self.poller.wait(self.sleep_timeout_ms(now), &mut tokens) {
                log::error!("epoll: {error}");
                return;
            }
            slept = Some(now.elapsed());
            for token in &tokens {
                self.clear_eventfd(*token);
            }
        }
    }

    /// Returns the time until the next retry or time-out, in milliseconds; -1 where there is none.
    fn sleep_timeout_ms(&self, now: Instant) -> i32 {
        let next = self.rings.iter().filter_map(|assigned| assigned.ring.next_tick(now)).min();
        let remaining = next.map(|next| next.saturating_duration_since(now).as_millis() + 1);
        remaining.map_or(-1, |remaining| i32::try_from(remaining).unwrap_or(i32::MAX))
    }

    /// Reads an eventfd that has become readable, so that it is not reported again.
    fn clear_eventfd(&self, token: u64) {
        let mut count = [0; 8];
        let fd = match token {
            WAKE_TOKEN => Some(self.mailbox.wake.as_fd()),
            DRIVE_TOKEN => Some(self.context.drive.interrupt()),
            // A kick is never read (it is polled edge-triggered): the front-end shares its file description, could clear
            // O_NONBLOCK, and the read would block.
            _ => None,
        };
        if let Some(fd) = fd {
            let _ = rustix::io::read(fd, &mut count);
        }
    }

    /// Executes the commands that have come. Returns true if there were any, and an error once the thread is to end.
    fn run_commands(&mut self) -> Result<bool, ()> {
        let mut progress = false;
        loop {
            let command = match self.commands.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Empty) => return Ok(progress),
                Err(TryRecvError::Disconnected) => return Err(()),
            };
            progress = true;
            match command {
                WorkerCommand::Exit => return Err(()),
                WorkerCommand::Poll => {}
                WorkerCommand::Kick { ring, kick } => {
                    if let Some(assigned) = self.rings.iter_mut().find(|assigned| assigned.index == ring) {
                        assigned.watch_kick(kick, &self.poller);
                    }
                }
                WorkerCommand::Start { ring, inflight } => {
                    self.with_ring(ring, |assigned, queue, memory, context| {
                        // The thread that waited for an earlier end of the ring has given up: the ring must not end again for it.
                        assigned.ended = None;
                        assigned.ring.start(queue, memory, inflight, context);
                    })
                }
                WorkerCommand::Answer { ring, head, ticket, admits } => {
                    self.with_ring(ring, |assigned, queue, memory, _| {
                        assigned.ring.query_answered(queue, memory, head, ticket, admits);
                    })
                }
                WorkerCommand::Stop { ring, ended } => self.with_ring(ring, |assigned, _, _, _| {
                    assigned.ring.stop();
                    assigned.ended = Some(ended);
                }),
                WorkerCommand::Abandon { ring, done } => self.with_ring(ring, |assigned, _, _, _| {
                    assigned.ended = None;
                    assigned.ring.abandon();
                    // The front-end's thread may have given up waiting.
                    let _ = done.send(());
                }),
            }
        }
    }

    /// Runs `act` on a ring, under its lock.
    fn with_ring(
        &mut self,
        ring: u16,
        act: impl FnOnce(&mut AssignedRing, &mut Queue, &GuestMemoryMmap, &RingContext),
    ) {
        if let Some(assigned) = self.rings.iter_mut().find(|assigned| assigned.index == ring) {
            let vring = assigned.vring.clone();
            let (mut locked, memory) = lock(&vring, &self.memory);
            act(assigned, locked.get_queue_mut(), &memory, &self.context);
        }
    }

    /// Polls the drive's completion queue and every ring once. Returns true if there was anything to do.
    fn poll_once(&mut self) -> bool {
        self.context.drive.complete(&mut self.completions);
        let mut progress = !self.completions.is_empty();
        let (mut served, mut refused) = (None, false);
        let (before, from_first) = self.rings.split_at_mut(self.first);
        let before = (0..).zip(before);
        for (position, assigned) in (self.first..).zip(from_first).chain(before) {
            let (mut locked, memory) = lock(&assigned.vring, &self.memory);
            let (enabled, queue) = (locked.is_enabled(), locked.get_queue_mut());
            for Completed { tag, result } in &self.completions {
                let (generation, ring, head) = from_tag(*tag);
                if ring == assigned.index {
                    assigned.ring.completed(queue, &memory, (generation, head), *result);
                }
            }
            assigned.ring.tick(queue, &memory, Instant::now());
            let outstanding = assigned.ring.outstanding();
            progress |= assigned.ring.pull(queue, &memory, &mut self.context, enabled);
            if assigned.ring.outstanding() > outstanding {
                served.get_or_insert(position);
            }
            refused |= assigned.ring.has_pending();
            if let Some(ended) = assigned.ended.take_if(|_| assigned.ring.outstanding() == 0) {
                assigned.ring.finish(queue, &memory);
                progress = true;
                let _ = ended.send(locked.get_queue().next_avail());
            }
            if assigned.ring.take_notify()
                && locked.needs_notification().unwrap_or(true)
                && let Err(error) = locked.signal_used_queue()
            {
                log::debug!("queue {}: the guest cannot be notified: {error}", assigned.index);
            }
            drop(locked);
            for query in assigned.ring.queries.drain(..) {
                query_access(&self.inside, &self.mailbox, assigned.index, query);
            }
        }
        // If the drive had no room for all, the ring that was served first is last in the next pass: no ring starves another.
        if let Some(position) = served.filter(|_| refused) {
            self.first = (position + 1) % self.rings.len();
        }
        self.completions.clear();
        self.context.drive.ring();
        let gauges = self.rings.iter().map(|assigned| assigned.ring.gauges());
        let (in_flight, deferred) = gauges.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        self.counts.set_gauges(in_flight, deferred);
        progress
    }

    /// Enables the notifications of all rings. Returns true if a ring has a request already.
    fn enable_notifications(&mut self) -> bool {
        let mut more = false;
        for assigned in self.rings.iter().filter(|assigned| assigned.ring.is_running()) {
            let mut locked = assigned.vring.get_mut();
            more |= locked.is_enabled() && locked.enable_notification().unwrap_or(false);
        }
        more
    }
}

/// Replaces the memory that workers see. When this returns, no worker accesses the previous memory.
///
/// It replaces the memory first and then takes every ring's lock once. A worker loads memory under a ring's lock ([`lock`]):
/// one that had the lock before has dropped it by then, and one that takes it later loads the new memory.
pub(super) fn replace_memory<'a>(
    memory: &Memory,
    vrings: impl Iterator<Item = &'a Vring>,
    replacement: GuestMemoryMmap,
) {
    memory.lock().unwrap_or_else(PoisonError::into_inner).replace(replacement);
    vrings.for_each(|vring| drop(vring.get_mut()));
}

/// Takes a ring's lock and loads guest memory under it: the only way by which a worker gets memory. Memory that was loaded
/// before the lock was taken could be written to after its removal was answered ([`replace_memory`]).
fn lock<'a>(
    vring: &'a Vring,
    memory: &Memory,
) -> (<Vring as VringStateMutGuard<'a, Memory>>::G, <Memory as GuestAddressSpace>::T) {
    let locked = vring.get_mut();
    let memory = memory.memory();
    (locked, memory)
}

impl AssignedRing {
    /// Polls this kick instead of the one before.
    fn watch_kick(&mut self, kick: Option<OwnedFd>, poller: &Poller) {
        if let Some(before) = std::mem::replace(&mut self.kick, kick) {
            // Removed explicitly: closing it does not, because the front-end has the same file open (epoll(7)).
            let _ = poller.remove(&before);
        }
        if let Some(kick) = &self.kick
            && let Err(error) = poller.add(kick, Interest::ReadEdge, FIRST_KICK_TOKEN + u64::from(self.index))
        {
            log::warn!("queue {}: its kick cannot be polled: {error}", self.index);
        }
    }
}

/// Queries the session about the pages of a deferred request. The answer comes as a command.
fn query_access(inside: &Inside, mailbox: &Mailbox, ring: u16, query: PageQuery) {
    let PageQuery { head, ticket, pages, writes } = query;
    let mailbox = mailbox.clone();
    let reply = move |admits| mailbox.send(WorkerCommand::Answer { ring, head, ticket, admits });
    inside.ask(pages, writes, Box::new(reply));
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
