//! What is told to whoever watches: notices, receipts and status, in words and JSON.

pub mod events;
pub mod status;
