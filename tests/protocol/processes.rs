//! The program itself: the commands of an operator, and a daemon that runs out of descriptors.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::SystemTime;

use passgate::gate::Policy;
use passgate_bindings::PAGE;
use passgate_client::{AddMemory, Client, Outcome, PageState};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

use crate::common::{assert_refused, exclusive, granted, memory, pages};
use crate::daemon::{Daemon, TIMEOUT, wait_until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_passgate");

fn daemon(arguments: &[&str]) -> Daemon {
    Daemon::start(Path::new(PROGRAM), &[&["--device", "soft:0", "--no-guardian"], arguments].concat())
}

fn passgate(daemon: &Daemon, arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.arg(arguments[0]).arg("--socket-path").arg(&daemon.path).args(&arguments[1..]).output().unwrap()
}

/// Returns the standard output of a command that must succeed.
fn stdout_of(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = passgate(daemon, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn operator_releases_quarantine_and_daemon_logs_who() {
    let _exclusive = exclusive();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(0, 2 * PAGE), &[&*memory(2)]).unwrap();
    let mut channel = client.open_channel().unwrap();
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, None));
    channel.end(invalidation, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();

    let status = stdout_of(&daemon, &["status"]);
    assert!(status.contains("QUARANTINE 0x0+0x1000: owner-unknown"), "{status}");
    assert!(status.contains("when DMA does not stop: refuse; platform: contained"), "{status}");
    assert!(status.contains("device soft:0: can be stopped by unmap, drain, reset"), "{status}");
    let id = invalidation.to_string();
    let unknown_id = passgate(&daemon, &["release", "--invalidation", "99", "--as", "hole"]);
    assert_eq!((unknown_id.status.code(), unknown_id.stdout.len()), (Some(1), 0));
    let released = stdout_of(&daemon, &["release", "--invalidation", &id, "--as", "shared", "--json"]);
    let released: serde_json::Value = serde_json::from_str(&released).unwrap();
    assert_eq!(released, serde_json::json!({"invalidation": invalidation, "bytes": PAGE}));
    let line = daemon
        .wait_for_line(&format!("asks to release the quarantine of invalidation {invalidation} as shared"));
    let uid = rustix::process::getuid().as_raw();
    assert!(line.contains("pid ") && line.contains(&format!("uid {uid} ")), "{line}");
    daemon.wait_for_line("range.released");
    assert_eq!(client.status().unwrap().quarantine, []);
    assert!(stdout_of(&daemon, &["metrics"]).ends_with("\n# EOF\n"));
}

/// A running command, killed when dropped, also where a test fails.
struct RunningCommand(Child);

impl Drop for RunningCommand {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl RunningCommand {
    fn start(daemon: &Daemon, arguments: &[&str]) -> (Self, impl Iterator<Item = String> + use<>) {
        let mut command = Command::new(PROGRAM);
        command.arg(arguments[0]).arg("--socket-path").arg(&daemon.path).args(&arguments[1..]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        (Self(child), stdout.lines().map_while(Result::ok))
    }

    /// Waits for the end of the command; returns true if it succeeded.
    fn exits_with_success(&mut self) -> bool {
        let mut status = None;
        wait_until(TIMEOUT, || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.is_some_and(|status| status.success())
    }
}

#[test]
fn top_ends_on_signal_or_daemon_exit() {
    let _exclusive = exclusive();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(0, 4 * PAGE), &[&*memory(4)]).unwrap();
    let text = stdout_of(&daemon, &["top", "--once", "--interval", "0.1"]);
    assert!(text.contains("mappings: 4 of 16384 (4 at worst); 16 KiB mapped, 0 in quarantine"), "{text}");
    assert!(text.contains("device soft:0: running; can be stopped by unmap, drain, reset"), "{text}");
    assert!(!text.contains('\x1b'), "escape sequences without a terminal: {text}");

    let (mut top, mut lines) = RunningCommand::start(&daemon, &["top", "--interval", "0.1"]);
    let mut channel = client.open_channel().unwrap();
    // It keeps running and shows the conversions that happen meanwhile.
    let shows_conversions = lines.by_ref().take(400).any(|line| {
        let invalidation = granted(channel.begin(pages(0, 1), PageState::Shared, None));
        channel.end(invalidation, Outcome::NotCommitted).unwrap();
        line.starts_with("conversions/s: ") && !line.contains(" 0 done") && line.contains("within")
    });
    assert!(shows_conversions, "no conversion was shown");
    kill_process(Pid::from_child(&top.0), Signal::INT).unwrap();
    assert!(top.exits_with_success(), "SIGINT must end top with success");

    let (mut top, mut lines) = RunningCommand::start(&daemon, &["top", "--interval", "3600"]);
    let (mut events, mut event_lines) = RunningCommand::start(&daemon, &["events", "--after", "0", "--json"]);
    wait_until(TIMEOUT, || client.status().unwrap().clients == 4);
    client.remove_memory(1).unwrap();
    let event: serde_json::Value = serde_json::from_str(&event_lines.next().unwrap()).unwrap();
    assert_eq!((&event["event"], &event["sequence"]), (&"region.closed".into(), &1.into()));
    assert_eq!(event["instance"], client.status().unwrap().instance);
    daemon.terminate();
    assert!(
        top.exits_with_success() && events.exits_with_success(),
        "the end of the daemon must end top and events with success"
    );
    assert_eq!(lines.next(), None);
}

/// Returns how often the thread of the loop has blocked (voluntary context switches).
fn loop_waits(daemon: &Daemon) -> u64 {
    let tasks = format!("/proc/{}/task", daemon.pid().as_raw_nonzero());
    for task in std::fs::read_dir(tasks).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
        if status.starts_with("Name:\tloop\n") {
            let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            return count.unwrap().trim().parse().unwrap();
        }
    }
    panic!("there is no thread `loop`");
}

#[test]
fn closed_stdout_ends_following_commands_and_their_connections() {
    let _exclusive = exclusive();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    for arguments in [
        &["events"][..],
        &["events", "--after", "0", "--json"],
        &["top", "--interval", "3600"],
        &["top", "--interval", "0.1"],
    ] {
        let (mut command, printed) = RunningCommand::start(&daemon, arguments);
        assert!(wait_until(TIMEOUT, || client.status().unwrap().clients > 1), "{arguments:?}");
        // No event occurs, so the command writes nothing that could fail with EPIPE.
        drop(printed);
        assert!(command.exits_with_success(), "{arguments:?}");
        assert!(wait_until(TIMEOUT, || client.status().unwrap().clients == 1), "{arguments:?}");
    }
    // The same while the command prints much.
    for _ in 0..500 {
        let region = client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap().region;
        client.remove_memory(region).unwrap();
    }
    let (mut events, mut printed) = RunningCommand::start(&daemon, &["events", "--after", "0"]);
    assert!(printed.next().unwrap().contains(" 1 region.closed "));
    drop(printed);
    assert!(events.exits_with_success());
}

#[test]
fn events_are_printed_with_utc_time() {
    let _exclusive = exclusive();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as u64;
    let before = now();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap();
    client.remove_memory(1).unwrap();
    let after = now();
    let (_json, mut lines) = RunningCommand::start(&daemon, &["events", "--after", "0", "--json"]);
    let event: serde_json::Value = serde_json::from_str(&lines.next().unwrap()).unwrap();
    assert!((before..=after).contains(&event["time_ms"].as_u64().unwrap()), "{event}");
    let (_text, mut lines) = RunningCommand::start(&daemon, &["events", "--after", "0"]);
    let line = lines.next().unwrap();
    let (time, rest) = line.split_once(' ').unwrap();
    assert!(
        time.starts_with("20") && time.ends_with('Z') && time.len() == "2026-11-29T12:00:00.000Z".len(),
        "{line}"
    );
    assert!(rest.starts_with("1 region.closed "), "{line}");
}

/// Returns the number of open files of a daemon, and its lowest free descriptor number; inherited files may have any number.
fn open_files(daemon: &Daemon) -> (u64, u64) {
    let files = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid().as_raw_nonzero())).unwrap();
    let numbers: Vec<u64> =
        files.map(|file| file.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    (numbers.len() as u64, (0..).find(|number| !numbers.contains(number)).unwrap())
}

/// Sets RLIMIT_NOFILE of a daemon: it can open no descriptor of this number or above. Open files stay open.
fn set_file_limit(daemon: &Daemon, files: u64) {
    let new_limit = Rlimit { current: Some(files), maximum: getrlimit(Resource::Nofile).maximum };
    prlimit(Some(daemon.pid()), Resource::Nofile, new_limit).unwrap();
}

#[test]
fn connections_without_free_descriptors_are_refused_with_reason() {
    let _exclusive = exclusive();
    let dir = tempfile::tempdir().unwrap();
    let metrics = dir.path().join("metrics");
    let daemon = daemon(&["--metrics-path", metrics.to_str().unwrap()]);
    let mut client = daemon.client();
    client.status().unwrap();
    set_file_limit(&daemon, open_files(&daemon).1 + 3);
    // Some connections still fit; every later one is refused with the reason, whether the client sends or reads first.
    let mut others = Vec::new();
    let error = loop {
        let mut other = daemon.client();
        match other.status() {
            Ok(_) => others.push(other),
            Err(error) => break error,
        }
        assert!(others.len() < 60, "the limit of files has no effect");
    };
    assert!(matches!(error, passgate_client::Error::Refused { errno: 24, .. }), "{error}");
    assert!(error.to_string().contains("raise its limit (`LimitNOFILE=`)"), "{error}");
    for _ in 0..100 {
        let mut scraper = UnixStream::connect(&metrics).unwrap();
        let mut response = String::new();
        scraper.read_to_string(&mut response).unwrap();
        assert!(response.starts_with("HTTP/1.1 503 ") && response.contains("LimitNOFILE="), "{response}");
        assert!(daemon.client().status().is_err());
        client.status().unwrap();
    }
    daemon.wait_for_line("no connection can be accepted");
    drop(others);
    assert!(wait_until(TIMEOUT, || client.status().unwrap().clients == 1));
    daemon.client().status().unwrap();
}

#[test]
fn daemon_without_descriptors_sleeps_until_one_is_closed() {
    let _exclusive = exclusive();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    client.status().unwrap();
    let files = open_files(&daemon).1;
    // So few that not even the spare descriptor can be used.
    set_file_limit(&daemon, 3);
    let mut others: Vec<Client> = (0..8).map(|_| daemon.client()).collect();
    daemon.wait_for_line("no connection can be accepted");
    // The loop blocks repeatedly although connections wait. A loop that retried all the time would never block.
    let before = loop_waits(&daemon);
    assert!(wait_until(TIMEOUT, || loop_waits(&daemon) >= before + 5), "the loop retries without a pause");
    client.status().unwrap();
    set_file_limit(&daemon, files + 100);
    others.iter_mut().for_each(|other| _ = other.status().unwrap());
    drop(others);
    assert!(wait_until(TIMEOUT, || client.status().unwrap().clients == 1));
}

#[test]
fn call_with_lost_descriptors_is_refused_and_changes_nothing() {
    let _exclusive = exclusive();
    let daemon = daemon(&[]);
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap();
    let (status_before, files) = (client.status().unwrap(), open_files(&daemon));
    set_file_limit(&daemon, 3);
    let memory = memory(1);
    let lost = client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*memory]);
    assert_refused(lost, 24, "were lost: raise its limit (`ulimit -n`, `LimitNOFILE=`)");
    assert_refused(client.open_channel(), 24, "LimitNOFILE=");
    let mut status_after = client.status().unwrap();
    status_after.totals.wrong = status_before.totals.wrong;
    assert_eq!((status_after, open_files(&daemon)), (status_before, files));
    set_file_limit(&daemon, files.1 + 100);
    client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*memory]).unwrap();
    client.open_channel().unwrap().echo().unwrap();
}

#[test]
fn max_regions_fit_whatever_soft_file_limit() {
    let _exclusive = exclusive();
    // By a script: a limit of this process would be one of other tests, too. Another process writes it, for while this one had it open
    // a child of another test might have it open as well (ETXTBSY).
    let dir = tempfile::tempdir().unwrap();
    let limited = dir.path().join("limited");
    let script = format!("#!/bin/sh\nulimit -S -n 256\nexec {PROGRAM} \"$@\"\n");
    let write = ["-c", "printf %s \"$1\" >\"$0\" && chmod 700 \"$0\""];
    let written = Command::new("sh").args(write).arg(&limited).arg(script).status().unwrap();
    assert!(written.success());
    let daemon = Daemon::start(&limited, &["--device", "soft:0", "--no-guardian"]);
    let mut client = daemon.client();
    let max_regions = u64::from(Policy::default().max_regions);
    for nth in 0..max_regions {
        client.add_memory(&AddMemory::shared(nth << 30, PAGE), &[&*memory(1)]).unwrap();
    }
    assert_eq!(client.status().unwrap().regions.len() as u64, max_regions);
    assert!(open_files(&daemon).0 > max_regions, "each region needs a file of its own");
    let more = client.add_memory(&AddMemory::shared(max_regions << 30, PAGE), &[&*memory(1)]);
    assert_refused(more, 28, "the limit is 512");
}
