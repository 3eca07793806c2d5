//! The text of `quarantine.json`: a head with what was in quarantine when the file was written, then a line for each
//! event that changed it since.

use std::collections::BTreeMap;
use std::io;

use passgate_bindings::PageRange;
use passgate_bindings::units::Offset;
use serde::{Deserialize, Serialize};

use crate::gate::{Effect, Event, FileId, InvalidationId, Notice, QuarantineStatus, Reason};

/// The version of the format that this file describes. A file without one is version 0. Versions 0 and 1 are a head
/// alone, written anew for each change.
pub(super) const VERSION: u64 = 2;
/// The first version in which changes follow the head.
const WITH_CHANGES: u64 = 2;
/// The last line of a file whose daemon has ended in order. That of one that was killed is filled up with NULs.
pub(super) const END: &[u8] = b"\"end\"\n";

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Head {
    #[serde(default)]
    pub(super) version: u64,
    /// The kernel's boot.
    pub(super) boot: String,
    /// Bytes of the file while changes are appended to it: by them one that was cut is told from one that is whole.
    #[serde(default)]
    pub(super) bytes: u64,
    /// The ledger that has all that the file says, and what has changed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ledger: Option<u64>,
    pub(super) quarantine: Vec<Range>,
}

/// A range in quarantine.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Range {
    pub(super) file: FileId,
    pub(super) range: PageRange<Offset>,
    pub(super) invalidation: InvalidationId,
    pub(super) reason: Reason,
}

impl Range {
    /// The range that an event puts into quarantine, where it does.
    pub(super) fn of_event(event: &Event) -> Option<Self> {
        match *event {
            Event::Quarantine { file, range, invalidation, reason } => {
                Some(Self { file, range, invalidation, reason })
            }
            _ => None,
        }
    }

    /// The event that puts it into quarantine, for a gate without regions.
    pub(super) fn event(self) -> Event {
        let Self { file, range, invalidation, reason } = self;
        Event::Quarantine { file, range, invalidation, reason }
    }
}

impl From<&QuarantineStatus> for Range {
    fn from(status: &QuarantineStatus) -> Self {
        let QuarantineStatus { file, range, invalidation, reason } = *status;
        Self { file, range, invalidation, reason }
    }
}

/// What becomes of one range. It is named by its file and its first page.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Change {
    Held(Range),
    Freed { file: FileId, range: PageRange<Offset> },
}

impl Change {
    /// What an effect of the gate's tells of a range, where it tells something.
    pub(super) fn of(effect: &Effect) -> Option<Self> {
        match *effect {
            Effect::Notice(Notice::Quarantined { file, range, invalidation, reason, .. }) => {
                Some(Self::Held(Range { file, range, invalidation, reason }))
            }
            Effect::Notice(Notice::Freed { file, range, .. } | Notice::Released { file, range, .. }) => {
                Some(Self::Freed { file, range })
            }
            _ => None,
        }
    }
}

/// A line behind the first.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Line {
    /// All that one event has changed, in order.
    Changes(Vec<Change>),
    /// See [`END`].
    End,
}

/// True for what a version wrote that writes one, or begins like nothing that any has written.
pub(super) fn has_version(bytes: &[u8]) -> bool {
    bytes.starts_with(b"{\"version\":") || bytes.starts_with(&[0])
}

/// Returns the head, with what is in quarantine at the end of the file.
pub(super) fn read(bytes: &[u8]) -> io::Result<Head> {
    let (text, rest) = bytes.split_at(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    let mut values = serde_json::Deserializer::from_slice(text);
    let mut head = Head::deserialize(&mut values)?;
    // A line is written from its second byte on: whoever dies in it leaves a part of it behind the end.
    let may_be_torn = head.bytes == bytes.len() as u64 && text.ends_with(b"\n");
    if !may_be_torn && rest.iter().any(|byte| *byte != 0) {
        return Err(io::Error::other("it goes on behind its end"));
    }
    if head.version > VERSION {
        let why = format!("it is of version {}, this passgate reads up to {VERSION}", head.version);
        return Err(io::Error::other(why));
    }
    if head.version < WITH_CHANGES {
        values.end()?;
        return Ok(head);
    }
    let named = |range: Range| ((range.file, range.range.start()), range);
    let mut held: BTreeMap<_, _> = head.quarantine.iter().copied().map(named).collect();
    let mut ended = false;
    for line in values.into_iter::<Line>() {
        match line? {
            _ if ended => return Err(io::Error::other("it goes on behind its end")),
            Line::Changes(changes) => changes.into_iter().for_each(|change| match change {
                Change::Held(range) => _ = held.insert((range.file, range.range.start()), range),
                Change::Freed { file, range } => _ = held.remove(&(file, range.start())),
            }),
            Line::End => ended = true,
        }
    }
    let filled = bytes.len() as u64 == head.bytes;
    if !text.ends_with(b"\n") || !(ended || filled) {
        return Err(io::Error::other("it was cut: what it said behind that is missing"));
    }
    head.quarantine = held.into_values().collect();
    Ok(head)
}
