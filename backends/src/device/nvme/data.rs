//! How a request's memory becomes the data pointers of commands (NVM Express base specification 2.0, 4.1.1 and 4.1.2).
//!
//! Physical region pages (PRP): every piece but the first begins at a page's start, every piece but the last ends at a
//! page's end. Scatter-gather lists (SGL) have no such rule, where the controller takes them. A request that fits neither
//! is cut into several commands where its pieces meet; where that is inside a block it cannot be done.

use passgate_bindings::{Iova, PAGE};

use super::command::{Data, block};
use crate::window::{REACH, Segment};

/// Words of one command's list: so many page entries, or half as many descriptors.
pub(super) const WORDS: usize = 256;

/// What a controller's commands may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rules {
    /// Bytes of a block.
    pub(super) block: u64,
    /// Bytes of one command at most: a multiple of the block.
    pub(super) most: u64,
    /// As [`super::geometry::Abilities::sgl`].
    pub(super) sgl: u8,
}

/// Somewhere in a request's memory: a segment, and how many bytes into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    first: usize,
    into: u64,
}

/// One command's share of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Where it begins.
    at: Place,
    pub(super) bytes: u64,
    sgl: bool,
}

/// No command can be made of this memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inexpressible;

/// Cuts the memory of a request from `from` on into the shares of commands, at most `most`: a guest may ask for more at
/// once than there is memory to plan it in. Says where it goes on, if there is more.
pub(super) fn plan(
    rules: Rules,
    segments: &[Segment],
    from: Place,
    most: usize,
    parts: &mut Vec<Part>,
) -> Result<Option<Place>, Inexpressible> {
    parts.clear();
    let sound = |segment: &Segment| {
        let end = segment.iova.0.checked_add(segment.len.into());
        segment.len > 0 && end.is_some_and(|end| end <= REACH)
    };
    if !segments.iter().all(sound) {
        return Err(Inexpressible);
    }
    let Place { mut first, mut into } = from;
    while first < segments.len() {
        if parts.len() >= most {
            return Ok(Some(Place { first, into }));
        }
        let part = share(rules, segments, first, into).ok_or(Inexpressible)?;
        parts.push(part);
        let mut left = part.bytes;
        while let Some(segment) = segments.get(first) {
            let here = u64::from(segment.len) - into;
            if left < here {
                into += left;
                break;
            }
            left -= here;
            (first, into) = (first + 1, 0);
            if left == 0 {
                break;
            }
        }
    }
    Ok(None)
}

/// The longest share that begins there: by pages where that is long enough, else by descriptors.
fn share(rules: Rules, segments: &[Segment], first: usize, into: u64) -> Option<Part> {
    let whole = |bytes: u64| bytes / rules.block * rules.block;
    let pages = whole(by_pages(rules, segments, first, into));
    let rest: u64 = segments.iter().skip(first).map(|segment| u64::from(segment.len)).sum::<u64>() - into;
    if pages == rest.min(rules.most) {
        return (pages > 0).then_some(Part { at: Place { first, into }, bytes: pages, sgl: false });
    }
    let lists = whole(by_lists(rules, segments, first, into));
    let (bytes, sgl) = if lists > pages { (lists, true) } else { (pages, false) };
    (bytes > 0).then_some(Part { at: Place { first, into }, bytes, sgl })
}

/// Bytes that page entries can cover from there.
fn by_pages(rules: Rules, segments: &[Segment], first: usize, into: u64) -> u64 {
    let (mut bytes, mut entries, mut skip, mut last) = (0, 0, into, None::<u64>);
    for segment in segments.iter().skip(first) {
        let (start, end) = (segment.iova.0 + skip, segment.iova.0 + u64::from(segment.len));
        skip = 0;
        let goes_on = match last {
            None => start.is_multiple_of(4),
            Some(last) => start == last || start.is_multiple_of(PAGE) && last.is_multiple_of(PAGE),
        };
        if !goes_on {
            return bytes;
        }
        let page = first_page(start, last);
        let pages = end.div_ceil(PAGE) - page;
        last = Some(end);
        // The first entry is in the command itself.
        let room = (WORDS as u64 + 1).saturating_sub(entries);
        if pages > room {
            let reach = (page + room) * PAGE;
            return (bytes + reach.saturating_sub(start)).min(rules.most);
        }
        entries += pages;
        bytes += end - start;
        if bytes >= rules.most {
            return rules.most;
        }
    }
    bytes
}

/// The first page of a piece from `start` on that has no entry yet, behind a piece that ends at `last`.
fn first_page(start: u64, last: Option<u64>) -> u64 {
    if last == Some(start) { start.div_ceil(PAGE) } else { start / PAGE }
}

/// Bytes that descriptors can cover from there.
fn by_lists(rules: Rules, segments: &[Segment], first: usize, into: u64) -> u64 {
    let (mut bytes, mut skip) = (0, into);
    for segment in segments.iter().skip(first).take(WORDS / 2) {
        let fits = match rules.sgl {
            1 => true,
            2 => (segment.iova.0 + skip).is_multiple_of(4) && segment.len.is_multiple_of(4),
            _ => false,
        };
        if !fits {
            return bytes;
        }
        bytes += u64::from(segment.len) - skip;
        skip = 0;
        if bytes >= rules.most {
            return rules.most;
        }
    }
    bytes
}

/// The data pointer of a part; what does not fit into the command is stored by `list`, at its index among the words at
/// `at`.
pub(super) fn pointer<E>(
    part: Part,
    segments: &[Segment],
    at: Iova,
    mut list: impl FnMut(usize, u64) -> Result<(), E>,
) -> Result<Data, E> {
    let (mut left, mut skip, mut words, mut pages) = (part.bytes, part.at.into, 0, 0);
    let (mut first, mut second, mut last) = ((0, 0), 0, None);
    for segment in segments.iter().skip(part.at.first) {
        let start = segment.iova.0 + skip;
        let len = (u64::from(segment.len) - skip).min(left);
        skip = 0;
        left -= len;
        if part.sgl {
            if words == 0 {
                first = (start, len);
            }
            for word in block(Iova(start), len) {
                list(words, word)?;
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
                if pages > 0 {
                    list(pages - 1, page)?;
                }
                pages += 1;
                page = (page / PAGE + 1) * PAGE;
            }
        }
        if left == 0 {
            break;
        }
    }
    let (start, len) = first;
    Ok(match (part.sgl, words, pages) {
        (true, 2, _) => Data::Block(Iova(start), len),
        (true, words, _) => Data::List(at, words as u64 / 2),
        (false, _, 0..=2) => Data::Pair(Iova(start), second),
        (false, ..) => Data::Pair(Iova(start), at.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { block: 512, most: 1 << 20, sgl: 0 };

    fn segments(of: &[(u64, u32)]) -> Vec<Segment> {
        of.iter().map(|(at, len)| Segment { iova: Iova(*at), len: *len }).collect()
    }

    /// The bytes of memory that a data pointer reaches, in order, as a controller would read it.
    fn reached(data: Data, bytes: u64, words: &[u64], at: Iova) -> Vec<(u64, u64)> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        let mut left = bytes;
        let mut push = |start: u64, len: u64| match found.last_mut() {
            Some((last, had)) if *last + *had == start => *had += len,
            _ => found.push((start, len)),
        };
        match data {
            Data::Block(start, len) => push(start.0, len),
            Data::List(list, count) => {
                assert_eq!(list, at);
                words.chunks(2).take(count as usize).for_each(|pair| push(pair[0], pair[1] & 0xffff_ffff));
            }
            Data::Pair(first, second) => {
                let mut take = |page: u64| {
                    let len = (PAGE - page % PAGE).min(left);
                    left -= len;
                    push(page, len);
                    left
                };
                if take(first.0) > 0 {
                    if left_pages(bytes, first.0) <= 2 {
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

    fn left_pages(bytes: u64, start: u64) -> u64 {
        (start % PAGE + bytes).div_ceil(PAGE)
    }

    fn joined(segments: &[Segment]) -> Vec<(u64, u64)> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        for segment in segments {
            match all.last_mut() {
                Some((start, len)) if *start + *len == segment.iova.0 => *len += u64::from(segment.len),
                _ => all.push((segment.iova.0, segment.len.into())),
            }
        }
        all
    }

    fn check(rules: Rules, segments: &[Segment]) -> Result<usize, Inexpressible> {
        let (mut parts, at) = (Vec::new(), Iova(0xffff_0000));
        // However it is cut into turns, the shares are the same.
        let (mut some, mut turns, mut from) = (Vec::new(), Vec::new(), Some(Place::default()));
        while let Some(at) = from {
            from = plan(rules, segments, at, 3, &mut some)?;
            assert!(some.len() <= 3);
            turns.append(&mut some);
        }
        assert_eq!(plan(rules, segments, Place::default(), usize::MAX, &mut parts), Ok(None));
        assert_eq!(parts, turns);
        let mut all: Vec<(u64, u64)> = Vec::new();
        for part in &parts {
            let mut words = vec![0; WORDS];
            let data = pointer(*part, segments, at, |nth, word| {
                *words.get_mut(nth).expect("the list has room") = word;
                Ok::<_, ()>(())
            });
            assert!(part.bytes <= rules.most && part.bytes.is_multiple_of(rules.block));
            for (start, len) in reached(data.unwrap(), part.bytes, &words, at) {
                match all.last_mut() {
                    Some((last, had)) if *last + *had == start => *had += len,
                    _ => all.push((start, len)),
                }
            }
        }
        assert_eq!(all, joined(segments));
        Ok(parts.len())
    }

    #[test]
    fn pages_are_enough_where_pieces_end_with_them() {
        assert_eq!(check(RULES, &segments(&[(0x1000, 4096)])), Ok(1));
        assert_eq!(check(RULES, &segments(&[(0x1200, 4096)])), Ok(1));
        assert_eq!(check(RULES, &segments(&[(0x1e00, 512), (0x8000, 4096), (0x4000, 512)])), Ok(1));
        assert_eq!(check(RULES, &segments(&[(0x10_0000, 1 << 20)])), Ok(1));
        assert_eq!(check(RULES, &segments(&[(0x10_0200, 1 << 20)])), Ok(1));
    }

    #[test]
    fn pieces_that_fit_no_page_list_are_commands_of_their_own_or_a_list() {
        let odd = segments(&[(0x1200, 512), (0x3400, 1024), (0x8000, 4096)]);
        assert_eq!(check(RULES, &odd), Ok(3));
        assert_eq!(check(Rules { sgl: 1, ..RULES }, &odd), Ok(1));
        let inside = segments(&[(0x1200, 256), (0x3400, 256)]);
        assert_eq!(check(RULES, &inside), Err(Inexpressible));
        assert_eq!(check(Rules { sgl: 1, ..RULES }, &inside), Ok(1));
        assert_eq!(check(Rules { sgl: 2, ..RULES }, &segments(&[(0x1202, 512)])), Err(Inexpressible));
    }

    #[test]
    fn pieces_that_touch_are_one_wherever_they_do() {
        assert_eq!(check(RULES, &segments(&[(0x1200, 256), (0x1300, 256)])), Ok(1));
        assert_eq!(
            check(RULES, &segments(&[(0x1200, 512), (0x1400, 512), (0x1600, 0xa00), (0x9000, 512)])),
            Ok(1)
        );
        assert_eq!(check(RULES, &segments(&[(0x1000, 0x800), (0x1800, 0x1800), (0x5000, 4096)])), Ok(1));
        let many: Vec<_> = (0..2048).map(|nth| (0x10_0200 + nth * 512, 512)).collect();
        assert_eq!(check(RULES, &segments(&many)), Ok(1));
        assert_eq!(check(RULES, &segments(&[(0x1200, 512), (0x1401, 512)])), Err(Inexpressible));
    }

    #[test]
    fn nothing_is_made_of_pieces_without_bytes() {
        assert_eq!(check(RULES, &segments(&[(0x1000, 0), (0x1000, 512)])), Err(Inexpressible));
        assert_eq!(check(RULES, &segments(&[(0x1000, 512), (0x1000, 0)])), Err(Inexpressible));
        assert_eq!(check(RULES, &segments(&[(u64::MAX - 100, 512)])), Err(Inexpressible));
    }

    #[test]
    fn one_page_may_be_there_twice() {
        assert_eq!(check(RULES, &segments(&[(0x1000, 4096), (0x1000, 4096), (0x1000, 4096)])), Ok(1));
        assert_eq!(check(RULES, &segments(&[(0x1000, 4096), (0x1000, 512)])), Ok(1));
    }

    #[test]
    fn no_command_is_longer_than_the_controller_takes() {
        let rules = Rules { most: 16384, ..RULES };
        assert_eq!(check(rules, &segments(&[(0x10_0200, 65536)])), Ok(4));
        assert_eq!(
            check(Rules { sgl: 1, ..rules }, &segments(&[(0x11_0200, 20000 / 512 * 512), (0x900, 512)])),
            Ok(2)
        );
        assert_eq!(check(RULES, &segments(&[(0x10_0200, 3 << 20)])), Ok(3));
    }

    #[test]
    fn no_command_has_more_pages_than_its_list_has_room_for() {
        let rules = Rules { most: 4 << 20, ..RULES };
        assert_eq!(check(rules, &segments(&[(0x10_0200, 3 << 20)])), Ok(3));
        assert_eq!(check(rules, &segments(&[(0x10_0000, 257 * 4096)])), Ok(1));
        assert_eq!(check(rules, &segments(&[(0x10_0000, 258 * 4096)])), Ok(2));
    }

    #[test]
    fn a_request_of_any_length_is_planned_in_little_memory() {
        let all: Vec<_> = (0..126).map(|_| (0, u32::MAX / 4096 * 4096)).collect();
        let mut parts = Vec::new();
        let goes_on = plan(RULES, &segments(&all), Place::default(), 7, &mut parts);
        assert_eq!((goes_on, parts.len()), (Ok(Some(Place { first: 0, into: 7 << 20 })), 7));
        assert!(parts.capacity() < 100);
    }
}
