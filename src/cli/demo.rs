//! `passgate demo`: see [`crate::demo`].

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::Output;
use crate::demo::{self, Counters, Options};
use crate::error::Result;

/// Converts memory under DMA, without passthrough hardware.
#[derive(Debug, Args)]
pub(super) struct Demo {
    /// Duration in seconds
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Map the memory once and never unmap it, and see the stale DMA
    #[arg(long)]
    pins: bool,
    #[command(flatten)]
    output: Output,
}

impl Demo {
    pub(super) fn run(self) -> Result<ExitCode> {
        let bar = ProgressBar::new(self.seconds * 10);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {msg}") {
            bar.set_style(style);
        }
        // indicatif hides the bar itself if stderr is not a terminal.
        bar.enable_steady_tick(Duration::from_millis(200));
        let progress = |seconds: f64, counters: &Counters| {
            bar.set_position((seconds * 10.0) as u64);
            bar.set_message(counters.line(seconds));
        };
        let summary = demo::run(Options { seconds: self.seconds, pins: self.pins }, progress)?;
        bar.finish_and_clear();
        if let Some(instead) = &summary.instead {
            super::note(&format!("no guest_memfd on this machine, a memfd is used: {instead}"));
        }
        self.output.print(&summary, demo::Summary::text)?;
        Ok(if summary.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
