//! The guardian: a small process that stops the devices when the worker dies.
//!
//! It holds duplicates of the device descriptors, does nothing, and waits. When the worker's end of their socket
//! closes without a farewell, it takes every device's DMA away, weakest promise last: first the translations of
//! all, then a reset of each. It parses nothing that a client wrote, and ends by itself.
//!
//! Its own session and deaf ears to SIGTERM keep it alive where a whole process group or terminal is killed. Should
//! it die all the same, the worker's [`Watch`] starts another.

mod held;

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Duration;

use passgate_backends::Device;
use passgate_backends::device::Guard;
use passgate_bindings::handed;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, recv, send};

use self::held::Held;
use super::fdstore::{FdStore, Name};
use crate::error::{Error, Result};
use crate::protocol::frame::{self, Frame, Frames};

/// The hidden subcommand that runs [`run`] with the worker's socket as its standard input.
pub const SUBCOMMAND: &str = "guardian";

/// Ends a guardian without anything done.
const FAREWELL: &str = "bye";
/// What it answers to each message.
const HELD: u8 = b'+';
const NOT_HELD: u8 = b'-';

/// The signals that it does not hear.
const DEAF: [i32; 4] = [1, 2, 3, 15]; // HUP, INT, QUIT, TERM: the same on every architecture

/// How long a guardian may take to answer: it does nothing else.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait before a guardian that could not be started is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// A guardian, and the thread that starts another should it die.
///
/// The thread holds the devices too, so that a new guardian can be given them. Dropped without [`Watch::bye`], it
/// says no farewell, and the guardian stops the devices.
#[derive(Debug)]
pub struct Watch {
    stop: UnixStream,
    thread: JoinHandle<()>,
}

impl Watch {
    /// Starts a guardian as [`Guardian::start`] does, and watches it.
    pub fn start(program: PathBuf, devices: Vec<Arc<dyn Device>>) -> Result<Option<Self>> {
        Self::holding(program, devices, None, None)
    }

    /// The same, where `store` keeps our end of each guardian's socket: then a guardian hears nothing of our death
    /// until the store closes it. `left` is what it kept: where that guardian lives, it goes on and has the devices.
    pub fn holding(
        program: PathBuf,
        devices: Vec<Arc<dyn Device>>,
        store: Option<FdStore>,
        left: Option<OwnedFd>,
    ) -> Result<Option<Self>> {
        let guardian = match left.filter(is_open) {
            Some(socket) => {
                let within = Some(ANSWER_TIMEOUT);
                set_socket_timeout(&socket, Timeout::Recv, within)
                    .map_err(|errno| Error::Guardian { source: errno.into() })?;
                Guardian { socket, child: None }
            }
            None => match Guardian::start(&program, &devices)? {
                Some(guardian) => guardian.kept(store.as_ref()),
                None => return Ok(None),
            },
        };
        let (stop, stopped) = UnixStream::pair().map_err(|source| Error::Guardian { source })?;
        let watch = move || watch(&program, devices, guardian, &stopped, store.as_ref());
        let thread = std::thread::Builder::new().name("guardian".into()).spawn(watch);
        Ok(Some(Self { stop, thread: thread.map_err(Error::Thread)? }))
    }

    /// The worker has let go of the devices. Returns when they are closed here and in the guardian, so that
    /// somebody else can open them.
    pub fn bye(self) {
        let said = (&self.stop).write_all(&[0]);
        drop(self.stop);
        if said.is_err() || self.thread.join().is_err() {
            log::error!("the thread that watches the guardian has ended; the guardian stops the devices");
        }
    }
}

fn watch(
    program: &Path,
    devices: Vec<Arc<dyn Device>>,
    guardian: Guardian,
    stopped: &UnixStream,
    store: Option<&FdStore>,
) {
    let mut guardian = Some(guardian);
    loop {
        let (died, told) = wait(guardian.as_ref(), stopped);
        if told {
            drop(devices);
            let farewell = recv(stopped, &mut [0], RecvFlags::DONTWAIT).is_ok_and(|(_, got)| got == 1);
            if let (Some(guardian), true) = (guardian, farewell) {
                guardian.bye();
            }
            return;
        }
        if died && let Some(Guardian { child, .. }) = guardian.take() {
            match child.map(|mut child| child.wait()) {
                Some(Ok(status)) => log::error!("the guardian died ({status}): another is started"),
                Some(Err(error)) => log::error!("the guardian died ({error}): another is started"),
                None => log::error!("the guardian of an earlier daemon died: another is started"),
            }
        }
        if guardian.is_none() {
            let new = Guardian::start(program, &devices).unwrap_or_else(|error| {
                log::error!("{error}; until it is there, nobody stops the devices if this process dies");
                None
            });
            guardian = new.map(|new| new.kept(store));
        }
    }
}

/// Whether somebody has the other end. Nothing but answers ever comes from there, and none is due.
fn is_open(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let quiet = poll(&mut fds, Some(&now)) == Ok(0);
    quiet && rustix::net::sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
}

/// Waits until the guardian has died or the worker has something to say: which of the two.
fn wait(guardian: Option<&Guardian>, stopped: &UnixStream) -> (bool, bool) {
    let mut fds = vec![PollFd::new(stopped, PollFlags::IN)];
    fds.extend(guardian.map(|guardian| PollFd::new(&guardian.socket, PollFlags::IN)));
    let again = Timespec { tv_sec: AGAIN.as_secs() as i64, tv_nsec: 0 };
    let timeout = if guardian.is_none() { Some(&again) } else { None };
    if let Err(errno) = poll(&mut fds, timeout) {
        log::debug!("poll: {errno}");
        return (false, false);
    }
    let ready = |nth: usize| fds.get(nth).is_some_and(|fd| !fd.revents().is_empty());
    (ready(1), ready(0))
}

/// The worker's end.
#[derive(Debug)]
pub struct Guardian {
    socket: OwnedFd,
    /// None for one that an earlier daemon started.
    child: Option<Child>,
}

impl Guardian {
    /// Starts one for those of `devices` that the kernel does not stop by itself; none where there are none.
    /// `program` is this program; it must come to [`run`] by [`SUBCOMMAND`].
    pub fn start(program: &Path, devices: &[Arc<dyn Device>]) -> Result<Option<Self>> {
        if devices.iter().all(|device| matches!(device.guard(), Guard::None)) {
            return Ok(None);
        }
        let failed = |source| Error::Guardian { source };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let mut command = Command::new(program);
        command
            .arg0("passgate")
            .arg(SUBCOMMAND)
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null());
        for variable in handed::VARIABLES {
            command.env_remove(variable);
        }
        let child = command.spawn().map_err(failed)?;
        // The command holds the guardian's end as well, and would hide that it has died.
        drop(command);
        ours.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
        let mut guardian = Self { socket: ours.into(), child: Some(child) };
        match devices.iter().try_for_each(|device| guardian.hand(&**device)) {
            Ok(()) => Ok(Some(guardian)),
            Err(source) => {
                // Not by closing the socket: it would stop the devices of a worker that lives.
                if let Some(child) = &mut guardian.child {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                Err(failed(source))
            }
        }
    }

    /// Has our end kept, in place of that of the guardian before.
    fn kept(self, store: Option<&FdStore>) -> Self {
        if let Some(store) = store {
            store.remove(Name::Guardian);
            if let Err(error) = store.put(Name::Guardian, self.socket.as_fd()) {
                log::error!(
                    "the guardian's socket is not kept ({error}): it stops the devices if this process ends"
                );
            }
        }
        self
    }

    fn hand(&self, device: &dyn Device) -> std::io::Result<()> {
        match device.guard() {
            Guard::None => Ok(()),
            Guard::Cdev(fd) => self.tell(&format!("cdev {}", device.name()), &[fd]),
            Guard::Type1 { container, device: file } => {
                self.tell(&format!("type1 {}", device.name()), &[container, file])
            }
        }
    }

    /// The devices are stopped and closed: nothing is left to guard. Returns when its copies are closed too, so
    /// that somebody else can open them.
    pub fn bye(mut self) {
        let said = self.tell(FAREWELL, &[]);
        if said.is_err()
            && let Some(child) = &mut self.child
        {
            // One that does not answer would be waited for in vain.
            let _ = child.kill();
        }
        let ended = match &mut self.child {
            Some(child) => child.wait().map(|status| status.success()),
            // Its end closes when it ends.
            None => recv(&self.socket, &mut [0], RecvFlags::empty())
                .map(|(_, got)| got == 0)
                .map_err(std::io::Error::from),
        };
        match (said, ended) {
            (Ok(()), Ok(true)) => {}
            (said, ended) => log::warn!("the guardian did not end well: {said:?}, {ended:?}"),
        }
    }

    fn tell(&self, message: &str, fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        frame::send(&self.socket, format!("{message}\0").as_bytes(), fds)?;
        let mut answer = [0];
        match recv(&self.socket, &mut answer, RecvFlags::WAITALL) {
            Ok((_, 1)) if answer == [HELD] => Ok(()),
            Ok(_) => Err(std::io::Error::other("it does not hold the device")),
            Err(Errno::AGAIN) => Err(std::io::Error::other("it does not answer")),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// How it ended, for the exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The worker said farewell.
    Dismissed,
    /// The worker died, and every device's DMA is blocked.
    Blocked,
    /// The worker died, and these devices could be neither blocked nor reset.
    Loose(Vec<String>),
}

/// Guards until the worker says farewell or dies. The process is the guardian from here on.
pub fn run(socket: impl AsFd) -> Result<Ended> {
    // It fails where we lead a session already, which serves as well.
    let _ = rustix::process::setsid();
    for signal in DEAF {
        let unheard = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal, unheard).map_err(|source| Error::Guardian { source })?;
    }
    Ok(guard(socket.as_fd()))
}

fn guard(socket: BorrowedFd<'_>) -> Ended {
    let mut frames = Frames::default();
    let mut held = Vec::new();
    loop {
        while let Some(Frame { bytes, fds }) = frames.take() {
            let message = String::from_utf8_lossy(&bytes);
            let farewell = message == FAREWELL;
            let taken = if farewell { None } else { fds.ok().and_then(|fds| Held::take(&message, fds)) };
            let answer = if farewell || taken.is_some() { HELD } else { NOT_HELD };
            held.extend(taken);
            if farewell {
                held.clear();
            }
            // A worker that does not hear it is dead, which the next read finds.
            let _ = send(socket, &[answer], SendFlags::NOSIGNAL);
            if farewell {
                return Ended::Dismissed;
            }
        }
        match frames.read(socket) {
            Ok(true) => {}
            Ok(false) => {
                let _ = poll(&mut [PollFd::new(&socket, PollFlags::IN)], None);
            }
            Err(_) => return stop(&held),
        }
    }
}

/// The worker is dead.
fn stop(held: &[Held]) -> Ended {
    let mut loose: Vec<&Held> = Vec::new();
    for device in held {
        match device.block() {
            Ok(()) => log::warn!("guardian: the worker died; {}: DMA is blocked", device.name()),
            Err(failed) => {
                log::error!("guardian: {}: {failed}", device.name());
                loose.push(device);
            }
        }
    }
    for device in held {
        match device.reset() {
            Ok(()) => {
                log::warn!("guardian: {}: reset", device.name());
                loose.retain(|other| !std::ptr::eq(*other, device));
            }
            // Many devices have no reset of their own; blocked, they need none.
            Err(failed) if failed.errno == Errno::INVAL => {
                log::info!("guardian: {} has no reset", device.name())
            }
            Err(failed) => log::error!("guardian: {}: {failed}", device.name()),
        }
    }
    if loose.is_empty() {
        return Ended::Blocked;
    }
    Ended::Loose(loose.into_iter().map(|device| device.name().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// Two ends, the guardian's served on a thread, and a descriptor that is no device.
    fn guarded(work: impl FnOnce(UnixStream, BorrowedFd<'_>)) -> Ended {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (witness, kept) = std::io::pipe().unwrap();
        let guardian = std::thread::spawn(move || guard(theirs.as_fd()));
        work(ours, kept.as_fd());
        let ended = guardian.join().unwrap();
        drop(kept);
        // The pipe ends only once the guardian's copies of its writing end are closed.
        assert_eq!((&witness).read(&mut [0]).unwrap(), 0);
        ended
    }

    fn tell(socket: &UnixStream, message: &str, fds: &[BorrowedFd<'_>]) -> u8 {
        frame::send(socket, format!("{message}\0").as_bytes(), fds).unwrap();
        let mut answer = [0];
        (&mut &*socket).read_exact(&mut answer).unwrap();
        answer[0]
    }

    #[test]
    fn a_farewell_ends_it_and_touches_nothing() {
        let ended = guarded(|socket, fd| {
            assert_eq!(tell(&socket, "cdev 0000:00:04.0", &[fd]), HELD);
            assert_eq!(tell(&socket, FAREWELL, &[]), HELD);
        });
        assert_eq!(ended, Ended::Dismissed);
    }

    #[test]
    fn when_the_worker_dies_every_device_is_tried_and_what_is_loose_is_named() {
        let ended = guarded(|socket, fd| {
            assert_eq!(tell(&socket, "cdev a", &[fd]), HELD);
            assert_eq!(tell(&socket, "type1 b", &[fd, fd]), HELD);
        });
        // A pipe is no device: both kernel calls fail for both, and neither stops the other from being tried.
        assert_eq!(ended, Ended::Loose(vec!["a".into(), "b".into()]));
    }

    #[test]
    fn guardian_that_does_not_answer_is_neither_trusted_nor_waited_for() {
        let silent = |child| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            (Guardian { socket: ours.into(), child }, theirs)
        };
        let (guardian, _theirs) = silent(None);
        let error = guardian.tell("cdev 0000:00:04.0", &[]).unwrap_err();
        assert!(error.to_string().contains("it does not answer"), "{error}");
        guardian.bye();
        // One that was started here is ended, because nothing is left for it to guard.
        let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let (guardian, _theirs) = silent(Some(child));
        guardian.bye();
        assert_eq!(rustix::process::test_kill_process(pid), Err(Errno::SRCH));
    }

    #[test]
    fn what_is_not_a_device_is_not_held() {
        let ended = guarded(|socket, fd| {
            assert_eq!(tell(&socket, "cdev a", &[]), NOT_HELD);
            assert_eq!(tell(&socket, "type1 a", &[fd]), NOT_HELD);
            assert_eq!(tell(&socket, "nonsense", &[fd]), NOT_HELD);
            (&socket).write_all(b"half a mess").unwrap();
        });
        assert_eq!(ended, Ended::Blocked);
    }
}
