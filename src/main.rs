//! The `passgate` command: parses the command line, runs the subcommand, and prints an error in one line.

use std::process::ExitCode;

use passgate::cli::{self, Cli};

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_target(false)
        .init();
    match cli::run(Cli::of_process()) {
        Ok(code) => code,
        Err(error) => {
            cli::note(&error.to_string());
            ExitCode::from(error.exit_code())
        }
    }
}
