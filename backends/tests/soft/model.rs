//! The domain against a model of it.

use std::collections::HashSet;

use super::*;

const PLACES: u64 = 48;
const SLOTS: u64 = 16;

/// Every page against a model that knows nothing of slots: mapped in random pieces, at random places, from random
/// pages, with fewer slots than there are places.
#[test]
fn whatever_is_mapped_and_unmapped_the_device_sees_exactly_that() {
    let budget = BUDGET.read().unwrap_or_else(PoisonError::into_inner);
    let bench = Bench::of(SoftDomain::with_slots(SLOTS as u32).unwrap(), PLACES, Some(budget));
    (0..PLACES).for_each(|page| bench.store(page, page));
    // For each place: the first place of its mapping, and the page behind it.
    let mut model: Vec<Option<(u64, u64)>> = vec![None; PLACES as usize];
    let mut state = 1;
    let (mut made, mut refused, mut cut) = (0, 0, 0);
    for _ in 0..3000 {
        let start = next(&mut state) % PLACES;
        let len = 1 + next(&mut state) % (PLACES - start).min(9);
        let places = start as usize..(start + len) as usize;
        if !next(&mut state).is_multiple_of(3) {
            let piece = 1 + next(&mut state) % 3;
            let page = next(&mut state) % (PLACES - len + 1);
            let occupied = model[places.clone()].iter().any(Option::is_some);
            let firsts: HashSet<_> = model.iter().flatten().map(|(first, _)| first).collect();
            // Of a place: the first of its mapping, on the grid of absolute IOVAs.
            let first = |place: u64| {
                let page = BASE / PAGE + place;
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
            let inside = |place: usize| model.get(place).copied().flatten().map(|(first, _)| first);
            let cuts =
                |edge: usize| edge > 0 && inside(edge - 1).is_some() && inside(edge - 1) == inside(edge);
            match bench.unmap(start, len) {
                Unmap::Gone { bytes } => {
                    assert!(!cuts(places.start) && !cuts(places.end));
                    let mapped = model[places.clone()].iter().flatten().count() as u64;
                    assert_eq!(bytes, mapped * PAGE);
                    model[places].fill(None);
                }
                Unmap::Failed { errno: Errno::INVAL, bytes: 0 } => {
                    assert!(cuts(places.start) || cuts(places.end));
                    cut += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        for (place, behind) in model.iter().enumerate() {
            match behind {
                Some((_, page)) => assert_eq!(bench.dma_load(place as u64).unwrap(), *page),
                None => is_fault(bench.dma_load(place as u64), place as u64),
            }
        }
    }
    println!("{made} maps, {refused} without a slot, {cut} cuts");
    assert!(made > 200 && refused > 10 && cut > 10);
}
