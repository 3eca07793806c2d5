//! A service manager for tests: starts a daemon of passgate's, keeps the descriptors that it sends, and hands them to the next.
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
use passgate::client::Client;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

/// How long anything may take that takes no time.
const LONG: Duration = Duration::from_secs(60);

type Kept = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// One at a time: a child that another thread has just forked has copies of everything until it executes its program,
/// also of a socket that is to be closed.
static ONE: Mutex<()> = Mutex::new(());

/// A service, its manager, and what the manager keeps for it.
pub struct Keeper {
    program: PathBuf,
    /// The daemon, and the option that says where its control socket is.
    daemon: [&'static str; 2],
    pub arguments: Vec<String>,
    /// Where the service takes control connections.
    pub path: PathBuf,
    kept: Kept,
    /// Lines of the messages that are not about descriptors.
    told: Receiver<String>,
    child: Option<Child>,
    log: Arc<Mutex<Vec<String>>>,
    place: TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Keeper {
    /// For `passgate serve`.
    pub fn new(program: &Path, arguments: &[&str]) -> Self {
        Self::of(program, ["serve", "--socket-path"], arguments)
    }

    /// For another daemon.
    pub fn of(program: &Path, daemon: [&'static str; 2], arguments: &[&str]) -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let place = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(place.path().join("notify")).unwrap();
        let (kept, (tell, told)) = (Kept::default(), channel());
        let keeps = Arc::clone(&kept);
        std::thread::spawn(move || {
            while let Some((text, fds)) = receive(&socket) {
                for line in manage(&keeps, &text, fds) {
                    let _ = tell.send(line);
                }
            }
        });
        Self {
            program: program.to_owned(),
            daemon,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            path: place.path().join("socket"),
            kept,
            told,
            child: None,
            log: Arc::default(),
            place,
            _one: one,
        }
    }

    /// Starts the service with all that is kept, and waits until it is ready. How long that took.
    pub fn start(&mut self) -> Duration {
        let begun = Instant::now();
        self.spawn();
        self.is_told("READY=1");
        begun.elapsed()
    }

    /// Starts the service with all that is kept.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let kept = self.kept();
        let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
        // Its own number is known to the child alone.
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "export LISTEN_PID=$$; exec \"$0\" \"$@\""]).arg(&self.program);
        command.args(self.daemon).arg(&self.path).args(&self.arguments);
        command
            .env("NOTIFY_SOCKET", self.place.path().join("notify"))
            .env("FDSTORE", "1024")
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"));
        let mappings = kept.iter().zip(3..).map(|((_, fd), child_fd)| FdMapping {
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
        drop(kept);
        self.child = Some(child);
    }

    /// Waits for a line of a message.
    pub fn is_told(&mut self, what: &str) {
        let until = Instant::now() + LONG;
        loop {
            match self.told.recv_timeout(Duration::from_millis(50)) {
                Ok(line) if line == what => return,
                _ if Instant::now() > until => panic!("nobody said {what}: {:?}", self.said()),
                _ => {}
            }
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait().unwrap()
            {
                panic!("the service has ended ({status}): {:?}", self.said());
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

    /// Asks it to end, as before a restart or a stop.
    pub fn terminate(&mut self) -> ExitStatus {
        kill_process(self.pid(), Signal::TERM).unwrap();
        self.ended()
    }

    /// How it ended.
    pub fn ended(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        if let Ok(pidfd) = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            let limit = Timespec::try_from(LONG).unwrap();
            let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).unwrap();
            assert_eq!(ready, 1, "the service has not ended: {:?}", self.said());
        }
        child.wait().unwrap()
    }

    /// What is kept.
    pub fn kept(&self) -> MutexGuard<'_, Vec<(String, OwnedFd)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names of what is kept, in order.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.kept().iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// A copy of what is kept under this name.
    pub fn copy(&self, name: &str) -> OwnedFd {
        let kept = self.kept();
        let (_, fd) = kept.iter().find(|(kept, _)| kept == name).unwrap();
        fd.try_clone().unwrap()
    }

    /// Puts another descriptor under this name.
    pub fn replace(&self, name: &str, fd: impl AsFd) {
        self.forget(name);
        self.kept().push((name.to_owned(), fd.as_fd().try_clone_to_owned().unwrap()));
    }

    /// Drops what is kept under names that begin so.
    pub fn forget(&self, name: &str) {
        self.kept().retain(|(kept, _)| !kept.starts_with(name));
    }

    /// What the service has said on its standard error, all of them together.
    pub fn said(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until a line with this in it has been said.
    pub fn says(&self, what: &str) {
        let until = Instant::now() + LONG;
        while !self.said().iter().any(|line| line.contains(what)) {
            assert!(Instant::now() < until, "nobody said `{what}`: {:?}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the service said:\n    {}", self.said().join("\n    "));
        }
        // An empty message ends the thread.
        if let Ok(socket) = UnixDatagram::unbound() {
            let _ = socket.send_to(&[], self.place.path().join("notify"));
        }
    }
}

/// One message; none for the empty one.
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

/// Does what a message asks for as systemd does; what is said besides.
fn manage(kept: &Kept, text: &str, fds: Vec<OwnedFd>) -> Vec<String> {
    let (mut store, mut remove, mut name, mut said) = (false, false, "stored".to_owned(), Vec::new());
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
            _ => said.push(line.to_owned()),
        }
    }
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    if remove {
        kept.retain(|(known, _)| *known != name);
    } else if store {
        kept.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
    }
    said
}
