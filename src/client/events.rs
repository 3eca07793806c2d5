//! The stream of notices, as the daemon tells them.

use serde::Deserialize;
use serde_json::Value;

use super::{Client, check};
use crate::error::{Error, Result};
use crate::protocol::frame::FrameError;

/// One notice.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// Counts every notice of the daemon; a gap says that some are missing.
    pub sequence: u64,
    /// What happened: `range.refused`, `range.quarantined`, `session.closed`, … (docs/protocol.md).
    pub event: String,
    /// Where, why, by whom.
    #[serde(default)]
    pub details: Value,
}

/// The stream of notices: blocks for the next one; ends when the daemon does, or after an error.
#[derive(Debug)]
pub struct Events {
    client: Client,
    over: bool,
}

impl Events {
    pub(super) fn new(client: Client) -> Self {
        Self { client, over: false }
    }

    fn receive(&mut self) -> Result<Event> {
        let (reply, _) = self.client.receive()?;
        self.over = !reply.continues;
        serde_json::from_value(check(reply)?).map_err(|error| Error::Protocol(error.to_string()))
    }
}

impl Iterator for Events {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Result<Event>> {
        if self.over {
            return None;
        }
        let event = self.receive();
        self.over |= event.is_err();
        match event {
            Err(Error::Frame(FrameError::Closed)) => None,
            event => Some(event),
        }
    }
}

impl std::os::fd::AsFd for Events {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.client.as_fd()
    }
}
