//! Errors of a store: it is full, or its memory does not contain one.

use super::store::VERSION;

/// There is no room left, for nodes or for roots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the ledger's memory of {bytes} bytes is full: start passgate with a larger one, or with less guest memory"
)]
pub struct Full {
    /// The size of its memory.
    pub bytes: u64,
}

/// The reason for which memory cannot be opened as a store. None of it is used then, and its contents are unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is no store header.
    #[error(
        "the memory passed is no ledger: pass the descriptor that passgate gave out, or none to start afresh"
    )]
    Foreign,
    /// It was written with another layout.
    #[error(
        "the ledger is of layout {found}, this passgate reads {VERSION}: restart with the one that wrote it, or afresh"
    )]
    Version {
        /// The version in the header.
        found: u64,
    },
    /// Its length is not what its header says.
    #[error("the ledger says that it has {says} bytes, its memory has {has}: start afresh")]
    Length {
        /// The length in the header, in bytes.
        says: u64,
        /// The length of the memory, in bytes.
        has: u64,
    },
    /// A root, or an entry that it leads to, is invalid.
    #[error("the ledger's root {slot} leads to {found:#x}, which cannot be: it is damaged; start afresh")]
    Damaged {
        /// The slot of the directory.
        slot: usize,
        /// The invalid word or entry.
        found: u64,
    },
}
