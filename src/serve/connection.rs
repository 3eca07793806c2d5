//! One client's sockets, with its received and its unsent data. Every buffer here is bounded.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use crate::protocol::verbs::Reply;
use crate::protocol::{Frames, Record, frame};

/// The number of unsent bytes beyond which a client's connection is closed.
const MAX_UNSENT_BYTES: usize = 1 << 20;

/// The state of a client's control socket. It serves one call at a time: the next one is not read before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ControlState {
    /// The next call may be read.
    Idle,
    /// The call of this number is not answered yet.
    AwaitingAnswer(u64),
    /// The client listens to events until it disconnects.
    Subscribed {
        /// The sequence number of the first event that has not been sent.
        next: u64,
    },
}

/// The limit that a connection counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConnectionClass {
    /// Counts against `max_clients`.
    Ordinary,
    /// Counts against the reserve for operators; may make short calls only.
    Operator,
    /// Made by this process itself; counts against no limit.
    Internal,
}

/// One client.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: OwnedFd,
    pub(super) class: ConnectionClass,
    pub(super) frames: Frames,
    pub(super) control: ControlState,
    /// The number of calls so far; the number of the last one.
    pub(super) calls: u64,
    /// The number of the last `RemoveMemory` call. Its reply has no verdict: a removal that fails is reported as an error.
    pub(super) removal: Option<u64>,
    pub(super) channel: Option<Channel>,
    /// Set once the client has called `AddMemory`, `OpenChannel` or `Adopt`. Never cleared: it decides who may release a
    /// quarantine (docs/threat-model.md).
    pub(super) speaks_for_vm: bool,
    unsent: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    unsent_bytes: usize,
}

/// A client's notification channel.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) socket: OwnedFd,
    unsent: VecDeque<Record>,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, class: ConnectionClass) -> Self {
        Self {
            socket,
            class,
            frames: Frames::default(),
            control: ControlState::Idle,
            calls: 0,
            removal: None,
            channel: None,
            speaks_for_vm: false,
            unsent: VecDeque::new(),
            unsent_bytes: 0,
        }
    }

    /// Returns true if a whole call has been read and may be served.
    pub(super) fn has_call(&mut self) -> bool {
        self.control == ControlState::Idle && !self.is_behind() && self.frames.has_frame()
    }

    /// Returns true while a reply waits for room in the socket.
    pub(super) fn is_behind(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Returns true if more than [`MAX_UNSENT_BYTES`] wait: the client does not read.
    pub(super) fn exceeds_unsent_limit(&self) -> bool {
        self.unsent_bytes > MAX_UNSENT_BYTES
    }

    /// Sends whole frames; queues what the socket does not take.
    pub(super) fn send(&mut self, bytes: Vec<u8>, fd: Option<OwnedFd>) {
        self.unsent_bytes += bytes.len();
        self.unsent.push_back((bytes, fd));
        // An error of the socket shows again at its next read.
        let _ = self.flush();
    }

    /// Sends as much of the queue as the socket takes.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        while let Some((bytes, fd)) = self.unsent.front_mut() {
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            match frame::send(&self.socket, bytes, &fds) {
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
                Ok(sent) => {
                    // The descriptor has gone with the first byte that was sent (unix(7), SCM_RIGHTS).
                    *fd = None;
                    self.unsent_bytes -= sent;
                    if sent < bytes.len() {
                        bytes.drain(..sent);
                        return Ok(());
                    }
                    self.unsent.pop_front();
                }
            }
        }
        Ok(())
    }
}

/// Returns a reply as it is sent: JSON and a NUL byte (varlink).
pub(super) fn frame(reply: &Reply) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(reply).unwrap_or_default();
    bytes.push(0);
    bytes
}

impl Channel {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, unsent: VecDeque::new() }
    }

    /// Returns true while a record waits for room in the socket. No request is read meanwhile, so the queue is bounded by
    /// the number of requests in progress.
    pub(super) fn is_behind(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends a record, or queues it if the socket is full.
    pub(super) fn send(&mut self, record: Record) {
        self.unsent.push_back(record);
        let _ = self.flush();
    }

    /// Sends as much of the queue as the socket takes.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        while let Some(record) = self.unsent.front() {
            match send(&self.socket, &record.to_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
                Ok(_) => _ = self.unsent.pop_front(),
            }
        }
        Ok(())
    }
}
