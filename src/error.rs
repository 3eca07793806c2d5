//! The error type of this crate. Messages name the object and the remedy.

use std::io;
use std::path::PathBuf;

use passgate_bindings::{Failed, RangeError};

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. Its text is the error message for the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An error of a device or an IOMMU.
    #[error(transparent)]
    Backend(#[from] passgate_backends::Error),
    /// A device is in use.
    #[error("{device}: {source}; {remedy}")]
    Taken {
        /// The address of the device.
        device: String,
        /// The failed call.
        source: Failed,
        /// Its user, and the remedy.
        remedy: String,
    },
    /// The socket cannot be created.
    #[error("{path}: {source}{remedy}")]
    Socket {
        /// The path of the socket.
        path: PathBuf,
        /// The reason.
        source: io::Error,
        /// The remedy, or empty.
        remedy: &'static str,
    },
    /// The state directory, or a file in it, cannot be used.
    #[error("{path}: {source}{remedy}")]
    State {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
        /// The remedy, or empty.
        remedy: &'static str,
    },
    /// An audit log cannot be read.
    #[error(transparent)]
    Log(#[from] crate::observe::audit::ReadError),
    /// An audit log has no receipt of the invalidation.
    #[error(
        "this log has no receipt of invalidation {invalidation}: the invalidation has not ended in it, or its run's \
         beginning was rotated away"
    )]
    NoReceipt {
        /// The id of the invalidation.
        invalidation: u64,
    },
    /// A kernel call of the daemon failed.
    #[error("{0}")]
    Call(#[from] Failed),
    /// Guest memory cannot be created or accessed.
    #[error("guest memory: {0}")]
    Memory(Failed),
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}; raise the limit of tasks (`ulimit -u`, `TasksMax=`)")]
    Thread(io::Error),
    /// A thread panicked, which is a bug of passgate.
    #[error("the {0} thread panicked; this is a bug of passgate, please report it")]
    Panicked(&'static str),
    /// The event loop cannot wait for events.
    #[error("cannot wait for events: {0}; raise the limit of files (`LimitNOFILE=`)")]
    Poll(io::Error),
    /// The event loop of a VM has ended.
    #[error("the VM's session has ended: nothing is done for it any more")]
    Over,
    /// A signal handler cannot be set.
    #[error("cannot watch for signals: {0}")]
    Signal(io::Error),
    /// The result cannot be printed.
    #[error("cannot write the result: {0}")]
    Output(io::Error),
    /// The guardian process cannot be started, or does not answer.
    #[error(
        "cannot start the guardian process: {source}; without it devices outlive a killed daemon (--no-guardian)"
    )]
    Guardian {
        /// The reason.
        source: io::Error,
    },
    /// The service manager cannot store an object that is to outlive this process.
    #[error(
        "the service manager cannot store `{name}` ({why}): serve with --restart stop, or see the manager's log"
    )]
    Keep {
        /// The name of the object.
        name: String,
        /// The reason.
        why: String,
    },
    /// The descriptors that the service manager announced are not there.
    #[error(
        "cannot take the service manager's descriptors ({source}): LISTEN_FDS does not match those that this process \
         inherited; start it by the manager, or without LISTEN_FDS"
    )]
    InheritedFd {
        /// The reason.
        source: Failed,
    },
    /// A device that is to be tested is in use.
    #[error("{device} is in use: {by}")]
    InUse {
        /// The name of the device.
        device: String,
        /// Its user, and the remedy.
        by: String,
    },
    /// A device caches translations (ATS), cannot be detached, and the platform is strict.
    #[error(
        "{device} caches translations (ATS) and nothing here detaches it, so that under --strict no unmap of its \
         memory would be certain: use --iommu iommufd, or accept that every conversion is refused \
         (--allow-unstoppable)"
    )]
    Uncertain {
        /// The name of the device.
        device: String,
    },
    /// A device cannot be unbound from its driver, or not be bound to it again.
    #[error("{device}: {why}")]
    Binding {
        /// The name of the device.
        device: String,
        /// The reason and the remedy.
        why: String,
    },
    /// The request or the command line is not valid.
    #[error("{0}")]
    Usage(String),
    /// The daemon was stopped, and some regions could not be closed.
    #[error(
        "{regions} regions could not be closed in time: devices may still access them until this process ends"
    )]
    StillOpen {
        /// The number of regions.
        regions: usize,
    },
    /// A call of a daemon failed, or a socket cannot have its path.
    #[error(transparent)]
    Client(#[from] passgate_client::Error),
    /// Two numbers are not a page range.
    #[error(transparent)]
    Range(#[from] RangeError),
}

impl Error {
    /// Returns the exit code of the command: 3 where the host or a device cannot do what was requested, 2 for a usage error,
    /// an invalid path or an invalid log, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Backend(_)
            | Self::Taken { .. }
            | Self::InUse { .. }
            | Self::Uncertain { .. }
            | Self::Binding { .. } => 3,
            Self::Usage(_) | Self::Log(_) | Self::Client(passgate_client::Error::SocketPath { .. }) => 2,
            _ => 1,
        }
    }
}
