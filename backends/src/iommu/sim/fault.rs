//! What goes wrong, and at which call. A plan is data: the same plan and the same calls give the same run.

use std::collections::BTreeMap;

use rustix::io::Errno;

/// The calls of a simulated domain and its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// [`crate::Domain::map`].
    Map,
    /// [`crate::Domain::unmap`].
    Unmap,
    /// [`crate::Device::fence`].
    Fence,
    /// [`crate::Device::attach`].
    Attach,
    /// [`crate::Domain::replace`].
    Replace,
}

impl Call {
    /// All of them.
    pub const ALL: [Call; 5] = [Self::Map, Self::Unmap, Self::Fence, Self::Attach, Self::Replace];
}

/// What goes wrong with one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The call fails and changes nothing (an attach that fails leaves the device out).
    Errno(Errno),
    /// A call of several steps that fails at the last of them: a fence has stopped the device all the same, an attach
    /// leaves it in its domain and doing DMA, a replace changes no mapping and leaves every device detached.
    HalfDone(Errno),
    /// A map that fails half-way, and whose roll-back fails too: half of the pieces stay.
    HalfMapped(Errno),
    /// An unmap, or a replace, that fails half-way. The bytes are not written back, as `IOMMU_IOAS_UNMAP` behaves, unless
    /// the domain [counts them](super::Capabilities::counts_partial).
    HalfUnmapped(Errno),
    /// An unmap, or a replace, that succeeds, but removes (and reports) only half of the mappings
    /// (or of the parts of mappings).
    Short,
    /// An unmap, or a replace, after which attached devices go on using the old translation until [`super::Sim::flush`].
    Late,
    /// Both: half of the mappings go, and those late.
    ShortLate,
    /// As [`Fault::Late`], but only a detach or a reset of the device ends it (or [`super::Sim::unstick`]).
    Stuck,
    /// An unmap, or a replace, that succeeds, although the invalidation of the devices' own caches timed out and nobody is told
    /// (as the kernel handles ATS): devices with ATS go on using the old translation until a detach or a reset.
    Cached,
    /// The call does not return before [`super::Sim::release`]; then it does what it should have done.
    Hang,
}

impl Fault {
    /// Whether `call` can fail like this.
    pub fn befalls(self, call: Call) -> bool {
        match self {
            Self::Errno(_) | Self::Hang => true,
            Self::HalfDone(_) => matches!(call, Call::Fence | Call::Attach | Call::Replace),
            Self::HalfMapped(_) => call == Call::Map,
            Self::HalfUnmapped(_)
            | Self::Short
            | Self::Late
            | Self::ShortLate
            | Self::Stuck
            | Self::Cached => matches!(call, Call::Unmap | Call::Replace),
        }
    }
}

/// Which calls go wrong, and how. Calls are counted from 1, from the making of the domain on.
#[derive(Debug, Clone, Default)]
pub struct FaultPlan {
    of_kind: BTreeMap<(Call, u64), Fault>,
    of_all: BTreeMap<u64, Fault>,
}

impl FaultPlan {
    /// Nothing goes wrong.
    pub fn new() -> Self {
        Self::default()
    }

    /// The `nth` call of this kind goes wrong.
    pub fn at(mut self, call: Call, nth: u64, fault: Fault) -> Self {
        self.of_kind.insert((call, nth), fault);
        self
    }

    /// The `nth` call of any kind goes wrong, where a call of its kind can fail like this.
    pub fn at_any(mut self, nth: u64, fault: Fault) -> Self {
        self.of_all.insert(nth, fault);
        self
    }

    fn take(&mut self, call: Call, of_kind: u64, of_all: u64) -> Option<Fault> {
        let planned = self.of_kind.remove(&(call, of_kind)).or_else(|| self.of_all.remove(&of_all));
        planned.filter(|fault| fault.befalls(call))
    }
}

/// Counts calls and deals out the faults planned for them.
#[derive(Debug, Default)]
pub(super) struct Dealer {
    pub(super) plan: FaultPlan,
    counts: [u64; Call::ALL.len()],
}

impl Dealer {
    /// Takes down one call; what goes wrong with it.
    pub(super) fn deal(&mut self, call: Call) -> Option<Fault> {
        self.counts[call as usize] += 1;
        self.plan.take(call, self.counts[call as usize], self.total())
    }

    /// The next call of this kind goes wrong.
    pub(super) fn next(&mut self, call: Call, fault: Fault) {
        self.plan.of_kind.insert((call, self.counts[call as usize] + 1), fault);
    }

    pub(super) fn count(&self, call: Call) -> u64 {
        self.counts[call as usize]
    }

    pub(super) fn total(&self) -> u64 {
        self.counts.iter().sum()
    }
}
