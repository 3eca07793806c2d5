use std::sync::mpsc::channel;

use passgate_bindings::PAGE;

use super::*;

const EVENT_TIMEOUT: Duration = Duration::from_secs(20);
const GIB: u64 = 1 << 30;

fn pages(page: u64, count: u64) -> PageRange<Iova> {
    PageRange::new(page * PAGE, count * PAGE).unwrap()
}

fn segment(iova: u64, len: u32) -> Segment {
    Segment { iova: Iova(iova), len }
}

/// Makes a window of four slots with four ranges each, with these pages open.
fn window(open: &[PageRange<Iova>]) -> Arc<Window> {
    let window = Window::new(4, 4);
    open.iter().for_each(|range| window.open(*range));
    window
}

#[test]
fn only_open_pages_are_entered() {
    let window = window(&[]);
    let four = [segment(PAGE, 4 * PAGE as u32)];
    assert_eq!(window.enter(0, &four), Entered::Closed);
    window.open(pages(1, 4));
    assert_eq!(window.enter(0, &four), Entered::In);
    assert!(window.overlapping(pages(4, 1)) && window.overlapping(pages(0, 2)));
    assert!(!window.overlapping(pages(5, 1)) && !window.overlapping(pages(0, 1)));
    window.leave(0);
    assert!(window.idle() && !window.overlapping(pages(0, 8)));
    for beyond in [segment(PAGE, 4 * PAGE as u32 + 1), segment(PAGE - 1, 2), segment(5 * PAGE, 1)] {
        assert_eq!(window.enter(0, &[four[0], beyond]), Entered::Closed, "{beyond:?}");
    }
    assert!(window.idle(), "a refused request occupies no slot");
}

#[test]
fn closed_page_in_the_middle_refuses_the_request() {
    for hole in [0, 1, 63, 64, 65, 130, 199] {
        let window = window(&[pages(0, 200)]);
        let all = [segment(0, 200 * PAGE as u32)];
        assert_eq!(window.enter(0, &all), Entered::In);
        window.leave(0);
        window.close(pages(hole, 1));
        assert_eq!(window.enter(0, &all), Entered::Closed, "page {hole}");
        for page in 0..200 {
            let entered = window.enter(0, &[segment(page * PAGE + 8, 1)]);
            assert_eq!(entered == Entered::In, page != hole, "page {page}, hole {hole}");
            window.leave(0);
        }
    }
}

/// A slot has two ranges; the check nevertheless covers every run of a request.
#[test]
fn closed_page_in_any_run_of_a_request_refuses_it() {
    for runs in 1..=6u64 {
        let window = Window::new(1, 2);
        // Runs of three pages each, made of two adjacent segments, with a closed page between every two runs.
        let all: Vec<_> = (0..runs).flat_map(|run| [(run * 4, 1), (run * 4 + 1, 2)]).collect();
        let all: Vec<_> =
            all.into_iter().map(|(page, len)| segment(page * PAGE, len * PAGE as u32)).collect();
        (0..runs).for_each(|run| window.open(pages(run * 4, 3)));
        assert_eq!(window.enter(0, &all), Entered::In);
        for run in 0..runs {
            assert!(window.overlapping(pages(run * 4 + 2, 1)), "run {run} of {runs} is missed");
        }
        window.leave(0);
        for page in (0..runs).flat_map(|run| run * 4..run * 4 + 3) {
            window.close(pages(page, 1));
            assert_eq!(window.enter(0, &all), Entered::Closed, "page {page} of {runs} runs");
            assert!(window.idle());
            window.open(pages(page, 1));
        }
        assert_eq!(window.enter(0, &all), Entered::In);
    }
}

#[test]
fn pages_open_and_close_across_leaves_and_branches() {
    for border in [GIB, 512 * GIB, 1024 * GIB] {
        let around = PageRange::new(border - 3 * PAGE, 6 * PAGE).unwrap();
        let window = window(&[around]);
        let over = [segment(border - 3 * PAGE, 6 * PAGE as u32)];
        assert_eq!(window.enter(0, &over), Entered::In, "{border:#x}");
        window.leave(0);
        // The whole address space, most of which has no branch.
        window.close(PageRange::new(0, passgate_bindings::units::LIMIT).unwrap());
        assert_eq!(window.enter(0, &over), Entered::Closed);
        assert_eq!(window.enter(0, &[segment(border, 1)]), Entered::Closed);
    }
}

#[test]
fn invalid_segments_are_refused() {
    let end = REACH - PAGE;
    let window = window(&[pages(0, 16), PageRange::new(end, PAGE).unwrap()]);
    let wrong = [
        segment(0, 0),
        segment(u64::MAX, 1),
        segment(u64::MAX - 10, 100),
        segment(REACH, 1),
        segment(end, PAGE as u32 + 1),
        segment(1 << 62, 4096),
    ];
    for segment in wrong {
        assert_eq!(window.enter(0, &[segment]), Entered::Closed, "{segment:?}");
        assert_eq!(window.enter(0, &[super::Segment { iova: Iova(0), len: 1 }, segment]), Entered::Closed);
    }
    assert_eq!(window.enter(0, &[segment(end, PAGE as u32)]), Entered::In);
    assert_eq!(window.enter(4, &[segment(0, 1)]), Entered::Closed, "there is no such slot");
    window.leave(4);
    // No page beyond the limit can be opened.
    window.open(PageRange::new(REACH, PAGE).unwrap());
    assert_eq!(window.enter(0, &[segment(REACH, 1)]), Entered::Closed);
}

#[test]
fn last_range_of_a_slot_spans_the_rest() {
    let window = window(&[pages(0, 256)]);
    // Adjacent segments are one range.
    let touching: Vec<_> = (0..32).map(|page| segment(page * PAGE, PAGE as u32)).collect();
    assert_eq!(window.enter(0, &touching), Entered::In);
    assert!(window.overlapping(pages(31, 1)) && !window.overlapping(pages(32, 1)));
    window.leave(0);
    // Four ranges in a slot and seven in the request, the last ones not ascending.
    let apart: Vec<_> = [10, 20, 30, 60, 50, 70, 40].map(|page| segment(page * PAGE, PAGE as u32)).into();
    assert_eq!(window.enter(0, &apart), Entered::In);
    for page in [10, 20, 30, 40, 50, 60, 70] {
        assert!(window.overlapping(pages(page, 1)), "page {page}");
    }
    for page in [9, 11, 25, 39, 71] {
        assert!(!window.overlapping(pages(page, 1)), "page {page}");
    }
    window.leave(0);
    assert!(window.idle());
    // Pages that are only in the span need not be open.
    window.close(pages(45, 1));
    assert_eq!(window.enter(0, &apart), Entered::In);
}

#[test]
fn request_without_memory_counts_for_idle_only() {
    let window = window(&[pages(0, 1)]);
    assert_eq!(window.enter(1, &[]), Entered::In);
    assert!(!window.idle() && !window.overlapping(pages(0, 1)));
    window.pause();
    assert_eq!(window.enter(2, &[]), Entered::Paused);
    assert!(!window.await_idle(Duration::ZERO));
    window.leave(1);
    assert!(window.idle() && window.await_idle(EVENT_TIMEOUT));
    window.lift();
    assert_eq!(window.enter(1, &[]), Entered::In);
}

#[test]
fn void_ends_requests_entered_before() {
    let window = window(&[pages(0, 2)]);
    let first = [segment(0, 1)];
    assert_eq!(window.enter(0, &first), Entered::In);
    assert_eq!(window.enter(1, &[segment(PAGE, 1)]), Entered::In);
    window.pause();
    assert!(window.is_paused() && !window.idle());
    window.void();
    assert!(window.idle() && !window.overlapping(pages(0, 2)));
    window.lift();
    assert!(!window.is_paused());
    // One is entered again, in its slot, and the other leaves.
    assert_eq!(window.enter(0, &first), Entered::In);
    window.leave(1);
    assert!(window.overlapping(pages(0, 1)) && !window.overlapping(pages(1, 1)) && !window.idle());
}

#[test]
fn await_clear_ends_with_the_request_and_not_before() {
    let window = window(&[pages(0, 2)]);
    assert_eq!(window.enter(3, &[segment(0, 1)]), Entered::In);
    window.close(pages(0, 1));
    assert!(!window.await_clear(pages(0, 1), Duration::from_millis(1)));
    assert!(window.await_clear(pages(1, 1), Duration::ZERO), "nothing is in flight over another page");
    let (begun, wait_begun) = channel();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            begun.send(()).unwrap();
            window.await_clear(pages(0, 1), EVENT_TIMEOUT)
        });
        wait_begun.recv().unwrap();
        window.leave(3);
        assert!(waiting.join().unwrap());
    });
}

#[test]
fn close_reaches_open_pages_behind_missing_branches() {
    // In one branch of 512 GiB, with leaves of 1 GiB between them that do not exist; and in the next branch.
    let open = [GIB + PAGE, 5 * GIB, 300 * GIB + 7 * PAGE, 512 * GIB + 3 * GIB, 1024 * GIB];
    let window = window(&open.map(|at| pages(at / PAGE, 1)));
    let enters = |at: u64| {
        let entered = window.enter(0, &[segment(at, 1)]) == Entered::In;
        window.leave(0);
        entered
    };
    assert!(open.into_iter().all(enters));
    window.close(pages(0, 1024 * GIB / PAGE));
    assert_eq!(open.map(enters), [false, false, false, false, true]);
}

#[test]
fn request_of_a_later_era_counts_for_a_scan_of_an_earlier_era() {
    let slots = slots::Slots::new(1, 1);
    slots.publish(0, 2, [(PAGE, 2 * PAGE)].into_iter());
    for (era, counts) in [(0, true), (1, true), (2, true), (3, false)] {
        assert_eq!(slots.is_busy(0, era), counts, "era {era}");
        assert_eq!(slots.overlaps(0, era, PAGE, 2 * PAGE), counts, "era {era}");
    }
}
