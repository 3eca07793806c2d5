//! A real `passgate serve` process, for tests that kill it or what it serves.

#![allow(dead_code, unreachable_pub)] // each test binary uses a part of it

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use passgate_client::{Client, Event};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

/// The longest time that a test waits for anything: what takes longer has failed.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// A running daemon. Dropping it sends SIGTERM; it must then exit with success.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// All lines of standard error, printed when the test fails.
    log: Arc<Mutex<Vec<String>>>,
    /// The lines of its standard error, which its guardian shares.
    stderr_lines: Receiver<String>,
    /// The path of its control socket.
    pub path: PathBuf,
    dir: Option<TempDir>,
}

impl Daemon {
    /// Starts a daemon at a socket in a new directory, and waits until it listens.
    pub fn start(program: &Path, arguments: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("passgate.sock");
        let mut daemon = Self::start_at(program, &path, arguments);
        daemon.dir = Some(dir);
        daemon
    }

    /// Starts a daemon at this socket, and waits until it listens.
    pub fn start_at(program: &Path, path: &Path, arguments: &[&str]) -> Self {
        let mut child = serve(program, path, arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let (sender, stderr_lines) = channel();
        let log = Arc::new(Mutex::new(Vec::new()));
        let log_of_thread = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                log_of_thread.lock().unwrap().push(line.clone());
                let _ = sender.send(line);
            }
        });
        let mut daemon = Self { child, log, stderr_lines, path: path.to_owned(), dir: None };
        let listens = wait_until(TIMEOUT, || {
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

    /// Returns its guardian process, if it has started.
    pub fn guardian(&self) -> Option<Pid> {
        children(self.pid()).into_iter().next()
    }

    /// `kill -9`, and waits until it is dead.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM, as a service manager does.
    pub fn terminate(&self) {
        kill_process(self.pid(), Signal::TERM).unwrap();
    }

    /// Waits up to `within` until it has ended; returns its exit status.
    pub fn wait_exit(&mut self, within: Duration) -> ExitStatus {
        if let Ok(Some(status)) = self.child.try_wait() {
            return status;
        }
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
        let timeout = Timespec::try_from(within).unwrap();
        let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)).unwrap();
        assert_eq!(ready, 1, "the daemon has not ended within {within:?}");
        self.child.wait().unwrap()
    }

    /// Waits for a line of standard error that contains `wanted`, and returns it.
    pub fn wait_for_line(&self, wanted: &str) -> String {
        let started = Instant::now();
        loop {
            match self.stderr_lines.recv_timeout(TIMEOUT.saturating_sub(started.elapsed())) {
                Ok(line) if line.contains(wanted) => return line,
                Ok(_) => {}
                Err(error) => panic!("the daemon did not log `{wanted}`: {error}"),
            }
        }
    }

    /// Waits until its standard error is closed, which means that the guardian has ended too. Returns the lines until then.
    pub fn wait_stderr_closed(&self) -> Vec<String> {
        let (started, mut lines) = (Instant::now(), Vec::new());
        loop {
            match self.stderr_lines.recv_timeout(TIMEOUT.saturating_sub(started.elapsed())) {
                Ok(line) => lines.push(line),
                Err(RecvTimeoutError::Disconnected) => return lines,
                Err(RecvTimeoutError::Timeout) => panic!("the daemon or its guardian still runs: {lines:?}"),
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
                let status = self.wait_exit(TIMEOUT);
                assert!(status.success(), "the daemon failed: {status}, {:?}", self.log);
            }
            // The devices are free only once the guardian has ended too.
            while self.stderr_lines.recv_timeout(TIMEOUT).is_ok() {}
        }
        if failing {
            let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            eprintln!("log of the daemon:\n    {}", log.join("\n    "));
        }
    }
}

/// Runs `passgate serve` where it must fail; returns its exit code and standard error.
pub fn serve_fails(program: &Path, path: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let child = serve(program, path, arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = Pid::from_child(&child);
    let (end_sender, end_receiver) = channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if end_receiver.recv_timeout(TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            let _ = kill_process(pid, Signal::KILL); // it serves, which it should not
        }
    });
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    drop(end_sender);
    watchdog.join().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

fn serve(program: &Path, path: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(["serve", "--socket-path"]).arg(path).args(arguments);
    command
}

/// The notices of a daemon, read by a thread of their own so that waiting for one can time out.
#[derive(Debug)]
pub struct Notices(Receiver<Event>);

impl Notices {
    /// Subscribes to every notice from now on.
    pub fn subscribe(daemon: &Daemon) -> Self {
        let (sender, receiver) = channel();
        let events = daemon.client().subscribe().unwrap();
        std::thread::spawn(move || {
            for event in events.map_while(Result::ok) {
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Self(receiver)
    }

    /// Waits for the notice `name`; returns the names of those before it, and the notice.
    pub fn wait_for(&self, name: &str) -> (Vec<String>, Event) {
        let (started, mut skipped) = (Instant::now(), Vec::new());
        loop {
            match self.0.recv_timeout(TIMEOUT.saturating_sub(started.elapsed())) {
                Ok(event) if event.event == name => return (skipped, event),
                Ok(event) => skipped.push(event.event),
                Err(error) => panic!("no notice {name}, only {skipped:?}: {error}"),
            }
        }
    }
}

/// Polls `condition` until it holds; returns false if it does not within `within`.
pub fn wait_until(within: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if started.elapsed() > within {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns the child processes of `parent` that are not zombies.
pub fn children(parent: Pid) -> Vec<Pid> {
    let child_of_parent = |name: &str| -> Option<Pid> {
        let stat = std::fs::read_to_string(format!("/proc/{name}/stat")).ok()?;
        // proc_pid_stat(5): the command name in parentheses may contain anything; state and parent follow it.
        let mut fields = stat.rsplit(')').next()?.split_whitespace();
        let (state, ppid) = (fields.next()?, fields.next()?.parse::<i32>().ok()?);
        let alive = state != "Z" && Some(parent) == Pid::from_raw(ppid);
        alive.then(|| Pid::from_raw(name.parse().ok()?)).flatten()
    };
    let entries = std::fs::read_dir("/proc").unwrap();
    entries.filter_map(|entry| child_of_parent(entry.ok()?.file_name().to_str()?)).collect()
}
