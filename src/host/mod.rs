//! The PCI devices of the host: their inventory, the processes that have them open, their acquisition and their drivers. Reads sysfs and
//! procfs, whose mount points are parameters for the tests.

pub mod acquire;
mod class;
mod config;
pub mod drivers;
pub mod holder;
pub mod inventory;
pub mod visibility;
