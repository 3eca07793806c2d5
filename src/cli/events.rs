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
    /// First print what the daemon still has of what came after this sequence number; 0 for all of it
    #[arg(long, value_name = "N")]
    after: Option<u64>,
    /// The daemon that the number is of, as `status` names it: to another, everything is new
    #[arg(long, value_name = "X", requires = "after")]
    instance: Option<String>,
    #[command(flatten)]
    output: Output,
}

impl EventsOf {
    pub(super) fn run(self) -> Result<ExitCode> {
        let client = self.daemon.connect()?;
        let events = match self.after {
            Some(after) => client.subscribe_after(after, self.instance.as_deref())?,
            None => client.subscribe()?,
        };
        let instance = events.instance().to_owned();
        for event in events {
            let event = event?;
            if self.output.json {
                let said = json!({
                    "instance": instance, "sequence": event.sequence, "event": event.event,
                    "details": event.details,
                });
                line(&said.to_string())?;
            } else {
                line(&format!("{} {} {}", event.sequence, event.event, event.details))?;
            }
        }
        eprintln!("passgate: the daemon has gone");
        Ok(ExitCode::SUCCESS)
    }
}
