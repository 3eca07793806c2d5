//! `passgate selftest`: see [`crate::selftest`].

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::daemon::Iommu;
use super::{Output, print_line};
use crate::error::Result;
use crate::selftest::{self, Options, Report, Row};

/// Tests on a device of this host what stops its DMA.
#[derive(Debug, Args)]
pub(super) struct Selftest {
    /// Device to test: a PCI address, or soft:0
    #[arg(long, value_name = "BDF")]
    device: String,
    /// IOMMU interface
    #[arg(long, value_enum, default_value_t = Iommu::Auto)]
    iommu: Iommu,
    /// Unbind the device from its driver for the test, and bind it again, even
    /// if the test is killed
    #[arg(long)]
    bind: bool,
    /// Allow overwriting the last blocks of a drive, to check what it reads from memory
    #[arg(long)]
    scratch: bool,
    /// Skip the check that kills a daemon
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
        // Each row as soon as its check has ended: some checks take seconds.
        let mut report_row = |row: &Row| {
            if !json {
                let _ = print_line(&row.text());
            }
        };
        let report = selftest::run(&options, &mut report_row)?;
        self.output.print(&report, Report::summary)?;
        Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
