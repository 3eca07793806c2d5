//! The format of `quarantine.json`: a head with the quarantine at the time when the file was written, then a line for each event that
//! has changed it since. The rest of the file is NULs.

use std::collections::BTreeMap;
use std::io;

use passgate_bindings::PageRange;
use passgate_bindings::units::Offset;
use serde::{Deserialize, Serialize};

use crate::gate::{Effect, Event, FileId, InvalidationId, Notice, QuarantineStatus, Reason};

/// The version of this format. A file without a version is of version 0. Versions 0 and 1 are a head alone, rewritten for each change.
pub(super) const VERSION: u64 = 2;
/// The first version in which changes follow the head.
const FIRST_VERSION_WITH_CHANGES: u64 = 2;
/// The last line of a file whose daemon has ended in order. The file of one that was killed has none.
pub(super) const END: &[u8] = b"\"end\"\n";

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Head {
    #[serde(default)]
    pub(super) version: u64,
    /// The boot identifier of the kernel.
    pub(super) boot: String,
    /// The size of the file in bytes while changes are appended to it: a file without [`END`] is whole only if it has this size.
    #[serde(default)]
    pub(super) bytes: u64,
    /// The id of the ledger that has all that the file says, and the changes since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ledger: Option<u64>,
    pub(super) quarantine: Vec<Range>,
}

/// The version in the first line, of whatever format.
#[derive(Deserialize)]
struct Version {
    #[serde(default)]
    version: u64,
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
    /// Returns the range that an event puts into quarantine; none for any other event.
    pub(super) fn of_event(event: &Event) -> Option<Self> {
        match *event {
            Event::Quarantine { file, range, invalidation, reason } => {
                Some(Self { file, range, invalidation, reason })
            }
            _ => None,
        }
    }

    /// Returns the event that puts the range into quarantine, for a gate without regions.
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

/// The change of one range, which is identified by its file and its first page.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Change {
    /// The range is in quarantine.
    #[serde(rename = "held")]
    Quarantined(Range),
    /// The range is not in quarantine any more: lifted by proof, or released by an operator.
    Freed { file: FileId, range: PageRange<Offset> },
}

impl Change {
    /// Returns the change that an effect reports; none for any other effect.
    pub(super) fn of(effect: &Effect) -> Option<Self> {
        match *effect {
            Effect::Notice(Notice::Quarantined { file, range, invalidation, reason, .. }) => {
                Some(Self::Quarantined(Range { file, range, invalidation, reason }))
            }
            Effect::Notice(Notice::Freed { file, range, .. } | Notice::Released { file, range, .. }) => {
                Some(Self::Freed { file, range })
            }
            _ => None,
        }
    }
}

/// A line after the head.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Line {
    /// The changes by one event, in order.
    Changes(Vec<Change>),
    /// The line [`END`].
    End,
}

/// Returns true if the file was written by version 1 or newer, or begins with a NUL, as a torn file does.
pub(super) fn has_version(bytes: &[u8]) -> bool {
    bytes.starts_with(b"{\"version\":") || bytes.starts_with(&[0])
}

/// Returns the head, with the quarantine after all changes in the file.
pub(super) fn read(bytes: &[u8]) -> io::Result<Head> {
    let (text, rest) = bytes.split_at(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    // Of a newer version nothing else is known.
    let Version { version } = Version::deserialize(&mut serde_json::Deserializer::from_slice(text))?;
    if version > VERSION {
        return Err(io::Error::other(format!(
            "it is of version {version}, this passgate reads up to {VERSION}"
        )));
    }
    let mut values = serde_json::Deserializer::from_slice(text);
    let mut head = Head::deserialize(&mut values)?;
    // A line is written from its second byte on, and its first byte last: a daemon that dies in between leaves a part of it after a
    // NUL.
    let may_be_torn = head.bytes == bytes.len() as u64 && text.ends_with(b"\n");
    if !may_be_torn && rest.iter().any(|byte| *byte != 0) {
        return Err(io::Error::other("it continues after its end"));
    }
    if head.version < FIRST_VERSION_WITH_CHANGES {
        values.end()?;
        return Ok(head);
    }
    let keyed = |range: Range| ((range.file, range.range.start()), range);
    let mut quarantine: BTreeMap<_, _> = head.quarantine.iter().copied().map(keyed).collect();
    let mut ended = false;
    for line in values.into_iter::<Line>() {
        match line? {
            _ if ended => return Err(io::Error::other("it continues after its end")),
            Line::Changes(changes) => changes.into_iter().for_each(|change| match change {
                Change::Quarantined(range) => {
                    _ = quarantine.insert((range.file, range.range.start()), range);
                }
                Change::Freed { file, range } => _ = quarantine.remove(&(file, range.start())),
            }),
            Line::End => ended = true,
        }
    }
    // A file of its full size is filled up with NULs: its daemon was killed, or is still running.
    let filled = bytes.len() as u64 == head.bytes;
    if !text.ends_with(b"\n") || !(ended || filled) {
        return Err(io::Error::other("it was cut: the rest is missing"));
    }
    head.quarantine = quarantine.into_values().collect();
    Ok(head)
}
