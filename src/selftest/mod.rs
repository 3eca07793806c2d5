//! `passgate selftest`: establishes what stops the DMA of a real device, by doing it.
//!
//! Checks never touch data on the device: DMA goes to and from memory of the test's own. A driver that can move bytes
//! only by writing to the device's medium does so only where the operator has allowed it (`--scratch`).

mod checks;
pub mod crash;
mod dma_load;
pub mod in_use;
pub mod rebind;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use passgate_backends::device::refusal::check_vfio_accepts;
use passgate_backends::{Accept, Assignment, Kind, Tables};
use passgate_bindings::vfio::pci::PciDevice;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::host::acquire::acquire;
use crate::host::drivers::drivers;
use checks::DeviceTest;
use rebind::Rebound;

/// The device to test, and the means that the test may use.
#[derive(Debug, Clone)]
pub struct Options {
    /// A PCI address, or `soft:0`.
    pub device: String,
    /// The IOMMU interface.
    pub iommu: Kind,
    /// True if the device is unbound from its driver for the test, and bound to it again afterwards.
    pub bind: bool,
    /// True if the last blocks of a drive may be overwritten, to check what the drive reads from memory.
    pub scratch: bool,
    /// The path of this program, which runs the daemon that is killed and the helper that restores the driver.
    pub program: PathBuf,
    /// True if a daemon is killed while its device does DMA.
    pub crash: bool,
}

/// The time to retry for a device that another process is about to close.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// The outcome of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The check was done, and the device behaved as it must.
    Pass,
    /// The check was done, and the device did not.
    Fail,
    /// The check could not be done.
    Skip,
}

/// The result of one check, as `--json` prints it.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The name of the check.
    pub check: &'static str,
    /// The outcome.
    pub outcome: Outcome,
    /// The observation, or the reason why the check could not be done.
    pub detail: String,
    /// The duration in milliseconds.
    pub took_ms: f64,
}

/// The results of all checks of one device, as `--json` prints them.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The device, as [`Options::device`] names it.
    pub device: String,
    /// The name of the domain in which it was tested.
    pub iommu: String,
    /// The checks, in the order in which they were done.
    pub checks: Vec<Row>,
    /// The number of checks that passed.
    pub passed: usize,
    /// The number of checks that failed.
    pub failed: usize,
    /// The number of checks that could not be done.
    pub skipped: usize,
}

impl Report {
    /// Returns true if no check failed and at least one passed.
    pub fn is_good(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }

    /// Returns the last line of the table.
    pub fn summary(&self) -> String {
        let Self { device, iommu, passed, failed, skipped, .. } = self;
        format!("{device} in {iommu}: {passed} passed, {failed} failed, {skipped} skipped")
    }
}

impl Row {
    /// Returns the row as one line of the table.
    pub fn text(&self) -> String {
        let word = match self.outcome {
            Outcome::Pass => "pass",
            Outcome::Fail => "FAIL",
            Outcome::Skip => "skip",
        };
        format!("{word}  {:<22} {:>9.1} ms  {}", self.check, self.took_ms, self.detail)
    }
}

/// The result of a check: the observation, or why it did not pass.
type CheckResult = std::result::Result<String, CheckError>;

/// The reason why a check did not pass.
#[derive(Debug)]
enum CheckError {
    /// It failed; with the observation.
    Failed(String),
    /// It could not be done; with the reason.
    Skipped(String),
}

impl<E: std::error::Error> From<E> for CheckError {
    fn from(error: E) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Collects the rows, and reports each as soon as its check has ended.
struct Rows<'a> {
    rows: Vec<Row>,
    report: &'a mut dyn FnMut(&Row),
}

impl Rows<'_> {
    fn check(&mut self, name: &'static str, body: impl FnOnce() -> CheckResult) {
        let started = Instant::now();
        let (outcome, detail) = match body() {
            Ok(observation) => (Outcome::Pass, observation),
            Err(CheckError::Failed(observation)) => (Outcome::Fail, observation),
            Err(CheckError::Skipped(reason)) => (Outcome::Skip, reason),
        };
        let row = Row { check: name, outcome, detail, took_ms: started.elapsed().as_secs_f64() * 1e3 };
        (self.report)(&row);
        self.rows.push(row);
    }
}

/// Tests the device. Calls `report` with each row as soon as its check has ended. Returns an error if the device could not be
/// tested at all.
pub fn run(options: &Options, report: &mut dyn FnMut(&Row)) -> Result<Report> {
    let rebound = rebind(options)?;
    let mut rows = Rows { rows: Vec::new(), report };
    let mut iommu = String::new();
    {
        // The test is to establish what stops the device, so one that nothing stops is accepted.
        let accept = Accept { unstoppable: true, drive: None };
        let Assignment { domain, devices, .. } = acquire(
            options.iommu,
            std::slice::from_ref(&options.device),
            accept,
            &drivers(options.scratch),
            Tables::default(),
            ACQUIRE_TIMEOUT,
        )?;
        let Some(device) = devices.into_iter().next() else {
            return Err(Error::Usage(format!("`{}` names no device", options.device)));
        };
        iommu += domain.name();
        let test = DeviceTest::new(device, domain)?;
        rows.check("stop class", || Ok(test.stop_class()));
        rows.check("map and unmap", || test.map_and_unmap());
        rows.check("DMA", || test.dma());
        rows.check("unmap under DMA", || test.unmap_under_dma());
        for (name, step) in checks::FENCES {
            rows.check(name, || test.fence(name, step));
        }
    }
    // The device and its domain are closed here, so that the daemon can open them.
    rows.check("crash and recover", || crash::crash_and_recover(options));
    if let Some(mut rebound) = rebound {
        rows.check("give back", || match rebound.restore() {
            Ok(Some(binding)) => Ok(binding),
            Ok(None) => Err(CheckError::Skipped("it was bound to VFIO already".to_owned())),
            Err(error) => Err(CheckError::Failed(error)),
        });
    }
    let count = |outcome| rows.rows.iter().filter(|row| row.outcome == outcome).count();
    Ok(Report {
        device: options.device.clone(),
        iommu,
        passed: count(Outcome::Pass),
        failed: count(Outcome::Fail),
        skipped: count(Outcome::Skip),
        checks: rows.rows,
    })
}

/// Binds the device to vfio-pci if [`Options::bind`] is set. Returns an error if the device is in use.
fn rebind(options: &Options) -> Result<Option<Rebound>> {
    let sysfs = Path::new(passgate_bindings::vfio::pci::SYSFS);
    let Ok(address) = options.device.parse() else { return Ok(None) };
    if options.bind
        && let Some(pci) = PciDevice::find(sysfs, address)
    {
        check_vfio_accepts(sysfs, &pci)?;
    }
    let host = in_use::Host { sysfs, proc: Path::new("/proc"), dev: Path::new("/dev") };
    let claims =
        in_use::claim(host, address).map_err(|by| Error::InUse { device: options.device.clone(), by })?;
    if !options.bind {
        return Ok(None);
    }
    Rebound::bind(sysfs, address, &options.program, claims).map(Some)
}
