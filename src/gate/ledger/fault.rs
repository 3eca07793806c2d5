//! What can be wrong with a store: it is full, or what lies in its memory is not one.

use super::store::VERSION;

/// There is no room left, for nodes or for roots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the ledger's memory of {bytes} bytes is full: start passgate with a larger one, or with less guest memory"
)]
pub struct Full {
    /// How large it is.
    pub bytes: u64,
}

/// Why memory cannot be opened as a store. None of it is used then; what it held is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Something else, or nothing, lies there.
    #[error(
        "the memory passed is no ledger: pass the descriptor that passgate gave out, or none to start afresh"
    )]
    Foreign,
    /// Of another passgate.
    #[error(
        "the ledger is of layout {found}, this passgate reads {VERSION}: restart with the one that wrote it, or afresh"
    )]
    Version {
        /// What it says.
        found: u64,
    },
    /// Its length is not what its header says.
    #[error("the ledger says that it has {says} bytes, its memory has {has}: start afresh")]
    Length {
        /// What the header says.
        says: u64,
        /// What there is.
        has: u64,
    },
    /// A root, or what it leads to, cannot be.
    #[error("the ledger's root {slot} leads to {found:#x}, which cannot be: it is damaged; start afresh")]
    Damaged {
        /// Which slot of the directory.
        slot: usize,
        /// The word, or the entry, that is wrong.
        found: u64,
    },
}
