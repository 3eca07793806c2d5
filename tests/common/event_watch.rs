//! The event stream, read on a thread of its own, so that a test whose event never arrives fails instead of hanging.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use passgate_client::{Client, Event};

/// The longest time that a test waits for an event.
const EVENT_TIMEOUT: Duration = Duration::from_secs(60);

/// The events of one subscription.
pub struct EventWatch {
    events: Receiver<Event>,
}

impl EventWatch {
    pub fn new(client: Client) -> Self {
        let events = client.subscribe().unwrap();
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            for event in events {
                let Ok(event) = event else { return };
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Self { events: receiver }
    }

    /// Waits for the next event of this name; those before it are skipped.
    #[track_caller]
    pub fn wait(&self, name: &str) -> Event {
        loop {
            match self.events.recv_timeout(EVENT_TIMEOUT) {
                Ok(event) if event.event == name => return event,
                Ok(_) => {}
                Err(error) => panic!("{name} never came: {error}"),
            }
        }
    }

    /// Returns true if an event of this name arrives within `timeout`.
    pub fn arrives_within(&self, name: &str, timeout: Duration) -> bool {
        let end = std::time::Instant::now() + timeout;
        loop {
            let remaining = end.saturating_duration_since(std::time::Instant::now());
            match self.events.recv_timeout(remaining) {
                Ok(event) if event.event == name => return true,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => panic!("the stream has ended"),
            }
        }
    }
}
