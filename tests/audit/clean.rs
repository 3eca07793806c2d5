//! What was not touched replays clean.

use std::time::Instant;

use passgate::gate::{InvalidationId, Outcome, PageState, Performer};
use passgate::observe::audit::LogOptions;
use passgate::observe::replay::{explain, replay};
use passgate_bindings::PAGE;

use crate::play::{Play, options};

/// Conversions of the long run.
fn wanted() -> u64 {
    std::env::var("PASSGATE_CONVERSIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000)
}

#[test]
fn a_long_run_with_everything_that_goes_wrong_replays_clean() {
    let dir = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let mut play = Play::new(dir.path(), 1000);
    while play.conversions < wanted() {
        play.step();
    }
    play.settle();
    let (conversions, [done, not_done]) = (play.conversions, play.verdicts);
    assert!(not_done > wanted() / 1000, "what goes wrong is rehearsed");
    assert_eq!(play.log.dropped(), 0);
    drop(play);
    let written = started.elapsed();
    let report = replay(&[dir.path().into()], |_, _| {}).unwrap();
    assert!(report.is_clean(), "{:#?}", report.runs[0].problems);
    let [run] = &report.runs[..] else { panic!("one run, not {}", report.runs.len()) };
    assert!(run.whole && run.notes.is_empty(), "{:?}", run.notes);
    assert!(run.lines > 4 * wanted() && run.answers > 3 * wanted() / 2);
    println!(
        "{conversions} conversions, {done} done, {not_done} not: {} lines written in {written:.1?}, replayed in {:.1?}",
        run.lines,
        started.elapsed() - written
    );
}

#[test]
fn a_log_keeps_its_bounds_and_is_checked_as_far_as_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    let options = LogOptions { segment: 1 << 20, keep: 4, ..options() };
    let mut play = Play::with(dir.path(), options, 200);
    while play.conversions < 20_000 {
        play.step();
    }
    assert_eq!(play.log.dropped(), 0);
    drop(play);
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
fn a_log_that_cannot_be_written_stops_nobody_and_shows_the_gap() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let mut play = Play::with(&state, LogOptions { segment: 1 << 20, keep: 4, ..options() }, 0);
    // Nothing new can be made here; what is open stays so.
    let elsewhere = dir.path().join("elsewhere");
    std::fs::rename(&state, &elsewhere).unwrap();
    while play.log.dropped() < 1000 {
        play.step();
    }
    std::fs::rename(&elsewhere, &state).unwrap();
    let dropped = |play: &Play| play.log.dropped();
    // It is tried again once a second: until then lines are dropped, and then they are not.
    let began = Instant::now();
    loop {
        let before = dropped(&play);
        play.step();
        if dropped(&play) == before {
            break;
        }
        assert!(began.elapsed().as_secs() < 60, "the log never comes back");
    }
    play.step();
    let lost = dropped(&play);
    drop(play);
    let report = replay(&[state], |_, _| {}).unwrap();
    let run = &report.runs[0];
    let [gap] = &run.problems[..] else { panic!("one gap, not {:#?}", run.problems) };
    let (_, missing) = gap.what.split_once("lines ").unwrap();
    let mut numbers = missing.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u64>().ok());
    let (from, to) = (numbers.next().unwrap(), numbers.next().unwrap());
    assert_eq!(to - from + 1, lost, "{}", gap.what);
}

#[test]
fn a_log_that_is_never_written_again_shows_that_its_end_is_missing() {
    for killed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let mut play = Play::with(&state, LogOptions { segment: 1 << 20, keep: 4, ..options() }, 0);
        // Nothing new can be made here; what is open stays so.
        let elsewhere = dir.path().join("elsewhere");
        std::fs::rename(&state, &elsewhere).unwrap();
        while play.log.dropped() < 1000 {
            play.step();
        }
        // As it is while the daemon lives, and so as kill -9 leaves it; or after an end in order.
        let killed_at = dir.path().join("killed");
        std::fs::create_dir(&killed_at).unwrap();
        for file in std::fs::read_dir(&elsewhere).unwrap().map(|file| file.unwrap()) {
            std::fs::copy(file.path(), killed_at.join(file.file_name())).unwrap();
        }
        let lost = play.log.dropped();
        drop(play);
        let report = replay(&[if killed { killed_at } else { elsewhere }], |_, _| {}).unwrap();
        let [gap] = &report.runs[0].problems[..] else { panic!("{:#?}", report.runs[0].problems) };
        let says =
            if killed { "nothing could be written".to_owned() } else { format!("{lost} were dropped") };
        assert!(gap.what.contains(&says) && !report.is_clean(), "{}", gap.what);
    }
}

#[test]
fn a_file_that_is_missing_is_missed_at_the_end_as_in_the_middle() {
    let dir = tempfile::tempdir().unwrap();
    let mut play = Play::with(dir.path(), LogOptions { segment: 1 << 20, keep: 1000, ..options() }, 0);
    while play.conversions < 20_000 {
        play.step();
    }
    drop(play);
    let mut files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 3);
    let problems = |files: &[std::path::PathBuf]| {
        let report = replay(files, |_, _| {}).unwrap();
        report.runs.into_iter().flat_map(|run| run.problems).map(|one| one.what).collect::<Vec<_>>()
    };
    assert_eq!(problems(&files), [""; 0]);
    let without_last = problems(&files[..files.len() - 1]);
    assert!(without_last.iter().any(|what| what.contains("which is missing")), "{without_last:?}");
    let middle = [&files[..1], &files[2..]].concat();
    assert!(problems(&middle).iter().any(|what| what.contains("are missing")));
}

#[test]
fn a_receipt_is_made_again_from_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let mut play = Play::new(dir.path(), 0);
    let id = play.begin(3, 2, PageState::Private, Performer::Client).unwrap();
    play.end(id, Outcome::Unknown { errno: 5, offset: 4096 });
    let (receipt, head) = explain(&[dir.path().into()], id).unwrap().unwrap();
    assert_eq!((receipt.invalidation, receipt.ranges.len() / PAGE, receipt.to), (id, 2, PageState::Private));
    // Two addresses in two domains.
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
