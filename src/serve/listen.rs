//! Who listens: events as they come, and before them what was missed.
//!
//! What is replayed is sent a little at a time, as the listener reads it: nothing of it waits in memory twice, and
//! nobody else waits for it.

use super::backlog::{Gap, Kind};
use super::connection::{Connection, Waiting};
use super::poller::Interest;
use super::vm::Vm;
use crate::gate::{ClientId, Notice};
use crate::observe::events;
use crate::protocol::verbs::Subscribe;

/// Events that are replayed at a time.
const BATCH: usize = 32;

impl Vm {
    /// Makes a connection a listener.
    pub(super) fn listen(&mut self, client: ClientId, subscribe: &Subscribe) {
        let start = self.backlog.start(subscribe.after, subscribe.instance.as_deref());
        let mut first = self.backlog.subscribed(&start);
        if let Some(gap) = start.gap {
            first.extend(self.backlog.gap(start.next, gap));
        }
        if let Some(connection) = self.connections.get_mut(&client) {
            connection.waiting = Waiting::Notices { next: start.next };
        }
        self.send_control(client, first, None);
        if start.next <= self.backlog.last() {
            self.watch_control(client, Interest::Write);
        }
    }

    /// Sends a listener, whose socket has room, the next of what it has missed; whether it had missed anything.
    pub(super) fn replay(&mut self, client: ClientId) -> bool {
        let Some(connection) = self.connections.get_mut(&client) else { return false };
        let Waiting::Notices { next: from } = connection.waiting else { return false };
        if from > self.backlog.last() {
            return false;
        }
        let mut frames = Vec::new();
        let mut next = from;
        for _ in 0..BATCH {
            let Some((sequence, frame)) = self.backlog.from(next) else { break };
            if sequence > next {
                let gap = Gap { lost: sequence - next, restarted: false };
                frames.extend(self.backlog.gap(sequence, gap));
            }
            frames.extend_from_slice(frame);
            next = sequence + 1;
        }
        connection.waiting = Waiting::Notices { next };
        connection.send(frames, None);
        if next > self.backlog.last() && !connection.is_behind() {
            self.watch_control(client, Interest::Read);
        }
        true
    }

    /// Tells everybody who listens. Who is behind will come to it.
    pub(super) fn notice(&mut self, notice: &Notice) {
        let (event, details) = events::describe(notice, &self.session);
        match notice {
            Notice::Refused { .. } | Notice::Quarantined { .. } | Notice::Released { .. } => {
                log::warn!("{event} {details}");
            }
            _ => log::info!("{event} {details}"),
        }
        self.session.meter().told(notice);
        self.backlog.remember(notice);
        let frame = self.backlog.push(Kind::of(notice), event, &details);
        let sequence = self.backlog.last();
        let hears = |c: &Connection| c.waiting == Waiting::Notices { next: sequence };
        let listening = self.connections.iter().filter_map(|(client, c)| hears(c).then_some(*client));
        for client in listening.collect::<Vec<ClientId>>() {
            if let Some(connection) = self.connections.get_mut(&client) {
                connection.waiting = Waiting::Notices { next: sequence + 1 };
            }
            self.send_control(client, frame.to_vec(), None);
        }
    }
}
