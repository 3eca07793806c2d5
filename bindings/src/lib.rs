//! The kernel interfaces that passgate needs and the published crates lack or swallow.
//!
//! This is the only crate of passgate with `unsafe` in it; each block names the invariant it rests on and who
//! keeps it. Structures come from `iommufd-bindings`, `vfio-bindings` and `kvm-bindings`; here are the calls.
//! Every call answers with a `Result` that keeps the errno *and* what the kernel wrote back before it failed
//! ([`Failed`]): half a success is the one thing that a gate may never lose.

pub mod errno;
pub mod guest_memfd;
pub mod handed;
pub mod identity;
pub mod iommufd;
pub mod kvm;
pub mod memory;
pub mod segment;
pub mod units;
pub mod uring;
pub mod vfio;
mod windows;
pub mod words;

pub use errno::Failed;
pub use units::{Gpa, Iova, PAGE, PageRange, RangeError};
