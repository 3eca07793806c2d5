//! The ledger: the state of every page ([`pages`]), the mappings of every domain ([`mapped`]), and the ranges excluded from
//! mapping ([`holds`]).
//!
//! Page states and exclusions are stored by file identity and offset, so that every alias of a page is one page here;
//! mappings are stored by domain and IOVA, as in the kernel. States and mappings are trees of two bits a page ([`tree`]) in
//! memory that may outlive the process ([`store`]).

mod blocks;
mod fault;
mod fill;
pub mod holds;
mod leaf;
pub mod mapped;
pub mod pages;
pub mod run;
pub mod spans;
pub mod store;
pub mod table;
pub mod tree;

use serde::{Deserialize, Serialize};

pub use fault::{Full, OpenError};
pub use holds::{HeldBy, Holds};
pub use mapped::Mapped;
pub use pages::PageMap;
pub use run::{Run, RunState};
pub use store::{Arena, Key, Store};
pub use table::Table;
pub use tree::Tree;

/// The state of a page of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum PageState {
    /// Devices may access it.
    Shared = 0,
    /// Only the guest may access it.
    Private = 1,
    /// No page is allocated: a hole was punched.
    Hole = 2,
    /// Not known: its owner did not know at the end of a conversion, or there was no end.
    Unknown = 3,
}

impl PageState {
    /// All states, in the order of their numbers.
    pub const ALL: [PageState; 4] = [Self::Shared, Self::Private, Self::Hole, Self::Unknown];

    /// Returns its name in messages and in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Private => "private",
            Self::Hole => "hole",
            Self::Unknown => "unknown",
        }
    }
}
