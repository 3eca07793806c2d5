//! Whether a device that we drive may begin transfers: what a fence does to those that are asked for after it.
//!
//! A drain is also what the owner of the mappings takes when it must unmap, for a moment, pages that stay shared: so
//! a transfer that is asked of a drained device *waits* for the attach, and is not failed on that account. It waits
//! for [`PATIENCE`] at most, because nobody may ever attach the device again. A stronger fence says that something
//! is wrong: from then on transfers are refused, also those that wait, until the attach.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a transfer waits for a drained device: far longer than any window over shared memory.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// What transfers may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Mode {
    /// Begin.
    #[default]
    Up,
    /// Wait.
    Drained,
    /// Fail.
    Stopped,
}

/// The mode, and who waits for another one.
#[derive(Debug, Default)]
pub(super) struct Pause {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    mode: Mode,
    /// Transfers that wait.
    waiting: usize,
}

impl Pause {
    /// The device is drained. One that is stopped stays so.
    pub(super) fn drain(&self) {
        let mut inner = self.lock();
        if inner.mode == Mode::Up {
            inner.mode = Mode::Drained;
        }
    }

    /// The device is stopped; who waits for it is refused.
    pub(super) fn stop(&self) {
        self.set(Mode::Stopped);
    }

    /// The device is attached; who waits for it goes on.
    pub(super) fn lift(&self) {
        self.set(Mode::Up);
    }

    /// Whether transfers may begin now.
    pub(super) fn is_up(&self) -> bool {
        self.lock().mode == Mode::Up
    }

    /// Transfers that wait for the device now.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.lock().waiting
    }

    /// Waits while the device is drained, until `deadline` at most; whether transfers may begin then.
    pub(super) fn admits(&self, deadline: Instant) -> bool {
        let mut inner = self.lock();
        inner.waiting += 1;
        while inner.mode == Mode::Drained {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        inner.waiting -= 1;
        inner.mode == Mode::Up
    }

    fn set(&self, to: Mode) {
        self.lock().mode = to;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_never_undoes_a_stop() {
        let (pause, now) = (Pause::default(), Instant::now());
        assert!(pause.is_up() && pause.admits(now));
        pause.drain();
        assert!(!pause.is_up() && !pause.admits(now), "its time is over");
        pause.stop();
        pause.drain();
        assert!(!pause.admits(now + Duration::from_secs(3600)), "refused at once");
        pause.lift();
        assert!(pause.admits(now));
    }
}
