//! Drivers for virtio devices on PCI (virtio 1.3, OASIS), for tests of a domain: a NIC and a GPU.
//!
//! The drivers access registers through VFIO regions, and have their virtqueues in driver memory; descriptors refer to
//! any address in the domain, including guest memory. docs/decisions/0007 states why the crate `virtio-drivers` is not
//! used. Tested with QEMU's devices, not yet with a real DPU.

pub mod gpu;
pub mod net;
mod queue;
mod transport;
