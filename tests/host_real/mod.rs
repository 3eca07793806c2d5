//! The tests themselves.

pub(crate) mod disks;
pub(crate) mod giving_back;
pub(crate) mod interfaces;
pub(crate) mod namespaces;
