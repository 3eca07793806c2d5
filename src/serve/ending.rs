//! The end of a VM's loop: who asks for it, how long it may take, and what is handed over to a next daemon instead of closed.

use std::time::{Duration, Instant};

/// The state of the end.
#[derive(Debug)]
pub(super) struct Ending {
    /// Set once the end has begun: the time by which all regions must be closed.
    deadline: Option<Instant>,
    /// Set while memory of an earlier daemon's clients waits to be adopted: the time at which it is closed.
    adopt_by: Option<Instant>,
    /// True while the state is to be handed over to a next daemon: the loop ends without closing anything.
    leaves_open: bool,
    /// Set once the host wants a device back, until the end has begun.
    requested: bool,
    /// The time at which the service manager was asked for more time last.
    extended_at: Option<Instant>,
}

/// The interval between two requests for more time.
const EXTENSION_INTERVAL: Duration = Duration::from_secs(5);
/// The time that each of them asks for, counted from then. A close without progress is given up after two seconds.
pub(super) const EXTENSION: Duration = Duration::from_secs(20);

impl Ending {
    /// Returns a loop's state at its start. Memory of an earlier daemon's clients waits until `adopt_by`.
    pub(super) fn new(leaves_open: bool, adopt_by: Option<Instant>) -> Self {
        Self { deadline: None, adopt_by, leaves_open, requested: false, extended_at: None }
    }

    /// Returns true once the end has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.deadline.is_some()
    }

    /// Returns the time by which all regions must be closed, once the end has begun.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Returns true if the service manager has to be asked for more time ([`EXTENSION`]) at `now`.
    pub(super) fn needs_extension(&mut self, now: Instant) -> bool {
        let needs =
            self.deadline.is_some() && self.extended_at.is_none_or(|at| now - at >= EXTENSION_INTERVAL);
        if needs {
            self.extended_at = Some(now);
        }
        needs
    }

    /// Returns true if nothing is closed at the end.
    pub(super) fn leaves_open(&self) -> bool {
        self.leaves_open
    }

    /// Begins the end. Returns true if connections must be closed now: not where it has begun before, nor where the state is
    /// handed over, because the gate would close the regions of the connections, in the ledger too.
    pub(super) fn begin(&mut self, now: Instant, farewell: Duration) -> bool {
        if self.leaves_open {
            self.deadline = Some(now);
            return false;
        }
        let first = self.deadline.is_none();
        self.deadline.get_or_insert(now + farewell);
        first
    }

    /// Asks for the end; [`Ending::take_request`] returns true once after it.
    pub(super) fn request(&mut self) {
        self.requested = true;
    }

    pub(super) fn take_request(&mut self) -> bool {
        std::mem::take(&mut self.requested)
    }

    /// Closes everything at the end, also where the state was to be handed over. Returns true if it was. Memory that waits to be
    /// adopted then waits no longer than `now`.
    pub(super) fn cancel_handover(&mut self, now: Instant) -> bool {
        let cancelled = std::mem::take(&mut self.leaves_open);
        if cancelled {
            self.adopt_by = self.adopt_by.map(|_| now);
        }
        cancelled
    }

    /// Returns the time at which memory that waits to be adopted is closed.
    pub(super) fn adopt_by(&self) -> Option<Instant> {
        self.adopt_by
    }

    /// Returns true, once, if that time has come.
    pub(super) fn take_adoption_over(&mut self, now: Instant) -> bool {
        self.adopt_by.take_if(|by| *by <= now).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_time_is_asked_for_during_the_end_and_rarely() {
        let (now, mut ending) = (Instant::now(), Ending::new(false, None));
        assert!(!ending.needs_extension(now), "the end has not begun");
        ending.begin(now, Duration::ZERO);
        let asked = (0..20).filter(|second| ending.needs_extension(now + Duration::from_secs(*second)));
        assert_eq!(asked.collect::<Vec<_>>(), [0, 5, 10, 15]);
        assert!(EXTENSION > 2 * EXTENSION_INTERVAL);
    }
}
