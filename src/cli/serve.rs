//! `passgate serve`: one VM's daemon.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use passgate_backends::assign::{self, Kind, assign};

use crate::error::{Error, Result};
use crate::gate::{OnStuckDma, Policy};
use crate::observe::records::StateOptions;
use crate::serve::{Options, Server};
use crate::session::guardian::{self, Ended};

/// How long to wait for devices that somebody else has.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs one VM's daemon.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// Where the control socket is made (mode 0600)
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
    /// A device to assign: a PCI address bound to vfio-pci, or soft:N; may be given again
    #[arg(long = "device", value_name = "BDF")]
    devices: Vec<String>,
    /// The IOMMU interface
    #[arg(long, value_enum, default_value_t = Iommu::Auto)]
    iommu: Iommu,
    /// How far to go without asking when DMA does not stop
    #[arg(long, value_enum, default_value_t = Stuck::Refuse)]
    on_stuck_dma: Stuck,
    /// Let clients have devices do DMA on demand (for tests; off by default)
    #[arg(long)]
    allow_dma: bool,
    /// Run without the process that stops the devices when this one dies
    #[arg(long)]
    no_guardian: bool,
    /// Guest memory regions at most
    #[arg(long, value_name = "N", default_value_t = Policy::default().max_regions)]
    max_regions: u32,
    #[command(flatten)]
    state: State,
}

/// What is written down, and where.
#[derive(Debug, Args)]
struct State {
    /// Where the audit log and the quarantine are kept, for this daemon and the next (made with mode 0700)
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Bytes of one file of the audit log
    #[arg(long, value_name = "BYTES", default_value = "64M", requires = "state_dir", value_parser = segment)]
    audit_segment: u64,
    /// Files of the audit log that are kept
    #[arg(long, value_name = "N", default_value_t = 8, requires = "state_dir")]
    audit_keep: usize,
}

impl State {
    fn options(self) -> Option<StateOptions> {
        let Self { state_dir, audit_segment, audit_keep } = self;
        state_dir.map(|dir| StateOptions { dir, audit_segment, audit_keep })
    }
}

/// Bytes of one file: not so few that a line does not fit, not so many that an address space does not hold it.
fn segment(text: &str) -> Result<u64, String> {
    match super::number(text)? {
        bytes if (1 << 20..=1 << 36).contains(&bytes) => Ok(bytes),
        _ => Err("give 1M to 64G".to_owned()),
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Iommu {
    /// iommufd where there is one, else type1; soft where no PCI device is named
    Auto,
    /// iommufd and device cdevs (Linux 6.6 or newer)
    Iommufd,
    /// VFIO container and groups
    Type1,
    /// io_uring registered buffers and software devices
    Soft,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stuck {
    /// Refuse the conversion
    Refuse,
    /// Move the devices to the blocking domain
    Fence,
    /// Also reset the devices
    Reset,
}

impl Serve {
    pub(super) fn run(self) -> Result<ExitCode> {
        let kind = match self.iommu {
            Iommu::Auto => Kind::Auto,
            Iommu::Iommufd => Kind::Iommufd,
            Iommu::Type1 => Kind::Type1,
            Iommu::Soft => Kind::Soft,
        };
        let on_stuck_dma = match self.on_stuck_dma {
            Stuck::Refuse => OnStuckDma::Refuse,
            Stuck::Fence => OnStuckDma::Fence,
            Stuck::Reset => OnStuckDma::Reset,
        };
        let assign::Assignment { domain, devices } = take(kind, &self.devices)?;
        let policy = Policy { on_stuck_dma, max_regions: self.max_regions, ..Policy::default() };
        let guardian = (!self.no_guardian).then(|| PathBuf::from("/proc/self/exe"));
        let state = self.state.options();
        let options =
            Options { policy, allow_dma: self.allow_dma, guardian, state, ..Options::at(self.socket_path) };
        log::info!("{} with {} devices", domain.name(), devices.len());
        let server = Server::bind(options, domain, devices)?;
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            stop_on(signal, server.stopper()?)?;
        }
        server.run()?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Takes the devices. One that is taken may be about to be let go of: the guardian of a daemon that was killed a
/// moment ago stops it first.
fn take(kind: Kind, devices: &[String]) -> Result<assign::Assignment> {
    let until = Instant::now() + PATIENCE;
    loop {
        match assign(kind, devices) {
            Err(error) if error.is_taken() && Instant::now() < until => {
                log::info!("{error}; trying again");
                std::thread::sleep(PATIENCE / 20);
            }
            result => return Ok(result?),
        }
    }
}

fn stop_on(signal: i32, stopper: OwnedFd) -> Result<()> {
    signal_hook::low_level::pipe::register(signal, stopper).map_err(Error::Signal)?;
    Ok(())
}

/// Holds the devices of a daemon, which is at its standard input.
pub(super) fn guardian() -> Result<ExitCode> {
    match guardian::run(std::io::stdin())? {
        Ended::Dismissed | Ended::Blocked => Ok(ExitCode::SUCCESS),
        Ended::Loose(_) => Ok(ExitCode::FAILURE),
    }
}
