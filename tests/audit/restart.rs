//! Quarantine survives the daemon: `kill -9`, another daemon in the same directory, the same memory.

use std::path::Path;

use passgate::client::{AddMemory, Answer, Client, Outcome, PageState};
use passgate::gate::{Caller, ClientId, Door, Event, InvalidationId, Policy};
use passgate::observe::audit::Run;
use passgate::observe::keep::{FILE, Keep};
use passgate::observe::replay::replay;
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;
use serde_json::Value;

use crate::daemon::{Daemon, serve_fails};
use crate::killed::{arguments, page, run, start};

/// The page of which nobody knows, and one beside it.
const LOST: u64 = 3;
const FINE: u64 = 4;
const PAGES: u64 = 8;

fn add(daemon: &Daemon, memory: &GuestFile) -> Client {
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[memory]).unwrap();
    client
}

/// A client begins, and cannot say what became of the page.
fn lose(client: &mut Client) -> u64 {
    let mut channel = client.open_channel().unwrap();
    let Answer::Granted { invalidation } = channel.begin(page(LOST), PageState::Private, None).unwrap()
    else {
        panic!("nothing holds the page");
    };
    channel.end(invalidation, Outcome::Unknown { errno: 5, offset: 0 }).unwrap();
    invalidation
}

/// Nothing reaches the lost page; the one beside it is as any other.
fn is_out_of_reach(client: &mut Client, memory: &GuestFile) {
    let mut channel = client.open_channel().unwrap();
    match channel.begin(page(LOST), PageState::Shared, None) {
        Err(passgate::Error::Refused { errno: 5, .. }) => {}
        other => panic!("begun again: {other:?}"),
    }
    memory.store(LOST * PAGE, 0xA5).unwrap();
    memory.store(FINE * PAGE, 0x5A).unwrap();
    assert!(client.dma_read("soft:0", LOST * PAGE, 8).is_err(), "the device reads it");
    assert!(client.dma_write("soft:0", LOST * PAGE, &[1; 8]).is_err(), "the device writes it");
    assert_eq!(memory.load(LOST * PAGE), Ok(0xA5));
    assert_eq!(client.dma_read("soft:0", FINE * PAGE, 1).unwrap(), [0x5A]);
    let quarantine = client.status().unwrap().quarantine;
    let [range] = &quarantine[..] else { panic!("{quarantine:?}") };
    assert_eq!((range.gpa, range.length, range.cause.as_str()), (Some(LOST * PAGE), PAGE, "owner-unknown"));
}

#[test]
fn quarantine_survives_kill_9_and_the_log_knows() {
    let place = tempfile::tempdir().unwrap();
    let (path, state) = (place.path().join("socket"), place.path().join("state"));
    let memory = GuestFile::memfd("restart", PAGES * PAGE).unwrap();
    let mut daemon = start(&path, &state);
    let mut client = add(&daemon, &memory);
    let invalidation = lose(&mut client);
    is_out_of_reach(&mut client, &memory);
    daemon.kill();
    daemon.silence();
    for _ in 0..2 {
        let mut daemon = start(&path, &state);
        let mut client = add(&daemon, &memory);
        is_out_of_reach(&mut client, &memory);
        daemon.kill();
        daemon.silence();
    }
    assert!(replay(std::slice::from_ref(&state), |_, _| {}).unwrap().is_clean());
    let (code, said) = run(&["replay"], std::slice::from_ref(&state));
    assert!(code == Some(0) && said.lines().count() == 3 && said.contains("clean"), "{code:?} {said}");
    let id = invalidation.to_string();
    let (code, said) =
        run(&["explain", "--json", "--invalidation", &id, "--log"], std::slice::from_ref(&state));
    let receipt: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &receipt["outcome"]["unknown"]["errno"]), (Some(0), &Value::from(5)));

    // One that is gone is unknown, also where the mark of its use is gone with it.
    std::fs::remove_file(state.join(FILE)).unwrap();
    for _ in 0..2 {
        let (code, said) = serve_fails(program(), &path, &arguments(&state));
        assert!(code == Some(1) && said.contains(FILE) && said.contains("unknown"), "{code:?} {said}");
        let marks = std::fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().path());
        let marks = marks.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("boot-"));
        marks.for_each(|path| std::fs::remove_file(path).unwrap());
    }
    // A daemon that starts without it, elsewhere, is found out afterwards.
    let other = place.path().join("other");
    let daemon = start(&path, &other);
    drop((add(&daemon, &memory), daemon));
    let (code, said) = run(&["replay"], &[state, other]);
    assert!(code == Some(1) && said.contains("was in quarantine when the last run ended"), "{code:?} {said}");
}

#[test]
fn a_person_ends_a_quarantine_for_the_next_daemon_too() {
    let place = tempfile::tempdir().unwrap();
    let (path, state) = (place.path().join("socket"), place.path().join("state"));
    let memory = GuestFile::memfd("restart", PAGES * PAGE).unwrap();
    let mut daemon = start(&path, &state);
    let mut client = add(&daemon, &memory);
    let invalidation = lose(&mut client);
    daemon.kill();
    daemon.silence();

    // By the gate: what the next daemon is told, and a person's word.
    let boot = Run::find(std::slice::from_ref(&state)).unwrap().pop().unwrap().head.boot;
    let mut keep = Keep::new(&state, boot);
    let left = keep.load(true).unwrap();
    assert_eq!(left.len(), 1);
    assert!(Keep::new(&state, "another boot".into()).load(false).unwrap().is_empty());
    let (mut gate, mut effects) = (passgate::gate::Gate::new(Policy::default()), Vec::new());
    left.into_iter().for_each(|event| gate.handle(event, &mut effects));
    let caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };
    let (invalidation, to) = (InvalidationId(invalidation), passgate::gate::PageState::Shared);
    gate.handle(Event::Release { caller, invalidation, to }, &mut effects);
    keep.save(&gate.snapshot().quarantine, false);

    let daemon = start(&path, &state);
    let mut client = add(&daemon, &memory);
    memory.store(LOST * PAGE, 0xA5).unwrap();
    assert_eq!(client.dma_read("soft:0", LOST * PAGE, 1).unwrap(), [0xA5]);
    assert_eq!(client.status().unwrap().quarantine, []);
}

#[test]
fn two_daemons_do_not_share_a_directory() {
    let place = tempfile::tempdir().unwrap();
    let state = place.path().join("state");
    let first = start(&place.path().join("one"), &state);
    let (code, said) = serve_fails(program(), &place.path().join("two"), &arguments(&state));
    assert_eq!(code, Some(1));
    assert!(said.contains("another daemon uses it") && said.contains("--state-dir"), "{said}");
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&state).unwrap().permissions()) & 0o777,
        0o700
    );
    drop(first);
}

#[test]
fn a_quarantine_that_cannot_be_read_refuses_the_start_and_keeps_nobody_waiting() {
    let place = tempfile::tempdir().unwrap();
    let (path, state) = (place.path().join("socket"), place.path().join("state"));
    let file = state.join(FILE);
    drop(start(&path, &state));
    type Spoil = fn(&Path);
    let spoils: [(&str, Spoil); 4] = [
        ("damaged", |file| std::fs::write(file, "{\"boot\":").unwrap()),
        ("empty", |file| std::fs::write(file, "").unwrap()),
        ("a FIFO", |file| {
            let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
            rustix::fs::mknodat(rustix::fs::CWD, file, kind, mode, 0).unwrap();
        }),
        ("a link to what has no end", |file| std::os::unix::fs::symlink("/dev/zero", file).unwrap()),
    ];
    for (what, spoil) in spoils {
        std::fs::remove_file(&file).unwrap();
        spoil(&file);
        let (code, said) = serve_fails(program(), &path, &arguments(&state));
        assert_eq!(code, Some(1), "{what}: {said}");
        assert!(said.contains(FILE) && said.contains("move the directory away"), "{what}: {said}");
    }
    // A file of the log that waits for a writer keeps nobody waiting either.
    std::fs::remove_dir_all(&state).unwrap();
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&state).unwrap();
    let log = state.join("audit-00000000.jsonl");
    rustix::fs::mknodat(rustix::fs::CWD, &log, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    let (code, said) = serve_fails(program(), &path, &arguments(&state));
    assert!(code == Some(1) && said.contains("no regular file"), "{code:?} {said}");
}

#[test]
fn a_directory_that_others_may_write_to_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let (path, state) = (place.path().join("socket"), place.path().join("state"));
    drop(start(&path, &state));
    let mode = std::os::unix::fs::PermissionsExt::from_mode;
    for bits in [0o777, 0o770, 0o702] {
        std::fs::set_permissions(&state, mode(bits)).unwrap();
        let (code, said) = serve_fails(program(), &path, &arguments(&state));
        assert!(code == Some(1) && said.contains("chmod go-w"), "{code:?} {said}");
    }
    // Others can put files beside the daemon's, and change none.
    std::fs::set_permissions(&state, mode(0o1777)).unwrap();
    drop(start(&path, &state));
    std::fs::set_permissions(&state, mode(0o755)).unwrap();
    drop(start(&path, &state));
}

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_passgate"))
}
