//! One client's sockets: what came, what is to go, what it waits for. Everything bounded.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use zerocopy::IntoBytes;

use crate::protocol::verbs::Reply;
use crate::protocol::{Frames, Record, frame};

/// Bytes that may wait to be sent to one client.
const MAX_UNSENT: usize = 1 << 20;

/// What a client's control socket waits for. It has one call at a time: the next is not read before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    /// For nothing: the next call may be read.
    No,
    /// For the answer to the call of this number.
    Answer(u64),
    /// For notices, until it goes.
    Notices {
        /// The sequence number of the one that it is sent next.
        next: u64,
    },
}

/// What a connection counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// One of those that there may be so many of.
    Ordinary,
    /// One of the reserve for operators, which may make short calls only.
    Operator,
    /// One of this process's own, which no limit concerns.
    Inside,
}

/// One client.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: OwnedFd,
    pub(super) place: Place,
    pub(super) frames: Frames,
    pub(super) waiting: Waiting,
    pub(super) calls: u64,
    /// The call that is to remove memory, while it waits: it has no words for a removal that fails.
    pub(super) removal: Option<u64>,
    pub(super) channel: Option<Channel>,
    /// Whether it has added memory or opened a channel.
    pub(super) speaks_for_vm: bool,
    unsent: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    unsent_bytes: usize,
}

/// Its notification channel.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) socket: OwnedFd,
    unsent: VecDeque<Record>,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, place: Place) -> Self {
        Self {
            socket,
            place,
            frames: Frames::default(),
            waiting: Waiting::No,
            calls: 0,
            removal: None,
            channel: None,
            speaks_for_vm: false,
            unsent: VecDeque::new(),
            unsent_bytes: 0,
        }
    }

    /// Whether a whole call lies read, and may be done.
    pub(super) fn has_call(&mut self) -> bool {
        self.waiting == Waiting::No && !self.is_behind() && self.frames.has_frame()
    }

    /// Whether a reply waits for room in the socket.
    pub(super) fn is_behind(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Whether so much waits that the client cannot be reading.
    pub(super) fn is_deaf(&self) -> bool {
        self.unsent_bytes > MAX_UNSENT
    }

    /// Sends whole frames, or keeps them until there is room.
    pub(super) fn send(&mut self, bytes: Vec<u8>, fd: Option<OwnedFd>) {
        self.unsent_bytes += bytes.len();
        self.unsent.push_back((bytes, fd));
        // A socket that is broken is found so by the next read.
        let _ = self.flush();
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        while let Some((bytes, fd)) = self.unsent.front_mut() {
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            match frame::send(&self.socket, bytes, &fds) {
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
                Ok(sent) => {
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

/// A reply as it goes, its NUL included.
pub(super) fn frame(reply: &Reply) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(reply).unwrap_or_default();
    bytes.push(0);
    bytes
}

impl Channel {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, unsent: VecDeque::new() }
    }

    /// Whether a record waits for room in the socket. No request is read meanwhile, so what waits is bounded by
    /// the requests under way.
    pub(super) fn is_behind(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends a record, or keeps it until there is room.
    pub(super) fn send(&mut self, record: Record) {
        self.unsent.push_back(record);
        let _ = self.flush();
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        while let Some(record) = self.unsent.front() {
            match send(&self.socket, record.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
                Ok(_) => _ = self.unsent.pop_front(),
            }
        }
        Ok(())
    }
}
