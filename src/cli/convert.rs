//! `passgate convert`: has a daemon convert a range.

use std::process::ExitCode;

use clap::Args;

use super::{ControlSocket, Output, PageStateArg, parse_size};
use crate::client::{Convert, Converted};
use crate::error::Result;

/// Has a daemon convert a range of guest memory.
#[derive(Debug, Args)]
pub(super) struct ConvertRange {
    #[command(flatten)]
    control: ControlSocket,
    /// Guest-physical address of the range
    #[arg(long, value_parser = parse_size, value_name = "ADDRESS")]
    gpa: u64,
    /// Length of the range
    #[arg(long, value_parser = parse_size, value_name = "BYTES")]
    length: u64,
    /// State that its pages get
    #[arg(long, value_enum)]
    to: PageStateArg,
    /// Deadline of the answer in milliseconds; 0 for the default
    #[arg(long, value_name = "MS", default_value_t = 0)]
    deadline_ms: u32,
    #[command(flatten)]
    output: Output,
}

impl ConvertRange {
    pub(super) fn run(self) -> Result<ExitCode> {
        let convert =
            Convert { gpa: self.gpa, length: self.length, to: self.to.into(), deadline_ms: self.deadline_ms };
        let converted = self.control.connect()?.convert(&convert)?;
        self.output.print(&converted, text)?;
        Ok(if converted.verdict == "done" { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn text(converted: &Converted) -> String {
    let Some(failure) = &converted.failure else { return converted.verdict.clone() };
    let device = failure.device.as_ref().map(|device| format!(" by {device}")).unwrap_or_default();
    format!(
        "{}: {:#x}+{:#x}: {}{device}, errno {}, tried up to {} (passgate explain --invalidation {})",
        converted.verdict,
        failure.gpa,
        failure.length,
        failure.cause,
        failure.errno,
        failure.rung,
        converted.invalidation
    )
}
