//! The options that every daemon of a VM has in common, whichever sockets it serves: its domain and devices, the fences
//! that are allowed, and the state that outlives it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use passgate_backends::assign::{Accept, Assignment, Kind};
use passgate_backends::{Device, Drivers, Step, Tables};
use passgate_bindings::vfio::PciAddress;

use crate::error::{Error, Result};
use crate::gate::{Hitless, OnStuckDma, Platform, Policy};
use crate::host::acquire::acquire;
use crate::protocol::address::address;
use crate::serve::{Options, Takeover, files_limit, privilege};
use crate::session::fdstore::{FdStore, StoredFds};
use crate::session::records::StateOptions;

/// Options of the gate, its domain and its devices.
#[derive(Debug, Args)]
pub(super) struct DaemonArgs {
    /// IOMMU interface
    #[arg(long, value_enum, default_value_t = Iommu::Auto)]
    iommu: Iommu,
    /// Measures that are taken without an operator when DMA does not stop
    #[arg(long, value_enum, default_value_t = FenceLimit::Refuse)]
    on_stuck_dma: FenceLimit,
    /// A stale DMA write may crash the host (Intel TDX): a device that caches translations (ATS) is detached before
    /// anything is unmapped. Default without --contained if the host's kernel has TDX enabled
    #[arg(long, conflicts_with = "contained")]
    strict: bool,
    /// A stale DMA write faults and does no harm (AMD SEV-SNP, Arm)
    #[arg(long)]
    contained: bool,
    /// Allow fences to end a TDISP interface that is locked or runs
    #[arg(long)]
    end_tdi: bool,
    /// Gaps that are allowed in the DMA to pages beside one that leaves a large mapping
    #[arg(long, value_enum, default_value_t = HitlessMode::Prefer)]
    hitless: HitlessMode,
    /// Device that tolerates DMA faults, so that it need not be paused; may be repeated
    #[arg(long, value_name = "BDF")]
    tolerant: Vec<String>,
    /// Accept memory whose file is not sealed against shrinking (F_SEAL_SHRINK), as Cloud Hypervisor's is not: a VMM that
    /// shrinks it ends its own daemon, and its devices are stopped
    #[arg(long)]
    allow_unsealed: bool,
    /// Maintain a second page table, so that many pages leave large mappings at once by one switch of the devices (iommufd;
    /// twice the page-table memory)
    #[arg(long)]
    standby: bool,
    /// Time to retry while another process has a device open
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    wait: u32,
    /// Accept devices that nothing stops for certain
    #[arg(long)]
    allow_unstoppable: bool,
    /// Refuse to release ranges from quarantine (`passgate release`)
    #[arg(long)]
    no_release: bool,
    /// Path of a socket for scrapers, created with mode 0600: OpenMetrics text to any HTTP GET
    #[arg(long, value_name = "P")]
    metrics_path: Option<PathBuf>,
    /// Run without the guardian, the process that stops the devices when this one dies
    #[arg(long)]
    no_guardian: bool,
    /// Maximum number of guest memory regions
    #[arg(long, value_name = "N", default_value_t = Policy::default().max_regions)]
    max_regions: u32,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    restart: RestartArgs,
}

/// The domain and its devices, and the state that outlives this process.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) assignment: Assignment,
    /// Set with `--restart hold`, if there is a service manager.
    pub(super) takeover: Option<Takeover>,
    manager: Option<FdStore>,
}

/// Options of the restart.
#[derive(Debug, Args)]
struct RestartArgs {
    /// Action on devices and mappings when this daemon ends, for any reason
    #[arg(long, value_enum, default_value_t = RestartMode::Stop)]
    restart: RestartMode,
    /// With --restart hold: time in which a client must adopt memory that an earlier daemon had mapped
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    adopt_within: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RestartMode {
    /// Devices are stopped and memory is closed
    Stop,
    /// The service manager stores them for the next daemon, and DMA continues (docs/guide/restart.md)
    Hold,
}

/// Options of the state directory.
#[derive(Debug, Args)]
struct StateArgs {
    /// Directory of the audit log and the quarantine, for this daemon and the next; created with mode 0700
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Size of one file of the audit log, 1M to 64G
    #[arg(long, value_name = "BYTES", default_value = "64M", requires = "state_dir", value_parser = parse_segment_size)]
    audit_segment: u64,
    /// Number of audit log files that are retained
    #[arg(long, value_name = "N", default_value_t = 8, requires = "state_dir")]
    audit_keep: usize,
}

impl StateArgs {
    fn options(self) -> Option<StateOptions> {
        let Self { state_dir, audit_segment, audit_keep } = self;
        state_dir.map(|dir| StateOptions { dir, audit_segment, audit_keep })
    }
}

/// Parses the size of one file of the audit log: at least one line must fit, and it must fit an address space.
fn parse_segment_size(text: &str) -> Result<u64, String> {
    match super::parse_size(text)? {
        bytes if (1 << 20..=1 << 36).contains(&bytes) => Ok(bytes),
        _ => Err("give 1M to 64G".to_owned()),
    }
}

/// The IOMMU interface, as the command line names it.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Iommu {
    /// iommufd if the kernel has it, else type1; soft if no PCI device is named
    Auto,
    /// iommufd and device cdevs (Linux 6.6 or newer)
    Iommufd,
    /// VFIO container and groups
    Type1,
    /// io_uring registered buffers and software devices
    Soft,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum FenceLimit {
    /// Refuse the conversion
    Refuse,
    /// Also stop the devices: migration STOP, bus mastering off, detach
    Fence,
    /// Also reset the devices
    Reset,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum HitlessMode {
    /// None: memory that cannot be cut is mapped page by page, or refused
    Require,
    /// Only while the devices are paused
    Prefer,
    /// Any: DMA may fault during the gap
    Off,
}

impl From<HitlessMode> for Hitless {
    fn from(mode: HitlessMode) -> Self {
        match mode {
            HitlessMode::Require => Self::Require,
            HitlessMode::Prefer => Self::Prefer,
            HitlessMode::Off => Self::Off,
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

impl DaemonArgs {
    /// Returns an error if one of these paths, or of its own, cannot be that of a socket. Called before any device is opened.
    pub(super) fn check(&self, paths: &[&PathBuf]) -> Result<()> {
        let all = paths.iter().copied().chain(&self.metrics_path);
        Ok(all.into_iter().try_for_each(|path| address(path).map(drop))?)
    }

    /// Returns the kind of page tables: with small pages, which can be cut out of mappings, unless gaps are allowed at
    /// any time.
    fn tables(&self) -> Tables {
        match self.hitless {
            _ if self.standby => Tables::Standby,
            HitlessMode::Off => Tables::Large,
            HitlessMode::Require | HitlessMode::Prefer => Tables::Small,
        }
    }

    /// Returns the platform: as the options say, else strict if this host may run TDX guests.
    fn platform(&self) -> Platform {
        let tdx = || std::fs::read_to_string(TDX_PARAMETER_PATH).is_ok_and(|on| on.trim() == "Y");
        if self.strict || !self.contained && tdx() { Platform::Strict } else { Platform::Contained }
    }

    /// Assigns the devices. With `--restart hold` and a service manager, takes over what an earlier daemon has stored
    /// there; else closes it.
    fn take_over(
        &self,
        devices: &[String],
        manager: Option<FdStore>,
        stored: StoredFds,
        accept: Accept,
        drivers: &dyn Drivers,
        assign: impl Fn() -> Result<Assignment>,
    ) -> Result<(Assignment, Option<Takeover>)> {
        let within = Duration::from_secs(self.restart.adopt_within.into());
        match (self.restart.restart, manager) {
            (RestartMode::Hold, Some(store)) => {
                let full_address = |name: &String| {
                    name.parse().map_or(name.clone(), |address: PciAddress| address.to_string())
                };
                let devices: Vec<_> = devices.iter().map(full_address).collect();
                let (assignment, takeover) =
                    Takeover::open(store, stored, &devices, accept, drivers, within, assign)?;
                Ok((assignment, Some(takeover)))
            }
            (restart, store) => {
                if restart == RestartMode::Hold {
                    log::warn!(
                        "--restart hold: there is no service manager to store descriptors (no NOTIFY_SOCKET); when this \
                         process ends, devices are stopped and memory is closed"
                    );
                }
                if let (false, Some(store)) = (stored.is_empty(), store) {
                    log::warn!(
                        "the descriptors that the service manager stored for --restart hold are closed, and their devices are \
                         stopped"
                    );
                    stored.names().into_iter().for_each(|name| store.remove(name));
                    drop(stored);
                    store.settle();
                }
                Ok((assign()?, None))
            }
        }
    }

    /// Opens the domain and the devices with these drivers, or takes them over from an earlier daemon. Called before anything else is
    /// opened: the descriptors that the service manager passes have fixed numbers.
    pub(super) fn open(&self, devices: &[String], accept: Accept, drivers: &dyn Drivers) -> Result<Opened> {
        let stored = StoredFds::take()?;
        // A file beyond RLIMIT_FSIZE is then an error of the write (EFBIG), and not the end of the daemon.
        signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default()).map_err(Error::Signal)?;
        files_limit::raise(self.max_regions, Options::nowhere().max_clients);
        let accept = Accept { unstoppable: self.allow_unstoppable, ..accept };
        let timeout = Duration::from_secs(self.wait.into());
        let manager = FdStore::open(privilege::give_up)?;
        let assign = || acquire(self.iommu.into(), devices, accept, drivers, self.tables(), timeout);
        let (assignment, takeover) =
            self.take_over(devices, manager.clone(), stored, accept, drivers, assign)?;
        if self.platform() == Platform::Strict && !self.allow_unstoppable {
            assignment.devices.iter().try_for_each(|device| check_detachable(&**device))?;
        }
        privilege::give_up()?;
        log::info!("{} with {} devices", assignment.domain.name(), assignment.devices.len());
        Ok(Opened { assignment, takeover, manager })
    }

    /// Completes the options of a server.
    pub(super) fn complete(self, opened: &Opened, options: Options) -> Options {
        let policy = Policy {
            on_stuck_dma: match self.on_stuck_dma {
                FenceLimit::Refuse => OnStuckDma::Refuse,
                FenceLimit::Fence => OnStuckDma::Fence,
                FenceLimit::Reset => OnStuckDma::Reset,
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

/// The module parameter that is `Y` if this host can run TDX guests: arch/x86/kvm/vmx/tdx.c.
const TDX_PARAMETER_PATH: &str = "/sys/module/kvm_intel/parameters/tdx";

/// Returns an error if the device caches translations and cannot be detached: on a strict platform no unmap would be proof.
fn check_detachable(device: &dyn Device) -> Result<()> {
    if !device.traits().ats || device.stop_class().has(Step::Detach) {
        return Ok(());
    }
    Err(Error::Uncertain { device: device.name().to_owned() })
}
