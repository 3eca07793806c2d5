//! `passgate vhost-user-blk`: a virtio block device over an assigned NVMe drive, for a VMM that speaks vhost-user.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use passgate_backends::nvme::DriveOptions;
use passgate_backends::{Accept, Domain, Windowed};
use passgate_bindings::handed;

use super::engine::{Engine, Opened};
use crate::error::{Error, Result};
use crate::serve::vhost_blk::{self, Door, Polling, Socket};
use crate::serve::{Options, Server};

/// What a management program reads of a back-end (docs/interop/vhost-user.json of QEMU).
const CAPABILITIES: &str = r#"{"type":"block","features":["read-only"]}"#;

/// Serves an NVMe drive to a VMM as a virtio block device.
#[derive(Debug, Args)]
pub(super) struct VhostUserBlk {
    /// Where front-ends connect (made with mode 0600)
    #[arg(long, value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"])]
    socket_path: Option<PathBuf>,
    /// The front-end's socket, or one that listens for it, as an inherited descriptor
    #[arg(long, value_name = "N", conflicts_with = "socket_path")]
    fd: Option<RawFd>,
    /// The drive: a PCI address bound to vfio-pci
    #[arg(long, value_name = "BDF", required_unless_present = "print_capabilities")]
    device: Option<String>,
    /// The namespace that is served
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    namespace: u32,
    /// Queues that front-ends are offered at most
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,
    /// Let nobody write to the drive
    #[arg(long, alias = "read-only")]
    readonly: bool,
    /// Where a control socket for conversions is made (mode 0600): `status`, `convert` and the rest talk to it
    #[arg(long, value_name = "PATH")]
    control_path: Option<PathBuf>,
    /// Whether to look for work instead of sleeping: as long as it pays, always (a processor for each queue), never
    #[arg(long, value_enum, default_value_t = Poll::Auto)]
    poll: Poll,
    /// Print what a management program asks of a back-end, and leave
    #[arg(long)]
    print_capabilities: bool,
    #[command(flatten)]
    engine: Engine,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Poll {
    Auto,
    Always,
    Never,
}

impl From<Poll> for Polling {
    fn from(poll: Poll) -> Self {
        match poll {
            Poll::Auto => Self::Auto,
            Poll::Always => Self::Always,
            Poll::Never => Self::Never,
        }
    }
}

impl VhostUserBlk {
    pub(super) fn run(self) -> Result<ExitCode> {
        if self.print_capabilities {
            super::line(CAPABILITIES)?;
            return Ok(ExitCode::SUCCESS);
        }
        let paths: Vec<_> = self.socket_path.iter().chain(&self.control_path).collect();
        self.engine.check(&paths)?;
        let socket = match (self.fd, self.socket_path) {
            // Before anything is opened here.
            (Some(number), _) => Socket::Handed(handed::by_number(number).map_err(|failed| {
                Error::Usage(format!("--fd {number}: {failed}: start this with a socket open at that number"))
            })?),
            (None, Some(path)) => Socket::Path(path),
            (None, None) => return Err(Error::Usage("give --socket-path or --fd".to_owned())),
        };
        let device = self.device.unwrap_or_default();
        let options =
            DriveOptions { namespace: self.namespace, queues: self.num_queues, ..DriveOptions::default() };
        let accept = Accept { drive: Some(options), ..Accept::default() };
        let opened = self.engine.open(std::slice::from_ref(&device), accept)?;
        let drive = opened.assignment.drives.first().cloned();
        let drive = drive.ok_or_else(|| Error::Usage(format!("{device} is no NVMe drive")))?;
        let options = self.control_path.map_or_else(Options::nowhere, Options::at);
        let mut options = self.engine.complete(&opened, options);
        // The door is shut first: while there are rings, what they wait for is not failed because all ends.
        let stop_signals = std::mem::take(&mut options.stop_signals);
        options.has_door = true;
        let Opened { assignment, hold, .. } = opened;
        let domain = Windowed::new(assignment.domain, Arc::clone(drive.window()));
        let domain = Arc::new(domain) as Arc<dyn Domain>;
        let server = Server::holding(options, domain, assignment.devices, hold)?;
        let stopper = server.stopper()?;
        let options = vhost_blk::Options {
            socket,
            queues: self.num_queues,
            read_only: self.readonly,
            polling: self.poll.into(),
            kept: server.guest_files(),
            stop_signals,
        };
        let door = Door::open(options, &drive, server.inside(), move || stopper.stop())?;
        server.run()?;
        drop(door);
        Ok(ExitCode::SUCCESS)
    }
}
