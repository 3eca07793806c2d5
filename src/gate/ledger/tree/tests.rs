use super::*;
use passgate_bindings::words::Words;

const KEY: Key = Key { kind: 1, a: 2, b: 3 };
/// Pages of a node's entry at height 1: 1 GiB.
const GIANT: u64 = span(1);

fn store(bytes: u64) -> Store {
    Store::new(Words::anonymous(bytes).unwrap()).unwrap()
}

fn chance(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |n| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % n
    }
}

/// Everything that a tree can be asked, against a plain vector, over borders of words, leaves and nodes.
#[test]
fn tree_agrees_with_a_vector() {
    let pages = GIANT + 3 * leaf::PAGES;
    let mut plain = vec![0u8; pages as usize];
    let store = store(1 << 24);
    // The same numbers beyond the first node of the second level, so that the tree must grow for them.
    let mut trees =
        [(Tree::new(&store, KEY).unwrap(), 0), (Tree::new(&store, Key { a: 9, ..KEY }).unwrap(), 1 << 40)];
    let mut random = chance(7);
    for round in 0..4000 {
        let longest = [1, 3, 64, leaf::PAGES, 2 * leaf::PAGES, pages][random(6) as usize];
        let len = 1 + random(longest);
        let start = random(pages - len + 1);
        let value = random(4) as u8;
        // Now and then a grid: its pages at multiples of its width are 2, the others 1.
        let grid = random(3).eq(&0).then(|| random(21) as u32);
        for page in start..start + len {
            plain[page as usize] = grid.map_or(value, |bits| 1 + u8::from(page % (1 << bits) == 0));
        }
        let (from, probe) = (random(pages), random(pages));
        let end = from + 1 + random((pages - from).min(2000));
        let asked = &plain[from as usize..end as usize];
        for (tree, base) in &mut trees {
            let base = *base;
            match grid {
                None => tree.set(base + start..base + start + len, value).unwrap(),
                Some(bits) => assert!(tree.force_fill(base + start..base + start + len, Fill::grid(bits), 0)),
            }
            assert_eq!(tree.get(base + probe), plain[probe as usize]);
            let within = base + from..base + end;
            let count = asked.iter().filter(|v| **v == value).count() as u64;
            assert_eq!(tree.count(within.clone(), value), count);
            let counts = [0, 1, 2, 3].map(|value| asked.iter().filter(|v| **v == value).count() as u64);
            assert_eq!(tree.counts(within.clone()), counts);
            let whole = [0, 1, 2, 3].map(|value| tree.count(base..base + pages, value));
            assert_eq!(tree.counts(base..base + pages), whole, "as counted page by page");
            let next = asked.iter().position(|v| *v != value).map(|at| base + from + at as u64);
            assert_eq!(tree.next_not(within.clone(), value), next);
            let is = asked.iter().position(|v| *v == value).map(|at| base + from + at as u64);
            assert_eq!(tree.next(within.clone(), value), is);
            let merged: Vec<_> = asked.iter().map(|value| if *value == 2 { 1 } else { *value }).collect();
            check(&tree.merged_spans(within.clone()).collect::<Vec<_>>(), &merged, base + from);
            let last = asked.iter().rposition(|v| *v != value).map(|at| base + from + at as u64);
            assert_eq!(tree.last_not(within.clone(), value), last);
            let spans: Vec<_> = tree.spans(within.clone()).collect();
            check(&spans, asked, base + from);
            assert_eq!(
                spans,
                tree.spans(within).fold(Vec::new(), |mut all, span| {
                    all.push(span);
                    all
                })
            );
            if round % 50 == 0 {
                check(&tree.spans(base..base + pages).collect::<Vec<_>>(), &plain, base);
            }
        }
    }
}

/// The spans make up `plain`, which starts at page `base`, and are the longest.
fn check(spans: &[(Range<u64>, u8)], plain: &[u8], base: u64) {
    let mut at = 0;
    for (span, value) in spans {
        assert_eq!(span.start - base, at as u64);
        let end = (span.end - base) as usize;
        assert!(plain[at..end].iter().all(|v| v == value));
        assert!(plain.get(end).is_none_or(|v| v != value), "spans are the longest");
        at = end;
    }
    assert_eq!(at, plain.len());
}

#[test]
fn tree_folds_back_to_nothing_and_frees_all_memory() {
    let store = store(1 << 26);
    let room = store.room();
    let mut tree = Tree::new(&store, KEY).unwrap();
    tree.set(0..4 * GIANT, 3).unwrap();
    let rest = store.room();
    assert!(room - rest <= 4096, "a few KiB at rest");
    for page in (0..2 * GIANT).step_by(1000) {
        tree.set(page..page + 1, 2).unwrap();
    }
    assert!(store.room() < rest);
    for page in (0..2 * GIANT).step_by(1000) {
        tree.set(page..page + 1, 3).unwrap();
    }
    assert_eq!(store.room(), rest);
    tree.set(0..4 * GIANT, 0).unwrap();
    assert_eq!(store.room(), room);
    tree.set(5..PAGES, 1).unwrap();
    assert_eq!((tree.get(4), tree.get(5), tree.get(PAGES - 1), tree.get(PAGES)), (0, 1, 1, 0));
    tree.discard();
    assert_eq!((store.room(), store.keys()), (room, vec![]));
}

/// Whatever the order in which leaves came and went before.
#[test]
fn tree_never_takes_more_than_its_worst_case() {
    let pages = 1 << 21;
    let store = store(1 << 26);
    let room = store.room();
    let mut tree = Tree::new(&store, KEY).unwrap();
    let mut random = chance(3);
    for _ in 0..20 {
        // Fill, and then leave one leaf in ten, so that what is free lies everywhere.
        (0..pages).step_by(512).for_each(|page| tree.set(page + 5..page + 6, 2).unwrap());
        for page in (0..pages).step_by(512).filter(|_| random(10) > 0) {
            tree.set(page..page + 512, 0).unwrap();
        }
        for _ in 0..3000 {
            let page = random(pages);
            tree.set(page..page + 1, 1).unwrap();
            assert!(room - store.room() <= Tree::worst(0..pages));
        }
    }
    (0..pages).step_by(2).for_each(|page| tree.set(page..page + 2, 3).unwrap());
    (0..pages).step_by(2).for_each(|page| tree.set(page..page + 1, 2).unwrap());
    assert_eq!(tree.count(0..pages, 2), pages / 2);
    assert_eq!(
        room - store.room(),
        Tree::worst(0..pages) - 3 * 2048,
        "three levels of nodes less than at any address"
    );
    assert_eq!(Tree::worst(0..1 << 28), (66 << 20) + 5 * 2048, "of a terabyte");
}

#[test]
fn full_store_is_an_error_or_coarser_never_wrong() {
    let store = store((32 << 10) + 8 * 2048);
    let mut tree = Tree::new(&store, KEY).unwrap();
    tree.set(0..GIANT, 3).unwrap();
    let (mut page, room) = (0, store.room());
    let full = loop {
        match tree.set(page..page + 1, 2) {
            Ok(()) => page += leaf::PAGES,
            Err(full) => break full,
        }
    };
    assert_eq!(full.bytes, (32 << 10) + 8 * 2048);
    assert_eq!(page / leaf::PAGES, 16 * (room - 2048) / 2048);
    assert_eq!((tree.get(page), tree.count(0..GIANT, 2)), (3, page / leaf::PAGES));
    assert!(!tree.force(page + 7..page + 8, 2, 0));
    assert_eq!(tree.count(0..GIANT, 0), leaf::PAGES, "told from nobody, so nobody's is known");
    assert_eq!(tree.count(0..GIANT, 2), page / leaf::PAGES);
    tree.set(2 * GIANT..2 * GIANT + 1, 1).unwrap_err();
    assert!(!tree.force(GIANT + 1..GIANT + 2, 2, 0));
    assert_eq!(tree.get(GIANT + 1), 0);
    let counted = [0, 1, 2, 3].map(|value| tree.count(0..PAGES, value));
    assert_eq!(tree.counts(0..PAGES), counted, "also after what failed half-way");
    tree.set(0..GIANT, 3).unwrap();
    assert_eq!(store.room(), room);
}
