//! What the author of a VMM links: connect, add memory, ask before every conversion, say how it went.
//!
//! Two sockets, as docs/protocol.md has them: [`Client`] is the control socket, one blocking call at a time;
//! [`Channel`] is the notification channel for the hot path; [`Events`] is the stream of notices. The client never
//! converts anything by itself, and where the daemon is gone every call is an error: without it no conversion
//! happens.
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
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::protocol::frame::{self, Frames, MAX_REPLY};
use crate::protocol::verbs::{
    Call, Dma, DmaDone, Explain, INTERFACE, Metrics, Release, Released, RemoveMemory, Reply, Subscribe,
};

pub use crate::gate::{Outcome, PageState};
pub use crate::protocol::verbs::{
    AddMemory, Adopted, AdoptedRegion, Convert, Converted, MemoryAdded, State, Status, Unended,
};
pub use channel::{Answer, Channel, Failure, Ticket};
pub use events::{Event, Events};

/// A connection to one VM's daemon. What it added goes when it is closed.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    frames: Frames,
}

impl Client {
    /// Connects to the daemon that listens at `path`.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        dial(path).map(Self::from_fd).map_err(|errno| Error::Socket {
            path: path.to_owned(),
            source: errno.into(),
            mend: match errno {
                Errno::NOENT | Errno::CONNREFUSED => ": start `passgate serve --socket-path` there first",
                Errno::ACCESS => ": connect as the user that the daemon runs as",
                _ => "",
            },
        })
    }

    /// Takes a connected stream socket, for a VMM that was handed one.
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { socket, frames: Frames::of_at_most(MAX_REPLY) }
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

    /// Opens the notification channel.
    pub fn open_channel(&mut self) -> Result<Channel> {
        let (_, fds) = self.round("OpenChannel", &json!({}), &[])?;
        let fd = fds.into_iter().next();
        fd.map(Channel::from_fd).ok_or_else(|| Error::Protocol("OpenChannel without a descriptor".into()))
    }

    /// Has passgate change a range itself; only in memory added with `sole_mapper`.
    pub fn convert(&mut self, convert: &Convert) -> Result<Converted> {
        self.call("Convert", convert, &[])
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
        let (first, _) = self.receive()?;
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
        let (parameters, _) = self.round(verb, parameters, fds)?;
        serde_json::from_value(parameters).map_err(|error| Error::Protocol(format!("{verb}: {error}")))
    }

    fn round(
        &mut self,
        verb: &str,
        parameters: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Value, Vec<OwnedFd>)> {
        self.send(&call_of(verb, parameters)?, fds)?;
        let (reply, fds) = self.receive()?;
        Ok((check(reply)?, fds))
    }

    fn send(&self, call: &Call, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut bytes = serde_json::to_vec(call).map_err(|error| Error::Protocol(error.to_string()))?;
        bytes.push(0);
        let mut gone = 0;
        while gone < bytes.len() {
            gone += frame::send(&self.socket, &bytes[gone..], if gone == 0 { fds } else { &[] })?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(Reply, Vec<OwnedFd>)> {
        loop {
            if let Some((frame, fds)) = self.frames.take() {
                let reply = serde_json::from_slice(&frame);
                return Ok((reply.map_err(|error| Error::Protocol(error.to_string()))?, fds));
            }
            if !self.frames.read(&self.socket)? {
                // A socket that was handed to us may be one that does not block.
                poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], None)?;
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn dial(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
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
