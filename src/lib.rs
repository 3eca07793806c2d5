//! passgate stands between passthrough devices and guest memory.
//!
//! A device's DMA into guest memory is never a long-term pin here: it is a mapping that can be taken back. When
//! the owner of the memory announces that a range is about to be converted, punched or moved, passgate takes the
//! range out of every IOMMU domain, proves that DMA has stopped, and answers done, refused or unknown.

#![forbid(unsafe_code)]

pub mod cli;
pub mod client;
pub mod demo;
pub mod error;
pub mod gate;
pub mod host;
pub mod observe;
pub mod protocol;
pub mod selftest;
pub mod serve;
pub mod session;

pub use error::{Error, Result};
