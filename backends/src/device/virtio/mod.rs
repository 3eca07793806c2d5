//! Virtio devices (virtio 1.3, OASIS) on PCI, to try a domain with: a NIC and a GPU that clouds and DPUs offer.
//!
//! Everything goes by registers in VFIO regions and by queues in the driver's own memory; descriptors name any
//! address in the domain, guest memory among them. Why that is our own and not the crate `virtio-drivers`:
//! docs/decisions/0007. Tried on QEMU's devices; on a real DPU nobody has yet.

pub mod gpu;
pub mod net;
mod queue;
mod transport;
