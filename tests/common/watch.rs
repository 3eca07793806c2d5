//! The event stream, read on a thread of its own, so that a test that waits in vain fails instead of hanging.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use passgate::client::{Client, Event};

const PATIENCE: Duration = Duration::from_secs(60);

pub struct Watch {
    events: Receiver<Event>,
}

impl Watch {
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

    /// Waits for the next event of this name; the others before it are let go by.
    #[track_caller]
    pub fn wait(&self, name: &str) -> Event {
        loop {
            match self.events.recv_timeout(PATIENCE) {
                Ok(event) if event.event == name => return event,
                Ok(_) => {}
                Err(error) => panic!("{name} never came: {error}"),
            }
        }
    }

    /// Whether an event of this name comes within `patience`.
    pub fn comes(&self, name: &str, patience: Duration) -> bool {
        let end = std::time::Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) if event.event == name => return true,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => panic!("the stream has ended"),
            }
        }
    }
}
