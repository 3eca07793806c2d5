//! The loop to compare with: the cost of a conversion in kernel calls, without passgate.
//!
//! Each round sends a message to another thread and back (the begin), clears the slot and waits for its tag, punches the
//! page, touches it, fills the slot, and sends a message and back again (the end).

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::uring::{Completion, Completions, Ring, Slot};
use passgate_bindings::{Failed, PAGE};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::PAGES;
use super::device::random;
use super::memory::Memory;
use super::report::Turn;
use crate::error::{Error, Result};
use crate::protocol::RECORD_LEN;

/// The raw loop, with memory, a ring and an echo thread of its own.
pub(super) struct RawLoop {
    file: Arc<GuestFile>,
    _memory: Memory,
    ring: Arc<Ring>,
    completions: Completions,
    socket: OwnedFd,
    echo: Option<JoinHandle<()>>,
    random: Box<dyn FnMut() -> u64>,
}

impl RawLoop {
    /// Allocates the memory, maps all of it, and starts the echo thread.
    pub(super) fn new() -> Result<Self> {
        let memory = Memory::new(PAGES)?;
        let file = Arc::clone(&memory.file);
        let open = Ring::open(8, PAGES as u32).map_err(passgate_backends::Error::from)?;
        let (ring, _, completions) = open;
        for page in 0..PAGES {
            ring.fill(Slot(page as u16), &file, page * PAGE, PAGE).map_err(Error::Call)?;
        }
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (socket, peer) = pair.map_err(|errno| Error::Call(Failed::new("socketpair", errno)))?;
        let echo = move || {
            let mut record = [0; RECORD_LEN];
            while let Ok((_, len)) = recv(&peer, &mut record, RecvFlags::empty()) {
                if len == 0 || send(&peer, &record[..len], SendFlags::NOSIGNAL).is_err() {
                    return;
                }
            }
        };
        let echo = std::thread::Builder::new().name("echo".into()).spawn(echo).map_err(Error::Thread)?;
        Ok(Self {
            file,
            _memory: memory,
            ring,
            completions,
            socket,
            echo: Some(echo),
            random: Box::new(random()),
        })
    }

    /// Does rounds for `time`. Returns their number.
    pub(super) fn turn(&mut self, time: Duration) -> Result<Turn> {
        let mut turn = Turn::default();
        let start = Instant::now();
        while start.elapsed() < time {
            let page = (self.random)() % PAGES;
            self.round(page)?;
            turn.rounds += 1;
        }
        turn.time = start.elapsed();
        Ok(turn)
    }

    fn round(&mut self, page: u64) -> Result<()> {
        let slot = Slot(page as u16);
        self.round_trip()?;
        self.ring.clear(slot, 1).map_err(|failed| Error::Call(failed.without_partial()))?;
        let mut released = false;
        while !released {
            self.completions.reap(|completion| released |= matches!(completion, Completion::Released(_)));
        }
        self.file.punch(page * PAGE, PAGE).map_err(Error::Memory)?;
        self.file.store(page * PAGE, page).map_err(Error::Memory)?;
        self.ring.fill(slot, &self.file, page * PAGE, PAGE).map_err(Error::Call)?;
        self.round_trip()
    }

    fn round_trip(&self) -> Result<()> {
        let mut record = [0; RECORD_LEN];
        let failed = |call| move |errno| Error::Call(Failed::new(call, errno));
        send(&self.socket, &record, SendFlags::NOSIGNAL).map_err(failed("send"))?;
        recv(&self.socket, &mut record, RecvFlags::empty()).map_err(failed("recv"))?;
        Ok(())
    }
}

impl Drop for RawLoop {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        if let Some(echo) = self.echo.take() {
            let _ = echo.join();
        }
    }
}
