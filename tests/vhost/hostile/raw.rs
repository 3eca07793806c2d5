//! A front-end that can send any bytes (vhost-user protocol, "Message Specification").

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::guest::{ACCESS_PLATFORM, USER_ADDR};

/// Request numbers `VHOST_USER_…` (vhost-user protocol, "Front-end message types").
pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const RESET_OWNER: u32 = 4;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_LOG_BASE: u32 = 6;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const SET_INFLIGHT_FD: u32 = 32;
pub const RESET_DEVICE: u32 = 34;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;
/// The highest request number of the specification.
pub const MAX_KNOWN_REQUEST: u32 = 46;

/// Header flags: the version, and the request for an acknowledgement (`need_reply`).
pub const VERSION: u32 = 1;
pub const NEED_REPLY: u32 = 8;

/// A connection on which any message can be sent.
pub struct Raw {
    socket: UnixStream,
}

/// The back-end's response to a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// A reply, with its payload.
    Reply(Vec<u8>),
    /// The end of the connection.
    Disconnected,
}

impl Response {
    /// Returns true if the message was refused: by a non-zero acknowledgement, or by the end of the connection.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Self::Reply(bytes) if bytes[..] == [0; 8])
    }
}

/// Returns 64-bit words in wire format.
pub fn u64s(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Returns 32-bit words in wire format.
pub fn u32s(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Returns the payload of `SET_MEM_TABLE`; each region is guest-physical address, length, front-end address, offset.
pub fn mem_table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut bytes = u32s(&[regions.len() as u32, 0]);
    regions.iter().for_each(|region| bytes.extend(u64s(region)));
    bytes
}

/// Returns the payload of `ADD_MEM_REG` and `REM_MEM_REG`.
pub fn single_region(region: [u64; 4]) -> Vec<u8> {
    let [gpa, len, user, offset] = region;
    u64s(&[0, gpa, len, user, offset])
}

/// Returns a region with the usual front-end address.
pub fn region_at(gpa: u64, len: u64, offset: u64) -> [u64; 4] {
    [gpa, len, USER_ADDR.wrapping_add(gpa), offset]
}

impl Raw {
    pub fn connect(path: &Path) -> Self {
        Self::with(UnixStream::connect(path).unwrap())
    }

    fn with(socket: UnixStream) -> Self {
        // A test that would hang fails after this time.
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { socket }
    }

    /// Uses the connection of a front-end that has been correct so far.
    pub fn over_socket(socket: &UnixStream) -> Self {
        Self::with(socket.try_clone().unwrap())
    }

    /// Connects, and negotiates features as a correct front-end does; memory is not set yet.
    pub fn negotiated(path: &Path) -> Self {
        let raw = Self::connect(path);
        raw.send(SET_OWNER, VERSION, &[], &[]);
        let features = raw.call(GET_FEATURES, &[]);
        let features = u64::from_le_bytes(features[..].try_into().unwrap()) & !ACCESS_PLATFORM;
        let features = features.to_le_bytes();
        raw.send(SET_FEATURES, VERSION, &features, &[]);
        let features = raw.call(GET_PROTOCOL_FEATURES, &[]);
        raw.send(SET_PROTOCOL_FEATURES, VERSION, &features, &[]);
        raw
    }

    /// Sends raw bytes with descriptors; returns false if the connection has ended.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).is_ok()
    }

    /// Sends a whole message; returns false if the connection has ended.
    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut bytes = u32s(&[request, flags, payload.len() as u32]);
        bytes.extend(payload);
        self.send_bytes(&bytes, fds)
    }

    /// Sends a request that has a reply of its own, and returns the reply's payload.
    pub fn call(&self, request: u32, payload: &[u8]) -> Vec<u8> {
        assert!(self.send(request, VERSION, payload, &[]));
        match self.receive() {
            Response::Reply(bytes) => bytes,
            Response::Disconnected => panic!("request {request} ended the connection"),
        }
    }

    /// Sends a request with `need_reply`, and returns the response.
    pub fn send_with_ack(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Response {
        match self.send(request, VERSION | NEED_REPLY, payload, fds) {
            true => self.receive(),
            false => Response::Disconnected,
        }
    }

    /// Sends a request repeatedly without reading the replies, until the back-end reads no more.
    pub fn send_until_full(&self, request: u32) {
        self.socket.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        while self.send(request, VERSION, &[], &[]) {}
    }

    /// Receives the next response.
    pub fn receive(&self) -> Response {
        let mut header = [0; 12];
        if !self.fill(&mut header) {
            return Response::Disconnected;
        }
        let size = u32::from_le_bytes(header[8..].try_into().unwrap());
        assert!(size <= 4096, "a reply of {size} bytes");
        let mut payload = vec![0; size as usize];
        match self.fill(&mut payload) {
            true => Response::Reply(payload),
            false => Response::Disconnected,
        }
    }

    /// Closes the sending side and reads to the end: the back-end has then handled everything that was sent.
    pub fn close(self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
        let mut rest = [0; 4096];
        while let Ok(1..) = (&self.socket).read(&mut rest) {}
    }

    fn fill(&self, mut bytes: &mut [u8]) -> bool {
        while !bytes.is_empty() {
            match (&self.socket).read(bytes) {
                Ok(0) => return false,
                Ok(more) => bytes = &mut bytes[more..],
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return false,
                Err(error) => panic!("neither a reply nor the end of the connection: {error}"),
            }
        }
        true
    }
}
