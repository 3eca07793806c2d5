//! `Adopt`: memory that outlived its daemon.

use serde::{Deserialize, Serialize};

/// `Adopt`: the memory that an earlier daemon's clients had is this connection's from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Adopt {}

/// The reply to `Adopt`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Adopted {
    /// The regions that are its own now.
    pub regions: Vec<AdoptedRegion>,
    /// Conversions that were open when the earlier daemon ended; their pages are in quarantine. Only the connection
    /// that adopted them may `Release` them although it speaks for a VM.
    pub unended: Vec<Unended>,
    /// How many more there are than are listed.
    pub more_unended: u64,
}

/// A region, in the reply to `Adopt`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct AdoptedRegion {
    /// Its name.
    pub region: u32,
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// Which file it is of: `st_dev`,
    pub device: u64,
    /// and `st_ino`.
    pub inode: u64,
    /// Where in its file it starts, in bytes.
    pub offset: u64,
    /// Bytes per kernel mapping.
    pub piece: u64,
    /// Whether devices may write to it.
    pub writable: bool,
    /// Bytes by state: shared, private, hole, unknown.
    pub shared: u64,
    /// See `shared`.
    pub private: u64,
    /// See `shared`.
    pub hole: u64,
    /// See `shared`.
    pub unknown: u64,
}

/// A conversion without an end, in the reply to `Adopt`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub struct Unended {
    /// Its number.
    pub invalidation: u64,
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
}
