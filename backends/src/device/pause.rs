//! The fence state of a device that does DMA on demand, and its effect on transfers that are requested after a
//! fence.
//!
//! A drain is also used to unmap, for a short time, pages that stay shared: so a transfer that is requested while the
//! device is drained *waits* for the attach and does not fail. It waits for [`DRAIN_WAIT_TIMEOUT`] at most, because the
//! device may never be attached again. A stronger fence is a response to an error: from then on transfers fail,
//! including those that wait, until the attach.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The time for which a transfer waits for a drained device: far longer than the gap in which shared pages are
/// unmapped.
pub const DRAIN_WAIT_TIMEOUT: Duration = Duration::from_secs(5);

/// The effect of the last fence on transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Mode {
    /// Transfers may begin.
    #[default]
    Up,
    /// New transfers wait.
    Drained,
    /// New transfers fail.
    Stopped,
}

/// The fence state, and the transfers that wait for a change of it.
#[derive(Debug, Default)]
pub struct Pause {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    mode: Mode,
    /// The number of transfers that wait.
    waiting: usize,
}

impl Pause {
    /// Records a drain. A device that is stopped stays stopped.
    pub fn drain(&self) {
        let mut inner = self.lock();
        if inner.mode == Mode::Up {
            inner.mode = Mode::Drained;
        }
    }

    /// Records a stronger fence. Waiting transfers fail.
    pub fn stop(&self) {
        self.set(Mode::Stopped);
    }

    /// Records an attach. Waiting transfers continue.
    pub fn resume(&self) {
        self.set(Mode::Up);
    }

    /// Returns true while transfers may begin.
    pub fn is_up(&self) -> bool {
        self.lock().mode == Mode::Up
    }

    /// Returns the number of transfers that wait.
    pub fn waiting(&self) -> usize {
        self.lock().waiting
    }

    /// Waits while the device is drained, until `deadline` at most. Returns true if transfers may begin then.
    pub fn wait_until_up(&self, deadline: Instant) -> bool {
        let mut inner = self.lock();
        inner.waiting += 1;
        while inner.mode == Mode::Drained {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                break;
            }
            inner = self.changed.wait_timeout(inner, remaining).unwrap_or_else(PoisonError::into_inner).0;
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
    fn drain_never_undoes_a_stop() {
        let (pause, now) = (Pause::default(), Instant::now());
        assert!(pause.is_up() && pause.wait_until_up(now));
        pause.drain();
        assert!(!pause.is_up() && !pause.wait_until_up(now), "the deadline has passed");
        pause.stop();
        pause.drain();
        assert!(!pause.wait_until_up(now + Duration::from_secs(3600)), "refused at once");
        pause.resume();
        assert!(pause.wait_until_up(now));
    }
}
