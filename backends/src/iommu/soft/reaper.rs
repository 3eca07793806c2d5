//! What the kernel reports, and who waits for it.
//!
//! The completion queue is shared by the domain and all its devices; whoever takes a completion off it delivers
//! it, under one lock. A tag is either of the unmap that is going on right now (`fresh`) or of an earlier one that
//! found operations in flight (`outstanding`): then the last tag of its ticket ends the ticket and rings the bell.

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

/// One operation of a device and what became of it.
#[derive(Debug)]
pub(crate) struct Flight {
    id: OpId,
    /// Whether it is used again and again (a device's own line) or ends once.
    standing: bool,
    state: AtomicU64,
}

/// Set in [`Flight::state`] once a result is known; the low 32 bits are the bytes, or the errno.
const RESULT: u64 = 1 << 63;
/// Set where the result is an errno.
const FAILED: u64 = 1 << 62;
/// Set once nothing more will come.
const ENDED: u64 = 1 << 61;

impl Flight {
    pub(crate) fn new(id: OpId, standing: bool) -> Arc<Self> {
        Arc::new(Self { id, standing, state: AtomicU64::new(0) })
    }

    /// Its name in the completions.
    pub(crate) fn id(&self) -> OpId {
        self.id
    }

    /// Makes a standing flight ready for the next operation.
    pub(crate) fn rearm(&self) {
        self.state.store(0, Ordering::Release);
    }

    /// Bytes done, or why not; none while the kernel may still touch the pages.
    pub(crate) fn outcome(&self) -> Option<Result<u32, Errno>> {
        let state = self.state.load(Ordering::Acquire);
        if state & ENDED == 0 {
            return None;
        }
        let low = state as u32;
        Some(if state & FAILED == 0 { Ok(low) } else { Err(Errno::from_raw_os_error(low as i32)) })
    }

    /// The first completion brings the result, the last the end; mostly they are one.
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

/// Pages that an unmap took out of the table while operations still ran over them.
#[derive(Debug)]
struct Outstanding {
    ticket: Ticket,
    /// Kept until the kernel has let go.
    _file: Arc<GuestFile>,
}

/// What a ticket still waits for.
#[derive(Debug)]
struct Pending {
    tags: u32,
    /// Whether anybody was told of it; nobody is where a failed map takes its slots back.
    told: bool,
}

/// The completion side of a soft domain.
#[derive(Debug)]
pub(crate) struct Reaper {
    queue: Completions,
    ring: Arc<Ring>,
    bell: Bell,
    /// Whether anything is outstanding, for who does not hold this.
    waiting: Arc<AtomicBool>,
    /// Devices that are at work, and take what comes off the queue as they go.
    busy: u32,
    flights: HashMap<OpId, Arc<Flight>>,
    fresh: Vec<Tag>,
    outstanding: HashMap<Tag, Outstanding>,
    tickets: HashMap<Ticket, Pending>,
    ended: Vec<Ticket>,
    last_ticket: u64,
}

impl Reaper {
    pub(crate) fn new(ring: Arc<Ring>, queue: Completions, bell: Bell) -> Self {
        Self {
            queue,
            ring,
            bell,
            waiting: Arc::default(),
            busy: 0,
            flights: HashMap::new(),
            fresh: Vec::new(),
            outstanding: HashMap::new(),
            tickets: HashMap::new(),
            ended: Vec::new(),
            last_ticket: 0,
        }
    }

    /// From now on completions of `flight` are delivered to it.
    pub(crate) fn expect(&mut self, flight: &Arc<Flight>) {
        self.flights.insert(flight.id, Arc::clone(flight));
    }

    /// Completions of `flight` are delivered to nobody any more.
    pub(crate) fn forget(&mut self, flight: &Flight) {
        self.flights.remove(&flight.id);
    }

    /// Takes every completion off the queue and delivers it.
    pub(crate) fn reap(&mut self) {
        let Self { queue, flights, fresh, outstanding, tickets, ended, .. } = self;
        let (waiting, known) = (outstanding.len(), ended.len());
        queue.reap(|completion| match completion {
            Completion::Op { id, result, more } => {
                let Some(flight) = flights.get(&id) else { return };
                flight.complete(result, more);
                if !more && !flight.standing {
                    flights.remove(&id);
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
                    if pending.told {
                        ended.push(ticket);
                    }
                    tickets.remove(&ticket);
                }
            }
        });
        if ended.len() > known {
            self.bell.ring();
        }
        if waiting > 0 && outstanding.is_empty() {
            self.waiting.store(false, Ordering::Release);
            self.bell.follow(&self.ring, false);
        }
    }

    /// Set while anything is outstanding.
    pub(crate) fn waiting(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.waiting)
    }

    /// A device begins a run of operations whose completions are no news to the owner of the domain.
    pub(crate) fn begin(&mut self) {
        self.busy += 1;
        if self.busy == 1 && !self.outstanding.is_empty() {
            self.bell.watch(&self.ring, false);
        }
    }

    /// It has ended, and whatever came meanwhile is delivered.
    pub(crate) fn end(&mut self) {
        self.reap();
        self.busy -= 1;
        if self.busy == 0 && !self.outstanding.is_empty() {
            self.bell.watch(&self.ring, true);
        }
    }

    /// Settles `count` slots that have just been emptied: the tags that have not come yet wait under a new
    /// ticket, which [`Self::take_ended`] brings if it is `told`. None where all have come. The caller lets no
    /// two of these overlap, so every fresh tag is of this one.
    pub(crate) fn settle<'a>(
        &mut self,
        count: usize,
        emptied: impl Iterator<Item = (Tag, &'a Arc<GuestFile>)>,
        told: bool,
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
            self.waiting.store(true, Ordering::Release);
            self.bell.follow(&self.ring, true);
            self.bell.watch(&self.ring, self.busy == 0);
        }
        self.fresh.sort_unstable();
        for (tag, file) in emptied {
            if self.fresh.binary_search(&tag).is_err() {
                tags += 1;
                self.outstanding.insert(tag, Outstanding { ticket, _file: Arc::clone(file) });
            }
        }
        self.fresh.clear();
        self.tickets.insert(ticket, Pending { tags, told });
        Some(ticket)
    }

    /// True while operations under a ticket run.
    pub(crate) fn is_running(&mut self, ticket: Ticket) -> bool {
        self.reap();
        self.tickets.contains_key(&ticket)
    }

    /// Appends the tickets that have ended.
    pub(crate) fn take_ended(&mut self, ended: &mut Vec<Ticket>) {
        if !self.ended.is_empty() {
            ended.append(&mut self.ended);
            self.bell.hush();
        }
    }
}

/// What the owner of a domain waits for: one pollable fd over a counter that is written when a ticket ends, and,
/// while tickets are outstanding and no device is at work, the ring itself. A device hard at work takes the tags
/// off the queue as it goes, and rings nobody out of bed for its own completions.
#[derive(Debug)]
pub(crate) struct Bell {
    counter: OwnedFd,
    both: Arc<OwnedFd>,
}

impl Bell {
    pub(crate) fn new() -> Result<Self, Failed> {
        let counter = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Failed::new("eventfd", errno))?;
        let both = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Failed::new("epoll_create1", e))?;
        epoll::add(&both, &counter, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
            .map_err(|errno| Failed::new("epoll_ctl", errno))?;
        Ok(Self { counter, both: Arc::new(both) })
    }

    /// The fd to wait on.
    pub(crate) fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.both)
    }

    fn ring(&self) {
        // It fails only where the counter is full, and then it is readable already.
        let _ = rustix::io::write(&self.counter, &1u64.to_ne_bytes());
    }

    fn hush(&self) {
        let _ = rustix::io::read(&self.counter, &mut [0; 8]);
    }

    /// Whether the ring is looked at, at all. While it is not, a completion costs the kernel nothing more.
    fn follow(&self, ring: &Ring, on: bool) {
        let none = epoll::EventFlags::empty();
        Self::check(if on {
            epoll::add(&self.both, ring, epoll::EventData::new_u64(1), none)
        } else {
            epoll::delete(&self.both, ring)
        });
    }

    /// Whether a completion in a ring that is followed rings, also one that is there already.
    fn watch(&self, ring: &Ring, on: bool) {
        let flags = if on { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        Self::check(epoll::modify(&self.both, ring, epoll::EventData::new_u64(1), flags));
    }

    fn check(changed: rustix::io::Result<()>) {
        if let Err(errno) = changed {
            log::error!("soft: cannot watch the ring ({errno}): tickets are found only when somebody polls");
        }
    }
}
