//! The domain of software devices, whose mappings are registered buffers of an io_uring. It is the default without an
//! IOMMU.
//!
//! There is no IOMMU, but nothing is simulated: every mapping is a long-term pin of the kernel, DMA is done by the
//! kernel through that pin, a DMA to an empty slot fails with the kernel's `EFAULT`, and an unmap is [`Unmap::Gone`]
//! only once the kernel has released the slot's tag. The devices do not consult the domain's slot table; they use
//! translations of their own, which an unmap leaves stale (`view`).
//!
//! Limits:
//!
//! - One ring, so 16 384 mappings of at most 1 GiB each.
//! - The kernel pins for writing, so a file opened read-only cannot be mapped. A mapping that is read-only is so in the
//!   devices' translations only.
//! - The pinned bytes count against RLIMIT_MEMLOCK without CAP_IPC_LOCK.
//! - Before Linux 6.13 the kernel releases slots strictly in order: one operation that does not end delays the tickets
//!   of all later unmaps.
//! - The kernel locks the ring while it pins the pages of one slot, so a map of long pieces delays unmaps elsewhere.
//! - A process that forks without exec passes the ring, and so every pin, to its child.
//!
//! Lock order: map lock, then table, then view or reaper; view, then submissions. Except for the map lock, none is held
//! for longer than one kernel call.

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
use crate::{Domain, DomainCaps, Error, Result, Ticket, Unmap};

mod mapping;
pub(crate) mod reaper;
mod table;
mod view;

use mapping::MapRequest;
use reaper::{Operation, Reaper, WakeSource};
use table::Table;
use view::View;

/// Entries of the submission queue: one for each thread that submits at the same time, which are few.
const SQ_ENTRIES: u32 = 64;

/// A soft domain. Devices come from [`SoftDomain::device`]; all of them see the same mappings.
#[derive(Debug)]
pub struct SoftDomain {
    ring: Arc<Ring>,
    /// The maximum number of bytes that may be pinned (RLIMIT_MEMLOCK); none if there is no limit.
    memlock: Option<u64>,
    /// Serialises maps, so that the table is not locked while the kernel pins pages.
    map_lock: Mutex<()>,
    table: Mutex<Table>,
    view: RwLock<View>,
    submissions: Mutex<Submissions>,
    reaper: Mutex<Reaper>,
    /// True while a ticket is outstanding.
    tickets_outstanding: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
}

/// The kind of a DMA, with the file at its other end.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Dma<'fd> {
    /// The device writes to guest memory the bytes that it reads from the file.
    Write(BorrowedFd<'fd>),
    /// The device reads guest memory and writes it to the file.
    Read(BorrowedFd<'fd>),
    /// The device sends guest memory over the socket, without a copy (zero-copy send).
    Send(BorrowedFd<'fd>),
}

/// The reason for which a DMA was not issued.
#[derive(Debug, Clone, Copy)]
pub(crate) enum IssueError {
    /// There is no translation, or none for writing.
    Fault,
    /// The kernel did not accept the submission.
    Failed(Failed),
}

impl SoftDomain {
    /// Opens a domain with a ring of its own. The limit of locked memory is the present one of the calling thread.
    pub fn open() -> Result<Arc<Self>> {
        Self::with_slots(uring::MAX_SLOTS)
    }

    /// Opens a domain with `slots` slots, from 1 to 16 384.
    pub fn with_slots(slots: u32) -> Result<Arc<Self>> {
        let memlock = uring::memlock_limit();
        let slots = slots.clamp(1, uring::MAX_SLOTS);
        let (ring, submissions, completions) = Ring::open(SQ_ENTRIES, slots)?;
        let wake_source = WakeSource::new().map_err(|failed| Error::Host {
            what: failed.to_string(),
            remedy: "raise the limit of open files (`ulimit -n`, `LimitNOFILE=` in a systemd unit)",
        })?;
        let wake = wake_source.fd();
        let reaper = Reaper::new(Arc::clone(&ring), completions, wake_source);
        Ok(Arc::new(Self {
            map_lock: Mutex::default(),
            table: Mutex::new(Table::new(slots)),
            view: RwLock::default(),
            submissions: Mutex::new(submissions),
            tickets_outstanding: reaper.tickets_outstanding(),
            reaper: Mutex::new(reaper),
            ring,
            memlock,
            wake,
        }))
    }

    /// Makes a device in this domain, called `name` in messages.
    pub fn device(self: &Arc<Self>, name: &str) -> Result<Arc<SoftDevice>> {
        SoftDevice::open(Arc::clone(self), name)
    }

    /// Returns the number of mappings.
    pub fn mappings(&self) -> usize {
        self.table().live()
    }

    /// Translates `iova` and issues one operation of at most `len` bytes there. Returns its length, which ends with the
    /// mapping at the latest. When this returns, the operation has a reference to its slot.
    pub(crate) fn issue(
        &self,
        dma: Dma<'_>,
        iova: Iova,
        len: usize,
        operation: &Operation,
    ) -> Result<usize, IssueError> {
        let view = read(&self.view);
        let translation = view.find(iova).ok_or(IssueError::Fault)?;
        if matches!(dma, Dma::Write(_)) && !translation.writable {
            return Err(IssueError::Fault);
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
        // The view stays locked until the submission returns: a map may reuse the slot only after the kernel has taken
        // the operation, with the buffer that is in the slot now.
        lock(&self.submissions).submit(op, operation.id()).map_err(IssueError::Failed)?;
        Ok(len as usize)
    }

    /// Returns the result of `operation` if it has ended, after reaping all completions.
    pub(crate) fn outcome(&self, operation: &Operation) -> Option<Result<u32, Errno>> {
        operation.outcome().or_else(|| {
            self.reaper().reap();
            operation.outcome()
        })
    }

    /// Marks the calling device as busy until the returned value is dropped. None while no ticket is outstanding.
    pub(crate) fn mark_busy(&self) -> Option<BusyDevice<'_>> {
        // A ticket that becomes outstanding after this check only costs spurious wake-ups, one for each operation in
        // flight.
        self.tickets_outstanding.load(Ordering::Acquire).then(|| {
            self.reaper().device_busy();
            BusyDevice(self)
        })
    }

    /// Waits until the ring may have a completion, at most `timeout` or 1 ms.
    pub(crate) fn await_completion(&self, timeout: Duration) {
        // Another thread may reap the completion first, in which case poll would sleep for the whole timeout: so it is
        // short.
        let timeout = timeout.min(Duration::from_millis(1));
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
        let _ = poll(&mut [PollFd::new(&self.ring, PollFlags::IN)], Some(&timeout));
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

    /// Records slots that have just been emptied. Returns a ticket if operations are in flight over their pages;
    /// [`Domain::poll`] returns it later only if it is `reported`. The table must have been locked since before the
    /// slots were emptied: the tags of two unmaps must not mix.
    fn settle(
        &self,
        table: &mut Table,
        emptied: impl ExactSizeIterator<Item = Slot> + Clone,
        reported: bool,
    ) -> Option<Ticket> {
        let fillings = emptied.clone().filter_map(|slot| table.filling(slot));
        let ticket = self.reaper().settle(emptied.len(), fillings, reported);
        emptied.for_each(|slot| table.mark_stale(slot));
        ticket
    }

    /// Empties slots, adjacent ones by one call. Returns the number of emptied slots, and the errno if it is not all of
    /// them.
    fn empty(&self, slots: impl Iterator<Item = Slot>) -> (usize, Option<Errno>) {
        // The number of tags for which the completion queue has room. More would go to the kernel's overflow list.
        const MAX_RUN: u32 = 1024;
        let mut slots = slots.peekable();
        let mut emptied = 0;
        while let Some(first) = slots.next() {
            let mut count = 1;
            while count < MAX_RUN
                && slots.next_if(|slot| u32::from(slot.0) == u32::from(first.0) + count).is_some()
            {
                count += 1;
            }
            match self.ring.clear(first, count) {
                Ok(()) => emptied += count as usize,
                Err(failed) => return (emptied + failed.partial as usize, Some(failed.errno)),
            }
            if count == MAX_RUN {
                self.reaper().reap();
            }
        }
        (emptied, None)
    }
}

/// Marks a device as busy until it is dropped.
pub(crate) struct BusyDevice<'a>(&'a SoftDomain);

impl Drop for BusyDevice<'_> {
    fn drop(&mut self) {
        self.0.reaper().device_idle();
    }
}

impl Domain for SoftDomain {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn capabilities(&self) -> DomainCaps {
        let slots = u64::from(self.ring.slots());
        DomainCaps {
            max_mappings: self.memlock.map_or(slots, |limit| slots.min(limit / PAGE)),
            max_mapping_len: uring::MAX_SLOT_LEN,
            tickets: true,
            // A registered buffer can only be unregistered as a whole.
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
        self.make(&MapRequest { iova, piece, file, offset, writable })
    }

    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        let mut table = self.table();
        // Operations over pages that a failed map had mapped and rolled back.
        let unfinished = table.is_unfinished(iova, |ticket| self.reaper().is_running(ticket));
        let unfinished = unfinished.then_some(Errno::INPROGRESS);
        let mut targets = std::mem::take(&mut table.scratch);
        targets.clear();
        let whole = read(&self.view).overlapping(iova).filter(|t| table.is_live(t.slot)).all(|t| {
            targets.push((t.slot, t.iova.len()));
            iova.covers(t.iova)
        });
        let result = if !whole {
            Unmap::Failed { errno: Errno::INVAL, bytes: 0 }
        } else if targets.is_empty() {
            unmap_result(0, unfinished, None)
        } else {
            let (emptied, failed) = self.empty(targets.iter().map(|(slot, _)| *slot));
            let failed = failed.or(unfinished);
            let gone = &targets[..emptied];
            let bytes = gone.iter().map(|(_, len)| len).sum();
            let ticket = self.settle(&mut table, gone.iter().map(|(slot, _)| *slot), failed.is_none());
            if failed.is_some() {
                // The caller does not get the ticket, so a later unmap over this range must check it.
                table.unfinished.extend(ticket.map(|ticket| (iova, ticket)));
            }
            unmap_result(bytes, failed, ticket)
        };
        table.scratch = targets;
        result
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

/// Returns the result of an unmap that has removed `bytes` and then failed with an errno or not; `ticket` is set if
/// operations are in flight over them.
fn unmap_result(bytes: u64, failed: Option<Errno>, ticket: Option<Ticket>) -> Unmap {
    match (failed, ticket) {
        // Bytes with operations in flight are not reported: a failed unmap returns no ticket to wait for.
        (Some(errno), ticket) => Unmap::Failed { errno, bytes: if ticket.is_none() { bytes } else { 0 } },
        (None, Some(ticket)) => Unmap::InFlight { bytes, ticket },
        (None, None) => Unmap::Gone { bytes },
    }
}

impl Drop for SoftDomain {
    /// Empties all slots. Closing the ring would unpin the pages too, but asynchronously, at an unknown time.
    fn drop(&mut self) {
        let slots = self.table().all_live();
        self.empty(slots.into_iter());
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Poisoning is ignored: no code that has one of these locks can panic between two writes that belong together.
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
    fn partial_unmap_does_not_count_bytes_in_flight() {
        let (ticket, errno) = (Some(Ticket(1)), Errno::NOMEM);
        assert_eq!(unmap_result(2 * PAGE, Some(errno), ticket), Unmap::Failed { errno, bytes: 0 });
        assert_eq!(unmap_result(2 * PAGE, Some(errno), None), Unmap::Failed { errno, bytes: 2 * PAGE });
        let in_flight = Unmap::InFlight { bytes: 2 * PAGE, ticket: Ticket(1) };
        assert_eq!(unmap_result(2 * PAGE, None, ticket), in_flight);
        assert_eq!(unmap_result(2 * PAGE, None, None), Unmap::Gone { bytes: 2 * PAGE });
    }
}
