//! Sets of bytes: half-open ranges that neither overlap nor touch.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of half-open ranges.
#[derive(Debug, Default)]
pub(super) struct Spans(BTreeMap<u64, u64>);

impl Spans {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(start, end)| *start..*end)
    }

    /// Returns the parts of the set in `range`, ascending.
    pub(super) fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self.0.range(..range.start).next_back().filter(|(_, end)| **end > range.start);
        let inside = self.0.range(range.start..range.end.max(range.start));
        before
            .into_iter()
            .chain(inside)
            .map(move |(start, end)| (*start).max(range.start)..(*end).min(range.end))
    }

    /// Returns true if all of `range` is in the set.
    pub(super) fn covers(&self, range: Range<u64>) -> bool {
        self.0.range(..=range.start).next_back().is_some_and(|(_, end)| *end >= range.end)
    }

    pub(super) fn insert(&mut self, mut range: Range<u64>) {
        if let Some((start, end)) = self.0.range(..range.start).next_back()
            && *end >= range.start
        {
            range = *start..range.end.max(*end);
        }
        while let Some((start, end)) = self.0.range(range.start..=range.end).next().map(|(s, e)| (*s, *e)) {
            self.0.remove(&start);
            range.end = range.end.max(end);
        }
        self.0.insert(range.start, range.end);
    }

    pub(super) fn remove(&mut self, range: Range<u64>) {
        if let Some(end) = self.0.range_mut(..range.start).next_back().map(|(_, end)| end)
            && *end > range.start
        {
            let rest = std::mem::replace(end, range.start);
            if rest > range.end {
                self.0.insert(range.end, rest);
                return;
            }
        }
        while let Some((start, end)) = self.0.range(range.start..range.end).next().map(|(s, e)| (*s, *e)) {
            self.0.remove(&start);
            if end > range.end {
                self.0.insert(range.end, end);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares the set with an array that has one element for each byte.
    #[test]
    fn spans_agree_with_single_bytes() {
        let (mut spans, mut bits, mut random) = (Spans::default(), [false; 64], 1u64);
        for _ in 0..20_000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (a, b) = ((random >> 33) % 64, (random >> 43) % 64);
            let range = a.min(b)..a.max(b) + 1;
            let put = random >> 63 == 1;
            if put {
                spans.insert(range.clone())
            } else {
                spans.remove(range.clone())
            }
            bits[range.start as usize..range.end as usize].fill(put);
            let whole = bits[a as usize..].iter().take(3).all(|bit| *bit);
            assert_eq!(spans.covers(a..(a + 3).min(64)), whole);
            let mut seen = [false; 64];
            for span in spans.iter() {
                seen[span.start as usize..span.end as usize].fill(true);
            }
            assert_eq!(seen, bits);
            let inside: u64 = spans.within(range.clone()).map(|span| span.end - span.start).sum();
            let count = bits[range.start as usize..range.end as usize].iter().filter(|bit| **bit).count();
            assert_eq!(inside, count as u64);
            let ends: Vec<_> = spans.iter().collect();
            assert!(ends.windows(2).all(|pair| pair[0].end < pair[1].start), "they touch");
        }
    }
}
