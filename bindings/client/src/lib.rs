//! The client library for a VMM: it connects to a passgate daemon, adds memory, announces every conversion and reports its
//! outcome.
//!
//! [`Client`] is the control socket, with one blocking call at a time; [`Channel`] is the notification channel for the hot
//! path; [`Events`] is the stream of events. The library never converts memory by itself. If the daemon has ended, every call
//! is an error, so that no conversion happens without it. If the daemon does not answer, calls fail with
//! [`Error::NoAnswer`] ([`Client::set_timeout`]).
//!
//! The types of the wire are in [`protocol`]; docs/protocol.md specifies it byte by byte, docs/guide/vmm.md is the guide.
//!
//! ```no_run
//! use passgate_client::{AddMemory, Answer, Client, Gpa, Outcome, PageRange, PageState};
//! # fn main() -> passgate_client::Result<()> {
//! # let memory: std::os::fd::OwnedFd = unimplemented!();
//! # fn convert(range: PageRange<Gpa>) -> std::io::Result<()> { Ok(()) }
//! let mut client = Client::connect("/run/passgate/vm1.sock")?;
//! client.add_memory(&AddMemory::shared(0, 1 << 30), &[&memory])?;
//! let mut channel = client.open_channel()?;
//!
//! let range = PageRange::<Gpa>::new(0x20_0000, 0x1000)?;
//! match channel.begin(range, PageState::Private, None)? {
//!     Answer::Granted { invalidation } => {
//!         let outcome = match convert(range) {
//!             Ok(()) => Outcome::Committed,
//!             Err(error) => Outcome::Unknown { errno: error.raw_os_error().unwrap_or(0), offset: 0 },
//!         };
//!         channel.end(invalidation, outcome)?;
//!     }
//!     Answer::Refused(failure) | Answer::Unknown(failure) => eprintln!("not converted: {failure:?}"),
//!     Answer::Quarantined { gpa } => eprintln!("not converted: {gpa} is in quarantine"),
//! }
//! # Ok(()) }
//! ```

#![forbid(unsafe_code)]

mod cause;
mod channel;
mod client;
mod error;
mod events;
mod outcome;
mod page_state;
pub mod protocol;
pub mod units;
mod verdict;

pub use cause::Cause;
pub use channel::{Answer, Channel, Failure, Ticket};
pub use client::{ANSWER_TIMEOUT, Client};
pub use error::{Error, Result};
pub use events::{Event, Events};
pub use outcome::{Outcome, OutcomeKind};
pub use page_state::PageState;
pub use protocol::verbs::{
    AddMemory, Adopted, AdoptedRegion, Convert, Converted, MemoryAdded, Status, Unended,
};
pub use units::{Gpa, Iova, PAGE, PageRange, RangeError};
pub use verdict::VerdictKind;
