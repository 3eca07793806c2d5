//! `passgate events`: prints the events of a daemon.

use std::os::fd::AsFd;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{ControlSocket, Output, WaitResult, note, print_next_line};
use crate::client::Event;
use crate::error::Result;

/// Prints the events of a daemon as they occur.
#[derive(Debug, Args)]
pub(super) struct EventsOf {
    #[command(flatten)]
    control: ControlSocket,
    /// First print the stored events after this sequence number; 0 for all of them
    #[arg(long, value_name = "N")]
    after: Option<u64>,
    /// Instance of the daemon that --after refers to, as `status` prints it; another instance prints all its events
    #[arg(long, value_name = "X", requires = "after")]
    instance: Option<String>,
    #[command(flatten)]
    output: Output,
}

impl EventsOf {
    pub(super) fn run(self) -> Result<ExitCode> {
        let client = self.control.connect()?;
        let events = match self.after {
            Some(after) => client.subscribe_after(after, self.instance.as_deref())?,
            None => client.subscribe()?,
        };
        let mut events = events;
        loop {
            // Ends also while there are no events, once stdout is closed.
            if !events.has_next() && super::wait(&[events.as_fd()], None)? == WaitResult::OutputClosed {
                return Ok(ExitCode::SUCCESS);
            }
            let Some(event) = events.next().transpose()? else { break };
            let line = if self.output.json {
                json!({
                    "instance": events.instance(), "sequence": event.sequence, "time_ms": event.time_ms,
                    "event": event.event, "details": event.details,
                })
                .to_string()
            } else {
                text(&event)
            };
            if print_next_line(&line)?.is_break() {
                return Ok(ExitCode::SUCCESS);
            }
        }
        note("the daemon has closed the connection");
        Ok(ExitCode::SUCCESS)
    }
}

/// Returns an event as one line of text.
pub(super) fn text(event: &Event) -> String {
    format!("{} {} {} {}", utc(event.time_ms), event.sequence, event.event, event.details)
}

/// Returns a time in milliseconds since 1970 as RFC 3339 text in UTC.
fn utc(time_ms: u64) -> String {
    let (days, ms) = (time_ms / 86_400_000, time_ms % 86_400_000);
    let (seconds, ms) = (ms / 1000, ms % 1000);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

/// Returns year, month and day of the day `days` after 1970-01-01, in the Gregorian calendar.
fn date(days: u64) -> (u64, u64, u64) {
    // Years begin in March here, so that a leap day is the last day of its year. An era has 400 years or 146 097 days;
    // 719 468 days lie between 0000-03-01 and 1970-01-01.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let first = (153 * month + 2) / 5;
    let (next_year, month_number) = if month < 10 { (0, month + 3) } else { (1, month - 9) };
    (era * 400 + year + next_year, month_number, day - first + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_time_is_printed_as_rfc3339_utc() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_709_210_096_007, "2024-02-29T12:34:56.007Z"),
            (1_735_689_599_000, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(utc(ms), text);
        }
    }
}
