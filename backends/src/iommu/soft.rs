//! The domain of software devices: io_uring's registered buffers as its mappings. The embedded default.
//!
//! No IOMMU, and yet nothing here is pretended: every mapping is a long-term pin that the kernel holds, DMA is
//! done by the kernel through that pin, a DMA to an empty slot is the kernel's own `EFAULT`, and *gone* is said
//! only once the kernel has reported the slot's tag. The devices never ask the domain's book; they go by a
//! translation of their own, which an unmap leaves stale ([`view`]).
//!
//! Limits, stated: one ring, so 16 384 mappings of at most 1 GiB; the kernel pins for writing, so a file opened
//! read-only cannot be mapped, and that a mapping is read-only is kept by the devices' translation alone; the
//! pinned bytes count against RLIMIT_MEMLOCK without CAP_IPC_LOCK. Before Linux 6.13 the kernel lets go of slots
//! strictly in turn: one operation that does not end holds back the tickets of all later unmaps. The kernel holds
//! the ring while it pins the pages of one slot, so short pieces keep a map from delaying an unmap elsewhere. A
//! process that forks without exec hands the ring, and so every pin, to its child.
//!
//! Locks are taken in this order: maps, then table, then view or reaper; view, then submissions. But for the
//! first, none is held for longer than one kernel call.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Offset, PAGE};
use passgate_bindings::uring::{self, Op, Ring, Slot, Span, Submissions};
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::device::soft::SoftDevice;
use crate::{Capabilities, Domain, Error, Result, Ticket, Unmap};

mod mapping;
pub(crate) mod reaper;
mod table;
mod view;

use mapping::Want;
use reaper::{Bell, Flight, Reaper};
use table::Table;
use view::View;

/// Operations that may be on their way into the kernel at once: one for each thread, and those are few.
const SUBMISSIONS: u32 = 64;

/// A soft domain. Devices come from [`SoftDomain::device`]; all of them see the same mappings.
#[derive(Debug)]
pub struct SoftDomain {
    ring: Arc<Ring>,
    /// Bytes that may be pinned, or none where there is no limit.
    memlock: Option<u64>,
    /// Held by whoever makes mappings, so that the table need not be held while the kernel pins.
    maps: Mutex<()>,
    table: Mutex<Table>,
    view: RwLock<View>,
    submissions: Mutex<Submissions>,
    reaper: Mutex<Reaper>,
    /// Whether a ticket is outstanding.
    waiting: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
}

/// What a device does to the memory at an IOVA, and with which file.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Dma<'fd> {
    /// The device writes guest memory, with what it reads from the file.
    Write(BorrowedFd<'fd>),
    /// The device reads guest memory, into the file.
    Read(BorrowedFd<'fd>),
    /// The device sends guest memory from where it is.
    Send(BorrowedFd<'fd>),
}

/// Why a DMA was not issued.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Refusal {
    /// No translation, or not for writing.
    Fault,
    /// The kernel did not take it.
    Failed(Failed),
}

impl SoftDomain {
    /// Opens a domain of its own ring. The locked-memory limit is that of the calling thread, now.
    pub fn open() -> Result<Arc<Self>> {
        Self::with_slots(uring::MAX_SLOTS)
    }

    /// Opens a domain with a smaller table, at most 16 384 slots.
    pub fn with_slots(slots: u32) -> Result<Arc<Self>> {
        let memlock = uring::memlock_limit();
        let slots = slots.clamp(1, uring::MAX_SLOTS);
        let (ring, submissions, completions) = Ring::open(SUBMISSIONS, slots)?;
        let bell = Bell::new().map_err(|failed| Error::Host {
            what: failed.to_string(),
            mend: "raise the limit of open files (`ulimit -n`, `LimitNOFILE=` in a systemd unit)",
        })?;
        let wake = bell.fd();
        let reaper = Reaper::new(Arc::clone(&ring), completions, bell);
        Ok(Arc::new(Self {
            maps: Mutex::default(),
            table: Mutex::new(Table::new(slots)),
            view: RwLock::default(),
            submissions: Mutex::new(submissions),
            waiting: reaper.waiting(),
            reaper: Mutex::new(reaper),
            ring,
            memlock,
            wake,
        }))
    }

    /// A device in this domain, called `name` in messages.
    pub fn device(self: &Arc<Self>, name: &str) -> Result<Arc<SoftDevice>> {
        SoftDevice::open(Arc::clone(self), name)
    }

    /// Mappings that exist now.
    pub fn mappings(&self) -> usize {
        self.table().live()
    }

    /// Translates `iova` and issues one operation of at most `len` bytes there: as far as the mapping goes, which
    /// is returned. When this returns, the operation has its slot.
    pub(crate) fn issue(
        &self,
        dma: Dma<'_>,
        iova: Iova,
        len: usize,
        flight: &Flight,
    ) -> Result<usize, Refusal> {
        let view = read(&self.view);
        let translation = view.find(iova).ok_or(Refusal::Fault)?;
        if matches!(dma, Dma::Write(_)) && !translation.writable {
            return Err(Refusal::Fault);
        }
        let into = iova.0 - translation.iova.start().0;
        let len = (len as u64).min(translation.iova.len() - into);
        // A slot ends at 1 GiB, so this always fits.
        let span = Span { slot: translation.slot, address: translation.address + into, len: len as u32 };
        let op = match dma {
            Dma::Write(from) => Op::Fill(from, span),
            Dma::Read(to) => Op::Drain(to, span),
            Dma::Send(socket) => Op::SendZeroCopy(socket, span),
        };
        // Not a moment earlier than this may the view be written to.
        lock(&self.submissions).submit(op, flight.id()).map_err(Refusal::Failed)?;
        Ok(len as usize)
    }

    /// Looks whether `flight` has ended, and delivers whatever else has.
    pub(crate) fn outcome(&self, flight: &Flight) -> Option<Result<u32, Errno>> {
        flight.outcome().or_else(|| {
            self.reaper().reap();
            flight.outcome()
        })
    }

    /// Says that the calling device is at work until the answer is dropped.
    pub(crate) fn at_work(&self) -> Option<AtWork<'_>> {
        // A ticket that begins right now costs its owner one vain look at the queue for each operation under way.
        self.waiting.load(Ordering::Acquire).then(|| {
            self.reaper().begin();
            AtWork(self)
        })
    }

    /// Waits until something may have happened at the ring, at most `patience`.
    pub(crate) fn idle(&self, patience: Duration) {
        // Another thread may take the completion off the queue, so this never sleeps long.
        let patience = patience.min(Duration::from_millis(1));
        let patience = rustix::time::Timespec { tv_sec: 0, tv_nsec: patience.subsec_nanos().into() };
        let _ = poll(&mut [PollFd::new(&self.ring, PollFlags::IN)], Some(&patience));
    }

    pub(crate) fn ring(&self) -> &Ring {
        &self.ring
    }

    pub(crate) fn reaper(&self) -> MutexGuard<'_, Reaper> {
        lock(&self.reaper)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// Books slots as empty that have just been emptied, and answers with a ticket where operations still run.
    /// The table has been held since before they were emptied.
    fn settle(
        &self,
        table: &mut Table,
        emptied: impl ExactSizeIterator<Item = Slot> + Clone,
        told: bool,
    ) -> Option<Ticket> {
        let fillings = emptied.clone().filter_map(|slot| table.filling(slot));
        let ticket = self.reaper().settle(emptied.len(), fillings, told);
        emptied.for_each(|slot| table.empty(slot));
        ticket
    }

    /// Empties slots, neighbours in one call; how many, and why not all.
    fn empty(&self, slots: impl Iterator<Item = Slot>) -> (usize, Option<Errno>) {
        // As many tags as the queue holds without the kernel keeping some aside.
        const RUN: u32 = 1024;
        let mut slots = slots.peekable();
        let mut emptied = 0;
        while let Some(first) = slots.next() {
            let mut count = 1;
            while count < RUN
                && slots.next_if(|slot| u32::from(slot.0) == u32::from(first.0) + count).is_some()
            {
                count += 1;
            }
            match self.ring.clear(first, count) {
                Ok(()) => emptied += count as usize,
                Err(failed) => return (emptied + failed.partial as usize, Some(failed.errno)),
            }
            if count == RUN {
                self.reaper().reap();
            }
        }
        (emptied, None)
    }
}

/// A device is at work.
pub(crate) struct AtWork<'a>(&'a SoftDomain);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.reaper().end();
    }
}

impl Domain for SoftDomain {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn capabilities(&self) -> Capabilities {
        let slots = u64::from(self.ring.slots());
        Capabilities {
            max_mappings: self.memlock.map_or(slots, |limit| slots.min(limit / PAGE)),
            max_mapping_len: uring::MAX_SLOT_LEN,
            by_file: false,
            tickets: true,
            // A registered buffer is given back whole.
            cut: false,
            replace: false,
            counts_partial: true,
        }
    }

    fn map(
        &self,
        iova: PageRange<Iova>,
        piece: u64,
        file: &Arc<GuestFile>,
        offset: Offset,
        writable: bool,
    ) -> Result<()> {
        self.make(&Want { iova, piece, file, offset, writable })
    }

    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        let mut table = self.table();
        // Operations over what a failed map had made and taken back.
        let unfinished = table.is_unfinished(iova, |ticket| self.reaper().is_running(ticket));
        let unfinished = unfinished.then_some(Errno::INPROGRESS);
        let mut doomed = std::mem::take(&mut table.scratch);
        doomed.clear();
        let whole = read(&self.view).overlapping(iova).filter(|t| table.is_live(t.slot)).all(|t| {
            doomed.push((t.slot, t.iova.len()));
            iova.covers(t.iova)
        });
        let answer = if !whole {
            Unmap::Failed { errno: Errno::INVAL, bytes: 0 }
        } else if doomed.is_empty() {
            answer(0, unfinished, None)
        } else {
            let (emptied, failed) = self.empty(doomed.iter().map(|(slot, _)| *slot));
            let failed = failed.or(unfinished);
            let gone = &doomed[..emptied];
            let bytes = gone.iter().map(|(_, len)| len).sum();
            let ticket = self.settle(&mut table, gone.iter().map(|(slot, _)| *slot), failed.is_none());
            if failed.is_some() {
                // Nobody has the ticket.
                table.unfinished.extend(ticket.map(|ticket| (iova, ticket)));
            }
            answer(bytes, failed, ticket)
        };
        table.scratch = doomed;
        answer
    }

    fn poll(&self, ended: &mut Vec<Ticket>) {
        let mut reaper = self.reaper();
        reaper.reap();
        reaper.take_ended(ended);
    }

    fn wake(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }
}

/// The answer to an unmap that has emptied `bytes`, and has failed then or not; `ticket` where operations still run.
fn answer(bytes: u64, failed: Option<Errno>, ticket: Option<Ticket>) -> Unmap {
    match (failed, ticket) {
        // What is gone but in flight is not told as gone: nobody would wait for it.
        (Some(errno), ticket) => Unmap::Failed { errno, bytes: if ticket.is_none() { bytes } else { 0 } },
        (None, Some(ticket)) => Unmap::InFlight { bytes, ticket },
        (None, None) => Unmap::Gone { bytes },
    }
}

impl Drop for SoftDomain {
    /// Closing the ring releases the pins too, but some time later and unseen.
    fn drop(&mut self) {
        let slots = self.table().all_live();
        self.empty(slots.into_iter());
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No holder of these locks can panic between two writes that belong together.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unmap_that_fails_half_way_does_not_count_what_is_in_flight() {
        let (ticket, errno) = (Some(Ticket(1)), Errno::NOMEM);
        assert_eq!(answer(2 * PAGE, Some(errno), ticket), Unmap::Failed { errno, bytes: 0 });
        assert_eq!(answer(2 * PAGE, Some(errno), None), Unmap::Failed { errno, bytes: 2 * PAGE });
        assert_eq!(answer(2 * PAGE, None, ticket), Unmap::InFlight { bytes: 2 * PAGE, ticket: Ticket(1) });
        assert_eq!(answer(2 * PAGE, None, None), Unmap::Gone { bytes: 2 * PAGE });
    }
}
