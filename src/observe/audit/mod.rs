//! The audit log: every event of the gate, and the effects that the gate asked for. docs/guide/audit.md.
//!
//! The gate is pure, so its events are the whole evidence: every receipt, verdict and quarantine follows from them, and can be
//! checked by running them through a gate again ([`super::replay`]). A line is in the page cache before any effect of its event is
//! executed, so an answer is sent only after the line that has it would outlive this process.
//!
//! The log never stops the daemon. Lines that cannot be written are counted, and the numbers of the lines show the gap. If no line
//! follows the gap, a mark shows it ([`Mark`]), for which room is reserved in each file.

pub mod files;
pub mod line;
mod log;
mod next_segment;
pub mod reader;

pub use line::{Head, Line, LoggedEffect, Mark};
pub use log::{Log, LogOptions, NEW_FILE_TIMEOUT};
pub use reader::{ReadError, Reader, Run};
