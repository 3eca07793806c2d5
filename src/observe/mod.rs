//! Observation: notices, receipts and metrics as text and JSON; the audit log and its replay. Nothing here knows a session.

pub mod audit;
pub mod disk;
pub mod events;
pub mod metrics;
pub mod replay;
