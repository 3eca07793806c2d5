//! Policy: the settings that decide what counts as proof, how far fences go and what is refused, and every limit of the gate.

use passgate_backends::Steps;
use serde::{Deserialize, Serialize};

use super::rung::Rung;

/// Settings of one gate. They never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The fences that are used when DMA does not stop.
    pub on_stuck_dma: OnStuckDma,
    /// The platform, which decides what counts as proof.
    pub platform: Platform,
    /// True if a fence may end a TDI ([`super::DeviceTraits::tdi`]).
    pub end_tdi: bool,
    /// Which gaps in the DMA of neighbouring pages are allowed.
    pub hitless: Hitless,
    /// The maximum number of regions, over all clients.
    pub max_regions: u32,
    /// The maximum number of open invalidations of one client.
    pub max_open: u32,
    /// The maximum of guest memory in bytes, over all clients.
    pub max_memory: u64,
    /// The time in nanoseconds without progress after which a region that is being closed is given up, and its stuck parts
    /// are quarantined. Every part of it that is unmapped begins the time anew.
    pub close_deadline_ns: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            on_stuck_dma: OnStuckDma::Refuse,
            platform: Platform::default(),
            end_tdi: false,
            hitless: Hitless::default(),
            max_regions: 512,
            max_open: 65_536,
            max_memory: 1 << 44,
            close_deadline_ns: 2_000_000_000,
        }
    }
}

/// The harm that a stale write does here, and so what counts as proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Platform {
    /// A stale write faults, which is logged and harmless (AMD SEV-SNP, Arm): an unmap of its full length is proof.
    #[default]
    Contained,
    /// A stale write may take the host down (Intel TDX: a machine check): a device with ATS must have been detached, and may be,
    /// whatever [`OnStuckDma`] says.
    Strict,
}

/// The fences that are used without an operator when DMA does not stop (`--on-stuck-dma`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnStuckDma {
    /// Drain the device; then refuse.
    #[default]
    Refuse,
    /// Also stop the devices: migration STOP, bus mastering off, detach.
    Fence,
    /// Also reset the devices.
    Reset,
}

impl OnStuckDma {
    /// Returns the steps that this policy allows.
    pub fn allows(self) -> Steps {
        match self {
            Self::Refuse => Steps::DRAIN,
            Self::Fence => Steps::ALL_BUT_RESET,
            Self::Reset => Steps::all(),
        }
    }
}

/// Which gaps in the DMA of neighbouring pages are allowed when a page leaves a large mapping (`--hitless`). A *gap* is the time
/// in which a neighbour that should be mapped is not. The ways in which a page leaves, and what each costs its neighbours:
///
/// | way | needs | the neighbours' DMA |
/// |---|---|---|
/// | *cut* | a domain that cuts (small IOMMU pages) | goes on |
/// | *page* | nothing: pages are mapped one by one | goes on, at the price of a kernel mapping per page |
/// | *replace* | a domain with a second page table | has a gap: the devices are paused for it, or tolerate it |
/// | *split* | nothing: the mapping is unmapped, the rest mapped again | has a gap for each mapping: as with *replace* |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hitless {
    /// None: memory that cannot be cut is mapped page by page, and refused when it is added where that cannot be done.
    Require,
    /// No DMA is lost, but devices may be paused: drained or stopped while a mapping is split, then resumed.
    #[default]
    Prefer,
    /// DMA beside a page that leaves may fault during the gap.
    Off,
}

/// The maximum number of ranges excluded from mapping at once, by open invalidations of all clients and in quarantine: with
/// them the ledger of a tebibyte stays within 144 MiB at worst.
pub(super) const MAX_EXCLUDED_RANGES: u64 = 65_536;

/// The maximum number of kernel mappings that one map effect makes, so that no begin waits long for one in progress.
pub(crate) const MAX_CALL_MAPPINGS: u64 = 1024;
/// The maximum number of bytes that one effect maps, or unmaps of a region that is being closed (unless a single mapping is
/// longer). The kernel pins and unpins small pages one by one, and its lock keeps every other call on the domain waiting
/// meanwhile: a terabyte takes minutes. So other calls come in between, and there is progress to see.
pub(crate) const MAX_CALL_BYTES: u64 = 4 << 20;
/// The maximum number of unmaps of regions being closed that are in progress, if more than one for each region: calls of others find a
/// free thread.
const MAX_CLOSE_CALLS: usize = 4;

/// The sizes in which a gate asks for calls. They decide nothing but how much is done at a time.
#[derive(Debug, Clone, Copy)]
pub struct CallLimits {
    /// The maximum number of bytes that one call maps, or unmaps of a region being closed, unless a single mapping is longer.
    pub call_bytes: u64,
    /// The maximum number of unmaps of regions being closed that are in progress; each region has one at least, and one more while all of
    /// its calls are late.
    pub close_calls: usize,
}

impl Default for CallLimits {
    fn default() -> Self {
        Self { call_bytes: MAX_CALL_BYTES, close_calls: MAX_CLOSE_CALLS }
    }
}

/// The largest mappings, in bytes, where a page can be cut out of them: a conversion that meets one being made does not
/// wait long.
pub(super) const CUT_MAPPING_BYTES: u64 = 64 << 20;
/// The size in bytes of mappings that are split where gaps do not matter, unless there is no room for so many: the gap is
/// as long as one takes to map.
pub(super) const SPLIT_MAPPING_BYTES: u64 = 2 << 20;

/// The number of mappings losing pages at once from which on a second page table is worth its cost.
pub(super) const MIN_REPLACED_MAPPINGS: usize = 8;

/// Ticks ([`super::Event::Quiet`]) without a change after which a fragmented mapping is merged: at least two, because the
/// first may end right after the change.
pub(super) const QUIET_TICKS: u32 = 2;
/// Splits of one mapping, without a quiet time between them, from which on it is mapped page by page.
pub(super) const SPLITS_UNTIL_PAGED: u32 = 4;
/// The maximum number of mappings that are merged in one tick.
pub(super) const MAX_MERGES_PER_TICK: usize = 16;
/// The maximum number of fragmented mappings that are tracked in one domain; further ones are not merged.
pub(super) const MAX_FRAGMENTED: usize = 65_536;
/// The largest mapping, in bytes, that is mapped page by page because it keeps being split.
pub(super) const MAX_PAGED_BYTES: u64 = 2 << 20;

/// A deadline has one part for each rung of the ladder, and one of slack in which the answer travels.
pub(super) const DEADLINE_PARTS: u64 = Rung::LADDER.len() as u64 + 1;
