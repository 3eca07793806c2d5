//! The wire types of the protocol between a client and a daemon; docs/protocol.md specifies it byte by byte.
//!
//! It has two sockets: the *control socket* (varlink: NUL-terminated JSON, file descriptors by SCM_RIGHTS), and the
//! *notification channel* that the control socket passes to a client (SOCK_SEQPACKET: 64-byte records, which in a batch
//! are followed by ranges), for the hot path.

pub mod address;
pub mod batch;
pub mod frame;
pub mod hex;
pub mod record;
pub mod verbs;

pub use frame::{Frames, MAX_FDS, MAX_FRAME_BYTES};
pub use record::{Kind, RECORD_LEN, Record};
