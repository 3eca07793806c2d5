//! The daemon's side of the protocol: the checks of a client's requests ([`request`]), and the wire types of passgate-client.
//!
//! docs/protocol.md specifies the protocol byte by byte.

pub mod request;

pub use passgate_client::protocol::{
    Frames, Kind, MAX_FDS, MAX_FRAME_BYTES, RECORD_LEN, Record, address, batch, frame, hex, record, verbs,
};
