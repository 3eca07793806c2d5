//! Everything of passgate that touches a device or an IOMMU, behind two traits.
//!
//! A [`Domain`] is what a device's DMA sees (IOAS, container, ring table): it maps and unmaps, and says honestly
//! how an unmap went. A [`Device`] does DMA and can, more or less surely, be stopped. Backends never decide
//! anything and never see the gate: they execute one call and report it whole.

#![forbid(unsafe_code)]

pub mod assign;
pub mod device;
pub mod error;
pub mod iommu;
pub mod resume;
pub mod window;

pub use assign::{Accept, Assignment, Kind, assign};
pub use device::{Device, FenceStep, Nature, StopClass, nvme};
pub use error::{Error, Result};
pub use iommu::iommufd::Tables;
pub use iommu::{Capabilities, Domain, Ticket, Unmap};
pub use window::{Entered, Segment, Window, Windowed};
