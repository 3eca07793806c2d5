//! A front-end that says what it likes, byte by byte (vhost-user protocol, "Message Specification").

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::guest::{PLATFORM, USER};

/// Requests, by their numbers.
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
/// The highest that anybody knows.
pub const LAST: u32 = 46;

/// Header flags: the version, and that a reply is wanted.
pub const VERSION: u32 = 1;
pub const NEED_REPLY: u32 = 8;

/// A connection on which anything may be said.
pub struct Raw {
    socket: UnixStream,
}

/// What came of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Came {
    /// An answer: its payload.
    Reply(Vec<u8>),
    /// The end of the connection.
    End,
}

impl Came {
    /// Whether it is what was wrong: an answer that says so, or the end.
    pub fn is_no(&self) -> bool {
        !matches!(self, Self::Reply(bytes) if bytes[..] == [0; 8])
    }
}

/// Words as they go over the wire.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Half words.
pub fn halves(halves: &[u32]) -> Vec<u8> {
    halves.iter().flat_map(|half| half.to_le_bytes()).collect()
}

/// A memory table: guest-physical address, length, address in the front-end, offset, of each region.
pub fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut bytes = halves(&[regions.len() as u32, 0]);
    regions.iter().for_each(|region| bytes.extend(words(region)));
    bytes
}

/// One region, for a message of its own.
pub fn region(region: [u64; 4]) -> Vec<u8> {
    let [gpa, len, user, offset] = region;
    words(&[0, gpa, len, user, offset])
}

/// A region at the usual place in the front-end.
pub fn at(gpa: u64, len: u64, offset: u64) -> [u64; 4] {
    [gpa, len, USER.wrapping_add(gpa), offset]
}

impl Raw {
    pub fn connect(path: &Path) -> Self {
        Self::with(UnixStream::connect(path).unwrap())
    }

    fn with(socket: UnixStream) -> Self {
        // Nobody is waited for as long as this: a test that hangs fails.
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { socket }
    }

    /// The connection of a front-end that has behaved so far.
    pub fn over(socket: &UnixStream) -> Self {
        Self::with(socket.try_clone().unwrap())
    }

    /// A connection that is greeted as it should be, up to its memory.
    pub fn greeted(path: &Path) -> Self {
        let raw = Self::connect(path);
        raw.send(SET_OWNER, VERSION, &[], &[]);
        let features = raw.asks(GET_FEATURES, &[]);
        let features = u64::from_le_bytes(features[..].try_into().unwrap()) & !PLATFORM;
        let features = features.to_le_bytes();
        raw.send(SET_FEATURES, VERSION, &features, &[]);
        let features = raw.asks(GET_PROTOCOL_FEATURES, &[]);
        raw.send(SET_PROTOCOL_FEATURES, VERSION, &features, &[]);
        raw
    }

    /// Sends bytes as they are; false where nobody is there any more.
    pub fn bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).is_ok()
    }

    /// A whole message.
    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut bytes = halves(&[request, flags, payload.len() as u32]);
        bytes.extend(payload);
        self.bytes(&bytes, fds)
    }

    /// One that has an answer of its own.
    pub fn asks(&self, request: u32, payload: &[u8]) -> Vec<u8> {
        assert!(self.send(request, VERSION, payload, &[]));
        match self.hears() {
            Came::Reply(bytes) => bytes,
            Came::End => panic!("request {request} was answered by the end"),
        }
    }

    /// One that is to be acknowledged.
    pub fn says(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Came {
        match self.send(request, VERSION | NEED_REPLY, payload, fds) {
            true => self.hears(),
            false => Came::End,
        }
    }

    /// The same request, without reading an answer, until the back-end does not read any more.
    pub fn says_until_nobody_reads(&self, request: u32) {
        self.socket.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        while self.send(request, VERSION, &[], &[]) {}
    }

    /// The next answer.
    pub fn hears(&self) -> Came {
        let mut header = [0; 12];
        if !self.fill(&mut header) {
            return Came::End;
        }
        let size = u32::from_le_bytes(header[8..].try_into().unwrap());
        assert!(size <= 4096, "an answer of {size} bytes");
        let mut payload = vec![0; size as usize];
        match self.fill(&mut payload) {
            true => Came::Reply(payload),
            false => Came::End,
        }
    }

    /// Says nothing more: whatever the back-end does about what was said, it has done when this returns.
    pub fn leaves(self) {
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
                Err(error) => panic!("neither an answer nor an end: {error}"),
            }
        }
        true
    }
}
