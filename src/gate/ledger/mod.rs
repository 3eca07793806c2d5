//! The ledger: the state of every page ([`pages`]), the mappings of every domain ([`mapped`]), and the ranges excluded from
//! mapping ([`exclusions`]).
//!
//! Page states and exclusions are stored by file identity and offset, so that every alias of a page is one page here;
//! mappings are stored by domain and IOVA, as in the kernel. States and mappings are trees of two bits a page ([`tree`]) in
//! memory that may outlive the process ([`store`]).

mod blocks;
pub mod exclusions;
mod fault;
mod fill;
mod leaf;
pub mod mapped;
pub mod pages;
pub mod run;
pub mod spans;
pub mod store;
pub mod table;
pub mod tree;

pub use exclusions::{ExcludedBy, Exclusions};
pub use fault::{Full, OpenError};
pub use mapped::Mapped;
pub use pages::PageMap;
pub use passgate_client::PageState;
pub use run::{Run, RunState};
pub use store::{Arena, Key, Store};
pub use table::Table;
pub use tree::Tree;
