//! `passgate explain`: of a running daemon, or from its audit log.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::{Output, Timeout};
use crate::error::{Error, Result};
use crate::gate::{DeviceId, InvalidationId};
use crate::observe::audit::Head;
use crate::observe::{events, replay};

/// Prints the evidence of one invalidation.
#[derive(Debug, Args)]
pub(super) struct ExplainOne {
    #[command(flatten)]
    from: From,
    #[command(flatten)]
    timeout: Timeout,
    /// The invalidation, as answers, events and status name it
    #[arg(long, value_name = "ID")]
    invalidation: u64,
    #[command(flatten)]
    output: Output,
}

/// Who knows.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct From {
    /// The daemon's socket
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,
    /// An audit log, or the state directory that it is in: the receipt is made again from it
    #[arg(long, value_name = "FILE|DIR", num_args = 1..)]
    log: Vec<PathBuf>,
}

impl ExplainOne {
    pub(super) fn run(self) -> Result<ExitCode> {
        let receipt = match &self.from.socket_path {
            Some(path) => self.timeout.connect(path)?.explain(self.invalidation)?,
            None => {
                let id = self.invalidation;
                let found = replay::explain(&self.from.log, InvalidationId(id))?;
                let (receipt, head) = found.ok_or(Error::NoReceipt { invalidation: id })?;
                events::receipt(&receipt, &head)
            }
        };
        self.output.print(&receipt, |receipt| format!("{receipt:#}"))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl events::Names for Head {
    fn device(&self, id: DeviceId) -> &str {
        self.devices.get(usize::from(id.0)).map_or("?", String::as_str)
    }
}
