//! The service manager's file descriptor store: what outlives this process, and comes back to the next.
//!
//! The manager keeps copies of what it is sent under a name (`sd_notify(3)`, FDSTORE=1) and hands all of it over when it
//! starts the service again (`LISTEN_FDS`). As long as it keeps a device's file, the device's DMA goes on; when it
//! drops the store, everything closes and the kernel stops what nobody else holds. What comes back is trusted for
//! rights, because nobody else can put it there, and not for shape: every descriptor is looked at before it is used.
//!
//! A thread of its own speaks to the manager, in order: a manager that takes its time delays no answer.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use passgate_bindings::handed;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use sd_notify::{NotifyState, notify, notify_with_fds};

use crate::error::{Error, Result};
use crate::gate::FileId;

/// What every name begins with.
const OURS: &str = "passgate.";
/// How long the manager may take to say that it has read what it was sent.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long to wait for what the manager was asked: its socket may be full, and then sending to it waits.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// What is kept, and under which name: printable, without a colon, at most 255 characters (`sd_notify(3)`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// The gate's ledger.
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
        f.write_str(OURS)?;
        let file = |f: &mut fmt::Formatter<'_>, what, file: &FileId| {
            write!(f, "{what}.{:x}.{:x}", file.device, file.inode)
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

/// Not a name of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotOurs;

impl FromStr for Name {
    type Err = NotOurs;

    /// Only what [`Name`] itself writes, so that a name that is removed is the one that was taken.
    fn from_str(text: &str) -> Result<Self, NotOurs> {
        let (what, rest) = match text.strip_prefix(OURS).ok_or(NotOurs)?.split_once('.') {
            Some((what, rest)) => (what, Some(rest)),
            None => (text.strip_prefix(OURS).ok_or(NotOurs)?, None),
        };
        let file = |text: &str| {
            let (device, inode) = text.split_once('.')?;
            let hex = |text| u64::from_str_radix(text, 16).ok();
            Some(FileId { device: hex(device)?, inode: hex(inode)? })
        };
        let name = match (what, rest) {
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
        name.filter(|name| name.to_string() == text).ok_or(NotOurs)
    }
}

/// What the service manager handed over at the start.
#[derive(Debug, Default)]
pub struct Kept {
    kept: BTreeMap<Name, Vec<OwnedFd>>,
}

impl Kept {
    /// Takes it. What has no name of ours is closed, with a warning. Call it before this process opens anything.
    pub fn take() -> Result<Self> {
        let mut kept = Self::default();
        for (text, fd) in handed::take().map_err(|source| Error::Handed { source })? {
            match text.parse() {
                Ok(name) => kept.kept.entry(name).or_default().push(fd),
                Err(NotOurs) => {
                    log::warn!("the service manager handed over `{text}`, which is none of passgate's")
                }
            }
        }
        Ok(kept)
    }

    /// These files, as if the service manager had handed them over: for a session without one, under test.
    pub fn of(kept: BTreeMap<Name, Vec<OwnedFd>>) -> Self {
        Self { kept }
    }

    /// Whether nothing came.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Everything under this name; more than one only where one file was passed by several descriptors.
    pub fn all(&mut self, name: &Name) -> Vec<OwnedFd> {
        self.kept.remove(name).unwrap_or_default()
    }

    /// The one under this name; the newest where there are several.
    pub fn one(&mut self, name: &Name) -> Option<OwnedFd> {
        self.all(name).pop()
    }

    /// A copy of the one under this name; the newest where there are several.
    pub fn copy(&self, name: &Name) -> Option<OwnedFd> {
        self.kept.get(name)?.last()?.try_clone().ok()
    }

    /// What is kept under names of which `wanted` says so; the rest is closed.
    pub fn only(mut self, wanted: impl Fn(&Name) -> bool) -> Self {
        self.kept.retain(|name, _| wanted(name));
        self
    }

    /// The names of what is left.
    pub fn names(&self) -> Vec<Name> {
        self.kept.keys().cloned().collect()
    }
}

#[derive(Debug)]
enum Ask {
    Put { name: Name, fd: OwnedFd, done: Sender<io::Result<()>> },
    Remove { name: Name },
    Say { state: NotifyState<'static> },
    Settle { done: Sender<()> },
}

/// The service manager, as far as it keeps descriptors and wants to know how we are.
#[derive(Debug, Clone)]
pub struct FdStore {
    keeper: Keeper,
    claims: Claims,
}

/// The names that are claimed, and how often.
type Claims = Arc<Mutex<BTreeMap<Name, usize>>>;

/// Keeps a name from being removed until it is dropped: its file is put, and whether it is needed is not known yet. Who drops
/// it has the name removed where it is not.
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
enum Keeper {
    /// The service manager, by the thread that speaks to it.
    Manager(Sender<Ask>),
    /// The session's owner, who keeps the files itself and is told which are not needed any more.
    Owner(Sender<Name>),
}

impl FdStore {
    /// The store of the service manager that started this process; none where none did (no `NOTIFY_SOCKET`). `prepare`
    /// is the first thing that its thread does, where a thread must give up what this one has.
    pub fn open(prepare: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Option<Self>> {
        if env::var_os("NOTIFY_SOCKET").is_none() {
            return Ok(None);
        }
        let (ask, asked) = channel();
        std::thread::Builder::new()
            .name("fd store".into())
            .spawn(move || match prepare() {
                Ok(()) => serve(&asked),
                Err(error) => log::error!("{error}"),
            })
            .map_err(Error::Thread)?;
        Ok(Some(Self { keeper: Keeper::Manager(ask), claims: Claims::default() }))
    }

    /// A store without a service manager, for a session under test: the session's owner keeps the files itself, and
    /// receives the names that are removed.
    pub fn detached() -> (Self, Receiver<Name>) {
        let (removed, names) = channel();
        (Self { keeper: Keeper::Owner(removed), claims: Claims::default() }, names)
    }

    /// Whether the manager says that it keeps anything: systemd does from version 254 on (`$FDSTORE`).
    pub fn keeps() -> bool {
        let most = env::var("FDSTORE").ok().and_then(|most| most.parse::<u32>().ok());
        most.is_some_and(|most| most > 0)
    }

    /// Has a copy of `fd` kept, and waits until the manager has read it: from then on it outlives this process.
    pub fn put(&self, name: Name, fd: BorrowedFd<'_>) -> io::Result<()> {
        let Keeper::Manager(ask) = &self.keeper else { return Ok(()) };
        let (done, told) = channel();
        let fd = fd.try_clone_to_owned()?;
        let gone = |error| match error {
            RecvTimeoutError::Timeout => io::Error::from(io::ErrorKind::TimedOut),
            RecvTimeoutError::Disconnected => io::Error::from(io::ErrorKind::BrokenPipe),
        };
        ask.send(Ask::Put { name, fd, done }).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        told.recv_timeout(ANSWER_TIMEOUT).map_err(gone)?
    }

    /// Claims a name, before its file is put.
    pub fn claim(&self, name: Name) -> Claim {
        *lock(&self.claims).entry(name.clone()).or_default() += 1;
        Claim { claims: Arc::clone(&self.claims), name }
    }

    /// Has what is kept under this name closed there, after everything that was asked before; not while it is claimed.
    pub fn remove(&self, name: Name) {
        // Locked until it is asked: what is put after a claim is put after this.
        let claims = lock(&self.claims);
        if !claims.contains_key(&name) {
            self.tell(Ask::Remove { name });
        }
    }

    /// Waits until the manager has read everything that was asked before.
    pub fn settle(&self) {
        let (done, told) = channel();
        self.tell(Ask::Settle { done });
        // Without a word it ends where the manager does not read, or the thread has panicked, which has been said.
        let _ = told.recv_timeout(ANSWER_TIMEOUT);
    }

    /// The service is ready.
    pub fn ready(&self) {
        self.tell(Ask::Say { state: NotifyState::Ready });
    }

    /// The service stops.
    pub fn stopping(&self) {
        self.tell(Ask::Say { state: NotifyState::Stopping });
    }

    fn tell(&self, ask: Ask) {
        // It fails only where the thread has panicked, which has been said.
        match (&self.keeper, ask) {
            (Keeper::Manager(manager), ask) => _ = manager.send(ask),
            (Keeper::Owner(owner), Ask::Remove { name }) => _ = owner.send(name),
            (Keeper::Owner(_), _) => {}
        }
    }
}

fn serve(asked: &Receiver<Ask>) {
    for ask in asked {
        let said = match ask {
            Ask::Put { name, fd, done } => {
                let _ = done.send(put(&name, fd.as_fd()));
                Ok(())
            }
            Ask::Remove { name } => {
                notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name.to_string())])
            }
            Ask::Say { state } => notify(&[state]),
            Ask::Settle { done } => {
                let settled = barrier();
                let _ = done.send(());
                settled
            }
        };
        if let Err(error) = said {
            log::warn!("the service manager cannot be told: {error}");
        }
    }
}

fn put(name: &Name, fd: BorrowedFd<'_>) -> io::Result<()> {
    let name = name.to_string();
    // Without FDPOLL=0 the manager would drop a socket whose other end is gone, which we want to find out ourselves.
    let state = [NotifyState::FdStore, NotifyState::FdName(&name), NotifyState::Custom("FDPOLL=0")];
    notify_with_fds(&state, &[fd])?;
    barrier()
}

/// Waits until the manager has read everything so far: it closes the pipe that comes with `BARRIER=1`. A message of a
/// process that has died meanwhile would belong to nobody.
fn barrier() -> io::Result<()> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[write.as_fd()])?;
    drop(write);
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    match poll(&mut [PollFd::new(&read, PollFlags::IN)], Some(&patience))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_they_went_and_the_manager_takes_them() {
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
    fn what_is_not_ours_is_no_name() {
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
            assert_eq!(text.parse::<Name>(), Err(NotOurs), "{text}");
        }
    }
}
