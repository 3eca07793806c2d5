mod plain;

use passgate_bindings::words;

use super::*;
use crate::gate::ids::JobId;

fn range(page: u64, pages: u64) -> PageRange<Iova> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

fn mapped(parts: &[(u64, u64, u64)]) -> Mapped {
    let mut mapped = Mapped::new(words::private);
    for (page, pages, piece) in parts {
        mapped.insert(Run::filling(range(*page, *pages), piece * PAGE, JobId(1)));
        mapped.made(Iova(page * PAGE));
    }
    mapped
}

fn live(mapped: &Mapped) -> Vec<PageRange<Iova>> {
    mapped.live(range(0, 1 << 20)).collect()
}

#[test]
fn mapping_borders_lie_on_the_grid_and_stay() {
    let mut mapped = mapped(&[(3, 30, 8)]);
    assert_eq!((mapped.mapping_count(), mapped.bytes()), (5, 30 * PAGE));
    assert_eq!(mapped.whole(range(9, 1)), range(8, 8));
    assert_eq!(mapped.whole(range(0, 5)), range(0, 8));
    assert_eq!(mapped.whole(range(15, 2)), range(8, 16));
    assert_eq!(mapped.whole(range(32, 8)), range(32, 8));
    assert_eq!(mapped.whole(range(40, 8)), range(40, 8));
    let run = mapped.take(range(8, 8), RunState::Removing(JobId(2)));
    assert_eq!((run.bytes, run.mapping_count, mapped.mapping_count()), (8 * PAGE, 1, 5));
    assert!(!mapped.is_clear(range(9, 1)) && mapped.unsettled() == 1);
    mapped.remove(Iova(8 * PAGE));
    assert_eq!((mapped.mapping_count(), mapped.bytes()), (4, 22 * PAGE));
    assert_eq!(live(&mapped), [range(3, 5), range(16, 17)]);
}

#[test]
fn cut_leaves_two_mappings_and_includes_the_gap() {
    let mut mapped = mapped(&[(0, 16, 16), (20, 4, 16)]);
    let run = mapped.take(range(5, 2), RunState::Removing(JobId(2)));
    assert_eq!((run.bytes, run.mapping_count), (2 * PAGE, 1));
    assert_eq!(mapped.mapping_count(), 4, "left, the run, right, and the other");
    mapped.remove(run.range.start());
    assert_eq!((mapped.mapping_count(), live(&mapped)), (3, vec![range(0, 5), range(7, 9), range(20, 4)]));
    assert_eq!(mapped.whole(range(10, 1)), range(7, 9));
    let run = mapped.take(range(8, 14), RunState::Removing(JobId(3)));
    assert_eq!((run.bytes, run.mapping_count), (10 * PAGE, 2));
    mapped.mark(run.range.start(), RunState::Suspect { gone: Some(PAGE), errno: 5 });
    assert_eq!(mapped.bytes(), (5 + 1 + 9 + 2) * PAGE);
    assert!(!mapped.is_clear(range(17, 1)), "what the call covers may not be mapped meanwhile");
}

/// The same done to both; then everything that can be asked of both.
struct Both {
    tree: Mapped,
    plain: plain::Plain,
    runs: Vec<PageRange<Iova>>,
}

/// Pages told apart: over the border of a node.
const SPAN: u64 = (1 << 18) + 2000;

impl Both {
    fn clear_parts(&self, range: PageRange<Iova>) -> Vec<PageRange<Iova>> {
        let taken = self.plain.taken(range);
        gaps(range, taken.into_iter()).collect()
    }

    fn map(&mut self, range: PageRange<Iova>, piece: u64) {
        for part in self.clear_parts(range) {
            let run = Run::filling(part, piece, JobId(7));
            self.tree.insert(run);
            self.plain.insert(run);
            self.runs.push(part);
        }
    }

    /// Takes every part of `range` that is in no run.
    fn take(&mut self, range: PageRange<Iova>, state: RunState) {
        let runs: Vec<_> = self.plain.runs(range).map(|run| run.range).collect();
        for part in gaps(range, runs.into_iter()) {
            assert_eq!(self.tree.take(part, state), self.plain.take(part, state));
            self.runs.push(part);
        }
    }

    fn settle(&mut self, at: usize, made: bool) {
        let start = self.runs.swap_remove(at).start();
        if made && matches!(self.plain.at(start), Some(Run { state: RunState::Filling { .. }, .. })) {
            self.tree.made(start);
            self.plain.made(start);
        } else {
            assert_eq!(self.tree.remove(start), self.plain.remove(start));
        }
    }

    fn agree(&self, range: PageRange<Iova>) {
        let (tree, plain) = (&self.tree, &self.plain);
        assert_eq!((tree.mapping_count(), tree.bytes()), (plain.mapping_count(), plain.bytes()));
        assert_eq!((tree.unsettled(), tree.filling()), (plain.unsettled(), plain.filling()));
        assert_eq!(tree.is_clear(range), plain.is_clear(range));
        assert!(tree.live(range).eq(plain.live(range)), "live in {range}");
        assert!(tree.runs(range).eq(plain.runs(range)), "runs in {range}");
        assert_eq!(tree.taken(range), plain.taken(range));
        assert_eq!(tree.extent(range), plain.extent(range), "extent of {range}");
        assert_eq!(tree.whole(range), plain.whole(range), "whole of {range}");
        assert_eq!(tree.starts(range), plain.starts(range));
        let cached = RunState::Cached;
        assert_eq!(tree.in_state(cached), plain.in_state(cached));
        assert_eq!(tree.at(range.start()), plain.at(range.start()));
    }
}

#[test]
fn mapped_table_agrees_with_a_plain_one() {
    let mut seed = 11u64;
    let mut random = |n: u64| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % n
    };
    let mut both =
        Both { tree: Mapped::new(words::private), plain: plain::Plain::default(), runs: Vec::new() };
    for _ in 0..6000 {
        let longest = [1, 3, 64, 600, 5000, SPAN][random(6) as usize];
        let len = 1 + random(longest);
        let place = range(random(SPAN - len + 1), len);
        let piece = PAGE << [0, 1, 3, 9, 9, 10, 18, 40][random(8) as usize];
        let state =
            [RunState::Removing(JobId(3)), RunState::Cached, RunState::Leaking(JobId(4))][random(3) as usize];
        match random(8) {
            // Small pieces only where they are few, or the plain one would take all day.
            0..3 => both.map(place, if len > 5000 { piece.max(PAGE << 9) } else { piece }),
            3 => both.take(place, state),
            4 if !both.runs.is_empty() => {
                let start = both.runs[random(both.runs.len() as u64) as usize].start();
                let state = RunState::Suspect { gone: Some(PAGE * random(3)), errno: 5 };
                if both.plain.at(start).is_some_and(|run| run.state.unsettled()) {
                    both.tree.mark(start, state);
                    both.plain.mark(start, state);
                }
            }
            _ => {}
        }
        while both.runs.len() > 6 {
            both.settle(random(both.runs.len() as u64) as usize, random(3) > 0);
        }
        both.agree(place);
        let from = random(SPAN - 40);
        both.agree(range(from, 1 + random(40)));
        both.agree(range(from, 1));
        both.agree(range(0, SPAN));
    }
    assert!(both.tree.mapping_count() > 100);
}

#[test]
fn terabyte_of_equal_mappings_takes_almost_no_memory() {
    for bits in [0, 9, 14, 18, 27] {
        let store = Store::new(passgate_bindings::words::Words::anonymous(1 << 20).unwrap()).unwrap();
        let mut mapped = Mapped::in_store(&store, DomainId(1)).unwrap();
        for part in 0..1024 {
            let part = range(part << 18, 1 << 18);
            mapped.insert(Run::filling(part, PAGE << bits, JobId(1)));
            mapped.made(part.start());
        }
        assert_eq!((mapped.mapping_count(), mapped.bytes()), (1 << (28 - bits.min(18)), 1 << 40));
        assert!(store.footprint() < 24 << 10, "{} bytes of pieces of 2^{bits} pages", store.footprint());
        assert_eq!(
            mapped.whole(range(12345, 1)),
            range(12345 >> bits.min(18) << bits.min(18), 1 << bits.min(18))
        );
    }
}

#[test]
fn run_in_progress_at_process_end_reopens_as_suspect() {
    let store = Store::new(passgate_bindings::words::Words::anonymous(1 << 20).unwrap()).unwrap();
    let mut mapped = Mapped::in_store(&store, DomainId(1)).unwrap();
    mapped.insert(Run::filling(range(0, 1024), 512 * PAGE, JobId(1)));
    mapped.made(Iova(0));
    mapped.take(range(8, 2), RunState::Removing(JobId(2)));
    mapped.insert(Run::filling(range(5000, 64), PAGE, JobId(3)));
    let live: Vec<_> = mapped.live(range(0, 9000)).collect();
    drop(mapped);
    let again = Mapped::in_store(&store, DomainId(1)).unwrap();
    assert!(again.live(range(0, 9000)).eq(live));
    let runs: Vec<_> = again.runs(range(0, 9000)).map(|run| (run.range, run.bytes, run.state)).collect();
    let doubt = RunState::Suspect { gone: None, errno: 0 };
    assert_eq!(runs, [(range(8, 2), 2 * PAGE, doubt), (range(5000, 64), 64 * PAGE, doubt)]);
    assert_eq!((again.unsettled(), again.mapping_count()), (2, 3 + 2));
    assert_eq!(again.whole(range(20, 1)), range(10, 502));
    again.discard();
    assert!(store.keys().is_empty());
}

/// Killed between the pages of a run and the page behind it, which begins a mapping from then on.
#[test]
fn mapping_cut_off_by_a_run_is_found_at_opening() {
    let store = Store::new(passgate_bindings::words::Words::anonymous(1 << 20).unwrap()).unwrap();
    let mut mapped = Mapped::in_store(&store, DomainId(1)).unwrap();
    mapped.insert(Run::filling(range(0, 512), 512 * PAGE, JobId(1)));
    mapped.made(Iova(0));
    mapped.tree.set(8..10, IN_RUN).unwrap();
    drop(mapped);
    let again = Mapped::in_store(&store, DomainId(1)).unwrap();
    assert_eq!((again.mapping_count(), again.whole(range(20, 1))), (3, range(10, 502)));
}

#[test]
fn full_store_puts_indistinct_mappings_in_doubt() {
    let small = passgate_bindings::words::Words::anonymous((32 << 10) + 3 * 2048).unwrap();
    let store = Store::new(small).unwrap();
    let mut mapped = Mapped::in_store(&store, DomainId(1)).unwrap();
    mapped.insert(Run::filling(range(0, 1 << 18), PAGE << 9, JobId(1)));
    mapped.made(Iova(0));
    // One leaf after another, until there is no room for one.
    let mut taken = 0;
    while mapped.runs(range(0, 1 << 18)).all(|run| run.state == RunState::Cached) {
        mapped.take(range(taken * 512 + 7, 1), RunState::Cached);
        taken += 1;
        assert!(taken < 512, "there was room for all");
    }
    let last = taken - 1;
    let runs: Vec<_> = mapped.runs(range(last * 512, 512)).collect();
    let doubt = RunState::Suspect { gone: None, errno: NO_SPACE };
    assert_eq!(runs.iter().map(|run| run.state).collect::<Vec<_>>(), [doubt, RunState::Cached, doubt]);
    assert_eq!(runs.iter().map(|run| run.range.pages()).sum::<u64>(), 512, "nothing of it is forgotten");
    assert_eq!(mapped.bytes(), (1 << 18) * PAGE);
    // Beyond what the tree can grow to it is known as a run alone, and stays one.
    let far = range(1 << 40, 4);
    mapped.insert(Run::filling(far, PAGE, JobId(9)));
    assert!(!mapped.is_clear(far));
    mapped.made(far.start());
    assert_eq!(mapped.at(far.start()).map(|run| (run.range, run.state)), Some((far, doubt)));
}
