//! What went wrong, for a person: which object, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use passgate_bindings::{Failed, RangeError};
use rustix::io::Errno;

use crate::protocol::frame::FrameError;
use crate::protocol::record::RecordError;

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. The text is the message that the user reads.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A device or an IOMMU.
    #[error(transparent)]
    Backend(#[from] passgate_backends::Error),
    /// A device is not free.
    #[error("{device}: {source}; {mend}")]
    Taken {
        /// Its address.
        device: String,
        /// What the kernel answered.
        source: Failed,
        /// Who has it, and what to do about it.
        mend: String,
    },
    /// The socket cannot be made or reached.
    #[error("{path}: {source}{mend}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What to do about it, or empty.
        mend: &'static str,
    },
    /// No Unix socket can have this path.
    #[error("{path}: {why}")]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// The reason, and what to do about it.
        why: String,
    },
    /// The state directory, or what is in it, cannot be used.
    #[error("{path}: {source}{mend}")]
    State {
        /// Which file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What to do about it, or empty.
        mend: &'static str,
    },
    /// An audit log cannot be read.
    #[error(transparent)]
    Log(#[from] crate::observe::audit::ReadError),
    /// An audit log has no such receipt.
    #[error(
        "no receipt of invalidation {invalidation} follows from this log: it is not over there, or its run's \
         beginning was rotated away"
    )]
    NoReceipt {
        /// Which.
        invalidation: u64,
    },
    /// A kernel call of the daemon's own.
    #[error("{0}")]
    Call(#[from] Failed),
    /// Guest memory cannot be made or touched.
    #[error("guest memory: {0}")]
    Memory(Failed),
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}; raise the limit of tasks (`ulimit -u`, `TasksMax=`)")]
    Thread(io::Error),
    /// A thread ended in a panic: a bug of passgate's.
    #[error("the {0} thread panicked; this is a bug of passgate, please report it")]
    Panicked(&'static str),
    /// Nothing can be waited for.
    #[error("cannot wait for events: {0}; raise the limit of files (`LimitNOFILE=`)")]
    Poll(io::Error),
    /// The loop of a VM has ended.
    #[error("the VM's session is over: nothing is done for it any more")]
    Over,
    /// A signal handler cannot be set.
    #[error("cannot watch for signals: {0}")]
    Signal(io::Error),
    /// The result cannot be printed.
    #[error("cannot write the result: {0}")]
    Output(io::Error),
    /// The guardian process cannot be started or spoken to.
    #[error(
        "cannot start the guardian process: {source}; without it devices outlive a killed daemon (--no-guardian)"
    )]
    Guardian {
        /// Why.
        source: io::Error,
    },
    /// What is to outlive this process cannot be kept.
    #[error(
        "`{name}` cannot be kept by the service manager ({why}): serve with --restart stop, or see its log"
    )]
    Keep {
        /// What.
        name: String,
        /// Why.
        why: String,
    },
    /// What the service manager says it hands over is not there.
    #[error(
        "what the service manager handed over cannot be taken ({source}): LISTEN_FDS and what this process inherits \
         do not fit; start it by the manager, or without LISTEN_FDS"
    )]
    Handed {
        /// Why.
        source: Failed,
    },
    /// A device that is to be tested is used by somebody.
    #[error("{device} is in use: {by}")]
    InUse {
        /// The device.
        device: String,
        /// By whom, and what to do about it.
        by: String,
    },
    /// A device that caches translations cannot be detached, and a stale write would do harm.
    #[error(
        "{device} caches translations (ATS) and nothing here detaches it, so that under --strict no unmap of its \
         memory would be certain: use --iommu iommufd, or accept that every conversion is refused \
         (--allow-unstoppable)"
    )]
    Uncertain {
        /// The device.
        device: String,
    },
    /// A device is not taken from its driver, or not given back.
    #[error("{device}: {why}")]
    Binding {
        /// The device.
        device: String,
        /// Why, and what to do about it.
        why: String,
    },
    /// What was asked makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The daemon was stopped and some memory would not go.
    #[error(
        "{regions} regions could not be closed in time: devices may still reach them until this process is gone"
    )]
    StillOpen {
        /// How many.
        regions: usize,
    },
    /// The peer sent what is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer sent what is no record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Not a page range.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The connection broke.
    #[error("the connection to passgate broke ({0}): is the daemon still running?")]
    Connection(Errno),
    /// The daemon does not answer.
    #[error(
        "{daemon}: no answer within {} s, and what was asked may yet be done: see the daemon's log; continue it \
         where it is stopped (kill -CONT), restart it where it hangs",
        within.as_secs_f32()
    )]
    NoAnswer {
        /// The socket, and the process that serves there where it is known.
        daemon: String,
        /// How long the answer was waited for.
        within: Duration,
    },
    /// passgate said that the request was wrong.
    #[error("{message}")]
    Refused {
        /// Its words.
        message: String,
        /// Its number.
        errno: i32,
    },
    /// passgate said something that is not in the protocol.
    #[error("passgate answered {0}, which is not in the protocol: are client and daemon of one version?")]
    Protocol(String),
}

impl Error {
    /// The exit code that says it: 3 where the host is not able, 2 where what was named is no log, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Backend(_)
            | Self::Taken { .. }
            | Self::InUse { .. }
            | Self::Uncertain { .. }
            | Self::Binding { .. } => 3,
            Self::Usage(_) | Self::SocketPath { .. } | Self::Log(_) => 2,
            _ => 1,
        }
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Connection(errno)
    }
}
