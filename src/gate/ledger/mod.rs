//! The ledger: what every page is, what is mapped where, and what may not be mapped now.
//!
//! Page state and holds are kept by file identity and offset, so that every alias of a page is one page here;
//! mappings are kept by domain and IOVA, as the kernel keeps them.

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
pub use store::{Key, Store};
pub use table::Table;
pub use tree::Tree;

/// What a page of guest memory is to devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum PageState {
    /// Devices may see it.
    Shared = 0,
    /// Only the guest may see it.
    Private = 1,
    /// Nothing is there: punched, not given again yet.
    Hole = 2,
    /// Not known: after an end that said so, or none.
    Unknown = 3,
}

impl PageState {
    /// All of them, in the order of their numbers.
    pub const ALL: [PageState; 4] = [Self::Shared, Self::Private, Self::Hole, Self::Unknown];

    /// In words, for messages and for JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Private => "private",
            Self::Hole => "hole",
            Self::Unknown => "unknown",
        }
    }
}
