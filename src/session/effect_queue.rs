//! The effects that the gate has asked for, and how far they are executed.

use crate::gate::{Effect, Effects, FileId};

/// The placeholder for an effect that was taken out: the cheapest one. It is never executed.
const EXECUTED: Effect = Effect::ForgetFile { file: FileId { device: 0, inode: 0 } };

/// Effects in the order in which they are executed.
#[derive(Debug, Default)]
pub(super) struct EffectQueue {
    effects: Effects,
    /// The number of effects that were taken out.
    executed: usize,
}

impl EffectQueue {
    /// Returns the effects as a list, to append to: the gate, and answers that were delayed.
    pub(super) fn list(&mut self) -> &mut Effects {
        &mut self.effects
    }

    /// Returns the length of the list, from which on later effects stand.
    pub(super) fn len(&self) -> usize {
        self.effects.len()
    }

    /// Returns the effects from index `from` of the list on.
    pub(super) fn since(&self, from: usize) -> &[Effect] {
        self.effects.get(from..).unwrap_or_default()
    }

    /// Returns the effects that are not executed.
    pub(super) fn pending(&self) -> &[Effect] {
        self.since(self.executed)
    }

    /// Returns the next effect.
    pub(super) fn next(&self) -> Option<&Effect> {
        self.effects.get(self.executed)
    }

    /// Takes the next effect out.
    pub(super) fn take(&mut self) -> Option<Effect> {
        let effect = self.effects.get_mut(self.executed)?;
        self.executed += 1;
        Some(std::mem::replace(effect, EXECUTED))
    }

    /// Forgets the effects that were taken out. Only once all are.
    pub(super) fn clear(&mut self) {
        self.effects.clear();
        self.executed = 0;
    }
}

#[cfg(test)]
impl From<Effects> for EffectQueue {
    fn from(effects: Effects) -> Self {
        Self { effects, executed: 0 }
    }
}
