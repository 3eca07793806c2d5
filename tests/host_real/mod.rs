//! The tests themselves.

pub(crate) mod disks;
pub(crate) mod namespaces;
