//! What happens to the gate: requests of clients, results of effects, and time passing.
//!
//! An event tells a fact; the gate has no other source of facts. Results carry what the kernel really answered
//! and how long it took, so that a log of events replays to the same state.

use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, PageRange};
use serde::{Deserialize, Serialize};

use super::fence::{Nature, Step, Steps};
use super::hitless::Able;
use super::ledger::PageState;
use super::ranges::Ranges;
use super::verdict::Reason;

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident($raw:ty);)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $raw);
    )*};
}

names! {
    /// A connection that may ask: it began what it may end, and owns the memory that it added.
    ClientId(u32);
    /// A guest memory region.
    RegionId(u32);
    /// An IOVA domain.
    DomainId(u16);
    /// A device.
    DeviceId(u16);
    /// One invalidation, from begin to end. Never used twice, never 0.
    InvalidationId(u64);
    /// One effect whose result the gate waits for. Never used twice.
    JobId(u64);
}

/// The identity of a file (`st_dev`, `st_ino`): two descriptors of one file are one identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// Through which of a client's sockets a request came; its answer goes the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Door {
    /// A varlink call on the control socket.
    Control,
    /// A record on the notification channel.
    Channel,
}

/// Whom to answer. The cookie is the caller's own and comes back untouched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The connection.
    pub client: ClientId,
    /// Which of its sockets.
    pub door: Door,
    /// The caller's own number for the request.
    pub cookie: u64,
}

/// Pages of a file, from an offset on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// The file.
    pub file: FileId,
    /// Where in it the region starts; page-aligned.
    pub offset: Offset,
}

/// A guest memory region as its owner describes it. Device DMA sees it at IOVA = guest-physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionSpec {
    /// Where the guest sees it.
    pub gpa: PageRange<Gpa>,
    /// What devices are given: a shared memfd, or a guest_memfd that can be mapped.
    pub backing: Backing,
    /// Whether devices may write.
    pub writable: bool,
    /// Bytes per kernel mapping at most: a power of two, at least a page; 0 leaves it to the gate. Pages convert
    /// singly whatever this is.
    pub piece: u64,
    /// Bytes of the file's own pages (hugetlbfs); a power of two, at least a page.
    pub page: u64,
    /// The state of pages that the ledger does not know yet (from no other region of the file).
    pub initial: PageState,
}

/// How the owner's side of a conversion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The whole range is now what was asked for.
    Committed,
    /// Nothing of the range changed.
    NotCommitted,
    /// Neither is certain: the range is quarantined. `errno` and `offset` (bytes into the range) are the
    /// owner's evidence and go into the receipt.
    Unknown {
        /// What the owner's kernel call answered; 0 where there was none.
        errno: i32,
        /// How far into the range it got, in bytes.
        offset: u64,
    },
}

/// What an owner says of its conversion at the end, before it is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    /// Its word: committed, not committed, or unknown.
    pub word: Word,
    /// The errno of its kernel call; 0 where there was none.
    pub errno: i32,
    /// How far into the range it got, in bytes.
    pub offset: u64,
}

/// An owner's word at the end of its conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// The whole range was converted.
    Committed,
    /// Nothing of it was.
    NotCommitted,
    /// The owner cannot tell.
    Unknown,
}

/// The highest errno there is (`include/linux/err.h`).
const MAX_ERRNO: i32 = 4095;

/// `EPROTO`: stands for an errno that is none.
const NO_ERRNO: i32 = 71;

impl Said {
    /// The outcome of a conversion of `length` bytes. What contradicts itself is *unknown*: committed with an errno, or with
    /// an offset other than 0 and the end; not committed with an offset other than 0; an errno that is none, an offset
    /// beyond the range.
    pub fn outcome(self, length: u64) -> Outcome {
        let Self { word, errno, offset } = self;
        let valid = (0..=MAX_ERRNO).contains(&errno) && offset <= length;
        match word {
            Word::Committed if valid && errno == 0 && (offset == 0 || offset == length) => Outcome::Committed,
            // A call that failed and changed nothing has an errno.
            Word::NotCommitted if valid && offset == 0 => Outcome::NotCommitted,
            _ => Outcome::Unknown {
                errno: if (0..=MAX_ERRNO).contains(&errno) { errno } else { NO_ERRNO },
                offset: offset.min(length),
            },
        }
    }
}

/// Who performs the conversion between begin and end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Performer {
    /// The client, which then sends `end`.
    Client,
    /// passgate itself ([`super::Effect::Convert`]).
    Passgate,
}

/// How an unmap went, as the domain said it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnmapResult {
    /// `bytes` gone, nothing in flight.
    Gone {
        /// Bytes removed.
        bytes: u64,
    },
    /// `bytes` gone from the translation; [`Event::Released`] with the same job follows once what was in
    /// flight has ended.
    InFlight {
        /// Bytes removed.
        bytes: u64,
    },
    /// The call failed; what is left is unknown.
    Failed {
        /// The kernel's answer.
        errno: i32,
        /// Bytes removed before.
        bytes: u64,
    },
}

/// How a map went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MapResult {
    /// The whole range is mapped.
    Mapped,
    /// Nothing of it is mapped.
    Refused {
        /// The kernel's answer.
        errno: i32,
    },
    /// Some of it may be.
    Unknown {
        /// The kernel's answer to the roll-back.
        errno: i32,
    },
}

/// What happens to the gate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// A domain exists. Before any region or device.
    DomainAdded {
        /// Its name from now on.
        domain: DomainId,
        /// What it can do.
        able: Able,
    },
    /// A device is attached to a domain and can be stopped by these steps.
    DeviceAdded {
        /// Its name from now on.
        device: DeviceId,
        /// Where it is attached.
        domain: DomainId,
        /// Its stop class.
        steps: Steps,
        /// What bears on them.
        nature: Nature,
    },
    /// A client adds memory.
    AddRegion {
        /// Whom to answer; also the region's owner.
        caller: Caller,
        /// The region.
        spec: RegionSpec,
    },
    /// A client takes memory away: every mapping of the region goes, then the region.
    RemoveRegion {
        /// Whom to answer; must be the owner.
        caller: Caller,
        /// The region.
        region: RegionId,
    },
    /// A client announces that a range is about to change.
    Begin {
        /// Whom to answer; only this client may end it.
        caller: Caller,
        /// What changes; may cross regions, may not touch addresses without a region.
        ranges: Ranges,
        /// What the pages will be.
        to: PageState,
        /// Who makes the change.
        performer: Performer,
        /// Within how many nanoseconds the answer must come.
        deadline_ns: u64,
    },
    /// The client that began says how it went.
    End {
        /// Whom to answer.
        caller: Caller,
        /// What it began.
        invalidation: InvalidationId,
        /// How it went.
        outcome: Outcome,
    },
    /// [`super::Effect::Convert`] is done.
    Converted {
        /// Of which invalidation.
        invalidation: InvalidationId,
        /// How it went.
        outcome: Outcome,
    },
    /// [`super::Effect::Map`] is done.
    Mapped {
        /// Which one.
        job: JobId,
        /// How it went.
        result: MapResult,
    },
    /// [`super::Effect::Unmap`] or [`super::Effect::Replace`] is done.
    Unmapped {
        /// Which one.
        job: JobId,
        /// How it went.
        result: UnmapResult,
        /// How long the call took, in nanoseconds.
        took_ns: u64,
    },
    /// What was in flight over the pages of an unmap has ended.
    Released {
        /// The unmap.
        job: JobId,
    },
    /// [`super::Effect::Fence`] is done.
    Fenced {
        /// Which one.
        job: JobId,
        /// The kernel's answer; 0 for success.
        errno: i32,
        /// How long the call took, in nanoseconds.
        took_ns: u64,
    },
    /// [`super::Effect::Attach`] is done.
    Attached {
        /// Which one.
        job: JobId,
        /// The kernel's answer; 0 for success.
        errno: i32,
    },
    /// What bears on a device's fences was read again: before the result of every attach, and where it is not what the
    /// gate believed.
    DeviceNature {
        /// Which device.
        device: DeviceId,
        /// As [`Nature::ats`].
        ats: bool,
        /// As [`Nature::tdi`].
        tdi: bool,
    },
    /// The time that [`super::Effect::Arm`] asked for has passed.
    Expired {
        /// Of which invalidation.
        invalidation: InvalidationId,
        /// The rung that was to be over by now.
        rung: Step,
    },
    /// A moment has passed ([`super::Gate::is_frayed`]): what was quiet meanwhile is mapped in large pieces again.
    Quiet,
    /// A connection is gone, at whatever point.
    ClientGone {
        /// Which.
        client: ClientId,
    },
    /// Pages that an earlier daemon had in quarantine. Before any region.
    Quarantine {
        /// Of which file.
        file: FileId,
        /// Which.
        range: PageRange<Offset>,
        /// Since which invalidation; ids of this gate count on from the highest.
        invalidation: InvalidationId,
        /// Why.
        reason: Reason,
    },
    /// A client takes over the memory that an earlier daemon's clients had ([`super::adopt`]).
    Adopt {
        /// Whom to answer; also the new owner.
        caller: Caller,
    },
    /// This client cannot be told no: what it removes, or leaves behind, goes whatever that takes. Before anything else of it.
    Insists {
        /// Which.
        client: ClientId,
    },
    /// A person takes what an invalidation left in quarantine out of it, and says what it is now.
    Release {
        /// Whom to answer.
        caller: Caller,
        /// The invalidation that the quarantine dates from.
        invalidation: InvalidationId,
        /// What the pages are: shared, private or hole.
        to: PageState,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_contradicts_itself_is_unknown() {
        const LENGTH: u64 = 16384;
        let says = |word, errno, offset| Said { word, errno, offset }.outcome(LENGTH);
        let unknown = |errno, offset| Outcome::Unknown { errno, offset };
        for offset in [0, LENGTH] {
            assert_eq!(says(Word::Committed, 0, offset), Outcome::Committed);
        }
        for errno in [0, 5, MAX_ERRNO] {
            assert_eq!(says(Word::NotCommitted, errno, 0), Outcome::NotCommitted);
            assert_eq!(says(Word::Unknown, errno, 4096), unknown(errno, 4096));
        }
        assert_eq!(says(Word::Committed, 5, 0), unknown(5, 0));
        assert_eq!(says(Word::Committed, 5, LENGTH), unknown(5, LENGTH));
        assert_eq!(says(Word::Committed, 0, 4096), unknown(0, 4096));
        assert_eq!(says(Word::NotCommitted, 0, 1), unknown(0, 1));
        assert_eq!(says(Word::NotCommitted, 5, LENGTH), unknown(5, LENGTH));
        for word in [Word::Committed, Word::NotCommitted, Word::Unknown] {
            assert_eq!(says(word, 0, LENGTH + 1), unknown(0, LENGTH), "{word:?}");
            for errno in [-5, MAX_ERRNO + 1, i32::MIN, i32::MAX] {
                assert_eq!(says(word, errno, 0), unknown(NO_ERRNO, 0), "{word:?} {errno}");
            }
        }
    }
}
