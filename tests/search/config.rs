//! A configuration: the machine, the actions of clients, and the bounds of one path.

use passgate::gate::{CallLimits, Hitless, OnStuckDma, PageState, Platform, Policy};
use passgate_backends::{DomainCaps, Steps};
use passgate_bindings::PAGE;

use crate::action::Ending;
use crate::kernel::{Machine, Outcome};
use crate::plant::Plant;

/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;
/// The deadline of every begin. Its seven parts last a second each, so that its timers coincide with the session's own.
pub const DEADLINE_NS: u64 = 7 * SECOND_NS;

/// A conversion that a client may begin, once.
#[derive(Debug, Clone, Copy)]
pub struct Conversion {
    /// The pages of the region, a bit for each.
    pub pages: u64,
    pub to: PageState,
    /// True if the second connection begins it instead of the VM's.
    pub by_second: bool,
    /// True if passgate performs the conversion.
    pub by_passgate: bool,
}

impl Conversion {
    /// Returns a conversion of these pages to private, by the VM.
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
    /// The number of pages of the file, and of each region that shows it.
    pub pages: u64,
    /// The number of pages per kernel mapping.
    pub piece: u64,
    /// True if a second region shows the file from the start.
    pub alias: bool,
    pub conversions: Vec<Conversion>,
    pub endings: Vec<Ending>,
    /// The faults that a map may have.
    pub map_faults: Vec<Outcome>,
    /// The faults that an unmap may have.
    pub unmap_faults: Vec<Outcome>,
    /// The faults that a fence may have.
    pub fence_faults: Vec<Outcome>,
    /// The faults that an attach may have.
    pub attach_faults: Vec<Outcome>,
    /// The faults that passgate's own conversion may have.
    pub convert_faults: Vec<Outcome>,
    /// The maximum number of calls with a fault on one path.
    pub faults: u8,
    /// The maximum number of kills with restart on one path; if 0, no ledger is kept for a restart.
    pub kills: u8,
    pub deaths: bool,
    pub second_dies: bool,
    pub removals: u8,
    pub adds_alias: bool,
    /// The maximum number of releases by an operator on one path.
    pub releases: u8,
    /// The page states that a release may give.
    pub released_as: Vec<PageState>,
    /// True if the execution of a call and the delivery of its result are two steps.
    pub splits_calls: bool,
    /// True if several events may happen before the session reacts to them, as in one batch of its loop.
    pub batches: bool,
    /// True if conversions may be begun any number of times, and VMs may reconnect.
    pub repeats: bool,
    /// True if time may pass while calls are in progress; if false, no deadline expires.
    pub time: bool,
    /// The sizes in which the gate asks for calls.
    pub limits: CallLimits,
}

/// The model machine, unless a configuration changes it.
pub const MACHINE: Machine = Machine {
    capabilities: DomainCaps {
        max_mappings: 65_535,
        max_mapping_len: 1 << 30,
        tickets: false,
        cut: false,
        replace: false,
        counts_partial: true,
    },
    devices: 1,
    stop_class: Steps::DETACH,
    ats: false,
    plant: Plant::Nothing,
};

impl Config {
    /// Returns the basic configuration: one file of two pages, shown once, mapped page by page, with one device; the first page is
    /// made private. Nothing fails.
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
            limits: CallLimits::default(),
        }
    }

    /// Returns the configuration on a strict platform, with devices that have ATS.
    pub fn strict(mut self) -> Self {
        self.policy.platform = Platform::Strict;
        self.machine.ats = true;
        self
    }

    /// Returns the configuration with a planted fault.
    pub fn planted(mut self, plant: Plant) -> Self {
        self.machine.plant = plant;
        self
    }

    /// Returns the configuration with calls of one page, by which a region is closed one after the other.
    pub fn in_pieces(mut self) -> Self {
        self.limits = CallLimits { call_bytes: PAGE, close_calls: 1 };
        self
    }

    /// Returns the configuration with every conversion performed by passgate.
    pub fn by_passgate(mut self) -> Self {
        self.conversions.iter_mut().for_each(|conversion| conversion.by_passgate = true);
        self
    }

    /// Returns the configuration with every fault of the model, at most `count` of them on one path.
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
