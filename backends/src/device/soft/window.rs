//! A TCP connection over loopback whose peer does not read: its window is closed, and stays so.

use std::io::{Error, Result};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send, sockopt};

/// Smallest buffers that the kernel grants, so that little fills them.
const TIGHT: usize = 4096;
/// Room behind a closed window, for what is to be stuck there.
const ROOMY: usize = 1 << 20;

/// A connection with a closed window: what is sent on `near` stays in this machine's queue until `far` is read.
#[derive(Debug)]
pub struct ClosedWindow {
    /// The end to send on; for [`super::SoftDevice::send_zc`].
    pub near: OwnedFd,
    /// The end that does not read.
    pub far: TcpStream,
    /// Ordinary bytes, all zero, that `far` will read first.
    pub filler: u64,
}

impl ClosedWindow {
    /// Connects to itself and sends until the window is closed.
    pub fn open() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        // The buffer must be small before the connection is made: its window is negotiated then.
        sockopt::set_socket_recv_buffer_size(&listener, TIGHT)?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let (far, from) = listener.accept()?;
        if from != near.local_addr()? {
            return Err(Error::other("another process connected to our port"));
        }
        sockopt::set_socket_send_buffer_size(&near, TIGHT)?;
        let mut filler = 0;
        loop {
            match send(&near, &[0; TIGHT], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => filler += sent as u64,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if closed(&near)? => break,
                Err(Errno::AGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        sockopt::set_socket_send_buffer_size(&near, ROOMY)?;
        Ok(Self { near: near.into(), far, filler })
    }
}

/// Whether no room appears for a while.
fn closed(socket: &TcpStream) -> Result<bool> {
    let patience = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    match poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&patience)) {
        Ok(ready) => Ok(ready == 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
