//! The tests of `host.rs`, by subject.

pub(crate) mod disks;
pub(crate) mod give_back;
pub(crate) mod interfaces;
pub(crate) mod namespaces;
