//! The handoff of a VM from a thread whose call does not return to one that can answer.
//!
//! Small calls run on the loop's own thread, because two thread switches would cost more than the call. The loop parks the
//! VM here before such a call and takes it back afterwards. If the call does not return in time, the supervisor claims the
//! parked VM and becomes the loop. The old thread, should its call ever return, finds a newer generation, hands the result in
//! like any worker, and ends. Price: two uncontended locks per call (docs/decisions/0004-handoff.md).
//!
//! The VM is owned, never shared: there is no lock around it, and a thread that does not own it cannot answer.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The generation of ownership: grows with every claim. A thread of an older generation does not own the VM any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Generation(u64);

#[derive(Debug)]
struct Slot<T> {
    generation: Generation,
    /// The VM, and since when its owner has been in a call; none while the owner runs.
    parked: Option<(Box<T>, Instant)>,
}

/// The result of [`Handoff::claim`].
#[derive(Debug)]
pub(super) enum Claim<T> {
    /// The owner is not in a call.
    NotParked,
    /// The owner has not been in its call for long enough.
    TooEarly,
    /// The owner has been in its call for too long: the caller owns the VM now, in this generation.
    Claimed(Box<T>, Generation),
}

/// The slot in which a VM is parked during a call of its owner.
#[derive(Debug)]
pub(super) struct Handoff<T> {
    slot: Mutex<Slot<T>>,
}

impl<T> Handoff<T> {
    /// Returns an empty slot and the first generation.
    pub(super) fn new() -> (Self, Generation) {
        (Self { slot: Mutex::new(Slot { generation: Generation(0), parked: None }) }, Generation(0))
    }

    /// Parks `owned`, makes `call`, and takes `owned` back. `Err` has the call's result if the VM was claimed meanwhile.
    pub(super) fn run<R>(
        &self,
        generation: Generation,
        owned: Box<T>,
        call: impl FnOnce() -> R,
    ) -> Result<(Box<T>, R), R> {
        self.lock().parked = Some((owned, Instant::now()));
        let result = call();
        let mut slot = self.lock();
        // Not merely `parked.is_none()`: the new owner may have parked the VM for a call of its own.
        if slot.generation != generation {
            return Err(result);
        }
        match slot.parked.take() {
            Some((owned, _)) => Ok((owned, result)),
            None => Err(result),
        }
    }

    /// Takes the VM from its owner if that has been in a call for at least `limit`.
    pub(super) fn claim(&self, limit: Duration) -> Claim<T> {
        let mut slot = self.lock();
        match &slot.parked {
            None => return Claim::NotParked,
            Some((_, since)) if since.elapsed() < limit => return Claim::TooEarly,
            Some(_) => {}
        }
        slot.generation = Generation(slot.generation.0 + 1);
        match slot.parked.take() {
            Some((owned, _)) => Claim::Claimed(owned, slot.generation),
            None => Claim::NotParked,
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
    fn vm_returns_to_its_owner_after_a_call() {
        let (handoff, generation) = Handoff::new();
        let (owned, result) = handoff.run(generation, Box::new(7), || "done").unwrap();
        assert_eq!((*owned, result), (7, "done"));
        assert!(matches!(handoff.claim(Duration::ZERO), Claim::NotParked));
    }

    #[test]
    fn hanging_call_loses_the_vm_and_cannot_take_it_back() {
        let (handoff, first) = Handoff::new();
        let (entered, wait_entered) = channel();
        let (finish, wait_finish) = channel::<()>();
        std::thread::scope(|scope| {
            let handoff = &handoff;
            let hung = scope.spawn(move || {
                handoff.run(first, Box::new(7), || {
                    entered.send(()).unwrap();
                    wait_finish.recv().unwrap();
                })
            });
            wait_entered.recv().unwrap();
            assert!(matches!(handoff.claim(Duration::from_secs(60)), Claim::TooEarly));
            let Claim::Claimed(owned, second) = handoff.claim(Duration::ZERO) else { panic!("parked") };
            // The new owner is in a call of its own when the old one's call returns.
            let (owned, ()) = handoff
                .run(second, owned, || {
                    finish.send(()).unwrap();
                    assert!(hung.join().unwrap().is_err());
                })
                .unwrap();
            assert_eq!(*owned, 7);
        });
    }
}
