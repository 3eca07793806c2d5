//! A configuration: what the machine is like, what clients do, and how much of what may happen on one path.

use passgate::gate::{Hitless, OnStuckDma, PageState, Platform, Policy};
use passgate_backends::{Capabilities, StopClass};

use crate::action::Ending;
use crate::kernel::{Machine, Outcome};
use crate::plant::Plant;

/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;
/// The deadline of every begin: seven parts of a second, so that its timers coincide with those of the session.
pub const DEADLINE_NS: u64 = 7 * SECOND_NS;

/// A conversion that a client may begin, once.
#[derive(Debug, Clone, Copy)]
pub struct Conversion {
    /// Which pages of the region: a bit for each.
    pub pages: u64,
    pub to: PageState,
    /// Whether the second connection begins it, not the VM's.
    pub by_second: bool,
    /// Whether passgate converts.
    pub by_passgate: bool,
}

impl Conversion {
    /// The VM makes these pages private.
    pub const fn private(pages: u64) -> Self {
        Self { pages, to: PageState::Private, by_second: false, by_passgate: false }
    }
}

/// A bounded world.
#[derive(Debug, Clone)]
pub struct Config {
    pub name: &'static str,
    pub policy: Policy,
    pub machine: Machine,
    /// Pages of the file, and of the region that shows it.
    pub pages: u64,
    /// Pages per kernel mapping.
    pub piece: u64,
    /// Whether the file shows at a second place from the start.
    pub alias: bool,
    pub conversions: Vec<Conversion>,
    pub endings: Vec<Ending>,
    /// How a call may go wrong: of a map, an unmap, a fence, an attach, a conversion by passgate.
    pub map_faults: Vec<Outcome>,
    pub unmap_faults: Vec<Outcome>,
    pub fence_faults: Vec<Outcome>,
    pub attach_faults: Vec<Outcome>,
    pub convert_faults: Vec<Outcome>,
    /// How many calls go wrong on one path.
    pub faults: u8,
    /// Kills with restart on one path; with none, nothing is written down for a restart.
    pub kills: u8,
    pub deaths: bool,
    pub second_dies: bool,
    pub removals: u8,
    pub adds_alias: bool,
    /// Releases by an operator on one path, and what the pages may be then.
    pub releases: u8,
    pub released_as: Vec<PageState>,
    /// Whether the kernel's doing and the session's hearing of it are two steps.
    pub splits_calls: bool,
    /// Whether several things may happen before the session does anything about them, as in one inbox.
    pub batches: bool,
    /// Whether conversions are begun again and again, and VMs come back.
    pub repeats: bool,
    /// Whether time passes while calls are under way: without it only what goes wrong by itself is searched.
    pub time: bool,
}

/// What a model machine has unless a configuration says otherwise.
pub const MACHINE: Machine = Machine {
    capabilities: Capabilities {
        max_mappings: 65_535,
        max_mapping_len: 1 << 30,
        by_file: true,
        tickets: false,
        cut: false,
        replace: false,
        counts_partial: true,
    },
    devices: 1,
    stop_class: StopClass::DETACH,
    ats: false,
    plant: Plant::Nothing,
};

impl Config {
    /// One file of two pages, shown once, mapped page by page, on one device; the first page is made private. Nothing
    /// goes wrong.
    pub fn new(name: &'static str) -> Self {
        let policy = Policy {
            on_stuck_dma: OnStuckDma::Fence,
            platform: Platform::Contained,
            hitless: Hitless::Off,
            close_deadline_ns: DEADLINE_NS,
            ..Policy::default()
        };
        Self {
            name,
            policy,
            machine: MACHINE,
            pages: 2,
            piece: 1,
            alias: false,
            conversions: vec![Conversion::private(0b01)],
            endings: vec![Ending::Committed, Ending::NotCommitted, Ending::Unknown],
            map_faults: Vec::new(),
            unmap_faults: Vec::new(),
            fence_faults: Vec::new(),
            attach_faults: Vec::new(),
            convert_faults: Vec::new(),
            faults: 0,
            kills: 0,
            deaths: false,
            second_dies: false,
            removals: 0,
            adds_alias: false,
            releases: 0,
            released_as: vec![PageState::Shared, PageState::Private],
            splits_calls: false,
            batches: false,
            repeats: false,
            time: true,
        }
    }

    /// As it is, on a strict platform with devices that cache translations.
    pub fn strict(mut self) -> Self {
        self.policy.platform = Platform::Strict;
        self.machine.ats = true;
        self
    }

    /// As it is, with a planted fault.
    pub fn planted(mut self, plant: Plant) -> Self {
        self.machine.plant = plant;
        self
    }

    /// As it is, with passgate converting.
    pub fn by_passgate(mut self) -> Self {
        self.conversions.iter_mut().for_each(|conversion| conversion.by_passgate = true);
        self
    }

    /// As it is, with every fault that the model has, `count` of them on one path.
    pub fn with_faults(mut self, count: u8) -> Self {
        use Outcome::{Fails, FailsDone, FailsHalf, FailsOut, Short};
        self.map_faults = vec![Fails, FailsHalf, FailsDone];
        self.unmap_faults = vec![Fails, FailsDone, FailsHalf, Short];
        self.fence_faults = vec![Fails, FailsDone];
        self.attach_faults = vec![Fails, FailsOut, FailsDone];
        self.convert_faults = vec![Fails, FailsDone];
        self.faults = count;
        if self.machine.capabilities.tickets {
            self.unmap_faults.push(Outcome::InFlight);
        }
        self
    }
}
