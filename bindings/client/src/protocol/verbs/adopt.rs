//! `Adopt`: a client takes over memory that a restart of the daemon has preserved.

use serde::{Deserialize, Serialize};

/// The parameters of `Adopt`: the memory of the earlier daemon's clients becomes that of the calling connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Adopt {}

/// The reply to `Adopt`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Adopted {
    /// The regions, which the connection owns now.
    pub regions: Vec<AdoptedRegion>,
    /// The conversions that were open when the earlier daemon ended; their pages are in quarantine. The adopting connection
    /// may `Release` them, although it is that of a VM.
    pub unended: Vec<Unended>,
    /// The number of such conversions that `unended` does not list.
    pub more_unended: u64,
}

/// A region, in the reply to `Adopt`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct AdoptedRegion {
    /// The id of the region.
    pub region: u32,
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// `st_dev` of its file.
    pub device: u64,
    /// `st_ino` of its file.
    pub inode: u64,
    /// Its offset in its file, in bytes.
    pub offset: u64,
    /// The size of a kernel mapping in bytes.
    pub piece: u64,
    /// True where devices may write to it.
    pub writable: bool,
    /// The number of bytes that are shared.
    pub shared: u64,
    /// The number of bytes that are private.
    pub private: u64,
    /// The number of bytes in holes.
    pub hole: u64,
    /// The number of bytes whose state is unknown.
    pub unknown: u64,
}

/// A conversion that was begun and not ended, in the reply to `Adopt`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub struct Unended {
    /// The id of its invalidation.
    pub invalidation: u64,
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
}
