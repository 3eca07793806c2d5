//! `passgate serve`: the daemon of one VM. And the guardian, which it starts.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use passgate_backends::assign::Accept;

use super::daemon::{DaemonArgs, Opened};
use crate::error::Result;
use crate::host::drivers::drivers;
use crate::serve::{Options, Server};
use crate::session::guardian::{self, Ended};

/// Runs the daemon of one VM.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// Path of the control socket, created with mode 0600
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
    /// Device to assign: a PCI address bound to vfio-pci, or soft:N; may be repeated
    #[arg(long = "device", value_name = "BDF")]
    devices: Vec<String>,
    /// Allow clients to have devices do DMA on demand (for tests)
    #[arg(long)]
    allow_dma: bool,
    /// With --allow-dma: allow overwriting the last blocks of a drive, if DMA of given bytes requires it
    #[cfg(feature = "selftest")]
    #[arg(long, requires = "allow_dma")]
    scratch: bool,
    #[command(flatten)]
    daemon: DaemonArgs,
}

impl Serve {
    pub(super) fn run(self) -> Result<ExitCode> {
        self.daemon.check(&[&self.socket_path])?;
        #[cfg(feature = "selftest")]
        let drivers = drivers(self.scratch);
        #[cfg(not(feature = "selftest"))]
        let drivers = drivers(false);
        let opened = self.daemon.open(&self.devices, Accept::default(), &drivers)?;
        let options = Options { allow_dma: self.allow_dma, ..Options::at(self.socket_path) };
        let options = self.daemon.complete(&opened, options);
        let Opened { assignment, takeover, .. } = opened;
        Server::bind_with_takeover(options, assignment.domain, assignment.devices, takeover)?.run()?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Runs the guardian of the daemon that is connected to standard input.
pub(super) fn guardian() -> Result<ExitCode> {
    match guardian::run(std::io::stdin())? {
        Ended::Dismissed | Ended::Blocked => Ok(ExitCode::SUCCESS),
        Ended::Loose(_) => Ok(ExitCode::FAILURE),
    }
}
