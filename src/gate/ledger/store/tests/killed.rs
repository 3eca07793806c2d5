//! kill -9 at any instruction: whoever opens the store next finds every page as before or as after what was under way.

use std::ops::Range;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

use super::*;

/// Pages told apart in each of the trees: over borders of leaves and of the first node.
pub(super) const SPAN: u64 = span(1) + 3 * 512;
/// The first pages of the trees. The second has to grow for them.
pub(super) const BASES: [u64; 2] = [0, 1 << 30];
const KILLS: u64 = 250;

/// Returns operation `number`: a tree, its pages, a value; without pages the tree is removed.
pub(super) fn operation(number: u64) -> (usize, Option<Range<u64>>, u8) {
    let mut state = number;
    let mut random = |n: u64| {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    };
    let tree = random(2) as usize;
    if random(100) == 0 {
        return (tree, None, 0);
    }
    // Half of them within a few leaves, so that these are changed again and again.
    let (most, longest) = match random(2) {
        0 => (3 * 512, [1, 3, 64, 600][random(4) as usize]),
        _ => (SPAN, [1, 3, 64, 600, 5000, SPAN][random(6) as usize]),
    };
    let len = 1 + random(longest);
    let start = random(most - len + 1);
    (tree, Some(start..start + len), random(4) as u8)
}

/// The other process: does one operation after the other until it is killed. The counter is raised before each.
#[test]
#[ignore = "started by `sigkill_loses_no_page_state`, with a store as its standard input"]
fn child() {
    let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let store = Store::open(Words::from_fd(fd).unwrap()).unwrap();
    let table = store.table(key(9)).unwrap();
    let open = |tree: usize| Tree::new(&store, key(tree as u64)).unwrap();
    let mut trees = [Some(open(0)), Some(open(1))];
    for number in table[0].load(Relaxed).. {
        table[0].store(number + 1, Release);
        match operation(number) {
            (at, Some(pages), value) => {
                let tree = trees[at].get_or_insert_with(|| open(at));
                tree.set(BASES[at] + pages.start..BASES[at] + pages.end, value).unwrap();
            }
            (at, None, _) => trees[at].take().into_iter().for_each(Tree::discard),
        }
    }
}

fn start(store: &Store) -> Child {
    let fd = store.words().fd().unwrap().try_clone_to_owned().unwrap();
    let name = module_path!().split_once("::").unwrap().1;
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{name}::child"), "--ignored", "--test-threads=1"])
        .stdin(Stdio::from(fd))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

pub(super) fn apply(model: &mut [Vec<u8>; 2], number: u64) {
    let (tree, pages, value) = operation(number);
    let pages = pages.unwrap_or(0..SPAN);
    model[tree][pages.start as usize..pages.end as usize].fill(value);
}

#[test]
fn sigkill_loses_no_page_state() {
    let store = memfd(4 << 20);
    let room = store.room();
    let table = store.reserve(key(9), 1).unwrap();
    let mut model = [vec![0u8; SPAN as usize], vec![0u8; SPAN as usize]];
    let mut cut = 0;
    for round in 0..KILLS {
        let from = table[0].load(Relaxed);
        let until = from + 1 + (round * 7919) % 400;
        let mut child = start(&store);
        while table[0].load(Relaxed) < until {
            assert!(child.try_wait().unwrap().is_none(), "it died of itself");
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let last = table[0].load(Relaxed) - 1;
        (from..last).for_each(|number| apply(&mut model, number));
        let before = model.clone();
        apply(&mut model, last);
        let store = again(&store).unwrap();
        for (index, base) in BASES.into_iter().enumerate() {
            let tree = Tree::new(&store, key(index as u64)).unwrap();
            let (mut old, mut new) = (0, 0);
            for (span, value) in tree.spans(base..base + SPAN) {
                for page in (span.start - base) as usize..(span.end - base) as usize {
                    let (was, is) = (before[index][page], model[index][page]);
                    assert!(
                        value == was || value == is,
                        "{value} is neither {was} nor {is}: {last}, page {page}"
                    );
                    old += usize::from(was != is && value == was);
                    new += usize::from(was != is && value == is);
                    model[index][page] = value;
                }
            }
            cut += usize::from(old > 0 && new > 0);
            let beyond = tree.count(0..base, 0) + tree.count(base + SPAN..PAGES, 0);
            assert_eq!(beyond, PAGES - SPAN, "nothing else was touched");
        }
    }
    assert!(cut > 0, "some operation was cut in two");
    let store = again(&store).unwrap();
    store.keys().into_iter().for_each(|key| store.remove(key));
    assert_eq!(store.room(), room, "no crash leaks anything");
}
