//! Which requests are in flight, in memory that the front-end keeps: a back-end that comes back finds there what it
//! must do again (vhost-user protocol, "Inflight I/O tracking", split virtqueues).
//!
//! The order of the stores is what makes it true at every moment that this process may die in: a request is marked
//! before anything is done for it, and its mark goes only after the guest was told. What dies between the two is found
//! by the used index.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use passgate_bindings::PAGE;
use passgate_bindings::identity::{self, Identity};
use passgate_bindings::memory::GuestFile;

/// Bytes of a queue's head: features u64, version u16, descriptors u16, last batch's head u16, used index u16.
const HEAD: u64 = 16;
/// Bytes of a descriptor's state: in flight u8, padding, next u16 at 6, counter u64 at 8.
const STATE: u64 = 16;
/// A queue's part begins at a multiple of it.
const ALIGN: u64 = 64;
const VERSION: u64 = 1;
/// In the first queue's features, which are the back-end's to use: the guest has switched its write cache off.
const WRITE_THROUGH: u64 = 1 << 63;

/// What a front-end says is not as it must be.
#[derive(Debug, thiserror::Error)]
pub(super) enum InflightError {
    /// The file.
    #[error("the file for requests in flight: {0}")]
    File(#[from] identity::FileError),
    /// It cannot be made or touched.
    #[error("the file for requests in flight: {0}")]
    Failed(#[from] passgate_bindings::Failed),
    /// It has other queues than were agreed, or is too small for them.
    #[error("{size} bytes at {offset} do not hold the requests in flight of {queues} queues of {len}")]
    Size {
        /// As the front-end says.
        size: u64,
        /// As the front-end says.
        offset: u64,
        /// As the front-end says.
        queues: u16,
        /// As the front-end says.
        len: u16,
    },
}

/// The memory, for all queues.
#[derive(Debug, Clone)]
pub(super) struct Inflight {
    file: Arc<GuestFile>,
    offset: u64,
    queues: u16,
    /// Descriptors of each queue.
    len: u16,
}

/// Bytes of one queue's part.
fn part(len: u16) -> u64 {
    (HEAD + STATE * u64::from(len)).next_multiple_of(ALIGN)
}

impl Inflight {
    /// Bytes that so many queues of so many descriptors take.
    pub(super) fn size(queues: u16, len: u16) -> u64 {
        part(len) * u64::from(queues)
    }

    /// Fresh memory, and a descriptor of it for the front-end.
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

    /// The memory that a front-end hands back.
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
        // A file that could be shrunk under this process would end it.
        identity::check(&identity, 0, identity.size / PAGE * PAGE, true)?;
        let file = GuestFile::new(fd, identity.kind, identity.size, true);
        Ok(Self { file: Arc::new(file), offset, queues, len })
    }

    /// Notes whether the guest has switched its write cache off.
    pub(super) fn set_write_through(&self, through: bool) {
        let word = if through { WRITE_THROUGH } else { 0 };
        if let Err(error) = self.file.store(self.offset, word) {
            log::error!("requests in flight: {error}");
        }
    }

    /// Whether an earlier back-end noted that.
    pub(super) fn is_write_through(&self) -> bool {
        self.file.load(self.offset).is_ok_and(|word| word & WRITE_THROUGH != 0)
    }

    /// Nothing of it is in flight any more, and the guest has chosen nothing: the device was reset.
    pub(super) fn forget(&self) {
        self.set_write_through(false);
        for queue in 0..self.queues {
            if let Some(mut queue) = self.queue(queue, self.len) {
                queue.forget();
            }
        }
    }

    /// The part of a queue; none where there is no such queue or it is longer than was agreed.
    pub(super) fn queue(&self, index: u16, len: u16) -> Option<QueueInflight> {
        let base = self.offset + part(self.len) * u64::from(index);
        (index < self.queues && len <= self.len).then(|| QueueInflight {
            file: Arc::clone(&self.file),
            base,
            len,
            counter: 0,
        })
    }
}

/// The part of one queue. Its words are this process's alone while it is connected; what an earlier one left in them is
/// not trusted.
#[derive(Debug)]
pub(super) struct QueueInflight {
    file: Arc<GuestFile>,
    base: u64,
    len: u16,
    /// Grows with every request: the order in which they came.
    counter: u64,
}

impl QueueInflight {
    fn load(&self, at: u64) -> u64 {
        // Within the file by construction: what cannot be read counts as nothing in flight.
        self.file.load(self.base + at).unwrap_or(0)
    }

    fn store(&self, at: u64, word: u64) {
        if let Err(error) = self.file.store(self.base + at, word) {
            log::error!("requests in flight: {error}");
        }
    }

    fn state(head: u16) -> u64 {
        HEAD + STATE * u64::from(head)
    }

    /// Begins, where `used` is the used index that the guest sees: what an earlier process had in flight, in the order
    /// in which it came. None where no process has had this memory before.
    pub(super) fn recover(&mut self, used: u16) -> Option<Vec<u16>> {
        let head = self.load(8);
        let (version, last, was_used) = (head & 0xffff, (head >> 32) as u16, (head >> 48) as u16);
        if version == VERSION && was_used != used && last < self.len {
            // The guest was told of it, its mark had not gone yet.
            self.clear(last);
        }
        self.store(8, VERSION | u64::from(self.len) << 16 | u64::from(last) << 32 | u64::from(used) << 48);
        if version != VERSION {
            (0..self.len).for_each(|head| self.clear(head));
            return None;
        }
        let marked = (0..self.len).filter(|head| self.load(Self::state(*head)) & 0xff != 0);
        let mut found: Vec<_> = marked.map(|head| (self.load(Self::state(head) + 8), head)).collect();
        found.sort_unstable();
        self.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some(found.into_iter().map(|(_, head)| head).collect())
    }

    /// Nobody has had this memory: what begins next finds nothing in it.
    fn forget(&mut self) {
        self.store(8, 0);
    }

    /// A request has been taken from the guest.
    pub(super) fn begin(&mut self, head: u16) {
        self.store(Self::state(head) + 8, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.store(Self::state(head), 1);
    }

    /// The guest is about to be told of it.
    pub(super) fn telling(&self, head: u16) {
        let word = self.load(8);
        self.store(8, word & !(0xffff << 32) | u64::from(head) << 32);
    }

    /// The guest was told of it; `used` is the used index now.
    pub(super) fn told(&self, head: u16, used: u16) {
        self.clear(head);
        let word = self.load(8);
        self.store(8, word & !(0xffff << 48) | u64::from(used) << 48);
    }

    fn clear(&self, head: u16) {
        self.store(Self::state(head), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(of: &Inflight) -> QueueInflight {
        of.queue(1, 8).unwrap()
    }

    #[test]
    fn what_was_in_flight_is_found_in_its_order() {
        let (inflight, fd) = Inflight::new(2, 8).unwrap();
        let mut first = queue(&inflight);
        assert!(first.recover(5).is_none());
        for head in [3, 1, 7, 0] {
            first.begin(head);
        }
        first.telling(1);
        first.told(1, 6);
        let again = Inflight::from_fd(fd, Inflight::size(2, 8), 0, 2, 8).unwrap();
        assert_eq!(queue(&again).recover(6).unwrap(), [3, 7, 0]);
        assert!(again.queue(0, 8).unwrap().recover(0).is_none(), "nobody has had the other queue");
        assert!(again.queue(2, 8).is_none() && again.queue(0, 9).is_none());
    }

    #[test]
    fn one_that_the_guest_was_told_of_is_not_done_again() {
        let (inflight, _fd) = Inflight::new(2, 8).unwrap();
        let mut first = queue(&inflight);
        first.recover(0);
        first.begin(2);
        first.begin(4);
        first.telling(2);
        // The used index has moved on, and the process dies here.
        assert_eq!(queue(&inflight).recover(1).unwrap(), [4]);
        // Dying before the index moves, both are done again.
        let mut third = queue(&inflight);
        third.recover(1);
        third.begin(2);
        third.telling(2);
        assert_eq!(queue(&inflight).recover(1).unwrap(), [4, 2]);
    }

    #[test]
    fn what_the_guest_chose_of_its_cache_is_found_again() {
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
    fn a_counter_goes_on_where_the_earlier_process_was() {
        let (inflight, _fd) = Inflight::new(2, 8).unwrap();
        let mut first = queue(&inflight);
        first.recover(0);
        first.begin(5);
        let mut second = queue(&inflight);
        assert_eq!(second.recover(0).unwrap(), [5]);
        second.begin(1);
        assert_eq!(queue(&inflight).recover(0).unwrap(), [5, 1]);
    }

    #[test]
    fn a_file_that_will_not_do_is_refused() {
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
