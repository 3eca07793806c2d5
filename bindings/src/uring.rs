//! io_uring's registered buffers: a table of long-term pins that can be removed one by one.
//!
//! This module has only the part of io_uring that the soft domain and its devices need: a sparse buffer table whose slots
//! are filled and cleared ([`Ring`]), operations on those slots ([`Submissions`]), and their completions
//! ([`Completions`]). Clearing a slot **proves nothing**: an operation in flight keeps the pages pinned and can still write
//! to them. Only the completion with the slot's [`Tag`] proves that the kernel has unpinned them.
//!
//! All calls are safe: the kernel checks every operation against the slot that it names (`EFAULT` outside), and accesses
//! pages that were pinned when the slot was filled, never an address of this process. The interface is
//! io_uring_register(2) and io_uring_enter(2). The published crate discards the count that a buffer update returns, so
//! that call is made here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use io_uring::{IoUring, types};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use crate::Failed;
use crate::memory::GuestFile;

mod queue;

pub use queue::{Completion, Completions, Op, OpId, Span, Submissions};

/// The maximum number of slots of a ring (the kernel's `IORING_MAX_REG_BUFFERS`).
pub const MAX_SLOTS: u32 = 1 << 14;

/// The maximum length of a slot's buffer in bytes (`io_buffer_validate` in io_uring/rsrc.c).
pub const MAX_SLOT_LEN: u64 = 1 << 30;

/// The number of entries of the completion queue. The kernel stores further completions in an overflow list.
const CQ_ENTRIES: u32 = 4096;

/// `IORING_REGISTER_BUFFERS_UPDATE` (include/uapi/linux/io_uring.h).
const REGISTER_BUFFERS_UPDATE: libc::c_uint = 16;

/// `IORING_ENTER_GETEVENTS` (include/uapi/linux/io_uring.h).
const ENTER_GETEVENTS: u32 = 1;

/// The bit of `user_data` that distinguishes completions: set in the tag of a slot, clear in the id of an operation.
const TAG_BIT: u64 = 1 << 63;

/// `struct iovec` as the register call reads it, with an integer in place of the pointer, so that it can be in a static.
#[repr(C)]
#[derive(Clone, Copy)]
struct Buffer {
    base: u64,
    len: u64,
}

/// `struct io_uring_rsrc_update2`.
#[repr(C)]
struct Update {
    offset: u32,
    resv: u32,
    data: u64,
    tags: u64,
    nr: u32,
    resv2: u32,
}

/// The maximum time that [`Ring::cancel`] waits for the operation to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

/// Empty buffers, with which slots are cleared: the number that one call clears.
static EMPTY: [Buffer; 256] = [Buffer { base: 0, len: 0 }; 256];

/// An index into a ring's buffer table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u16);

/// The id of one registration of a slot. Reported as [`Completion::Released`] once the kernel has unpinned its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(u64);

/// The reason why a ring cannot be created. Its text is the error message for the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The kernel has no io_uring, or this process is not permitted to use it.
    #[error(
        "io_uring is not available ({errno}): set `sysctl kernel.io_uring_disabled=0`, and where a container's \
         seccomp profile forbids io_uring_setup, allow it there"
    )]
    Disabled {
        /// The errno that the kernel returned.
        errno: Errno,
    },
    /// The locked-memory limit is too low for the ring itself.
    #[error(
        "io_uring needs {need} bytes of locked memory and RLIMIT_MEMLOCK is {limit}: raise it (`ulimit -l`, \
         `LimitMEMLOCK=` in a systemd unit) or give the process CAP_IPC_LOCK"
    )]
    Memlock {
        /// The size of the ring in bytes.
        need: u64,
        /// The limit in bytes, for all rings of this user in total.
        limit: u64,
    },
    /// The kernel does not support a sparse table with tags.
    #[error(
        "io_uring's sparse buffer table is not supported by this kernel ({errno}): Linux 5.19 or newer is needed"
    )]
    Unsupported {
        /// The errno that the kernel returned.
        errno: Errno,
    },
    /// Another call failed.
    #[error(transparent)]
    Other(#[from] Failed),
}

/// Returns the locked-memory limit in bytes, or none where CAP_IPC_LOCK lifts it. The kernel applies the credentials of the
/// thread that creates the ring, and counts all rings of the user in total.
pub fn memlock_limit() -> Option<u64> {
    let unlimited = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if unlimited { None } else { getrlimit(Resource::Memlock).current }
}

/// A ring with a sparse buffer table: the handle to the table.
pub struct Ring {
    io: IoUring,
    slots: u32,
    next_tag: AtomicU64,
    next_op: AtomicU64,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("fd", &self.io.as_raw_fd()).field("slots", &self.slots).finish()
    }
}

impl Ring {
    /// Creates a ring with `entries` submission queue entries and `slots` empty slots, and the only handles to its two
    /// queues.
    pub fn open(entries: u32, slots: u32) -> Result<(Arc<Self>, Submissions, Completions), RingError> {
        let limit = memlock_limit();
        let io: IoUring =
            IoUring::builder().setup_cqsize(CQ_ENTRIES).build(entries).map_err(|e| match errno(&e) {
                errno @ (Errno::NOSYS | Errno::PERM | Errno::ACCESS) => RingError::Disabled { errno },
                Errno::NOMEM => match limit {
                    // 68 bytes per submission (its entry and its index), 16 per completion, and a page for the heads.
                    Some(limit) => {
                        RingError::Memlock { need: u64::from(entries * 68 + CQ_ENTRIES * 16) + 4096, limit }
                    }
                    None => Failed::new("io_uring_setup", Errno::NOMEM).into(),
                },
                errno => Failed::new("io_uring_setup", errno).into(),
            })?;
        io.submitter().register_buffers_sparse(slots).map_err(|e| match errno(&e) {
            errno @ Errno::INVAL => RingError::Unsupported { errno },
            errno => Failed::new("IORING_REGISTER_BUFFERS2", errno).into(),
        })?;
        let ring = Arc::new(Self { io, slots, next_tag: AtomicU64::new(1), next_op: AtomicU64::new(1) });
        let queues = queue::handles(&ring);
        Ok((ring, queues.0, queues.1))
    }

    /// Returns the number of slots in the table.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Returns an id for an operation. No id is returned twice.
    pub fn name_op(&self) -> OpId {
        OpId::new(self.next_op.fetch_add(1, Ordering::Relaxed))
    }

    /// Pins `len` bytes of `file` from `offset` on, for writing, and registers them in `slot`; an earlier registration of
    /// the slot is cleared. `ENOMEM` at the locked-memory limit; `EFAULT` where the file is read-only or private there, or
    /// ends before.
    ///
    /// The address of a later [`Span`] is [`GuestFile::address`]. The caller keeps `file` until the completion with the tag,
    /// so that no other file can be mapped at that address.
    pub fn fill(&self, slot: Slot, file: &GuestFile, offset: u64, len: u64) -> Result<Tag, Failed> {
        let buffer = Buffer { base: file.address(offset)?, len };
        let tag = TAG_BIT | self.next_tag.fetch_add(1, Ordering::Relaxed);
        self.update(slot, &[buffer], Some(&[tag])).map_err(Failed::without_partial)?;
        Ok(Tag(tag))
    }

    /// Clears `count` slots from `first` on. Later operations on them fail with `EFAULT`; operations in flight continue. The
    /// partial output of a failure is the number of slots cleared before.
    pub fn clear(&self, first: Slot, count: u32) -> Result<(), Failed<u32>> {
        let mut done = 0;
        while done < count {
            let step = (count - done).min(EMPTY.len() as u32);
            let from = u16::try_from(u32::from(first.0) + done);
            let cleared = from
                .map_err(|_| Failed { call: "clear", errno: Errno::INVAL, partial: 0 })
                .and_then(|from| self.update(Slot(from), &EMPTY[..step as usize], None));
            match cleared {
                Ok(()) => done += step,
                Err(failed) => return Err(Failed { partial: done + failed.partial, ..failed }),
            }
        }
        Ok(())
    }

    /// Cancels an operation (`IORING_REGISTER_SYNC_CANCEL`). Returns false where no such operation is in flight. The
    /// operation's completion is reported as usual.
    pub fn cancel(&self, id: OpId) -> Result<bool, Failed> {
        let timeout = types::Timespec::from(CANCEL_TIMEOUT);
        match self
            .io
            .submitter()
            .register_sync_cancel(Some(timeout), types::CancelBuilder::user_data(id.raw()))
        {
            Ok(()) => Ok(true),
            Err(e) => match errno(&e) {
                Errno::NOENT => Ok(false),
                // The operation was found and is being cancelled, but has not ended yet: its completion reports that.
                Errno::ALREADY | Errno::TIME => Ok(true),
                errno => Err(Failed::new("IORING_REGISTER_SYNC_CANCEL", errno)),
            },
        }
    }

    /// Replaces the slots from `first` on, with one tag per buffer where `tags` is given. The partial output of a failure is
    /// the number of slots replaced before.
    fn update(&self, first: Slot, buffers: &[Buffer], tags: Option<&[u64]>) -> Result<(), Failed<u32>> {
        const CALL: &str = "IORING_REGISTER_BUFFERS_UPDATE";
        debug_assert!(tags.is_none_or(|tags| tags.len() == buffers.len()));
        let update = Update {
            offset: first.0.into(),
            resv: 0,
            data: buffers.as_ptr() as u64,
            tags: tags.map_or(0, |tags| tags.as_ptr() as u64),
            nr: buffers.len() as u32,
            resv2: 0,
        };
        // SAFETY: `update` is the structure that this call reads, with its size as last argument. Its two pointers refer
        // to slices that outlive the call and have `nr` elements each (asserted above, ensured by fill and clear). The
        // buffers lie in this process's mapping of a GuestFile; the kernel pins their pages within the call and does not
        // use the addresses later.
        let done = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.io.as_raw_fd(),
                REGISTER_BUFFERS_UPDATE,
                &raw const update,
                size_of::<Update>(),
            )
        };
        match u32::try_from(done) {
            Err(_) => Err(Failed::last_with(CALL, 0)),
            // An error after the first slots is reported as their number alone.
            Ok(done) if done < update.nr => Err(Failed { call: CALL, errno: Errno::AGAIN, partial: done }),
            Ok(_) => Ok(()),
        }
    }

    fn enter(&self, submit: u32, flags: u32) -> io::Result<usize> {
        // SAFETY: no signal mask is passed, so there is no pointer; `submit` counts entries that `Submissions` has pushed.
        unsafe { self.io.submitter().enter::<libc::sigset_t>(submit, 0, flags, None) }
    }
}

impl AsFd for Ring {
    /// Returns the ring's descriptor, which is readable while the completion queue is not empty.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the fd belongs to `self.io`, which closes it only when self is dropped.
        unsafe { BorrowedFd::borrow_raw(self.io.as_raw_fd()) }
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
