//! File descriptors that this process inherits by exec.
//!
//! A service manager passes descriptors as sd_listen_fds(3) describes: numbered from 3 on, their count in `LISTEN_FDS`,
//! the process that they are for in `LISTEN_PID`, their names in `LISTEN_FDNAMES`.

use std::env;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

use crate::Failed;

/// The environment variables of sd_listen_fds(3). A child process must not inherit them.
pub const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The first descriptor (`SD_LISTEN_FDS_START`).
const FIRST_FD: RawFd = 3;

/// The maximum number of descriptors: more than any service manager's descriptor store may have.
const MAX_FDS: RawFd = 65_536;

/// An inherited descriptor with its name in the service manager's descriptor store; empty for none.
pub type InheritedFd = (String, OwnedFd);

/// Takes the descriptors that the service manager passed to this process and sets them close-on-exec. Returns none where
/// `LISTEN_PID` names another process or is not set, and at every further call. Must be called before this process opens a
/// file: a descriptor in the range that is close-on-exec already was opened by this process and is not taken.
///
/// `EINVAL` where a variable is not a number or the count is out of range, `EBADF` where a descriptor in the range is
/// not open or was opened by this process.
pub fn take() -> Result<Vec<InheritedFd>, Failed> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    const CALL: &str = "LISTEN_FDS";
    let number = |name| match env::var(name) {
        Ok(text) => text.parse::<RawFd>().map(Some).map_err(|_| Failed::new(CALL, Errno::INVAL)),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => Err(Failed::new(CALL, Errno::INVAL)),
    };
    let (Some(pid), Some(count)) = (number("LISTEN_PID")?, number("LISTEN_FDS")?) else {
        return Ok(Vec::new());
    };
    if i64::from(pid) != i64::from(std::process::id()) || TAKEN.swap(true, Ordering::AcqRel) {
        return Ok(Vec::new());
    }
    if !(0..=MAX_FDS).contains(&count) {
        return Err(Failed::new(CALL, Errno::INVAL));
    }
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned);
    let mut handed = Vec::new();
    for fd in FIRST_FD..FIRST_FD + count {
        let name = names.next().unwrap_or_default();
        // SAFETY: borrowed for this one call, which returns EBADF where the descriptor is not open.
        let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).map_err(|e| Failed::new(CALL, e))?;
        if flags.contains(FdFlags::CLOEXEC) {
            return Err(Failed::new(CALL, Errno::BADF));
        }
        // SAFETY: it is open and was inherited by exec, since every file that this process opens is close-on-exec. The
        // parent passed it by LISTEN_FDS, and `TAKEN` prevents a second owner: nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(|e| Failed::new(CALL, e))?;
        handed.push((name, fd));
    }
    Ok(handed)
}

/// Takes the descriptor `number`, which the parent process passed by exec. Must be called before this process opens a
/// file. `EBADF` where it is not open, was taken already, was opened by this process (then it is close-on-exec), or is
/// one of the three standard streams.
pub fn by_number(number: RawFd) -> Result<OwnedFd, Failed> {
    static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());
    let failed = |errno| Failed::new("taking an inherited descriptor", errno);
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if number < FIRST_FD || taken.contains(&number) {
        return Err(failed(Errno::BADF));
    }
    // SAFETY: borrowed for this one call, which returns EBADF where the descriptor is not open.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) }).map_err(failed)?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(failed(Errno::BADF));
    }
    taken.push(number);
    // SAFETY: it is open and was inherited by exec, since every file that this process opens is close-on-exec, and
    // `TAKEN` prevents a second owner: nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(failed)?;
    Ok(fd)
}
