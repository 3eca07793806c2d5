//! `kill -9` at random points: the log replays without problems up to its end, and the next daemon starts.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use passgate::observe::replay::replay;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};
use passgate_client::{AddMemory, Answer, Channel, Outcome, PageState};

use crate::daemon::Daemon;

const PAGES: u64 = 64;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_passgate"))
}

/// Returns the arguments of a daemon with a software device and small log segments.
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

/// Starts a daemon with a state directory.
pub fn start(path: &Path, state: &Path) -> Daemon {
    let daemon = Daemon::start_at(program(), path, &arguments(state));
    // It listens before it is ready to be stopped, and answers calls only once it is.
    daemon.client().status().unwrap();
    daemon
}

/// Returns the guest-physical range of one page.
pub fn page(page: u64) -> PageRange<Gpa> {
    PageRange::new(page * PAGE, PAGE).unwrap()
}

/// Converts pages until the daemon has died. Returns the number of conversions, which it also stores in `done`.
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
fn killed_daemon_leaves_log_that_replays_clean() {
    let dir = tempfile::tempdir().unwrap();
    let (path, state) = (dir.path().join("socket"), dir.path().join("state"));
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
            // Any time will do; in every other round, one at which the log has conversions.
            while round % 2 == 1 && done.load(Ordering::Relaxed) < 30 && !converting.is_finished() {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(3 + round * 17));
            daemon.kill();
            converted += converting.join().unwrap();
        });
        daemon.wait_stderr_closed();
    }
    assert!(converted > 100, "{converted}");
    let report = replay(&[state], |_, _| {}).unwrap();
    assert_eq!(report.runs.len(), 10);
    for run in &report.runs {
        assert_eq!(run.problems, [], "run {}", run.run);
        assert!(run.whole && run.notes.is_empty(), "{:?}", run.notes);
    }
    // Each conversion that was answered to the client is in the log, with the answers to its begin and its end.
    let answers: u64 = report.runs.iter().map(|run| run.answers).sum();
    assert!(answers >= 2 * converted, "{answers} answers of {converted} conversions");
}

/// Runs passgate on a log; returns its exit code and output.
pub fn run(arguments: &[&str], log: &[PathBuf]) -> (Option<i32>, String) {
    let result = std::process::Command::new(program()).args(arguments).args(log).output().unwrap();
    let output =
        String::from_utf8_lossy(&result.stdout).into_owned() + &String::from_utf8_lossy(&result.stderr);
    (result.status.code(), output)
}
