//! A TCP connection over loopback whose peer does not read, with a receive window of zero.

use std::io::{Error, Result};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send, sockopt};

/// The size of socket buffers, in bytes, while the receive window is being filled. The kernel raises it to its minimum.
const SMALL_BUFFER_BYTES: usize = 4096;
/// The size of the send buffer, in bytes, once the receive window is zero: the data that is to stay queued must fit.
const LARGE_BUFFER_BYTES: usize = 1 << 20;

/// A connection with a receive window of zero: data sent on `near` stays in the send queue until `far` is read.
#[derive(Debug)]
pub struct ClosedWindow {
    /// The sending end, for [`super::SoftDevice::send_zc`].
    pub near: OwnedFd,
    /// The receiving end, which is not read.
    pub far: TcpStream,
    /// The number of bytes, all zero, that `far` will read first.
    pub filler: u64,
}

impl ClosedWindow {
    /// Makes a connection and sends until the receive window is zero.
    pub fn open() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        // Set before the connection is made, because the window scale is negotiated then.
        sockopt::set_socket_recv_buffer_size(&listener, SMALL_BUFFER_BYTES)?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let (far, from) = listener.accept()?;
        if from != near.local_addr()? {
            return Err(Error::other("another process connected to our port"));
        }
        sockopt::set_socket_send_buffer_size(&near, SMALL_BUFFER_BYTES)?;
        let mut filler = 0;
        loop {
            match send(&near, &[0; SMALL_BUFFER_BYTES], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => filler += sent as u64,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if stays_full(&near)? => break,
                Err(Errno::AGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        sockopt::set_socket_send_buffer_size(&near, LARGE_BUFFER_BYTES)?;
        Ok(Self { near: near.into(), far, filler })
    }
}

/// Returns true if the send buffer stays full for 20 ms.
fn stays_full(socket: &TcpStream) -> Result<bool> {
    let timeout = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    match poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&timeout)) {
        Ok(ready) => Ok(ready == 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
