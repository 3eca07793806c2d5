//! The verbs of the control socket: parameters and replies, as varlink's JSON has them.
//!
//! The interface is described in varlink's own language in `io.passgate.Control.varlink` beside this file, which
//! is what `GetInterfaceDescription` answers; a test holds the two together.

mod adopt;

use serde::{Deserialize, Serialize};

pub use adopt::{Adopt, Adopted, AdoptedRegion, Unended};

/// The name of passgate's interface.
pub const INTERFACE: &str = "io.passgate.Control";

/// What `GetInterfaceDescription` answers.
pub const DESCRIPTION: &str = include_str!("io.passgate.Control.varlink");

/// A call, as it comes.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// Interface and verb, with a dot between.
    pub method: String,
    /// The parameters; an object.
    #[serde(default)]
    pub parameters: serde_json::Value,
    /// Whether more than one reply is wanted.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
    /// Whether no reply is wanted.
    #[serde(default, skip_serializing_if = "is_false")]
    pub oneway: bool,
    /// Whether the connection is to change its protocol; never supported.
    #[serde(default, skip_serializing_if = "is_false")]
    pub upgrade: bool,
}

/// A reply, as it goes.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct Reply {
    /// The values, or the error's.
    #[serde(default)]
    pub parameters: serde_json::Value,
    /// Whether more come.
    #[serde(default, skip_serializing_if = "is_false")]
    pub continues: bool,
    /// The error's name, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

fn yes() -> bool {
    true
}

/// `AddMemory`. The message carries one descriptor, or two where `private` is true: what devices are given, then
/// the guest_memfd of the private side.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AddMemory {
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// Where in the file the memory starts, in bytes.
    #[serde(default)]
    pub offset: u64,
    /// Whether devices may write to it.
    #[serde(default = "yes")]
    pub writable: bool,
    /// Bytes per kernel mapping at most: a power of two, at least 4096; 0 (the default) leaves it to passgate.
    #[serde(default)]
    pub piece: u64,
    /// The state of its pages now: `shared`, `private` or `hole`.
    #[serde(default)]
    pub initial: State,
    /// Whether passgate is the only one who maps it, so that it may convert it itself (`Convert`).
    #[serde(default)]
    pub sole_mapper: bool,
    /// Whether a second descriptor, the private guest_memfd, comes along.
    #[serde(default)]
    pub private: bool,
}

impl AddMemory {
    /// Ordinary memory: `length` bytes at `gpa`, from the file's start, shared, writable.
    pub fn shared(gpa: u64, length: u64) -> Self {
        Self {
            gpa,
            length,
            offset: 0,
            writable: true,
            piece: 0,
            initial: State::Shared,
            sole_mapper: false,
            private: false,
        }
    }
}

/// A page state in JSON.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Devices may see it.
    #[default]
    Shared,
    /// Only the guest may.
    Private,
    /// Nothing is there.
    Hole,
}

impl From<State> for crate::gate::PageState {
    fn from(state: State) -> Self {
        match state {
            State::Shared => Self::Shared,
            State::Private => Self::Private,
            State::Hole => Self::Hole,
        }
    }
}

/// The reply to `AddMemory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub struct MemoryAdded {
    /// Its name.
    pub region: u32,
    /// Bytes mapped by now, summed over the domains.
    pub mapped: u64,
}

/// `RemoveMemory`.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveMemory {
    /// As `AddMemory` named it.
    pub region: u32,
}

/// `Convert`: passgate changes the range itself, once the proof is there.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Convert {
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// What it is to be.
    pub to: State,
    /// Within how many milliseconds to answer; 0 for the default.
    #[serde(default)]
    pub deadline_ms: u32,
}

/// The reply to `Convert`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Converted {
    /// `done`, `refused` or `unknown`.
    pub verdict: String,
    /// Names it, for `Explain`.
    pub invalidation: u64,
    /// What failed first, where something did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// What failed, where, by whose fault.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Failure {
    /// First guest-physical address that failed.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// Why, in a word (`gate::Cause`).
    pub cause: String,
    /// The device to blame, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The last rung that was tried.
    pub rung: String,
    /// The kernel's answer; 0 where there was none.
    pub errno: i32,
}

/// `Explain`.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Explain {
    /// The invalidation.
    pub invalidation: u64,
}

/// `Subscribe`; called with `more`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Subscribe {
    /// The sequence number of the last event that was heard; absent to hear only what comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
    /// Of which daemon that number is, as `subscribed` and `Status` name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
}

/// `Release`: a person says what the pages are that an invalidation left in quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The invalidation that the quarantine dates from.
    pub invalidation: u64,
    /// What the pages are.
    pub to: State,
}

/// The reply to `Release`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub struct Released {
    /// Bytes that came out of quarantine.
    pub bytes: u64,
}

/// The reply to `Metrics`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Metrics {
    /// OpenMetrics text, `# EOF` at its end.
    pub text: String,
}

/// `Dma`: a device does one DMA now, and the reply says what came of it. Only with `serve --allow-dma`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Dma {
    /// The device, by name.
    pub device: String,
    /// Where, in bytes.
    pub iova: u64,
    /// Bytes to write, in hexadecimal; absent for a read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write: Option<String>,
    /// Bytes to read; absent for a write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read: Option<u32>,
}

/// The reply to `Dma`.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct DmaDone {
    /// What was read, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read: Option<String>,
}

/// One region, in `Status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Region {
    /// Its name.
    pub region: u32,
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// Bytes per kernel mapping.
    pub piece: u64,
    /// Whether devices may write to it.
    pub writable: bool,
    /// Bytes by state: shared, private, hole, unknown.
    pub shared: u64,
    /// See `shared`.
    pub private: u64,
    /// See `shared`.
    pub hole: u64,
    /// See `shared`.
    pub unknown: u64,
    /// Whether it is on its way out.
    pub closing: bool,
}

/// One device, in `Status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Device {
    /// Its name: a PCI address, or `soft:N`.
    pub device: String,
    /// How it can be stopped, weakest first.
    pub stop: Vec<String>,
    /// Whether it caches translations of its own (PCI ATS is on, or nobody knows that it is off): an unmap alone may not
    /// be proof for it.
    pub ats: bool,
    /// Whether it is a TDISP interface in LOCKED or RUN, which bus mastering off or a reset would end.
    pub tdi: bool,
    /// The fence that it is under, where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<String>,
    /// True while it could not be brought back: it may be in its address space or not.
    #[serde(default)]
    pub lost: bool,
}

/// One range that must not be handed out, in `Status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Quarantined {
    /// First guest-physical address, while a region covers it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpa: Option<u64>,
    /// Where in its file it starts, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// Why, in a word.
    pub cause: String,
    /// The invalidation that failed.
    pub invalidation: u64,
}

/// One range that was refused lately, in `Status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Refused {
    /// The invalidation.
    pub invalidation: u64,
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// Why, in a word.
    pub cause: String,
    /// The device to blame, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The kernel's answer; 0 where there was none.
    pub errno: i32,
    /// When, in seconds before this status.
    pub seconds_ago: u64,
}

/// Totals since the start, in `Status`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Totals {
    /// Conversions answered *done*.
    pub done: u64,
    /// Conversions answered *refused*.
    pub refused: u64,
    /// Conversions answered *unknown*.
    pub unknown: u64,
    /// Conversions that had to wait for DMA in flight.
    pub late_dma_waited: u64,
    /// Requests that were wrong.
    pub wrong: u64,
}

/// The virtio disk that the daemon serves, in `Status`. Counted since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Disk {
    /// Whether there is a front-end.
    pub connected: bool,
    /// Whether the drive was given up.
    pub lost: bool,
    /// Requests that are at the drive.
    pub in_flight: u64,
    /// Requests that are held because a page of theirs is not open to the drive.
    pub held: u64,
    /// Requests that were done.
    pub done: u64,
    /// Requests that were answered with an error.
    pub failed: u64,
    /// Those of them that were refused because of their memory.
    pub refused: u64,
}

/// The reply to `Status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Status {
    /// passgate's version.
    pub version: String,
    /// The domain's kind: `iommufd`, `type1`, `soft`.
    pub iommu: String,
    /// This daemon's name, new with every start: whose sequence numbers events have.
    pub instance: String,
    /// The sequence number of the last event.
    pub sequence: u64,
    /// How far the daemon goes by itself when DMA does not stop: `refuse`, `fence` or `reset`.
    pub on_stuck_dma: String,
    /// What counts as proof: `contained` or `strict`.
    pub platform: String,
    /// Whether DMA beside a page that goes may miss a moment: `require`, `prefer` or `off`.
    pub hitless: String,
    /// Kernel mappings in use.
    pub mappings: u64,
    /// Kernel mappings that open invalidations may yet need.
    pub reserved: u64,
    /// Kernel mappings that there can be.
    pub max_mappings: u64,
    /// Kernel mappings at the worst that conversions can make of the regions.
    pub forecast: u64,
    /// Bytes that devices may reach.
    pub pinned: u64,
    /// Bytes in quarantine.
    pub quarantined: u64,
    /// Invalidations begun and not ended.
    pub open: u64,
    /// Connections.
    pub clients: u64,
    /// The regions.
    pub regions: Vec<Region>,
    /// The devices.
    pub devices: Vec<Device>,
    /// The virtio disk that is served; none where none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// What must not be handed out; at most 1024 ranges of it.
    pub quarantine: Vec<Quarantined>,
    /// What was refused lately, the last first; at most 64 ranges.
    pub refused: Vec<Refused>,
    /// Totals since the start.
    pub totals: Totals,
}
