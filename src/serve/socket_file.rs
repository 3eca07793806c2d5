//! The sockets that a daemon listens at: how one is made, and how its file goes again.
//!
//! Nobody but the daemon's own user and root ever connects to one, whatever the umask is. A file that somebody else
//! has put at the path is neither replaced nor removed. Nothing here waits for another process.

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

/// The permissions of a socket's file: the owner's only.
const MODE: u32 = 0o600;
/// Connections that may wait to be accepted; fewer where `net.core.somaxconn` is lower.
const BACKLOG: i32 = 4096;

/// What to do about a path that cannot be used.
pub(super) struct Mends {
    pub(super) no_socket: &'static str,
    pub(super) in_use: &'static str,
    pub(super) full: &'static str,
    pub(super) other: &'static str,
}

pub(super) const CONTROL: Mends = Mends {
    no_socket: ": that is no socket; choose another --socket-path",
    in_use: ": another daemon serves there; choose another --socket-path",
    full: ": who listens there accepts nobody; end that process, or choose another --socket-path",
    other: ": choose another --socket-path",
};

pub(super) const METRICS: Mends = Mends {
    no_socket: ": that is no socket; choose another --metrics-path",
    in_use: ": another daemon serves there; choose another --metrics-path",
    full: ": who listens there accepts nobody; end that process, or choose another --metrics-path",
    other: ": choose another --metrics-path",
};

/// A socket's file; removed when this is dropped, unless it is another's by then.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode of the file; none where it could not be found.
    identity: Option<(u64, u64)>,
    /// The file, open: while it is, no other file gets its inode number.
    _pin: Option<OwnedFd>,
}

impl SocketFile {
    /// Takes the file that is at `path` now.
    pub(super) fn at(path: PathBuf) -> Self {
        let pin = open(&path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).ok();
        let identity = identity(&path);
        Self { path, identity, _pin: pin }
    }

    /// Returns where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Where the file was removed, another daemon may have made its own there since.
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// Listens at `path`, with a file of mode 0600. A socket that nobody listens at any more is replaced.
pub(super) fn listen(path: &Path, mends: &Mends) -> Result<UnixListener> {
    let address = address(path)?;
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(socket_error(path, error, "")),
        Ok(found) if found.file_type().is_socket() => make_way(path, &address, mends)?,
        Ok(_) => return Err(socket_error(path, ErrorKind::AddrInUse.into(), mends.no_socket)),
    }
    let failed = |errno: Errno| socket_error(path, errno.into(), "");
    let socket = stream().map_err(failed)?;
    // The file is made with the socket's own mode (unix_bind_bsd in net/unix/af_unix.c), so that there is no moment
    // at which the umask alone protects it.
    fchmod(&socket, Mode::from_raw_mode(MODE)).map_err(failed)?;
    let mend = ": its directory must exist and be writable";
    bind(&socket, &address).map_err(|errno| socket_error(path, errno.into(), mend))?;
    let mode = std::fs::symlink_metadata(path).map(|made| made.permissions().mode() & 0o777);
    if !matches!(mode, Ok(MODE)) {
        // The umask has taken even the owner's permissions. Nobody can connect yet.
        let own = std::fs::Permissions::from_mode(MODE);
        std::fs::set_permissions(path, own).map_err(|error| socket_error(path, error, ""))?;
    }
    rustix::net::listen(&socket, BACKLOG).map_err(failed)?;
    Ok(UnixListener::from(socket))
}

/// Removes a socket that a daemon left behind, and nothing else.
fn make_way(path: &Path, address: &SocketAddrUnix, mends: &Mends) -> Result<()> {
    let failed = |errno: Errno, mend| Err(socket_error(path, errno.into(), mend));
    match stream().and_then(|socket| connect(socket.as_fd(), address)) {
        Ok(()) => failed(Errno::ADDRINUSE, mends.in_use),
        // A queue that is full is somebody's, even if he is stopped. To wait for room might be to wait for ever.
        Err(Errno::AGAIN) => failed(Errno::ADDRINUSE, mends.full),
        Err(Errno::CONNREFUSED) => {
            std::fs::remove_file(path).map_err(|e| socket_error(path, e, ": remove it yourself"))
        }
        Err(errno) => failed(errno, mends.other),
    }
}

/// Makes a stream socket whose calls do not wait.
fn stream() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

pub(super) fn socket_error(path: &Path, source: io::Error, mend: &'static str) -> Error {
    Error::Socket { path: path.to_owned(), source, mend }
}
