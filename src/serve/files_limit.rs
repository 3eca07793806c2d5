//! The limit of open files (`RLIMIT_NOFILE`) of a daemon.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The number of files that are allowed for besides guest memory and connections: the loop, domain, devices, log and guardian.
const OTHER_FILES: u64 = 128;

/// Raises the soft limit of open files to the hard one, so that `max_regions` regions and `max_clients` connections fit.
/// The soft limit is low for the sake of programs that call select(2); nothing here does.
///
/// Logs a warning with the remedy where the hard limit is too low. A region or connection beyond it is refused when it comes.
pub fn raise(max_regions: u32, max_clients: usize) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if let Err(errno) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        log::warn!("the limit of open files stays at {current:?}: setrlimit: {errno}");
    }
    // A region has one file, or two with a private one; a connection has a control socket and a channel.
    let wanted = 2 * u64::from(max_regions) + 2 * max_clients as u64 + OTHER_FILES;
    if maximum.is_some_and(|maximum| maximum < wanted) {
        log::warn!(
            "at most {} files may be open, and {max_regions} regions may need {wanted}: raise the hard limit \
             (`ulimit -Hn`, `LimitNOFILE=`), or lower --max-regions",
            maximum.unwrap_or_default()
        );
    }
}
