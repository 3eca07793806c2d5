//! A person's word against a quarantine: who may give it, and that it is written down (docs/threat-model.md).

use rustix::net::sockopt::socket_peercred;

use super::control::Said;
use super::vm::Vm;
use crate::gate::{Caller, Event, InvalidationId, ORPHANS};
use crate::protocol::verbs::Release;

/// `EPERM`
const PERM: i32 = 1;

impl Vm {
    /// Gives the memory that an earlier daemon's clients had to this one.
    pub(super) fn adopt(&mut self, caller: Caller) -> Said {
        self.session.handle(Event::Adopt { caller });
        Said::Later
    }

    /// Nobody has come back for what an earlier daemon's clients had: it goes as that of a client that went away.
    pub(super) fn give_up_orphans(&mut self) {
        if self.session.has_orphans() {
            log::warn!("nobody has adopted the memory of an earlier daemon's clients: it is closed");
        }
        self.session.handle(Event::ClientGone { client: ORPHANS });
    }

    /// Takes a range out of quarantine because a person says so.
    pub(super) fn release(&mut self, caller: Caller, release: Release) -> Said {
        if !self.options.allow_release {
            let message = "no quarantine is released here: the daemon runs with --no-release";
            return Said::Wrong(message.into(), PERM);
        }
        let Some(connection) = self.connections.get(&caller.client) else { return Said::Later };
        let invalidation = InvalidationId(release.invalidation);
        if connection.speaks_for_vm && !self.session.may_settle(caller.client, invalidation) {
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
        let to = release.to;
        let word = crate::gate::PageState::from(to).word();
        log::warn!("{who} asks to release the quarantine of invalidation {} as {word}", invalidation.0);
        self.session.handle(Event::Release { caller, invalidation, to: to.into() });
        Said::Later
    }
}
