//! The command identifiers (CIDs) of a queue (NVMe Base 2.0, 3.3.3.1), and the check that a completion has one that
//! is outstanding. A completion with any other CID is a protocol error of the controller, whatever its status.
//!
//! # I/O queues
//!
//! A CID is an *index*, below the number of commands that may be outstanding, and a *generation* of this index, which
//! advances with every use. A controller that completes a command twice uses the CID of a past generation, whether
//! the index is free by then or belongs to a later command. So a completion ends a command only if it has the CID of
//! this command and of no earlier one. Only a duplicate that arrives a multiple of [`GENERATIONS`] uses of its index
//! late is mistaken for the completion of another command. Linux (`nvme_cid`, drivers/nvme/host/nvme.h) puts a
//! generation into the upper bits of its CIDs as well, so controllers accept CIDs of this form.
//!
//! These generations continue over resets of the controller and from one owner of a queue to the next. They are not
//! the generations of the controller ([`super::drive`]), which advance with each initialization.
//!
//! # Queues with one command at a time
//!
//! The admin queue, and the I/O queue of a driver that runs one command at a time, use CIDs in ascending order. A command that was abandoned may still
//! complete, once.

use std::collections::{BTreeSet, VecDeque};

/// The number of bits of a CID that are its index.
const INDEX_BITS: u32 = 7;

/// The largest number of commands that a queue may have outstanding. The index of a CID is never all ones, so that no
/// CID is FFFFh, which stands for no particular command (NVMe Base 2.0, 5.16.1.2, Error Information).
pub(super) const MAX_OUTSTANDING: u16 = (1 << INDEX_BITS) - 1;

/// The number of generations of an index, before its CIDs repeat.
const GENERATIONS: u16 = 1 << (u16::BITS - INDEX_BITS);

/// The state of one index.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// The generation of the last CID with this index.
    generation: u16,
    /// The request whose command is outstanding with this index.
    request: Option<u16>,
}

/// The CIDs of one I/O queue, and the requests whose commands have them.
#[derive(Debug, Clone, Default)]
pub(super) struct Cids {
    entries: Vec<Entry>,
    /// The free indices, least recently used first, so that CIDs repeat as late as possible.
    free: VecDeque<u16>,
}

impl Cids {
    /// Returns `count` free CIDs, at most [`MAX_OUTSTANDING`].
    pub(super) fn new(count: u16) -> Self {
        let count = count.min(MAX_OUTSTANDING);
        Self { entries: vec![Entry::default(); count.into()], free: (0..count).collect() }
    }

    /// Returns the number of CIDs, free or not.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns the number of free CIDs.
    pub(super) fn available(&self) -> usize {
        self.free.len()
    }

    /// Allocates a CID for a command of `request`; None if all are outstanding.
    pub(super) fn allocate(&mut self, request: u16) -> Option<u16> {
        let index = self.free.pop_front()?;
        let entry = self.entries.get_mut(usize::from(index))?;
        *entry = Entry { generation: (entry.generation + 1) % GENERATIONS, request: Some(request) };
        Some(entry.generation << INDEX_BITS | index)
    }

    /// Frees the CID of an outstanding command and returns its request; None if no command with this CID is
    /// outstanding.
    pub(super) fn retire(&mut self, cid: u16) -> Option<u16> {
        let index = index(cid);
        let entry = self.entries.get_mut(usize::from(index))?;
        if entry.generation != cid >> INDEX_BITS {
            return None;
        }
        let request = entry.request.take()?;
        self.free.push_back(index);
        Some(request)
    }

    /// Returns the CID and the request of each outstanding command.
    pub(super) fn outstanding(&self) -> impl Iterator<Item = (u16, u16)> {
        (0..).zip(&self.entries).filter_map(|(index, entry)| {
            let Entry { generation, request } = *entry;
            request.map(|request| (generation << INDEX_BITS | index, request))
        })
    }

    /// Frees all CIDs, after a reset of the controller.
    pub(super) fn retire_all(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.request = None);
        self.free.clear();
        self.free.extend(0..self.entries.len() as u16); // at most MAX_OUTSTANDING
    }
}

/// The CIDs of a queue with one command at a time.
#[derive(Debug, Default)]
pub struct SerialCids {
    last: u16,
    /// The CIDs of commands that were abandoned and have not completed.
    abandoned: BTreeSet<u16>,
}

/// The command that a completion belongs to, by its CID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CidMatch {
    /// The current command.
    Current,
    /// A command that was abandoned before.
    Abandoned,
    /// No outstanding command: a protocol error of the controller.
    Unknown,
}

impl SerialCids {
    /// Returns the CID for the next command, which becomes the current one; None if `capacity` commands are abandoned and
    /// have not completed: they fill the queue until the controller is reset.
    pub fn allocate(&mut self, capacity: u16) -> Option<u16> {
        if self.abandoned.len() >= capacity.into() {
            return None;
        }
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != u16::MAX && !self.abandoned.contains(&self.last) {
                return Some(self.last);
            }
        }
    }

    /// Classifies a completion that arrives while a command is current.
    pub fn classify(&mut self, cid: u16) -> CidMatch {
        match cid {
            cid if cid == self.last => CidMatch::Current,
            cid if self.abandoned.remove(&cid) => CidMatch::Abandoned,
            _ => CidMatch::Unknown,
        }
    }

    /// Abandons the current command. It may complete later.
    pub fn abandon(&mut self) {
        self.abandoned.insert(self.last);
    }

    /// Forgets all abandoned commands, after the queue has been created anew.
    pub fn clear(&mut self) {
        self.abandoned.clear();
    }
}

/// Returns the index of a CID. It differs between any two outstanding commands.
pub(super) fn index(cid: u16) -> u16 {
    cid & MAX_OUTSTANDING
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Tries every CID that is not outstanding at every step of a queue that is used to its capacity.
    #[test]
    fn cid_that_is_not_outstanding_completes_no_command() {
        for count in [1, 2, 3, MAX_OUTSTANDING] {
            let mut cids = Cids::new(count);
            let mut outstanding = Vec::new();
            for step in 0..40u16 {
                match cids.allocate(step) {
                    Some(cid) => outstanding.push((cid, step)),
                    None => assert_eq!((outstanding.len(), cids.available()), (count.into(), 0)),
                }
                for cid in 0..=u16::MAX {
                    if !outstanding.iter().any(|(of, _)| *of == cid) {
                        assert_eq!(cids.retire(cid), None, "{cid:#x}");
                    }
                }
                if step % 3 == 2 || outstanding.len() == usize::from(count) {
                    let (cid, request) = outstanding.remove(usize::from(step) % outstanding.len());
                    assert_eq!(cids.retire(cid), Some(request));
                    assert_eq!(cids.retire(cid), None, "it was completed before");
                }
                let mut listed: Vec<_> = cids.outstanding().collect();
                listed.sort_unstable_by_key(|(_, request)| *request);
                assert_eq!(listed, outstanding);
            }
        }
    }

    #[test]
    fn cid_is_reused_only_after_all_generations_of_its_index() {
        let (mut cids, mut used) = (Cids::new(1), BTreeSet::new());
        for _ in 0..GENERATIONS {
            let cid = cids.allocate(0).unwrap();
            assert!(used.insert(cid) && cid != 0xffff && index(cid) == 0);
            assert_eq!(cids.allocate(1), None, "two commands would have one index");
            assert_eq!(cids.retire(cid), Some(0));
        }
        assert!(used.contains(&cids.allocate(0).unwrap()));
    }

    #[test]
    fn abandoned_command_may_complete_late_and_once() {
        let mut cids = SerialCids::default();
        let first = cids.allocate(4).unwrap();
        assert_eq!(cids.classify(first), CidMatch::Current);
        let given_up = cids.allocate(4).unwrap();
        assert_eq!(cids.classify(first), CidMatch::Unknown, "it has completed before");
        cids.abandon();
        let third = cids.allocate(4).unwrap();
        assert_eq!(cids.classify(given_up), CidMatch::Abandoned);
        assert_eq!(cids.classify(given_up), CidMatch::Unknown);
        assert_eq!((cids.classify(third), cids.classify(0xffff)), (CidMatch::Current, CidMatch::Unknown));
        cids.abandon();
        let all: BTreeSet<_> = (0..u16::MAX).map(|_| cids.allocate(4).unwrap()).collect();
        assert!(!all.contains(&third) && !all.contains(&0xffff), "it is not used while it may complete");
        cids.clear();
        assert_eq!(cids.classify(third), CidMatch::Unknown, "a reset leaves nothing outstanding");
    }

    #[test]
    fn queue_full_of_abandoned_commands_takes_none_until_one_completes() {
        let mut cids = SerialCids::default();
        for _ in 0..15 {
            cids.allocate(15).unwrap();
            cids.abandon();
        }
        let last = cids.last;
        assert_eq!(cids.allocate(15), None);
        assert_eq!(cids.classify(last - 3), CidMatch::Abandoned);
        assert!(cids.allocate(15).is_some());
    }

    #[test]
    fn cid_from_before_a_reset_completes_no_later_command() {
        let mut cids = Cids::new(2);
        let before = [cids.allocate(0).unwrap(), cids.allocate(1).unwrap()];
        cids.retire_all();
        assert_eq!((cids.available(), cids.outstanding().count()), (2, 0));
        let after = [cids.allocate(0).unwrap(), cids.allocate(1).unwrap()];
        assert!(before.iter().all(|cid| cids.retire(*cid).is_none()));
        assert!(after.iter().all(|cid| cids.retire(*cid).is_some()));
    }
}
