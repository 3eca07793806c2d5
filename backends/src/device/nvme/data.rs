//! Conversion of a request's memory to the data pointers of commands (NVMe Base 2.0, 4.1.1 and 4.1.2).
//!
//! By PRP entries, every segment but the first must begin at a page boundary, and every segment but the last must end
//! at one. SGL descriptors have no such rule, but not every controller supports them. A request that fits neither is
//! split into several commands where its segments meet; where that is inside a block, the request is rejected.

use passgate_bindings::{Iova, PAGE};

use super::command::{DataPointer, sgl_data};
use crate::window::{REACH, Segment};

/// The size of one command's list in 64-bit words: as many PRP entries, or half as many SGL descriptors. It is half a
/// page and aligned to its size, so a list never crosses a page boundary and no chained PRP list is needed.
pub(super) const LIST_WORDS: usize = 256;

/// The limits for one command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TransferLimits {
    /// The size of a block, in bytes.
    pub(super) block: u64,
    /// The largest transfer of one command, in bytes: a multiple of the block.
    pub(super) max_bytes: u64,
    /// SGL support, as [`super::geometry::ControllerCaps::sgl`].
    pub(super) sgl: u8,
}

/// A position in a request's memory: the index of a segment, and an offset in it in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Position {
    index: usize,
    offset: u64,
}

/// The part of a request that one command transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// The start of the part in the request's memory.
    at: Position,
    pub(super) bytes: u64,
    sgl: bool,
}

/// No command can express this memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UnsupportedLayout;

/// Splits the memory of a request, from `from` on, into the parts of at most `max_parts` commands, because a guest
/// may request more at once than there is memory to plan. Returns the position of the next part, if there are more.
pub(super) fn plan(
    limits: TransferLimits,
    segments: &[Segment],
    from: Position,
    max_parts: usize,
    parts: &mut Vec<Part>,
) -> Result<Option<Position>, UnsupportedLayout> {
    parts.clear();
    let valid = |segment: &Segment| {
        let end = segment.iova.0.checked_add(segment.len.into());
        segment.len > 0 && end.is_some_and(|end| end <= REACH)
    };
    if !segments.iter().all(valid) {
        return Err(UnsupportedLayout);
    }
    let Position { mut index, mut offset } = from;
    while index < segments.len() {
        if parts.len() >= max_parts {
            return Ok(Some(Position { index, offset }));
        }
        let part = next_part(limits, segments, index, offset).ok_or(UnsupportedLayout)?;
        parts.push(part);
        let mut remaining = part.bytes;
        while let Some(segment) = segments.get(index) {
            let available = u64::from(segment.len) - offset;
            if remaining < available {
                offset += remaining;
                break;
            }
            remaining -= available;
            (index, offset) = (index + 1, 0);
            if remaining == 0 {
                break;
            }
        }
    }
    Ok(None)
}

/// Returns the longest part that begins there: by PRP entries if they express all of it, else by whichever of PRP
/// entries and SGL descriptors expresses more.
fn next_part(limits: TransferLimits, segments: &[Segment], index: usize, offset: u64) -> Option<Part> {
    let round_down = |bytes: u64| bytes / limits.block * limits.block;
    let pages = round_down(prp_reach(limits, segments, index, offset));
    let rest: u64 = segments.iter().skip(index).map(|segment| u64::from(segment.len)).sum::<u64>() - offset;
    if pages == rest.min(limits.max_bytes) {
        return (pages > 0).then_some(Part { at: Position { index, offset }, bytes: pages, sgl: false });
    }
    let lists = round_down(sgl_reach(limits, segments, index, offset));
    let (bytes, sgl) = if lists > pages { (lists, true) } else { (pages, false) };
    (bytes > 0).then_some(Part { at: Position { index, offset }, bytes, sgl })
}

/// Returns the number of bytes from there that PRP entries of one command express.
fn prp_reach(limits: TransferLimits, segments: &[Segment], index: usize, offset: u64) -> u64 {
    let (mut bytes, mut entries, mut skip, mut last) = (0, 0, offset, None::<u64>);
    for segment in segments.iter().skip(index) {
        let (start, end) = (segment.iova.0 + skip, segment.iova.0 + u64::from(segment.len));
        skip = 0;
        let fits = match last {
            None => start.is_multiple_of(4),
            Some(last) => start == last || start.is_multiple_of(PAGE) && last.is_multiple_of(PAGE),
        };
        if !fits {
            return bytes;
        }
        let page = first_page(start, last);
        let pages = end.div_ceil(PAGE) - page;
        last = Some(end);
        // One entry more than the list has: the first is in the command itself.
        let room = (LIST_WORDS as u64 + 1).saturating_sub(entries);
        if pages > room {
            let reach = (page + room) * PAGE;
            return (bytes + reach.saturating_sub(start)).min(limits.max_bytes);
        }
        entries += pages;
        bytes += end - start;
        if bytes >= limits.max_bytes {
            return limits.max_bytes;
        }
    }
    bytes
}

/// Returns the first page of a segment that has no PRP entry yet. A segment that begins where the one before it ends
/// (`last`), inside a page, shares that page's entry.
fn first_page(start: u64, last: Option<u64>) -> u64 {
    if last == Some(start) { start.div_ceil(PAGE) } else { start / PAGE }
}

/// Returns the number of bytes from there that SGL descriptors of one command express.
fn sgl_reach(limits: TransferLimits, segments: &[Segment], index: usize, offset: u64) -> u64 {
    let (mut bytes, mut skip) = (0, offset);
    for segment in segments.iter().skip(index).take(LIST_WORDS / 2) {
        let fits = match limits.sgl {
            1 => true,
            2 => (segment.iova.0 + skip).is_multiple_of(4) && segment.len.is_multiple_of(4),
            _ => false,
        };
        if !fits {
            return bytes;
        }
        bytes += u64::from(segment.len) - skip;
        skip = 0;
        if bytes >= limits.max_bytes {
            return limits.max_bytes;
        }
    }
    bytes
}

/// Returns the data pointer of a part. Entries and descriptors that the command itself has no room for are written by
/// `store_word`, each at its index in the list at address `at`.
pub(super) fn data_pointer<E>(
    part: Part,
    segments: &[Segment],
    at: Iova,
    mut store_word: impl FnMut(usize, u64) -> Result<(), E>,
) -> Result<DataPointer, E> {
    let (mut remaining, mut skip, mut words, mut pages) = (part.bytes, part.at.offset, 0, 0);
    let (mut first, mut second, mut last) = ((0, 0), 0, None);
    for segment in segments.iter().skip(part.at.index) {
        let start = segment.iova.0 + skip;
        let len = (u64::from(segment.len) - skip).min(remaining);
        skip = 0;
        remaining -= len;
        if part.sgl {
            if words == 0 {
                first = (start, len);
            }
            for word in sgl_data(Iova(start), len) {
                store_word(words, word)?;
                words += 1;
            }
        } else {
            let mut page = start.max(first_page(start, last) * PAGE);
            last = Some(start + len);
            while page < start + len {
                match pages {
                    0 => first.0 = page,
                    1 => second = page,
                    _ => {}
                }
                // Stored from the second page on: whether a list is needed is known only at the end.
                if pages > 0 {
                    store_word(pages - 1, page)?;
                }
                pages += 1;
                page = (page / PAGE + 1) * PAGE;
            }
        }
        if remaining == 0 {
            break;
        }
    }
    let (start, len) = first;
    Ok(match (part.sgl, words, pages) {
        (true, 2, _) => DataPointer::SglData(Iova(start), len),
        (true, words, _) => DataPointer::SglList(at, words as u64 / 2),
        (false, _, 0..=2) => DataPointer::Prp(Iova(start), second),
        (false, ..) => DataPointer::Prp(Iova(start), at.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: TransferLimits = TransferLimits { block: 512, max_bytes: 1 << 20, sgl: 0 };

    fn segments(of: &[(u64, u32)]) -> Vec<Segment> {
        of.iter().map(|(at, len)| Segment { iova: Iova(*at), len: *len }).collect()
    }

    /// Returns the memory that a data pointer describes, in order, as a controller reads it.
    fn reached(data: DataPointer, bytes: u64, words: &[u64], at: Iova) -> Vec<(u64, u64)> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        let mut remaining = bytes;
        let mut append = |start: u64, len: u64| match found.last_mut() {
            Some((last, had)) if *last + *had == start => *had += len,
            _ => found.push((start, len)),
        };
        match data {
            DataPointer::SglData(start, len) => append(start.0, len),
            DataPointer::SglList(list, count) => {
                assert_eq!(list, at);
                words.chunks(2).take(count as usize).for_each(|pair| append(pair[0], pair[1] & 0xffff_ffff));
            }
            DataPointer::Prp(first, second) => {
                let mut take = |page: u64| {
                    let len = (PAGE - page % PAGE).min(remaining);
                    remaining -= len;
                    append(page, len);
                    remaining
                };
                if take(first.0) > 0 {
                    if pages_spanned(bytes, first.0) <= 2 {
                        take(second);
                    } else {
                        assert_eq!(second, at.0);
                        for page in words {
                            if take(*page) == 0 {
                                break;
                            }
                        }
                    }
                }
            }
            other => panic!("{other:?}"),
        }
        found
    }

    fn pages_spanned(bytes: u64, start: u64) -> u64 {
        (start % PAGE + bytes).div_ceil(PAGE)
    }

    fn coalesced(segments: &[Segment]) -> Vec<(u64, u64)> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        for segment in segments {
            match all.last_mut() {
                Some((start, len)) if *start + *len == segment.iova.0 => *len += u64::from(segment.len),
                _ => all.push((segment.iova.0, segment.len.into())),
            }
        }
        all
    }

    fn check(limits: TransferLimits, segments: &[Segment]) -> Result<usize, UnsupportedLayout> {
        let (mut parts, at) = (Vec::new(), Iova(0xffff_0000));
        // Planned in turns of three parts, the parts are the same.
        let (mut some, mut turns, mut from) = (Vec::new(), Vec::new(), Some(Position::default()));
        while let Some(at) = from {
            from = plan(limits, segments, at, 3, &mut some)?;
            assert!(some.len() <= 3);
            turns.append(&mut some);
        }
        assert_eq!(plan(limits, segments, Position::default(), usize::MAX, &mut parts), Ok(None));
        assert_eq!(parts, turns);
        let mut all: Vec<(u64, u64)> = Vec::new();
        for part in &parts {
            let mut words = vec![0; LIST_WORDS];
            let data = data_pointer(*part, segments, at, |nth, word| {
                *words.get_mut(nth).expect("the list has room") = word;
                Ok::<_, ()>(())
            });
            assert!(part.bytes <= limits.max_bytes && part.bytes.is_multiple_of(limits.block));
            for (start, len) in reached(data.unwrap(), part.bytes, &words, at) {
                match all.last_mut() {
                    Some((last, had)) if *last + *had == start => *had += len,
                    _ => all.push((start, len)),
                }
            }
        }
        assert_eq!(all, coalesced(segments));
        Ok(parts.len())
    }

    #[test]
    fn segments_that_meet_at_page_boundaries_are_one_prp_command() {
        assert_eq!(check(LIMITS, &segments(&[(0x1000, 4096)])), Ok(1));
        assert_eq!(check(LIMITS, &segments(&[(0x1200, 4096)])), Ok(1));
        assert_eq!(check(LIMITS, &segments(&[(0x1e00, 512), (0x8000, 4096), (0x4000, 512)])), Ok(1));
        assert_eq!(check(LIMITS, &segments(&[(0x10_0000, 1 << 20)])), Ok(1));
        assert_eq!(check(LIMITS, &segments(&[(0x10_0200, 1 << 20)])), Ok(1));
    }

    #[test]
    fn segments_unfit_for_prp_are_split_or_use_an_sgl() {
        let odd = segments(&[(0x1200, 512), (0x3400, 1024), (0x8000, 4096)]);
        assert_eq!(check(LIMITS, &odd), Ok(3));
        assert_eq!(check(TransferLimits { sgl: 1, ..LIMITS }, &odd), Ok(1));
        let inside = segments(&[(0x1200, 256), (0x3400, 256)]);
        assert_eq!(check(LIMITS, &inside), Err(UnsupportedLayout));
        assert_eq!(check(TransferLimits { sgl: 1, ..LIMITS }, &inside), Ok(1));
        assert_eq!(
            check(TransferLimits { sgl: 2, ..LIMITS }, &segments(&[(0x1202, 512)])),
            Err(UnsupportedLayout)
        );
    }

    #[test]
    fn adjacent_segments_are_one_piece_at_any_alignment() {
        assert_eq!(check(LIMITS, &segments(&[(0x1200, 256), (0x1300, 256)])), Ok(1));
        assert_eq!(
            check(LIMITS, &segments(&[(0x1200, 512), (0x1400, 512), (0x1600, 0xa00), (0x9000, 512)])),
            Ok(1)
        );
        assert_eq!(check(LIMITS, &segments(&[(0x1000, 0x800), (0x1800, 0x1800), (0x5000, 4096)])), Ok(1));
        let many: Vec<_> = (0..2048).map(|nth| (0x10_0200 + nth * 512, 512)).collect();
        assert_eq!(check(LIMITS, &segments(&many)), Ok(1));
        assert_eq!(check(LIMITS, &segments(&[(0x1200, 512), (0x1401, 512)])), Err(UnsupportedLayout));
    }

    #[test]
    fn empty_or_overflowing_segments_are_rejected() {
        assert_eq!(check(LIMITS, &segments(&[(0x1000, 0), (0x1000, 512)])), Err(UnsupportedLayout));
        assert_eq!(check(LIMITS, &segments(&[(0x1000, 512), (0x1000, 0)])), Err(UnsupportedLayout));
        assert_eq!(check(LIMITS, &segments(&[(u64::MAX - 100, 512)])), Err(UnsupportedLayout));
    }

    #[test]
    fn page_may_occur_twice_in_a_request() {
        assert_eq!(check(LIMITS, &segments(&[(0x1000, 4096), (0x1000, 4096), (0x1000, 4096)])), Ok(1));
        assert_eq!(check(LIMITS, &segments(&[(0x1000, 4096), (0x1000, 512)])), Ok(1));
    }

    #[test]
    fn no_command_exceeds_the_transfer_limit() {
        let limits = TransferLimits { max_bytes: 16384, ..LIMITS };
        assert_eq!(check(limits, &segments(&[(0x10_0200, 65536)])), Ok(4));
        assert_eq!(
            check(
                TransferLimits { sgl: 1, ..limits },
                &segments(&[(0x11_0200, 20000 / 512 * 512), (0x900, 512)])
            ),
            Ok(2)
        );
        assert_eq!(check(LIMITS, &segments(&[(0x10_0200, 3 << 20)])), Ok(3));
    }

    #[test]
    fn no_command_exceeds_its_prp_list() {
        let limits = TransferLimits { max_bytes: 4 << 20, ..LIMITS };
        assert_eq!(check(limits, &segments(&[(0x10_0200, 3 << 20)])), Ok(3));
        assert_eq!(check(limits, &segments(&[(0x10_0000, 257 * 4096)])), Ok(1));
        assert_eq!(check(limits, &segments(&[(0x10_0000, 258 * 4096)])), Ok(2));
    }

    #[test]
    fn request_of_any_length_is_planned_in_bounded_memory() {
        let all: Vec<_> = (0..126).map(|_| (0, u32::MAX / 4096 * 4096)).collect();
        let mut parts = Vec::new();
        let next = plan(LIMITS, &segments(&all), Position::default(), 7, &mut parts);
        assert_eq!((next, parts.len()), (Ok(Some(Position { index: 0, offset: 7 << 20 })), 7));
        assert!(parts.capacity() < 100);
    }
}
