//! Verdicts: done, refused, unknown, and the reason.

use passgate_bindings::{Gpa, PageRange};
use serde::{Deserialize, Serialize};

use super::ids::{DeviceId, InvalidationId, RegionId};
use super::rung::Rung;

pub use passgate_client::{Cause, VerdictKind};

/// The answer to a begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// No device can see the range any more: convert it.
    Done,
    /// The range is as it was before, or worse: do not convert. What failed is in quarantine.
    Refused {
        /// The first range that failed.
        range: PageRange<Gpa>,
        /// The reason.
        reason: Reason,
    },
    /// It was not known in time that no device sees the range: do not convert. It is in quarantine.
    Unknown {
        /// The first range that is unknown.
        range: PageRange<Gpa>,
        /// The reason.
        reason: Reason,
    },
}

impl Verdict {
    /// Returns its kind.
    pub fn kind(self) -> VerdictKind {
        match self {
            Self::Done => VerdictKind::Done,
            Self::Refused { .. } => VerdictKind::Refused,
            Self::Unknown { .. } => VerdictKind::Unknown,
        }
    }
}

/// The reason for which a range could not be converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// The kind of failure.
    pub cause: Cause,
    /// The device (the first of its domain) that could not be stopped, where one is to blame.
    pub device: Option<DeviceId>,
    /// The last rung that was tried.
    pub rung: Rung,
    /// The kernel's errno; 0 where there was none.
    pub errno: i32,
}

impl Reason {
    /// A reason for which no device is to blame, and no fence was tried.
    pub(super) fn of(cause: Cause, errno: i32) -> Self {
        Self { cause, device: None, rung: Rung::Unmap, errno }
    }
}

/// The reason for which a request was refused with nothing changed. The text is the message that the user reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No region there.
    #[error("no region covers guest-physical address {gpa}: add it with AddMemory first")]
    NoMemory {
        /// The first address without one.
        gpa: Gpa,
    },
    /// The new region would share guest-physical addresses with another.
    #[error("the region overlaps region {} at {gpa}: remove that one first", region.0)]
    Overlaps {
        /// The other region.
        region: RegionId,
        /// The first shared address.
        gpa: Gpa,
    },
    /// Another invalidation holds the range.
    #[error("invalidation {} already excludes {gpa}: end it first", invalidation.0)]
    Busy {
        /// The other invalidation.
        invalidation: InvalidationId,
        /// The first shared address.
        gpa: Gpa,
    },
    /// The range is in quarantine.
    #[error("{gpa} is in quarantine ({}): `passgate status` says since which invalidation, `passgate explain` why", cause.word())]
    Quarantined {
        /// The first quarantined address.
        gpa: Gpa,
        /// The cause of the quarantine.
        cause: Cause,
    },
    /// Nothing is in quarantine since that invalidation.
    #[error("nothing is in quarantine since invalidation {}: `passgate status` lists what is", invalidation.0)]
    NotQuarantined {
        /// The invalidation.
        invalidation: InvalidationId,
    },
    /// The call that was to convert them has not returned, and may yet take the pages away.
    #[error(
        "passgate's own conversion for invalidation {} has not returned: release its range once it has, or start a \
         new daemon",
        invalidation.0
    )]
    StillConverting {
        /// The invalidation.
        invalidation: InvalidationId,
    },
    /// A mapping over them was never proved gone.
    #[error(
        "a device may still reach {gpa}, which invalidation {} left in quarantine: release it as shared, and convert it \
         then: the begin unmaps it first",
        invalidation.0
    )]
    StillMapped {
        /// The invalidation.
        invalidation: InvalidationId,
        /// The first such address.
        gpa: Gpa,
    },
    /// No such region, or not this client's.
    #[error("region {} is not one that this connection added", region.0)]
    NotOwner {
        /// The region.
        region: RegionId,
    },
    /// The region is this client's, and an earlier request for it is not answered yet.
    #[error("region {} is being added or removed: wait for the answer to that request", region.0)]
    RegionBusy {
        /// The region.
        region: RegionId,
    },
    /// No such invalidation, or not this client's, or not open.
    #[error("invalidation {} is not one that this connection began and has not ended", invalidation.0)]
    NotBegun {
        /// The invalidation.
        invalidation: InvalidationId,
    },
    /// The kernel did not make the mapping.
    #[error("the region could not be mapped (errno {errno}); nothing of it is left")]
    MapFailed {
        /// The kernel's answer.
        errno: i32,
    },
    /// The mapping was not made whole and not taken back whole.
    #[error(
        "the region could not be mapped (errno {errno}), and part of it could not be taken back: it is in quarantine"
    )]
    HalfMapped {
        /// The kernel's answer to the map.
        errno: i32,
    },
    /// More of something than this session allows.
    #[error("this would need {needed} {what}, the limit is {limit}{}", remedy(what))]
    Budget {
        /// The name of the resource.
        what: &'static str,
        /// The number that would be needed.
        needed: u64,
        /// The maximum.
        limit: u64,
    },
    /// The region's mapping size is no power of two or less than a page.
    #[error("the mapping size {piece} is not a power of two of at least one page")]
    BadPiece {
        /// As given.
        piece: u64,
    },
    /// Its neighbours would lose DMA whenever a page leaves a mapping of that size.
    #[error(
        "a page leaves a mapping of {piece} bytes only with a gap in which DMA beside it faults, which --hitless \
         forbids here: leave `piece` out, or serve with --hitless off"
    )]
    Gap {
        /// Bytes per kernel mapping.
        piece: u64,
    },
    /// No memory is without an owner.
    #[error(
        "there is no memory to adopt: none outlived an earlier daemon, or another connection has it, or time is up"
    )]
    NoOrphans,
    /// The client is going away.
    #[error("this connection is being closed")]
    Closing,
}

/// Refuses what would need more than the limit of something.
pub(super) fn within_budget(what: &'static str, needed: u64, limit: u64) -> Result<(), Refusal> {
    if needed <= limit { Ok(()) } else { Err(Refusal::Budget { what, needed, limit }) }
}

fn remedy(what: &str) -> &'static str {
    match what {
        "mappings" => {
            ": use larger mappings (leave `piece` out; --hitless off), convert larger ranges, or raise \
             vfio_iommu_type1.dma_entry_limit"
        }
        "excluded ranges" => ": end conversions that are open, or release what is in quarantine",
        _ => "",
    }
}

impl Refusal {
    /// Returns the errno that stands for it on the notification channel (docs/protocol.md).
    pub fn errno(self) -> i32 {
        // Linux errno values, as include/uapi/asm-generic/errno-base.h numbers them.
        match self {
            Self::NoMemory { .. } => 14, // EFAULT
            Self::Overlaps { .. } => 17, // EEXIST
            Self::Busy { .. }
            | Self::RegionBusy { .. }
            | Self::StillConverting { .. }
            | Self::StillMapped { .. } => 16, // EBUSY
            Self::Quarantined { .. } => 5, // EIO
            Self::NotOwner { .. } | Self::NotBegun { .. } | Self::NotQuarantined { .. } | Self::NoOrphans => {
                2
            } // ENOENT
            Self::MapFailed { errno } | Self::HalfMapped { errno } => errno,
            Self::Budget { .. } => 28,   // ENOSPC
            Self::BadPiece { .. } => 22, // EINVAL
            Self::Gap { .. } => 95,      // EOPNOTSUPP
            Self::Closing => 108,        // ESHUTDOWN
        }
    }

    /// Returns the address that it is about, where there is one.
    pub fn gpa(self) -> Option<Gpa> {
        match self {
            Self::NoMemory { gpa }
            | Self::Overlaps { gpa, .. }
            | Self::Busy { gpa, .. }
            | Self::Quarantined { gpa, .. }
            | Self::StillMapped { gpa, .. } => Some(gpa),
            _ => None,
        }
    }
}
