//! `passgate completions` and `passgate man`: made from the command line itself, so that they are never behind.

use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use crate::error::{Error, Result};

/// Prints completions for a shell.
#[derive(Debug, Args)]
pub(super) struct Completions {
    /// Which shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> Result<ExitCode> {
        let mut bytes = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "passgate", &mut bytes);
        print(&bytes)
    }
}

pub(super) fn man() -> Result<ExitCode> {
    let mut bytes = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut bytes).map_err(Error::Output)?;
    print(&bytes)
}

fn print(bytes: &[u8]) -> Result<ExitCode> {
    super::line(&String::from_utf8_lossy(bytes))?;
    Ok(ExitCode::SUCCESS)
}
