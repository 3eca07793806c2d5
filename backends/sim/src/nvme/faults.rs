//! The faults that can be injected into a simulated controller, and the selection of commands for them.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

/// A selection of commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandFilter {
    admin: bool,
    opcode: Option<u8>,
    queue: Option<u16>,
    blocks: Option<Range<u64>>,
    skip: u64,
    times: u64,
}

impl CommandFilter {
    /// Selects the next command of an I/O queue.
    pub fn any() -> Self {
        Self { admin: false, opcode: None, queue: None, blocks: None, skip: 0, times: 1 }
    }

    /// Selects the next command of an I/O queue with this opcode ([`super::opcode`]).
    pub fn io(opcode: u8) -> Self {
        Self { opcode: Some(opcode), ..Self::any() }
    }

    /// Selects the next admin command with this opcode.
    pub fn admin(opcode: u8) -> Self {
        Self { admin: true, ..Self::io(opcode) }
    }

    /// Restricts the selection to this submission queue.
    pub fn on(self, queue: u16) -> Self {
        Self { queue: Some(queue), ..self }
    }

    /// Restricts the selection to commands with one of these blocks.
    pub fn over(self, blocks: Range<u64>) -> Self {
        Self { blocks: Some(blocks), ..self }
    }

    /// Skips commands: the first that is selected is the `nth`, from 1 on.
    pub fn nth(self, nth: u64) -> Self {
        Self { skip: nth.saturating_sub(1), ..self }
    }

    /// Selects this number of commands in a row.
    pub fn times(self, times: u64) -> Self {
        Self { times, ..self }
    }

    /// Selects all commands.
    pub fn always(self) -> Self {
        self.times(u64::MAX)
    }

    fn selects(&self, queue: u16, opcode: u8, blocks: &Range<u64>) -> bool {
        let touches = |of: &Range<u64>| of.start < blocks.end && blocks.start < of.end;
        self.times > 0
            && self.admin == (queue == 0)
            && self.opcode.is_none_or(|of| of == opcode)
            && self.queue.is_none_or(|of| of == queue)
            && self.blocks.as_ref().is_none_or(touches)
    }
}

/// The effect of a fault on a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultAction {
    /// The command stalls before its data moves, until [`super::Simulated::release`], an abort or a reset.
    StallData,
    /// The command stalls after its data has moved, until the same.
    StallCompletion,
    /// As [`FaultAction::StallData`], for this time.
    DelayData(Duration),
    /// As [`FaultAction::StallCompletion`], for this time.
    DelayCompletion(Duration),
    /// The command completes with this Status Code Type and Status Code, and is not executed.
    Status(u16),
    /// The command is executed, and completes twice at once.
    CompleteTwice,
    /// The command is executed and completes; the same completion is posted again on [`super::Simulated::release`].
    CompleteAgainLate,
    /// The command is executed, but the completion has this CID.
    CompleteWrongCid(u16),
    /// The controller reports a fatal error (CSTS.CFS); the command is not executed.
    Fatal,
    /// The controller is removed.
    Unplug,
}

/// The outcome of a change of CC.EN: when CSTS.RDY follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadyChange {
    /// Immediately.
    Immediate,
    /// After this time.
    After(Duration),
    /// Not before CC.EN is changed again.
    Never,
    /// Not at all; CSTS.CFS is set.
    Fatal,
}

/// The faults that are set.
#[derive(Debug, Default)]
pub(super) struct FaultRules {
    rules: Vec<(CommandFilter, FaultAction)>,
    pub(super) enables: VecDeque<ReadyChange>,
    pub(super) disables: VecDeque<ReadyChange>,
    pub(super) ignore_aborts: bool,
    pub(super) suppress_interrupts: bool,
}

impl FaultRules {
    pub(super) fn add(&mut self, when: CommandFilter, action: FaultAction) {
        self.rules.push((when, action));
    }

    /// Returns the fault for a command that was just fetched, and counts it.
    pub(super) fn next_fault(&mut self, queue: u16, opcode: u8, blocks: &Range<u64>) -> Option<FaultAction> {
        self.rules.retain(|(when, _)| when.times > 0);
        for (when, action) in self.rules.iter_mut().filter(|(when, _)| when.selects(queue, opcode, blocks)) {
            if when.skip > 0 {
                when.skip -= 1;
                continue;
            }
            when.times = when.times.saturating_sub(u64::from(when.times != u64::MAX));
            return Some(*action);
        }
        None
    }
}
