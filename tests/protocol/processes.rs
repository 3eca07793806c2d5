//! The program itself: what a person runs against a daemon, and a daemon that runs out of descriptors.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::SystemTime;

use passgate::client::{AddMemory, Client, Outcome, PageState};
use passgate::gate::Policy;
use passgate_bindings::PAGE;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit, setrlimit};

use crate::common::{alone, assert_refused, granted, memory, pages};
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
fn reader_that_goes_ends_what_follows_the_daemon_and_frees_its_connections() {
    let _alone = alone();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    for arguments in [
        &["events"][..],
        &["events", "--after", "0", "--json"],
        &["top", "--interval", "3600"],
        &["top", "--interval", "0.1"],
    ] {
        let (mut command, printed) = Running::start(&daemon, arguments);
        assert!(until(LONG, || client.status().unwrap().clients > 1), "{arguments:?}");
        // Nothing happens, so that nothing is written that could fail.
        drop(printed);
        assert!(command.ends_well(), "{arguments:?}");
        assert!(until(LONG, || client.status().unwrap().clients == 1), "{arguments:?}");
    }
    // And where it goes in the middle of much that is printed.
    for _ in 0..500 {
        let region = client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap().region;
        client.remove_memory(region).unwrap();
    }
    let (mut events, mut printed) = Running::start(&daemon, &["events", "--after", "0"]);
    assert!(printed.next().unwrap().contains(" 1 region.closed "));
    drop(printed);
    assert!(events.ends_well());
}

#[test]
fn events_are_printed_with_the_time_of_day() {
    let _alone = alone();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as u64;
    let before = now();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap();
    client.remove_memory(1).unwrap();
    let after = now();
    let (_json, mut lines) = Running::start(&daemon, &["events", "--after", "0", "--json"]);
    let event: serde_json::Value = serde_json::from_str(&lines.next().unwrap()).unwrap();
    assert!((before..=after).contains(&event["time_ms"].as_u64().unwrap()), "{event}");
    let (_text, mut lines) = Running::start(&daemon, &["events", "--after", "0"]);
    let line = lines.next().unwrap();
    let (time, rest) = line.split_once(' ').unwrap();
    assert!(
        time.starts_with("20") && time.ends_with('Z') && time.len() == "2026-11-29T12:00:00.000Z".len(),
        "{line}"
    );
    assert!(rest.starts_with("1 region.closed "), "{line}");
}

/// Files that a daemon has open: how many, and the lowest number that none has. Those that it inherits may have any.
fn open(daemon: &Daemon) -> (u64, u64) {
    let files = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid().as_raw_nonzero())).unwrap();
    let numbers: Vec<u64> =
        files.map(|file| file.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    (numbers.len() as u64, (0..).find(|number| !numbers.contains(number)).unwrap())
}

/// Lets a daemon have no file of this number or above; what it has open stays so.
fn limit(daemon: &Daemon, files: u64) {
    let limit = Rlimit { current: Some(files), maximum: getrlimit(Resource::Nofile).maximum };
    prlimit(Some(daemon.pid()), Resource::Nofile, limit).unwrap();
}

#[test]
fn connections_to_a_daemon_without_descriptors_are_refused_with_the_reason() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let metrics = dir.path().join("metrics");
    let daemon = daemon(&["--metrics-path", metrics.to_str().unwrap()]);
    let mut client = daemon.client();
    client.status().unwrap();
    limit(&daemon, open(&daemon).1 + 3);
    // Some still fit; then all hear why not, whether they ask first or listen first.
    let mut others = Vec::new();
    let error = loop {
        let mut other = daemon.client();
        match other.status() {
            Ok(_) => others.push(other),
            Err(error) => break error,
        }
        assert!(others.len() < 60, "there is room without end");
    };
    assert!(matches!(error, passgate::Error::Refused { errno: 24, .. }), "{error}");
    assert!(error.to_string().contains("raise its limit (`LimitNOFILE=`)"), "{error}");
    for _ in 0..100 {
        let mut visitor = UnixStream::connect(&metrics).unwrap();
        let mut said = String::new();
        visitor.read_to_string(&mut said).unwrap();
        assert!(said.starts_with("HTTP/1.1 503 ") && said.contains("LimitNOFILE="), "{said}");
        assert!(daemon.client().status().is_err());
        client.status().unwrap();
    }
    daemon.says("no connection can be accepted");
    drop(others);
    assert!(until(LONG, || client.status().unwrap().clients == 1));
    daemon.client().status().unwrap();
}

#[test]
fn a_daemon_without_descriptors_rests_and_goes_on_when_one_is_closed() {
    let _alone = alone();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    client.status().unwrap();
    let files = open(&daemon).1;
    // So few that not even the one that is kept spare is of use.
    limit(&daemon, 3);
    let mut others: Vec<Client> = (0..8).map(|_| daemon.client()).collect();
    daemon.says("no connection can be accepted");
    // It waits, again and again, though somebody is at the door. One that tried all the time would never.
    let before = waited(&daemon);
    assert!(until(LONG, || waited(&daemon) >= before + 5), "it does nothing but try");
    client.status().unwrap();
    limit(&daemon, files + 100);
    others.iter_mut().for_each(|other| _ = other.status().unwrap());
    drop(others);
    assert!(until(LONG, || client.status().unwrap().clients == 1));
}

#[test]
fn call_whose_descriptors_were_lost_is_refused_and_changes_nothing() {
    let _alone = alone();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap();
    let (known, files) = (client.status().unwrap(), open(&daemon));
    limit(&daemon, 3);
    let memory = memory(1);
    let lost = client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*memory]);
    assert_refused(lost, 24, "were lost: raise its limit (`ulimit -n`, `LimitNOFILE=`)");
    assert_refused(client.open_channel(), 24, "LimitNOFILE=");
    let mut now = client.status().unwrap();
    now.totals.wrong = known.totals.wrong;
    assert_eq!((now, open(&daemon)), (known, files));
    limit(&daemon, files.1 + 100);
    client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*memory]).unwrap();
    client.open_channel().unwrap().echo().unwrap();
}

#[test]
fn as_many_regions_fit_as_are_promised_whatever_the_soft_limit_of_files() {
    let _alone = alone();
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(256), ..before }).unwrap();
    let daemon = daemon(&[]);
    setrlimit(Resource::Nofile, before).unwrap();
    let mut client = daemon.client();
    let most = u64::from(Policy::default().max_regions);
    for nth in 0..most {
        client.add_memory(&AddMemory::shared(nth << 30, PAGE), &[&*memory(1)]).unwrap();
    }
    assert_eq!(client.status().unwrap().regions.len() as u64, most);
    assert!(open(&daemon).0 > most, "each is a file of its own");
    let more = client.add_memory(&AddMemory::shared(most << 30, PAGE), &[&*memory(1)]);
    assert_refused(more, 28, "the limit is 512");
}
