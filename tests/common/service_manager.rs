//! A service manager for tests: it starts a daemon of passgate, stores the descriptors that the daemon sends (sd_notify(3),
//! `FDSTORE=1`), and passes them to the next daemon (sd_listen_fds(3)).
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

use std::io::{BufRead, BufReader, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use passgate_client::Client;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

/// The longest time that a test waits for anything here.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The descriptor store: each descriptor with its name.
type FdStore = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// Serializes the tests of a process. Between fork and exec, a child of another thread has copies of every descriptor, also
/// of a socket that this test expects to be closed.
static SERIAL: Mutex<()> = Mutex::new(());

/// A service, its manager, and the manager's descriptor store.
pub struct ServiceManager {
    program: PathBuf,
    /// The subcommand of the daemon, and the option that takes the path of its control socket.
    daemon: [&'static str; 2],
    pub arguments: Vec<String>,
    /// The path of the service's control socket.
    pub path: PathBuf,
    stored: FdStore,
    /// The lines of the service's messages that do not concern descriptors (`READY=1`).
    notifications: Receiver<String>,
    child: Option<Child>,
    log: Arc<Mutex<Vec<String>>>,
    dir: TempDir,
    _serial: MutexGuard<'static, ()>,
}

impl ServiceManager {
    /// Returns a manager of `passgate serve`, not started yet.
    pub fn new(program: &Path, arguments: &[&str]) -> Self {
        Self::with_command(program, ["serve", "--socket-path"], arguments)
    }

    /// Returns a manager of another daemon, not started yet.
    pub fn with_command(program: &Path, daemon: [&'static str; 2], arguments: &[&str]) -> Self {
        let serial = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let (stored, (sender, notifications)) = (FdStore::default(), channel());
        let shared_store = Arc::clone(&stored);
        std::thread::spawn(move || {
            while let Some((text, fds)) = receive(&socket) {
                for line in apply(&shared_store, &text, fds) {
                    let _ = sender.send(line);
                }
            }
        });
        Self {
            program: program.to_owned(),
            daemon,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            path: dir.path().join("socket"),
            stored,
            notifications,
            child: None,
            log: Arc::default(),
            dir,
            _serial: serial,
        }
    }

    /// Starts the service with every stored descriptor and waits until it is ready. Returns the time that took.
    pub fn start(&mut self) -> Duration {
        let started = Instant::now();
        self.spawn();
        self.wait_notified("READY=1");
        started.elapsed()
    }

    /// Starts the service with every stored descriptor.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let stored = self.stored();
        let names: Vec<&str> = stored.iter().map(|(name, _)| name.as_str()).collect();
        // LISTEN_PID must be the PID of the process that executes the program: only the child knows it.
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "export LISTEN_PID=$$; exec \"$0\" \"$@\""]).arg(&self.program);
        command.args(self.daemon).arg(&self.path).args(&self.arguments);
        command
            .env("NOTIFY_SOCKET", self.dir.path().join("notify"))
            .env("FDSTORE", "1024")
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"));
        let mappings = stored.iter().zip(3..).map(|((_, fd), child_fd)| FdMapping {
            parent_fd: fd.as_fd().try_clone_to_owned().unwrap(),
            child_fd,
        });
        command.fd_mappings(mappings.collect()).unwrap();
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        drop(command);
        let (stderr, log) = (child.stderr.take().unwrap(), Arc::clone(&self.log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                log.lock().unwrap().push(line);
            }
        });
        drop(stored);
        self.child = Some(child);
    }

    /// Waits until the service has sent this line.
    pub fn wait_notified(&mut self, wanted: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            match self.notifications.recv_timeout(Duration::from_millis(50)) {
                Ok(line) if line == wanted => return,
                _ if Instant::now() > deadline => {
                    panic!("the service did not send {wanted}: {:?}", self.log_lines())
                }
                _ => {}
            }
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait().unwrap()
            {
                panic!("the service has ended ({status}): {:?}", self.log_lines());
            }
        }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.path).unwrap()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().unwrap())
    }

    /// `kill -9`, and waits until it is dead.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Sends SIGTERM, as before a restart or a stop, and waits for the exit status.
    pub fn terminate(&mut self) -> ExitStatus {
        kill_process(self.pid(), Signal::TERM).unwrap();
        self.wait_exit()
    }

    /// Waits until the service has ended and returns its exit status.
    pub fn wait_exit(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        if let Ok(pidfd) = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            let timeout = Timespec::try_from(TIMEOUT).unwrap();
            let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)).unwrap();
            assert_eq!(ready, 1, "the service has not ended: {:?}", self.log_lines());
        }
        child.wait().unwrap()
    }

    /// Returns the stored descriptors with their names.
    pub fn stored(&self) -> MutexGuard<'_, Vec<(String, OwnedFd)>> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the names of the stored descriptors, sorted.
    pub fn stored_names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.stored().iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// Returns a duplicate of the descriptor that is stored under this name.
    pub fn stored_fd(&self, name: &str) -> OwnedFd {
        let stored = self.stored();
        let (_, fd) = stored.iter().find(|(stored, _)| stored == name).unwrap();
        fd.try_clone().unwrap()
    }

    /// Stores another descriptor under this name.
    pub fn replace(&self, name: &str, fd: impl AsFd) {
        self.remove(name);
        self.stored().push((name.to_owned(), fd.as_fd().try_clone_to_owned().unwrap()));
    }

    /// Closes the stored descriptors whose names begin with `name`.
    pub fn remove(&self, name: &str) {
        self.stored().retain(|(stored, _)| !stored.starts_with(name));
    }

    /// Returns the lines that the service has written to its standard error, over all of its starts.
    pub fn log_lines(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the service has logged a line that contains `wanted`.
    pub fn wait_for_log(&self, wanted: &str) {
        let deadline = Instant::now() + TIMEOUT;
        while !self.log_lines().iter().any(|line| line.contains(wanted)) {
            assert!(Instant::now() < deadline, "the service did not log `{wanted}`: {:?}", self.log_lines());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("log of the service:\n    {}", self.log_lines().join("\n    "));
        }
        // An empty message ends the receiving thread.
        if let Ok(socket) = UnixDatagram::unbound() {
            let _ = socket.send_to(&[], self.dir.path().join("notify"));
        }
    }
}

/// Receives one message with its descriptors; none if it is empty.
fn receive(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 4096];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).ok()?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    (got.bytes > 0).then(|| (String::from_utf8_lossy(&bytes[..got.bytes]).into_owned(), fds))
}

/// Applies a message to the store as systemd does; returns the lines that do not concern descriptors.
fn apply(stored: &FdStore, text: &str, fds: Vec<OwnedFd>) -> Vec<String> {
    let (mut store, mut remove, mut name, mut others) = (false, false, "stored".to_owned(), Vec::new());
    for line in text.lines() {
        match line.split_once('=') {
            Some(("FDSTORE", "1")) => store = true,
            Some(("FDSTOREREMOVE", "1")) => remove = true,
            Some(("FDNAME", to)) => {
                let printable = to.len() <= 255 && to.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b':');
                assert!(printable, "systemd would not take the name `{to}`");
                to.clone_into(&mut name);
            }
            Some(("FDPOLL", "0") | ("BARRIER", "1")) => {}
            _ => others.push(line.to_owned()),
        }
    }
    let mut stored = stored.lock().unwrap_or_else(PoisonError::into_inner);
    if remove {
        stored.retain(|(known, _)| *known != name);
    } else if store {
        stored.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
    }
    others
}
