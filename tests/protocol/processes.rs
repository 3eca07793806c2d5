//! The program itself: what a person runs against a daemon, and a daemon that runs out of descriptors.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use passgate::client::{AddMemory, Client, Outcome, PageState};
use passgate_bindings::PAGE;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

use crate::common::{alone, granted, memory, pages};
use crate::daemon::{Daemon, LONG, until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_passgate");

fn daemon(arguments: &[&str]) -> Daemon {
    Daemon::start(Path::new(PROGRAM), &[&["--device", "soft:0", "--no-guardian"], arguments].concat())
}

fn passgate(daemon: &Daemon, arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.arg(arguments[0]).arg("--socket-path").arg(&daemon.path).args(&arguments[1..]).output().unwrap()
}

/// What it prints, where it goes well.
fn says(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = passgate(daemon, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_person_sees_what_is_in_quarantine_releases_it_and_the_daemon_writes_down_who() {
    let _alone = alone();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(0, 2 * PAGE), &[&*memory(2)]).unwrap();
    let mut channel = client.open_channel().unwrap();
    let begun = granted(channel.begin(pages(0, 1), PageState::Private, None));
    channel.end(begun, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();

    let status = says(&daemon, &["status"]);
    assert!(status.contains("QUARANTINE 0x0+0x1000: owner-unknown"), "{status}");
    assert!(status.contains("when DMA does not stop: refuse; platform: contained"), "{status}");
    assert!(status.contains("device soft:0: can be stopped by unmap, drain, reset"), "{status}");
    let id = begun.to_string();
    let nothing = passgate(&daemon, &["release", "--invalidation", "99", "--as", "hole"]);
    assert_eq!((nothing.status.code(), nothing.stdout.len()), (Some(1), 0));
    let released = says(&daemon, &["release", "--invalidation", &id, "--as", "shared", "--json"]);
    let released: serde_json::Value = serde_json::from_str(&released).unwrap();
    assert_eq!(released, serde_json::json!({"invalidation": begun, "bytes": PAGE}));
    let line = daemon.says(&format!("asks to release the quarantine of invalidation {begun} as shared"));
    let uid = rustix::process::getuid().as_raw();
    assert!(line.contains("pid ") && line.contains(&format!("uid {uid} ")), "{line}");
    daemon.says("range.released");
    assert_eq!(client.status().unwrap().quarantine, []);
    assert!(says(&daemon, &["metrics"]).ends_with("\n# EOF\n"));
}

/// Kills what a failing test leaves behind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn start(daemon: &Daemon, arguments: &[&str]) -> (Self, impl Iterator<Item = String> + use<>) {
        let mut command = Command::new(PROGRAM);
        command.arg(arguments[0]).arg("--socket-path").arg(&daemon.path).args(&arguments[1..]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        (Self(child), stdout.lines().map_while(Result::ok))
    }

    fn ends_well(&mut self) -> bool {
        let mut status = None;
        until(LONG, || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.is_some_and(|status| status.success())
    }
}

#[test]
fn top_shows_the_daemon_and_ends_when_it_is_told_or_the_daemon_goes() {
    let _alone = alone();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(0, 4 * PAGE), &[&*memory(4)]).unwrap();
    let once = says(&daemon, &["top", "--once", "--interval", "0.1"]);
    assert!(once.contains("mappings: 4 of 16384 (4 at worst); 16 KiB mapped, 0 in quarantine"), "{once}");
    assert!(once.contains("device soft:0: running; can be stopped by unmap, drain, reset"), "{once}");
    assert!(!once.contains('\x1b'), "this is no terminal: {once}");

    let (mut top, mut lines) = Running::start(&daemon, &["top", "--interval", "0.1"]);
    let mut channel = client.open_channel().unwrap();
    // It goes on and shows what happens meanwhile.
    let busy = lines.by_ref().take(400).any(|line| {
        let begun = granted(channel.begin(pages(0, 1), PageState::Shared, None));
        channel.end(begun, Outcome::NotCommitted).unwrap();
        line.starts_with("conversions/s: ") && !line.contains(" 0 done") && line.contains("within")
    });
    assert!(busy, "no conversion was shown");
    kill_process(Pid::from_child(&top.0), Signal::INT).unwrap();
    assert!(top.ends_well(), "it was told to end");

    let (mut top, mut lines) = Running::start(&daemon, &["top", "--interval", "3600"]);
    let (mut events, mut told) = Running::start(&daemon, &["events", "--after", "0", "--json"]);
    until(LONG, || client.status().unwrap().clients == 4);
    client.remove_memory(1).unwrap();
    let event: serde_json::Value = serde_json::from_str(&told.next().unwrap()).unwrap();
    assert_eq!((&event["event"], &event["sequence"]), (&"region.closed".into(), &1.into()));
    assert_eq!(event["instance"], client.status().unwrap().instance);
    daemon.terminate();
    assert!(top.ends_well() && events.ends_well(), "the daemon has gone");
    assert_eq!(lines.next(), None);
}

/// How often the thread that runs the loop has waited for something.
fn waited(daemon: &Daemon) -> u64 {
    let tasks = format!("/proc/{}/task", daemon.pid().as_raw_nonzero());
    for task in std::fs::read_dir(tasks).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
        if status.starts_with("Name:\tloop\n") {
            let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            return count.unwrap().trim().parse().unwrap();
        }
    }
    panic!("there is no loop");
}

#[test]
fn a_daemon_without_descriptors_rests_and_goes_on_when_one_is_closed() {
    let _alone = alone();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    client.status().unwrap();
    let open =
        std::fs::read_dir(format!("/proc/{}/fd", daemon.pid().as_raw_nonzero())).unwrap().count() as u64;
    let limit = Rlimit { current: Some(open + 3), maximum: getrlimit(Resource::Nofile).maximum };
    prlimit(Some(daemon.pid()), Resource::Nofile, limit).unwrap();
    let mut others: Vec<Client> = (0..8).map(|_| Client::connect(&daemon.path).unwrap()).collect();
    daemon.says("no connection can be accepted");
    // It waits, again and again, though somebody is at the door. One that tried all the time would never.
    let before = waited(&daemon);
    assert!(until(LONG, || waited(&daemon) >= before + 5), "it does nothing but try");
    client.status().unwrap();
    // The first that were accepted go: the others' turn comes.
    while others.len() > 2 {
        let mut first = others.remove(0);
        first.status().unwrap();
    }
    for client in &mut others {
        client.status().unwrap();
    }
    drop(others);
    assert!(until(LONG, || client.status().unwrap().clients == 1));
}
