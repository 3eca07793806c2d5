//! The completions of the ring, and their delivery.
//!
//! The completion queue is shared by the domain and all its devices; any thread may reap it, and delivers every
//! completion under one lock. A released tag belongs either to the unmap in progress (`fresh`), or to an earlier one
//! that found operations in flight (`outstanding`); in that case the last tag of a ticket ends the ticket and wakes the
//! domain's owner.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use passgate_bindings::Failed;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::uring::{Completion, Completions, OpId, Ring, Tag};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;

use crate::Ticket;

/// One operation of a device and its result.
#[derive(Debug)]
pub(crate) struct Operation {
    id: OpId,
    /// True if it is submitted again and again (by a device's copy engine), false if it ends once.
    reusable: bool,
    state: AtomicU64,
}

/// Set in [`Operation::state`] once a result is known; the low 32 bits are the number of bytes, or the errno.
const RESULT: u64 = 1 << 63;
/// Set in [`Operation::state`] if the result is an errno.
const FAILED: u64 = 1 << 62;
/// Set in [`Operation::state`] once no further completion will come.
const ENDED: u64 = 1 << 61;

impl Operation {
    pub(crate) fn new(id: OpId, reusable: bool) -> Arc<Self> {
        Arc::new(Self { id, reusable, state: AtomicU64::new(0) })
    }

    /// Returns its id in the completions (`user_data`).
    pub(crate) fn id(&self) -> OpId {
        self.id
    }

    /// Prepares a reusable operation for its next submission.
    pub(crate) fn rearm(&self) {
        self.state.store(0, Ordering::Release);
    }

    /// Returns the number of bytes transferred, or the errno; none while the kernel may still access the pages.
    pub(crate) fn outcome(&self) -> Option<Result<u32, Errno>> {
        let state = self.state.load(Ordering::Acquire);
        if state & ENDED == 0 {
            return None;
        }
        let low = state as u32;
        Some(if state & FAILED == 0 { Ok(low) } else { Err(Errno::from_raw_os_error(low as i32)) })
    }

    /// Records a completion. The first one has the result, the last one (without `more`) ends the operation; a
    /// zero-copy send has two, other operations have one.
    fn complete(&self, result: Result<u32, Errno>, more: bool) {
        let mut state = self.state.load(Ordering::Acquire);
        if state & RESULT == 0 {
            state |= RESULT
                | match result {
                    Ok(bytes) => bytes.into(),
                    Err(errno) => FAILED | errno.raw_os_error() as u64,
                };
        }
        if !more {
            state |= ENDED;
        }
        self.state.store(state, Ordering::Release);
    }
}

/// A slot that an unmap emptied while operations were in flight over its pages.
#[derive(Debug)]
struct Outstanding {
    ticket: Ticket,
    /// Keeps the file open until the kernel has unpinned the pages.
    _file: Arc<GuestFile>,
}

/// The state of a ticket.
#[derive(Debug)]
struct Pending {
    /// The number of tags that have not been released yet.
    tags: u32,
    /// True if the caller of an unmap got the ticket; false after a failed unmap and a rolled-back map.
    reported: bool,
}

/// The completion side of a soft domain.
#[derive(Debug)]
pub(crate) struct Reaper {
    queue: Completions,
    ring: Arc<Ring>,
    wake_source: WakeSource,
    /// True while `outstanding` is not empty; can be read without the lock.
    tickets_outstanding: Arc<AtomicBool>,
    /// The number of busy devices, which reap the queue as part of their operations.
    busy: u32,
    operations: HashMap<OpId, Arc<Operation>>,
    /// The tags released since the last call of [`Reaper::settle`] that are not in `outstanding`.
    fresh: Vec<Tag>,
    outstanding: HashMap<Tag, Outstanding>,
    tickets: HashMap<Ticket, Pending>,
    ended: Vec<Ticket>,
    last_ticket: u64,
}

impl Reaper {
    pub(crate) fn new(ring: Arc<Ring>, queue: Completions, wake_source: WakeSource) -> Self {
        Self {
            queue,
            ring,
            wake_source,
            tickets_outstanding: Arc::default(),
            busy: 0,
            operations: HashMap::new(),
            fresh: Vec::new(),
            outstanding: HashMap::new(),
            tickets: HashMap::new(),
            ended: Vec::new(),
            last_ticket: 0,
        }
    }

    /// Registers `operation`: its completions are delivered to it from now on.
    pub(crate) fn register(&mut self, operation: &Arc<Operation>) {
        self.operations.insert(operation.id, Arc::clone(operation));
    }

    /// Removes `operation`: further completions of it are ignored.
    pub(crate) fn unregister(&mut self, operation: &Operation) {
        self.operations.remove(&operation.id);
    }

    /// Removes every completion from the queue and delivers it.
    pub(crate) fn reap(&mut self) {
        let Self { queue, operations, fresh, outstanding, tickets, ended, .. } = self;
        let (waiting, known) = (outstanding.len(), ended.len());
        queue.reap(|completion| match completion {
            Completion::Op { id, result, more } => {
                let Some(operation) = operations.get(&id) else { return };
                operation.complete(result, more);
                if !more && !operation.reusable {
                    operations.remove(&id);
                }
            }
            Completion::Released(tag) => {
                if outstanding.is_empty() {
                    return fresh.push(tag);
                }
                let Some(Outstanding { ticket, .. }) = outstanding.remove(&tag) else {
                    return fresh.push(tag);
                };
                let Some(pending) = tickets.get_mut(&ticket) else { return };
                pending.tags -= 1;
                if pending.tags == 0 {
                    if pending.reported {
                        ended.push(ticket);
                    }
                    tickets.remove(&ticket);
                }
            }
        });
        if ended.len() > known {
            self.wake_source.signal();
        }
        if waiting > 0 && outstanding.is_empty() {
            self.tickets_outstanding.store(false, Ordering::Release);
            self.wake_source.set_registered(&self.ring, false);
        }
    }

    /// Returns the flag that is true while a ticket is outstanding.
    pub(crate) fn tickets_outstanding(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.tickets_outstanding)
    }

    /// A device begins a series of operations, whose completions are not to wake the owner of the domain.
    pub(crate) fn device_busy(&mut self) {
        self.busy += 1;
        if self.busy == 1 && !self.outstanding.is_empty() {
            self.wake_source.set_armed(&self.ring, false);
        }
    }

    /// The series has ended; all completions that have come meanwhile are delivered.
    pub(crate) fn device_idle(&mut self) {
        // Before arming: what came meanwhile would wake the owner otherwise.
        self.reap();
        self.busy -= 1;
        if self.busy == 0 && !self.outstanding.is_empty() {
            self.wake_source.set_armed(&self.ring, true);
        }
    }

    /// Records `count` slots that have just been emptied. The tags that have not been released yet become outstanding
    /// under a new ticket, which [`Self::take_ended`] returns later if it is `reported`; none if all have been
    /// released. The caller serialises these calls, each with the emptying of its slots, so that every fresh tag is one
    /// of `emptied`.
    pub(crate) fn settle<'a>(
        &mut self,
        count: usize,
        emptied: impl Iterator<Item = (Tag, &'a Arc<GuestFile>)>,
        reported: bool,
    ) -> Option<Ticket> {
        self.reap();
        if self.fresh.len() == count {
            self.fresh.clear();
            return None;
        }
        self.last_ticket += 1;
        let ticket = Ticket(self.last_ticket);
        let mut tags = 0;
        if self.outstanding.is_empty() {
            self.tickets_outstanding.store(true, Ordering::Release);
            self.wake_source.set_registered(&self.ring, true);
            self.wake_source.set_armed(&self.ring, self.busy == 0);
        }
        // Tags are released in any order.
        self.fresh.sort_unstable();
        for (tag, file) in emptied {
            if self.fresh.binary_search(&tag).is_err() {
                tags += 1;
                self.outstanding.insert(tag, Outstanding { ticket, _file: Arc::clone(file) });
            }
        }
        self.fresh.clear();
        self.tickets.insert(ticket, Pending { tags, reported });
        Some(ticket)
    }

    /// Returns true while operations under a ticket are in flight.
    pub(crate) fn is_running(&mut self, ticket: Ticket) -> bool {
        self.reap();
        self.tickets.contains_key(&ticket)
    }

    /// Appends the tickets that have ended.
    pub(crate) fn take_ended(&mut self, ended: &mut Vec<Ticket>) {
        if !self.ended.is_empty() {
            ended.append(&mut self.ended);
            self.wake_source.clear();
        }
    }
}

/// The descriptor that the owner of a domain polls: an epoll instance with an eventfd that is signalled when a ticket
/// ends, and, while tickets are outstanding and no device is busy, with the ring itself. A busy device reaps tags as
/// part of its operations, so its own completions need not wake the owner.
#[derive(Debug)]
pub(crate) struct WakeSource {
    eventfd: OwnedFd,
    epoll: Arc<OwnedFd>,
}

impl WakeSource {
    pub(crate) fn new() -> Result<Self, Failed> {
        let counter = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Failed::new("eventfd", errno))?;
        let both = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Failed::new("epoll_create1", e))?;
        epoll::add(&both, &counter, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
            .map_err(|errno| Failed::new("epoll_ctl", errno))?;
        Ok(Self { eventfd: counter, epoll: Arc::new(both) })
    }

    /// Returns the descriptor to poll.
    pub(crate) fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.epoll)
    }

    fn signal(&self) {
        // A write to a full eventfd fails, but then it is readable already.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }

    fn clear(&self) {
        let _ = rustix::io::read(&self.eventfd, &mut [0; 8]);
    }

    /// Adds the ring to the epoll instance, without events, or removes it. While it is not in it, a completion causes
    /// no wake-up work in the kernel.
    fn set_registered(&self, ring: &Ring, on: bool) {
        let none = epoll::EventFlags::empty();
        Self::check(if on {
            epoll::add(&self.epoll, ring, epoll::EventData::new_u64(1), none)
        } else {
            epoll::delete(&self.epoll, ring)
        });
    }

    /// Sets whether a completion in a registered ring, including one that is there already, makes the descriptor
    /// readable.
    fn set_armed(&self, ring: &Ring, on: bool) {
        let flags = if on { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        Self::check(epoll::modify(&self.epoll, ring, epoll::EventData::new_u64(1), flags));
    }

    fn check(changed: rustix::io::Result<()>) {
        if let Err(errno) = changed {
            log::error!("soft: cannot watch the ring ({errno}): ended tickets are found only by a poll");
        }
    }
}
