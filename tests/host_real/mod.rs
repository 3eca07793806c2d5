//! The tests themselves.

pub(crate) mod namespaces;
