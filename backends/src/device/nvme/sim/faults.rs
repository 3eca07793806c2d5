//! What goes wrong with a simulated controller, and with which commands.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

/// Picks commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct When {
    admin: bool,
    opcode: Option<u8>,
    queue: Option<u16>,
    blocks: Option<Range<u64>>,
    skip: u64,
    times: u64,
}

impl When {
    /// The next command of an I/O queue.
    pub fn any() -> Self {
        Self { admin: false, opcode: None, queue: None, blocks: None, skip: 0, times: 1 }
    }

    /// The next command of an I/O queue with this opcode ([`super::opcode`]).
    pub fn io(opcode: u8) -> Self {
        Self { opcode: Some(opcode), ..Self::any() }
    }

    /// The next admin command with this opcode.
    pub fn admin(opcode: u8) -> Self {
        Self { admin: true, ..Self::io(opcode) }
    }

    /// Only of this submission queue.
    pub fn on(self, queue: u16) -> Self {
        Self { queue: Some(queue), ..self }
    }

    /// Only those that touch one of these blocks.
    pub fn over(self, blocks: Range<u64>) -> Self {
        Self { blocks: Some(blocks), ..self }
    }

    /// Not the next but the `nth` that fits, from 1 on.
    pub fn nth(self, nth: u64) -> Self {
        Self { skip: nth.saturating_sub(1), ..self }
    }

    /// So many of them in a row.
    pub fn times(self, times: u64) -> Self {
        Self { times, ..self }
    }

    /// All of them.
    pub fn always(self) -> Self {
        self.times(u64::MAX)
    }

    fn fits(&self, queue: u16, opcode: u8, blocks: &Range<u64>) -> bool {
        let touches = |of: &Range<u64>| of.start < blocks.end && blocks.start < of.end;
        self.times > 0
            && self.admin == (queue == 0)
            && self.opcode.is_none_or(|of| of == opcode)
            && self.queue.is_none_or(|of| of == queue)
            && self.blocks.as_ref().is_none_or(touches)
    }
}

/// What becomes of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Does {
    /// It was taken, but none of its data moves until [`super::Simulated::release`], an abort or a reset.
    HoldData,
    /// Its data has moved, but it does not complete until then.
    HoldCompletion,
    /// As [`Does::HoldData`], for so long.
    DelayData(Duration),
    /// As [`Does::HoldCompletion`], for so long.
    DelayCompletion(Duration),
    /// It completes with this status code and type, and nothing else is done.
    Status(u16),
    /// It completes twice.
    Twice,
    /// It completes, and once more when it is released.
    Again,
    /// It is done, but another identifier is completed instead of its own.
    Foreign(u16),
    /// The controller reports a fatal error instead (CSTS.CFS).
    Fatal,
    /// The controller is pulled out.
    Vanish,
}

/// How a change of CC.EN goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// At once.
    Prompt,
    /// After so long.
    After(Duration),
    /// Not at all, until it is tried again.
    Never,
    /// Not at all, with CSTS.CFS.
    Fatal,
}

/// The faults that are set.
#[derive(Debug, Default)]
pub(super) struct Rules {
    rules: Vec<(When, Does)>,
    pub(super) enables: VecDeque<Turn>,
    pub(super) disables: VecDeque<Turn>,
    pub(super) deaf_to_aborts: bool,
    pub(super) mute: bool,
}

impl Rules {
    pub(super) fn add(&mut self, when: When, does: Does) {
        self.rules.push((when, does));
    }

    /// What becomes of a command that was just taken.
    pub(super) fn meets(&mut self, queue: u16, opcode: u8, blocks: &Range<u64>) -> Option<Does> {
        self.rules.retain(|(when, _)| when.times > 0);
        for (when, does) in self.rules.iter_mut().filter(|(when, _)| when.fits(queue, opcode, blocks)) {
            if when.skip > 0 {
                when.skip -= 1;
                continue;
            }
            when.times = when.times.saturating_sub(u64::from(when.times != u64::MAX));
            return Some(*does);
        }
        None
    }
}
