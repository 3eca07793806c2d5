//! The back-end that serves the guest's disk: passgate, or QEMU's storage daemon for comparison.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::guest::tail;
use super::{STORAGE_DAEMON, wait};

/// The path of passgate.
pub const PASSGATE: &str = "/bin/passgate";

/// The longest time until a back-end listens: it resets devices, and waits for the end of a killed predecessor.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The kind of a back-end, with its additional options.
#[derive(Debug, Clone)]
pub enum Which {
    Passgate(Vec<String>),
    /// The storage daemon with its `nvme://` driver; `thread` gives it an I/O thread of its own.
    Stock {
        thread: bool,
    },
}

/// A running back-end. Dropping it sends SIGTERM.
#[derive(Debug)]
pub struct BackEnd {
    kind: Which,
    drive: String,
    queues: u32,
    child: Child,
    dir: TempDir,
    /// The number of starts.
    pub starts: u32,
}

impl BackEnd {
    pub fn start(kind: Which, drive: &str, queues: u32) -> Self {
        let dir = TempDir::new().unwrap();
        let child = spawn(&kind, drive, queues, dir.path());
        Self { kind, drive: drive.to_owned(), queues, child, dir, starts: 1 }
    }

    /// Returns the path of the socket that the guest's QEMU connects to.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// Returns the path of passgate's control socket.
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    /// `kill -9`, at whatever point it is.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again with the same sockets.
    pub fn restart(&mut self) {
        self.child = spawn(&self.kind, &self.drive, self.queues, self.dir.path());
        self.starts += 1;
    }

    /// Sends SIGTERM and waits for the end; returns how long that took.
    pub fn end(&mut self) -> Duration {
        let started = Instant::now();
        if let Ok(None) = self.child.try_wait() {
            kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
            let status = wait("the end of the back-end", START_TIMEOUT, || self.child.try_wait().unwrap());
            assert!(
                status.success() || matches!(self.kind, Which::Stock { .. }),
                "{status}: {}",
                self.log_tail()
            );
        }
        started.elapsed()
    }

    /// Returns the processor time of its threads in seconds, as measured by the scheduler: the tick-based times of
    /// /proc/PID/stat are wrong by a factor of four where threads wake with the tick.
    pub fn processor(&self) -> f64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let used = |task: std::io::Result<std::fs::DirEntry>| -> u64 {
            // Nanoseconds on a processor, then waiting for one (Documentation/scheduler/sched-stats.rst).
            let schedstat = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
            schedstat.split_whitespace().next().unwrap().parse().unwrap()
        };
        tasks.map(used).sum::<u64>() as f64 / 1e9
    }

    /// Returns the names of its open files, sorted, without the inode numbers of sockets and pipes.
    pub fn open_files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        // A file may be closed between the two reads.
        let links = entries.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
        let name = |link: PathBuf| link.to_string_lossy().split(":[").next().unwrap_or_default().to_owned();
        let mut names: Vec<_> = links.map(name).collect();
        names.sort();
        names
    }

    /// Returns the last lines of its standard error.
    pub fn log_tail(&self) -> String {
        tail(&self.dir.path().join("log"))
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the back-end's threads:\n{}", thread_states(self.child.id()));
            let _ = self.child.kill();
            let _ = self.child.wait();
            eprintln!("log of the back-end:\n{}", self.log_tail());
        } else {
            self.end();
        }
    }
}

fn spawn(kind: &Which, drive: &str, queues: u32, dir: &Path) -> Child {
    let socket = dir.join("disk");
    // A killed back-end leaves its sockets; a front-end must not find them before the next back-end listens.
    let _ = std::fs::remove_file(&socket);
    let _ = std::fs::remove_file(dir.join("control"));
    match kind {
        Which::Passgate(options) => {
            let mut command = Command::new(PASSGATE);
            command.args(["vhost-user-blk", "--device", drive, "--num-queues", &queues.to_string()]);
            command
                .arg("--socket-path")
                .arg(&socket)
                .arg("--control-path")
                .arg(dir.join("control"))
                .args(options);
            let mut child = run(command, dir);
            wait_listening(&mut child, &socket, dir, START_TIMEOUT).expect("passgate does not listen");
            child
        }
        Which::Stock { thread } => {
            // QEMU 11.1 enables the controller before it has set the completion queue's address, and then waits forever.
            // The controller keeps the address, which is the same in the next process: that one gets its completions.
            for _ in 0..5 {
                let mut child = run(storage_daemon(*thread, drive, queues, &socket), dir);
                if wait_listening(&mut child, &socket, dir, Duration::from_secs(4)).is_some() {
                    return child;
                }
                child.kill().unwrap();
                child.wait().unwrap();
            }
            panic!("the storage daemon does not listen: {}", tail(&dir.join("log")));
        }
    }
}

fn storage_daemon(thread: bool, drive: &str, queues: u32, socket: &Path) -> Command {
    let mut command = Command::new(STORAGE_DAEMON);
    let mut export = format!(
        "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
        socket.display()
    );
    if thread {
        command.args(["--object", "iothread,id=t"]);
        export.push_str(",iothread=t");
    }
    command.args(["--blockdev", &format!("driver=nvme,device={drive},namespace=1,node-name=d")]);
    command.args(["--export", &export]);
    command
}

fn run(mut command: Command, dir: &Path) -> Child {
    let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

/// Waits until it listens, without connecting, because it would take the connection for a front-end. Returns none after `within`.
fn wait_listening(child: &mut Child, socket: &Path, dir: &Path, within: Duration) -> Option<()> {
    let started = Instant::now();
    while started.elapsed() < within {
        if let Some(status) = child.try_wait().unwrap() {
            panic!("the back-end has ended: {status}: {}", tail(&dir.join("log")));
        }
        let table = std::fs::read_to_string("/proc/net/unix").unwrap();
        // A listening socket has the flag __SO_ACCEPTCON, 0x10000 (net/unix/af_unix.c; unix(7) does not describe it).
        if table.lines().any(|line| line.ends_with(&*socket.to_string_lossy()) && line.contains(" 00010000 "))
        {
            return Some(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    None
}

/// Returns the wait channel and system call of each thread of a process, and the interrupt counts of the devices.
fn thread_states(process: u32) -> String {
    let read = |path: String| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let tasks =
        std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().filter_map(Result::ok);
    let mut all: Vec<_> = tasks
        .map(|task| {
            let at = |name: &str| read(format!("{}/{name}", task.path().display()));
            format!("{}: {}, call {}", at("comm"), at("wchan"), at("syscall"))
        })
        .collect();
    all.extend(
        read("/proc/interrupts".into()).lines().filter(|line| line.contains("vfio")).map(str::to_owned),
    );
    all.join("\n")
}
