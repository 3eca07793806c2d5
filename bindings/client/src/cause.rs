//! The causes of a failed invalidation.

use serde::{Deserialize, Serialize};

/// The kinds of failure of an invalidation. The numbers are those of the notification channel (docs/protocol.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u32)]
pub enum Cause {
    /// A mapping could not be removed, or not at its full length.
    UnmapFailed = 1,
    /// Operations issued before the unmap had not ended in time.
    DmaInFlight = 2,
    /// A back-end call did not return in time.
    CallHangs = 3,
    /// A mapping being made over the range did not finish in time.
    MapInFlight = 4,
    /// The owner could not say whether the conversion took place.
    OwnerUnknown = 5,
    /// The client went away between begin and end.
    ClientGone = 6,
    /// A mapping could neither be finished nor taken back.
    HalfMapped = 7,
    /// passgate's own conversion failed and changed nothing.
    ConvertFailed = 8,
    /// A device that caches translations could not be detached, and on this platform nothing less is proof.
    AtsNotFenced = 9,
    /// The gate's own records contradict each other: a fault of passgate's. An operator has to say what the pages are.
    Inconsistent = 10,
}

impl Cause {
    /// All causes, in the order of their numbers.
    pub const ALL: [Cause; 10] = [
        Self::UnmapFailed,
        Self::DmaInFlight,
        Self::CallHangs,
        Self::MapInFlight,
        Self::OwnerUnknown,
        Self::ClientGone,
        Self::HalfMapped,
        Self::ConvertFailed,
        Self::AtsNotFenced,
        Self::Inconsistent,
    ];

    /// Returns its name in messages and in JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Self::UnmapFailed => "unmap-failed",
            Self::DmaInFlight => "dma-in-flight",
            Self::CallHangs => "call-hangs",
            Self::MapInFlight => "map-in-flight",
            Self::OwnerUnknown => "owner-unknown",
            Self::ClientGone => "client-gone",
            Self::HalfMapped => "half-mapped",
            Self::ConvertFailed => "convert-failed",
            Self::AtsNotFenced => "ats-not-fenced",
            Self::Inconsistent => "inconsistent",
        }
    }

    /// Returns the cause with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|cause| *cause as u32 == number)
    }
}
