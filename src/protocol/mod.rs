//! What a client and a session say to each other; docs/protocol.md says it byte by byte.
//!
//! Two sockets: the *control socket* (varlink: NUL-ended JSON, file descriptors by SCM_RIGHTS), and the
//! *notification channel* that it hands out (SOCK_SEQPACKET, fixed 64-byte records, or one with many ranges
//! behind it) for the hot path.

pub mod address;
pub mod batch;
pub mod frame;
pub mod hex;
pub mod record;
pub mod verbs;

pub use frame::{Frames, MAX_FDS, MAX_FRAME};
pub use record::{Kind, RECORD_LEN, Record};
