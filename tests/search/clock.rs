//! A clock that only the search moves.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use passgate::session::Clock;

/// The time at which every path begins.
pub fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// A clock that stands until it is set.
#[derive(Debug)]
pub struct HandClock(Mutex<Instant>);

impl HandClock {
    pub fn new() -> Self {
        Self(Mutex::new(start()))
    }

    pub fn set(&self, now: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }
}

impl Clock for HandClock {
    fn now(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
