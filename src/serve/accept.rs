//! Admission of connections, and the answer to a connection that is refused.
//!
//! Beyond the limit of connections there is a reserve for operators, so that idle connections never prevent an operator from
//! calling `Status` or `Release`. A connection of the reserve may make short calls only; where the reserve is full, the
//! oldest idle one is closed. Where the process is out of descriptors, a spare one is closed for as long as it takes to
//! accept a connection, send it the reason, and close it. A connection is never dropped without an answer where one can be
//! sent.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SocketFlags, accept_with};

use super::connection::{self, Connection, ConnectionClass, ControlState};
use super::control::refused;
use super::poller::Interest;
use super::vm::Vm;
use crate::gate::ClientId;
use crate::protocol::frame;

/// The number of connections of operators beyond the limit.
const OPERATOR_RESERVE: usize = 8;

/// The time for which no connection is accepted once descriptors have run out and there is no spare one. It ends early when a
/// connection is closed.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The verbs that a connection of the reserve may call: each is answered at once, and changes nothing of the connection.
const OPERATOR_VERBS: [&str; 4] = ["Status", "Metrics", "Explain", "Release"];

/// The control socket, and what is known of a shortage of connections or descriptors.
#[derive(Debug)]
pub(super) struct Acceptor {
    listener: Option<UnixListener>,
    /// Set while no connection is accepted for want of descriptors or memory: the end of that time.
    paused_until: Option<Instant>,
    pub(super) reserve_fd: ReserveFd,
    /// True from the log line that says that the limit of connections is reached, until one is admitted again.
    full_logged: bool,
}

impl Acceptor {
    pub(super) fn new(listener: Option<UnixListener>) -> Self {
        Self { listener, paused_until: None, reserve_fd: ReserveFd::new(), full_logged: false }
    }

    pub(super) fn listener(&self) -> Option<&UnixListener> {
        self.listener.as_ref()
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused_until.is_some()
    }

    /// Returns true if accepting is paused, and need not be at `now`.
    pub(super) fn is_pause_over(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| until <= now)
    }
}

/// A descriptor that can be closed to accept one more connection, and what has been logged of a shortage.
#[derive(Debug)]
pub(super) struct ReserveFd {
    fd: Option<OwnedFd>,
    /// True from the log line that says that descriptors have run out, until a connection is accepted again.
    shortage_logged: bool,
}

impl ReserveFd {
    fn new() -> Self {
        Self { fd: reserve_fd(), shortage_logged: false }
    }

    /// Accepts a connection by closing the spare descriptor, sends it `refusal`, and closes it. Returns false if no connection
    /// waits, and the error of `accept4` (`EMFILE` where there is no spare descriptor) if none could be accepted.
    pub(super) fn refuse(&mut self, listener: impl AsFd, refusal: &[u8]) -> Result<bool, Errno> {
        if self.fd.take().is_none() {
            self.fd = reserve_fd();
            return Err(Errno::MFILE);
        }
        // Another thread may take the descriptor first. The connection then stays in the queue of the socket.
        let result = match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                self.log(Errno::MFILE);
                let _ = frame::send(&socket, refusal, &[]);
                Ok(true)
            }
            // The kernel allocates the descriptor before it checks the queue (accept4 in net/socket.c): without a free one,
            // an empty queue is reported as EMFILE, and only here as EAGAIN.
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(errno),
        };
        self.fd = reserve_fd();
        result
    }

    /// Logs that descriptors have run out, once.
    fn log(&mut self, errno: Errno) {
        if !std::mem::replace(&mut self.shortage_logged, true) {
            log::warn!("no connection can be accepted: {errno}; raise the limit of files (`LimitNOFILE=`)");
        }
    }

    /// Records that a connection has been accepted, so that the next shortage is logged again.
    pub(super) fn accepted(&mut self) {
        self.shortage_logged = false;
    }
}

fn reserve_fd() -> Option<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC).ok()
}

impl Vm {
    /// Accepts the next connection. Returns true if there may be more.
    pub(super) fn accept(&mut self) -> bool {
        let Acceptor { listener: Some(listener), reserve_fd, .. } = &mut self.acceptor else { return false };
        match accept_with(&*listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                reserve_fd.accepted();
                self.accepted(socket);
                true
            }
            Err(Errno::MFILE | Errno::NFILE) => {
                let reason = "the daemon has as many files open as it may: raise its limit (`LimitNOFILE=`), or close a \
                              connection";
                let refusal = connection::frame(&refused(reason, Errno::MFILE.raw_os_error()));
                let result = reserve_fd.refuse(&*listener, &refusal);
                self.after_refusal(result)
            }
            Err(errno) => {
                self.pause_accepting(errno);
                false
            }
        }
    }

    fn accepted(&mut self, socket: OwnedFd) {
        if self.has_room() {
            self.acceptor.full_logged = false;
            self.add_connection(socket, ConnectionClass::Ordinary);
        } else if is_operator(&socket) && self.has_operator_room() {
            self.add_connection(socket, ConnectionClass::Operator);
        } else {
            self.refuse_full(&socket);
        }
    }

    /// Returns true while one more ordinary connection may be opened.
    pub(super) fn has_room(&self) -> bool {
        self.count(ConnectionClass::Ordinary) < self.options.max_clients
    }

    fn count(&self, class: ConnectionClass) -> usize {
        self.connections.values().filter(|connection| connection.class == class).count()
    }

    /// Returns true if the reserve takes one more connection. Where it is full, the oldest idle connection is closed.
    fn has_operator_room(&mut self) -> bool {
        if self.count(ConnectionClass::Operator) < OPERATOR_RESERVE {
            return true;
        }
        let reserved = |connection: &Connection| {
            connection.class == ConnectionClass::Operator && connection.control == ControlState::Idle
        };
        // A call that is still in the socket's buffer counts like one that has been read.
        let idle = |connection: &mut Connection| {
            let unread =
                poll(&mut [PollFd::new(&connection.socket, PollFlags::IN)], Some(&Timespec::default()));
            reserved(connection)
                && !connection.is_behind()
                && !connection.has_call()
                && unread.is_ok_and(|count| count == 0)
        };
        // Client numbers grow, so the first is the oldest. Where none is idle, one that does not read its answers is closed.
        let oldest = self.connections.iter_mut().find_map(|(client, c)| idle(c).then_some(*client));
        let oldest = oldest.or_else(|| {
            let stuck = |connection: &Connection| reserved(connection) && connection.is_behind();
            self.connections.iter().find_map(|(client, c)| stuck(c).then_some(*client))
        });
        oldest.map(|client| self.close_connection(client)).is_some()
    }

    /// Returns true if the connection may call this verb. A connection of the reserve that calls a verb of ordinary ones becomes
    /// one, if there is room by now.
    pub(super) fn may_call(&mut self, client: ClientId, verb: Option<&str>) -> bool {
        let room = self.has_room();
        let Some(connection) = self.connections.get_mut(&client) else { return false };
        // A method of another interface (`None`) is one of `org.varlink.service`, which only describes.
        if connection.class != ConnectionClass::Operator
            || verb.is_none_or(|verb| OPERATOR_VERBS.contains(&verb))
        {
            return true;
        }
        if room {
            connection.class = ConnectionClass::Ordinary;
        }
        room
    }

    /// Returns the reason why no more connections are served.
    pub(super) fn limit_message(&self) -> String {
        let open = self.count(ConnectionClass::Ordinary);
        format!(
            "{open} connections are open, and no more may be: close one. Beyond them the daemon's user and root may ask \
             for {} only",
            OPERATOR_VERBS.join(", ")
        )
    }

    fn refuse_full(&mut self, socket: &OwnedFd) {
        let reason = self.limit_message();
        if !std::mem::replace(&mut self.acceptor.full_logged, true) {
            log::warn!("connections are refused: {reason}");
        }
        let refusal = connection::frame(&refused(&reason, Errno::USERS.raw_os_error()));
        // This does not block and is not cut short: the send buffer of a new socket is empty.
        let _ = frame::send(socket, &refusal, &[]);
    }

    /// Returns true if more connections may wait to be refused. Where none could be accepted, accepting is paused.
    pub(super) fn after_refusal(&mut self, result: Result<bool, Errno>) -> bool {
        result.unwrap_or_else(|errno| {
            self.pause_accepting(errno);
            false
        })
    }

    /// Stops polling the listening sockets for [`ACCEPT_PAUSE`] or until a connection is closed, if `errno` says that
    /// descriptors or memory have run out: they stay readable, and the loop would spin.
    pub(super) fn pause_accepting(&mut self, errno: Errno) {
        if !matches!(errno, Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) {
            return;
        }
        self.acceptor.reserve_fd.log(errno);
        self.acceptor.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
        self.watch_listeners(Interest::Nothing);
    }

    /// Polls the listening sockets again.
    pub(super) fn resume_accepting(&mut self) {
        if self.acceptor.paused_until.take().is_some() {
            self.watch_listeners(Interest::Read);
        }
    }
}

/// Returns true if the peer runs as root or as the daemon's own user (`SO_PEERCRED`).
fn is_operator(socket: &OwnedFd) -> bool {
    let own = rustix::process::geteuid();
    socket_peercred(socket).is_ok_and(|peer| peer.uid == own || peer.uid.is_root())
}
