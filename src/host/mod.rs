//! The host: which PCI devices there are, who has them, and how one gets them. Reads sysfs and procfs; a sysfs or
//! procfs elsewhere is taken as a path, for tests.

mod class;
mod config;
pub mod holder;
pub mod inventory;
pub mod sight;
pub mod taking;
