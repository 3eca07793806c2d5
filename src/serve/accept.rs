//! Who is accepted at a socket, and what those are told who are not.
//!
//! Beyond the limit of connections there is a reserve for operators, so that idle or forgotten connections never keep a
//! person from `status` or `release`. A connection of the reserve may make short calls only; where the reserve is used up
//! the oldest one that is idle goes. Where descriptors run out, one that is kept spare is given up for as long as it takes
//! to accept a connection, say why it is refused, and close it. Nobody is left without an answer where one can be given.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SocketFlags, accept_with};

use super::connection::{self, Connection, Place, Waiting};
use super::control::refused;
use super::poller::Interest;
use super::vm::Vm;
use crate::gate::ClientId;
use crate::protocol::frame;

/// Connections of operators beyond the limit.
const OPERATOR_RESERVE: usize = 8;

/// How long no connection is accepted where descriptors have run out and none is spare, unless one is closed before.
pub(super) const STARVED: Duration = Duration::from_millis(100);

/// The verbs that a connection of the reserve may call: each is answered at once, and leaves nothing behind.
const OPERATOR_VERBS: [&str; 4] = ["Status", "Metrics", "Explain", "Release"];

/// A descriptor that is kept so that it can be given up, and what has been logged of a want of room.
#[derive(Debug)]
pub(super) struct Spare {
    fd: Option<OwnedFd>,
    /// Set once it has been logged that the limit is reached, until there is room again.
    full_logged: bool,
    /// Set once it has been logged that descriptors have run out, until a connection is accepted again.
    starved_logged: bool,
}

impl Spare {
    pub(super) fn new() -> Self {
        Self { fd: spare(), full_logged: false, starved_logged: false }
    }

    /// Accepts a connection by the descriptor that is kept spare, says why it is refused, and closes it; false where nobody
    /// waits. An error where neither was possible.
    pub(super) fn refuse(&mut self, listener: impl AsFd, refusal: &[u8]) -> Result<bool, Errno> {
        if self.fd.take().is_none() {
            self.fd = spare();
            return Err(Errno::MFILE);
        }
        // Another thread may take the descriptor meanwhile. Then nobody is told anything for now.
        let told = match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                self.log(Errno::MFILE);
                let _ = frame::send(&socket, refusal, &[]);
                Ok(true)
            }
            // The kernel looks for a descriptor before it looks whether somebody waits (accept4 in net/socket.c), so that
            // this is how the end of the queue shows.
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(errno),
        };
        self.fd = spare();
        told
    }

    /// Logs that descriptors have run out, unless it has been.
    fn log(&mut self, errno: Errno) {
        if !std::mem::replace(&mut self.starved_logged, true) {
            log::warn!("no connection can be accepted: {errno}; raise the limit of files (`LimitNOFILE=`)");
        }
    }

    /// A connection has been accepted.
    pub(super) fn accepted(&mut self) {
        self.starved_logged = false;
    }
}

fn spare() -> Option<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC).ok()
}

impl Vm {
    /// Accepts the next connection; whether there may be more.
    pub(super) fn accept(&mut self) -> bool {
        let Some(listener) = &self.listener else { return false };
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                self.spare.accepted();
                self.accepted(socket);
                true
            }
            Err(Errno::MFILE | Errno::NFILE) => {
                let reason = "the daemon has as many files open as it may: raise its limit (`LimitNOFILE=`), or close a \
                              connection";
                let refusal = connection::frame(&refused(reason, Errno::MFILE.raw_os_error()));
                let told = self.spare.refuse(listener, &refusal);
                self.told(told)
            }
            Err(errno) => {
                self.starved(errno);
                false
            }
        }
    }

    fn accepted(&mut self, socket: OwnedFd) {
        if self.has_room() {
            self.spare.full_logged = false;
            self.welcome(socket, Place::Ordinary);
        } else if is_operator(&socket) && self.has_operator_room() {
            self.welcome(socket, Place::Operator);
        } else {
            self.refuse_full(&socket);
        }
    }

    /// True while another ordinary connection may be open.
    pub(super) fn has_room(&self) -> bool {
        self.count(Place::Ordinary) < self.options.max_clients
    }

    fn count(&self, place: Place) -> usize {
        self.connections.values().filter(|connection| connection.place == place).count()
    }

    /// True where the reserve takes another connection; an idle one of it goes where need be.
    fn has_operator_room(&mut self) -> bool {
        if self.count(Place::Operator) < OPERATOR_RESERVE {
            return true;
        }
        let reserved = |connection: &Connection| {
            connection.place == Place::Operator && connection.waiting == Waiting::No
        };
        // A call that lies in the socket is as good as one that was read.
        let idle = |connection: &mut Connection| {
            let unread =
                poll(&mut [PollFd::new(&connection.socket, PollFlags::IN)], Some(&Timespec::default()));
            reserved(connection)
                && !connection.is_behind()
                && !connection.has_call()
                && unread.is_ok_and(|count| count == 0)
        };
        // Numbers grow, so that the first is the oldest. Where none is idle, one that does not read its answers goes.
        let oldest = self.connections.iter_mut().find_map(|(client, c)| idle(c).then_some(*client));
        let oldest = oldest.or_else(|| {
            let stuck = |connection: &Connection| reserved(connection) && connection.is_behind();
            self.connections.iter().find_map(|(client, c)| stuck(c).then_some(*client))
        });
        oldest.map(|client| self.hang_up(client)).is_some()
    }

    /// True where the connection may call this verb. One of the reserve becomes an ordinary one by a verb that only those
    /// may call, where there is room for one by now.
    pub(super) fn may_call(&mut self, client: ClientId, verb: Option<&str>) -> bool {
        let room = self.has_room();
        let Some(connection) = self.connections.get_mut(&client) else { return false };
        // What is not in passgate's interface describes it.
        if connection.place != Place::Operator || verb.is_none_or(|verb| OPERATOR_VERBS.contains(&verb)) {
            return true;
        }
        if room {
            connection.place = Place::Ordinary;
        }
        room
    }

    /// Returns the reason why no more connections are served.
    pub(super) fn full(&self) -> String {
        let open = self.count(Place::Ordinary);
        format!(
            "{open} connections are open, and no more may be: close one. Beyond them the daemon's user and root may ask \
             for {} only",
            OPERATOR_VERBS.join(", ")
        )
    }

    fn refuse_full(&mut self, socket: &OwnedFd) {
        let reason = self.full();
        if !std::mem::replace(&mut self.spare.full_logged, true) {
            log::warn!("connections are refused: {reason}");
        }
        let refusal = connection::frame(&refused(&reason, Errno::USERS.raw_os_error()));
        // The socket of one who does not read has room for it all the same, because nothing is in it yet.
        let _ = frame::send(socket, &refusal, &[]);
    }

    /// Whether there may be more to refuse. Where it was not possible to refuse anybody, the sockets rest.
    pub(super) fn told(&mut self, told: Result<bool, Errno>) -> bool {
        told.unwrap_or_else(|errno| {
            self.starved(errno);
            false
        })
    }

    /// Has the sockets rest until something is closed, or for a moment: where neither descriptors nor memory are left to
    /// accept anybody by, asking again at once is of no use.
    pub(super) fn starved(&mut self, errno: Errno) {
        if !matches!(errno, Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) {
            return;
        }
        self.spare.log(errno);
        self.starved = Some(Instant::now() + STARVED);
        self.watch_doors(Interest::Nothing);
    }

    /// Accepts again.
    pub(super) fn listen_again(&mut self) {
        if self.starved.take().is_some() {
            self.watch_doors(Interest::Read);
        }
    }
}

/// True where a person who may do anything to the daemon has the other end.
fn is_operator(socket: &OwnedFd) -> bool {
    let own = rustix::process::geteuid();
    socket_peercred(socket).is_ok_and(|peer| peer.uid == own || peer.uid.is_root())
}
