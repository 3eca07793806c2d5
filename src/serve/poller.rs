//! An epoll instance that owns its descriptor, over the `epoll` crate.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use epoll::{ControlOptions, Event, Events};

/// An epoll instance. Each descriptor in it has a token. Closed when dropped.
#[derive(Debug)]
pub(super) struct Poller(RawFd);

/// The readiness to wait for (epoll(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interest {
    /// Readable, or the peer has shut its sending side down; level-triggered.
    Read,
    /// Readable; edge-triggered: reported once for each write of the other side, also if nothing is read.
    ReadEdge,
    /// Writable; level-triggered.
    Write,
    /// No readiness; errors and hang-ups are reported all the same.
    Nothing,
}

impl Interest {
    fn events(self) -> Events {
        match self {
            Self::Read => Events::EPOLLIN | Events::EPOLLRDHUP,
            Self::ReadEdge => Events::EPOLLIN | Events::EPOLLET,
            Self::Write => Events::EPOLLOUT,
            Self::Nothing => Events::empty(),
        }
    }
}

impl Poller {
    pub(super) fn new() -> std::io::Result<Self> {
        epoll::create(true).map(Self)
    }

    pub(super) fn add(&self, fd: impl AsFd, interest: Interest, token: u64) -> std::io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, interest, token)
    }

    pub(super) fn change(&self, fd: impl AsFd, interest: Interest, token: u64) -> std::io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_MOD, fd, interest, token)
    }

    pub(super) fn remove(&self, fd: impl AsFd) -> std::io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_DEL, fd, Interest::Nothing, 0)
    }

    fn control(
        &self,
        option: ControlOptions,
        fd: impl AsFd,
        interest: Interest,
        token: u64,
    ) -> std::io::Result<()> {
        epoll::ctl(self.0, option, fd.as_fd().as_raw_fd(), Event::new(interest.events(), token))
    }

    /// Waits for at most `timeout_ms` milliseconds (-1: no limit), and replaces `tokens` by those that are ready, at most 64.
    /// An interrupted wait returns none.
    pub(super) fn wait(&self, timeout_ms: i32, tokens: &mut Vec<u64>) -> std::io::Result<()> {
        let mut events = [Event { events: 0, data: 0 }; 64];
        let count = match epoll::wait(self.0, timeout_ms, &mut events) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        tokens.clear();
        tokens.extend(events[..count].iter().map(|event| event.data));
        Ok(())
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        let _ = epoll::close(self.0);
    }
}
