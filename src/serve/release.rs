//! A person's word against a quarantine: who may give it, and that it is written down (docs/threat-model.md).

use rustix::net::sockopt::socket_peercred;

use super::control::Said;
use super::vm::Vm;
use crate::gate::{Caller, Event, InvalidationId};
use crate::protocol::verbs::Release;

/// `EPERM`
const PERM: i32 = 1;

impl Vm {
    /// Takes a range out of quarantine because a person says so.
    pub(super) fn release(&mut self, caller: Caller, release: Release) -> Said {
        if !self.options.allow_release {
            let message = "no quarantine is released here: the daemon runs with --no-release";
            return Said::Wrong(message.into(), PERM);
        }
        let Some(connection) = self.connections.get(&caller.client) else { return Said::Later };
        if connection.speaks_for_vm {
            let message = "this connection speaks for a VM, which may not release its own quarantine: \
                           let a person call `passgate release`";
            return Said::Wrong(message.into(), PERM);
        }
        let who = match socket_peercred(&connection.socket) {
            Ok(peer) => format!("pid {} uid {}", peer.pid.as_raw_nonzero(), peer.uid.as_raw()),
            Err(errno) => {
                return Said::Wrong(format!("cannot find out who asks for a release: {errno}"), PERM);
            }
        };
        let Release { invalidation, to } = release;
        let word = crate::gate::PageState::from(to).word();
        log::warn!("{who} asks to release the quarantine of invalidation {invalidation} as {word}");
        let invalidation = InvalidationId(invalidation);
        self.session.handle(Event::Release { caller, invalidation, to: to.into() });
        Said::Later
    }
}
