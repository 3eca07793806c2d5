//! The requests that are not answered: each must be answered exactly once.

use std::collections::HashMap;

use crate::gate::{Caller, ClientId, Door};

/// The requests without an answer, by client.
#[derive(Debug)]
pub(super) struct Unanswered {
    /// True if every request since the daemon's start was read.
    whole: bool,
    /// The number of requests by socket and cookie: a client may use a cookie twice.
    clients: HashMap<ClientId, HashMap<(bool, u64), u32>>,
}

fn key(caller: Caller) -> (bool, u64) {
    (caller.door == Door::Channel, caller.cookie)
}

impl Unanswered {
    pub(super) fn new(whole: bool) -> Self {
        Self { whole, clients: HashMap::new() }
    }

    /// Records a request.
    pub(super) fn requested(&mut self, caller: Caller) {
        *self.clients.entry(caller.client).or_default().entry(key(caller)).or_default() += 1;
    }

    /// Records an answer. Returns false if its caller does not wait for one. Every answer to a client without a request, or that is
    /// gone, is accepted.
    pub(super) fn answered(&mut self, caller: Caller) -> bool {
        let Some(requests) = self.clients.get_mut(&caller.client) else { return true };
        match requests.get_mut(&key(caller)) {
            None => !self.whole,
            Some(count) => {
                *count -= 1;
                if *count == 0 {
                    requests.remove(&key(caller));
                }
                true
            }
        }
    }

    /// Forgets the requests of a client that is gone.
    pub(super) fn gone(&mut self, client: ClientId) {
        self.clients.remove(&client);
    }
}
