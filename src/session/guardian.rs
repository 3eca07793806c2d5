//! The guardian: a small process that stops the devices when the worker, the daemon that started it, dies.
//!
//! It has duplicates of the device descriptors, and waits. When the worker's end of their socket closes without a farewell, it
//! stops the DMA of every device: first it removes the translations of all of them, which fails least, then it resets each. It
//! parses no bytes that a client wrote, and ends by itself.
//!
//! It leads a session of its own and ignores SIGHUP, SIGINT, SIGQUIT and SIGTERM, so that it survives when its whole process
//! group or terminal is killed. If it dies all the same, the worker's [`Watch`] starts another.
//!
//! Protocol on the socket, a Unix stream: the worker sends NUL-ended messages, `cdev NAME` with the device's descriptor, `type1
//! NAME` with those of container and device, `bye` as the farewell; the guardian answers each with one byte, `+` or `-`.

mod device;

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
use passgate_bindings::inherited_fds;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, recv, send};

use self::device::GuardedDevice;
use super::fdstore::{FdStore, Name};
use crate::error::{Error, Result};
use crate::protocol::frame::{self, Frame, Frames};

/// The hidden subcommand that runs [`run`] with the worker's socket as its standard input.
pub const SUBCOMMAND: &str = "guardian";

/// The message by which the worker ends a guardian without stopping any device.
const FAREWELL: &str = "bye";
/// The answer to a message that was accepted.
const ACCEPTED: u8 = b'+';
/// The answer to a message that was not.
const REJECTED: u8 = b'-';

/// The signals that a guardian ignores.
const IGNORED_SIGNALS: [i32; 4] = [1, 2, 3, 15]; // HUP, INT, QUIT, TERM: the same on every architecture

/// The time within which a guardian must answer; it has no other work.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The time after which another attempt is made to start a guardian that could not be started.
const RESTART_INTERVAL: Duration = Duration::from_secs(1);

/// A guardian, and the thread that starts another if it dies.
///
/// The thread has the devices too, to pass them to a new guardian. If this is dropped without [`Watch::bye`], no farewell is
/// sent, and the guardian stops the devices.
#[derive(Debug)]
pub struct Watch {
    /// The worker's end of a socket to the thread: one byte on it is the farewell, its close without a byte ends the thread.
    stop: UnixStream,
    thread: JoinHandle<()>,
}

impl Watch {
    /// Starts a guardian as [`Guardian::start`] does, and the thread that watches it.
    pub fn start(program: PathBuf, devices: Vec<Arc<dyn Device>>) -> Result<Option<Self>> {
        Self::resume(program, devices, None, None)
    }

    /// As [`Watch::start`], with the worker's end of each guardian's socket in `store`: then a guardian does not notice the end
    /// of this process until the store closes it. `stored` is the socket that an earlier process stored: if its guardian
    /// lives, that one is watched, and has the devices already.
    pub fn resume(
        program: PathBuf,
        devices: Vec<Arc<dyn Device>>,
        store: Option<FdStore>,
        stored: Option<OwnedFd>,
    ) -> Result<Option<Self>> {
        let guardian = match stored.filter(is_open) {
            Some(socket) => {
                let timeout = Some(ANSWER_TIMEOUT);
                set_socket_timeout(&socket, Timeout::Recv, timeout)
                    .map_err(|errno| Error::Guardian { source: errno.into() })?;
                Guardian { socket, child: None }
            }
            None => match Guardian::start(&program, &devices)? {
                Some(guardian) => guardian.stored_in(store.as_ref()),
                None => return Ok(None),
            },
        };
        let (stop, stopped) = UnixStream::pair().map_err(|source| Error::Guardian { source })?;
        let watch = move || watch(&program, devices, guardian, &stopped, store.as_ref());
        let thread = std::thread::Builder::new().name("guardian".into()).spawn(watch);
        Ok(Some(Self { stop, thread: thread.map_err(Error::Thread)? }))
    }

    /// Ends the guardian: the worker has stopped and closed the devices. Returns when they are closed here and in the guardian,
    /// so that another process can open them.
    pub fn bye(self) {
        let sent = (&self.stop).write_all(&[0]);
        drop(self.stop);
        if sent.is_err() || self.thread.join().is_err() {
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
        let (died, stops) = wait(guardian.as_ref(), stopped);
        if stops {
            drop(devices);
            // A byte is the farewell. The end of the stream without one means that the worker dropped the watch.
            let farewell = recv(stopped, &mut [0], RecvFlags::DONTWAIT).is_ok_and(|(_, got)| got == 1);
            if let (Some(guardian), true) = (guardian, farewell) {
                guardian.dismiss();
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
                log::error!("{error}; until it is started, the devices are not stopped if this process dies");
                None
            });
            guardian = new.map(|new| new.stored_in(store));
        }
    }
}

/// Returns true if it is a Unix socket whose other end is open. A guardian sends only answers, and none is outstanding, so a
/// readable socket is one whose other end is closed.
fn is_open(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let not_readable = poll(&mut fds, Some(&now)) == Ok(0);
    not_readable && rustix::net::sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
}

/// Waits until the guardian has died, the worker stops the watch, or it is time to start a guardian. Returns which of the first
/// two it was.
fn wait(guardian: Option<&Guardian>, stopped: &UnixStream) -> (bool, bool) {
    let mut fds = vec![PollFd::new(stopped, PollFlags::IN)];
    fds.extend(guardian.map(|guardian| PollFd::new(&guardian.socket, PollFlags::IN)));
    let interval = Timespec { tv_sec: RESTART_INTERVAL.as_secs() as i64, tv_nsec: 0 };
    let timeout = if guardian.is_none() { Some(&interval) } else { None };
    if let Err(errno) = poll(&mut fds, timeout) {
        log::debug!("poll: {errno}");
        return (false, false);
    }
    let ready = |nth: usize| fds.get(nth).is_some_and(|fd| !fd.revents().is_empty());
    (ready(1), ready(0))
}

/// A guardian, as the worker sees it.
#[derive(Debug)]
pub struct Guardian {
    /// The worker's end of their socket.
    socket: OwnedFd,
    /// The process; none for a guardian that an earlier daemon started.
    child: Option<Child>,
}

impl Guardian {
    /// Starts a guardian for those of `devices` that the kernel does not stop when their files are closed; none if there are
    /// no such devices. `program` is this program; with [`SUBCOMMAND`] as its argument it must call [`run`].
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
        for variable in inherited_fds::VARIABLES {
            command.env_remove(variable);
        }
        let child = command.spawn().map_err(failed)?;
        // The command has the guardian's end open as well: our end would not become readable when the guardian dies.
        drop(command);
        ours.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
        let mut guardian = Self { socket: ours.into(), child: Some(child) };
        match devices.iter().try_for_each(|device| guardian.pass(&**device)) {
            Ok(()) => Ok(Some(guardian)),
            Err(source) => {
                // Killed, not ended by a closed socket: then it would stop the devices of a worker that lives.
                if let Some(child) = &mut guardian.child {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                Err(failed(source))
            }
        }
    }

    /// Stores our end of the socket, in place of that of the guardian before.
    fn stored_in(self, store: Option<&FdStore>) -> Self {
        if let Some(store) = store {
            store.remove(Name::Guardian);
            if let Err(error) = store.put(Name::Guardian, self.socket.as_fd()) {
                log::error!(
                    "the guardian's socket is not stored ({error}): it stops the devices if this process ends"
                );
            }
        }
        self
    }

    /// Passes a device's descriptors.
    fn pass(&self, device: &dyn Device) -> std::io::Result<()> {
        match device.guard() {
            Guard::None => Ok(()),
            Guard::Cdev(fd) => self.request(&format!("cdev {}", device.name()), &[fd]),
            Guard::Type1 { container, device: file } => {
                self.request(&format!("type1 {}", device.name()), &[container, file])
            }
        }
    }

    /// Ends the guardian without stopping any device: they are stopped and closed already. Returns when the guardian's
    /// duplicates are closed too, so that another process can open the devices.
    pub fn dismiss(mut self) {
        let answered = self.request(FAREWELL, &[]);
        if answered.is_err()
            && let Some(child) = &mut self.child
        {
            // A guardian that does not answer might never end by itself, and the wait below has no timeout.
            let _ = child.kill();
        }
        let ended = match &mut self.child {
            Some(child) => child.wait().map(|status| status.success()),
            // Not a child of this process: its end of the socket closes when it ends.
            None => recv(&self.socket, &mut [0], RecvFlags::empty())
                .map(|(_, got)| got == 0)
                .map_err(std::io::Error::from),
        };
        match (answered, ended) {
            (Ok(()), Ok(true)) => {}
            (answered, ended) => log::warn!("the guardian did not end well: {answered:?}, {ended:?}"),
        }
    }

    /// Sends a message and waits for the guardian to accept it.
    fn request(&self, message: &str, fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        frame::send(&self.socket, format!("{message}\0").as_bytes(), fds)?;
        let mut answer = [0];
        match recv(&self.socket, &mut answer, RecvFlags::WAITALL) {
            Ok((_, 1)) if answer == [ACCEPTED] => Ok(()),
            Ok(_) => Err(std::io::Error::other("it does not accept the device")),
            Err(Errno::AGAIN) => Err(std::io::Error::other("it does not answer")),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// The reason why a guardian ended, for its exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The worker sent the farewell.
    Dismissed,
    /// The worker died, and every device's DMA is blocked.
    Blocked,
    /// The worker died, and these devices could be neither blocked nor reset.
    Loose(Vec<String>),
}

/// Runs the guardian on its end of the socket until the worker sends the farewell or dies. Makes this process lead a session and
/// ignore signals from now on.
pub fn run(socket: impl AsFd) -> Result<Ended> {
    // Fails if this process leads a session already, which serves the purpose as well.
    let _ = rustix::process::setsid();
    for signal in IGNORED_SIGNALS {
        // A handler that sets a flag which nobody reads.
        let ignored = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal, ignored).map_err(|source| Error::Guardian { source })?;
    }
    Ok(guard(socket.as_fd()))
}

fn guard(socket: BorrowedFd<'_>) -> Ended {
    let mut frames = Frames::default();
    let mut devices = Vec::new();
    loop {
        while let Some(Frame { bytes, fds }) = frames.take() {
            let message = String::from_utf8_lossy(&bytes);
            let farewell = message == FAREWELL;
            let device = if farewell {
                None
            } else {
                fds.ok().and_then(|fds| GuardedDevice::from_message(&message, fds))
            };
            let answer = if farewell || device.is_some() { ACCEPTED } else { REJECTED };
            devices.extend(device);
            if farewell {
                // Closed before the answer that reports it.
                devices.clear();
            }
            // A send fails if the worker is dead, which the next read finds.
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
            Err(_) => return stop(&devices),
        }
    }
}

/// Stops the DMA of every device: the worker is dead.
fn stop(devices: &[GuardedDevice]) -> Ended {
    let mut loose: Vec<&GuardedDevice> = Vec::new();
    for device in devices {
        match device.block() {
            Ok(()) => log::warn!("guardian: the worker died; {}: DMA is blocked", device.name()),
            Err(failed) => {
                log::error!("guardian: {}: {failed}", device.name());
                loose.push(device);
            }
        }
    }
    for device in devices {
        match device.reset() {
            Ok(()) => {
                log::warn!("guardian: {}: reset", device.name());
                loose.retain(|other| !std::ptr::eq(*other, device));
            }
            // EINVAL: the device has no reset of its own (`VFIO_DEVICE_FLAGS_RESET` is clear). Once blocked it needs none.
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
mod tests;
