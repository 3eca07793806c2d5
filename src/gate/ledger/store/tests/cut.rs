//! As [`super::killed`], but after every single store of an operation, one after the other.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::killed::{BASES, SPAN, apply, operation};
use super::*;

const OPERATIONS: u64 = 80;

thread_local! {
    /// The number of words that may yet be published before this thread is cut off.
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Called after each word that is published.
pub(in crate::gate::ledger) fn published() {
    if let Some(left) = LEFT.get() {
        LEFT.set(left.checked_sub(1));
        if left == 0 {
            resume_unwind(Box::new("cut off"));
        }
    }
}

/// Does operation `number` to a copy of `store` and cuts it off after `left` + 1 words; what is left, where it was.
fn cut(store: &Store, number: u64, left: u64) -> Option<Store> {
    let copy = Words::memfd("copy", store.words().len() as u64 * 8).unwrap();
    copy.iter().zip(store.words().iter()).for_each(|(to, from)| to.store(from.load(Relaxed), Relaxed));
    let copy = Store::open(copy).unwrap();
    let (at, pages, value) = operation(number);
    LEFT.set(Some(left));
    let cut_off = catch_unwind(AssertUnwindSafe(|| {
        let mut tree = Tree::new(&copy, key(at as u64)).unwrap();
        match pages {
            Some(pages) => tree.set(BASES[at] + pages.start..BASES[at] + pages.end, value).unwrap(),
            None => tree.discard(),
        }
    }));
    LEFT.set(None);
    cut_off.err().map(|_| again(&copy).unwrap())
}

#[test]
fn process_end_after_any_store_leaves_each_page_old_or_new() {
    let store = memfd(1 << 18);
    let mut trees = [None, None];
    let mut after = [vec![0u8; SPAN as usize], vec![0u8; SPAN as usize]];
    let mut cuts = 0;
    for number in 0..OPERATIONS {
        let before = after.clone();
        apply(&mut after, number);
        let (at, pages, value) = operation(number);
        let mut left = 0;
        while let Some(found) = cut(&store, number, left) {
            assert!(found.keys().iter().all(|found| [key(0), key(1)].contains(found)), "{:?}", found.keys());
            let tree = Tree::new(&found, key(at as u64)).unwrap();
            for (span, value) in tree.spans(BASES[at]..BASES[at] + SPAN) {
                let span = (span.start - BASES[at]) as usize..(span.end - BASES[at]) as usize;
                let mut pages = before[at][span.clone()].iter().zip(&after[at][span.clone()]);
                let either = pages.all(|(was, is)| value == *was || value == *is);
                assert!(either, "{value} in {span:?} of operation {number}, cut off after {left}");
            }
            cuts += 1;
            // Of a long operation not each, but all of its beginning.
            left += 1 + left / 8;
        }
        let tree = trees[at].get_or_insert_with(|| Tree::new(&store, key(at as u64)).unwrap());
        match pages {
            Some(pages) => tree.set(BASES[at] + pages.start..BASES[at] + pages.end, value).unwrap(),
            None => trees[at].take().into_iter().for_each(Tree::discard),
        }
    }
    assert!(cuts > 5 * OPERATIONS);
}
