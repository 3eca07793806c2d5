//! `passgate metrics`.

use std::process::ExitCode;

use clap::Args;

use super::{Daemon, line};
use crate::error::Result;

/// Prints what a daemon counts and times, in OpenMetrics text.
#[derive(Debug, Args)]
pub(super) struct MetricsOf {
    #[command(flatten)]
    daemon: Daemon,
}

impl MetricsOf {
    pub(super) fn run(self) -> Result<ExitCode> {
        line(self.daemon.connect()?.metrics()?.trim_end())?;
        Ok(ExitCode::SUCCESS)
    }
}
