//! The lines of a log: the head of a segment, one event with the effects that the gate asked for, or a mark.

use std::borrow::Cow;

use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PageRange};
use serde::{Deserialize, Serialize};

use crate::gate::{
    Answer, Caller, ClientId, DeviceId, DomainId, Effect, Event, FileId, InvalidationId, JobId, Notice,
    PageState, Policy, Reason, RegionId, Rung, Step, Verdict,
};

/// The first line of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The version of passgate that wrote the segment.
    pub passgate: String,
    /// The version of the format. Files of version 0 do not state it and have no [`Mark`]s, so a missing end cannot be detected.
    #[serde(default)]
    pub format: u64,
    /// The run of the daemon, identified by the time of its start in nanoseconds since 1970.
    pub run: u64,
    /// The boot identifier of the kernel; after another boot files have other identities.
    pub boot: String,
    /// The number of the segment in its run, from 0.
    pub segment: u64,
    /// The number of the first line after this one.
    pub first: u64,
    /// The time at which the segment was begun, in nanoseconds since 1970.
    pub wall: u64,
    /// The policy of the run's gate.
    pub policy: Policy,
    /// The interface to the IOMMU: `iommufd`, `type1`, `soft`.
    pub iommu: String,
    /// The devices' names, in the order of their numbers.
    pub devices: Vec<String>,
    /// True if the run resumes from an earlier daemon's ledger (`serve --restart hold`): then its beginning is in that daemon's run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resumed: bool,
}

/// The version of the format that these types describe.
pub const FORMAT: u64 = 1;

/// A line about the log itself. Room for the marks is reserved in every file, so that one can be written when no other line can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mark", rename_all = "kebab-case")]
pub enum Mark {
    /// The file is full and no other could be created: further lines are dropped and counted.
    Gap {
        /// The number of the first line that was dropped.
        n: u64,
    },
    /// The run continues in another file.
    More {
        /// The number of that file in the run, from 0.
        segment: u64,
    },
    /// The daemon has ended in order.
    End {
        /// One more than the number of its last line.
        n: u64,
        /// The number of lines that could not be written since the run's start.
        dropped: u64,
    },
}

/// The line of one event. The fields have short names because they are written with every line.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Line {
    /// Its number: one more than that of the line before.
    pub n: u64,
    /// Nanoseconds since the run's start.
    pub t: u64,
    /// The event.
    pub e: Event,
    /// The effects that the gate asked for, in order, as far as they are logged.
    #[serde(default)]
    pub x: Vec<LoggedEffect<'static>>,
}

/// An effect as it is logged. Receipts are omitted, because they follow from the events, and so are effects that concern neither a
/// device nor a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoggedEffect<'a> {
    /// [`Effect::Map`].
    Map {
        /// The number of the call.
        job: JobId,
        /// The domain.
        domain: DomainId,
        /// The whole range.
        iova: PageRange<Iova>,
        /// Bytes per kernel mapping.
        piece: u64,
        /// The file that is mapped.
        file: FileId,
        /// The offset in the file, in bytes, of the first page.
        offset: Offset,
        /// True if devices may write.
        writable: bool,
    },
    /// [`Effect::Unmap`].
    Unmap {
        /// The number of the call.
        job: JobId,
        /// The domain.
        domain: DomainId,
        /// The whole range.
        iova: PageRange<Iova>,
    },
    /// [`Effect::Replace`].
    Replace {
        /// The number of the call.
        job: JobId,
        /// The domain.
        domain: DomainId,
        /// The ranges that are removed.
        gone: Vec<PageRange<Iova>>,
    },
    /// [`Effect::Fence`].
    Fence {
        /// The number of the call.
        job: JobId,
        /// The device.
        device: DeviceId,
        /// The fence.
        step: Step,
    },
    /// [`Effect::Attach`].
    Attach {
        /// The number of the call.
        job: JobId,
        /// The device.
        device: DeviceId,
    },
    /// [`Effect::Convert`]: passgate converts the pages of a begin.
    Convert {
        /// The invalidation.
        invalidation: InvalidationId,
    },
    /// [`Effect::Arm`]: the first one after a begin has the number of its invalidation.
    Arm {
        /// The invalidation.
        invalidation: InvalidationId,
        /// The rung that is to be over by then.
        rung: Rung,
        /// Nanoseconds from now.
        after_ns: u64,
    },
    /// [`Answer::RegionAdded`].
    Added {
        /// The caller that is answered.
        to: Caller,
        /// The number of the region.
        region: RegionId,
        /// Bytes mapped.
        mapped: u64,
    },
    /// [`Answer::RegionRemoved`].
    Removed {
        /// The caller that is answered.
        to: Caller,
        /// The number of the region.
        region: RegionId,
    },
    /// [`Answer::Verdict`].
    Verdict {
        /// The caller that is answered.
        to: Caller,
        /// The invalidation.
        invalidation: InvalidationId,
        /// The verdict.
        verdict: Verdict,
    },
    /// [`Answer::Ended`].
    Ended {
        /// The caller that is answered.
        to: Caller,
        /// The invalidation.
        invalidation: InvalidationId,
    },
    /// [`Answer::Adopted`].
    Adopted {
        /// The caller that is answered.
        to: Caller,
        /// The regions.
        regions: Vec<RegionId>,
    },
    /// [`Answer::Released`].
    Released {
        /// The caller that is answered.
        to: Caller,
        /// Bytes that were in quarantine.
        bytes: u64,
    },
    /// [`Answer::Refused`].
    Wrong {
        /// The caller that is answered.
        to: Caller,
        /// The errno on the notification channel.
        errno: i32,
        /// The message.
        why: Cow<'a, str>,
    },
    /// [`Notice::Quarantined`].
    Quarantined {
        /// The invalidation that the quarantine dates from.
        invalidation: InvalidationId,
        /// The file.
        file: FileId,
        /// The pages of it.
        range: PageRange<Offset>,
        /// The reason.
        reason: Reason,
    },
    /// [`Notice::Freed`].
    Freed {
        /// The file.
        file: FileId,
        /// The pages of it.
        range: PageRange<Offset>,
    },
    /// [`Notice::Released`].
    #[serde(rename = "let-go")]
    OperatorReleased {
        /// The client that asked.
        client: ClientId,
        /// The file.
        file: FileId,
        /// The pages of it.
        range: PageRange<Offset>,
        /// The state that the pages have now.
        to: PageState,
    },
    /// [`Notice::RegionClosed`].
    Closed {
        /// The region.
        region: RegionId,
    },
    /// [`Notice::SessionClosed`].
    ClientClosed {
        /// The client.
        client: ClientId,
    },
}

impl LoggedEffect<'_> {
    /// Returns an effect as it is logged; none for one that is not.
    pub fn of(effect: &Effect) -> Option<Self> {
        Some(match effect {
            Effect::Map { job, domain, iova, piece, file, offset, writable } => Self::Map {
                job: *job,
                domain: *domain,
                iova: *iova,
                piece: *piece,
                file: *file,
                offset: *offset,
                writable: *writable,
            },
            Effect::Unmap { job, domain, iova, bytes: _ } => {
                Self::Unmap { job: *job, domain: *domain, iova: *iova }
            }
            Effect::Replace { job, domain, gone, bytes: _ } => {
                Self::Replace { job: *job, domain: *domain, gone: gone.clone() }
            }
            Effect::Fence { job, device, step } => Self::Fence { job: *job, device: *device, step: *step },
            Effect::Attach { job, device } => Self::Attach { job: *job, device: *device },
            Effect::Convert { invalidation, .. } => Self::Convert { invalidation: *invalidation },
            Effect::Arm { invalidation, rung, after_ns } => {
                Self::Arm { invalidation: *invalidation, rung: *rung, after_ns: *after_ns }
            }
            Effect::Answer { caller, answer } => Self::answer(*caller, answer),
            Effect::Notice(notice) => return Self::notice(notice),
            Effect::Receipt(_) | Effect::ForgetFile { .. } => return None,
        })
    }

    fn answer(to: Caller, answer: &Answer) -> Self {
        match answer {
            Answer::RegionAdded { region, mapped } => Self::Added { to, region: *region, mapped: *mapped },
            Answer::RegionRemoved { region } => Self::Removed { to, region: *region },
            Answer::Verdict { invalidation, verdict } => {
                Self::Verdict { to, invalidation: *invalidation, verdict: *verdict }
            }
            Answer::Ended { invalidation } => Self::Ended { to, invalidation: *invalidation },
            Answer::Released { bytes } => Self::Released { to, bytes: *bytes },
            Answer::Adopted { regions, unended: _ } => {
                Self::Adopted { to, regions: regions.iter().map(|status| status.region).collect() }
            }
            Answer::Refused(refusal) => {
                Self::Wrong { to, errno: refusal.errno(), why: refusal.to_string().into() }
            }
        }
    }

    fn notice(notice: &Notice) -> Option<Self> {
        Some(match notice {
            Notice::Quarantined { invalidation, file, range, gpa: _, reason } => {
                Self::Quarantined { invalidation: *invalidation, file: *file, range: *range, reason: *reason }
            }
            Notice::Freed { file, range, gpa: _ } => Self::Freed { file: *file, range: *range },
            Notice::Released { client, invalidation: _, file, range, gpa: _, to } => {
                Self::OperatorReleased { client: *client, file: *file, range: *range, to: *to }
            }
            Notice::RegionClosed { region } => Self::Closed { region: *region },
            Notice::SessionClosed { client } => Self::ClientClosed { client: *client },
            // These follow from the answers and from the events of the same line.
            Notice::Refused { .. }
            | Notice::DeviceFenced { .. }
            | Notice::TdiEnded { .. }
            | Notice::DeviceAttached { .. }
            | Notice::DeviceWanted { .. }
            | Notice::Inconsistent { .. }
            | Notice::MapFailed { .. } => return None,
        })
    }

    /// Returns the caller that it answers; none if it is no answer.
    pub fn answers(&self) -> Option<Caller> {
        match self {
            Self::Added { to, .. }
            | Self::Removed { to, .. }
            | Self::Verdict { to, .. }
            | Self::Ended { to, .. }
            | Self::Released { to, .. }
            | Self::Adopted { to, .. }
            | Self::Wrong { to, .. } => Some(*to),
            _ => None,
        }
    }
}
