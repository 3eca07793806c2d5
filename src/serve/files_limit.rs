//! How many files a daemon may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files that a daemon has open besides guest memory and connections: its loop, its domain, devices, log and guardian.
const OTHER_FILES: u64 = 128;

/// Raises the soft limit of open files to the hard one, so that as many regions and connections fit as the daemon may
/// have. The soft limit is low for programs that call select(2), which nothing here does.
///
/// Logs what to do where the hard limit is too low for that. What does not fit is refused when it comes.
pub fn raise(max_regions: u32, max_clients: usize) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if let Err(errno) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        log::warn!("the limit of open files stays at {current:?}: setrlimit: {errno}");
    }
    // A region has a file, and with `private` two; a connection has a channel.
    let wanted = 2 * u64::from(max_regions) + 2 * max_clients as u64 + OTHER_FILES;
    if maximum.is_some_and(|maximum| maximum < wanted) {
        log::warn!(
            "at most {} files may be open, and {max_regions} regions may need {wanted}: raise the hard limit \
             (`ulimit -Hn`, `LimitNOFILE=`), or lower --max-regions",
            maximum.unwrap_or_default()
        );
    }
}
