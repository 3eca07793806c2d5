//! A real `passgate serve` process, for tests that kill it or what it serves.

#![allow(dead_code, unreachable_pub)] // each test binary uses a part of it

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use passgate::client::{Client, Event};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

/// How long anything may take that takes no time; what takes longer has failed.
pub const LONG: Duration = Duration::from_secs(60);

/// A daemon. When dropped it is asked to end, and must end well.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// All that was said, to be shown when the test fails.
    log: Arc<Mutex<Vec<String>>>,
    /// Lines of its standard error, and of its guardian's, which has the same.
    said: Receiver<String>,
    pub path: PathBuf,
    place: Option<TempDir>,
}

impl Daemon {
    /// Starts one at a socket of its own, and waits until it listens.
    pub fn start(program: &Path, arguments: &[&str]) -> Self {
        let place = TempDir::new().unwrap();
        let path = place.path().join("passgate.sock");
        let mut daemon = Self::start_at(program, &path, arguments);
        daemon.place = Some(place);
        daemon
    }

    /// Starts one at this socket, and waits until it listens.
    pub fn start_at(program: &Path, path: &Path, arguments: &[&str]) -> Self {
        let mut child = serve(program, path, arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let (say, said) = channel();
        let log = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                all.lock().unwrap().push(line.clone());
                let _ = say.send(line);
            }
        });
        let mut daemon = Self { child, log, said, path: path.to_owned(), place: None };
        let listens = until(LONG, || {
            assert!(daemon.child.try_wait().unwrap().is_none(), "the daemon has ended");
            Client::connect(path).is_ok()
        });
        assert!(listens, "nobody listens at {}", path.display());
        daemon
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.path).unwrap()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Its guardian, once there is one.
    pub fn guardian(&self) -> Option<Pid> {
        children(self.pid()).into_iter().next()
    }

    /// `kill -9`, and waits until it is dead.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to end, as a service manager does.
    pub fn terminate(&self) {
        kill_process(self.pid(), Signal::TERM).unwrap();
    }

    /// How it ended, within this time.
    pub fn ended(&mut self, within: Duration) -> ExitStatus {
        if let Ok(Some(status)) = self.child.try_wait() {
            return status;
        }
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
        let limit = Timespec::try_from(within).unwrap();
        let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(ready, 1, "the daemon has not ended within {within:?}");
        self.child.wait().unwrap()
    }

    /// Waits for a line with this in it.
    pub fn says(&self, what: &str) -> String {
        let begun = Instant::now();
        loop {
            match self.said.recv_timeout(LONG.saturating_sub(begun.elapsed())) {
                Ok(line) if line.contains(what) => return line,
                Ok(_) => {}
                Err(error) => panic!("nobody said `{what}`: {error}"),
            }
        }
    }

    /// Waits until nobody has its standard error any more, which is when the guardian is gone too; what was said
    /// until then.
    pub fn silence(&self) -> Vec<String> {
        let (begun, mut lines) = (Instant::now(), Vec::new());
        loop {
            match self.said.recv_timeout(LONG.saturating_sub(begun.elapsed())) {
                Ok(line) => lines.push(line),
                Err(RecvTimeoutError::Disconnected) => return lines,
                Err(RecvTimeoutError::Timeout) => panic!("the daemon or its guardian goes on: {lines:?}"),
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let failing = std::thread::panicking();
        if let Ok(None) = self.child.try_wait() {
            if failing {
                let _ = self.child.kill();
                let _ = self.child.wait();
            } else {
                self.terminate();
                let status = self.ended(LONG);
                assert!(status.success(), "the daemon did not end well: {status}, {:?}", self.log);
            }
            // The devices are free once the guardian is gone too.
            while self.said.recv_timeout(LONG).is_ok() {}
        }
        if failing {
            let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            eprintln!("the daemon said:\n    {}", log.join("\n    "));
        }
    }
}

/// Runs `passgate serve` where it cannot: what it says, how it ends.
pub fn serve_fails(program: &Path, path: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let child = serve(program, path, arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = Pid::from_child(&child);
    let (ended, limit) = channel::<()>();
    let watch = std::thread::spawn(move || {
        if limit.recv_timeout(LONG) == Err(RecvTimeoutError::Timeout) {
            let _ = kill_process(pid, Signal::KILL); // it serves
        }
    });
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    drop(ended);
    watch.join().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

fn serve(program: &Path, path: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(["serve", "--socket-path"]).arg(path).args(arguments);
    command
}

/// The notices of a daemon, one thread reading them, so that waiting for one can end.
#[derive(Debug)]
pub struct Notices(Receiver<Event>);

impl Notices {
    /// Every notice from now on.
    pub fn of(daemon: &Daemon) -> Self {
        let (tell, told) = channel();
        let events = daemon.client().subscribe().unwrap();
        std::thread::spawn(move || {
            for event in events.map_while(Result::ok) {
                if tell.send(event).is_err() {
                    return;
                }
            }
        });
        Self(told)
    }

    /// Waits for this one; the names of those before it, and it.
    pub fn until(&self, name: &str) -> (Vec<String>, Event) {
        let (begun, mut before) = (Instant::now(), Vec::new());
        loop {
            match self.0.recv_timeout(LONG.saturating_sub(begun.elapsed())) {
                Ok(event) if event.event == name => return (before, event),
                Ok(event) => before.push(event.event),
                Err(error) => panic!("no notice {name}, only {before:?}: {error}"),
            }
        }
    }
}

/// Asks again and again until it holds; whether it did in time.
pub fn until(within: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    loop {
        if holds() {
            return true;
        }
        if begun.elapsed() > within {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The children of a process.
pub fn children(parent: Pid) -> Vec<Pid> {
    let of = |name: &str| -> Option<Pid> {
        let stat = std::fs::read_to_string(format!("/proc/{name}/stat")).ok()?;
        // The name in parentheses may hold anything; state and parent follow it.
        let mut fields = stat.rsplit(')').next()?.split_whitespace();
        let (state, ppid) = (fields.next()?, fields.next()?.parse::<i32>().ok()?);
        let alive = state != "Z" && Some(parent) == Pid::from_raw(ppid);
        alive.then(|| Pid::from_raw(name.parse().ok()?)).flatten()
    };
    let entries = std::fs::read_dir("/proc").unwrap();
    entries.filter_map(|entry| of(entry.ok()?.file_name().to_str()?)).collect()
}
