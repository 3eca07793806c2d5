//! Varlink frames on a stream socket: NUL-ended JSON, with the file descriptors that came along.
//!
//! Everything is bounded: a frame, its descriptors, what is read at a time. Descriptors arrive close-on-exec.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Bytes of the longest frame, its NUL included.
pub const MAX_FRAME: usize = 64 * 1024;
/// Bytes of the longest reply: a status that has much to tell, or metrics.
pub const MAX_REPLY: usize = 1 << 20;
/// Descriptors that may come with one frame.
pub const MAX_FDS: usize = 16;
/// Descriptors that the kernel passes at once at most (`SCM_MAX_FD`): room for all, so that none is lost unseen.
const KERNEL_FDS: usize = 253;

/// Why a stream cannot be read any further. The text is the message that the user reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The peer has closed it.
    #[error("the peer has closed the connection")]
    Closed,
    /// A frame too long.
    #[error("a frame is longer than {0} bytes")]
    TooLong(usize),
    /// Too many descriptors.
    #[error("more than {MAX_FDS} file descriptors came with one frame")]
    TooManyFds,
    /// Descriptors that came along were lost on the way.
    #[error(
        "file descriptors that came along were lost, because this process has as many files open as it may: raise \
         the limit (`ulimit -n`, `LimitNOFILE=`)"
    )]
    FdsLost,
    /// The kernel would not.
    #[error("cannot read from the connection: {0}")]
    Failed(Errno),
}

/// One side of a stream of frames.
#[derive(Debug)]
pub struct Frames {
    /// Bytes of the longest frame.
    longest: usize,
    bytes: Vec<u8>,
    searched: usize,
    /// Descriptors, and the byte that they came with: the kernel ends a read behind the message that has them.
    fds: VecDeque<(usize, OwnedFd)>,
    /// The bytes that came with descriptors which this process had no room for.
    lost: VecDeque<usize>,
}

/// One whole frame.
#[derive(Debug)]
pub struct Frame {
    /// Its bytes, without the NUL.
    pub bytes: Vec<u8>,
    /// The descriptors that came with it: all of them, or [`FrameError::FdsLost`].
    pub fds: Result<Vec<OwnedFd>, FrameError>,
}

impl Default for Frames {
    fn default() -> Self {
        Self::of_at_most(MAX_FRAME)
    }
}

impl Frames {
    /// Frames of at most that many bytes, their NUL included.
    pub fn of_at_most(longest: usize) -> Self {
        Self { longest, bytes: Vec::new(), searched: 0, fds: VecDeque::new(), lost: VecDeque::new() }
    }

    /// Reads once what has come, and does not wait for more. `Ok(false)` where nothing has.
    pub fn read(&mut self, socket: impl AsFd) -> Result<bool, FrameError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut chunk = [0; 4096];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = loop {
            match recvmsg(&socket, &mut [IoSliceMut::new(&mut chunk)], &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(FrameError::Failed(errno)),
                Ok(got) => break got,
            }
        };
        let last = (self.bytes.len() + got.bytes).saturating_sub(1);
        // There is room for all that the kernel passes, so what was cut off is what this process may not open (scm_detach_fds
        // in net/core/scm.c).
        if got.flags.contains(ReturnFlags::CTRUNC) {
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
        if got.bytes == 0 {
            return Err(FrameError::Closed);
        }
        self.bytes.extend_from_slice(&chunk[..got.bytes]);
        // One frame, and a part of the next: nobody need send more before he has read an answer.
        let frame = self.bytes.iter().take(self.longest).any(|byte| *byte == 0);
        if self.bytes.len() > if frame { 2 * self.longest } else { self.longest } {
            return Err(FrameError::TooLong(self.longest));
        }
        Ok(true)
    }

    /// Whether a whole frame has come.
    pub fn has_frame(&self) -> bool {
        self.bytes.contains(&0)
    }

    /// The next whole frame.
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
        let with = self.fds.iter().take_while(|(at, _)| *at <= end).count();
        let fds = self.fds.drain(..with).map(|(_, fd)| fd).collect();
        for (at, _) in &mut self.fds {
            *at -= end + 1;
        }
        let lost = self.lost.iter().take_while(|at| **at <= end).count();
        self.lost.drain(..lost);
        for at in &mut self.lost {
            *at -= end + 1;
        }
        let fds = if lost > 0 { Err(FrameError::FdsLost) } else { Ok(fds) };
        Some(Frame { bytes, fds })
    }
}

/// Sends what the socket takes of `bytes`, with `fds` on the first byte, and does not wait; how many bytes went.
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
