//! The watchdog: a thread for the error recovery that the owners of the queues (the one thread that uses each) cannot do.
//!
//! A command that exceeds its deadline is aborted. If that does not complete it, or the controller violates the
//! protocol or reports a fatal error, the controller is reset, and all requests that were in flight are submitted
//! again. A drive whose controller cannot be initialized any more is marked as lost, and its requests fail. No fence waits for
//! the watchdog; an attach may.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::command::Command;
use super::controller::Controller;
use super::drive::{Generation, Inner, Mode, QueueSlot};
use crate::device::Step;

/// The longest time that an aborted command has to complete, or the deadline of commands if that is shorter.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest time between two checks of the controller. The interval is shorter if the deadline of commands is.
const HEALTH_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A notice from the drive or an owner to the watchdog.
#[derive(Debug)]
pub(super) enum WatchdogEvent {
    /// A command has exceeded its deadline, in this generation: the time between two initializations ([`super::drive`]).
    CommandOverdue { generation: Generation, qid: u16, cid: u16 },
    /// The controller has violated the protocol.
    ProtocolError { generation: Generation },
    /// The drive is closed: the thread ends.
    Stop,
}

/// The number of interventions since the drive was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Health {
    /// The number of Abort commands, for commands that exceeded their deadline.
    pub aborts: u64,
    /// The number of controller resets because of a timeout, a protocol error or a fatal error. Fences are not
    /// counted.
    pub resets: u64,
    /// True once the drive was given up.
    pub lost: bool,
}

impl Inner {
    pub(super) fn health(&self) -> Health {
        Health {
            aborts: self.aborts.load(Ordering::Relaxed),
            resets: self.recoveries.load(Ordering::Relaxed).into(),
            lost: self.generation().is_lost(),
        }
    }

    /// Resets a faulty controller and initializes it anew, unless its generation is over already.
    fn recover(&self, generation: Generation, why: &str) {
        let mut controller = self.controller();
        if self.generation() != generation {
            return; // it was reset, fenced or given up since the notice
        }
        // A detached device cannot do the DMA that its initialization needs: the next attach initializes it.
        if self.fence_detached() {
            return;
        }
        log::warn!("{}: {why}: resetting the controller", self.name);
        // If an owner does not stop using its queue, only this recovery waits: the lock is released between attempts.
        while let Err(error) = self.halt() {
            log::warn!("{error}");
            drop(controller);
            std::thread::sleep(Duration::from_millis(1)); // an attach may be waiting for the lock
            controller = self.controller();
            // Fenced, attached or closed meanwhile.
            if self.generation() != generation.with(Generation::HALTED)
                || self.closing.load(Ordering::Acquire)
            {
                return;
            }
        }
        self.recoveries.fetch_add(1, Ordering::AcqRel);
        let fenced = || *self.mode() == Mode::Fenced;
        let cancelled = || self.failed("recovery of a drive that has been fenced", Errno::CANCELED);
        let result = self.reinitialize(&mut controller, || if fenced() { Err(cancelled()) } else { Ok(()) });
        match result {
            Ok(()) => self.start_generation(|mode| *mode != Mode::Fenced),
            // Under a fence a failed initialization says nothing about the controller: the attach tries again.
            Err(_) if fenced() && !controller.is_gone() => {}
            Err(error) => self.lose(&controller, &error),
        }
    }

    /// Gives the drive up: all requests fail from now on. Tries to stop its DMA first.
    pub(super) fn lose(&self, controller: &Controller, why: &dyn std::fmt::Display) {
        log::error!("{}: giving the drive up: {why}", self.name);
        self.window.pause();
        let stopped = controller.is_gone() || self.registers.device().fence(Step::Reset).is_ok();
        if stopped {
            // Reset or gone: nothing that was in flight can access memory any more.
            self.window.void();
        }
        // Under the lock of the mode, so that a fence does not overwrite this state with HALTED.
        let _mode = self.mode();
        self.set_generation(self.generation().with(if stopped {
            Generation::LOST
        } else {
            Generation::UNSTOPPED
        }));
    }
}

/// Runs the watchdog until the drive is closed.
pub(super) fn run_watchdog(inner: &Inner, events: &Receiver<WatchdogEvent>) {
    let interval = HEALTH_CHECK_INTERVAL.min(Duration::from_millis(inner.deadline_ms.max(1)));
    loop {
        match events.recv_timeout(interval) {
            Ok(WatchdogEvent::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(WatchdogEvent::ProtocolError { generation }) => inner.recover(generation, "protocol error"),
            Ok(WatchdogEvent::CommandOverdue { generation, qid, cid }) => {
                abort_overdue(inner, generation, qid, cid)
            }
            Err(RecvTimeoutError::Timeout) => {
                let generation = inner.generation();
                if !generation.is_up() {
                    // Each owner fails its requests by itself once the drive has been stopped for too long.
                    inner.queue_slots.iter().for_each(QueueSlot::wake);
                    continue;
                }
                let controller = inner.controller();
                if inner.generation() == generation && controller.is_gone() {
                    inner.lose(&controller, &"the device is gone");
                } else if inner.generation() == generation && controller.needs_reset() {
                    drop(controller);
                    inner.recover(generation, "fatal error (CSTS.CFS), or reset by somebody else");
                } else {
                    // An interrupt may have been lost, and only the owner can see that a command has exceeded its
                    // deadline.
                    inner.queue_slots.iter().for_each(QueueSlot::wake);
                }
            }
        }
    }
}

/// Aborts a command that has exceeded its deadline; resets the controller if that does not complete it.
fn abort_overdue(inner: &Inner, generation: Generation, qid: u16, cid: u16) {
    let mut controller = inner.controller();
    if inner.generation() != generation {
        return;
    }
    let Some(queue_slot) = qid.checked_sub(1).and_then(|nth| inner.queue_slots.get(usize::from(nth))) else {
        return;
    };
    if queue_slot.overdue.load(Ordering::Acquire) == 0 {
        return; // it has completed since the notice
    }
    log::warn!("{}: queue {qid}: command {cid:#x} has exceeded its deadline: aborting it", inner.name);
    if controller.is_gone() {
        return inner.lose(&controller, &"the device is gone");
    }
    inner.aborts.fetch_add(1, Ordering::Relaxed);
    let aborted = controller.run(Command::abort(qid, cid));
    drop(controller);
    if let Err(error) = &aborted {
        return inner.recover(generation, &error.to_string());
    }
    // If the Abort command itself timed out, the controller is reset at once.
    let deadline = Duration::from_millis(inner.deadline_ms);
    let until = Instant::now()
        + if matches!(aborted, Ok(Some(_))) { ABORT_TIMEOUT.min(deadline) } else { Duration::ZERO };
    while queue_slot.overdue.load(Ordering::Acquire) > 0 && Instant::now() < until {
        queue_slot.wake();
        std::thread::sleep(Duration::from_millis(1));
    }
    if queue_slot.overdue.load(Ordering::Acquire) > 0 {
        inner.recover(generation, "an aborted command has not completed");
    }
}
