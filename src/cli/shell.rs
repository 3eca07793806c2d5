//! `passgate completions` and `passgate man`: generated from the definition of the command line, so that they always
//! match it.

use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use crate::error::{Error, Result};

/// Prints completions for a shell.
#[derive(Debug, Args)]
pub(super) struct Completions {
    /// Shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> Result<ExitCode> {
        let mut bytes = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "passgate", &mut bytes);
        print_bytes(&bytes)
    }
}

pub(super) fn man() -> Result<ExitCode> {
    let mut bytes = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut bytes).map_err(Error::Output)?;
    print_bytes(&bytes)
}

fn print_bytes(bytes: &[u8]) -> Result<ExitCode> {
    super::print_line(&String::from_utf8_lossy(bytes))?;
    Ok(ExitCode::SUCCESS)
}
