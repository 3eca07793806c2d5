//! Fault injection: the faults, and the calls that they are planned for. A plan is data: the same plan and the same
//! sequence of calls give the same results.

use std::collections::BTreeMap;

use rustix::io::Errno;

/// The calls of a simulated domain and its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// [`passgate_backends::Domain::map`].
    Map,
    /// [`passgate_backends::Domain::unmap`].
    Unmap,
    /// [`passgate_backends::Device::fence`].
    Fence,
    /// [`passgate_backends::Device::attach`].
    Attach,
    /// [`passgate_backends::Domain::replace`].
    Replace,
}

impl Call {
    /// All calls.
    pub const ALL: [Call; 5] = [Self::Map, Self::Unmap, Self::Fence, Self::Attach, Self::Replace];
}

/// A fault of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The call fails and changes nothing, except that an attach leaves the device detached.
    Errno(Errno),
    /// A call of several steps fails at the last of them: a fence has stopped the device nevertheless, an attach leaves
    /// it attached and doing DMA, a replace changes no mapping and leaves every device detached.
    HalfDone(Errno),
    /// A map fails half-way, and so does its roll-back: half of the pieces stay mapped.
    HalfMapped(Errno),
    /// An unmap, or a replace, fails half-way. It reports no bytes, like `IOMMU_IOAS_UNMAP`, unless the domain
    /// [counts them](passgate_backends::DomainCaps::counts_partial).
    HalfUnmapped(Errno),
    /// An unmap, or a replace, succeeds, but removes and reports only half of the mappings (or of the parts of
    /// mappings).
    Short,
    /// After an unmap, or a replace, active devices use the old translation until [`super::Sim::flush`].
    Late,
    /// [`Fault::Short`] and [`Fault::Late`] together: half of the mappings are removed, and their flush is late.
    ShortLate,
    /// As [`Fault::Late`], but only a detach or a reset of the device (or [`super::Sim::unstick`]) ends it.
    Stuck,
    /// An unmap, or a replace, succeeds although the invalidation of the devices' translation caches has timed out,
    /// which the kernel does not report: devices with ATS use the old translation until a detach or a reset.
    Cached,
    /// The call does not return before [`super::Sim::release`]; then it has its normal effect.
    Hang,
}

impl Fault {
    /// Returns true if `call` can have this fault.
    pub fn applies_to(self, call: Call) -> bool {
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

/// The planned faults by call. Calls are counted from 1, from the making of the domain on.
#[derive(Debug, Clone, Default)]
pub struct FaultPlan {
    of_kind: BTreeMap<(Call, u64), Fault>,
    of_all: BTreeMap<u64, Fault>,
}

impl FaultPlan {
    /// Makes a plan without faults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Plans `fault` for the `nth` call of this kind.
    pub fn at(mut self, call: Call, nth: u64, fault: Fault) -> Self {
        self.of_kind.insert((call, nth), fault);
        self
    }

    /// Plans `fault` for the `nth` call of any kind. It has no effect if that call cannot have this fault.
    pub fn at_any(mut self, nth: u64, fault: Fault) -> Self {
        self.of_all.insert(nth, fault);
        self
    }

    fn take(&mut self, call: Call, of_kind: u64, of_all: u64) -> Option<Fault> {
        let planned = self.of_kind.remove(&(call, of_kind)).or_else(|| self.of_all.remove(&of_all));
        planned.filter(|fault| fault.applies_to(call))
    }
}

/// Counts calls and returns the faults that are planned for them.
#[derive(Debug, Default)]
pub(super) struct Injector {
    pub(super) plan: FaultPlan,
    counts: [u64; Call::ALL.len()],
}

impl Injector {
    /// Counts one call and returns its planned fault.
    pub(super) fn count_call(&mut self, call: Call) -> Option<Fault> {
        self.counts[call as usize] += 1;
        self.plan.take(call, self.counts[call as usize], self.total())
    }

    /// Plans `fault` for the next call of this kind.
    pub(super) fn plan_next(&mut self, call: Call, fault: Fault) {
        self.plan.of_kind.insert((call, self.counts[call as usize] + 1), fault);
    }

    pub(super) fn count(&self, call: Call) -> u64 {
        self.counts[call as usize]
    }

    pub(super) fn total(&self) -> u64 {
        self.counts.iter().sum()
    }
}
