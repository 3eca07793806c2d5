//! `--restart hold`: what this daemon takes over from the one before, and leaves to the next.
//!
//! Where something of it is missing or cannot be, nothing of it is used: what was kept is let go, by which devices are
//! stopped, and the daemon starts afresh. There is no half of a restart. Quarantine stays: what the ledger has, or, where
//! it cannot be read, all memory that was kept.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use passgate_backends::resume::{self, Ids};
use passgate_backends::{Accept, Assignment, Device, Domain};
use passgate_bindings::{PAGE, PageRange, identity};
use rustix::net::{SocketAddrAny, SocketAddrUnix, getsockname, sockopt};

use crate::error::{Error, Result};
use crate::gate::{Cause, Event, FileId, HeldBy, InvalidationId, Reason, Step};
use crate::session;
use crate::session::fdstore::{FdStore, Kept, Name};
use crate::session::lasting::{Lasting, LoadError, holds_in};

/// What a server goes on from, and hands on.
#[derive(Debug)]
pub struct Hold {
    pub(super) session: session::Hold,
    pub(super) adopt_within: Duration,
    /// What is to be kept before it serves; none where it is kept already.
    fresh: bool,
    socket: Option<OwnedFd>,
    guardian: Option<OwnedFd>,
    /// What the service manager keeps besides memory and the socket.
    names: Vec<Name>,
}

/// Why there is nothing to go on with.
#[derive(Debug)]
enum Why {
    Ledger(LoadError),
    Missing(Name),
    Devices(Vec<String>),
    Backend(passgate_backends::Error),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ledger(error) => error.fmt(f),
            Self::Missing(name) => write!(f, "`{name}` was not handed over"),
            Self::Devices(had) => write!(f, "the earlier daemon had other devices ({})", had.join(", ")),
            Self::Backend(error) => error.fmt(f),
        }
    }
}

impl Hold {
    /// Goes on from what the service manager handed over where that is whole; else has it let go, and takes domain and
    /// devices by `assign`. `devices` are those that are asked for, by their full names.
    pub fn open(
        store: FdStore,
        mut kept: Kept,
        devices: &[String],
        accept: Accept,
        adopt_within: Duration,
        assign: impl Fn() -> Result<Assignment>,
    ) -> Result<(Assignment, Self)> {
        // Whoever connects meanwhile waits there, whatever becomes of the rest.
        let socket = kept.one(&Name::Socket);
        let guardian = kept.one(&Name::Guardian);
        if !FdStore::keeps() {
            log::warn!(
                "the service manager does not say that it keeps descriptors ($FDSTORE): set FileDescriptorStoreMax= in \
                 the unit; systemd says so from version 254 on"
            );
        }
        let (names, ledger) = (kept.names(), kept.copy(&Name::Ledger));
        if !kept.is_empty() {
            match go_on(&mut kept, devices, accept, &assign)? {
                Ok((assignment, lasting, left)) => {
                    let fresh = left.ids == Ids::Nothing;
                    let session =
                        session::Hold { store, lasting, left: Some((left, kept)), quarantine: None };
                    return Ok((
                        assignment,
                        Self { session, adopt_within, fresh, socket, guardian, names: vec![] },
                    ));
                }
                Err(why) => log::error!(
                    "{why}: what the service manager kept is let go, its devices are stopped, and clients must add their \
                     memory again"
                ),
            }
        }
        let quarantine = quarantine(ledger, &kept);
        let held: BTreeSet<FileId> = quarantine
            .iter()
            .filter_map(|event| if let Event::Quarantine { file, .. } = event { Some(*file) } else { None })
            .collect();
        let stays = |name: &Name| matches!(name, Name::Memory(file) if held.contains(file));
        let kept = kept.only(stays);
        let goes = names.into_iter().filter(|name| !stays(name));
        goes.chain([Name::Guardian]).for_each(|name| store.remove(name));
        drop(guardian);
        store.settle();
        let assignment = assign()?;
        let lasting = Lasting::new().map_err(|error| keep_error(&Name::Ledger, error.to_string()))?;
        let quarantine = (!quarantine.is_empty()).then_some((quarantine, kept));
        let session = session::Hold { store, lasting, left: None, quarantine };
        Ok((assignment, Self { session, adopt_within, fresh: true, socket, guardian: None, names: vec![] }))
    }

    /// Has everything kept that the next daemon needs; what the ids of the domain are.
    pub(super) fn keep(&mut self, domain: &dyn Domain, devices: &[Arc<dyn Device>]) -> Result<Ids> {
        let failed = |source: std::io::Error| keep_error(&Name::Iommufd, source.to_string());
        let (left, ids) = resume::leave(domain, devices).map_err(failed)?;
        let domain = if matches!(ids, Ids::Type1 { .. }) { Name::Container } else { Name::Iommufd };
        self.names = vec![Name::Ledger, Name::Guardian, domain.clone()];
        self.names.extend(left.groups.iter().map(|(number, _)| Name::Group(*number)));
        self.names.extend(left.devices.iter().map(|(name, _)| Name::Device(name.clone())));
        if !self.fresh {
            return Ok(ids);
        }
        let store = &self.session.store;
        let put = |name: Name, fd: &dyn AsFd| {
            store.put(name.clone(), fd.as_fd()).map_err(|error| keep_error(&name, error.to_string()))
        };
        if let (None, Some(ledger)) = (&self.session.left, self.session.lasting.fd()) {
            put(Name::Ledger, &ledger)?;
        }
        for (number, fd) in &left.groups {
            put(Name::Group(*number), fd)?;
        }
        if let Some(fd) = &left.domain {
            put(domain, fd)?;
        }
        for (name, fd) in &left.devices {
            put(Name::Device(name.clone()), fd)?;
        }
        // A device that is dropped is stopped; these are the next daemon's.
        std::mem::forget(devices.to_vec());
        Ok(ids)
    }

    /// What the service manager keeps besides memory and the socket, and the way to it.
    pub(super) fn kept(&self) -> (FdStore, Vec<Name>) {
        (self.session.store.clone(), self.names.clone())
    }

    /// Where the guardian's socket is kept, and the one that was; nowhere where nothing outlives this process.
    pub(super) fn guard(&mut self, ids: Ids) -> (Option<FdStore>, Option<OwnedFd>) {
        let store = (ids != Ids::Nothing).then(|| self.session.store.clone());
        (store, self.guardian.take())
    }

    /// The socket that clients connect to: the one that was kept, where it is there, else a new one.
    pub(super) fn listener(
        &mut self,
        path: &Path,
        listen: impl FnOnce() -> Result<UnixListener>,
    ) -> Result<UnixListener> {
        if let Some(kept) = self.socket.take() {
            if listens_at(&kept, path) {
                return Ok(kept.into());
            }
            log::warn!("the socket that was kept does not listen at {}: a new one is made", path.display());
            self.session.store.remove(Name::Socket);
            self.session.store.settle();
        }
        let listener = listen()?;
        let put = self.session.store.put(Name::Socket, listener.as_fd());
        put.map_err(|error| keep_error(&Name::Socket, error.to_string()))?;
        Ok(listener)
    }
}

/// What stays in quarantine although nobody goes on from what was kept: what the ledger has, or, where it cannot be read,
/// every page of all memory that was kept.
fn quarantine(ledger: Option<OwnedFd>, kept: &Kept) -> Vec<Event> {
    let gone = Reason { cause: Cause::ClientGone, device: None, rung: Step::Unmap, errno: 0 };
    let known = match ledger.map(holds_in) {
        Some(Ok(holds)) => holds,
        Some(Err(error)) => return unknown(kept, &error.to_string()),
        None => return unknown(kept, "no ledger was kept"),
    };
    let event = |(file, range, by)| {
        let (invalidation, reason) = match by {
            HeldBy::Open(id) => (id, gone),
            HeldBy::Quarantine(id, reason) => (id, reason),
        };
        Event::Quarantine { file, range, invalidation, reason }
    };
    known.into_iter().map(event).collect()
}

/// All memory that was kept, in quarantine under a number for each file, which nothing else has: neither what the state
/// directory still has in quarantine, nor what another start has put there.
fn unknown(kept: &Kept, why: &str) -> Vec<Event> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let reason = Reason { cause: Cause::OwnerUnknown, device: None, rung: Step::Unmap, errno: 0 };
    let mut events = Vec::new();
    for name in kept.names() {
        let Name::Memory(file) = name else { continue };
        let Some(Ok(found)) = kept.copy(&name).map(identity::identify) else { continue };
        let Ok(range) = PageRange::new(0, found.size / PAGE * PAGE) else { continue };
        let invalidation = InvalidationId((now << 16) + events.len() as u64 + 1);
        events.push(Event::Quarantine { file, range, invalidation, reason });
    }
    if !events.is_empty() {
        log::error!(
            "{why}: what was in quarantine is unknown, so all {} files of memory that were kept are in quarantine until \
             they are released",
            events.len()
        );
    }
    events
}

/// Goes on from what was kept, or says why not.
#[allow(clippy::type_complexity)] // what a restart has, or why there is none
fn go_on(
    kept: &mut Kept,
    asked: &[String],
    accept: Accept,
    assign: &impl Fn() -> Result<Assignment>,
) -> Result<std::result::Result<(Assignment, Lasting, session::lasting::Left), Why>> {
    let Some(ledger) = kept.one(&Name::Ledger) else { return Ok(Err(Why::Missing(Name::Ledger))) };
    let (lasting, left) = match Lasting::open(ledger) {
        Ok(opened) => opened,
        Err(error) => return Ok(Err(Why::Ledger(error))),
    };
    if left.ids == Ids::Nothing {
        return Ok(Ok((assign()?, lasting, left)));
    }
    let (had, now): (BTreeSet<_>, BTreeSet<_>) = (left.devices.iter().collect(), asked.iter().collect());
    if had != now {
        return Ok(Err(Why::Devices(left.devices)));
    }
    let mut handed = resume::Left::default();
    let domain = if matches!(left.ids, Ids::Type1 { .. }) { Name::Container } else { Name::Iommufd };
    handed.domain = kept.one(&domain);
    for name in kept.names() {
        if let Name::Group(number) = name {
            handed.groups.extend(kept.one(&name).map(|fd| (number, fd)));
        }
    }
    for device in &left.devices {
        let name = Name::Device(device.clone());
        match kept.one(&name) {
            Some(fd) => handed.devices.push((device.clone(), fd)),
            None => return Ok(Err(Why::Missing(name))),
        }
    }
    let stopped = left.past.stopped.iter().filter_map(|id| left.devices.get(usize::from(id.0)));
    handed.stopped = stopped.cloned().collect();
    handed.ats_unused = left.ats_unused.clone();
    if handed.domain.is_none() {
        return Ok(Err(Why::Missing(domain)));
    }
    Ok(match resume::resume(handed, left.ids, accept) {
        Ok(assignment) => {
            std::mem::forget(assignment.devices.clone());
            Ok((assignment, lasting, left))
        }
        Err(error) => Err(Why::Backend(error)),
    })
}

/// Whether it is a Unix socket that listens at this path, and can be found there.
fn listens_at(socket: &OwnedFd, path: &Path) -> bool {
    let listens = sockopt::socket_acceptconn(socket) == Ok(true);
    let name = getsockname(socket).map(|name: SocketAddrAny| SocketAddrUnix::try_from(name));
    let there = matches!(name, Ok(Ok(name)) if SocketAddrUnix::new(path).as_ref() == Ok(&name));
    listens && there && std::fs::symlink_metadata(path).is_ok()
}

fn keep_error(name: &Name, why: String) -> Error {
    Error::Keep { name: name.to_string(), why }
}
