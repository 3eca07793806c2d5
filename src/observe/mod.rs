//! What is told to whoever watches: notices, receipts, status and metrics, in words, numbers and JSON.

pub mod events;
pub mod metrics;
pub mod status;
