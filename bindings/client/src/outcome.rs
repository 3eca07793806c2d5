//! The outcome of a conversion, as its owner reports it.

use serde::{Deserialize, Serialize};

/// The end of a conversion on its owner's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The whole range is now what was asked for.
    Committed,
    /// Nothing of the range changed.
    NotCommitted,
    /// Neither is certain: the range is quarantined. `errno` and `offset` are the owner's evidence and go into the
    /// receipt.
    Unknown {
        /// The errno of the owner's kernel call; 0 where there was none.
        errno: i32,
        /// The number of bytes of the range that it reached.
        offset: u64,
    },
}

impl Outcome {
    /// Returns its kind.
    pub fn kind(self) -> OutcomeKind {
        match self {
            Self::Committed => OutcomeKind::Committed,
            Self::NotCommitted => OutcomeKind::NotCommitted,
            Self::Unknown { .. } => OutcomeKind::Unknown,
        }
    }
}

/// The kind of an [`Outcome`]. The numbers are those of the notification channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum OutcomeKind {
    /// The whole range was converted.
    Committed = 0,
    /// Nothing of it was.
    NotCommitted = 1,
    /// The owner does not know.
    Unknown = 2,
}

impl OutcomeKind {
    /// Returns the kind with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Committed, Self::NotCommitted, Self::Unknown].into_iter().find(|kind| *kind as u32 == number)
    }
}
