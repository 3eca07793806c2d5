//! The stream of the daemon's events.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use crate::client::{Client, Wait, check};
use crate::error::{Error, Result};
use crate::protocol::frame::FrameError;

/// The time between two attempts to reconnect.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(50);

/// An event.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// The sequence number, which counts all events of the daemon; the event `gap` reports missing ones.
    pub sequence: u64,
    /// The time of the event in milliseconds since 1970 (UTC), by the host's clock, which may be set: order events by
    /// `sequence`. 0 where the daemon does not report it.
    #[serde(default)]
    pub time_ms: u64,
    /// The name of the event: `range.refused`, `range.quarantined`, `session.closed`, `gap`, … (docs/protocol.md).
    pub event: String,
    /// The details, an object whose fields depend on the event (docs/protocol.md).
    #[serde(default)]
    pub details: Value,
}

/// The stream of events. The iterator blocks until the next event, without a timeout; it ends when the daemon closes the
/// connection, or after an error.
#[derive(Debug)]
pub struct Events {
    client: Client,
    ended: bool,
    instance: String,
    sequence: u64,
    /// The socket to reconnect to, and the time that reconnecting may take; see [`Events::resuming`].
    resume: Option<(PathBuf, Duration)>,
}

impl Events {
    pub(crate) fn new(client: Client, first: Event) -> Self {
        let instance = first.details["instance"].as_str().unwrap_or_default().to_owned();
        Self { client, ended: false, instance, sequence: first.sequence, resume: None }
    }

    /// Makes the stream resume after a broken connection: it connects to `path` again, for up to `timeout` each time, and
    /// requests the events since the last one. The event `gap` reports events that are lost, and a daemon that was
    /// restarted.
    pub fn resuming(mut self, path: impl Into<PathBuf>, timeout: Duration) -> Self {
        self.resume = Some((path.into(), timeout));
        self
    }

    /// Returns the daemon's instance name, which is new with every start.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Returns the sequence number of the last event received, for [`Client::subscribe_after`].
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Returns true where the next event has been read already: then the socket need not become readable.
    pub fn has_next(&self) -> bool {
        self.client.frames.has_frame()
    }

    fn receive(&mut self) -> Result<Event> {
        let (reply, _) = self.client.receive(Wait::Event)?;
        self.ended = !reply.continues;
        serde_json::from_value(check(reply)?).map_err(|error| Error::Protocol(error.to_string()))
    }

    /// Connects again and subscribes to the events after the last one received. Returns false where that was not possible
    /// in time.
    fn reconnect(&mut self) -> bool {
        let Some((path, timeout)) = self.resume.clone() else { return false };
        let start = Instant::now();
        loop {
            let client = Client::connect_within(&path, self.client.timeout);
            match client.and_then(|client| client.subscribe_after(self.sequence, Some(&self.instance))) {
                Ok(events) => {
                    if events.instance != self.instance {
                        // Sequence numbers of different instances are not comparable.
                        self.sequence = events.sequence;
                    }
                    (self.client, self.instance) = (events.client, events.instance);
                    return true;
                }
                Err(_) if start.elapsed() < timeout => std::thread::sleep(RECONNECT_INTERVAL),
                Err(_) => return false,
            }
        }
    }
}

impl Iterator for Events {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Result<Event>> {
        while !self.ended {
            match self.receive() {
                Ok(event) => {
                    self.sequence = event.sequence;
                    return Some(Ok(event));
                }
                Err(Error::Frame(_) | Error::Connection(_)) if self.reconnect() => {}
                Err(error) => {
                    self.ended = true;
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
