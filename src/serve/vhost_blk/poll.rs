//! Adaptive polling: the time for which an idle worker polls its queues before it sleeps.
//!
//! A wake-up costs more than a completion or a request that comes soon. An idle worker therefore polls for a while first. That
//! time grows while polling would have found what woke the worker, and drops to zero once it would not have.

use std::time::Duration;

/// The policy by which an idle worker polls instead of sleeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Polling {
    /// For a time that adapts to the load, at most 32 µs.
    #[default]
    Auto,
    /// Without end: each worker takes a processor.
    Always,
    /// Never.
    Never,
}

/// The longest polling time.
const MAX_POLL: Duration = Duration::from_micros(32);
/// The first polling time above zero.
const MIN_POLL: Duration = Duration::from_micros(4);

/// The polling time of one worker.
#[derive(Debug)]
pub(super) struct AdaptivePoll {
    polling: Polling,
    duration: Duration,
}

impl AdaptivePoll {
    pub(super) fn new(polling: Polling) -> Self {
        Self { polling, duration: Duration::ZERO }
    }

    /// Returns true if the worker is to poll on, `idle` after it last had something to do.
    pub(super) fn continues(&self, idle: Duration) -> bool {
        match self.polling {
            Polling::Always => true,
            Polling::Never => false,
            Polling::Auto => idle < self.duration,
        }
    }

    /// Adapts the polling time: the worker has polled in vain and then slept for `slept` until there was something to do.
    pub(super) fn woke_after(&mut self, slept: Duration) {
        self.duration = if slept > MAX_POLL {
            Duration::ZERO
        } else if slept > Duration::ZERO && self.duration < MAX_POLL {
            (self.duration * 2).clamp(MIN_POLL, MAX_POLL)
        } else {
            self.duration
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_time_grows_while_it_would_have_found_work() {
        let us = Duration::from_micros;
        let mut poll = AdaptivePoll::new(Polling::Auto);
        assert!(!poll.continues(Duration::ZERO), "nothing is known yet");
        poll.woke_after(us(20));
        assert!(poll.continues(us(3)) && !poll.continues(us(4)));
        for _ in 0..8 {
            poll.woke_after(us(20));
        }
        assert!(poll.continues(us(31)) && !poll.continues(us(32)));
        poll.woke_after(us(33));
        assert!(!poll.continues(Duration::ZERO), "polling would not have found it");
    }

    #[test]
    fn always_and_never_do_not_adapt() {
        let (mut always, mut never) = (AdaptivePoll::new(Polling::Always), AdaptivePoll::new(Polling::Never));
        for slept in [1, 1000] {
            always.woke_after(Duration::from_micros(slept));
            never.woke_after(Duration::from_micros(slept));
            assert!(always.continues(Duration::from_secs(1)) && !never.continues(Duration::ZERO));
        }
    }
}
