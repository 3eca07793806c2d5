//! What every daemon of a VM is told, whatever its doors: how domains and devices are had, what may be done to them,
//! and what outlives it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use passgate_backends::assign::{Accept, Assignment, Kind};
use passgate_backends::{Device, FenceStep, Tables};
use passgate_bindings::vfio::PciAddress;

use crate::error::{Error, Result};
use crate::gate::{Hitless, OnStuckDma, Platform, Policy};
use crate::host::taking::take;
use crate::observe::records::StateOptions;
use crate::protocol::address::address;
use crate::serve::{Hold, Options, files_limit, privilege};
use crate::session::fdstore::{FdStore, Kept};

/// The gate, its domain and its devices.
#[derive(Debug, Args)]
pub(super) struct Engine {
    /// The IOMMU interface
    #[arg(long, value_enum, default_value_t = Iommu::Auto)]
    iommu: Iommu,
    /// How far to go without asking when DMA does not stop
    #[arg(long, value_enum, default_value_t = Stuck::Refuse)]
    on_stuck_dma: Stuck,
    /// A stale DMA write may take the host down (Intel TDX): a device that caches translations is detached before its
    /// memory is given. Without this or --contained, as the host's kernel says
    #[arg(long, conflicts_with = "contained")]
    strict: bool,
    /// A stale DMA write faults and does no harm (AMD SEV-SNP, Arm)
    #[arg(long)]
    contained: bool,
    /// Let a fence end a TDISP interface that is locked or runs
    #[arg(long)]
    end_tdi: bool,
    /// Whether DMA beside a page that is taken away may miss a moment: never (small IOMMU pages, or page by page), only
    /// while its device is paused, or at any time
    #[arg(long, value_enum, default_value_t = Window::Prefer)]
    hitless: Window,
    /// A device to which a DMA fault does no harm, so that it need not be paused; may be given again
    #[arg(long, value_name = "BDF")]
    tolerant: Vec<String>,
    /// Take memory whose file is not sealed against shrinking (F_SEAL_SHRINK), as Cloud Hypervisor's is not: a VMM that
    /// shrinks it then ends its own daemon, and its devices are stopped
    #[arg(long)]
    allow_unsealed: bool,
    /// Keep a second page table filled, so that many pages leave large mappings at once by one switch of the devices
    /// (iommufd; twice the page-table memory)
    #[arg(long)]
    standby: bool,
    /// How long to try again for devices that another process still has
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    wait: u32,
    /// Take devices that nothing stops for certain
    #[arg(long)]
    allow_unstoppable: bool,
    /// Let nobody take a range out of quarantine (`passgate release`)
    #[arg(long)]
    no_release: bool,
    /// Where a socket for scrapers is made (mode 0600): OpenMetrics text to any HTTP GET
    #[arg(long, value_name = "P")]
    metrics_path: Option<PathBuf>,
    /// Run without the process that stops the devices when this one dies
    #[arg(long)]
    no_guardian: bool,
    /// Guest memory regions at most
    #[arg(long, value_name = "N", default_value_t = Policy::default().max_regions)]
    max_regions: u32,
    #[command(flatten)]
    state: State,
    #[command(flatten)]
    restart: Restart,
}

/// A domain with its devices, and what outlives this process.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) assignment: Assignment,
    pub(super) hold: Option<Hold>,
    manager: Option<FdStore>,
}

/// What outlives the daemon.
#[derive(Debug, Args)]
struct Restart {
    /// What becomes of devices and mappings when this daemon ends, however it does
    #[arg(long, value_enum, default_value_t = OnEnd::Stop)]
    restart: OnEnd,
    /// With --restart hold: how long memory of an earlier daemon's clients waits for one who comes back for it
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    adopt_within: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnEnd {
    /// Devices are stopped, memory is closed
    Stop,
    /// The service manager keeps them for the next daemon; DMA goes on (docs/guide/restart.md)
    Hold,
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

/// The IOMMU interface, as the command line names it.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Iommu {
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
pub(super) enum Stuck {
    /// Refuse the conversion
    Refuse,
    /// Also stop the devices: by their migration state, bus mastering off, out of their address space
    Fence,
    /// Also reset the devices
    Reset,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Window {
    /// Never: what the domain cannot cut is mapped page by page, or refused
    Require,
    /// Only while the devices are paused for it
    Prefer,
    /// At any time
    Off,
}

impl From<Window> for Hitless {
    fn from(window: Window) -> Self {
        match window {
            Window::Require => Self::Require,
            Window::Prefer => Self::Prefer,
            Window::Off => Self::Off,
        }
    }
}

impl From<Iommu> for Kind {
    fn from(iommu: Iommu) -> Self {
        match iommu {
            Iommu::Auto => Self::Auto,
            Iommu::Iommufd => Self::Iommufd,
            Iommu::Type1 => Self::Type1,
            Iommu::Soft => Self::Soft,
        }
    }
}

impl Engine {
    /// Refuses paths, these and its own, that no socket can have. To be called before any device is taken.
    pub(super) fn check(&self, paths: &[&PathBuf]) -> Result<()> {
        let all = paths.iter().copied().chain(&self.metrics_path);
        all.into_iter().try_for_each(|path| address(path).map(drop))
    }

    /// What page tables are made for: pages that are cut out of mappings, unless DMA beside them may miss a moment.
    fn tables(&self) -> Tables {
        match self.hitless {
            _ if self.standby => Tables::Standby,
            Window::Off => Tables::Large,
            Window::Require | Window::Prefer => Tables::Small,
        }
    }

    /// What counts as proof: as asked, else strict where a stale write could meet memory of a TDX guest.
    fn platform(&self) -> Platform {
        let tdx = || std::fs::read_to_string(TDX).is_ok_and(|on| on.trim() == "Y");
        if self.strict || !self.contained && tdx() { Platform::Strict } else { Platform::Contained }
    }

    /// Domain and devices, and what outlives this process, where anything is to.
    fn hold(
        &self,
        devices: &[String],
        manager: Option<FdStore>,
        kept: Kept,
        accept: Accept,
        assign: impl Fn() -> Result<Assignment>,
    ) -> Result<(Assignment, Option<Hold>)> {
        let within = Duration::from_secs(self.restart.adopt_within.into());
        match (self.restart.restart, manager) {
            (OnEnd::Hold, Some(store)) => {
                let full = |name: &String| {
                    name.parse().map_or(name.clone(), |address: PciAddress| address.to_string())
                };
                let devices: Vec<_> = devices.iter().map(full).collect();
                let (assignment, hold) = Hold::open(store, kept, &devices, accept, within, assign)?;
                Ok((assignment, Some(hold)))
            }
            (restart, store) => {
                if restart == OnEnd::Hold {
                    log::warn!(
                        "--restart hold: no service manager keeps anything for this process (no NOTIFY_SOCKET); when it \
                         ends, devices are stopped and memory is closed"
                    );
                }
                if let (false, Some(store)) = (kept.is_empty(), store) {
                    log::warn!(
                        "what the service manager kept for --restart hold is let go, and its devices are stopped"
                    );
                    kept.names().into_iter().for_each(|name| store.remove(name));
                    drop(kept);
                    store.settle();
                }
                Ok((assign()?, None))
            }
        }
    }

    /// Takes the devices, and what an earlier daemon left of them. To be called before anything else is opened.
    pub(super) fn open(&self, devices: &[String], accept: Accept) -> Result<Opened> {
        let kept = Kept::take()?;
        files_limit::raise(self.max_regions, Options::nowhere().max_clients);
        let accept = Accept { unstoppable: self.allow_unstoppable, ..accept };
        let patience = Duration::from_secs(self.wait.into());
        let manager = FdStore::open(privilege::give_up)?;
        let assign = || take(self.iommu.into(), devices, accept, self.tables(), patience);
        let (assignment, hold) = self.hold(devices, manager.clone(), kept, accept, assign)?;
        if self.platform() == Platform::Strict && !self.allow_unstoppable {
            assignment.devices.iter().try_for_each(|device| certain(&**device))?;
        }
        privilege::give_up()?;
        log::info!("{} with {} devices", assignment.domain.name(), assignment.devices.len());
        Ok(Opened { assignment, hold, manager })
    }

    /// What a server is told, beyond `options`.
    pub(super) fn complete(self, opened: &Opened, options: Options) -> Options {
        let policy = Policy {
            on_stuck_dma: match self.on_stuck_dma {
                Stuck::Refuse => OnStuckDma::Refuse,
                Stuck::Fence => OnStuckDma::Fence,
                Stuck::Reset => OnStuckDma::Reset,
            },
            platform: self.platform(),
            end_tdi: self.end_tdi,
            hitless: self.hitless.into(),
            max_regions: self.max_regions,
            ..Policy::default()
        };
        Options {
            policy,
            allow_release: !self.no_release,
            metrics_path: self.metrics_path,
            guardian: (!self.no_guardian).then(|| PathBuf::from("/proc/self/exe")),
            tolerant: self.tolerant,
            unsealed: self.allow_unsealed,
            state: self.state.options(),
            manager: opened.manager.clone(),
            stop_signals: vec![signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT],
            ..options
        }
    }
}

/// Whether this host runs TDX guests (arch/x86/kvm/vmx/tdx.c, module parameter `tdx`).
const TDX: &str = "/sys/module/kvm_intel/parameters/tdx";

/// Where a stale write does harm, a device that caches translations must be one that can be detached.
fn certain(device: &dyn Device) -> Result<()> {
    if !device.nature().ats || device.stop_class().has(FenceStep::Detach) {
        return Ok(());
    }
    Err(Error::Uncertain { device: device.name().to_owned() })
}
