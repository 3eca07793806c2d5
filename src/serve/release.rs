//! Release of a quarantine by an operator, and adoption of an earlier daemon's memory: who may call them
//! (docs/threat-model.md). Each call that may release is logged with the caller's pid and uid.

use rustix::net::sockopt::socket_peercred;

use super::control::CallOutcome;
use super::vm::Vm;
use crate::gate::{Caller, Event, InvalidationId, ORPHANS};
use crate::protocol::verbs::Release;

/// `EPERM` (errno(3)).
const EPERM: i32 = 1;

impl Vm {
    /// Makes the caller the owner of the memory that clients of an earlier daemon have added.
    pub(super) fn adopt(&mut self, caller: Caller) -> CallOutcome {
        self.session.handle(Event::Adopt { caller });
        CallOutcome::Pending
    }

    /// Closes the memory of an earlier daemon's clients, which no client has adopted in time, like that of a client that has
    /// disconnected.
    pub(super) fn give_up_orphans(&mut self) {
        if self.session.has_orphans() {
            log::warn!("nobody has adopted the memory of an earlier daemon's clients: it is closed");
        }
        self.session.handle(Event::ClientGone { client: ORPHANS });
    }

    /// Ends the quarantine of an invalidation because an operator says what its pages are. Refused with `EPERM` under
    /// `--no-release`, and to a client that speaks for a VM, unless it settles a conversion that was open when an earlier daemon
    /// ended ([`crate::session::Session::may_settle`]).
    pub(super) fn release(&mut self, caller: Caller, release: Release) -> CallOutcome {
        if !self.options.allow_release {
            let message = "no quarantine is released here: the daemon runs with --no-release";
            return CallOutcome::Error(message.into(), EPERM);
        }
        let Some(connection) = self.connections.get(&caller.client) else { return CallOutcome::Pending };
        let invalidation = InvalidationId(release.invalidation);
        if connection.speaks_for_vm && !self.session.may_settle(caller.client, invalidation) {
            let message = "this connection speaks for a VM, which may not release its own quarantine: \
                           let an operator call `passgate release`";
            return CallOutcome::Error(message.into(), EPERM);
        }
        let peer_name = match socket_peercred(&connection.socket) {
            Ok(peer) => format!("pid {} uid {}", peer.pid.as_raw_nonzero(), peer.uid.as_raw()),
            Err(errno) => {
                return CallOutcome::Error(format!("cannot find out who asks for a release: {errno}"), EPERM);
            }
        };
        let to = release.to;
        let word = to.word();
        log::warn!("{peer_name} asks to release the quarantine of invalidation {} as {word}", invalidation.0);
        self.session.handle(Event::Release { caller, invalidation, to });
        CallOutcome::Pending
    }
}
