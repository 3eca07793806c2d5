//! `passgate serve`: one VM's daemon.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use passgate_backends::assign::Accept;

use super::engine::{Engine, Opened};
use crate::error::Result;
use crate::serve::{Options, Server};
use crate::session::guardian::{self, Ended};

/// Runs one VM's daemon.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// Where the control socket is made (mode 0600)
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
    /// A device to assign: a PCI address bound to vfio-pci, or soft:N; may be given again
    #[arg(long = "device", value_name = "BDF")]
    devices: Vec<String>,
    /// Let clients have devices do DMA on demand (for tests; off by default)
    #[arg(long)]
    allow_dma: bool,
    /// With --allow-dma: overwrite the last blocks of a drive, where DMA of given bytes takes that
    #[arg(long, requires = "allow_dma")]
    scratch: bool,
    #[command(flatten)]
    engine: Engine,
}

impl Serve {
    pub(super) fn run(self) -> Result<ExitCode> {
        self.engine.check(&[&self.socket_path])?;
        let accept = Accept { scratch: self.scratch, ..Accept::default() };
        let opened = self.engine.open(&self.devices, accept)?;
        let options = Options { allow_dma: self.allow_dma, ..Options::at(self.socket_path) };
        let options = self.engine.complete(&opened, options);
        let Opened { assignment, hold, .. } = opened;
        Server::holding(options, assignment.domain, assignment.devices, hold)?.run()?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Holds the devices of a daemon, which is at its standard input.
pub(super) fn guardian() -> Result<ExitCode> {
    match guardian::run(std::io::stdin())? {
        Ended::Dismissed | Ended::Blocked => Ok(ExitCode::SUCCESS),
        Ended::Loose(_) => Ok(ExitCode::FAILURE),
    }
}
