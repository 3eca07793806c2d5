//! `kill -9` at random points: what the daemon wrote is there, replays clean up to its end, and the next one takes over.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use passgate::client::{AddMemory, Answer, Channel, Outcome, PageState};
use passgate::observe::replay::replay;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};

use crate::daemon::Daemon;

const PAGES: u64 = 64;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_passgate"))
}

pub fn arguments(state: &Path) -> Vec<&str> {
    vec![
        "--iommu",
        "soft",
        "--device",
        "soft:0",
        "--allow-dma",
        "--audit-segment",
        "1M",
        "--audit-keep",
        "1000",
        "--state-dir",
        state.to_str().unwrap(),
    ]
}

/// A daemon with a state directory.
pub fn start(path: &Path, state: &Path) -> Daemon {
    let daemon = Daemon::start_at(program(), path, &arguments(state));
    // It listens before it is ready to be stopped; what it answers it answers after.
    daemon.client().status().unwrap();
    daemon
}

pub fn page(page: u64) -> PageRange<Gpa> {
    PageRange::new(page * PAGE, PAGE).unwrap()
}

/// Converts until the daemon is gone; how often it did, also in `done`.
fn convert(channel: &mut Channel, memory: &GuestFile, done: &AtomicU64) -> u64 {
    for count in 0.. {
        done.store(count, Ordering::Relaxed);
        let to = if count % 3 == 0 { PageState::Private } else { PageState::Shared };
        let Ok(answer) = channel.begin(page(count % PAGES), to, Some(20_000)) else { return count };
        let Answer::Granted { invalidation } = answer else { panic!("{answer:?}") };
        memory.punch(count % PAGES * PAGE, PAGE).unwrap();
        if channel.end(invalidation, Outcome::Committed).is_err() {
            return count;
        }
    }
    0
}

#[test]
fn a_daemon_killed_at_any_point_leaves_a_log_that_replays_clean() {
    let place = tempfile::tempdir().unwrap();
    let (path, state) = (place.path().join("socket"), place.path().join("state"));
    let mut converted = 0;
    for round in 0..10 {
        let mut daemon = start(&path, &state);
        let memory = GuestFile::memfd("killed", PAGES * PAGE).unwrap();
        let mut client = daemon.client();
        client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&memory]).unwrap();
        let mut channel = client.open_channel().unwrap();
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let converting = scope.spawn(|| convert(&mut channel, &memory, &done));
            // Any moment will do; in every other round one in which there is something in the log.
            while round % 2 == 1 && done.load(Ordering::Relaxed) < 30 && !converting.is_finished() {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(3 + round * 17));
            daemon.kill();
            converted += converting.join().unwrap();
        });
        daemon.silence();
    }
    assert!(converted > 100, "{converted}");
    let report = replay(&[state], |_, _| {}).unwrap();
    assert_eq!(report.runs.len(), 10);
    for run in &report.runs {
        assert_eq!(run.problems, [], "run {}", run.run);
        assert!(run.whole && run.notes.is_empty(), "{:?}", run.notes);
    }
    // Each conversion that the client was told of is in it, with its begin and its end.
    let answers: u64 = report.runs.iter().map(|run| run.answers).sum();
    assert!(answers >= 2 * converted, "{answers} answers of {converted} conversions");
}

/// The program itself, on a log: exit code and what it says.
pub fn run(arguments: &[&str], log: &[PathBuf]) -> (Option<i32>, String) {
    let out = std::process::Command::new(program()).args(arguments).args(log).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code(), said)
}
