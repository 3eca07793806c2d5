//! `passgate events`.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{Daemon, Output, line};
use crate::error::Result;

/// Prints what happens in a daemon, as it happens.
#[derive(Debug, Args)]
pub(super) struct EventsOf {
    #[command(flatten)]
    daemon: Daemon,
    #[command(flatten)]
    output: Output,
}

impl EventsOf {
    pub(super) fn run(self) -> Result<ExitCode> {
        for event in self.daemon.connect()?.subscribe()? {
            let event = event?;
            if self.output.json {
                let said =
                    json!({ "sequence": event.sequence, "event": event.event, "details": event.details });
                line(&said.to_string())?;
            } else {
                line(&format!("{} {} {}", event.sequence, event.event, event.details))?;
            }
        }
        eprintln!("passgate: the daemon has gone");
        Ok(ExitCode::SUCCESS)
    }
}
