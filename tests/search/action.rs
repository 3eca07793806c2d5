//! The steps of a path.

use passgate::gate::PageState;

use crate::kernel::Outcome;

/// One step of a path. Numbers are positions in the world's own lists, so that a path can be replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// A client begins the conversion of this number in the configuration.
    Begin(u8),
    /// The owner of the `n`th granted conversion ends it.
    End(u8, Ending),
    /// The kernel executes the `n`th call. If calls are not split, the result is delivered to the session at once.
    Call(u8, Outcome),
    /// The `n`th result is delivered to the session.
    Result(u8),
    /// The operations in flight under the `n`th ticket end, and the session polls its domains.
    FlightEnds(u8),
    /// Time passes until the session's next timer is due.
    Tick,
    /// The VM's connection ends.
    ClientDies,
    /// The second connection ends.
    SecondDies,
    /// The VM removes the `n`th of its regions.
    Remove(u8),
    /// The VM adds a second region that shows the file.
    AddAlias,
    /// An operator releases the `n`th quarantine.
    Release(u8, PageState),
    /// The VM's connection, which has adopted memory, states what the pages of the `n`th quarantine are.
    Settle(u8, PageState),
    /// A VM reconnects and adopts the memory of the earlier daemon.
    Adopt,
    /// No VM has adopted it in time.
    GiveUp,
    /// A VM connects, and adds its memory.
    Connect,
    /// The session emits the calls, answers and notices of the events since it did so last.
    Drain,
    /// The daemon is killed and started again. The calls in progress in the bit mask were executed, the others never were.
    Kill(u8),
}

/// The end of the owner's side of a conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Committed,
    NotCommitted,
    Unknown,
}
