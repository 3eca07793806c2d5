//! `passgate release`: ends a quarantine by decision of an operator.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{ControlSocket, Output, PageStateArg};
use crate::error::Result;

/// Releases a range from quarantine, by decision of an operator.
#[derive(Debug, Args)]
pub(super) struct ReleaseRange {
    #[command(flatten)]
    control: ControlSocket,
    /// Id of the invalidation that caused the quarantine, as `status` prints it
    #[arg(long, value_name = "ID")]
    invalidation: u64,
    /// State that its pages have
    #[arg(long = "as", value_enum)]
    to: PageStateArg,
    #[command(flatten)]
    output: Output,
}

impl ReleaseRange {
    pub(super) fn run(self) -> Result<ExitCode> {
        let bytes = self.control.connect()?.release(self.invalidation, self.to.into())?;
        self.output.print(&json!({ "invalidation": self.invalidation, "bytes": bytes }), |_| {
            format!("{bytes} bytes were released from quarantine")
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
