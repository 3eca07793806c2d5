//! The submission queue and the completion queue of a ring.
//!
//! Each queue has one handle, so that `&mut` replaces a lock; threads that share a queue put its handle into a mutex.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use rustix::io::Errno;

use super::{ENTER_GETEVENTS, Ring, Slot, TAG_BIT, Tag, errno};
use crate::Failed;

/// The id of an operation, repeated in its completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(u64);

impl OpId {
    pub(super) fn new(raw: u64) -> Self {
        debug_assert!(raw & TAG_BIT == 0);
        Self(raw)
    }

    pub(super) fn raw(self) -> u64 {
        self.0
    }
}

/// A range of bytes in a filled slot, which an operation reads or writes. Only the kernel checks its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The slot.
    pub slot: Slot,
    /// The user-space address of the first byte: that of the slot's buffer when it was filled, plus the offset into it.
    pub address: u64,
    /// The length in bytes.
    pub len: u32,
}

/// An operation on a slot.
#[derive(Debug, Clone, Copy)]
pub enum Op<'fd> {
    /// Reads from the file into the pages (`IORING_OP_READ_FIXED`): the device writes guest memory.
    Fill(BorrowedFd<'fd>, Span),
    /// Writes the pages to the file (`IORING_OP_WRITE_FIXED`): the device reads guest memory.
    Drain(BorrowedFd<'fd>, Span),
    /// Sends the pages over a socket without copying (`IORING_OP_SEND_ZC` with a fixed buffer): the network stack reads
    /// them when the peer has room. Only closing the connection ends that.
    SendZeroCopy(BorrowedFd<'fd>, Span),
}

/// A completion that the kernel reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// The pages of this registration are unpinned; no operation can access them through it any more.
    Released(Tag),
    /// A completion of an operation.
    Op {
        /// The operation.
        id: OpId,
        /// The number of bytes transferred, or the errno.
        result: Result<u32, Errno>,
        /// True where another completion of the operation follows (a zero-copy send whose pages are still in use).
        more: bool,
    },
}

/// Returns the handles to the queues of `ring`. Called once per ring.
pub(super) fn handles(ring: &Arc<Ring>) -> (Submissions, Completions) {
    (Submissions { ring: Arc::clone(ring), failed: None }, Completions { ring: Arc::clone(ring) })
}

/// The maximum number of io_uring_enter(2) calls for one entry: `EAGAIN` and `EBUSY` are temporary.
const MAX_ENTER_TRIES: u32 = 1000;

/// The only handle to the ring's submission queue.
#[derive(Debug)]
pub struct Submissions {
    ring: Arc<Ring>,
    /// The errno that ended submission. See [`Submissions::fail`].
    failed: Option<Errno>,
}

impl Submissions {
    /// Submits one operation. When this returns the kernel has resolved the slot: clearing it later does not stop the
    /// operation. An empty slot, or a span outside of it, gives a completion with `EFAULT`.
    ///
    /// The completion of an operation that does not block is in the queue when this returns. The kernel continues one that
    /// blocks **in the context of the calling thread**; if that thread ends, the operation is cancelled.
    pub fn submit(&mut self, op: Op<'_>, id: OpId) -> Result<(), Failed> {
        const CALL: &str = "io_uring_enter";
        if let Some(errno) = self.failed {
            return Err(Failed::new(CALL, errno));
        }
        let entry = entry(op).user_data(id.0);
        // SAFETY: only this value, which is borrowed mutably, creates a submission queue of the ring.
        let mut queue = unsafe { self.ring.io.submission_shared() };
        // SAFETY: the entry names a file that is open until the kernel has taken its own reference, below, and pages by
        // slot, whose bounds the kernel checks.
        let pushed = unsafe { queue.push(&entry) };
        drop(queue);
        pushed.map_err(|_| Failed::new(CALL, Errno::BUSY))?;
        for _ in 0..MAX_ENTER_TRIES {
            match self.ring.enter(1, 0) {
                Ok(1..) => return Ok(()),
                Ok(0) => std::thread::yield_now(),
                Err(e) => match errno(&e) {
                    Errno::AGAIN | Errno::BUSY | Errno::INTR => std::thread::yield_now(),
                    errno => return Err(self.fail(errno)),
                },
            }
        }
        Err(self.fail(Errno::AGAIN))
    }

    /// Ends all submission: the kernel has not taken the entry. A later call would submit it, when another file may be open
    /// under its descriptor's number.
    fn fail(&mut self, errno: Errno) -> Failed {
        self.failed = Some(errno);
        Failed::new("io_uring_enter", errno)
    }
}

fn entry(op: Op<'_>) -> squeue::Entry {
    // Offset -1, the current position: pipes and sockets have no other (io_uring_enter(2)).
    const CURRENT_POSITION: u64 = u64::MAX;
    match op {
        Op::Fill(fd, span) => {
            opcode::ReadFixed::new(types::Fd(fd.as_raw_fd()), span.address as *mut u8, span.len, span.slot.0)
                .offset(CURRENT_POSITION)
                .build()
        }
        Op::Drain(fd, span) => opcode::WriteFixed::new(
            types::Fd(fd.as_raw_fd()),
            span.address as *const u8,
            span.len,
            span.slot.0,
        )
        .offset(CURRENT_POSITION)
        .build(),
        Op::SendZeroCopy(fd, span) => {
            opcode::SendZc::new(types::Fd(fd.as_raw_fd()), span.address as *const u8, span.len)
                .buf_index(Some(span.slot.0))
                .flags(libc::MSG_NOSIGNAL)
                .build()
        }
    }
}

/// The only handle to the ring's completion queue.
#[derive(Debug)]
pub struct Completions {
    ring: Arc<Ring>,
}

impl Completions {
    /// Passes all completions in the queue to `each`. Does not block.
    pub fn reap(&mut self, mut each: impl FnMut(Completion)) {
        loop {
            let mut seen = 0;
            // SAFETY: only this value, which is borrowed mutably, creates a completion queue of the ring.
            for entry in unsafe { self.ring.io.completion_shared() } {
                seen += 1;
                each(completion(&entry));
            }
            // The kernel has an overflow list only if the queue was full; IORING_ENTER_GETEVENTS moves it into the queue.
            if seen < self.ring.io.params().cq_entries() || self.ring.enter(0, ENTER_GETEVENTS).is_err() {
                return;
            }
        }
    }
}

fn completion(entry: &io_uring::cqueue::Entry) -> Completion {
    let user_data = entry.user_data();
    if user_data & TAG_BIT != 0 {
        return Completion::Released(Tag(user_data));
    }
    let result = u32::try_from(entry.result()).map_err(|_| Errno::from_raw_os_error(-entry.result()));
    Completion::Op { id: OpId(user_data), result, more: io_uring::cqueue::more(entry.flags()) }
}
