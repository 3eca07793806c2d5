//! Where a command's data is, as the simulated controller reads it (NVM Express base specification 2.0, 4.1.1 and 4.1.2).

use super::Core;
use super::commands::{Told, status};
use passgate_bindings::PAGE;

/// Bytes of memory: where, and how many.
pub(super) type Span = (u64, u64);

/// SGL descriptor types.
const DATA_BLOCK: u8 = 0;
const SEGMENT: u8 = 2;
const LAST_SEGMENT: u8 = 3;
/// Descriptors of one segment at most: whoever has more does not mean it.
const MOST: u64 = 4096;

impl Core {
    /// The memory of a command that moves `bytes` bytes; else its status.
    pub(super) fn spans(&self, told: &Told, bytes: u64) -> Result<Vec<Span>, u16> {
        let spans = match (told.is_sgl(), self.options.sgl) {
            (false, _) => self.pages(told.pointer(), bytes),
            (true, 0) => Err(status::INVALID_FIELD),
            (true, _) if told.queue == 0 => Err(status::INVALID_FIELD),
            (true, kind) => self.lists(told.pointer(), bytes, kind),
        }?;
        debug_assert_eq!(spans.iter().map(|(_, len)| len).sum::<u64>(), bytes);
        Ok(spans)
    }

    /// Physical region pages.
    fn pages(&self, (first, second): (u64, u64), bytes: u64) -> Result<Vec<Span>, u16> {
        if !first.is_multiple_of(4) {
            return Err(status::PRP_OFFSET);
        }
        let mut spans = vec![(first, bytes.min(PAGE - first % PAGE))];
        let mut left = bytes - spans[0].1;
        if left > 0 && left <= PAGE {
            if !second.is_multiple_of(PAGE) {
                return Err(status::PRP_OFFSET);
            }
            spans.push((second, left));
            return Ok(spans);
        }
        let mut at = second;
        if left > 0 && !at.is_multiple_of(8) {
            return Err(status::PRP_OFFSET);
        }
        while left > 0 {
            let entry = self.load(at)?;
            // The last entry of a page of the list is where it goes on, if it does.
            if at % PAGE == PAGE - 8 && left > PAGE {
                if !entry.is_multiple_of(PAGE) {
                    return Err(status::PRP_OFFSET);
                }
                at = entry;
                continue;
            }
            if !entry.is_multiple_of(PAGE) {
                return Err(status::PRP_OFFSET);
            }
            let len = left.min(PAGE);
            spans.push((entry, len));
            left -= len;
            at += 8;
        }
        Ok(spans)
    }

    /// Scatter-gather lists: the descriptor in the command, and the segments that it leads to.
    fn lists(&self, first: (u64, u64), bytes: u64, kind: u8) -> Result<Vec<Span>, u16> {
        let (mut spans, mut total) = (Vec::new(), 0);
        let (mut todo, mut last) = (vec![first], false);
        loop {
            let mut next = None;
            let count = todo.len();
            for (nth, (at, rest)) in todo.drain(..).enumerate() {
                let (len, what) = (rest & 0xffff_ffff, (rest >> 60) as u8);
                if rest >> 56 & 0xf != 0 {
                    return Err(status::SGL_TYPE);
                }
                match what {
                    DATA_BLOCK => {
                        if kind == 2 && !(at.is_multiple_of(4) && len.is_multiple_of(4)) {
                            return Err(status::SGL_GRANULARITY);
                        }
                        if len > 0 {
                            spans.push((at, len));
                        }
                        total += len;
                    }
                    SEGMENT | LAST_SEGMENT if nth + 1 == count && !last => {
                        next = Some((at, len, what == LAST_SEGMENT));
                    }
                    SEGMENT | LAST_SEGMENT => return Err(status::SGL_SEGMENT),
                    _ => return Err(status::SGL_TYPE),
                }
            }
            let Some((at, len, is_last)) = next else { break };
            if len == 0 || !len.is_multiple_of(16) || len / 16 > MOST || !at.is_multiple_of(8) {
                return Err(status::SGL_SEGMENT);
            }
            last = is_last;
            for nth in 0..len / 16 {
                todo.push((self.load(at + nth * 16)?, self.load(at + nth * 16 + 8)?));
            }
        }
        if total == bytes { Ok(spans) } else { Err(status::SGL_LENGTH) }
    }
}
