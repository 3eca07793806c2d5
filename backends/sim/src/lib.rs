//! Simulators for fault injection in tests. No program that is shipped depends on this package.
//!
//! [`iommu::Sim`] is a simulated IOVA domain with simulated devices ([`iommu::SimDevice`]); [`nvme::Simulated`] is a
//! simulated NVMe controller at register level, which does DMA through such a domain. Both do exactly the faults that a
//! test injects, and nothing at random. They use the public interface of passgate-backends only, and the controller is
//! written from the specification, not from the driver: an error in one is found by the other.

#![forbid(unsafe_code)]

pub mod iommu;
pub mod nvme;
