//! Names of everything that the gate distinguishes.

use serde::{Deserialize, Serialize};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident($raw:ty);)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $raw);
    )*};
}

ids! {
    /// A client's connection: it may end what it began, and owns the memory that it added.
    ClientId(u32);
    /// A guest memory region.
    RegionId(u32);
    /// An IOVA domain.
    DomainId(u16);
    /// A device.
    DeviceId(u16);
    /// One invalidation, from begin to end. Never used twice, never 0.
    InvalidationId(u64);
    /// One effect whose result the gate waits for. Never used twice.
    JobId(u64);
}

/// The identity of a file (`st_dev`, `st_ino`): two descriptors of one file have one identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// The owner of regions that an earlier daemon's clients had. No connection has this number.
pub const ORPHANS: ClientId = ClientId(0);

/// The owner of regions that were being closed when an earlier daemon ended.
pub(super) const CLOSED_BEFORE: ClientId = ClientId(u32::MAX);
