//! How long a worker looks at its queues before it sleeps.
//!
//! What hurts is waking up. A worker that has just had something to do looks on for a moment, because the next
//! completion or the guest's next request is often there within it. The moment grows while looking would have found
//! what woke the worker, and is nothing where it would not.

use std::time::Duration;

/// When to look instead of sleeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Polling {
    /// As long as it pays, at most [`MOST`].
    #[default]
    Auto,
    /// Without a break: a processor for each worker.
    Always,
    /// Not at all.
    Never,
}

/// The longest look.
const MOST: Duration = Duration::from_micros(32);
/// The first.
const FIRST: Duration = Duration::from_micros(4);

/// The moment of one worker.
#[derive(Debug)]
pub(super) struct Moment {
    polling: Polling,
    now: Duration,
}

impl Moment {
    pub(super) fn new(polling: Polling) -> Self {
        Self { polling, now: Duration::ZERO }
    }

    /// Whether to look on, `idle` after there was something to do.
    pub(super) fn lasts(&self, idle: Duration) -> bool {
        match self.polling {
            Polling::Always => true,
            Polling::Never => false,
            Polling::Auto => idle < self.now,
        }
    }

    /// The worker has slept for `slept` after it had looked in vain, until there was something to do.
    pub(super) fn woken(&mut self, slept: Duration) {
        self.now = if slept > MOST {
            Duration::ZERO
        } else if slept > Duration::ZERO && self.now < MOST {
            (self.now * 2).clamp(FIRST, MOST)
        } else {
            self.now
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_lasts_as_long_as_it_pays() {
        let us = Duration::from_micros;
        let mut moment = Moment::new(Polling::Auto);
        assert!(!moment.lasts(Duration::ZERO), "nothing is known yet");
        moment.woken(us(20));
        assert!(moment.lasts(us(3)) && !moment.lasts(us(4)));
        for _ in 0..8 {
            moment.woken(us(20));
        }
        assert!(moment.lasts(us(31)) && !moment.lasts(us(32)));
        moment.woken(us(33));
        assert!(!moment.lasts(Duration::ZERO), "a look would not have found it");
    }

    #[test]
    fn always_and_never_are_what_they_say() {
        let (mut always, mut never) = (Moment::new(Polling::Always), Moment::new(Polling::Never));
        for slept in [1, 1000] {
            always.woken(Duration::from_micros(slept));
            never.woken(Duration::from_micros(slept));
            assert!(always.lasts(Duration::from_secs(1)) && !never.lasts(Duration::ZERO));
        }
    }
}
