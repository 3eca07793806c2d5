//! What is told to whoever watches: notices, receipts, status and metrics, in words, numbers and JSON.

pub mod audit;
pub mod disk;
pub mod events;
pub mod keep;
pub mod metrics;
mod private;
pub mod records;
pub mod replay;
pub mod status;
