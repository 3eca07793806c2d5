//! Subscribers of events: the replay of what they have missed, then events as they come.
//!
//! A replay is sent in small batches, as the subscriber reads them: it takes no memory beside the backlog, and delays no
//! other client.

use super::backlog::{Gap, Kind};
use super::connection::{Connection, ControlState};
use super::poller::Interest;
use super::vm::Vm;
use crate::gate::{ClientId, Notice};
use crate::observe::events;
use crate::protocol::verbs::Subscribe;

/// The number of events that are replayed at a time.
const REPLAY_BATCH: usize = 32;

impl Vm {
    /// Makes a connection a subscriber.
    pub(super) fn subscribe(&mut self, client: ClientId, subscribe: &Subscribe) {
        let start = self.backlog.start(subscribe.after, subscribe.instance.as_deref());
        let mut first = self.backlog.subscribed(&start);
        if let Some(gap) = start.gap {
            first.extend(self.backlog.gap(start.next, gap));
        }
        if let Some(connection) = self.connections.get_mut(&client) {
            connection.control = ControlState::Subscribed { next: start.next };
        }
        self.send_control(client, first, None);
        // The replay starts when the socket has room.
        if start.next <= self.backlog.last() {
            self.watch_control(client, Interest::Write);
        }
    }

    /// Sends a subscriber, whose socket has room, the next batch of the events that it has missed. Returns false if it has
    /// missed none.
    pub(super) fn replay(&mut self, client: ClientId) -> bool {
        let Some(connection) = self.connections.get_mut(&client) else { return false };
        let ControlState::Subscribed { next: from } = connection.control else { return false };
        if from > self.backlog.last() {
            return false;
        }
        let mut frames = Vec::new();
        let mut next = from;
        for _ in 0..REPLAY_BATCH {
            let Some((sequence, frame)) = self.backlog.from(next) else { break };
            if sequence > next {
                let gap = Gap { lost: sequence - next, restarted: false };
                frames.extend(self.backlog.gap(sequence, gap));
            }
            frames.extend_from_slice(frame);
            next = sequence + 1;
        }
        connection.control = ControlState::Subscribed { next };
        connection.send(frames, None);
        if next > self.backlog.last() && !connection.is_behind() {
            self.watch_control(client, Interest::Read);
        }
        true
    }

    /// Logs a notice, adds it to the backlog, and sends it to the subscribers that have no replay pending; the others
    /// reach it in their replay.
    pub(super) fn publish(&mut self, notice: &Notice) {
        let (event, details) = events::describe(notice, &self.session);
        match notice {
            Notice::Refused { .. } | Notice::Quarantined { .. } | Notice::Released { .. } => {
                log::warn!("{event} {details}");
            }
            _ => log::info!("{event} {details}"),
        }
        self.session.meter().count_notice(notice);
        self.backlog.remember(notice);
        let frame = self.backlog.push(Kind::of(notice), event, &details);
        let sequence = self.backlog.last();
        let up_to_date = |c: &Connection| c.control == ControlState::Subscribed { next: sequence };
        let subscribers = self.connections.iter().filter_map(|(client, c)| up_to_date(c).then_some(*client));
        for client in subscribers.collect::<Vec<ClientId>>() {
            if let Some(connection) = self.connections.get_mut(&client) {
                connection.control = ControlState::Subscribed { next: sequence + 1 };
            }
            self.send_control(client, frame.to_vec(), None);
        }
    }
}
