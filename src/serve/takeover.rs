//! `--restart hold`: what this daemon takes over from the one before, and what it stores for the next.
//!
//! A takeover is complete or not done at all. If a part of it is missing or cannot be used, every stored descriptor is removed
//! from the service manager, by which devices are stopped, and the daemon starts without a past. Quarantine outlives that: what
//! the ledger has in quarantine stays there, or, where the ledger cannot be read, all stored memory does.

use std::collections::BTreeSet;
use std::fmt;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use passgate_backends::handover::{DomainIds, Handover};
use passgate_backends::resume;
use passgate_backends::{Accept, Assignment, Device, Domain, Drivers};
use passgate_bindings::{PAGE, PageRange, identity};
use rustix::net::{SocketAddrAny, SocketAddrUnix, getsockname, sockopt};

use crate::error::{Error, Result};
use crate::gate::{Cause, Event, ExcludedBy, FileId, InvalidationId, Reason, Rung};
use crate::session;
use crate::session::fdstore::{FdStore, Name, StoredFds};
use crate::session::persist::{LoadError, PersistentState, read_exclusions};

/// The state that a server takes over, and by which it hands its own over to the next daemon.
#[derive(Debug)]
pub struct Takeover {
    pub(super) session: session::Persistence,
    /// The time for which memory of the earlier daemon's clients waits to be adopted.
    pub(super) adopt_within: Duration,
    /// True if the descriptors of domain and devices are not in the service manager's store yet.
    must_store: bool,
    /// The control socket of the earlier daemon.
    socket: Option<OwnedFd>,
    /// The worker's end of the earlier guardian's socket.
    guardian: Option<OwnedFd>,
    /// The names of the stored descriptors, without those of memory and of the control socket.
    stored_names: Vec<Name>,
    /// References to the devices whose descriptors are stored. They are never dropped: dropping a device stops it, and these run on
    /// for the next daemon, however this process ends.
    running: ManuallyDrop<Vec<Arc<dyn Device>>>,
}

/// The reason why an earlier daemon's state cannot be taken over.
#[derive(Debug)]
enum TakeoverError {
    Ledger(LoadError),
    Missing(Name),
    Devices(Vec<String>),
    Backend(passgate_backends::Error),
}

impl fmt::Display for TakeoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ledger(error) => error.fmt(f),
            Self::Missing(name) => write!(f, "`{name}` was not handed over"),
            Self::Devices(had) => write!(f, "the earlier daemon had other devices ({})", had.join(", ")),
            Self::Backend(error) => error.fmt(f),
        }
    }
}

impl Takeover {
    /// Takes over the state that the service manager has handed over if it is complete. Otherwise removes it from the store, and
    /// takes domain and devices by `assign`. `devices` are the devices of the command line, by their full names
    /// (`0000:01:00.0`).
    ///
    /// Fails if `assign` does, or if no ledger can be made.
    pub fn open(
        store: FdStore,
        mut stored: StoredFds,
        devices: &[String],
        accept: Accept,
        drivers: &dyn Drivers,
        adopt_within: Duration,
        assign: impl Fn() -> Result<Assignment>,
    ) -> Result<(Assignment, Self)> {
        // Taken out first: it is used whether or not the rest can be taken over, and clients that connect meanwhile wait in
        // its queue.
        let socket = stored.one(&Name::Socket);
        let guardian = stored.one(&Name::Guardian);
        if !FdStore::is_announced() {
            log::warn!(
                "the service manager does not announce a descriptor store ($FDSTORE): set FileDescriptorStoreMax= in the \
                 unit; systemd announces it from version 254 on"
            );
        }
        let (names, ledger) = (stored.names(), stored.copy(&Name::Ledger));
        if !stored.is_empty() {
            match take_over(&mut stored, devices, accept, drivers, &assign)? {
                Ok((assignment, persistent, earlier)) => {
                    let must_store = earlier.ids == DomainIds::Nothing;
                    let session = session::Persistence {
                        store,
                        persistent,
                        earlier: Some((earlier, stored)),
                        quarantine: None,
                    };
                    // Else they are not in the store yet ([`Takeover::store_descriptors`]).
                    let running = if must_store { Vec::new() } else { assignment.devices.clone() };
                    let (stored_names, running) = (Vec::new(), ManuallyDrop::new(running));
                    let takeover =
                        Self { session, adopt_within, must_store, socket, guardian, stored_names, running };
                    return Ok((assignment, takeover));
                }
                Err(error) => log::error!(
                    "{error}: the stored descriptors are closed, which stops their devices, and clients must add their \
                     memory again"
                ),
            }
        }
        let quarantine = quarantine_events(ledger, &stored);
        let quarantined: BTreeSet<FileId> = quarantine
            .iter()
            .filter_map(|event| if let Event::Quarantine { file, .. } = event { Some(*file) } else { None })
            .collect();
        let is_quarantined = |name: &Name| matches!(name, Name::Memory(file) if quarantined.contains(file));
        let stored = stored.only(is_quarantined);
        let removed = names.into_iter().filter(|name| !is_quarantined(name));
        removed.chain([Name::Guardian]).for_each(|name| store.remove(name));
        drop(guardian);
        // The manager must have closed the devices before they are assigned again.
        store.settle();
        let assignment = assign()?;
        let persistent =
            PersistentState::new().map_err(|error| store_error(&Name::Ledger, error.to_string()))?;
        let quarantine = (!quarantine.is_empty()).then_some((quarantine, stored));
        let session = session::Persistence { store, persistent, earlier: None, quarantine };
        let (stored_names, running) = (Vec::new(), ManuallyDrop::new(Vec::new()));
        let (must_store, guardian) = (true, None);
        let takeover = Self { session, adopt_within, must_store, socket, guardian, stored_names, running };
        Ok((assignment, takeover))
    }

    /// Stores the descriptors of ledger, domain and devices for the next daemon. Returns the ids of the domain.
    pub(super) fn store_descriptors(
        &mut self,
        domain: &dyn Domain,
        devices: &[Arc<dyn Device>],
    ) -> Result<DomainIds> {
        let failed = |source: std::io::Error| store_error(&Name::Iommufd, source.to_string());
        let (copies, ids) = resume::leave(domain, devices).map_err(failed)?;
        let domain = if matches!(ids, DomainIds::Type1 { .. }) { Name::Container } else { Name::Iommufd };
        self.stored_names = vec![Name::Ledger, Name::Guardian, domain.clone()];
        self.stored_names.extend(copies.groups.iter().map(|(number, _)| Name::Group(*number)));
        self.stored_names.extend(copies.devices.iter().map(|(name, _)| Name::Device(name.clone())));
        if !self.must_store {
            return Ok(ids);
        }
        let store = &self.session.store;
        let put = |name: Name, fd: &dyn AsFd| {
            store.put(name.clone(), fd.as_fd()).map_err(|error| store_error(&name, error.to_string()))
        };
        if let (None, Some(ledger)) = (&self.session.earlier, self.session.persistent.fd()) {
            put(Name::Ledger, &ledger)?;
        }
        for (number, fd) in &copies.groups {
            put(Name::Group(*number), fd)?;
        }
        if let Some(fd) = &copies.domain {
            put(domain, fd)?;
        }
        for (name, fd) in &copies.devices {
            put(Name::Device(name.clone()), fd)?;
        }
        self.running = ManuallyDrop::new(devices.to_vec());
        Ok(ids)
    }

    /// Returns the service manager's store, and the names of the stored descriptors, without those of memory and of the control
    /// socket.
    pub(super) fn stored(&self) -> (FdStore, Vec<Name>) {
        (self.session.store.clone(), self.stored_names.clone())
    }

    /// Returns the store for the guardian's socket, or none where nothing outlives this process, and the earlier guardian's
    /// socket.
    pub(super) fn guardian_store(&mut self, ids: DomainIds) -> (Option<FdStore>, Option<OwnedFd>) {
        let store = (ids != DomainIds::Nothing).then(|| self.session.store.clone());
        (store, self.guardian.take())
    }

    /// Returns the control socket: the stored one if it listens at `path`, else a new one, which is stored.
    pub(super) fn listener(
        &mut self,
        path: &Path,
        listen: impl FnOnce() -> Result<UnixListener>,
    ) -> Result<UnixListener> {
        if let Some(stored) = self.socket.take() {
            if listens_at(&stored, path) {
                return Ok(stored.into());
            }
            log::warn!("the stored socket does not listen at {}: a new one is made", path.display());
            self.session.store.remove(Name::Socket);
            self.session.store.settle();
        }
        let listener = listen()?;
        let put = self.session.store.put(Name::Socket, listener.as_fd());
        put.map_err(|error| store_error(&Name::Socket, error.to_string()))?;
        Ok(listener)
    }
}

/// Returns the quarantine that outlives a takeover that is not done: what the ledger excludes, or, where it cannot be read,
/// all pages of all stored memory.
fn quarantine_events(ledger: Option<OwnedFd>, stored: &StoredFds) -> Vec<Event> {
    // An invalidation that was open has lost its client between begin and end.
    let client_gone = Reason { cause: Cause::ClientGone, device: None, rung: Rung::Unmap, errno: 0 };
    let excluded = match ledger.map(read_exclusions) {
        Some(Ok(exclusions)) => exclusions,
        Some(Err(error)) => return quarantine_all(stored, &error.to_string()),
        None => return quarantine_all(stored, "no ledger was stored"),
    };
    let event = |(file, range, by)| {
        let (invalidation, reason) = match by {
            ExcludedBy::Open(id) => (id, client_gone),
            ExcludedBy::Quarantine(id, reason) => (id, reason),
        };
        Event::Quarantine { file, range, invalidation, reason }
    };
    excluded.into_iter().map(event).collect()
}

/// Returns the quarantine of all stored memory, one invalidation number for each file. The numbers start at the time in seconds
/// times 65 536, so that they are neither those of the quarantine in the state directory nor those of another start.
fn quarantine_all(stored: &StoredFds, why: &str) -> Vec<Event> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let reason = Reason { cause: Cause::OwnerUnknown, device: None, rung: Rung::Unmap, errno: 0 };
    let mut events = Vec::new();
    for name in stored.names() {
        let Name::Memory(file) = name else { continue };
        let Some(Ok(found)) = stored.copy(&name).map(identity::identify) else { continue };
        let Ok(range) = PageRange::new(0, found.size / PAGE * PAGE) else { continue };
        let invalidation = InvalidationId((now << 16) + events.len() as u64 + 1);
        events.push(Event::Quarantine { file, range, invalidation, reason });
    }
    if !events.is_empty() {
        log::error!(
            "{why}: what was in quarantine is unknown: all {} stored files of memory stay in quarantine until they are \
             released",
            events.len()
        );
    }
    events
}

/// Takes over what is stored, or returns why that cannot be done. The outer error is one of `assign`.
#[allow(clippy::type_complexity)] // the three parts of a takeover, or why there is none
fn take_over(
    stored: &mut StoredFds,
    requested: &[String],
    accept: Accept,
    drivers: &dyn Drivers,
    assign: &impl Fn() -> Result<Assignment>,
) -> Result<std::result::Result<(Assignment, PersistentState, session::persist::EarlierState), TakeoverError>>
{
    let Some(ledger) = stored.one(&Name::Ledger) else {
        return Ok(Err(TakeoverError::Missing(Name::Ledger)));
    };
    let (persistent, earlier) = match PersistentState::open(ledger) {
        Ok(opened) => opened,
        Err(error) => return Ok(Err(TakeoverError::Ledger(error))),
    };
    if earlier.ids == DomainIds::Nothing {
        return Ok(Ok((assign()?, persistent, earlier)));
    }
    let (had, now): (BTreeSet<_>, BTreeSet<_>) =
        (earlier.devices.iter().collect(), requested.iter().collect());
    if had != now {
        return Ok(Err(TakeoverError::Devices(earlier.devices)));
    }
    let mut fds = Handover::default();
    let domain = if matches!(earlier.ids, DomainIds::Type1 { .. }) { Name::Container } else { Name::Iommufd };
    fds.domain = stored.one(&domain);
    for name in stored.names() {
        if let Name::Group(number) = name {
            fds.groups.extend(stored.one(&name).map(|fd| (number, fd)));
        }
    }
    for device in &earlier.devices {
        let name = Name::Device(device.clone());
        match stored.one(&name) {
            Some(fd) => fds.devices.push((device.clone(), fd)),
            None => return Ok(Err(TakeoverError::Missing(name))),
        }
    }
    let stopped = earlier.past.stopped.iter().filter_map(|id| earlier.devices.get(usize::from(id.0)));
    fds.stopped = stopped.cloned().collect();
    fds.ats_unused = earlier.ats_unused.clone();
    if fds.domain.is_none() {
        return Ok(Err(TakeoverError::Missing(domain)));
    }
    Ok(match resume::resume(fds, earlier.ids, accept, drivers) {
        Ok(assignment) => Ok((assignment, persistent, earlier)),
        Err(error) => Err(TakeoverError::Backend(error)),
    })
}

/// Returns true if it is a Unix socket that listens, bound to this path, and a file is there.
fn listens_at(socket: &OwnedFd, path: &Path) -> bool {
    let listens = sockopt::socket_acceptconn(socket) == Ok(true);
    let name = getsockname(socket).map(|name: SocketAddrAny| SocketAddrUnix::try_from(name));
    let there = matches!(name, Ok(Ok(name)) if SocketAddrUnix::new(path).as_ref() == Ok(&name));
    listens && there && std::fs::symlink_metadata(path).is_ok()
}

fn store_error(name: &Name, why: String) -> Error {
    Error::Keep { name: name.to_string(), why }
}
