//! A worker: one thread with one queue of the drive, for the virtqueues that are its share.
//!
//! It never waits for anybody: it looks at its rings and its queue, and sleeps when there is nothing. A ring is locked
//! for one look at a time, so that who holds the lock knows that no worker is in guest memory; that is how memory is
//! taken from workers before it is let go ([`super::frontend`]). No lock is for the check or the account of a request.

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

use super::counts::Counts;
use super::inflight::QueueInflight;
use super::poll::{Moment, Polling};
use super::ring::{Desk, Memory, Question, Ring, Vring};
use super::slot::of_tag;
use crate::error::{Error, Result};
use crate::gate::Admits;
use crate::serve::Inside;
use crate::serve::poller::{Interest, Poller};

/// Tokens: orders have come, completions have, and from there on a ring's kick.
const WAKE: u64 = 0;
const DRIVE: u64 = 1;
const KICK: u64 = 2;

/// What a worker is told.
#[derive(Debug)]
pub(super) enum Order {
    /// What a guest kicks a ring by.
    Kick { ring: u16, kick: Option<OwnedFd> },
    /// A ring is set up: it begins.
    Start { ring: u16, inflight: Option<QueueInflight> },
    /// There may be something to do.
    Look,
    /// A ring takes no more; once the drive has nothing of it, the next index of its available ring is sent.
    Stop { ring: u16, ended: Sender<u16> },
    /// A ring's life is over although the drive may have something of it: what that becomes is nobody's. `done` is sent to,
    /// or dropped, once nothing more is written for it.
    Abandon { ring: u16, done: Sender<()> },
    /// What a held request's pages are.
    Answer { ring: u16, head: u16, ticket: u64, admits: Admits },
    /// The thread ends.
    Leave,
}

/// Where a worker takes its orders.
#[derive(Debug, Clone)]
pub(super) struct Mailbox {
    orders: Sender<Order>,
    wake: Arc<OwnedFd>,
}

impl Mailbox {
    /// Gives an order; one to a worker that is gone is lost.
    pub(super) fn send(&self, order: Order) {
        if self.orders.send(order).is_ok() {
            // It fails only where the counter is full, and then the worker is awake already.
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// A ring of this worker's, and who waits for its end.
struct Share {
    index: u16,
    vring: Vring,
    ring: Ring,
    /// The worker's own descriptor of the guest's kick.
    kick: Option<OwnedFd>,
    ended: Option<Sender<u16>>,
}

/// A worker's thread.
pub(super) struct Worker {
    desk: Desk,
    memory: Memory,
    shares: Vec<Share>,
    /// The one that is looked at first.
    first: usize,
    orders: Receiver<Order>,
    mailbox: Mailbox,
    inside: Inside,
    poller: Poller,
    moment: Moment,
    counts: Arc<Counts>,
    done: Vec<Completed>,
}

impl Worker {
    /// Starts a thread for these rings, each with its number.
    pub(super) fn spawn(
        desk: Desk,
        memory: Memory,
        rings: Vec<(u16, Vring)>,
        inside: Inside,
        polling: Polling,
        counts: Arc<Counts>,
    ) -> Result<(Mailbox, JoinHandle<()>)> {
        let failed = |call| move |errno| Error::Call(Failed::new(call, errno));
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed("eventfd"))?;
        let (sender, orders) = mpsc::channel();
        let mailbox = Mailbox { orders: sender, wake: Arc::new(wake) };
        let poller = Poller::new().map_err(Error::Poll)?;
        poller.add(&*mailbox.wake, Interest::Read, WAKE).map_err(Error::Poll)?;
        poller.add(desk.drive.interrupt(), Interest::Read, DRIVE).map_err(Error::Poll)?;
        let share = |(index, vring)| {
            let ring = Ring::new(index, Arc::clone(&counts));
            Share { index, vring, ring, kick: None, ended: None }
        };
        let worker = Self {
            desk,
            memory,
            shares: rings.into_iter().map(share).collect(),
            counts,
            first: 0,
            orders,
            mailbox: mailbox.clone(),
            inside,
            poller,
            moment: Moment::new(polling),
            done: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("vhost-blk".into()).spawn(move || worker.run());
        Ok((mailbox, thread.map_err(Error::Thread)?))
    }

    fn run(mut self) {
        let (mut tokens, mut busy, mut slept) = (Vec::new(), Instant::now(), None::<Duration>);
        loop {
            let Ok(ordered) = self.obey() else { return };
            let did = self.look() | ordered;
            let now = Instant::now();
            if did {
                if let Some(slept) = slept.take() {
                    self.moment.woken(slept);
                }
                busy = now;
                continue;
            }
            if self.moment.lasts(now - busy) {
                std::hint::spin_loop();
                continue;
            }
            // Whoever has something from here on wakes the worker; who had it before is seen by one more look.
            if self.listen() {
                continue;
            }
            if let Err(error) = self.poller.wait(self.patience(now), &mut tokens) {
                log::error!("epoll: {error}");
                return;
            }
            slept = Some(now.elapsed());
            for token in &tokens {
                self.clear(*token);
            }
        }
    }

    /// How long to sleep at most, in milliseconds.
    fn patience(&self, now: Instant) -> i32 {
        let next = self.shares.iter().filter_map(|share| share.ring.next_look(now)).min();
        let left = next.map(|next| next.saturating_duration_since(now).as_millis() + 1);
        left.map_or(-1, |left| i32::try_from(left).unwrap_or(i32::MAX))
    }

    /// Takes what a descriptor says off it.
    fn clear(&self, token: u64) {
        let mut count = [0; 8];
        let fd = match token {
            WAKE => Some(self.mailbox.wake.as_fd()),
            DRIVE => Some(self.desk.drive.interrupt()),
            // A kick is never read: the guest's VMM has it too, and could make it one at which a reader waits.
            _ => None,
        };
        if let Some(fd) = fd {
            let _ = rustix::io::read(fd, &mut count);
        }
    }

    /// Does what it was told; whether there was anything. Fails once it is to leave.
    fn obey(&mut self) -> Result<bool, ()> {
        let mut did = false;
        loop {
            let order = match self.orders.try_recv() {
                Ok(order) => order,
                Err(TryRecvError::Empty) => return Ok(did),
                Err(TryRecvError::Disconnected) => return Err(()),
            };
            did = true;
            match order {
                Order::Leave => return Err(()),
                Order::Look => {}
                Order::Kick { ring, kick } => {
                    if let Some(share) = self.shares.iter_mut().find(|share| share.index == ring) {
                        share.watch(kick, &self.poller);
                    }
                }
                Order::Start { ring, inflight } => self.with(ring, |share, queue, memory, desk| {
                    // Whoever waited for the end of what it was before is gone, and this one does not end with that.
                    share.ended = None;
                    share.ring.start(queue, memory, inflight, desk);
                }),
                Order::Answer { ring, head, ticket, admits } => self.with(ring, |share, queue, memory, _| {
                    share.ring.answered(queue, memory, head, ticket, admits);
                }),
                Order::Stop { ring, ended } => self.with(ring, |share, _, _, _| {
                    share.ring.stop();
                    share.ended = Some(ended);
                }),
                Order::Abandon { ring, done } => self.with(ring, |share, _, _, _| {
                    share.ended = None;
                    share.ring.abandon();
                    // Who no longer waits for it does not need to know.
                    let _ = done.send(());
                }),
            }
        }
    }

    /// Does something to a ring behind its lock.
    fn with(&mut self, ring: u16, act: impl FnOnce(&mut Share, &mut Queue, &GuestMemoryMmap, &Desk)) {
        if let Some(share) = self.shares.iter_mut().find(|share| share.index == ring) {
            let vring = share.vring.clone();
            let (mut locked, memory) = lock(&vring, &self.memory);
            act(share, locked.get_queue_mut(), &memory, &self.desk);
        }
    }

    /// Looks at the drive's queue and at every ring once; whether there was anything.
    fn look(&mut self) -> bool {
        self.desk.drive.complete(&mut self.done);
        let mut did = !self.done.is_empty();
        let (mut served, mut refused) = (None, false);
        let (before, from_first) = self.shares.split_at_mut(self.first);
        let before = (0..).zip(before);
        for (nth, share) in (self.first..).zip(from_first).chain(before) {
            let (mut locked, memory) = lock(&share.vring, &self.memory);
            let (enabled, queue) = (locked.is_enabled(), locked.get_queue_mut());
            for Completed { tag, result } in &self.done {
                let (life, ring, head) = of_tag(*tag);
                if ring == share.index {
                    share.ring.completed(queue, &memory, (life, head), *result);
                }
            }
            share.ring.tick(queue, &memory, Instant::now());
            let flying = share.ring.flying();
            did |= share.ring.pull(queue, &memory, &mut self.desk, enabled);
            if share.ring.flying() > flying {
                served.get_or_insert(nth);
            }
            refused |= share.ring.is_waiting();
            if let Some(ended) = share.ended.take_if(|_| share.ring.flying() == 0) {
                share.ring.end(queue, &memory);
                did = true;
                let _ = ended.send(locked.get_queue().next_avail());
            }
            if share.ring.take_told()
                && locked.needs_notification().unwrap_or(true)
                && let Err(error) = locked.signal_used_queue()
            {
                log::debug!("queue {}: the guest cannot be told: {error}", share.index);
            }
            drop(locked);
            for question in share.ring.questions.drain(..) {
                ask(&self.inside, &self.mailbox, share.index, question);
            }
        }
        // Where there was no room for all, who was served first is last the next time: no ring has the drive for itself.
        if let Some(nth) = served.filter(|_| refused) {
            self.first = (nth + 1) % self.shares.len();
        }
        self.done.clear();
        self.desk.drive.ring();
        let now = self.shares.iter().map(|share| share.ring.now());
        let (in_flight, held) = now.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        self.counts.now(in_flight, held);
        did
    }

    /// Asks every guest to kick; whether there is something already.
    fn listen(&mut self) -> bool {
        let mut more = false;
        for share in self.shares.iter().filter(|share| share.ring.is_on()) {
            let mut locked = share.vring.get_mut();
            more |= locked.is_enabled() && locked.enable_notification().unwrap_or(false);
        }
        more
    }
}

/// Replaces the memory that workers see; when this returns none of them is in what they saw before.
///
/// It replaces the memory first and then takes every ring's lock once. A worker loads memory behind a ring's lock ([`lock`]):
/// who had the lock before that has let go of it, and who takes it later finds the new memory.
pub(super) fn replace_memory<'a>(
    memory: &Memory,
    vrings: impl Iterator<Item = &'a Vring>,
    replacement: GuestMemoryMmap,
) {
    memory.lock().unwrap_or_else(PoisonError::into_inner).replace(replacement);
    vrings.for_each(|vring| drop(vring.get_mut()));
}

/// Takes a ring's lock, and returns guest memory as it is behind that lock: the only way for a worker to come by memory.
/// Memory that was loaded before the lock was had could be written after its removal was answered ([`replace_memory`]).
fn lock<'a>(
    vring: &'a Vring,
    memory: &Memory,
) -> (<Vring as VringStateMutGuard<'a, Memory>>::G, <Memory as GuestAddressSpace>::T) {
    let locked = vring.get_mut();
    let memory = memory.memory();
    (locked, memory)
}

impl Share {
    /// Listens to this kick, and to no other.
    fn watch(&mut self, kick: Option<OwnedFd>, poller: &Poller) {
        if let Some(before) = std::mem::replace(&mut self.kick, kick) {
            // It is not gone by being closed here: the guest has it too.
            let _ = poller.forget(&before);
        }
        if let Some(kick) = &self.kick
            && let Err(error) = poller.add(kick, Interest::News, KICK + u64::from(self.index))
        {
            log::warn!("queue {}: its kick will not do: {error}", self.index);
        }
    }
}

/// Asks the session about a held request's pages; the answer comes as an order.
fn ask(inside: &Inside, mailbox: &Mailbox, ring: u16, question: Question) {
    let Question { head, ticket, pages, writes } = question;
    let mailbox = mailbox.clone();
    let reply = move |admits| mailbox.send(Order::Answer { ring, head, ticket, admits });
    inside.ask(pages, writes, Box::new(reply));
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
