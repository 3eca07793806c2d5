//! The two queues of a ring: operations go in, completions come out.
//!
//! There is one handle to each, so that `&mut` is all the locking the queues need; who shares a ring between
//! threads shares the handles by a mutex of its own.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use rustix::io::Errno;

use super::{ENTER_GETEVENTS, Ring, Slot, TAG, Tag, errno};
use crate::Failed;

/// Names an operation in its completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(u64);

impl OpId {
    pub(super) fn new(raw: u64) -> Self {
        debug_assert!(raw & TAG == 0);
        Self(raw)
    }

    pub(super) fn raw(self) -> u64 {
        self.0
    }
}

/// Bytes inside a filled slot: what an operation reads or writes. The kernel checks it, nobody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The slot.
    pub slot: Slot,
    /// The user-space address that the slot's buffer had when it was filled, plus the offset into it.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// An operation on a slot.
#[derive(Debug, Clone, Copy)]
pub enum Op<'fd> {
    /// Reads from the file into the pages (`IORING_OP_READ_FIXED`): the device writes guest memory.
    Fill(BorrowedFd<'fd>, Span),
    /// Writes the pages to the file (`IORING_OP_WRITE_FIXED`): the device reads guest memory.
    Drain(BorrowedFd<'fd>, Span),
    /// Sends the pages themselves over a socket (`IORING_OP_SEND_ZC` with a fixed buffer): the stack reads them
    /// when the peer has room, and nothing but closing the connection takes them back.
    SendZeroCopy(BorrowedFd<'fd>, Span),
}

/// What the kernel reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// The pages of this filling are unpinned; nothing can reach them through it any more.
    Released(Tag),
    /// An operation has got somewhere.
    Op {
        /// Which.
        id: OpId,
        /// Bytes done, or why not.
        result: Result<u32, Errno>,
        /// Whether another completion of it will follow (a zero-copy send that still holds its pages).
        more: bool,
    },
}

/// The handles to the queues of `ring`; called once for each ring.
pub(super) fn pair(ring: &Arc<Ring>) -> (Submissions, Completions) {
    (Submissions { ring: Arc::clone(ring), stuck: None }, Completions { ring: Arc::clone(ring) })
}

/// The only handle to the ring's submission queue.
#[derive(Debug)]
pub struct Submissions {
    ring: Arc<Ring>,
    stuck: Option<Errno>,
}

impl Submissions {
    /// Issues one operation. Once this returns the kernel has resolved the slot: clearing it later does not
    /// stop the operation. An empty slot, or a span outside, is `EFAULT` in the completion.
    ///
    /// An operation that works without waiting has its completion in the queue when this returns. One that
    /// waits is carried on by the kernel **in the calling thread**; if that thread ends, so does the operation.
    pub fn submit(&mut self, op: Op<'_>, id: OpId) -> Result<(), Failed> {
        const CALL: &str = "io_uring_enter";
        if let Some(errno) = self.stuck {
            return Err(Failed::new(CALL, errno));
        }
        let entry = entry(op).user_data(id.0);
        // SAFETY: this value is the only one that makes a submission queue of the ring, and is borrowed mutably.
        let mut queue = unsafe { self.ring.io.submission_shared() };
        // SAFETY: the entry names a file that is open now and stays so until the kernel has taken its own
        // reference, below; and pages by slot, bounded by the kernel.
        let pushed = unsafe { queue.push(&entry) };
        drop(queue);
        pushed.map_err(|_| Failed::new(CALL, Errno::BUSY))?;
        for _ in 0..1000 {
            match self.ring.enter(1, 0) {
                Ok(1..) => return Ok(()),
                Ok(0) => std::thread::yield_now(),
                Err(e) => match errno(&e) {
                    Errno::AGAIN | Errno::BUSY | Errno::INTR => std::thread::yield_now(),
                    errno => return Err(self.strand(errno)),
                },
            }
        }
        Err(self.strand(Errno::AGAIN))
    }

    /// The kernel has not taken the entry. It must never be submitted later, with another file behind its number,
    /// so nothing is any more.
    fn strand(&mut self, errno: Errno) -> Failed {
        self.stuck = Some(errno);
        Failed::new("io_uring_enter", errno)
    }
}

fn entry(op: Op<'_>) -> squeue::Entry {
    // Pipes and sockets have no position.
    const HERE: u64 = u64::MAX;
    match op {
        Op::Fill(fd, span) => {
            opcode::ReadFixed::new(types::Fd(fd.as_raw_fd()), span.address as *mut u8, span.len, span.slot.0)
                .offset(HERE)
                .build()
        }
        Op::Drain(fd, span) => opcode::WriteFixed::new(
            types::Fd(fd.as_raw_fd()),
            span.address as *const u8,
            span.len,
            span.slot.0,
        )
        .offset(HERE)
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
    /// Takes everything that waits in the queue. Does not block.
    pub fn reap(&mut self, mut each: impl FnMut(Completion)) {
        loop {
            let mut seen = 0;
            // SAFETY: this value is the only one that makes a completion queue of the ring, and is borrowed
            // mutably.
            for entry in unsafe { self.ring.io.completion_shared() } {
                seen += 1;
                each(completion(&entry));
            }
            // The kernel keeps completions aside only when the queue is full, and only this frees it.
            if seen < self.ring.io.params().cq_entries() || self.ring.enter(0, ENTER_GETEVENTS).is_err() {
                return;
            }
        }
    }
}

fn completion(entry: &io_uring::cqueue::Entry) -> Completion {
    let name = entry.user_data();
    if name & TAG != 0 {
        return Completion::Released(Tag(name));
    }
    let result = u32::try_from(entry.result()).map_err(|_| Errno::from_raw_os_error(-entry.result()));
    Completion::Op { id: OpId(name), result, more: io_uring::cqueue::more(entry.flags()) }
}
