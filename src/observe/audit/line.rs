//! What a line says: the head of a segment, or one event and what the gate wanted done about it.

use std::borrow::Cow;

use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PageRange};
use serde::{Deserialize, Serialize};

use crate::gate::{
    Answer, Caller, ClientId, DeviceId, DomainId, Effect, Event, FileId, InvalidationId, JobId, Notice,
    PageState, Policy, Reason, RegionId, Step, Verdict,
};

/// The first line of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The version of passgate that wrote it.
    pub passgate: String,
    /// The version of the format. Files of version 0 have none, and no [`Mark`]s: whether their end is there cannot be told.
    #[serde(default)]
    pub format: u64,
    /// Names the run of the daemon: when it started, in nanoseconds since 1970.
    pub run: u64,
    /// The kernel's boot: files have other identities after another.
    pub boot: String,
    /// Which segment of the run this is, from 0.
    pub segment: u64,
    /// The number of the first line after this one.
    pub first: u64,
    /// When the segment was begun, in nanoseconds since 1970.
    pub wall: u64,
    /// The policy of the run's gate.
    pub policy: Policy,
    /// The interface to the IOMMU: `iommufd`, `type1`, `soft`.
    pub iommu: String,
    /// The devices' names, in the order of their numbers.
    pub devices: Vec<String>,
    /// Whether it goes on from what an earlier daemon had (`serve --restart hold`): then its beginning is in that
    /// daemon's run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resumed: bool,
}

/// The version of the format that these types describe.
pub const FORMAT: u64 = 1;

/// A line about the log itself. Every file keeps room for its marks, so that one can be written where no line can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mark", rename_all = "kebab-case")]
pub enum Mark {
    /// The file is full and no other could be made: what comes is dropped and counted.
    Gap {
        /// The number of the first line that was dropped.
        n: u64,
    },
    /// The run goes on in another file.
    More {
        /// Which file of the run, from 0.
        segment: u64,
    },
    /// The daemon has ended in order.
    End {
        /// One more than the number of its last line.
        n: u64,
        /// Lines that could not be written since the run's start.
        dropped: u64,
    },
}

/// Every other line.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Line {
    /// Its number: one more than the last line's.
    pub n: u64,
    /// Nanoseconds since the run's start.
    pub t: u64,
    /// What happened.
    pub e: Event,
    /// What the gate wanted done about it, in order, as far as it is logged.
    #[serde(default)]
    pub x: Vec<Said<'static>>,
}

/// An effect as the log has it. Receipts are left out, because they follow from the events, and so is what concerns
/// neither devices nor anybody outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Said<'a> {
    /// [`Effect::Map`].
    Map {
        /// Names the result.
        job: JobId,
        /// Where.
        domain: DomainId,
        /// The whole range.
        iova: PageRange<Iova>,
        /// Bytes per kernel mapping.
        piece: u64,
        /// Of this file.
        file: FileId,
        /// From here on.
        offset: Offset,
        /// Whether devices may write.
        writable: bool,
    },
    /// [`Effect::Unmap`].
    Unmap {
        /// Names the result.
        job: JobId,
        /// Where.
        domain: DomainId,
        /// The whole range.
        iova: PageRange<Iova>,
    },
    /// [`Effect::Replace`].
    Replace {
        /// Names the result.
        job: JobId,
        /// Where.
        domain: DomainId,
        /// What goes.
        gone: Vec<PageRange<Iova>>,
    },
    /// [`Effect::Fence`].
    Fence {
        /// Names the result.
        job: JobId,
        /// The device.
        device: DeviceId,
        /// Which fence.
        step: Step,
    },
    /// [`Effect::Attach`].
    Attach {
        /// Names the result.
        job: JobId,
        /// The device.
        device: DeviceId,
    },
    /// [`Effect::Convert`]: passgate changes the pages of a begin.
    Convert {
        /// Which begin.
        invalidation: InvalidationId,
    },
    /// [`Effect::Arm`]: the first one names the invalidation of a begin.
    Arm {
        /// Which.
        invalidation: InvalidationId,
        /// Which rung is to be over by then.
        rung: Step,
        /// Nanoseconds from now.
        after_ns: u64,
    },
    /// [`Answer::RegionAdded`].
    Added {
        /// Whom.
        to: Caller,
        /// Its name.
        region: RegionId,
        /// Bytes mapped.
        mapped: u64,
    },
    /// [`Answer::RegionRemoved`].
    Removed {
        /// Whom.
        to: Caller,
        /// Its name.
        region: RegionId,
    },
    /// [`Answer::Verdict`].
    Verdict {
        /// Whom.
        to: Caller,
        /// On what.
        invalidation: InvalidationId,
        /// The word.
        verdict: Verdict,
    },
    /// [`Answer::Ended`].
    Ended {
        /// Whom.
        to: Caller,
        /// What.
        invalidation: InvalidationId,
    },
    /// [`Answer::Adopted`].
    Adopted {
        /// Whom.
        to: Caller,
        /// Which.
        regions: Vec<RegionId>,
    },
    /// [`Answer::Released`].
    Released {
        /// Whom.
        to: Caller,
        /// Bytes that were in quarantine.
        bytes: u64,
    },
    /// [`Answer::Refused`].
    Wrong {
        /// Whom.
        to: Caller,
        /// As the channel says it.
        errno: i32,
        /// In words.
        why: Cow<'a, str>,
    },
    /// [`Notice::Quarantined`].
    Quarantined {
        /// Since which invalidation.
        invalidation: InvalidationId,
        /// Pages of this file.
        file: FileId,
        /// Which.
        range: PageRange<Offset>,
        /// Why.
        reason: Reason,
    },
    /// [`Notice::Freed`].
    Freed {
        /// Pages of this file.
        file: FileId,
        /// Which.
        range: PageRange<Offset>,
    },
    /// [`Notice::Released`].
    LetGo {
        /// Who asked.
        client: ClientId,
        /// Pages of this file.
        file: FileId,
        /// Which.
        range: PageRange<Offset>,
        /// What they are.
        to: PageState,
    },
    /// [`Notice::RegionClosed`].
    Closed {
        /// Which.
        region: RegionId,
    },
    /// [`Notice::SessionClosed`].
    ClientClosed {
        /// Whose.
        client: ClientId,
    },
}

impl Said<'_> {
    /// What the log has of an effect, where it has anything.
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
                Self::LetGo { client: *client, file: *file, range: *range, to: *to }
            }
            Notice::RegionClosed { region } => Self::Closed { region: *region },
            Notice::SessionClosed { client } => Self::ClientClosed { client: *client },
            // They follow from the answers and from the events of the same line.
            Notice::Refused { .. }
            | Notice::DeviceFenced { .. }
            | Notice::TdiEnded { .. }
            | Notice::DeviceAttached { .. }
            | Notice::DeviceWanted { .. }
            | Notice::MapFailed { .. } => return None,
        })
    }

    /// Whom it answers, where it is an answer.
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
