//! `passgate vhost-user-blk`: serves an assigned NVMe drive as a virtio block device, to a VMM with a vhost-user front-end.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use passgate_backends::nvme::DriveOptions;
use passgate_backends::{Accept, Domain, Windowed};
use passgate_bindings::inherited_fds;

use super::daemon::{DaemonArgs, Opened};
use crate::error::{Error, Result};
use crate::host::drivers::drivers;
use crate::serve::vhost_blk::{self, Door, Polling, Socket};
use crate::serve::{Options, Server};

/// The capabilities that a management program reads from a back-end (docs/interop/vhost-user.json of QEMU).
const CAPABILITIES: &str = r#"{"type":"block","features":["read-only"]}"#;

/// Serves an NVMe drive as a virtio block device (vhost-user-blk).
#[derive(Debug, Args)]
pub(super) struct VhostUserBlk {
    /// Path of the socket for front-ends, created with mode 0600
    #[arg(long, value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"])]
    socket_path: Option<PathBuf>,
    /// Inherited descriptor of the front-end's socket, or of one that listens for it
    #[arg(long, value_name = "N", conflicts_with = "socket_path")]
    fd: Option<RawFd>,
    /// Drive: a PCI address bound to vfio-pci
    #[arg(long, value_name = "BDF", required_unless_present = "print_capabilities")]
    device: Option<String>,
    /// NVMe namespace to serve
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    namespace: u32,
    /// Maximum number of queues that are offered to front-ends
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,
    /// Refuse writes to the drive
    #[arg(long, alias = "read-only")]
    readonly: bool,
    /// Path of a control socket for `status`, `convert` and the other commands, created with mode 0600
    #[arg(long, value_name = "PATH")]
    control_path: Option<PathBuf>,
    /// Polling of the rings instead of sleeping: adaptive, always (one processor per queue), or never
    #[arg(long, value_enum, default_value_t = PollMode::Auto)]
    poll: PollMode,
    /// Print the capabilities of the back-end for a management program, and exit
    #[arg(long)]
    print_capabilities: bool,
    #[command(flatten)]
    daemon: DaemonArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PollMode {
    Auto,
    Always,
    Never,
}

impl From<PollMode> for Polling {
    fn from(poll: PollMode) -> Self {
        match poll {
            PollMode::Auto => Self::Auto,
            PollMode::Always => Self::Always,
            PollMode::Never => Self::Never,
        }
    }
}

impl VhostUserBlk {
    pub(super) fn run(self) -> Result<ExitCode> {
        if self.print_capabilities {
            super::print_line(CAPABILITIES)?;
            return Ok(ExitCode::SUCCESS);
        }
        let paths: Vec<_> = self.socket_path.iter().chain(&self.control_path).collect();
        self.daemon.check(&paths)?;
        let socket = match (self.fd, self.socket_path) {
            // Before this process opens anything else, which might get that number.
            (Some(number), _) => Socket::InheritedFd(inherited_fds::by_number(number).map_err(|failed| {
                Error::Usage(format!("--fd {number}: {failed}: start this with a socket open at that number"))
            })?),
            (None, Some(path)) => Socket::Path(path),
            (None, None) => return Err(Error::Usage("give --socket-path or --fd".to_owned())),
        };
        let device = self.device.unwrap_or_default();
        let options =
            DriveOptions { namespace: self.namespace, queues: self.num_queues, ..DriveOptions::default() };
        let accept = Accept { drive: Some(options), ..Accept::default() };
        let opened = self.daemon.open(std::slice::from_ref(&device), accept, &drivers(false))?;
        let drive = opened.assignment.drives.first().cloned();
        let drive = drive.ok_or_else(|| Error::Usage(format!("{device} is no NVMe drive")))?;
        let options = self.control_path.map_or_else(Options::nowhere, Options::at);
        let mut options = self.daemon.complete(&opened, options);
        // The signals stop the vhost-user socket first, and that stops the server: requests that wait in the rings must
        // not fail because the session ends.
        let stop_signals = std::mem::take(&mut options.stop_signals);
        options.has_door = true;
        let Opened { assignment, takeover, .. } = opened;
        let domain = Windowed::new(assignment.domain, Arc::clone(drive.window()));
        let domain = Arc::new(domain) as Arc<dyn Domain>;
        let server = Server::bind_with_takeover(options, domain, assignment.devices, takeover)?;
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
