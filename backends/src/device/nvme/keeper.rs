//! The keeper: a drive's own thread, for what its queues' owners cannot see to.
//!
//! A command that does not end is aborted; where that does not help, or the controller does what it must not, the controller
//! is reset and everything that was in flight is done again. What does not come up any more is given up. The keeper never holds
//! a fence up: who fences asks it for nothing.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::command::Command;
use super::controller::Controller;
use super::drive::{Inner, Life, Mode, Seat};
use crate::device::FenceStep;

/// How long an aborted command has to complete at most; else as long as it had in the first place.
const ABORTED: Duration = Duration::from_secs(1);
/// How often the keeper looks whether the controller is still there: at least as often as commands may be overdue.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What the keeper is told.
#[derive(Debug)]
pub(super) enum Trouble {
    /// A command takes too long.
    Overdue { life: Life, queue: u16, cid: u16 },
    /// The controller does what it must not.
    Nonsense { life: Life },
    /// The drive is closed.
    Leave,
}

/// What a drive had to be helped with since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Health {
    /// Abort commands, for commands that took too long.
    pub aborts: u64,
    /// How often its controller was reset because of what it did, or did not do. What a fence resets is not in it.
    pub resets: u64,
    /// Whether it was given up.
    pub lost: bool,
}

impl Inner {
    pub(super) fn health(&self) -> Health {
        Health {
            aborts: self.aborts.load(Ordering::Relaxed),
            resets: self.recoveries.load(Ordering::Relaxed).into(),
            lost: self.life().is_lost(),
        }
    }

    /// Brings a controller up that does not do what it must.
    fn recover(&self, life: Life, why: &str) {
        let mut controller = self.control();
        if self.life() != life {
            return; // it has another life by now, or none
        }
        // Out of its domain it cannot come up: the attach brings it up anew.
        if self.stop_detached() {
            return;
        }
        log::warn!("{}: {why}: the controller is reset", self.name);
        // An owner who is held up elsewhere is waited for, and nobody else has to wait for that.
        while let Err(error) = self.halt() {
            log::warn!("{error}");
            drop(controller);
            std::thread::sleep(Duration::from_millis(1)); // an attach may have been waiting for it
            controller = self.control();
            if self.life() != life.with(Life::HALTED) || self.leaving.load(Ordering::Acquire) {
                return;
            }
        }
        self.recoveries.fetch_add(1, Ordering::AcqRel);
        let fenced = || *self.mode() == Mode::Fenced;
        let overtaken = || self.failed("recovering a drive that is fenced meanwhile", Errno::CANCELED);
        let revived = self.revive(&mut controller, || if fenced() { Err(overtaken()) } else { Ok(()) });
        match revived {
            Ok(()) => self.go_on(|mode| *mode != Mode::Fenced),
            // It could not come up: that says nothing, and the attach brings it up anew.
            Err(_) if fenced() && !controller.is_gone() => {}
            Err(error) => self.lose(&controller, &error),
        }
    }

    /// Gives the drive up: everything that is asked of it fails from now on.
    pub(super) fn lose(&self, controller: &Controller, why: &dyn std::fmt::Display) {
        log::error!("{}: the drive is given up: {why}", self.name);
        self.window.pause();
        let stopped = controller.is_gone() || self.registers.device().fence(FenceStep::Reset).is_ok();
        if stopped {
            self.window.void();
        }
        let _mode = self.mode();
        self.set_life(self.life().with(if stopped { Life::LOST } else { Life::LOOSE }));
    }
}

/// What the keeper does.
pub(super) fn keep(inner: &Inner, told: &Receiver<Trouble>) {
    let look_every = LOOK_EVERY.min(Duration::from_millis(inner.deadline_ms.max(1)));
    loop {
        match told.recv_timeout(look_every) {
            Ok(Trouble::Leave) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(Trouble::Nonsense { life }) => inner.recover(life, "it does what it must not"),
            Ok(Trouble::Overdue { life, queue, cid }) => overdue(inner, life, queue, cid),
            Err(RecvTimeoutError::Timeout) => {
                let life = inner.life();
                if !life.is_up() {
                    // What stays too long with a drive that is stopped, its owner is to have back.
                    inner.seats.iter().for_each(Seat::wake);
                    continue;
                }
                let controller = inner.control();
                if inner.life() == life && controller.is_gone() {
                    inner.lose(&controller, &"it is not there any more");
                } else if inner.life() == life && controller.is_stuck() {
                    drop(controller);
                    inner.recover(life, "it reports a fatal error, or was reset");
                } else {
                    // An interrupt may have been lost, and what takes too long only its owner can see.
                    inner.seats.iter().for_each(Seat::wake);
                }
            }
        }
    }
}

/// A command takes too long: it is aborted; where that does not bring it back, the controller is reset.
fn overdue(inner: &Inner, life: Life, queue: u16, cid: u16) {
    let mut controller = inner.control();
    if inner.life() != life {
        return;
    }
    let Some(seat) = queue.checked_sub(1).and_then(|nth| inner.seats.get(usize::from(nth))) else { return };
    if seat.overdue.load(Ordering::Acquire) == 0 {
        return; // it has come after all
    }
    log::warn!("{}: command {cid:#x} of queue {queue} takes too long: aborting it", inner.name);
    if controller.is_gone() {
        return inner.lose(&controller, &"it is not there any more");
    }
    inner.aborts.fetch_add(1, Ordering::Relaxed);
    let aborted = controller.run(Command::abort(queue, cid));
    drop(controller);
    if let Err(error) = &aborted {
        return inner.recover(life, &error.to_string());
    }
    let deadline = Duration::from_millis(inner.deadline_ms);
    let until =
        Instant::now() + if matches!(aborted, Ok(Some(_))) { ABORTED.min(deadline) } else { Duration::ZERO };
    while seat.overdue.load(Ordering::Acquire) > 0 && Instant::now() < until {
        seat.wake();
        std::thread::sleep(Duration::from_millis(1));
    }
    if seat.overdue.load(Ordering::Acquire) > 0 {
        inner.recover(life, "a command has not ended");
    }
}
