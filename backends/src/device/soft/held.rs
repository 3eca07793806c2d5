//! A DMA that has begun and does not end by itself.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use passgate_bindings::Failed;
use rustix::io::Errno;

use crate::iommu::soft::reaper::Flight;
use crate::iommu::soft::{SoftDomain, lock};

/// What keeps a held operation waiting.
#[derive(Debug)]
enum End {
    /// The inlet of a pipe that it reads from.
    Pipe(OwnedFd),
    /// The connection that it sends over.
    Socket(OwnedFd),
    /// Nothing any more.
    Cut,
}

/// What the device keeps of a held operation.
#[derive(Debug)]
pub(super) struct Holding {
    pub(super) flight: Arc<Flight>,
    end: Mutex<End>,
}

impl Holding {
    pub(super) fn pipe(flight: Arc<Flight>, inlet: OwnedFd) -> Self {
        Self { flight, end: Mutex::new(End::Pipe(inlet)) }
    }

    /// The connection is set to be reset when it is closed: so the pages are let go of also when this process
    /// is killed, instead of when TCP gives up.
    pub(super) fn socket(flight: Arc<Flight>, socket: OwnedFd) -> Result<Self, Failed> {
        rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO))
            .map_err(|errno| Failed::new("SO_LINGER", errno))?;
        Ok(Self { flight, end: Mutex::new(End::Socket(socket)) })
    }

    /// A second descriptor of the socket.
    pub(super) fn socket_fd(&self) -> Result<OwnedFd, Failed> {
        match &*lock(&self.end) {
            End::Socket(socket) => {
                rustix::io::fcntl_dupfd_cloexec(socket, 0).map_err(|e| Failed::new("F_DUPFD_CLOEXEC", e))
            }
            End::Pipe(_) | End::Cut => Err(Failed::new("F_DUPFD_CLOEXEC", Errno::BADF)),
        }
    }

    /// Ends it for good: the pipe is closed, the connection reset. Disconnecting throws away what is queued, and
    /// with it the kernel's hold of the pages, however many descriptors the socket has.
    pub(super) fn cut(&self) -> Result<(), Failed> {
        let mut end = lock(&self.end);
        if let End::Socket(socket) = &*end {
            match rustix::net::connect_unspec(socket) {
                // Reset by the peer before us.
                Ok(()) | Err(Errno::NOTCONN) => {}
                Err(errno) => return Err(Failed::new("connect(AF_UNSPEC)", errno)),
            }
        }
        *end = End::Cut;
        Ok(())
    }
}

/// A DMA that has begun and does not end by itself. Dropping this changes nothing for it: a fence of the device
/// ends it, or what it waits for.
#[derive(Debug)]
pub struct Held {
    domain: Arc<SoftDomain>,
    holding: Arc<Holding>,
}

impl Held {
    pub(super) fn new(domain: Arc<SoftDomain>, holding: Arc<Holding>) -> Self {
        Self { domain, holding }
    }

    /// Bytes moved, or why not; none while the kernel holds the pages.
    pub fn outcome(&self) -> Option<Result<u32, Errno>> {
        self.domain.outcome(&self.holding.flight)
    }

    /// Waits for the outcome, at most `patience`.
    pub fn wait(&self, patience: Duration) -> Option<Result<u32, Errno>> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.outcome() {
                None if !left.is_zero() => self.domain.idle(left),
                outcome => return outcome,
            }
        }
    }

    /// Supplies the data that a held write waits for, at most 4 KiB: the late DMA lands now. `EPIPE` once it has
    /// been ended, `EINVAL` for a send.
    pub fn finish(&self, data: &[u8]) -> Result<(), Failed> {
        let call = "write(pipe)";
        match &*lock(&self.holding.end) {
            End::Pipe(inlet) if data.len() <= 4096 => match rustix::io::write(inlet, data) {
                Ok(_) => Ok(()),
                Err(errno) => Err(Failed::new(call, errno)),
            },
            End::Pipe(_) | End::Socket(_) => Err(Failed::new(call, Errno::INVAL)),
            End::Cut => Err(Failed::new(call, Errno::PIPE)),
        }
    }
}
