//! The data pointers of commands, as the simulated controller interprets them (NVMe Base 2.0, 4.1.1 and 4.1.2).

use super::Core;
use super::commands::{SimCommand, status};
use passgate_bindings::PAGE;

/// A range of memory: IOVA and length in bytes.
pub(super) type Span = (u64, u64);

// SGL descriptor types.
const DATA_BLOCK: u8 = 0;
const SEGMENT: u8 = 2;
const LAST_SEGMENT: u8 = 3;
/// The largest number of descriptors in a segment; more is taken for an error of the driver.
const MAX_SEGMENT_DESCRIPTORS: u64 = 4096;

impl Core {
    /// Returns the memory of a command that transfers `bytes` bytes, or the status of its failure.
    pub(super) fn spans(&self, command: &SimCommand, bytes: u64) -> Result<Vec<Span>, u16> {
        let spans = match (command.is_sgl(), self.options.sgl) {
            (false, _) => self.prp_spans(command.pointer(), bytes),
            (true, 0) => Err(status::INVALID_FIELD),
            (true, _) if command.queue == 0 => Err(status::INVALID_FIELD),
            (true, sgl_support) => self.sgl_spans(command.pointer(), bytes, sgl_support),
        }?;
        debug_assert_eq!(spans.iter().map(|(_, len)| len).sum::<u64>(), bytes);
        Ok(spans)
    }

    /// Returns the memory that two PRP entries and the lists they lead to describe.
    fn prp_spans(&self, (first, second): (u64, u64), bytes: u64) -> Result<Vec<Span>, u16> {
        if !first.is_multiple_of(4) {
            return Err(status::PRP_OFFSET);
        }
        let mut spans = vec![(first, bytes.min(PAGE - first % PAGE))];
        let mut remaining = bytes - spans[0].1;
        if remaining > 0 && remaining <= PAGE {
            if !second.is_multiple_of(PAGE) {
                return Err(status::PRP_OFFSET);
            }
            spans.push((second, remaining));
            return Ok(spans);
        }
        let mut at = second;
        if remaining > 0 && !at.is_multiple_of(8) {
            return Err(status::PRP_OFFSET);
        }
        while remaining > 0 {
            let entry = self.load(at)?;
            // If more pages follow than this page of the list has entries, its last entry is the address of the next
            // list.
            if at % PAGE == PAGE - 8 && remaining > PAGE {
                if !entry.is_multiple_of(PAGE) {
                    return Err(status::PRP_OFFSET);
                }
                at = entry;
                continue;
            }
            if !entry.is_multiple_of(PAGE) {
                return Err(status::PRP_OFFSET);
            }
            let len = remaining.min(PAGE);
            spans.push((entry, len));
            remaining -= len;
            at += 8;
        }
        Ok(spans)
    }

    /// Returns the memory that the SGL descriptor in the command and the segments it leads to describe.
    fn sgl_spans(&self, first: (u64, u64), bytes: u64, sgl_support: u8) -> Result<Vec<Span>, u16> {
        let (mut spans, mut total) = (Vec::new(), 0);
        let (mut segment, mut last) = (vec![first], false);
        loop {
            let mut next = None;
            let count = segment.len();
            for (nth, (at, rest)) in segment.drain(..).enumerate() {
                let (len, kind) = (rest & 0xffff_ffff, (rest >> 60) as u8);
                if rest >> 56 & 0xf != 0 {
                    return Err(status::SGL_TYPE);
                }
                match kind {
                    DATA_BLOCK => {
                        if sgl_support == 2 && !(at.is_multiple_of(4) && len.is_multiple_of(4)) {
                            return Err(status::SGL_GRANULARITY);
                        }
                        if len > 0 {
                            spans.push((at, len));
                        }
                        total += len;
                    }
                    SEGMENT | LAST_SEGMENT if nth + 1 == count && !last => {
                        next = Some((at, len, kind == LAST_SEGMENT));
                    }
                    SEGMENT | LAST_SEGMENT => return Err(status::SGL_SEGMENT),
                    _ => return Err(status::SGL_TYPE),
                }
            }
            let Some((at, len, is_last)) = next else { break };
            if len == 0
                || !len.is_multiple_of(16)
                || len / 16 > MAX_SEGMENT_DESCRIPTORS
                || !at.is_multiple_of(8)
            {
                return Err(status::SGL_SEGMENT);
            }
            last = is_last;
            for nth in 0..len / 16 {
                segment.push((self.load(at + nth * 16)?, self.load(at + nth * 16 + 8)?));
            }
        }
        if total == bytes { Ok(spans) } else { Err(status::SGL_LENGTH) }
    }
}
