//! `passgate explain`.

use std::process::ExitCode;

use clap::Args;

use super::{Daemon, Output};
use crate::error::Result;

/// Prints the evidence of one invalidation.
#[derive(Debug, Args)]
pub(super) struct ExplainOne {
    #[command(flatten)]
    daemon: Daemon,
    /// The invalidation, as answers, events and status name it
    #[arg(long, value_name = "ID")]
    invalidation: u64,
    #[command(flatten)]
    output: Output,
}

impl ExplainOne {
    pub(super) fn run(self) -> Result<ExitCode> {
        let receipt = self.daemon.connect()?.explain(self.invalidation)?;
        self.output.print(&receipt, |receipt| format!("{receipt:#}"))?;
        Ok(ExitCode::SUCCESS)
    }
}
