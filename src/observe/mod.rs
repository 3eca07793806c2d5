//! Observation: notices, receipts, status and metrics as text and JSON; the audit log and its replay; the quarantine on disk.

pub mod audit;
pub mod disk;
pub mod events;
pub mod metrics;
pub mod quarantine_file;
pub mod records;
mod regular_file;
pub mod replay;
pub mod status;

// The old name of the module, for as long as other areas use it.
pub use quarantine_file as keep;
