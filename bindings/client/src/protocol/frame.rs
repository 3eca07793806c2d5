//! Varlink frames on a stream socket: NUL-terminated JSON, and the file descriptors sent with it (SCM_RIGHTS).
//!
//! The length of a frame, the number of its descriptors and the bytes of one read are limited. Received descriptors are
//! close-on-exec.

use std::collections::VecDeque;
use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The maximum length of a frame in bytes, its NUL included.
pub const MAX_FRAME_BYTES: usize = 64 * 1024;
/// The maximum length of a reply in bytes. It is larger than [`MAX_FRAME_BYTES`]: a status with many ranges, or metrics, can be long.
pub const MAX_REPLY_BYTES: usize = 1 << 20;
/// The maximum number of descriptors of one frame.
pub const MAX_FDS: usize = 16;
/// The maximum number of descriptors that the kernel passes in one message (`SCM_MAX_FD` in include/net/scm.h). The
/// receive buffer has room for all of them, so that a truncated control message can have only one reason.
const SCM_MAX_FD: usize = 253;

/// The reason why a stream of frames, or one frame's descriptors, cannot be read. Its text is the error message for the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameError {
    /// The peer has closed the connection.
    Closed,
    /// A frame is longer than this limit in bytes.
    TooLong(usize),
    /// A frame has more than [`MAX_FDS`] descriptors.
    TooManyFds,
    /// The kernel has discarded descriptors of the frame.
    FdsLost,
    /// The read failed.
    Failed(Errno),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the peer has closed the connection"),
            Self::TooLong(limit) => write!(f, "a frame is longer than {limit} bytes"),
            Self::TooManyFds => write!(f, "more than {MAX_FDS} file descriptors came with one frame"),
            Self::FdsLost => f.write_str(
                "file descriptors of the message were lost, because this process has reached its limit of open files: \
                 raise it (`ulimit -n`, `LimitNOFILE=`)",
            ),
            Self::Failed(errno) => write!(f, "cannot read from the connection: {errno}"),
        }
    }
}

impl std::error::Error for FrameError {}

/// The receiving side of a stream of frames.
#[derive(Debug)]
pub struct Frames {
    /// The maximum length of a frame in bytes, its NUL included.
    max_frame: usize,
    /// The bytes received and not yet taken.
    bytes: Vec<u8>,
    /// The number of leading bytes that are known to have no NUL.
    searched: usize,
    /// The descriptors received, each with the index of the last byte received with it. The kernel ends a read after a message
    /// with descriptors, so they belong to the frame that has this byte.
    fds: VecDeque<(usize, OwnedFd)>,
    /// The indexes of bytes, as in `fds`, whose descriptors the kernel has discarded.
    lost: VecDeque<usize>,
}

/// One whole frame.
#[derive(Debug)]
pub struct Frame {
    /// The bytes, without the NUL.
    pub bytes: Vec<u8>,
    /// All descriptors sent with it, or [`FrameError::FdsLost`].
    pub fds: Result<Vec<OwnedFd>, FrameError>,
}

impl Default for Frames {
    fn default() -> Self {
        Self::with_max_frame(MAX_FRAME_BYTES)
    }
}

impl Frames {
    /// Returns an empty stream with this maximum length of a frame in bytes, its NUL included.
    pub fn with_max_frame(max_frame: usize) -> Self {
        Self { max_frame, bytes: Vec::new(), searched: 0, fds: VecDeque::new(), lost: VecDeque::new() }
    }

    /// Reads once from `socket` without blocking. Returns false where nothing was available.
    pub fn read(&mut self, socket: impl AsFd) -> Result<bool, FrameError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut chunk = [0; 4096];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = loop {
            match recvmsg(&socket, &mut [IoSliceMut::new(&mut chunk)], &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(FrameError::Failed(errno)),
                Ok(received) => break received,
            }
        };
        let last = (self.bytes.len() + received.bytes).saturating_sub(1);
        // The buffer has room for all descriptors of a message, so the kernel truncates them only where this process has
        // reached its limit of open files (scm_detach_fds in net/core/scm.c).
        if received.flags.contains(ReturnFlags::CTRUNC) {
            self.lost.push_back(last);
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds.map(|fd| (last, fd)));
            }
        }
        if self.fds.len() > MAX_FDS {
            return Err(FrameError::TooManyFds);
        }
        if received.bytes == 0 {
            return Err(FrameError::Closed);
        }
        self.bytes.extend_from_slice(&chunk[..received.bytes]);
        // One whole frame and a part of the next are allowed: a peer has no reason to send more before it has read a reply.
        let has_frame = self.bytes.iter().take(self.max_frame).any(|byte| *byte == 0);
        if self.bytes.len() > if has_frame { 2 * self.max_frame } else { self.max_frame } {
            return Err(FrameError::TooLong(self.max_frame));
        }
        Ok(true)
    }

    /// Returns true where a whole frame has been received.
    pub fn has_frame(&self) -> bool {
        self.bytes.contains(&0)
    }

    /// Removes and returns the next whole frame.
    pub fn take(&mut self) -> Option<Frame> {
        let end = self.bytes[self.searched..].iter().position(|byte| *byte == 0);
        let Some(end) = end.map(|end| self.searched + end) else {
            self.searched = self.bytes.len();
            return None;
        };
        let rest = self.bytes.split_off(end + 1);
        let mut bytes = std::mem::replace(&mut self.bytes, rest);
        bytes.pop();
        self.searched = 0;
        let fd_count = self.fds.iter().take_while(|(at, _)| *at <= end).count();
        let fds = self.fds.drain(..fd_count).map(|(_, fd)| fd).collect();
        for (at, _) in &mut self.fds {
            *at -= end + 1;
        }
        let lost_count = self.lost.iter().take_while(|at| **at <= end).count();
        self.lost.drain(..lost_count);
        for at in &mut self.lost {
            *at -= end + 1;
        }
        let fds = if lost_count > 0 { Err(FrameError::FdsLost) } else { Ok(fds) };
        Some(Frame { bytes, fds })
    }
}

/// Sends `bytes` without blocking, with `fds` on the first byte. Returns the number of bytes sent. `EINVAL` for more than
/// [`MAX_FDS`] descriptors, `EAGAIN` where the socket's buffer is full.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    loop {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}
