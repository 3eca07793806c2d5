//! What serves the guest its disk: passgate, or QEMU's own storage daemon to compare with.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::guest::tail;
use super::{STORAGE_DAEMON, wait};

/// The program under test.
pub const PASSGATE: &str = "/bin/passgate";

/// How long one may take to listen: devices are reset, and one that was killed is waited for.
const STARTS: Duration = Duration::from_secs(60);

/// Which, and with what more on its command line.
#[derive(Debug, Clone)]
pub enum Which {
    Passgate(Vec<String>),
    /// The storage daemon, with its `nvme://` driver; with a thread of its own for I/O or without.
    Stock {
        thread: bool,
    },
}

/// A running back-end. When dropped it is asked to end.
#[derive(Debug)]
pub struct BackEnd {
    which: Which,
    drive: String,
    queues: u32,
    child: Child,
    place: TempDir,
    /// How often it was started.
    pub starts: u32,
}

impl BackEnd {
    pub fn start(which: Which, drive: &str, queues: u32) -> Self {
        let place = TempDir::new().unwrap();
        let child = spawn(&which, drive, queues, place.path());
        Self { which, drive: drive.to_owned(), queues, child, place, starts: 1 }
    }

    /// Where the guest's QEMU connects.
    pub fn socket(&self) -> PathBuf {
        self.place.path().join("disk")
    }

    /// Where passgate takes control connections.
    pub fn control(&self) -> PathBuf {
        self.place.path().join("control")
    }

    /// `kill -9`, whatever it is doing.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again at the same place.
    pub fn restart(&mut self) {
        self.child = spawn(&self.which, &self.drive, self.queues, self.place.path());
        self.starts += 1;
    }

    /// Asks it to end, as a service manager does; how long that took.
    pub fn end(&mut self) -> Duration {
        let begun = Instant::now();
        if let Ok(None) = self.child.try_wait() {
            kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
            let status = wait("the end of the back-end", STARTS, || self.child.try_wait().unwrap());
            assert!(
                status.success() || matches!(self.which, Which::Stock { .. }),
                "{status}: {}",
                self.said()
            );
        }
        begun.elapsed()
    }

    /// Seconds of processor time that its threads have used, as the scheduler measures it: what is counted by ticks goes
    /// wrong by a factor of four where threads wake with the tick.
    pub fn processor(&self) -> f64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let used = |task: std::io::Result<std::fs::DirEntry>| -> u64 {
            // Nanoseconds on a processor, then waiting for one (Documentation/scheduler/sched-stats.rst).
            let said = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
            said.split_whitespace().next().unwrap().parse().unwrap()
        };
        tasks.map(used).sum::<u64>() as f64 / 1e9
    }

    /// What it has open, by name and without the numbers of sockets and pipes, in order.
    pub fn open_files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        // One may be closed while this looks.
        let links = entries.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
        let name = |link: PathBuf| link.to_string_lossy().split(":[").next().unwrap_or_default().to_owned();
        let mut names: Vec<_> = links.map(name).collect();
        names.sort();
        names
    }

    /// Its last words.
    pub fn said(&self) -> String {
        tail(&self.place.path().join("said"))
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the back-end's threads:\n{}", threads(self.child.id()));
            let _ = self.child.kill();
            let _ = self.child.wait();
            eprintln!("the back-end said:\n{}", self.said());
        } else {
            self.end();
        }
    }
}

fn spawn(which: &Which, drive: &str, queues: u32, place: &Path) -> Child {
    let socket = place.join("disk");
    // Whoever was killed has left its sockets, and a front-end must not find them before the next one listens.
    let _ = std::fs::remove_file(&socket);
    let _ = std::fs::remove_file(place.join("control"));
    match which {
        Which::Passgate(more) => {
            let mut command = Command::new(PASSGATE);
            command.args(["vhost-user-blk", "--device", drive, "--num-queues", &queues.to_string()]);
            command
                .arg("--socket-path")
                .arg(&socket)
                .arg("--control-path")
                .arg(place.join("control"))
                .args(more);
            let mut child = run(command, place);
            listens(&mut child, &socket, place, STARTS).expect("passgate does not listen");
            child
        }
        Which::Stock { thread } => {
            // QEMU 11.1 enables the controller before it has told it where completions go, and then waits for ever. The
            // drive keeps the address, which is the same in the next process: that one gets its completions.
            for _ in 0..5 {
                let mut child = run(storage_daemon(*thread, drive, queues, &socket), place);
                if listens(&mut child, &socket, place, Duration::from_secs(4)).is_some() {
                    return child;
                }
                child.kill().unwrap();
                child.wait().unwrap();
            }
            panic!("the storage daemon does not listen: {}", tail(&place.join("said")));
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

fn run(mut command: Command, place: &Path) -> Child {
    let said = File::options().create(true).append(true).open(place.join("said")).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said).spawn().unwrap()
}

/// Waits until it listens, without connecting: it would take that for a front-end.
fn listens(child: &mut Child, socket: &Path, place: &Path, within: Duration) -> Option<()> {
    let begun = Instant::now();
    while begun.elapsed() < within {
        if let Some(status) = child.try_wait().unwrap() {
            panic!("the back-end has ended: {status}: {}", tail(&place.join("said")));
        }
        let table = std::fs::read_to_string("/proc/net/unix").unwrap();
        // A listening socket has the flag 0x10000 (unix(7) names none of this; net/unix/af_unix.c does).
        if table.lines().any(|line| line.ends_with(&*socket.to_string_lossy()) && line.contains(" 00010000 "))
        {
            return Some(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    None
}

/// What each thread of a process waits for, and how often the devices have interrupted.
fn threads(process: u32) -> String {
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

/// Whether somebody takes connections at a socket that is not the front-end's.
pub fn answers(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}
