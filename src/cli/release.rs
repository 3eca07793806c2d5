//! `passgate release`.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{Daemon, Output, To};
use crate::error::Result;

/// Takes a range out of quarantine, by a person who knows what its pages are.
#[derive(Debug, Args)]
pub(super) struct ReleaseRange {
    #[command(flatten)]
    daemon: Daemon,
    /// The invalidation that the quarantine dates from, as `status` names it
    #[arg(long, value_name = "ID")]
    invalidation: u64,
    /// What its pages are now
    #[arg(long = "as", value_enum)]
    to: To,
    #[command(flatten)]
    output: Output,
}

impl ReleaseRange {
    pub(super) fn run(self) -> Result<ExitCode> {
        let bytes = self.daemon.connect()?.release(self.invalidation, self.to.into())?;
        self.output.print(&json!({ "invalidation": self.invalidation, "bytes": bytes }), |_| {
            format!("{bytes} bytes are out of quarantine")
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
