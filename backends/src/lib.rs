//! The part of passgate that accesses devices and IOMMUs, behind two traits.
//!
//! A [`Domain`] is an I/O address space (IOAS, VFIO container, io_uring buffer table): it maps and unmaps, and reports
//! the exact result of each unmap. A [`Device`] does DMA and has fences that stop it; its [`Steps`] lists them.
//! Backends take no decisions and never call the gate: they execute one call and report its complete result.

#![forbid(unsafe_code)]

pub mod assign;
pub mod device;
pub mod drivers;
pub mod error;
pub mod handover;
pub mod iommu;
pub mod resume;
pub mod window;

pub use assign::{Accept, Assignment, Kind, assign};
pub use device::{Device, DeviceTraits, Step, Steps, nvme};
pub use drivers::{Drivers, NoDrivers};
pub use error::{Error, Result};
pub use iommu::iommufd::Tables;
pub use iommu::{Domain, DomainCaps, Ticket, Unmap};
pub use window::{Entered, Segment, Window, Windowed};
