//! Quarantine survives `kill -9` of the daemon: the next daemon in the same state directory keeps it for the same memory.

use std::path::Path;

use passgate::gate::{Caller, ClientId, Door, Event, InvalidationId, Policy};
use passgate::observe::audit::Run;
use passgate::observe::replay::replay;
use passgate::session::quarantine_file::{FILE, QuarantineFile};
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::words;
use passgate_client::{AddMemory, Answer, Client, Outcome, PageState};
use serde_json::Value;

use crate::daemon::{Daemon, TIMEOUT, serve_fails, wait_until};
use crate::killed::{arguments, page, run, start};

/// The page whose conversion has an unknown outcome, and its neighbour.
const LOST_PAGE: u64 = 3;
const INTACT_PAGE: u64 = 4;
const PAGES: u64 = 8;

fn add_memory(daemon: &Daemon, memory: &GuestFile) -> Client {
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[memory]).unwrap();
    client
}

/// Begins a conversion of the page and ends it with an unknown outcome; returns the invalidation.
fn lose_page(client: &mut Client) -> u64 {
    let mut channel = client.open_channel().unwrap();
    let Answer::Granted { invalidation } = channel.begin(page(LOST_PAGE), PageState::Private, None).unwrap()
    else {
        panic!("not granted");
    };
    channel.end(invalidation, Outcome::Unknown { errno: 5, offset: 0 }).unwrap();
    invalidation
}

/// Asserts that neither DMA nor a conversion reaches the lost page, and that its neighbour is not affected.
fn assert_out_of_reach(client: &mut Client, memory: &GuestFile) {
    let mut channel = client.open_channel().unwrap();
    match channel.begin(page(LOST_PAGE), PageState::Shared, None) {
        Ok(Answer::Quarantined { gpa }) => assert_eq!(gpa, page(LOST_PAGE).start()),
        other => panic!("begun again: {other:?}"),
    }
    memory.store(LOST_PAGE * PAGE, 0xA5).unwrap();
    memory.store(INTACT_PAGE * PAGE, 0x5A).unwrap();
    assert!(client.dma_read("soft:0", LOST_PAGE * PAGE, 8).is_err(), "the device reads it");
    assert!(client.dma_write("soft:0", LOST_PAGE * PAGE, &[1; 8]).is_err(), "the device writes it");
    assert_eq!(memory.load(LOST_PAGE * PAGE), Ok(0xA5));
    assert_eq!(client.dma_read("soft:0", INTACT_PAGE * PAGE, 1).unwrap(), [0x5A]);
    let quarantine = client.status().unwrap().quarantine;
    let [range] = &quarantine[..] else { panic!("{quarantine:?}") };
    assert_eq!(
        (range.gpa, range.length, range.cause.as_str()),
        (Some(LOST_PAGE * PAGE), PAGE, "owner-unknown")
    );
}

#[test]
fn quarantine_survives_sigkill_and_is_logged() {
    let dir = tempfile::tempdir().unwrap();
    let (path, state) = (dir.path().join("socket"), dir.path().join("state"));
    let memory = GuestFile::memfd("restart", PAGES * PAGE).unwrap();
    let mut daemon = start(&path, &state);
    let mut client = add_memory(&daemon, &memory);
    let invalidation = lose_page(&mut client);
    assert_out_of_reach(&mut client, &memory);
    daemon.kill();
    daemon.wait_stderr_closed();
    for _ in 0..2 {
        let mut daemon = start(&path, &state);
        let mut client = add_memory(&daemon, &memory);
        assert_out_of_reach(&mut client, &memory);
        daemon.kill();
        daemon.wait_stderr_closed();
    }
    assert!(replay(std::slice::from_ref(&state), |_, _| {}).unwrap().is_clean());
    let (code, output) = run(&["replay"], std::slice::from_ref(&state));
    assert!(code == Some(0) && output.lines().count() == 3 && output.contains("clean"), "{code:?} {output}");
    let id = invalidation.to_string();
    let (code, output) =
        run(&["explain", "--json", "--invalidation", &id, "--log"], std::slice::from_ref(&state));
    let receipt: Value = serde_json::from_str(&output).unwrap();
    assert_eq!((code, &receipt["outcome"]["unknown"]["errno"]), (Some(0), &Value::from(5)));

    // A quarantine file that is missing is unknown quarantine, also where its `boot-` marker is missing too.
    std::fs::remove_file(state.join(FILE)).unwrap();
    for _ in 0..2 {
        let (code, output) = serve_fails(program(), &path, &arguments(&state));
        assert!(code == Some(1) && output.contains(FILE) && output.contains("unknown"), "{code:?} {output}");
        let marks = std::fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().path());
        let marks = marks.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("boot-"));
        marks.for_each(|path| std::fs::remove_file(path).unwrap());
    }
    // A daemon that starts with another directory, and so without the quarantine, is detected by a replay of both.
    let other = dir.path().join("other");
    let daemon = start(&path, &other);
    drop((add_memory(&daemon, &memory), daemon));
    let (code, output) = run(&["replay"], &[state, other]);
    assert!(
        code == Some(1) && output.contains("was in quarantine when the last run ended"),
        "{code:?} {output}"
    );
}

#[test]
fn operator_release_ends_quarantine_for_next_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let (path, state) = (dir.path().join("socket"), dir.path().join("state"));
    let memory = GuestFile::memfd("restart", PAGES * PAGE).unwrap();
    let mut daemon = start(&path, &state);
    let mut client = add_memory(&daemon, &memory);
    let invalidation = lose_page(&mut client);
    daemon.kill();
    daemon.wait_stderr_closed();

    // By the gate alone: restore the quarantine as the next daemon does, and release it as an operator does.
    let boot = Run::find(std::slice::from_ref(&state)).unwrap().pop().unwrap().head.boot;
    let mut keep = QuarantineFile::new(&state, boot);
    let events = keep.load(true).unwrap();
    assert_eq!(events.len(), 1);
    assert!(QuarantineFile::new(&state, "another boot".into()).load(false).unwrap().is_empty());
    let (mut gate, mut effects) = (passgate::gate::Gate::new(Policy::default(), words::private), Vec::new());
    events.into_iter().for_each(|event| gate.handle(event, &mut effects));
    let caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };
    let (invalidation, to) = (InvalidationId(invalidation), passgate::gate::PageState::Shared);
    gate.handle(Event::Release { caller, invalidation, to }, &mut effects);
    keep.save(&gate.snapshot().quarantine);

    let daemon = start(&path, &state);
    let mut client = add_memory(&daemon, &memory);
    memory.store(LOST_PAGE * PAGE, 0xA5).unwrap();
    assert_eq!(client.dma_read("soft:0", LOST_PAGE * PAGE, 1).unwrap(), [0xA5]);
    assert_eq!(client.status().unwrap().quarantine, []);
}

#[test]
fn state_directory_is_exclusive_to_one_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let first = start(&dir.path().join("one"), &state);
    let (code, output) = serve_fails(program(), &dir.path().join("two"), &arguments(&state));
    assert_eq!(code, Some(1));
    assert!(output.contains("another daemon uses it") && output.contains("--state-dir"), "{output}");
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&state).unwrap().permissions()) & 0o777,
        0o700
    );
    drop(first);
}

/// A limit of file sizes (`LimitFSIZE=`) below a segment of the log: the kernel sends SIGXFSZ, whose default ends a process.
#[test]
fn file_size_limit_loses_the_log_and_not_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let (path, state) = (dir.path().join("socket"), dir.path().join("state"));
    let mut daemon = std::process::Command::new("sh")
        .args(["-c", "ulimit -f 256; exec \"$0\" serve --socket-path \"$@\""])
        .arg(program())
        .arg(&path)
        .args(arguments(&state))
        .spawn()
        .unwrap();
    let serves = wait_until(TIMEOUT, || {
        assert_eq!(daemon.try_wait().unwrap(), None, "the daemon has ended");
        Client::connect(&path).is_ok()
    });
    assert!(serves);
    let memory = GuestFile::memfd("limited", PAGES * PAGE).unwrap();
    let mut client = Client::connect(&path).unwrap();
    client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&memory]).unwrap();
    assert!(client.metrics().unwrap().lines().any(|line| {
        line.strip_prefix("passgate_audit_lines_unwritten ").is_some_and(|count| count != "0")
    }));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn unreadable_quarantine_file_refuses_start_without_blocking() {
    let dir = tempfile::tempdir().unwrap();
    let (path, state) = (dir.path().join("socket"), dir.path().join("state"));
    let file = state.join(FILE);
    drop(start(&path, &state));
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("damaged", |file| std::fs::write(file, "{\"boot\":").unwrap()),
        ("empty", |file| std::fs::write(file, "").unwrap()),
        ("a FIFO", |file| {
            let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
            rustix::fs::mknodat(rustix::fs::CWD, file, kind, mode, 0).unwrap();
        }),
        ("a link to an endless file", |file| std::os::unix::fs::symlink("/dev/zero", file).unwrap()),
    ];
    for (case, damage) in damages {
        std::fs::remove_file(&file).unwrap();
        damage(&file);
        let (code, output) = serve_fails(program(), &path, &arguments(&state));
        assert_eq!(code, Some(1), "{case}: {output}");
        assert!(output.contains(FILE) && output.contains("move the directory away"), "{case}: {output}");
    }
    // A FIFO in the place of a log segment must not block the start either.
    std::fs::remove_dir_all(&state).unwrap();
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&state).unwrap();
    let log = state.join("audit-00000000.jsonl");
    rustix::fs::mknodat(rustix::fs::CWD, &log, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    let (code, output) = serve_fails(program(), &path, &arguments(&state));
    assert!(code == Some(1) && output.contains("no regular file"), "{code:?} {output}");
}

#[test]
fn state_directory_writable_by_others_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (path, state) = (dir.path().join("socket"), dir.path().join("state"));
    drop(start(&path, &state));
    let mode = std::os::unix::fs::PermissionsExt::from_mode;
    for bits in [0o777, 0o770, 0o702] {
        std::fs::set_permissions(&state, mode(bits)).unwrap();
        let (code, output) = serve_fails(program(), &path, &arguments(&state));
        assert!(code == Some(1) && output.contains("chmod go-w"), "{code:?} {output}");
    }
    // With the sticky bit others can add files, but cannot change or replace the daemon's.
    std::fs::set_permissions(&state, mode(0o1777)).unwrap();
    drop(start(&path, &state));
    std::fs::set_permissions(&state, mode(0o755)).unwrap();
    drop(start(&path, &state));
}

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_passgate"))
}
