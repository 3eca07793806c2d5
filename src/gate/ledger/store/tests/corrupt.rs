//! Memory that somebody else filled, with whatever he liked: an error, or a store that answers.

use proptest::prelude::*;

use super::*;

/// Blocks of the stores that are damaged.
const BLOCKS: u64 = 64;

/// A word of the memory, and what it becomes.
#[derive(Debug, Clone)]
enum Damage {
    /// Another value altogether.
    Word(usize, u64),
    /// One bit of it.
    Bit(usize, u32),
    /// The entry of a node is another's (in units: what the walk follows).
    Entry(usize, bool, u32),
    /// A root is another.
    Root(usize, u64, u32, u32),
}

fn damage() -> impl Strategy<Value = Damage> {
    let words = BLOCKS as usize * BLOCK_WORDS;
    // The places in use: the header, the roots, the first blocks.
    let at = prop_oneof![0..8usize, 8..40usize, HEADER as usize * BLOCK_WORDS..words, 0..words];
    prop_oneof![
        (at.clone(), any::<u64>()).prop_map(|(at, value)| Damage::Word(at, value)),
        (at.clone(), 0..64u32).prop_map(|(at, bit)| Damage::Bit(at, bit)),
        (at, any::<bool>(), 0..BLOCKS as u32 * LEAVES + 40)
            .prop_map(|(at, high, to)| Damage::Entry(at, high, to)),
        (0..5usize, 0..3u64, 0..8u32, 0..BLOCKS as u32 * LEAVES + 40)
            .prop_map(|(slot, tag, height, entry)| Damage::Root(slot, tag, height, entry)),
    ]
}

impl Damage {
    fn apply(&self, words: &Words) {
        let change =
            |at: usize, new: &dyn Fn(u64) -> u64| words[at].store(new(words[at].load(Relaxed)), Relaxed);
        match *self {
            Self::Word(at, value) => change(at, &|_| value),
            Self::Bit(at, bit) => change(at, &|old| old ^ 1 << bit),
            Self::Entry(at, true, to) => change(at, &|old| old & 0xffff_ffff | u64::from(to) << 32),
            Self::Entry(at, false, to) => change(at, &|old| old & !0xffff_ffff | u64::from(to)),
            Self::Root(slot, tag, height, entry) => {
                let root = tag << 56 | u64::from(height) << 32 | u64::from(entry);
                change(DIRECTORY + slot * SLOT, &|_| root);
            }
        }
    }
}

/// A store with trees of several heights and a table.
fn filled() -> Store {
    let store = memfd(BLOCKS * BLOCK_BYTES);
    for (number, page) in (0..).zip([0, 1 << 20, 1 << 40]) {
        let mut tree = Tree::new(&store, key(number)).unwrap();
        for step in 0..20 {
            tree.set(page + step * 700..page + step * 700 + 40, (step % 4) as u8).unwrap();
        }
    }
    store.reserve(key(3), 64).unwrap();
    store
}

/// Everything that can be asked of a store and its trees. What the answers are is nobody's business here.
fn use_all(store: &Store) {
    for key in store.keys() {
        if let Some(table) = store.table(key) {
            table.iter().for_each(|word| word.store(word.load(Relaxed) ^ 1, Relaxed));
            continue;
        }
        let Ok(mut tree) = Tree::new(store, key) else { continue };
        for page in [0, 1 << 20, 1 << 40, PAGES - 512] {
            let pages = page..(page + 15_000).min(PAGES);
            let told: u64 = tree.spans(pages.clone()).map(|(span, _)| span.end - span.start).sum();
            assert_eq!(told, pages.end - pages.start, "spans have no gaps");
            let _ = (tree.get(page), tree.next_not(pages.clone(), 0), tree.last_not(pages.clone(), 0));
            let _ = (tree.count(pages.clone(), 1), tree.counts(pages.clone()));
            let _ = tree.set(page + 3..page + 5, 1);
            let _ = tree.set(page..page + 512, 2);
            let _ = tree.set(pages, 0);
        }
    }
    store.keys().into_iter().for_each(|key| store.remove(key));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_store_is_an_error_or_answers(damages in prop::collection::vec(damage(), 1..6)) {
        let store = filled();
        damages.iter().for_each(|damage| damage.apply(store.words()));
        if let Ok(store) = again(&store) {
            use_all(&store);
        }
    }

    /// Whoever holds the descriptor may write while we run, too.
    #[test]
    fn corruption_after_opening_leads_nowhere_outside_the_store(damages in prop::collection::vec(damage(), 1..6)) {
        let store = filled();
        let store = again(&store).unwrap();
        damages.iter().for_each(|damage| damage.apply(store.words()));
        use_all(&store);
    }
}

/// The purpose of each check; without one of them the walk would run in a circle or out of the memory.
#[test]
fn open_error_names_each_kind_of_damage() {
    let after = |at: usize, value: u64| {
        let store = filled();
        store.words()[at].store(value, Relaxed);
        again(&store).unwrap_err()
    };
    let root = filled().load(DIRECTORY);
    let node = root as u32;
    assert_eq!(after(AT_MAGIC, 5), OpenError::Foreign);
    assert_eq!(after(AT_VERSION, 2), OpenError::Version { found: 2 });
    let bytes = BLOCKS * BLOCK_BYTES;
    assert_eq!(after(AT_LENGTH, 8), OpenError::Length { says: 8, has: bytes });
    assert_eq!(after(AT_SLOTS, 5000), OpenError::Damaged { slot: SLOTS, found: 5000 });
    let (slot, inside) = (0, node as usize * LEAF_WORDS);
    let entry = |found: u32| OpenError::Damaged { slot, found: found.into() };
    assert_eq!(after(inside, node.into()), entry(node), "a circle");
    let outside = BLOCKS as u32 * LEAVES;
    assert_eq!(after(inside, outside.into()), entry(outside), "outside");
    assert_eq!(after(inside, 70), entry(70), "the header");
    assert_eq!(after(DIRECTORY, of_tree(6, node)), OpenError::Damaged { slot, found: of_tree(6, node) });
    assert_eq!(after(DIRECTORY, of_tree(1, node + 1)), entry(node + 1), "no node starts there");
    let twice = after(DIRECTORY + SLOT, root);
    assert_eq!(twice, OpenError::Damaged { slot: 1, found: node.into() }, "one node of two trees");
    let same = after(DIRECTORY + SLOT + 1, 0);
    assert!(matches!(same, OpenError::Damaged { slot: 1, .. }), "two roots of one key: {same}");
    let table = (TABLE << 56) | 0xff_ffff << 32 | 40;
    assert_eq!(after(DIRECTORY + 3 * SLOT, table), OpenError::Damaged { slot: 3, found: table });
}
