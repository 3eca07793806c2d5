//! An unmodified log replays without problems; gaps that the daemon itself leaves are found.

use std::time::Instant;

use passgate::gate::{InvalidationId, Outcome, PageState, Performer};
use passgate::observe::audit::LogOptions;
use passgate::observe::replay::{explain, replay};
use passgate_bindings::PAGE;

use crate::harness::{Harness, options};

/// Returns the number of conversions of the long run.
fn conversion_target() -> u64 {
    std::env::var("PASSGATE_CONVERSIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000)
}

#[test]
fn long_run_with_faults_replays_clean() {
    let dir = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let mut harness = Harness::new(dir.path(), 1000);
    while harness.conversions < conversion_target() {
        harness.step();
    }
    harness.deliver_all();
    let (conversions, [done, not_done]) = (harness.conversions, harness.verdicts);
    assert!(not_done > conversion_target() / 1000, "too few faults were injected");
    assert_eq!(harness.log.dropped(), 0);
    drop(harness);
    let written = started.elapsed();
    let report = replay(&[dir.path().into()], |_, _| {}).unwrap();
    assert!(report.is_clean(), "{:#?}", report.runs[0].problems);
    let [run] = &report.runs[..] else { panic!("one run, not {}", report.runs.len()) };
    assert!(run.whole && run.notes.is_empty(), "{:?}", run.notes);
    assert!(run.lines > 4 * conversion_target() && run.answers > 3 * conversion_target() / 2);
    println!(
        "{conversions} conversions, {done} done, {not_done} not: {} lines written in {written:.1?}, replayed in {:.1?}",
        run.lines,
        started.elapsed() - written
    );
}

#[test]
fn rotated_log_stays_bounded_and_replays_clean() {
    let dir = tempfile::tempdir().unwrap();
    let options = LogOptions { segment: 1 << 20, keep: 4, ..options() };
    let mut harness = Harness::with(dir.path(), options, 200);
    while harness.conversions < 20_000 {
        harness.step();
    }
    assert_eq!(harness.log.dropped(), 0);
    drop(harness);
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap()).collect();
    let bytes: u64 = files.iter().map(|file| file.metadata().unwrap().len()).sum();
    assert!((2..=4).contains(&files.len()) && bytes <= 4 << 20, "{} files of {bytes} bytes", files.len());
    let report = replay(&[dir.path().into()], |_, _| {}).unwrap();
    assert!(report.is_clean(), "{:#?}", report.runs[0].problems);
    let run = &report.runs[0];
    assert!(!run.whole && run.notes[0].contains("rotated away"), "{:?}", run.notes);
    assert!(run.lines > 1000);
}

#[test]
fn unwritable_log_blocks_nobody_and_records_gap() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let mut harness = Harness::with(&state, LogOptions { segment: 1 << 20, keep: 4, ..options() }, 0);
    // The log can create no new segment here; the open one stays writable.
    let elsewhere = dir.path().join("elsewhere");
    std::fs::rename(&state, &elsewhere).unwrap();
    while harness.log.dropped() < 1000 {
        harness.step();
    }
    std::fs::rename(&elsewhere, &state).unwrap();
    let dropped = |harness: &Harness| harness.log.dropped();
    // The log retries once a second: until then lines are dropped, after that they are not.
    let started = Instant::now();
    loop {
        let before = dropped(&harness);
        harness.step();
        if dropped(&harness) == before {
            break;
        }
        assert!(started.elapsed().as_secs() < 60, "the log never recovers");
    }
    harness.step();
    let lost = dropped(&harness);
    drop(harness);
    let report = replay(&[state], |_, _| {}).unwrap();
    let run = &report.runs[0];
    let [gap] = &run.problems[..] else { panic!("one gap, not {:#?}", run.problems) };
    let (_, missing) = gap.what.split_once("lines ").unwrap();
    let mut numbers = missing.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u64>().ok());
    let (from, to) = (numbers.next().unwrap(), numbers.next().unwrap());
    assert_eq!(to - from + 1, lost, "{}", gap.what);
}

#[test]
fn permanently_unwritable_log_shows_missing_end() {
    for killed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let mut harness = Harness::with(&state, LogOptions { segment: 1 << 20, keep: 4, ..options() }, 0);
        // The log can create no new segment here; the open one stays writable.
        let elsewhere = dir.path().join("elsewhere");
        std::fs::rename(&state, &elsewhere).unwrap();
        while harness.log.dropped() < 1000 {
            harness.step();
        }
        // The copy is the log as `kill -9` leaves it; the original is the log after an orderly end.
        let copied = dir.path().join("killed");
        std::fs::create_dir(&copied).unwrap();
        for file in std::fs::read_dir(&elsewhere).unwrap().map(|file| file.unwrap()) {
            std::fs::copy(file.path(), copied.join(file.file_name())).unwrap();
        }
        let lost = harness.log.dropped();
        drop(harness);
        let report = replay(&[if killed { copied } else { elsewhere }], |_, _| {}).unwrap();
        let [gap] = &report.runs[0].problems[..] else { panic!("{:#?}", report.runs[0].problems) };
        let expected =
            if killed { "nothing could be written".to_owned() } else { format!("{lost} were dropped") };
        assert!(gap.what.contains(&expected) && !report.is_clean(), "{}", gap.what);
    }
}

#[test]
fn missing_segment_is_detected_at_end_and_middle() {
    let dir = tempfile::tempdir().unwrap();
    let mut harness = Harness::with(dir.path(), LogOptions { segment: 1 << 20, keep: 1000, ..options() }, 0);
    while harness.conversions < 20_000 {
        harness.step();
    }
    drop(harness);
    let mut files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 3);
    let problems = |files: &[std::path::PathBuf]| {
        let report = replay(files, |_, _| {}).unwrap();
        report.runs.into_iter().flat_map(|run| run.problems).map(|problem| problem.what).collect::<Vec<_>>()
    };
    assert_eq!(problems(&files), [""; 0]);
    let without_last = problems(&files[..files.len() - 1]);
    assert!(without_last.iter().any(|text| text.contains("which is missing")), "{without_last:?}");
    let middle = [&files[..1], &files[2..]].concat();
    assert!(problems(&middle).iter().any(|text| text.contains("are missing")));
}

#[test]
fn receipt_is_rebuilt_from_log() {
    let dir = tempfile::tempdir().unwrap();
    let mut harness = Harness::new(dir.path(), 0);
    let id = harness.begin(3, 2, PageState::Private, Performer::Client).unwrap();
    harness.end(id, Outcome::Unknown { errno: 5, offset: 4096 });
    let (receipt, head) = explain(&[dir.path().into()], id).unwrap().unwrap();
    assert_eq!((receipt.invalidation, receipt.ranges.len() / PAGE, receipt.to), (id, 2, PageState::Private));
    // Two addresses in each of two domains.
    assert_eq!(receipt.steps.len(), 4);
    assert!(
        receipt.steps.iter().all(|step| step.took_ns == 1234
            && step.gone == step.asked
            && step.gone >= 8192
            && step.errno == 0)
    );
    assert_eq!(receipt.outcome, Some(Outcome::Unknown { errno: 5, offset: 4096 }));
    assert_eq!(head.devices, ["sim:0"]);
    assert!(explain(&[dir.path().into()], InvalidationId(999)).unwrap().is_none());
}
