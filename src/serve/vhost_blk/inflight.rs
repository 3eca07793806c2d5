//! Tracking of requests in flight in memory that outlives this process: the next back-end finds there what it must do again
//! (vhost-user protocol, "Inflight I/O tracking", split virtqueues).
//!
//! The order of the stores makes the memory correct at every point at which this process may die: a request is marked before
//! anything is done for it, and unmarked after its used buffer was added. A death between those two stores is recognised by
//! the used index ([`QueueInflight::recover`]).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use passgate_bindings::PAGE;
use passgate_bindings::identity::{self, Identity};
use passgate_bindings::memory::GuestFile;

/// The length of a queue's header: features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16
/// (`QueueRegionSplit` of the protocol).
const QUEUE_HEADER_LEN: u64 = 16;
/// The length of a descriptor's state: inflight u8, padding, next u16 at 6, counter u64 at 8 (`DescStateSplit`).
const DESC_STATE_LEN: u64 = 16;
/// The alignment of a queue's part, in bytes.
const QUEUE_ALIGN: u64 = 64;
/// The version of the layout; 0 in memory that no back-end has used.
const VERSION: u64 = 1;
/// A private bit in the features field of the first queue: the guest has switched the write cache off.
const WRITE_THROUGH: u64 = 1 << 63;

/// The memory for requests in flight cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub(super) enum InflightError {
    /// The front-end's file is not suitable.
    #[error("the file for requests in flight: {0}")]
    File(#[from] identity::FileError),
    /// A system call has failed.
    #[error("the file for requests in flight: {0}")]
    Failed(#[from] passgate_bindings::Failed),
    /// The memory is empty, misaligned, or too small for the queues.
    #[error("{size} bytes at {offset} do not hold the requests in flight of {queues} queues of {len}")]
    Size {
        /// The front-end's `mmap_size`.
        size: u64,
        /// The front-end's `mmap_offset`.
        offset: u64,
        /// The front-end's `num_queues`.
        queues: u16,
        /// The front-end's `queue_size`.
        len: u16,
    },
}

/// The memory for the requests in flight of all queues.
#[derive(Debug, Clone)]
pub(super) struct Inflight {
    file: Arc<GuestFile>,
    offset: u64,
    queues: u16,
    /// The number of descriptors of each queue.
    len: u16,
}

/// Returns the length in bytes of the part of a queue of `len` descriptors.
fn queue_len(len: u16) -> u64 {
    (QUEUE_HEADER_LEN + DESC_STATE_LEN * u64::from(len)).next_multiple_of(QUEUE_ALIGN)
}

impl Inflight {
    /// Returns the length in bytes for `queues` queues of `len` descriptors.
    pub(super) fn size(queues: u16, len: u16) -> u64 {
        queue_len(len) * u64::from(queues)
    }

    /// Makes new memory, and returns it with a descriptor for the front-end.
    pub(super) fn new(queues: u16, len: u16) -> Result<(Self, OwnedFd), InflightError> {
        let file =
            GuestFile::memfd("passgate-inflight", Self::size(queues, len).max(1).next_multiple_of(PAGE))?;
        let copy = file.as_fd().try_clone_to_owned();
        let copy = copy.map_err(|error| {
            let errno = rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO);
            passgate_bindings::Failed::new("dup", errno)
        })?;
        Ok((Self { file: Arc::new(file), offset: 0, queues, len }, copy))
    }

    /// Opens the memory that a front-end has stored for an earlier back-end.
    pub(super) fn from_fd(
        fd: OwnedFd,
        size: u64,
        offset: u64,
        queues: u16,
        len: u16,
    ) -> Result<Self, InflightError> {
        let wrong = InflightError::Size { size, offset, queues, len };
        let needed = Self::size(queues, len);
        let end = offset.checked_add(needed);
        let identity: Identity = identity::identify(&fd)?;
        let inside = end.is_some_and(|end| end <= identity.size);
        if needed == 0 || size < needed || !inside || !offset.is_multiple_of(8) {
            return Err(wrong);
        }
        // Access to a file that is shrunk afterwards would end this process by SIGBUS.
        identity::check(&identity, 0, identity.size / PAGE * PAGE, true)?;
        let file = GuestFile::new(fd, identity.kind, identity.size, true);
        Ok(Self { file: Arc::new(file), offset, queues, len })
    }

    /// Stores for later back-ends whether the guest has switched the write cache off.
    pub(super) fn set_write_through(&self, through: bool) {
        let word = if through { WRITE_THROUGH } else { 0 };
        if let Err(error) = self.file.store(self.offset, word) {
            log::error!("requests in flight: {error}");
        }
    }

    /// Returns true if it is stored that the guest has switched the write cache off.
    pub(super) fn is_write_through(&self) -> bool {
        self.file.load(self.offset).is_ok_and(|word| word & WRITE_THROUGH != 0)
    }

    /// Clears all queues and the guest's choice of cache, because the device was reset.
    pub(super) fn reset(&self) {
        self.set_write_through(false);
        for queue in 0..self.queues {
            if let Some(mut queue) = self.queue(queue, self.len) {
                queue.reset();
            }
        }
    }

    /// Returns the part of a queue; none if there is no such queue, or if `len` is more than the memory was made for.
    pub(super) fn queue(&self, index: u16, len: u16) -> Option<QueueInflight> {
        let base = self.offset + queue_len(self.len) * u64::from(index);
        (index < self.queues && len <= self.len).then(|| QueueInflight {
            file: Arc::clone(&self.file),
            base,
            len,
            counter: 0,
        })
    }
}

/// The part of one queue. Only this process writes to it while it is connected. The content that an earlier process has
/// written is not trusted.
#[derive(Debug)]
pub(super) struct QueueInflight {
    file: Arc<GuestFile>,
    base: u64,
    len: u16,
    /// The counter of the next request, by which the order of requests is known.
    counter: u64,
}

impl QueueInflight {
    fn load(&self, at: u64) -> u64 {
        // Within the file by construction. A word that cannot be read counts as 0: nothing in flight.
        self.file.load(self.base + at).unwrap_or(0)
    }

    fn store(&self, at: u64, word: u64) {
        if let Err(error) = self.file.store(self.base + at, word) {
            log::error!("requests in flight: {error}");
        }
    }

    fn state_offset(head: u16) -> u64 {
        QUEUE_HEADER_LEN + DESC_STATE_LEN * u64::from(head)
    }

    /// Starts tracking, given the index `used` of the used ring. Returns the heads of the requests that an earlier process had
    /// in flight, in the order in which they came; none if no process has used this memory before.
    pub(super) fn recover(&mut self, used: u16) -> Option<Vec<u16>> {
        let head = self.load(8);
        let (version, last, was_used) = (head & 0xffff, (head >> 32) as u16, (head >> 48) as u16);
        if version == VERSION && was_used != used && last < self.len {
            // The used index has moved on since it was stored: the process died after it had added the used buffer of `last`
            // and before it had stored that.
            self.clear(last);
        }
        self.store(8, VERSION | u64::from(self.len) << 16 | u64::from(last) << 32 | u64::from(used) << 48);
        if version != VERSION {
            (0..self.len).for_each(|head| self.clear(head));
            return None;
        }
        let marked = (0..self.len).filter(|head| self.load(Self::state_offset(*head)) & 0xff != 0);
        let mut found: Vec<_> = marked.map(|head| (self.load(Self::state_offset(head) + 8), head)).collect();
        found.sort_unstable();
        self.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some(found.into_iter().map(|(_, head)| head).collect())
    }

    /// Marks this memory as unused: the next [`QueueInflight::recover`] finds nothing in it.
    fn reset(&mut self) {
        self.store(8, 0);
    }

    /// Marks a request that has been taken from the available ring.
    pub(super) fn mark(&mut self, head: u16) {
        // The counter first: a mark is only ever seen with the counter of its own request.
        self.store(Self::state_offset(head) + 8, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.store(Self::state_offset(head), 1);
    }

    /// Stores that the used buffer of `head` is the next to be added.
    pub(super) fn set_last_batch_head(&self, head: u16) {
        let word = self.load(8);
        self.store(8, word & !(0xffff << 32) | u64::from(head) << 32);
    }

    /// Removes the mark of a request whose used buffer was added; `used` is the index of the used ring now.
    pub(super) fn unmark(&self, head: u16, used: u16) {
        self.clear(head);
        let word = self.load(8);
        self.store(8, word & !(0xffff << 48) | u64::from(used) << 48);
    }

    fn clear(&self, head: u16) {
        self.store(Self::state_offset(head), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(of: &Inflight) -> QueueInflight {
        of.queue(1, 8).unwrap()
    }

    #[test]
    fn requests_in_flight_are_recovered_in_their_order() {
        let (inflight, fd) = Inflight::new(2, 8).unwrap();
        let mut first = queue(&inflight);
        assert!(first.recover(5).is_none());
        for head in [3, 1, 7, 0] {
            first.mark(head);
        }
        first.set_last_batch_head(1);
        first.unmark(1, 6);
        let again = Inflight::from_fd(fd, Inflight::size(2, 8), 0, 2, 8).unwrap();
        assert_eq!(queue(&again).recover(6).unwrap(), [3, 7, 0]);
        assert!(again.queue(0, 8).unwrap().recover(0).is_none(), "the other queue was never used");
        assert!(again.queue(2, 8).is_none() && again.queue(0, 9).is_none());
    }

    #[test]
    fn request_with_a_used_buffer_is_not_recovered() {
        let (inflight, _fd) = Inflight::new(2, 8).unwrap();
        let mut first = queue(&inflight);
        first.recover(0);
        first.mark(2);
        first.mark(4);
        first.set_last_batch_head(2);
        // The used index has moved on, and the process dies here.
        assert_eq!(queue(&inflight).recover(1).unwrap(), [4]);
        // If the process dies before the index moves on, both are recovered.
        let mut third = queue(&inflight);
        third.recover(1);
        third.mark(2);
        third.set_last_batch_head(2);
        assert_eq!(queue(&inflight).recover(1).unwrap(), [4, 2]);
    }

    #[test]
    fn write_cache_choice_is_recovered() {
        let (inflight, fd) = Inflight::new(2, 8).unwrap();
        assert!(!inflight.is_write_through());
        inflight.set_write_through(true);
        inflight.queue(0, 8).unwrap().recover(0);
        let again = Inflight::from_fd(fd, Inflight::size(2, 8), 0, 2, 8).unwrap();
        assert!(again.is_write_through());
        again.set_write_through(false);
        assert!(!inflight.is_write_through());
    }

    #[test]
    fn request_counter_continues_after_recovery() {
        let (inflight, _fd) = Inflight::new(2, 8).unwrap();
        let mut first = queue(&inflight);
        first.recover(0);
        first.mark(5);
        let mut second = queue(&inflight);
        assert_eq!(second.recover(0).unwrap(), [5]);
        second.mark(1);
        assert_eq!(queue(&inflight).recover(0).unwrap(), [5, 1]);
    }

    #[test]
    fn unsuitable_inflight_file_is_refused() {
        let (_, fd) = Inflight::new(2, 8).unwrap();
        let size = Inflight::size(2, 8);
        let try_it = |size, offset, queues, len| {
            Inflight::from_fd(fd.try_clone().unwrap(), size, offset, queues, len).map(drop)
        };
        try_it(size, 0, 2, 8).unwrap();
        for (size, offset, queues, len) in [
            (size - 1, 0, 2, 8),
            (size, 4096 - 8, 2, 8),
            (size, 4, 2, 8),
            (size, u64::MAX, 2, 8),
            (size, 0, 3, 8),
            (size, 0, 0, 8),
            (u64::MAX, 0, u16::MAX, u16::MAX),
        ] {
            assert!(try_it(size, offset, queues, len).is_err(), "{size} {offset} {queues} {len}");
        }
        let shrinkable = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&shrinkable, 8192).unwrap();
        assert!(Inflight::from_fd(shrinkable, size, 0, 2, 8).is_err());
    }
}
