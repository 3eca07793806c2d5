//! passgate controls the DMA of passthrough devices into guest memory.
//!
//! Memory is mapped for devices revocably, never pinned for the lifetime of a device. When its owner announces that a range
//! is about to be converted, punched or moved, passgate unmaps the range from every IOMMU domain, proves that DMA has
//! stopped, and answers *done*, *refused* or *unknown*.

#![forbid(unsafe_code)]

pub mod cli;
pub mod demo;
pub mod error;
pub mod gate;
pub mod host;
pub mod observe;
pub mod protocol;
mod regular_file;
#[cfg(feature = "selftest")]
pub mod selftest;
pub mod serve;
pub mod session;

pub use error::{Error, Result};
#[doc(inline)]
pub use passgate_client as client;
