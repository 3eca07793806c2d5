//! The listening Unix sockets of a daemon, and their files.
//!
//! Only the daemon's own user and root can ever connect, whatever the umask is. A file at the path that is not an abandoned
//! socket is neither replaced nor removed. Nothing here waits for another process.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fchmod, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with};

use crate::error::{Error, Result};
use crate::protocol::address::address;

/// The permissions of a socket's file: read and write for the owner.
const MODE: u32 = 0o600;
/// The number of connections that may wait to be accepted; the kernel limits it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// The remedies of an error message, by why the path cannot be used.
pub(super) struct Remedies {
    /// The file is not a socket.
    pub(super) no_socket: &'static str,
    /// A process accepts connections there.
    pub(super) in_use: &'static str,
    /// A process listens there, and its queue is full.
    pub(super) full: &'static str,
    /// Any other error of connect(2).
    pub(super) other: &'static str,
}

pub(super) const CONTROL_REMEDIES: Remedies = Remedies {
    no_socket: ": that is no socket; choose another --socket-path",
    in_use: ": another daemon serves there; choose another --socket-path",
    full: ": who listens there accepts nobody; end that process, or choose another --socket-path",
    other: ": choose another --socket-path",
};

pub(super) const METRICS_REMEDIES: Remedies = Remedies {
    no_socket: ": that is no socket; choose another --metrics-path",
    in_use: ": another daemon serves there; choose another --metrics-path",
    full: ": who listens there accepts nobody; end that process, or choose another --metrics-path",
    other: ": choose another --metrics-path",
};

/// The file of a socket. Removed when this is dropped, unless another file is at the path by then.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// The device and inode number of the file; none if it could not be found.
    identity: Option<(u64, u64)>,
    /// The open file: no other file gets its inode number before this is closed.
    _pin: Option<OwnedFd>,
}

impl SocketFile {
    /// Returns the file that is at `path` now.
    pub(super) fn at(path: PathBuf) -> Self {
        let pin = open(&path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).ok();
        let identity = identity(&path);
        Self { path, identity, _pin: pin }
    }

    /// Returns the path of the file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // If the file was removed meanwhile, another daemon may have made its own at the path.
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// Returns a socket that listens at `path`, with a file of mode 0600. A socket file at which no process listens is replaced.
pub(super) fn listen(path: &Path, remedies: &Remedies) -> Result<UnixListener> {
    let address = address(path)?;
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(socket_error(path, error, "")),
        Ok(found) if found.file_type().is_socket() => remove_stale_socket(path, &address, remedies)?,
        Ok(_) => return Err(socket_error(path, ErrorKind::AddrInUse.into(), remedies.no_socket)),
    }
    let failed = |errno: Errno| socket_error(path, errno.into(), "");
    let socket = stream().map_err(failed)?;
    // bind(2) gives the file the socket's own mode without the umask's bits (unix_bind_bsd in net/unix/af_unix.c): it is never
    // more accessible than this.
    fchmod(&socket, Mode::from_raw_mode(MODE)).map_err(failed)?;
    let remedy = ": its directory must exist and be writable";
    bind(&socket, &address).map_err(|errno| socket_error(path, errno.into(), remedy))?;
    let mode = std::fs::symlink_metadata(path).map(|made| made.permissions().mode() & 0o777);
    if !matches!(mode, Ok(MODE)) {
        // The umask has removed permissions of the owner too. No process can connect before listen(2).
        let own = std::fs::Permissions::from_mode(MODE);
        std::fs::set_permissions(path, own).map_err(|error| socket_error(path, error, ""))?;
    }
    rustix::net::listen(&socket, BACKLOG).map_err(failed)?;
    Ok(UnixListener::from(socket))
}

/// Removes the socket file of a daemon that has ended, and nothing else.
fn remove_stale_socket(path: &Path, address: &SocketAddrUnix, remedies: &Remedies) -> Result<()> {
    let failed = |errno: Errno, remedy| Err(socket_error(path, errno.into(), remedy));
    match stream().and_then(|socket| connect(socket.as_fd(), address)) {
        Ok(()) => failed(Errno::ADDRINUSE, remedies.in_use),
        // A full queue belongs to a process that exists, although it may be stopped. Waiting for room might never end.
        Err(Errno::AGAIN) => failed(Errno::ADDRINUSE, remedies.full),
        Err(Errno::CONNREFUSED) => {
            std::fs::remove_file(path).map_err(|e| socket_error(path, e, ": remove it yourself"))
        }
        Err(errno) => failed(errno, remedies.other),
    }
}

/// Returns a non-blocking stream socket.
fn stream() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

pub(super) fn socket_error(path: &Path, source: io::Error, remedy: &'static str) -> Error {
    Error::Socket { path: path.to_owned(), source, remedy }
}
