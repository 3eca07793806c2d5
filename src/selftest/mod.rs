//! The test that an operator runs on a real device: finds out what stops its DMA by doing it.
//!
//! Checks never touch what the device holds: DMA goes to and from memory of the test's own. A driver that can only
//! move bytes by writing to the device's medium does so where it was told that it may (`--scratch`).

pub mod borrow;
mod checks;
pub mod crash;
pub mod in_use;
mod pump;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use passgate_backends::device::refusal::withheld;
use passgate_backends::{Accept, Assignment, Kind, Tables};
use passgate_bindings::vfio::pci::PciDevice;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::host::taking::take;
use borrow::Borrowed;
use checks::Bench;

/// What to test, and how far to go.
#[derive(Debug, Clone)]
pub struct Options {
    /// A PCI address, or `soft:0`.
    pub device: String,
    /// The IOMMU interface.
    pub iommu: Kind,
    /// Whether to take the device from its driver for the test, and give it back.
    pub bind: bool,
    /// Whether the last blocks of a drive may be overwritten, to see what it reads.
    pub scratch: bool,
    /// This program, which runs the daemon that is killed, and the helper that gives the device back.
    pub program: PathBuf,
    /// Whether a daemon is killed.
    pub crash: bool,
}

/// How long to wait for a device that somebody is about to let go of.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was done, and what was to be seen was seen.
    Pass,
    /// It was done, and it was not.
    Fail,
    /// It could not be done.
    Skip,
}

/// One check.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Its name.
    pub check: &'static str,
    /// How it went.
    pub outcome: Outcome,
    /// What was seen, or why it could not be done.
    pub detail: String,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
}

/// All checks of one device.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The device.
    pub device: String,
    /// The domain it was tested in.
    pub iommu: String,
    /// The checks, in their order.
    pub checks: Vec<Row>,
    /// How many passed, failed and were skipped.
    pub passed: usize,
    /// Failed.
    pub failed: usize,
    /// Skipped.
    pub skipped: usize,
}

impl Report {
    /// Whether nothing failed, and something passed.
    pub fn is_good(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }

    /// The last line of the table.
    pub fn summary(&self) -> String {
        let Self { device, iommu, passed, failed, skipped, .. } = self;
        format!("{device} in {iommu}: {passed} passed, {failed} failed, {skipped} skipped")
    }
}

impl Row {
    /// In one line.
    pub fn text(&self) -> String {
        let word = match self.outcome {
            Outcome::Pass => "pass",
            Outcome::Fail => "FAIL",
            Outcome::Skip => "skip",
        };
        format!("{word}  {:<22} {:>9.1} ms  {}", self.check, self.took_ms, self.detail)
    }
}

/// What a check comes to: what was seen, or `Skip` with why not.
type Checked = std::result::Result<String, Trouble>;

/// Why a check did not pass.
#[derive(Debug)]
enum Trouble {
    /// What was seen instead.
    Failed(String),
    /// Why it could not be done.
    Skipped(String),
}

impl<E: std::error::Error> From<E> for Trouble {
    fn from(error: E) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Collects rows and tells each as it comes.
struct Rows<'a> {
    rows: Vec<Row>,
    tell: &'a mut dyn FnMut(&Row),
}

impl Rows<'_> {
    fn check(&mut self, check: &'static str, does: impl FnOnce() -> Checked) {
        let begun = Instant::now();
        let (outcome, detail) = match does() {
            Ok(seen) => (Outcome::Pass, seen),
            Err(Trouble::Failed(instead)) => (Outcome::Fail, instead),
            Err(Trouble::Skipped(why)) => (Outcome::Skip, why),
        };
        let row = Row { check, outcome, detail, took_ms: begun.elapsed().as_secs_f64() * 1e3 };
        (self.tell)(&row);
        self.rows.push(row);
    }
}

/// Tests the device; `tell` hears each check as it is over. An error is a device that could not be tested at all.
pub fn run(options: &Options, tell: &mut dyn FnMut(&Row)) -> Result<Report> {
    let borrowed = borrow(options)?;
    let mut rows = Rows { rows: Vec::new(), tell };
    let mut iommu = String::new();
    {
        // What cannot be stopped is what the test is to find out.
        let accept = Accept { unstoppable: true, scratch: options.scratch, drive: None };
        let Assignment { domain, devices, .. } =
            take(options.iommu, std::slice::from_ref(&options.device), accept, Tables::default(), PATIENCE)?;
        let Some(device) = devices.into_iter().next() else {
            return Err(Error::Usage(format!("`{}` names no device", options.device)));
        };
        iommu += domain.name();
        let bench = Bench::new(device, domain)?;
        rows.check("stop class", || Ok(bench.described()));
        rows.check("map and unmap", || bench.maps());
        rows.check("DMA", || bench.dma());
        rows.check("unmap under DMA", || bench.unmaps_under_dma());
        for (name, step) in checks::FENCES {
            rows.check(name, || bench.fence(name, step));
        }
    }
    rows.check("crash and recover", || crash::recovers(options));
    if let Some(mut borrowed) = borrowed {
        rows.check("give back", || match borrowed.give_back() {
            Ok(Some(now)) => Ok(now),
            Ok(None) => Err(Trouble::Skipped("it was bound to VFIO already".to_owned())),
            Err(why) => Err(Trouble::Failed(why)),
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

/// Takes the device from its driver, where it has one, nobody uses it, and the operator said so.
fn borrow(options: &Options) -> Result<Option<Borrowed>> {
    let sysfs = Path::new(passgate_bindings::vfio::pci::SYSFS);
    let Ok(address) = options.device.parse() else { return Ok(None) };
    if options.bind
        && let Some(pci) = PciDevice::find(sysfs, address)
    {
        withheld(sysfs, &pci)?;
    }
    let host = in_use::Host { sysfs, proc: Path::new("/proc"), dev: Path::new("/dev") };
    let claims =
        in_use::claim(host, address).map_err(|by| Error::InUse { device: options.device.clone(), by })?;
    if !options.bind {
        return Ok(None);
    }
    Borrowed::take(sysfs, address, &options.program, claims).map(Some)
}
