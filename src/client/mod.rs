//! What the author of a VMM links: connect, add memory, ask before every conversion, say how it went.
//!
//! Two sockets, as docs/protocol.md has them: [`Client`] is the control socket, one blocking call at a time;
//! [`Channel`] is the notification channel for the hot path; [`Events`] is the stream of notices. The client never
//! converts anything by itself, and where the daemon is gone every call is an error: without it no conversion
//! happens. A daemon that is there and does not answer is an error, too ([`Error::NoAnswer`]): no call waits for ever.
//!
//! ```no_run
//! use passgate::client::{AddMemory, Answer, Client, Outcome};
//! use passgate::gate::PageState;
//! use passgate_bindings::{Gpa, PageRange};
//! # fn main() -> passgate::Result<()> {
//! # let memory: std::os::fd::OwnedFd = unimplemented!();
//! # fn convert(range: PageRange<Gpa>) -> std::io::Result<()> { Ok(()) }
//! let mut client = Client::connect("/run/passgate/vm1.sock")?;
//! client.add_memory(&AddMemory::shared(0, 1 << 30), &[&memory])?;
//! let mut channel = client.open_channel()?;
//!
//! let range = PageRange::<Gpa>::new(0x20_0000, 0x1000)?;
//! match channel.begin(range, PageState::Private, None)? {
//!     Answer::Granted { invalidation } => {
//!         let outcome = match convert(range) {
//!             Ok(()) => Outcome::Committed,
//!             Err(error) => Outcome::Unknown { errno: error.raw_os_error().unwrap_or(0), offset: 0 },
//!         };
//!         channel.end(invalidation, outcome)?;
//!     }
//!     Answer::Refused(failure) | Answer::Unknown(failure) => eprintln!("not converted: {failure:?}"),
//! }
//! # Ok(()) }
//! ```

mod channel;
mod events;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, connect, shutdown, socket_with};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::protocol::address::address;
use crate::protocol::frame::{self, Frame, Frames, MAX_REPLY};
use crate::protocol::record::DEFAULT_DEADLINE_MS;
use crate::protocol::verbs::{
    Call, Dma, DmaDone, Explain, INTERFACE, Metrics, Release, Released, RemoveMemory, Reply, Subscribe,
};

pub use crate::gate::{Outcome, PageState};
pub use crate::protocol::verbs::{
    AddMemory, Adopted, AdoptedRegion, Convert, Converted, MemoryAdded, State, Status, Unended,
};
pub use channel::{Answer, Channel, Failure, Ticket};
pub use events::{Event, Events};

/// How long the daemon may take to answer, unless [`Client::set_timeout`] says otherwise.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long after its deadline an answer may still be on its way.
const GRACE: Duration = Duration::from_secs(2);

/// A connection to one VM's daemon. What it added goes when it is closed.
///
/// Where the daemon does not answer in time, the call is given up with [`Error::NoAnswer`] and the connection stays:
/// what it added is still the daemon's, and a later call may be answered. What was asked may still be done.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    frames: Frames,
    /// The daemon's socket; none where this connection was not made here.
    path: Option<PathBuf>,
    timeout: Duration,
    /// The number of calls that were given up and whose replies may still come.
    overdue: usize,
    /// The channel of an `OpenChannel` that was given up and answered after that.
    late_channel: Option<OwnedFd>,
}

/// How long a reply is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// So long: the daemon answers at once.
    For(Duration),
    /// As long as the daemon answers others: the call takes as long as its work.
    WhileServed,
    /// For ever: nothing is due.
    Event,
}

impl Client {
    /// Connects to the daemon that listens at `path`.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::connect_within(path, ANSWER_TIMEOUT)
    }

    /// As [`Client::connect`], where connecting and every answer may take so long.
    pub fn connect_within(path: impl AsRef<Path>, timeout: Duration) -> Result<Self> {
        let path = path.as_ref();
        let socket = dial(path, timeout)?;
        Ok(Self { path: Some(path.to_owned()), timeout, ..Self::from_fd(socket) })
    }

    /// Takes a connected stream socket, for a VMM that was handed one.
    pub fn from_fd(socket: OwnedFd) -> Self {
        let frames = Frames::of_at_most(MAX_REPLY);
        Self { socket, frames, path: None, timeout: ANSWER_TIMEOUT, overdue: 0, late_channel: None }
    }

    /// Sets how long the daemon may take to answer. A call that takes as long as its work does (`AddMemory`,
    /// `RemoveMemory`, `Adopt`, `Release`, `Dma`) goes on for as long as the daemon answers other connections; on a
    /// connection that was made by [`Client::from_fd`] that is not asked.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Adds memory. `fds` is what devices are given, and where `memory.private` is set also the guest_memfd of the
    /// private side. The reply comes when it is mapped.
    pub fn add_memory(&mut self, memory: &AddMemory, fds: &[&dyn AsFd]) -> Result<MemoryAdded> {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        self.call("AddMemory", memory, &fds)
    }

    /// Takes memory away again; returns when no device sees it any more. An error says nothing of the kind: devices may
    /// still reach it.
    pub fn remove_memory(&mut self, region: u32) -> Result<()> {
        self.call::<Value>("RemoveMemory", &RemoveMemory { region }, &[]).map(drop)
    }

    /// Opens the notification channel; a connection has one. Where an earlier call of this was given up, that is the one which
    /// the daemon has opened for it.
    pub fn open_channel(&mut self) -> Result<Channel> {
        let opened = self.round("OpenChannel", &json!({}), &[], Wait::For(self.timeout));
        let fd = match self.late_channel.take() {
            Some(late) => Some(late),
            None => opened?.1.into_iter().next(),
        };
        fd.map(Channel::from_fd).ok_or_else(|| Error::Protocol("OpenChannel without a descriptor".into()))
    }

    /// Has passgate change a range itself; only in memory added with `sole_mapper`.
    pub fn convert(&mut self, convert: &Convert) -> Result<Converted> {
        let deadline_ms = if convert.deadline_ms == 0 { DEFAULT_DEADLINE_MS } else { convert.deadline_ms };
        let within = Duration::from_millis(deadline_ms.into()) + GRACE;
        let (reply, _) = self.round("Convert", convert, &[], Wait::For(within.max(self.timeout)))?;
        parse("Convert", reply)
    }

    /// Takes over the memory that this client, or another, had with an earlier daemon, which a restart has kept
    /// (`serve --restart hold`). It is closed if nobody does so in time (`--adopt-within`).
    pub fn adopt(&mut self) -> Result<Adopted> {
        self.call("Adopt", &json!({}), &[])
    }

    /// What the daemon knows now.
    pub fn status(&mut self) -> Result<Status> {
        self.call("Status", &json!({}), &[])
    }

    /// What is counted and timed, in OpenMetrics text.
    pub fn metrics(&mut self) -> Result<String> {
        Ok(self.call::<Metrics>("Metrics", &json!({}), &[])?.text)
    }

    /// Takes what an invalidation left in quarantine out of it: the caller knows that its pages are `to` now. The
    /// bytes that came free. Refused on a connection that has added memory or opened a channel.
    pub fn release(&mut self, invalidation: u64, to: State) -> Result<u64> {
        Ok(self.call::<Released>("Release", &Release { invalidation, to }, &[])?.bytes)
    }

    /// The evidence of one invalidation, while it is remembered, as JSON.
    pub fn explain(&mut self, invalidation: u64) -> Result<Value> {
        let mut reply: Value = self.call("Explain", &Explain { invalidation }, &[])?;
        Ok(reply["receipt"].take())
    }

    /// Has a device read `len` bytes at `iova` by DMA (`serve --allow-dma`).
    pub fn dma_read(&mut self, device: &str, iova: u64, len: u32) -> Result<Vec<u8>> {
        let dma = Dma { device: device.into(), iova, write: None, read: Some(len) };
        let done: DmaDone = self.call("Dma", &dma, &[])?;
        let read = done.read.as_deref().and_then(crate::protocol::hex::decode);
        read.ok_or_else(|| Error::Protocol("Dma without the bytes read".into()))
    }

    /// Has a device write `bytes` at `iova` by DMA (`serve --allow-dma`).
    pub fn dma_write(&mut self, device: &str, iova: u64, bytes: &[u8]) -> Result<()> {
        let write = Some(crate::protocol::hex::encode(bytes));
        let dma = Dma { device: device.into(), iova, write, read: None };
        self.call::<DmaDone>("Dma", &dma, &[]).map(drop)
    }

    /// Turns the connection into the stream of notices. What the connection added stays for as long as the
    /// stream is held.
    pub fn subscribe(self) -> Result<Events> {
        self.listen(&Subscribe::default())
    }

    /// As [`Client::subscribe`], but first what was told after the event of that sequence number, as far as the
    /// daemon still has it. Where some of it is missing the first event is `gap`. `instance` says of which daemon
    /// the number is ([`Events::instance`]): to another everything it has is new, and a gap comes before it.
    pub fn subscribe_after(self, after: u64, instance: Option<&str>) -> Result<Events> {
        self.listen(&Subscribe { after: Some(after), instance: instance.map(str::to_owned) })
    }

    fn listen(mut self, subscribe: &Subscribe) -> Result<Events> {
        let call = Call { more: true, ..call_of("Subscribe", subscribe)? };
        self.send(&call, &[])?;
        // The first reply says that the subscription stands: whatever happens from here on is in the stream.
        let (first, _) = self.receive(Wait::For(self.timeout))?;
        let first = serde_json::from_value(check(first)?);
        Ok(Events::new(self, first.map_err(|error| Error::Protocol(error.to_string()))?))
    }

    /// Calls a verb of passgate's interface with any parameters.
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
        let (parameters, _) = self.round(verb, parameters, fds, wait)?;
        parse(verb, parameters)
    }

    fn round(
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
        let until = Instant::now() + self.timeout;
        let mut gone = 0;
        while gone < bytes.len() {
            match frame::send(&self.socket, &bytes[gone..], if gone == 0 { fds } else { &[] }) {
                Ok(sent) => gone += sent,
                Err(Errno::AGAIN) if self.is_ready(PollFlags::OUT, Some(until))? => {}
                Err(Errno::AGAIN) => {
                    if gone > 0 {
                        // The daemon would take the next call for the rest of this one.
                        let _ = shutdown(&self.socket, Shutdown::Both);
                    }
                    return Err(self.no_answer(self.timeout));
                }
                // It may have said why before it hung up.
                Err(errno) => return Err(self.last_words().unwrap_or(errno.into())),
            }
        }
        Ok(())
    }

    fn receive(&mut self, wait: Wait) -> Result<(Reply, Vec<OwnedFd>)> {
        let within = match wait {
            Wait::For(within) => Some(within),
            Wait::WhileServed => Some(self.timeout),
            Wait::Event => None,
        };
        let mut until = within.map(|within| Instant::now() + within);
        loop {
            if let Some(Frame { bytes, fds }) = self.frames.take() {
                if self.overdue > 0 {
                    self.overdue -= 1;
                    // No other reply carries a descriptor.
                    self.late_channel =
                        fds.ok().and_then(|fds| fds.into_iter().next()).or(self.late_channel.take());
                    continue;
                }
                let reply = serde_json::from_slice(&bytes);
                return Ok((reply.map_err(|error| Error::Protocol(error.to_string()))?, fds?));
            }
            if self.frames.read(&self.socket)? || self.is_ready(PollFlags::IN, until)? {
                continue;
            }
            if wait == Wait::WhileServed && self.is_served() {
                until = Some(Instant::now() + self.timeout);
                continue;
            }
            self.overdue += 1;
            return Err(self.no_answer(within.unwrap_or_default()));
        }
    }

    /// Waits until the socket is ready; false where it was not in time.
    fn is_ready(&self, flags: PollFlags, until: Option<Instant>) -> Result<bool> {
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let left = left
                .map(|left| Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }));
            match poll(&mut [PollFd::new(&self.socket, flags)], left.as_ref()) {
                Err(Errno::INTR) => {}
                ready => return Ok(ready? > 0),
            }
        }
    }

    /// True unless the daemon answers nobody: asked on a connection of its own, which a limit of connections may
    /// refuse, and that is an answer.
    fn is_served(&self) -> bool {
        let Some(path) = &self.path else { return true };
        let asked = Self::connect_within(path, self.timeout).and_then(|mut other| {
            let call = Call { method: "org.varlink.service.GetInfo".into(), ..call_of("", &json!({}))? };
            other.send(&call, &[])?;
            other.receive(Wait::For(other.timeout))
        });
        !matches!(asked, Err(Error::NoAnswer { .. }))
    }

    /// Returns the error that the daemon has sent before it hung up, where it has.
    fn last_words(&mut self) -> Option<Error> {
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

    fn no_answer(&self, within: Duration) -> Error {
        let path = self.path.as_ref().map_or("passgate".into(), |path| path.display().to_string());
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

fn dial(path: &Path, timeout: Duration) -> Result<OwnedFd> {
    let address = address(path)?;
    let failed = |errno: Errno| Error::Socket {
        path: path.to_owned(),
        source: errno.into(),
        mend: match errno {
            Errno::NOENT | Errno::CONNREFUSED => ": start `passgate serve --socket-path` there first",
            Errno::ACCESS => ": connect as the user that the daemon runs as",
            _ => "",
        },
    };
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(failed)?;
    let until = Instant::now() + timeout;
    loop {
        // So long the kernel waits for room in a queue of connections that is full (unix_stream_connect in
        // net/unix/af_unix.c). Zero would be for ever.
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        set_socket_timeout(&socket, Timeout::Send, Some(left)).map_err(failed)?;
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

fn parse<T: DeserializeOwned>(verb: &str, parameters: Value) -> Result<T> {
    serde_json::from_value(parameters).map_err(|error| Error::Protocol(format!("{verb}: {error}")))
}

fn call_of(verb: &str, parameters: &impl Serialize) -> Result<Call> {
    let parameters = serde_json::to_value(parameters).map_err(|error| Error::Protocol(error.to_string()))?;
    Ok(Call { method: format!("{INTERFACE}.{verb}"), parameters, more: false, oneway: false, upgrade: false })
}

/// The values of a reply, or the error that it is.
fn check(reply: Reply) -> Result<Value> {
    let Some(error) = reply.error else { return Ok(reply.parameters) };
    let message = match reply.parameters["message"].as_str() {
        Some(message) => message.to_owned(),
        None => format!("{error} {}", reply.parameters),
    };
    let errno = reply.parameters["errno"].as_i64().and_then(|errno| i32::try_from(errno).ok());
    Err(Error::Refused { message, errno: errno.unwrap_or(Errno::PROTO.raw_os_error()) })
}
