//! The audit log: every event that the gate was told, and what it had done about it. docs/guide/audit.md.
//!
//! The gate is pure, so its events are the whole evidence: a receipt, a verdict, a quarantine follow from them, and
//! whoever doubts one runs them through a gate again ([`super::replay`]). A line is in the page cache before any effect
//! of its event is executed, so no answer leaves this process before the line that holds it is out of its hands.
//!
//! The log never stops the daemon. What cannot be written is counted, and the numbers of the lines show the gap; where
//! none comes after it, a mark does ([`Mark`]), for which each file keeps room.

pub mod files;
pub mod line;
mod log;
pub mod reader;
mod spare;

pub use line::{Head, Line, Mark, Said};
pub use log::{Log, LogOptions, PATIENCE};
pub use reader::{ReadError, Reader, Run};
