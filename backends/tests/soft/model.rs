//! The domain compared with a model.

use std::collections::HashSet;

use super::*;

const PAGES: u64 = 48;
const SLOTS: u64 = 16;

/// Compares every page with a model without slots: random maps and unmaps, in random pieces, with fewer slots than
/// pages.
#[test]
fn random_maps_and_unmaps_match_the_model() {
    let budget = MEMLOCK_BUDGET.read().unwrap_or_else(PoisonError::into_inner);
    let bench = Bench::of(SoftDomain::with_slots(SLOTS as u32).unwrap(), PAGES, Some(budget));
    (0..PAGES).for_each(|page| bench.store(page, page));
    // For each page of the address space: the first page of its mapping, and the page of the file.
    let mut model: Vec<Option<(u64, u64)>> = vec![None; PAGES as usize];
    let mut state = 1;
    let (mut made, mut refused, mut cut) = (0, 0, 0);
    for _ in 0..3000 {
        let start = next(&mut state) % PAGES;
        let len = 1 + next(&mut state) % (PAGES - start).min(9);
        let range = start as usize..(start + len) as usize;
        if !next(&mut state).is_multiple_of(3) {
            let piece = 1 + next(&mut state) % 3;
            let page = next(&mut state) % (PAGES - len + 1);
            let occupied = model[range.clone()].iter().any(Option::is_some);
            let firsts: HashSet<_> = model.iter().flatten().map(|(first, _)| first).collect();
            // The first page of a page's mapping, on the grid of absolute IOVAs.
            let first = |index: u64| {
                let page = BASE / PAGE + index;
                (page - page % piece).max(BASE / PAGE + start) - BASE / PAGE
            };
            let new: HashSet<_> = (start..start + len).map(first).collect();
            let full = (firsts.len() + new.len()) as u64 > SLOTS;
            let offset = Offset(page * PAGE);
            match bench.domain.map(iova(start, len), piece * PAGE, &bench.memory, offset, true) {
                Ok(()) => {
                    assert!(!occupied && !full);
                    (0..len).for_each(|i| model[(start + i) as usize] = Some((first(start + i), page + i)));
                    made += 1;
                }
                Err(error) if occupied => assert_eq!(error.errno(), Some(Errno::EXIST)),
                Err(error) => {
                    assert!(full, "{error}");
                    refused += 1;
                }
            }
        } else {
            let inside = |index: usize| model.get(index).copied().flatten().map(|(first, _)| first);
            let cuts =
                |edge: usize| edge > 0 && inside(edge - 1).is_some() && inside(edge - 1) == inside(edge);
            match bench.unmap(start, len) {
                Unmap::Gone { bytes } => {
                    assert!(!cuts(range.start) && !cuts(range.end));
                    let mapped = model[range.clone()].iter().flatten().count() as u64;
                    assert_eq!(bytes, mapped * PAGE);
                    model[range].fill(None);
                }
                Unmap::Failed { errno: Errno::INVAL, bytes: 0 } => {
                    assert!(cuts(range.start) || cuts(range.end));
                    cut += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        for (index, entry) in model.iter().enumerate() {
            match entry {
                Some((_, page)) => assert_eq!(bench.dma_load(index as u64).unwrap(), *page),
                None => is_fault(bench.dma_load(index as u64), index as u64),
            }
        }
    }
    println!("{made} maps, {refused} without a slot, {cut} cuts");
    assert!(made > 200 && refused > 10 && cut > 10);
}
