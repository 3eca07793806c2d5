//! The error type of this crate. Messages name the object and the remedy.

use std::path::PathBuf;
use std::time::Duration;
use std::{fmt, io};

use rustix::io::Errno;

use crate::protocol::frame::FrameError;
use crate::protocol::record::RecordError;
use crate::units::RangeError;

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. Its text is the error message for the user.
#[derive(Debug)]
pub enum Error {
    /// The socket cannot be connected to.
    Connect {
        /// The path of the socket.
        path: PathBuf,
        /// The reason.
        source: io::Error,
        /// The remedy, or empty.
        remedy: &'static str,
    },
    /// A Unix socket cannot have this path.
    SocketPath {
        /// The path.
        path: PathBuf,
        /// The reason and the remedy.
        why: String,
    },
    /// The daemon sent an invalid frame, or closed the connection.
    Frame(FrameError),
    /// The daemon sent an invalid record.
    Record(RecordError),
    /// Two numbers are not a page range.
    Range(RangeError),
    /// The connection to the daemon is broken.
    Connection(Errno),
    /// The daemon does not answer.
    NoAnswer {
        /// The socket, and the process that serves it where that is known.
        daemon: String,
        /// The time waited for the answer.
        within: Duration,
    },
    /// The daemon refused the request; nothing has changed.
    Refused {
        /// The daemon's error message.
        message: String,
        /// The daemon's errno.
        errno: i32,
    },
    /// The range of a [`Convert`](crate::Convert) is in quarantine; nothing has changed. The notification channel reports
    /// this as [`Answer::Quarantined`](crate::Answer::Quarantined).
    Quarantined {
        /// The daemon's error message, which names the first address in quarantine and the cause.
        message: String,
    },
    /// The daemon sent an answer that the protocol does not have.
    Protocol(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect { path, source, remedy } => write!(f, "{}: {source}{remedy}", path.display()),
            Self::SocketPath { path, why } => write!(f, "{}: {why}", path.display()),
            Self::Frame(error) => error.fmt(f),
            Self::Record(error) => error.fmt(f),
            Self::Range(error) => error.fmt(f),
            Self::Connection(errno) => {
                write!(f, "the connection to passgate broke ({errno}): is the daemon still running?")
            }
            Self::NoAnswer { daemon, within } => write!(
                f,
                "{daemon}: no answer within {} s; the request may still be executed: see the daemon's log; \
                 continue it if it is stopped (kill -CONT), restart it if it hangs",
                within.as_secs_f32()
            ),
            Self::Refused { message, .. } | Self::Quarantined { message } => f.write_str(message),
            Self::Protocol(answer) => write!(
                f,
                "passgate answered {answer}, which is not in the protocol: are client and daemon of one version?"
            ),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Connect { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<FrameError> for Error {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

impl From<RecordError> for Error {
    fn from(error: RecordError) -> Self {
        Self::Record(error)
    }
}

impl From<RangeError> for Error {
    fn from(error: RangeError) -> Self {
        Self::Range(error)
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Connection(errno)
    }
}
