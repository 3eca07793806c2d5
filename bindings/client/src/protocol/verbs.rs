//! The methods of the control socket: their parameters and replies in JSON.
//!
//! `io.passgate.Control.varlink`, next to this file, describes the interface in varlink's interface definition language;
//! `GetInterfaceDescription` returns it. A test compares its fields with the structures here.

mod adopt;

use serde::{Deserialize, Serialize};

use crate::page_state::{self, PageState};

pub use adopt::{Adopt, Adopted, AdoptedRegion, Unended};

/// The name of passgate's interface.
pub const INTERFACE: &str = "io.passgate.Control";

/// The interface description, as `GetInterfaceDescription` returns it.
pub const DESCRIPTION: &str = include_str!("io.passgate.Control.varlink");

/// A varlink call.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// The interface and the method, separated by a dot.
    pub method: String,
    /// The parameters, a JSON object.
    #[serde(default)]
    pub parameters: serde_json::Value,
    /// True where the caller accepts more than one reply.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
    /// True where the caller wants no reply.
    #[serde(default, skip_serializing_if = "is_false")]
    pub oneway: bool,
    /// True where the caller wants to change the protocol of the connection; not supported.
    #[serde(default, skip_serializing_if = "is_false")]
    pub upgrade: bool,
}

/// A varlink reply.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct Reply {
    /// The reply's parameters, or the error's.
    #[serde(default)]
    pub parameters: serde_json::Value,
    /// True where more replies to the same call follow.
    #[serde(default, skip_serializing_if = "is_false")]
    pub continues: bool,
    /// The name of the error; none where the call succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

fn default_true() -> bool {
    true
}

/// The parameters of `AddMemory`. The message has one descriptor, that of the file that devices may access; where `private`
/// is true it has a second, the guest_memfd with the private pages.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AddMemory {
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// The offset in the file at which the memory starts, in bytes.
    #[serde(default)]
    pub offset: u64,
    /// True where devices may write to it.
    #[serde(default = "default_true")]
    pub writable: bool,
    /// The maximum size of a kernel mapping in bytes: a power of two, at least 4096. 0, the default: passgate chooses.
    #[serde(default)]
    pub piece: u64,
    /// The present state of its pages: `shared`, `private` or `hole`.
    #[serde(default = "page_state::shared", deserialize_with = "page_state::requested")]
    pub initial: PageState,
    /// True where no other process maps it, so that passgate itself may convert it (`Convert`).
    #[serde(default)]
    pub sole_mapper: bool,
    /// True where the message has a second descriptor, the private guest_memfd.
    #[serde(default)]
    pub private: bool,
}

impl AddMemory {
    /// Returns parameters for `length` bytes at `gpa`, from the start of the file, shared and writable.
    pub fn shared(gpa: u64, length: u64) -> Self {
        Self {
            gpa,
            length,
            offset: 0,
            writable: true,
            piece: 0,
            initial: PageState::Shared,
            sole_mapper: false,
            private: false,
        }
    }
}

/// The reply to `AddMemory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub struct MemoryAdded {
    /// The id of the region.
    pub region: u32,
    /// The number of bytes mapped so far, summed over the domains.
    pub mapped: u64,
}

/// The parameters of `RemoveMemory`.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveMemory {
    /// The id of the region, from [`MemoryAdded`].
    pub region: u32,
}

/// The parameters of `Convert`: passgate itself converts the range, once no device can access it.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Convert {
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// The new state of its pages.
    #[serde(deserialize_with = "page_state::requested")]
    pub to: PageState,
    /// The deadline of the verdict in milliseconds; 0 for the default.
    #[serde(default)]
    pub deadline_ms: u32,
}

/// The reply to `Convert`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Converted {
    /// `done`, `refused` or `unknown`.
    pub verdict: String,
    /// The id of the invalidation, for `Explain`.
    pub invalidation: u64,
    /// The first failure; none where the verdict is `done`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// The first failure of an invalidation.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Failure {
    /// First guest-physical address of the range that failed, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// The cause, as [`crate::Cause::word`] returns it.
    pub cause: String,
    /// The name of the device that could not be stopped; none where no device is the cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The strongest step of the fence ladder that was tried.
    pub rung: String,
    /// The errno of the failed kernel call; 0 where there was none.
    pub errno: i32,
}

/// The parameters of `Explain`.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Explain {
    /// The id of the invalidation.
    pub invalidation: u64,
}

/// The parameters of `Subscribe`, which is called with `more`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Subscribe {
    /// The sequence number of the last event received: later events that are still stored are sent first. Absent for new
    /// events only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
    /// The instance of the daemon that `after` is from, as in the event `subscribed` and in `Status`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
}

/// The parameters of `Release`: an operator ends the quarantine of an invalidation's pages and states what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The id of the invalidation that quarantined the pages.
    pub invalidation: u64,
    /// The state of the pages.
    #[serde(deserialize_with = "page_state::requested")]
    pub to: PageState,
}

/// The reply to `Release`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub struct Released {
    /// The number of bytes whose quarantine has ended.
    pub bytes: u64,
}

/// The reply to `Metrics`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Metrics {
    /// OpenMetrics text; it ends with `# EOF`.
    pub text: String,
}

/// The parameters of `Dma`: a device performs one DMA operation, whose result is the reply. Only with `serve --allow-dma`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Dma {
    /// The name of the device.
    pub device: String,
    /// The first I/O virtual address, in bytes.
    pub iova: u64,
    /// The bytes to write, in hexadecimal; absent for a read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write: Option<String>,
    /// The number of bytes to read; absent for a write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read: Option<u32>,
}

/// The reply to `Dma`.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct DmaDone {
    /// The bytes read, in hexadecimal; absent for a write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read: Option<String>,
}

/// A region, in `Status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Region {
    /// The id of the region.
    pub region: u32,
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// The size of a kernel mapping in bytes.
    pub piece: u64,
    /// True where devices may write to it.
    pub writable: bool,
    /// The number of bytes that are shared.
    pub shared: u64,
    /// The number of bytes that are private.
    pub private: u64,
    /// The number of bytes in holes.
    pub hole: u64,
    /// The number of bytes whose state is unknown.
    pub unknown: u64,
    /// True while it is being removed.
    pub closing: bool,
}

/// A device, in `Status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Device {
    /// Its name: a PCI address, or `soft:N`.
    pub device: String,
    /// The fences by which it can be stopped, weakest first.
    pub stop: Vec<String>,
    /// True where it may cache translations (PCI ATS is enabled, or cannot be proved to be disabled), so that an unmap alone
    /// may not be proof.
    pub ats: bool,
    /// True where it is a TDISP interface (TDI) in CONFIG_LOCKED or RUN, which bus mastering off or a reset would end.
    pub tdi: bool,
    /// The strongest fence that it is under; absent where it is under none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<String>,
    /// True while its last attach has failed: it may be attached to its domain or not.
    #[serde(default)]
    pub lost: bool,
}

/// A range in quarantine, in `Status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Quarantined {
    /// First guest-physical address, in bytes; absent while no region covers it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpa: Option<u64>,
    /// Its offset in its file, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// The cause, as [`crate::Cause::word`] returns it.
    pub cause: String,
    /// The id of the invalidation that quarantined it.
    pub invalidation: u64,
}

/// A range that was refused recently, in `Status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Refused {
    /// The id of the invalidation.
    pub invalidation: u64,
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// The cause, as [`crate::Cause::word`] returns it.
    pub cause: String,
    /// The name of the device that could not be stopped; none where no device is the cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The errno of the failed kernel call; 0 where there was none.
    pub errno: i32,
    /// The time between the refusal and this reply, in seconds.
    pub seconds_ago: u64,
}

/// Totals since the daemon's start, in `Status`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Totals {
    /// The number of conversions with the verdict *done*.
    pub done: u64,
    /// The number of conversions with the verdict *refused*.
    pub refused: u64,
    /// The number of conversions with the verdict *unknown*.
    pub unknown: u64,
    /// The number of conversions that had to wait for DMA in flight.
    pub late_dma_waited: u64,
    /// The number of requests that were not valid.
    pub wrong: u64,
}

/// The virtio disk of the daemon, in `Status`. Its counters start with the daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Disk {
    /// True while a vhost-user front-end is connected.
    pub connected: bool,
    /// True once the drive has failed for good.
    pub lost: bool,
    /// The number of requests in flight at the drive.
    pub in_flight: u64,
    /// The number of requests that are postponed because a page of theirs is closed in the admission window.
    pub held: u64,
    /// The number of requests completed.
    pub done: u64,
    /// The number of requests completed with an error.
    pub failed: u64,
    /// The number of requests of `failed` that were refused because of their memory.
    pub refused: u64,
}

/// The reply to `Status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Status {
    /// passgate's version.
    pub version: String,
    /// The kind of the IOMMU domain: `iommufd`, `type1`, `soft`.
    pub iommu: String,
    /// The instance name of the daemon, new with every start; sequence numbers of events belong to one instance.
    pub instance: String,
    /// The sequence number of the last event.
    pub sequence: u64,
    /// The policy where DMA does not stop (`--on-stuck-dma`): `refuse`, `fence` or `reset`.
    pub on_stuck_dma: String,
    /// The platform, which determines what counts as proof: `contained` or `strict`.
    pub platform: String,
    /// The gaps in the DMA of neighbouring pages that are allowed (`--hitless`): `require`, `prefer` or `off`.
    pub hitless: String,
    /// The number of kernel mappings in use.
    pub mappings: u64,
    /// The number of kernel mappings reserved for open invalidations.
    pub reserved: u64,
    /// The limit of kernel mappings.
    pub max_mappings: u64,
    /// The number of kernel mappings in use in the worst case of conversions of the regions.
    pub forecast: u64,
    /// The number of bytes that devices may access.
    pub pinned: u64,
    /// The number of bytes in quarantine.
    pub quarantined: u64,
    /// The number of invalidations begun and not ended.
    pub open: u64,
    /// The number of connections.
    pub clients: u64,
    /// The regions.
    pub regions: Vec<Region>,
    /// The devices.
    pub devices: Vec<Device>,
    /// The virtio disk, where the daemon serves one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// The ranges in quarantine; at most 1024 of them.
    pub quarantine: Vec<Quarantined>,
    /// The ranges refused recently, newest first; at most 64.
    pub refused: Vec<Refused>,
    /// Totals since the daemon's start.
    pub totals: Totals,
}
