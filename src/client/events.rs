//! The stream of notices, as the daemon tells them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use super::{Client, Wait, check};
use crate::error::{Error, Result};
use crate::protocol::frame::FrameError;

/// Between two tries to reach a daemon that has gone.
const PAUSE: Duration = Duration::from_millis(50);

/// One notice.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// Counts every notice of the daemon; a gap says that some are missing.
    pub sequence: u64,
    /// When it happened, in milliseconds since 1970 (UTC) by the host's clock, which may be set. 0 from a daemon that does
    /// not say.
    #[serde(default)]
    pub time_ms: u64,
    /// What happened: `range.refused`, `range.quarantined`, `session.closed`, `gap`, … (docs/protocol.md).
    pub event: String,
    /// Where, why, by whom.
    #[serde(default)]
    pub details: Value,
}

/// The stream of notices: blocks for the next one, for as long as nothing happens; ends when the daemon does, or after
/// an error.
#[derive(Debug)]
pub struct Events {
    client: Client,
    over: bool,
    instance: String,
    sequence: u64,
    resume: Option<(PathBuf, Duration)>,
}

impl Events {
    pub(super) fn new(client: Client, first: Event) -> Self {
        let instance = first.details["instance"].as_str().unwrap_or_default().to_owned();
        Self { client, over: false, instance, sequence: first.sequence, resume: None }
    }

    /// The stream goes on where it breaks: it connects to `path` again and asks for what came meanwhile, for as
    /// long as `patience` each time. What is lost all the same is told as the event `gap`; so is a daemon that is
    /// another by then.
    pub fn resuming(mut self, path: impl Into<PathBuf>, patience: Duration) -> Self {
        self.resume = Some((path.into(), patience));
        self
    }

    /// Which daemon this is: new with every start.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// The sequence number of the last event heard, for [`Client::subscribe_after`].
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// True where the next event has been read already, so that the socket need not become readable for it.
    pub fn has_next(&self) -> bool {
        self.client.frames.has_frame()
    }

    fn receive(&mut self) -> Result<Event> {
        let (reply, _) = self.client.receive(Wait::Event)?;
        self.over = !reply.continues;
        serde_json::from_value(check(reply)?).map_err(|error| Error::Protocol(error.to_string()))
    }

    /// Connects again, and goes on behind the last event heard; whether that was possible in time.
    fn again(&mut self) -> bool {
        let Some((path, patience)) = self.resume.clone() else { return false };
        let begun = Instant::now();
        loop {
            let client = Client::connect_within(&path, self.client.timeout);
            match client.and_then(|client| client.subscribe_after(self.sequence, Some(&self.instance))) {
                Ok(again) => {
                    if again.instance != self.instance {
                        // The numbers of an earlier instance say nothing of the new one's.
                        self.sequence = again.sequence;
                    }
                    (self.client, self.instance) = (again.client, again.instance);
                    return true;
                }
                Err(_) if begun.elapsed() < patience => std::thread::sleep(PAUSE),
                Err(_) => return false,
            }
        }
    }
}

impl Iterator for Events {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Result<Event>> {
        while !self.over {
            match self.receive() {
                Ok(event) => {
                    self.sequence = event.sequence;
                    return Some(Ok(event));
                }
                Err(Error::Frame(_) | Error::Connection(_)) if self.again() => {}
                Err(error) => {
                    self.over = true;
                    return match error {
                        Error::Frame(FrameError::Closed) => None,
                        error => Some(Err(error)),
                    };
                }
            }
        }
        None
    }
}

impl std::os::fd::AsFd for Events {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.client.as_fd()
    }
}
