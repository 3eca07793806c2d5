//! What is told to whoever watches: notices, receipts and status, in words and JSON.

pub mod audit;
pub mod events;
pub mod keep;
pub mod records;
pub mod replay;
pub mod status;
