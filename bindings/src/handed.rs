//! What a service manager hands over when it starts this process (`sd_listen_fds(3)`): open descriptors from 3 on,
//! how many in `LISTEN_FDS`, for whom in `LISTEN_PID`, their names in `LISTEN_FDNAMES`.

use std::env;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

use crate::Failed;

/// The variables that say what was handed over: no child's business.
pub const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The first descriptor (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// Descriptors that are taken at most: more than any limit of a service manager's store.
const MOST: RawFd = 65_536;

/// A descriptor that was handed over, and the name that the service manager knows it by; empty where it told none.
pub type Handed = (String, OwnedFd);

/// Takes what was handed over to this process, close-on-exec from here on; the second time there is nothing left.
/// Call it before this process opens anything: what is close-on-exec already was opened here, and is left alone.
/// `EINVAL` where the variables are no numbers, `EBADF` where a descriptor that they promise is not there.
pub fn take() -> Result<Vec<Handed>, Failed> {
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
    if !(0..=MOST).contains(&count) {
        return Err(Failed::new(CALL, Errno::INVAL));
    }
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned);
    let mut handed = Vec::new();
    for fd in FIRST..FIRST + count {
        let name = names.next().unwrap_or_default();
        // SAFETY: borrowed for the one call that asks whether it is open, which is no error where it is not.
        let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).map_err(|e| Failed::new(CALL, e))?;
        if flags.contains(FdFlags::CLOEXEC) {
            return Err(Failed::new(CALL, Errno::BADF));
        }
        // SAFETY: it is open and came through exec, since all that this process opens is close-on-exec; whoever
        // started us named it as handed over, and `TAKEN` lets nobody take it twice. So it is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(|e| Failed::new(CALL, e))?;
        handed.push((name, fd));
    }
    Ok(handed)
}

/// Takes the descriptor with this number, which whoever started this process left open for it and named to it; once.
/// Call it before this process opens anything else. `EBADF` where there is none, or it was opened here (what this process
/// opens is close-on-exec), or it is one of the first three.
pub fn by_number(number: RawFd) -> Result<OwnedFd, Failed> {
    static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());
    let failed = |errno| Failed::new("taking an inherited descriptor", errno);
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if number < FIRST || taken.contains(&number) {
        return Err(failed(Errno::BADF));
    }
    // SAFETY: borrowed for the one call that asks whether it is open, which is no error where it is not.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) }).map_err(failed)?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(failed(Errno::BADF));
    }
    taken.push(number);
    // SAFETY: it is open and came through exec, since all that this process opens is close-on-exec; `TAKEN` lets nobody
    // take it twice, so it is nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(failed)?;
    Ok(fd)
}
