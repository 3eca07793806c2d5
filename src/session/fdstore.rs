//! The service manager's file descriptor store: descriptors that outlive this process and are passed to the next one.
//!
//! The manager stores a copy of each descriptor that it is sent under a name (`sd_notify(3)`, FDSTORE=1), and passes all of them
//! when it starts the service again (`sd_listen_fds(3)`, `LISTEN_FDS`). While it has a device's file open, the device's DMA
//! continues; when it drops the store, the files are closed, and the kernel stops each device that no other process has open.
//! Only this service can put descriptors there, so the rights that they give are trusted; their kind is not, and every descriptor
//! is checked before it is used.
//!
//! A thread of its own sends to the manager, in order, so that a slow manager delays no answer.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use passgate_bindings::inherited_fds;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use sd_notify::{NotifyState, notify, notify_with_fds};

use crate::error::{Error, Result};
use crate::gate::FileId;

/// The prefix of every name.
const NAME_PREFIX: &str = "passgate.";
/// The time within which the manager must read what it was sent (`BARRIER=1`).
const BARRIER_TIMEOUT: Duration = Duration::from_secs(5);

/// The time to wait for the thread that sends to the manager. Longer than [`BARRIER_TIMEOUT`]: the manager's socket may be
/// full, and then the send blocks.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// The name of a stored descriptor. Its text is printable, without a colon, at most 255 characters (`sd_notify(3)`, FDNAME=).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// The memfd of the gate's ledger.
    Ledger,
    /// The iommufd.
    Iommufd,
    /// The VFIO container.
    Container,
    /// A VFIO group, by its number.
    Group(u32),
    /// A device, by its PCI address.
    Device(String),
    /// Guest memory, by its file.
    Memory(FileId),
    /// The private side of guest memory, by its file.
    Private(FileId),
    /// The worker's end of the guardian's socket.
    Guardian,
    /// The socket that clients connect to.
    Socket,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAME_PREFIX)?;
        let file = |f: &mut fmt::Formatter<'_>, kind, file: &FileId| {
            write!(f, "{kind}.{:x}.{:x}", file.device, file.inode)
        };
        match self {
            Self::Ledger => f.write_str("ledger"),
            Self::Iommufd => f.write_str("iommufd"),
            Self::Container => f.write_str("container"),
            Self::Group(number) => write!(f, "group.{number}"),
            Self::Device(address) => write!(f, "device.{}", address.replace(':', "-")),
            Self::Memory(id) => file(f, "memory", id),
            Self::Private(id) => file(f, "private", id),
            Self::Guardian => f.write_str("guardian"),
            Self::Socket => f.write_str("socket"),
        }
    }
}

/// The error for a text that is no [`Name`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidName;

impl FromStr for Name {
    type Err = InvalidName;

    /// Accepts only the text that [`Name`] itself writes, so that a removal by name removes the descriptor that was passed.
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let (kind, rest) = match text.strip_prefix(NAME_PREFIX).ok_or(InvalidName)?.split_once('.') {
            Some((kind, rest)) => (kind, Some(rest)),
            None => (text.strip_prefix(NAME_PREFIX).ok_or(InvalidName)?, None),
        };
        let file = |text: &str| {
            let (device, inode) = text.split_once('.')?;
            let hex = |text| u64::from_str_radix(text, 16).ok();
            Some(FileId { device: hex(device)?, inode: hex(inode)? })
        };
        let name = match (kind, rest) {
            ("ledger", None) => Some(Self::Ledger),
            ("iommufd", None) => Some(Self::Iommufd),
            ("container", None) => Some(Self::Container),
            ("guardian", None) => Some(Self::Guardian),
            ("socket", None) => Some(Self::Socket),
            ("group", Some(number)) => number.parse().ok().map(Self::Group),
            ("device", Some(address)) => Some(Self::Device(address.replace('-', ":"))),
            ("memory", Some(id)) => file(id).map(Self::Memory),
            ("private", Some(id)) => file(id).map(Self::Private),
            _ => None,
        };
        name.filter(|name| name.to_string() == text).ok_or(InvalidName)
    }
}

/// The descriptors that the service manager passed at the start, by name.
#[derive(Debug, Default)]
pub struct StoredFds {
    fds: BTreeMap<Name, Vec<OwnedFd>>,
}

impl StoredFds {
    /// Takes the descriptors from the environment. One whose name is not passgate's is closed, with a warning. Must be called
    /// before this process opens any file: the descriptors are taken by their numbers.
    pub fn take() -> Result<Self> {
        let mut kept = Self::default();
        for (text, fd) in inherited_fds::take().map_err(|source| Error::InheritedFd { source })? {
            match text.parse() {
                Ok(name) => kept.fds.entry(name).or_default().push(fd),
                Err(InvalidName) => {
                    log::warn!(
                        "the service manager passed `{text}`, which is no name of passgate's: it is closed"
                    )
                }
            }
        }
        Ok(kept)
    }

    /// Returns these descriptors as if the service manager had passed them: for a session without one, under test.
    pub fn of(fds: BTreeMap<Name, Vec<OwnedFd>>) -> Self {
        Self { fds }
    }

    /// Returns true if there are none.
    pub fn is_empty(&self) -> bool {
        self.fds.is_empty()
    }

    /// Removes and returns every descriptor under this name; several if one file was stored by several descriptors.
    pub fn all(&mut self, name: &Name) -> Vec<OwnedFd> {
        self.fds.remove(name).unwrap_or_default()
    }

    /// Removes the descriptors under this name and returns the newest.
    pub fn one(&mut self, name: &Name) -> Option<OwnedFd> {
        self.all(name).pop()
    }

    /// Returns a duplicate of the newest descriptor under this name.
    pub fn copy(&self, name: &Name) -> Option<OwnedFd> {
        self.fds.get(name)?.last()?.try_clone().ok()
    }

    /// Closes every descriptor whose name `wanted` does not accept.
    pub fn only(mut self, wanted: impl Fn(&Name) -> bool) -> Self {
        self.fds.retain(|name, _| wanted(name));
        self
    }

    /// Returns the names of the descriptors that were not taken yet.
    pub fn names(&self) -> Vec<Name> {
        self.fds.keys().cloned().collect()
    }
}

/// A request to the thread that sends to the manager.
#[derive(Debug)]
enum Request {
    /// Stores a descriptor; `done` gets the result once the manager has read it.
    Put { name: Name, fd: OwnedFd, done: Sender<io::Result<()>> },
    /// Removes every descriptor under a name.
    Remove { name: Name },
    /// Reports the state of the service.
    Notify { state: NotifyState<'static> },
    /// Answers once the manager has read everything before.
    Settle { done: Sender<()> },
}

/// The service manager, as the store of descriptors and as the receiver of the service's state.
#[derive(Debug, Clone)]
pub struct FdStore {
    backend: Backend,
    claims: Claims,
}

/// The names that are claimed, with the number of their claims.
type Claims = Arc<Mutex<BTreeMap<Name, usize>>>;

/// Prevents the removal of a name until it is dropped: its descriptor is stored, and it is not known yet if it is needed. If it
/// turns out not to be, the name must be removed after the claim is dropped.
#[derive(Debug)]
pub struct Claim {
    claims: Claims,
    name: Name,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = lock(&self.claims);
        if let Some(count) = claims.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                claims.remove(&self.name);
            }
        }
    }
}

fn lock(claims: &Claims) -> MutexGuard<'_, BTreeMap<Name, usize>> {
    claims.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Clone)]
enum Backend {
    /// The service manager, by way of the thread that sends to it.
    Manager(Sender<Request>),
    /// The owner of a session under test, which stores the descriptors itself and receives the names that are removed.
    Owner(Sender<Name>),
}

impl FdStore {
    /// Returns the store of the service manager that started this process; none if none did (no `NOTIFY_SOCKET`). The store's
    /// thread runs `prepare` first, so that it can drop privileges that it inherits from the caller.
    pub fn open(prepare: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Option<Self>> {
        if env::var_os("NOTIFY_SOCKET").is_none() {
            return Ok(None);
        }
        let (sender, requests) = channel();
        std::thread::Builder::new()
            .name("fd store".into())
            .spawn(move || match prepare() {
                Ok(()) => serve(&requests),
                Err(error) => log::error!("{error}"),
            })
            .map_err(Error::Thread)?;
        Ok(Some(Self { backend: Backend::Manager(sender), claims: Claims::default() }))
    }

    /// Returns a store without a service manager, for a session under test, and the names that are removed from it. The
    /// session's owner stores the descriptors itself.
    pub fn detached() -> (Self, Receiver<Name>) {
        let (removed, names) = channel();
        (Self { backend: Backend::Owner(removed), claims: Claims::default() }, names)
    }

    /// Returns true if the manager states that it stores descriptors for this service (`$FDSTORE`, systemd 254 and newer).
    pub fn is_announced() -> bool {
        let limit = env::var("FDSTORE").ok().and_then(|limit| limit.parse::<u32>().ok());
        limit.is_some_and(|limit| limit > 0)
    }

    /// Stores a duplicate of `fd`, and waits until the manager has read it: from then on it outlives this process. Fails with
    /// `TimedOut` if the manager does not read, with `BrokenPipe` if the store's thread has ended.
    pub fn put(&self, name: Name, fd: BorrowedFd<'_>) -> io::Result<()> {
        let Backend::Manager(manager) = &self.backend else { return Ok(()) };
        let (done, result) = channel();
        let fd = fd.try_clone_to_owned()?;
        let gone = |error| match error {
            RecvTimeoutError::Timeout => io::Error::from(io::ErrorKind::TimedOut),
            RecvTimeoutError::Disconnected => io::Error::from(io::ErrorKind::BrokenPipe),
        };
        manager
            .send(Request::Put { name, fd, done })
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        result.recv_timeout(ANSWER_TIMEOUT).map_err(gone)?
    }

    /// Claims a name, before its descriptor is put.
    pub fn claim(&self, name: Name) -> Claim {
        *lock(&self.claims).entry(name.clone()).or_default() += 1;
        Claim { claims: Arc::clone(&self.claims), name }
    }

    /// Removes the descriptors under this name from the store, after everything that was requested before. Does nothing while
    /// the name is claimed.
    pub fn remove(&self, name: Name) {
        // Locked until the request is queued: a descriptor that is put under a later claim is put after this removal.
        let claims = lock(&self.claims);
        if !claims.contains_key(&name) {
            self.send(Request::Remove { name });
        }
    }

    /// Waits until the manager has read everything that was requested before, for 15 s at most.
    pub fn settle(&self) {
        let (done, settled) = channel();
        self.send(Request::Settle { done });
        // A failure is not reported here: the thread has logged it, or its panic.
        let _ = settled.recv_timeout(ANSWER_TIMEOUT);
    }

    /// Reports that the service is ready (`READY=1`).
    pub fn ready(&self) {
        self.send(Request::Notify { state: NotifyState::Ready });
    }

    /// Reports that the service stops (`STOPPING=1`).
    pub fn stopping(&self) {
        self.send(Request::Notify { state: NotifyState::Stopping });
    }

    /// Asks for more time to stop, counted from now (`EXTEND_TIMEOUT_USEC=`).
    pub fn extend_timeout(&self, time: Duration) {
        let usec = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        self.send(Request::Notify { state: NotifyState::ExtendTimeoutUsec(usec) });
    }

    fn send(&self, request: Request) {
        // A send fails only after the thread has panicked, which was logged.
        match (&self.backend, request) {
            (Backend::Manager(manager), request) => _ = manager.send(request),
            (Backend::Owner(owner), Request::Remove { name }) => _ = owner.send(name),
            (Backend::Owner(_), _) => {}
        }
    }
}

fn serve(requests: &Receiver<Request>) {
    for request in requests {
        let sent = match request {
            Request::Put { name, fd, done } => {
                let _ = done.send(put(&name, fd.as_fd()));
                Ok(())
            }
            Request::Remove { name } => {
                notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name.to_string())])
            }
            Request::Notify { state } => notify(&[state]),
            Request::Settle { done } => {
                let settled = barrier();
                let _ = done.send(());
                settled
            }
        };
        if let Err(error) = sent {
            log::warn!("cannot notify the service manager: {error}");
        }
    }
}

fn put(name: &Name, fd: BorrowedFd<'_>) -> io::Result<()> {
    let name = name.to_string();
    // FDPOLL=0: else the manager drops a socket whose other end is closed. This process and the next detect that themselves.
    let state = [NotifyState::FdStore, NotifyState::FdName(&name), NotifyState::Custom("FDPOLL=0")];
    notify_with_fds(&state, &[fd])?;
    barrier()
}

/// Waits until the manager has read everything sent so far: it closes its end of the pipe that is sent with `BARRIER=1`
/// (`sd_notify(3)`). Needed because the manager cannot assign a message to its service once the sender has died.
fn barrier() -> io::Result<()> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[write.as_fd()])?;
    drop(write);
    let timeout = Timespec { tv_sec: BARRIER_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
    match poll(&mut [PollFd::new(&read, PollFlags::IN)], Some(&timeout))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_valid_for_the_manager_and_parsed_back() {
        let file = FileId { device: u64::MAX, inode: 0x1234 };
        let names = [
            Name::Ledger,
            Name::Iommufd,
            Name::Container,
            Name::Group(17),
            Name::Device("0000:04:00.0".into()),
            Name::Memory(file),
            Name::Private(file),
            Name::Guardian,
            Name::Socket,
        ];
        for name in names {
            let text = name.to_string();
            assert!(
                text.len() <= 255 && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':'),
                "{text}"
            );
            assert_eq!(text.parse(), Ok(name));
        }
    }

    #[test]
    fn only_text_that_a_name_writes_is_parsed() {
        for text in [
            "",
            "passgate.",
            "passgate",
            "ledger",
            "passgate.ledger.",
            "passgate.ledger.1",
            "passgate.group",
            "passgate.group.-1",
            "passgate.group.007",
            "passgate.memory.1",
            "passgate.memory.1.2.3",
            "passgate.memory.0x1.2",
            "passgate.memory.1.G",
            "passgate.device",
            "connection",
            "stored",
        ] {
            assert_eq!(text.parse::<Name>(), Err(InvalidName), "{text}");
        }
    }
}
