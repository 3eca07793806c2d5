//! The control socket: one blocking call at a time, with a limit to the time that its reply may take.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, getpeername, shutdown,
    socket_with,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::PageState;
use crate::channel::Channel;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::protocol::address::address;
use crate::protocol::frame::{self, Frame, Frames, MAX_REPLY_BYTES};
use crate::protocol::hex;
use crate::protocol::record::DEFAULT_DEADLINE_MS;
use crate::protocol::verbs::{
    AddMemory, Adopted, Call, Convert, Converted, Dma, DmaDone, Explain, INTERFACE, MemoryAdded, Metrics,
    Release, Released, RemoveMemory, Reply, Status, Subscribe,
};

/// The default time in which the daemon must answer; see [`Client::set_timeout`].
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The time after its deadline in which an answer may still arrive.
pub(crate) const ANSWER_GRACE: Duration = Duration::from_secs(2);

/// A connection to one VM's daemon. Closing it removes the memory that it added.
///
/// If the daemon does not answer in time, a call returns [`Error::NoAnswer`] and the connection stays open: the memory that
/// it added remains, the daemon may still execute the call, and later calls may succeed.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    pub(crate) frames: Frames,
    daemon: DaemonSocket,
    pub(crate) timeout: Duration,
    /// The number of calls that returned [`Error::NoAnswer`] and whose replies may still arrive.
    overdue: usize,
    /// The channel of an `OpenChannel` whose reply arrived after the call had returned [`Error::NoAnswer`].
    late_channel: Option<OwnedFd>,
}

/// The socket at which the daemon of a connection answers other connections.
#[derive(Debug)]
enum DaemonSocket {
    /// The path that this connection was made to.
    Connected(PathBuf),
    /// The path at which the socket of an inherited connection was bound (getpeername(2)). This process may see another file
    /// there, or none.
    Inherited(PathBuf),
    /// None is known: a socket pair, an abstract name or a relative path.
    Unknown,
    /// The daemon runs in this process, and ends the connection when it ends.
    InProcess,
}

/// The time that a call waits for its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// This time: the daemon answers the call at once.
    For(Duration),
    /// As long as the daemon answers other connections: the call takes as long as its work.
    WhileServed,
    /// Without a limit: the next event may come at any time.
    Event,
}

impl Client {
    /// Connects to the daemon that listens at `path`.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::connect_within(path, ANSWER_TIMEOUT)
    }

    /// As [`Client::connect`], with the time in which the connection and every answer must be completed.
    pub fn connect_within(path: impl AsRef<Path>, timeout: Duration) -> Result<Self> {
        let path = path.as_ref();
        let socket = connect_socket(path, timeout)?;
        Ok(Self { timeout, ..Self::new(socket, DaemonSocket::Connected(path.to_owned())) })
    }

    /// Takes a connected stream socket that another process opened and passed. Its calls have the limits of
    /// [`Client::connect`] ([`Client::set_timeout`]).
    pub fn from_fd(socket: OwnedFd) -> Self {
        let daemon = peer_path(&socket).map_or(DaemonSocket::Unknown, DaemonSocket::Inherited);
        Self::new(socket, daemon)
    }

    /// Takes a connected stream socket to a daemon in this process. A call that takes as long as its work waits without a
    /// limit: when the daemon ends, the connection does.
    pub fn in_process(socket: OwnedFd) -> Self {
        Self::new(socket, DaemonSocket::InProcess)
    }

    fn new(socket: OwnedFd, daemon: DaemonSocket) -> Self {
        let frames = Frames::with_max_frame(MAX_REPLY_BYTES);
        Self { socket, frames, daemon, timeout: ANSWER_TIMEOUT, overdue: 0, late_channel: None }
    }

    /// Sets the time in which the daemon must answer. A call that takes as long as its work (`AddMemory`, `RemoveMemory`,
    /// `Adopt`, `Release`, `Dma`) waits as long as the daemon answers other connections. That is checked at the path of its
    /// socket. A connection made by [`Client::from_fd`] has the path from getpeername(2); where it has none, or this process
    /// cannot connect there, such a call ends after this time, too.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Adds memory, and returns once it is mapped. `fds` has the file that devices may access; where `memory.private` is set
    /// it also has the guest_memfd with the private pages.
    pub fn add_memory(&mut self, memory: &AddMemory, fds: &[&dyn AsFd]) -> Result<MemoryAdded> {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        self.call("AddMemory", memory, &fds)
    }

    /// Removes memory, and returns once no device can access it any more. After an error devices may still access it.
    pub fn remove_memory(&mut self, region: u32) -> Result<()> {
        self.call::<Value>("RemoveMemory", &RemoveMemory { region }, &[]).map(drop)
    }

    /// Opens the notification channel; a connection has one. After a call that returned [`Error::NoAnswer`], the next one
    /// returns the channel that the daemon has opened for it.
    pub fn open_channel(&mut self) -> Result<Channel> {
        let opened = self.round_trip("OpenChannel", &json!({}), &[], Wait::For(self.timeout));
        let fd = match self.late_channel.take() {
            Some(late) => Some(late),
            None => opened?.1.into_iter().next(),
        };
        fd.map(Channel::from_fd).ok_or_else(|| Error::Protocol("OpenChannel without a descriptor".into()))
    }

    /// passgate itself converts a range. Allowed only in memory that was added with `sole_mapper`. [`Error::Quarantined`] where a
    /// page of it is in quarantine.
    pub fn convert(&mut self, convert: &Convert) -> Result<Converted> {
        let deadline_ms = if convert.deadline_ms == 0 { DEFAULT_DEADLINE_MS } else { convert.deadline_ms };
        let timeout = Duration::from_millis(deadline_ms.into()) + ANSWER_GRACE;
        let reply = self.round_trip("Convert", convert, &[], Wait::For(timeout.max(self.timeout)));
        match reply {
            // The daemon has no other reason for this errno (docs/protocol.md).
            Err(Error::Refused { message, errno }) if errno == Errno::IO.raw_os_error() => {
                Err(Error::Quarantined { message })
            }
            reply => parse("Convert", reply?.0),
        }
    }

    /// Takes over the memory of the earlier daemon's clients that a restart has preserved (`serve --restart hold`). The daemon
    /// closes the memory if no client adopts it in time (`--adopt-within`).
    pub fn adopt(&mut self) -> Result<Adopted> {
        self.call("Adopt", &json!({}), &[])
    }

    /// Returns the present state of the daemon.
    pub fn status(&mut self) -> Result<Status> {
        self.call("Status", &json!({}), &[])
    }

    /// Returns the metrics in OpenMetrics text.
    pub fn metrics(&mut self) -> Result<String> {
        Ok(self.call::<Metrics>("Metrics", &json!({}), &[])?.text)
    }

    /// Ends the quarantine of an invalidation's pages, which the operator states to be `to`. Returns the number of bytes
    /// released. Refused on a connection that has added memory or opened a channel.
    pub fn release(&mut self, invalidation: u64, to: PageState) -> Result<u64> {
        Ok(self.call::<Released>("Release", &Release { invalidation, to }, &[])?.bytes)
    }

    /// Returns the receipt of an invalidation in JSON, as long as the daemon stores it.
    pub fn explain(&mut self, invalidation: u64) -> Result<Value> {
        let mut reply: Value = self.call("Explain", &Explain { invalidation }, &[])?;
        Ok(reply["receipt"].take())
    }

    /// Makes a device read `len` bytes at `iova` by DMA, and returns them (`serve --allow-dma`).
    pub fn dma_read(&mut self, device: &str, iova: u64, len: u32) -> Result<Vec<u8>> {
        let dma = Dma { device: device.into(), iova, write: None, read: Some(len) };
        let done: DmaDone = self.call("Dma", &dma, &[])?;
        let read = done.read.as_deref().and_then(hex::decode);
        read.ok_or_else(|| Error::Protocol("Dma without the bytes read".into()))
    }

    /// Makes a device write `bytes` at `iova` by DMA (`serve --allow-dma`).
    pub fn dma_write(&mut self, device: &str, iova: u64, bytes: &[u8]) -> Result<()> {
        let write = Some(hex::encode(bytes));
        let dma = Dma { device: device.into(), iova, write, read: None };
        self.call::<DmaDone>("Dma", &dma, &[]).map(drop)
    }

    /// Turns the connection into the stream of events. The memory that the connection added remains until the stream is
    /// dropped.
    pub fn subscribe(self) -> Result<Events> {
        self.listen(&Subscribe::default())
    }

    /// As [`Client::subscribe`], but the stream starts with the events after the one with the sequence number `after`, as far
    /// as the daemon still stores them; where some are missing it starts with the event `gap`. `instance` is the daemon
    /// instance that `after` is from ([`Events::instance`]). Another instance sends `gap`, then all events that it stores.
    pub fn subscribe_after(self, after: u64, instance: Option<&str>) -> Result<Events> {
        self.listen(&Subscribe { after: Some(after), instance: instance.map(str::to_owned) })
    }

    fn listen(mut self, subscribe: &Subscribe) -> Result<Events> {
        let call = Call { more: true, ..call_of("Subscribe", subscribe)? };
        self.send(&call, &[])?;
        // The first reply confirms the subscription: all later events are in the stream.
        let (first, _) = self.receive(Wait::For(self.timeout))?;
        let first = serde_json::from_value(check(first)?);
        Ok(Events::new(self, first.map_err(|error| Error::Protocol(error.to_string()))?))
    }

    /// Calls a method of passgate's interface with any parameters.
    pub fn call<T: DeserializeOwned>(
        &mut self,
        verb: &str,
        parameters: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<T> {
        let wait = match verb {
            "AddMemory" | "RemoveMemory" | "Adopt" | "Release" | "Convert" | "Dma" => Wait::WhileServed,
            _ => Wait::For(self.timeout),
        };
        let (parameters, _) = self.round_trip(verb, parameters, fds, wait)?;
        parse(verb, parameters)
    }

    fn round_trip(
        &mut self,
        verb: &str,
        parameters: &impl Serialize,
        fds: &[BorrowedFd<'_>],
        wait: Wait,
    ) -> Result<(Value, Vec<OwnedFd>)> {
        self.send(&call_of(verb, parameters)?, fds)?;
        let (reply, fds) = self.receive(wait)?;
        Ok((check(reply)?, fds))
    }

    fn send(&mut self, call: &Call, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut bytes = serde_json::to_vec(call).map_err(|error| Error::Protocol(error.to_string()))?;
        bytes.push(0);
        let deadline = Instant::now() + self.timeout;
        let mut sent_bytes = 0;
        while sent_bytes < bytes.len() {
            match frame::send(&self.socket, &bytes[sent_bytes..], if sent_bytes == 0 { fds } else { &[] }) {
                Ok(sent) => sent_bytes += sent,
                Err(Errno::AGAIN) if self.is_ready(PollFlags::OUT, Some(deadline))? => {}
                Err(Errno::AGAIN) => {
                    if sent_bytes > 0 {
                        // Close the connection: the daemon would read the next call as the rest of this one.
                        let _ = shutdown(&self.socket, Shutdown::Both);
                    }
                    return Err(self.no_answer(self.timeout));
                }
                // The daemon may have sent the reason before it closed the connection.
                Err(errno) => return Err(self.pending_error().unwrap_or(errno.into())),
            }
        }
        Ok(())
    }

    pub(crate) fn receive(&mut self, wait: Wait) -> Result<(Reply, Vec<OwnedFd>)> {
        let timeout = match wait {
            Wait::For(timeout) => Some(timeout),
            Wait::WhileServed => Some(self.timeout),
            Wait::Event => None,
        };
        let mut deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            if let Some(Frame { bytes, fds }) = self.frames.take() {
                // Calls are answered in order: first come the replies to those that returned NoAnswer.
                if self.overdue > 0 {
                    self.overdue -= 1;
                    // Only a reply to OpenChannel has a descriptor.
                    self.late_channel =
                        fds.ok().and_then(|fds| fds.into_iter().next()).or(self.late_channel.take());
                    continue;
                }
                let reply = serde_json::from_slice(&bytes);
                return Ok((reply.map_err(|error| Error::Protocol(error.to_string()))?, fds?));
            }
            if self.frames.read(&self.socket)? || self.is_ready(PollFlags::IN, deadline)? {
                continue;
            }
            if wait == Wait::WhileServed && self.is_served() {
                deadline = Some(Instant::now() + self.timeout);
                continue;
            }
            self.overdue += 1;
            return Err(self.no_answer(timeout.unwrap_or_default()));
        }
    }

    /// Waits until the socket is ready, and returns true; false where it is not ready by `deadline`.
    fn is_ready(&self, flags: PollFlags, deadline: Option<Instant>) -> Result<bool> {
        loop {
            let remaining = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let remaining = remaining
                .map(|time| Timespec::try_from(time).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }));
            match poll(&mut [PollFd::new(&self.socket, flags)], remaining.as_ref()) {
                Err(Errno::INTR) => {}
                ready => return Ok(ready? > 0),
            }
        }
    }

    /// Returns false where the daemon answers no connection. Checked by a call on another connection; if the limit of
    /// connections refuses that, it is an answer, too.
    fn is_served(&self) -> bool {
        let (path, inherited) = match &self.daemon {
            DaemonSocket::Connected(path) => (path, false),
            DaemonSocket::Inherited(path) => (path, true),
            DaemonSocket::Unknown => return false,
            DaemonSocket::InProcess => return true,
        };
        let answer = Self::connect_within(path, self.timeout).and_then(|mut other| {
            let call = Call { method: "org.varlink.service.GetInfo".into(), ..call_of("", &json!({}))? };
            other.send(&call, &[])?;
            other.receive(Wait::For(other.timeout))
        });
        match answer {
            Err(Error::NoAnswer { .. }) => false,
            // If this process cannot connect, nothing is known of the daemon. A path that was connected to before says
            // nothing new by that: this connection would have ended with the daemon.
            Err(Error::Connect { .. } | Error::SocketPath { .. }) => !inherited,
            Ok(_) | Err(_) => true,
        }
    }

    /// Returns the error that the daemon sent before it closed the connection, if it sent one.
    fn pending_error(&mut self) -> Option<Error> {
        loop {
            if let Some(Frame { bytes, .. }) = self.frames.take() {
                if self.overdue > 0 {
                    self.overdue -= 1;
                    continue;
                }
                let reply = serde_json::from_slice::<Reply>(&bytes).ok()?;
                return check(reply).err();
            }
            match self.frames.read(&self.socket) {
                Ok(true) => {}
                Ok(false) | Err(_) => return None,
            }
        }
    }

    /// Returns the error of a call that was not answered `within` this time.
    fn no_answer(&self, within: Duration) -> Error {
        let path = match &self.daemon {
            DaemonSocket::Connected(path) | DaemonSocket::Inherited(path) => path.display().to_string(),
            DaemonSocket::Unknown | DaemonSocket::InProcess => "passgate".into(),
        };
        let daemon = match socket_peercred(&self.socket) {
            Ok(peer) => format!("{path} (process {})", peer.pid.as_raw_nonzero()),
            Err(_) => path,
        };
        Error::NoAnswer { daemon, within }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Returns the path at which the peer's socket is bound, if it is absolute.
fn peer_path(socket: &OwnedFd) -> Option<PathBuf> {
    let peer = SocketAddrUnix::try_from(getpeername(socket).ok()??).ok()?;
    let path = PathBuf::from(OsStr::from_bytes(peer.path_bytes()?));
    path.is_absolute().then_some(path)
}

/// Connects to the socket at `path`, within `timeout`.
fn connect_socket(path: &Path, timeout: Duration) -> Result<OwnedFd> {
    let address = address(path)?;
    let failed = |errno: Errno| Error::Connect {
        path: path.to_owned(),
        source: errno.into(),
        remedy: match errno {
            Errno::NOENT | Errno::CONNREFUSED => ": start `passgate serve --socket-path` there first",
            Errno::ACCESS => ": connect as the user that the daemon runs as",
            _ => "",
        },
    };
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(failed)?;
    let deadline = Instant::now() + timeout;
    loop {
        // While the listen backlog is full the kernel waits for the send timeout, 0 for no limit (unix_stream_connect in
        // net/unix/af_unix.c).
        let remaining = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        set_socket_timeout(&socket, Timeout::Send, Some(remaining)).map_err(failed)?;
        match connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                return Err(Error::NoAnswer { daemon: path.display().to_string(), within: timeout });
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
}

/// Returns the parameters of a reply as `T`.
fn parse<T: DeserializeOwned>(verb: &str, parameters: Value) -> Result<T> {
    serde_json::from_value(parameters).map_err(|error| Error::Protocol(format!("{verb}: {error}")))
}

/// Returns a call of a method of passgate's interface.
fn call_of(verb: &str, parameters: &impl Serialize) -> Result<Call> {
    let parameters = serde_json::to_value(parameters).map_err(|error| Error::Protocol(error.to_string()))?;
    Ok(Call { method: format!("{INTERFACE}.{verb}"), parameters, more: false, oneway: false, upgrade: false })
}

/// Returns the parameters of a reply, or [`Error::Refused`] where it is an error.
pub(crate) fn check(reply: Reply) -> Result<Value> {
    let Some(error) = reply.error else { return Ok(reply.parameters) };
    let message = match reply.parameters["message"].as_str() {
        Some(message) => message.to_owned(),
        None => format!("{error} {}", reply.parameters),
    };
    let errno = reply.parameters["errno"].as_i64().and_then(|errno| i32::try_from(errno).ok());
    Err(Error::Refused { message, errno: errno.unwrap_or(Errno::PROTO.raw_os_error()) })
}

#[cfg(test)]
mod tests;
