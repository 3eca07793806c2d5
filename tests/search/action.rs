//! What can happen next.

use passgate::gate::PageState;

use crate::kernel::Outcome;

/// One step of a path. Numbers are positions in the world's own lists, so that a path can be replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// A client begins the conversion of this number in the configuration.
    Begin(u8),
    /// The owner of the `n`th granted conversion ends it.
    End(u8, Ending),
    /// The kernel carries out the `n`th call. Where calls are not split, the session has its result at once.
    Call(u8, Outcome),
    /// The session has the `n`th result.
    Result(u8),
    /// What is in flight under the `n`th ticket ends, and the session hears of it.
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
    /// The VM's connection, which adopted memory, says what the pages of the `n`th quarantine are.
    Settle(u8, PageState),
    /// A VM comes back for the memory of the daemon before.
    Adopt,
    /// Nobody has come back for it in time.
    GiveUp,
    /// A VM connects, and adds its memory.
    Connect,
    /// The session does what it was told to by what happened since it did so last.
    Drain,
    /// The daemon is killed and started again. The calls in the mask were carried out, the others never were.
    Kill(u8),
}

/// How the owner's side of a conversion ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Committed,
    NotCommitted,
    Unknown,
}
