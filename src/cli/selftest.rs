//! `passgate selftest`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::engine::Iommu;
use super::{Output, line};
use crate::error::Result;
use crate::selftest::{self, Options, Report, Row};

/// Tests how a device of this host can be stopped, by doing it.
#[derive(Debug, Args)]
pub(super) struct Selftest {
    /// The device: a PCI address, or soft:0
    #[arg(long, value_name = "BDF")]
    device: String,
    /// The IOMMU interface
    #[arg(long, value_enum, default_value_t = Iommu::Auto)]
    iommu: Iommu,
    /// Take the device from its driver for the test, and give it back, also
    /// where the test is killed
    #[arg(long)]
    bind: bool,
    /// Overwrite the last blocks of a drive, to see what it reads; without, it only writes memory
    #[arg(long)]
    scratch: bool,
    /// Leave the crash of a daemon out
    #[arg(long)]
    no_crash: bool,
    #[command(flatten)]
    output: Output,
}

impl Selftest {
    pub(super) fn run(self) -> Result<ExitCode> {
        let options = Options {
            device: self.device,
            iommu: self.iommu.into(),
            bind: self.bind,
            scratch: self.scratch,
            program: PathBuf::from("/proc/self/exe"),
            crash: !self.no_crash,
        };
        let json = self.output.json;
        // Each line as it comes: some checks take seconds.
        let mut tell = |row: &Row| {
            if !json {
                let _ = line(&row.text());
            }
        };
        let report = selftest::run(&options, &mut tell)?;
        self.output.print(&report, Report::summary)?;
        Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
