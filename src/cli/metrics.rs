//! `passgate metrics`: prints the metrics of a daemon.

use std::process::ExitCode;

use clap::Args;

use super::{ControlSocket, print_line};
use crate::error::Result;

/// Prints the metrics of a daemon as OpenMetrics text.
#[derive(Debug, Args)]
pub(super) struct MetricsOf {
    #[command(flatten)]
    control: ControlSocket,
}

impl MetricsOf {
    pub(super) fn run(self) -> Result<ExitCode> {
        print_line(self.control.connect()?.metrics()?.trim_end())?;
        Ok(ExitCode::SUCCESS)
    }
}
