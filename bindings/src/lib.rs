//! The kernel interfaces that passgate needs and that the published crates lack or implement with loss of information.
//!
//! This is the only crate of passgate that contains `unsafe`; each block states its invariant and what ensures it.
//! Structures come from `iommufd-bindings`, `vfio-bindings` and `kvm-bindings`; this crate makes the calls. Every call
//! returns the errno *and* the output that the kernel wrote before it failed ([`Failed`]), because the gate must know
//! about a partial success.

mod address_mappings;
pub mod errno;
pub mod guest_memfd;
pub mod identity;
pub mod inherited_fds;
pub mod iommufd;
pub mod kvm;
pub mod memory;
pub mod segment;
pub mod uring;
pub mod vfio;
pub mod words;

pub use errno::Failed;
pub use passgate_client::units;
pub use passgate_client::{Gpa, Iova, PAGE, PageRange, RangeError};
