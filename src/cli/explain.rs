//! `passgate explain`: prints the receipt of one invalidation, from a running daemon or from its audit log.

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
    source: ReceiptSource,
    #[command(flatten)]
    timeout: Timeout,
    /// Id of the invalidation, as answers, events and `status` print it
    #[arg(long, value_name = "ID")]
    invalidation: u64,
    #[command(flatten)]
    output: Output,
}

/// The source of the receipt.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct ReceiptSource {
    /// Control socket of the daemon
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,
    /// Files of an audit log, or its state directory: the receipt is reconstructed from it
    #[arg(long, value_name = "FILE|DIR", num_args = 1..)]
    log: Vec<PathBuf>,
}

impl ExplainOne {
    pub(super) fn run(self) -> Result<ExitCode> {
        let receipt = match &self.source.socket_path {
            Some(path) => self.timeout.connect(path)?.explain(self.invalidation)?,
            None => {
                let id = self.invalidation;
                let found = replay::explain(&self.source.log, InvalidationId(id))?;
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
