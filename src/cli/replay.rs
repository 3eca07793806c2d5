//! `passgate replay`: checks that an audit log supports the answers of its daemon. Exit code 0 if it does, 1 if it does
//! not, 2 if it cannot be read.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::Output;
use crate::error::Result;
use crate::observe::replay::{Report, RunReport, replay};

/// Checks an audit log: replays the gate, checks call results.
#[derive(Debug, Args)]
pub(super) struct Replay {
    /// Files of an audit log, or its state directory
    #[arg(value_name = "LOG", required = true)]
    log: Vec<PathBuf>,
    #[command(flatten)]
    output: Output,
}

impl Replay {
    pub(super) fn run(self) -> Result<ExitCode> {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) =
            ProgressStyle::with_template("{bytes} of {total_bytes} ({eta} remaining) {wide_bar}")
        {
            bar.set_style(style);
        }
        let report = replay(&self.log, |read, all| {
            bar.set_length(all);
            bar.set_position(read);
        });
        bar.finish_and_clear();
        let report = report?;
        self.output.print(&report, text)?;
        Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn text(report: &Report) -> String {
    let lines: Vec<String> = report.runs.iter().map(run).collect();
    lines.join("\n")
}

fn run(run: &RunReport) -> String {
    let problems = run.problems.len() as u64 + run.more;
    let result = if problems == 0 { "clean".to_owned() } else { format!("{problems} problems") };
    let mut text = format!("run {}: {} lines, {} answers: {result}", run.run, run.lines, run.answers);
    for note in &run.notes {
        _ = write!(text, "\n  note: {note}");
    }
    for problem in &run.problems {
        _ = write!(text, "\n  line {}: {}", problem.n, problem.what);
    }
    if run.more > 0 {
        _ = write!(text, "\n  and {} more", run.more);
    }
    text
}
