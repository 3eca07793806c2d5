//! io_uring's registered buffers: a table of long-term pins that can be taken back one by one.
//!
//! Of io_uring this module opens only what the soft domain and its devices need: a sparse buffer table whose
//! slots are filled and cleared ([`Ring`]), operations on those slots ([`Submissions`]), and what the kernel says
//! afterwards ([`Completions`]). Clearing a slot **proves nothing**: an operation in flight keeps the pages and
//! still writes to them. Only the slot's [`Tag`] in the completions says that the kernel has let go.
//!
//! All of it is safe to call: the kernel bounds every operation by the slot that it names (`EFAULT` outside), and
//! what it touches are pages pinned when the slot was filled, never an address of this process. The kernel's
//! interface is `io_uring_register(2)` and `io_uring_enter(2)`; the published crate drops the count that a buffer
//! update writes back, so that call is made here.

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

/// Most slots that the kernel gives one ring (`IORING_MAX_REG_BUFFERS`).
pub const MAX_SLOTS: u32 = 1 << 14;

/// Longest buffer that one slot holds, in bytes.
pub const MAX_SLOT_LEN: u64 = 1 << 30;

/// Completions that the ring holds before the kernel has to keep them aside.
const COMPLETIONS: u32 = 4096;

/// `IORING_REGISTER_BUFFERS_UPDATE` of `linux/io_uring.h`.
const REGISTER_BUFFERS_UPDATE: libc::c_uint = 16;

/// `IORING_ENTER_GETEVENTS`.
const ENTER_GETEVENTS: u32 = 1;

/// Says in a completion that an operation on a slot, or a slot itself, is meant: tags have it, operations not.
const TAG: u64 = 1 << 63;

/// `struct iovec` as the register call reads it, without the pointer type that would keep it out of a static.
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

/// What a slot is filled with to be empty, as many as one call clears.
static EMPTY: [Buffer; 256] = [Buffer { base: 0, len: 0 }; 256];

/// An index into the ring's buffer table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u16);

/// Names one filling of one slot; comes back as [`Completion::Released`] once the kernel has unpinned it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(u64);

/// Why there is no ring. The text is the message that the user reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The kernel has no io_uring, or this process may not use it.
    #[error(
        "io_uring is not available ({errno}): set `sysctl kernel.io_uring_disabled=0`, and where a container's \
         seccomp profile forbids io_uring_setup, allow it there"
    )]
    Disabled {
        /// The kernel's answer.
        errno: Errno,
    },
    /// The locked-memory limit does not even hold the ring.
    #[error(
        "io_uring needs {need} bytes of locked memory and RLIMIT_MEMLOCK is {limit}: raise it (`ulimit -l`, \
         `LimitMEMLOCK=` in a systemd unit) or give the process CAP_IPC_LOCK"
    )]
    Memlock {
        /// Bytes that the ring itself takes.
        need: u64,
        /// The limit in bytes, for all rings of this user together.
        limit: u64,
    },
    /// The kernel is too old for a sparse table with tags.
    #[error(
        "io_uring's sparse buffer table is not supported by this kernel ({errno}): Linux 5.19 or newer is needed"
    )]
    Old {
        /// The kernel's answer.
        errno: Errno,
    },
    /// Anything else.
    #[error(transparent)]
    Other(#[from] Failed),
}

/// The bytes that this process may lock, or none where CAP_IPC_LOCK frees it of the limit. The kernel decides
/// when the ring is made, by the calling thread, and counts all rings of the user together.
pub fn memlock_limit() -> Option<u64> {
    let free = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if free { None } else { getrlimit(Resource::Memlock).current }
}

/// A ring with a sparse buffer table: the table's side.
pub struct Ring {
    io: IoUring,
    slots: u32,
    tags: AtomicU64,
    ops: AtomicU64,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("fd", &self.io.as_raw_fd()).field("slots", &self.slots).finish()
    }
}

impl Ring {
    /// A ring of `entries` submissions and `slots` empty slots, and the only two handles to its queues.
    pub fn open(entries: u32, slots: u32) -> Result<(Arc<Self>, Submissions, Completions), RingError> {
        let limit = memlock_limit();
        let io: IoUring =
            IoUring::builder().setup_cqsize(COMPLETIONS).build(entries).map_err(|e| match errno(&e) {
                errno @ (Errno::NOSYS | Errno::PERM | Errno::ACCESS) => RingError::Disabled { errno },
                Errno::NOMEM => match limit {
                    // Submissions and their index of 68 bytes each, completions of 16, and the head page.
                    Some(limit) => {
                        RingError::Memlock { need: u64::from(entries * 68 + COMPLETIONS * 16) + 4096, limit }
                    }
                    None => Failed::new("io_uring_setup", Errno::NOMEM).into(),
                },
                errno => Failed::new("io_uring_setup", errno).into(),
            })?;
        io.submitter().register_buffers_sparse(slots).map_err(|e| match errno(&e) {
            errno @ Errno::INVAL => RingError::Old { errno },
            errno => Failed::new("IORING_REGISTER_BUFFERS2", errno).into(),
        })?;
        let ring = Arc::new(Self { io, slots, tags: AtomicU64::new(1), ops: AtomicU64::new(1) });
        let queues = queue::pair(&ring);
        Ok((ring, queues.0, queues.1))
    }

    /// Slots in the table.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// A name for an operation, never given twice.
    pub fn name_op(&self) -> OpId {
        OpId::new(self.ops.fetch_add(1, Ordering::Relaxed))
    }

    /// Pins `len` bytes of `file` from `offset` on, for writing, into `slot`; what was there goes as if cleared.
    /// `ENOMEM`: the locked-memory limit. `EFAULT`: the file is read-only there, private, or ends before.
    ///
    /// The address of a later [`Span`] is [`GuestFile::address`]; keep `file` until the tag has come back, so
    /// that no other file can appear at that address.
    pub fn fill(&self, slot: Slot, file: &GuestFile, offset: u64, len: u64) -> Result<Tag, Failed> {
        let buffer = Buffer { base: file.address(offset)?, len };
        let tag = TAG | self.tags.fetch_add(1, Ordering::Relaxed);
        self.update(slot, &[buffer], Some(&[tag])).map_err(Failed::without_partial)?;
        Ok(Tag(tag))
    }

    /// Empties `count` slots from `first` on. From here on an operation on them is `EFAULT`; operations already
    /// under way go on. On failure the partial output is the number of slots emptied before.
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

    /// Asks the kernel to end an operation (`IORING_REGISTER_SYNC_CANCEL`), and whether it found one to end. Its
    /// completion comes as ever.
    pub fn cancel(&self, id: OpId) -> Result<bool, Failed> {
        let patience = types::Timespec::from(Duration::from_secs(1));
        match self
            .io
            .submitter()
            .register_sync_cancel(Some(patience), types::CancelBuilder::user_data(id.raw()))
        {
            Ok(()) => Ok(true),
            Err(e) => match errno(&e) {
                Errno::NOENT => Ok(false),
                // It was found, marked, and has not ended yet: its completion will say.
                Errno::ALREADY | Errno::TIME => Ok(true),
                errno => Err(Failed::new("IORING_REGISTER_SYNC_CANCEL", errno)),
            },
        }
    }

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
        // SAFETY: `update` is the structure that this call reads, of the size given; its two pointers are to
        // slices that outlive the call, of `nr` elements each (asserted above, kept by fill and clear). The
        // buffers named are windows of a GuestFile, which the kernel pins or refuses: after the call it holds
        // pages, no address.
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
            Ok(done) if done < update.nr => Err(Failed { call: CALL, errno: Errno::AGAIN, partial: done }),
            Ok(_) => Ok(()),
        }
    }

    fn enter(&self, submit: u32, flags: u32) -> io::Result<usize> {
        // SAFETY: no argument is passed, so there is no pointer; the count is what `Submissions` has pushed.
        unsafe { self.io.submitter().enter::<libc::sigset_t>(submit, 0, flags, None) }
    }
}

impl AsFd for Ring {
    /// Readable while completions wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the fd belongs to `self.io`, which closes it only when self is dropped.
        unsafe { BorrowedFd::borrow_raw(self.io.as_raw_fd()) }
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
