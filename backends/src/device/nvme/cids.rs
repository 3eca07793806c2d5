//! The command identifiers (CIDs) of a queue (NVM Express base specification 2.0, 3.3.3.1), and which completions they
//! admit. A completion that names no outstanding command is a fault of the controller, whatever else it says.
//!
//! # An I/O queue
//!
//! A CID is an *index*, of which there are as many as the queue has room for commands, and a *generation*, which changes
//! with every use of the index. A controller that completes a command twice names a generation that is over, whether its
//! index is free again or belongs to a later command by then: a completion ends a command only if it has the CID of that
//! command and of no earlier one. Only a duplicate that comes a multiple of [`GENERATIONS`] uses of its index late is
//! mistaken for the completion of another command.
//!
//! Generations go on over resets of the controller and from one owner of a queue to the next. Linux has generations in the
//! upper bits of its CIDs as well: controllers take them.
//!
//! # A queue whose commands run one at a time
//!
//! The admin queue and the exerciser's queue take identifiers in turn. A command that was given up may still complete,
//! once.

use std::collections::{BTreeSet, VecDeque};

/// Bits of a CID that are its index.
const INDEX_BITS: u32 = 7;

/// The number of commands that a queue has outstanding at most. The index of a CID is never all ones, so no CID is
/// 0xffff, which names no command (5.16.1.2, Error Information).
pub(super) const MAX_OUTSTANDING: u16 = (1 << INDEX_BITS) - 1;

/// The number of generations of an index.
const GENERATIONS: u16 = 1 << (u16::BITS - INDEX_BITS);

/// One index.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// The generation of its last use.
    generation: u16,
    /// The request whose command is outstanding under it.
    request: Option<u16>,
}

/// The identifiers of one queue, and the requests whose commands have them.
#[derive(Debug, Clone, Default)]
pub(super) struct Cids {
    entries: Vec<Entry>,
    /// The indices that are free, in the order in which they became so.
    free: VecDeque<u16>,
}

impl Cids {
    /// Identifiers for so many commands, at most [`MAX_OUTSTANDING`], all of them free.
    pub(super) fn new(count: u16) -> Self {
        let count = count.min(MAX_OUTSTANDING);
        Self { entries: vec![Entry::default(); count.into()], free: (0..count).collect() }
    }

    /// The number of identifiers.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The number of identifiers that are free.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes an identifier for a command of `request`; none where all are outstanding.
    pub(super) fn take(&mut self, request: u16) -> Option<u16> {
        let index = self.free.pop_front()?;
        let entry = self.entries.get_mut(usize::from(index))?;
        *entry = Entry { generation: (entry.generation + 1) % GENERATIONS, request: Some(request) };
        Some(entry.generation << INDEX_BITS | index)
    }

    /// Frees the identifier of an outstanding command and returns its request; none where no command with this identifier
    /// is outstanding.
    pub(super) fn give_back(&mut self, cid: u16) -> Option<u16> {
        let index = index(cid);
        let entry = self.entries.get_mut(usize::from(index))?;
        if entry.generation != cid >> INDEX_BITS {
            return None;
        }
        let request = entry.request.take()?;
        self.free.push_back(index);
        Some(request)
    }

    /// The outstanding commands: identifier and request.
    pub(super) fn outstanding(&self) -> impl Iterator<Item = (u16, u16)> {
        (0..).zip(&self.entries).filter_map(|(index, entry)| {
            let Entry { generation, request } = *entry;
            request.map(|request| (generation << INDEX_BITS | index, request))
        })
    }

    /// Frees every identifier: the controller has been reset.
    pub(super) fn give_all_back(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.request = None);
        self.free.clear();
        self.free.extend(0..self.entries.len() as u16); // at most MAX_OUTSTANDING
    }
}

/// The identifiers of a queue whose commands run one at a time.
#[derive(Debug, Default)]
pub(super) struct SerialCids {
    last: u16,
    /// Commands that were given up and have not completed.
    abandoned: BTreeSet<u16>,
}

/// What a completion is, by its identifier, while one command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    /// It ends the command that runs.
    Current,
    /// It ends a command that was given up.
    Abandoned,
    /// No command is outstanding under its identifier.
    Nothing,
}

impl SerialCids {
    /// The identifier of the next command.
    pub(super) fn next(&mut self) -> u16 {
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != u16::MAX && !self.abandoned.contains(&self.last) {
                return self.last;
            }
        }
    }

    /// Judges a completion that came while the command of the last identifier runs.
    pub(super) fn judge(&mut self, cid: u16) -> Names {
        match cid {
            cid if cid == self.last => Names::Current,
            cid if self.abandoned.remove(&cid) => Names::Abandoned,
            _ => Names::Nothing,
        }
    }

    /// Gives the command up that runs.
    pub(super) fn abandon(&mut self) {
        self.abandoned.insert(self.last);
    }

    /// The queue has been created anew: nothing is outstanding.
    pub(super) fn forget(&mut self) {
        self.abandoned.clear();
    }
}

/// The index of an identifier: no two outstanding commands have the same.
pub(super) fn index(cid: u16) -> u16 {
    cid & MAX_OUTSTANDING
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Every identifier but the outstanding ones, tried at every step of a queue that is used to its end.
    #[test]
    fn identifier_that_is_not_outstanding_completes_no_command() {
        for count in [1, 2, 3, MAX_OUTSTANDING] {
            let mut cids = Cids::new(count);
            let mut outstanding = Vec::new();
            for step in 0..40u16 {
                match cids.take(step) {
                    Some(cid) => outstanding.push((cid, step)),
                    None => assert_eq!((outstanding.len(), cids.free()), (count.into(), 0)),
                }
                for cid in 0..=u16::MAX {
                    if !outstanding.iter().any(|(of, _)| *of == cid) {
                        assert_eq!(cids.give_back(cid), None, "{cid:#x}");
                    }
                }
                if step % 3 == 2 || outstanding.len() == usize::from(count) {
                    let (cid, request) = outstanding.remove(usize::from(step) % outstanding.len());
                    assert_eq!(cids.give_back(cid), Some(request));
                    assert_eq!(cids.give_back(cid), None, "it was completed before");
                }
                let mut left: Vec<_> = cids.outstanding().collect();
                left.sort_unstable_by_key(|(_, request)| *request);
                assert_eq!(left, outstanding);
            }
        }
    }

    #[test]
    fn identifier_is_used_again_only_after_every_generation_of_its_index() {
        let (mut cids, mut used) = (Cids::new(1), BTreeSet::new());
        for _ in 0..GENERATIONS {
            let cid = cids.take(0).unwrap();
            assert!(used.insert(cid) && cid != 0xffff && index(cid) == 0);
            assert_eq!(cids.take(1), None, "two commands would have one index");
            assert_eq!(cids.give_back(cid), Some(0));
        }
        assert!(used.contains(&cids.take(0).unwrap()));
    }

    #[test]
    fn command_that_was_given_up_completes_late_and_once() {
        let mut cids = SerialCids::default();
        let first = cids.next();
        assert_eq!(cids.judge(first), Names::Current);
        let given_up = cids.next();
        assert_eq!(cids.judge(first), Names::Nothing, "it has completed before");
        cids.abandon();
        let third = cids.next();
        assert_eq!(cids.judge(given_up), Names::Abandoned);
        assert_eq!(cids.judge(given_up), Names::Nothing);
        assert_eq!((cids.judge(third), cids.judge(0xffff)), (Names::Current, Names::Nothing));
        cids.abandon();
        let all: BTreeSet<_> = (0..u16::MAX).map(|_| cids.next()).collect();
        assert!(!all.contains(&third) && !all.contains(&0xffff), "it is not used while it may complete");
        cids.forget();
        assert_eq!(cids.judge(third), Names::Nothing, "nothing is left of before a reset");
    }

    #[test]
    fn identifier_of_before_a_reset_completes_no_command_of_after_it() {
        let mut cids = Cids::new(2);
        let before = [cids.take(0).unwrap(), cids.take(1).unwrap()];
        cids.give_all_back();
        assert_eq!((cids.free(), cids.outstanding().count()), (2, 0));
        let after = [cids.take(0).unwrap(), cids.take(1).unwrap()];
        assert!(before.iter().all(|cid| cids.give_back(*cid).is_none()));
        assert!(after.iter().all(|cid| cids.give_back(*cid).is_some()));
    }
}
