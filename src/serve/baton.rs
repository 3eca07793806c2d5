//! The baton: how a VM is always owned by a thread that can answer.
//!
//! Small calls run on the loop's own thread, because two wake-ups of another would cost more than the call. Before
//! it enters one, the loop parks the VM here, and takes it back after. If the call does not return in time, the
//! supervisor takes the parked VM over and is the loop from then on; the old thread, should its call ever return,
//! finds its turn over, hands in the result like any worker, and ends. Price: two uncontended locks per call.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whose turn it is: grows with every take-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn(u64);

#[derive(Debug)]
struct Slot<T> {
    turn: Turn,
    parked: Option<(Box<T>, Instant)>,
}

/// What the supervisor finds.
#[derive(Debug)]
pub(super) enum Found<T> {
    /// Its owner is awake.
    Owned,
    /// Its owner is in a call, but not for long yet.
    Young,
    /// Its owner has been in a call for too long: here it is, and with it the turn.
    Yours(Box<T>, Turn),
}

/// The place where a VM is parked.
#[derive(Debug)]
pub(super) struct Baton<T> {
    slot: Mutex<Slot<T>>,
}

impl<T> Baton<T> {
    /// An empty place, and the first turn.
    pub(super) fn new() -> (Self, Turn) {
        (Self { slot: Mutex::new(Slot { turn: Turn(0), parked: None }) }, Turn(0))
    }

    /// Parks `owned`, makes `call`, and takes it back; `Err` if it was taken over meanwhile.
    pub(super) fn run<R>(
        &self,
        turn: Turn,
        owned: Box<T>,
        call: impl FnOnce() -> R,
    ) -> Result<(Box<T>, R), R> {
        self.lock().parked = Some((owned, Instant::now()));
        let result = call();
        let mut slot = self.lock();
        if slot.turn != turn {
            return Err(result);
        }
        match slot.parked.take() {
            Some((owned, _)) => Ok((owned, result)),
            None => Err(result),
        }
    }

    /// Takes the VM over if its owner has been in a call for `patience`.
    pub(super) fn take_over(&self, patience: Duration) -> Found<T> {
        let mut slot = self.lock();
        match &slot.parked {
            None => return Found::Owned,
            Some((_, since)) if since.elapsed() < patience => return Found::Young,
            Some(_) => {}
        }
        slot.turn = Turn(slot.turn.0 + 1);
        match slot.parked.take() {
            Some((owned, _)) => Found::Yours(owned, slot.turn),
            None => Found::Owned,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slot<T>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn comes_back_to_its_owner() {
        let (baton, turn) = Baton::new();
        let (owned, result) = baton.run(turn, Box::new(7), || "done").unwrap();
        assert_eq!((*owned, result), (7, "done"));
        assert!(matches!(baton.take_over(Duration::ZERO), Found::Owned));
    }

    #[test]
    fn a_call_that_hangs_loses_it_and_steals_nothing_later() {
        let (baton, first) = Baton::new();
        let (entered, wait_entered) = channel();
        let (release, wait_release) = channel::<()>();
        std::thread::scope(|scope| {
            let baton = &baton;
            let hung = scope.spawn(move || {
                baton.run(first, Box::new(7), || {
                    entered.send(()).unwrap();
                    wait_release.recv().unwrap();
                })
            });
            wait_entered.recv().unwrap();
            assert!(matches!(baton.take_over(Duration::from_secs(60)), Found::Young));
            let Found::Yours(owned, second) = baton.take_over(Duration::ZERO) else { panic!("parked") };
            // The new owner is in a call of its own when the old one comes back.
            let (owned, ()) = baton
                .run(second, owned, || {
                    release.send(()).unwrap();
                    assert!(hung.join().unwrap().is_err());
                })
                .unwrap();
            assert_eq!(*owned, 7);
        });
    }
}
