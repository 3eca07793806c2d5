//! Polling of device registers.

use std::thread;
use std::time::{Duration, Instant};

use crate::Result;

/// The longest interval between two polls.
const MAX_INTERVAL: Duration = Duration::from_millis(1);

/// Polls `done` until it returns true; returns false if it does not within `within`. The interval grows from 20 µs to
/// 1 ms.
pub fn await_that(within: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
    let begun = Instant::now();
    let mut pause = Duration::from_micros(20);
    while !done()? {
        if begun.elapsed() > within {
            return Ok(false);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(MAX_INTERVAL);
    }
    Ok(true)
}
