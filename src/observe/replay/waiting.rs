//! Who waits for an answer: each request has one, once.

use std::collections::HashMap;

use crate::gate::{Caller, ClientId, Door};

/// Requests without an answer, by the clients that are there.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Whether every request was seen.
    whole: bool,
    clients: HashMap<ClientId, HashMap<(bool, u64), u32>>,
}

fn key(caller: Caller) -> (bool, u64) {
    (caller.door == Door::Channel, caller.cookie)
}

impl Waiting {
    pub(super) fn new(whole: bool) -> Self {
        Self { whole, clients: HashMap::new() }
    }

    pub(super) fn asked(&mut self, caller: Caller) {
        *self.clients.entry(caller.client).or_default().entry(key(caller)).or_default() += 1;
    }

    /// Takes an answer down; false where nobody waits for it. Of clients that were never seen to ask, or are gone,
    /// nothing is known.
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

    pub(super) fn gone(&mut self, client: ClientId) {
        self.clients.remove(&client);
    }
}
