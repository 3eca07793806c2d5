//! A store's memory may contain anything and be cut off at any time: nothing is lost, nothing leads outside.

mod corrupt;
pub(in crate::gate::ledger) mod cut;
mod killed;

use super::*;
use crate::gate::ledger::Tree;
use crate::gate::ledger::tree::{PAGES, span};

/// The first key of tests.
fn key(kind: u64) -> Key {
    Key { kind, a: u64::MAX, b: 0 }
}

fn memfd(bytes: u64) -> Store {
    Store::new(Words::memfd("ledger", bytes).unwrap()).unwrap()
}

/// The store as another process would find it.
fn again(store: &Store) -> Result<Store, OpenError> {
    Store::open(Words::from_fd(store.words().fd().unwrap().try_clone_to_owned().unwrap()).unwrap())
}

#[test]
fn tables_are_zeroed_and_found_again() {
    let store = memfd(1 << 20);
    let room = store.room();
    let one = store.reserve(key(1), 100).unwrap();
    let two = store.reserve(key(2), 1).unwrap();
    assert!(one.lines() >= 100 && two.lines() >= 1);
    one.line(99).unwrap()[7].store(77, Relaxed);
    two.line(0).unwrap()[0].store(78, Relaxed);
    assert!(one.line(one.lines()).is_none());
    let found = again(&store).unwrap();
    assert_eq!(found.keys(), [key(1), key(2)]);
    assert_eq!(found.room(), store.room());
    let (one, two) = (found.table(key(1)).unwrap(), found.table(key(2)).unwrap());
    assert_eq!((one.line(99).unwrap()[7].load(Relaxed), two.line(0).unwrap()[0].load(Relaxed)), (77, 78));
    assert!(found.table(key(3)).is_none());
    found.remove(key(1));
    let one = found.reserve(key(1), 100).unwrap();
    assert!(one.iter().all(|word| word.load(Relaxed) == 0), "what lay there before is gone");
    assert_eq!(found.reserve(key(4), u32::MAX).unwrap_err(), Full { bytes: 1 << 20 });
    found.remove(key(1));
    found.remove(key(2));
    assert_eq!((found.room(), found.keys()), (room, vec![]));
}

#[test]
fn store_has_a_header_and_a_last_root() {
    let small = Words::anonymous((32 << 10) - 8).unwrap();
    assert_eq!(Store::new(small).unwrap_err(), Full { bytes: (32 << 10) - 8 });
    let store = memfd(32 << 10);
    let mut made = 0;
    while store.tree(Key { kind: 0, a: 0, b: made }).is_ok() {
        made += 1;
    }
    assert_eq!(made, SLOTS as u64);
    store.remove(Key { kind: 0, a: 0, b: 7 });
    assert!(store.tree(key(1)).is_ok(), "a root that went leaves its slot");
    assert_eq!(again(&store).unwrap().keys().len(), SLOTS);
}
