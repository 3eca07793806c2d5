//! The `epoll` crate, with the descriptor owned.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use epoll::{ControlOptions, Event, Events};

/// A set of descriptors to wait on, each with a token.
#[derive(Debug)]
pub(super) struct Poller(RawFd);

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interest {
    /// Something to read.
    Read,
    /// Something more to read than before; nobody needs to read it.
    News,
    /// Room to write.
    Write,
    /// Nothing for now.
    Nothing,
}

impl Interest {
    fn events(self) -> Events {
        match self {
            Self::Read => Events::EPOLLIN | Events::EPOLLRDHUP,
            Self::News => Events::EPOLLIN | Events::EPOLLET,
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

    pub(super) fn forget(&self, fd: impl AsFd) -> std::io::Result<()> {
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

    /// Waits for `timeout_ms` at most (-1: for ever); the tokens that are ready.
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
