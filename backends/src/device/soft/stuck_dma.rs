//! DMA that has begun and does not end by itself.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use passgate_bindings::Failed;
use rustix::io::Errno;

use crate::iommu::soft::reaper::Operation;
use crate::iommu::soft::{SoftDomain, lock};

/// The other end of a held operation, for which it waits.
#[derive(Debug)]
enum Peer {
    /// The write end of the pipe that it reads from.
    Pipe(OwnedFd),
    /// The connection over which it sends.
    Socket(OwnedFd),
    /// None: the operation was ended.
    Disconnected,
}

/// The device's record of a held operation.
#[derive(Debug)]
pub(super) struct StuckOperation {
    pub(super) operation: Arc<Operation>,
    peer: Mutex<Peer>,
}

impl StuckOperation {
    pub(super) fn pipe(operation: Arc<Operation>, write_end: OwnedFd) -> Self {
        Self { operation, peer: Mutex::new(Peer::Pipe(write_end)) }
    }

    /// Makes the record of a send. Sets SO_LINGER to 0, so that the connection is reset when it is closed: then the
    /// pages are unpinned also when this process is killed, and not only after TCP's time-outs.
    pub(super) fn socket(operation: Arc<Operation>, socket: OwnedFd) -> Result<Self, Failed> {
        rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO))
            .map_err(|errno| Failed::new("SO_LINGER", errno))?;
        Ok(Self { operation, peer: Mutex::new(Peer::Socket(socket)) })
    }

    /// Returns a duplicate descriptor of the socket.
    pub(super) fn socket_fd(&self) -> Result<OwnedFd, Failed> {
        match &*lock(&self.peer) {
            Peer::Socket(socket) => {
                rustix::io::fcntl_dupfd_cloexec(socket, 0).map_err(|e| Failed::new("F_DUPFD_CLOEXEC", e))
            }
            Peer::Pipe(_) | Peer::Disconnected => Err(Failed::new("F_DUPFD_CLOEXEC", Errno::BADF)),
        }
    }

    /// Ends the operation: closes the pipe, or resets the connection. `connect(AF_UNSPEC)` discards the send queue, and
    /// with it the kernel's references to the pages, however many descriptors the socket has.
    pub(super) fn disconnect(&self) -> Result<(), Failed> {
        let mut peer = lock(&self.peer);
        if let Peer::Socket(socket) = &*peer {
            match rustix::net::connect_unspec(socket) {
                // ENOTCONN: the peer has reset the connection before.
                Ok(()) | Err(Errno::NOTCONN) => {}
                Err(errno) => return Err(Failed::new("connect(AF_UNSPEC)", errno)),
            }
        }
        *peer = Peer::Disconnected;
        Ok(())
    }
}

/// A DMA that has begun and does not end by itself. Dropping this value does not end it: a fence of the device does, or
/// the event for which it waits.
#[derive(Debug)]
pub struct StuckDma {
    domain: Arc<SoftDomain>,
    held: Arc<StuckOperation>,
}

impl StuckDma {
    pub(super) fn new(domain: Arc<SoftDomain>, held: Arc<StuckOperation>) -> Self {
        Self { domain, held }
    }

    /// Returns the number of bytes transferred, or the errno; none while the kernel may still access the pages.
    pub fn outcome(&self) -> Option<Result<u32, Errno>> {
        self.domain.outcome(&self.held.operation)
    }

    /// Waits for the outcome, at most `timeout`.
    pub fn wait(&self, timeout: Duration) -> Option<Result<u32, Errno>> {
        let deadline = Instant::now() + timeout;
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            match self.outcome() {
                None if !remaining.is_zero() => self.domain.await_completion(remaining),
                outcome => return outcome,
            }
        }
    }

    /// Supplies the data for which a held write waits, at most 4 KiB, so that the DMA ends. `EPIPE` once it was ended,
    /// `EINVAL` for a send.
    pub fn finish(&self, data: &[u8]) -> Result<(), Failed> {
        let call = "write(pipe)";
        match &*lock(&self.held.peer) {
            Peer::Pipe(write_end) if data.len() <= 4096 => match rustix::io::write(write_end, data) {
                Ok(_) => Ok(()),
                Err(errno) => Err(Failed::new(call, errno)),
            },
            Peer::Pipe(_) | Peer::Socket(_) => Err(Failed::new(call, Errno::INVAL)),
            Peer::Disconnected => Err(Failed::new(call, Errno::PIPE)),
        }
    }
}
