//! The server of one VM: its loop, and the interfaces of its session: the control socket, the notification channel, the
//! vhost-user back-end ([`vhost_blk`]), and queries of other threads of this process ([`Inside`]).
//!
//! One process, one VM, one loop. [`Server::bind`] makes the socket, [`Server::run`] serves until it is stopped: then devices
//! are stopped, mappings are removed, and only then the files of guest memory are closed.

mod accept;
mod backlog;
mod channel;
mod connection;
mod control;
mod ending;
mod event_loop;
pub mod files_limit;
mod handoff;
mod inside;
mod poller;
pub mod privilege;
mod release;
mod scrape;
mod socket_file;
mod subscribers;
mod takeover;
pub mod vhost_blk;
mod vm;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use passgate_backends::{Device, Domain};
use passgate_bindings::memory::GuestFile;

use crate::error::{Error, Result};
use crate::gate::Policy;
use crate::session::fdstore::{FdStore, Name};
use crate::session::guardian::Watch;
use crate::session::records::StateOptions;
use event_loop::Core;
use socket_file::{CONTROL_REMEDIES, METRICS_REMEDIES, SocketFile, listen};
use vm::{Sockets, Vm};

pub use inside::Inside;
pub use takeover::Takeover;

/// The configuration of a server.
#[derive(Debug, Clone)]
pub struct Options {
    /// The path of the control socket; none for no such socket: then all clients are of this process ([`Inside::connect`]).
    pub socket_path: Option<PathBuf>,
    /// The gate's policy.
    pub policy: Policy,
    /// True if clients may have devices do DMA on demand (`Dma`).
    pub allow_dma: bool,
    /// True if an operator may release a quarantine (`Release`).
    pub allow_release: bool,
    /// The path of the metrics socket; none for no such socket.
    pub metrics_path: Option<PathBuf>,
    /// The number of connections, without the operators' reserve and those of this process.
    pub max_clients: usize,
    /// The time that a stopped server waits for all regions to be closed. Closes that progress are waited for beyond it.
    pub farewell: Duration,
    /// The program whose hidden subcommand is the guardian ([`crate::session::guardian`]); none for no guardian.
    pub guardian: Option<PathBuf>,
    /// The names of devices to which a DMA fault does no harm ([`crate::gate::DeviceTraits::tolerant`]).
    pub tolerant: Vec<String>,
    /// True if memory is accepted whose file can be shrunk ([`crate::session::Trust::unsealed`]).
    pub unsealed: bool,
    /// The state directory with the audit log and the quarantine; none for neither.
    pub state: Option<StateOptions>,
    /// The signals that stop the server.
    pub stop_signals: Vec<i32>,
    /// True if the vhost-user back-end of this process stops the server, also when the host wants a device back.
    pub has_door: bool,
    /// The service manager that is notified of readiness and of the end (`sd_notify(3)`); none without one.
    pub manager: Option<FdStore>,
}

impl Options {
    /// Returns the defaults, with a control socket at `socket_path`.
    pub fn at(socket_path: impl Into<PathBuf>) -> Self {
        Self { socket_path: Some(socket_path.into()), ..Self::nowhere() }
    }

    /// Returns the defaults, without a socket.
    pub fn nowhere() -> Self {
        Self {
            socket_path: None,
            policy: Policy::default(),
            allow_dma: false,
            allow_release: true,
            metrics_path: None,
            max_clients: 64,
            farewell: Duration::from_secs(10),
            guardian: None,
            tolerant: Vec::new(),
            unsealed: false,
            state: None,
            stop_signals: Vec::new(),
            has_door: false,
            manager: None,
        }
    }
}

/// A server, ready to run.
#[derive(Debug)]
pub struct Server {
    vm: Box<Vm>,
    core: Arc<Core>,
    generation: handoff::Generation,
    stop: UnixStream,
    file: Option<SocketFile>,
    metrics_file: Option<SocketFile>,
    guardian: Option<Watch>,
    /// The service manager's store and the names of what is stored there for the next daemon, without memory and the control
    /// socket; none where nothing is handed over.
    stored: Option<(FdStore, Vec<Name>)>,
}

impl Server {
    /// Makes the sockets that are configured (mode 0600) and the session. A socket file at which no process listens is replaced;
    /// one that is in use is an error.
    pub fn bind(options: Options, domain: Arc<dyn Domain>, devices: Vec<Arc<dyn Device>>) -> Result<Self> {
        Self::bind_with_takeover(options, domain, devices, None)
    }

    /// As [`Server::bind`]; with a `takeover` the server continues an earlier daemon's state and hands its own over to the next.
    pub fn bind_with_takeover(
        options: Options,
        domain: Arc<dyn Domain>,
        devices: Vec<Arc<dyn Device>>,
        mut takeover: Option<Takeover>,
    ) -> Result<Self> {
        let (stop, stopped) = UnixStream::pair().map_err(Error::Poll)?;
        // Before the socket is visible: a process that sees it may send a signal at once.
        for signal in &options.stop_signals {
            let stop = stop.as_fd().try_clone_to_owned().map_err(Error::Poll)?;
            signal_hook::low_level::pipe::register(*signal, stop).map_err(Error::Signal)?;
        }
        let ids =
            takeover.as_mut().map(|takeover| takeover.store_descriptors(&*domain, &devices)).transpose()?;
        let path = options.socket_path.clone();
        let listener = match (&mut takeover, &path) {
            (Some(takeover), Some(path)) => {
                Some(takeover.listener(path, || listen(path, &CONTROL_REMEDIES))?)
            }
            (None, Some(path)) => Some(listen(path, &CONTROL_REMEDIES)?),
            (_, None) => None,
        };
        let file = path.map(SocketFile::at);
        let metrics =
            options.metrics_path.as_deref().map(|path| listen(path, &METRICS_REMEDIES)).transpose()?;
        let metrics_file = options.metrics_path.clone().map(SocketFile::at);
        let guardian = match &options.guardian {
            Some(program) => {
                let (store, earlier) = match (&mut takeover, ids) {
                    (Some(takeover), Some(ids)) => takeover.guardian_store(ids),
                    _ => (None, None),
                };
                Watch::resume(program.clone(), devices.clone(), store, earlier)?
            }
            None => None,
        };
        let (core, generation) = Core::new()?;
        let stored = takeover.as_ref().map(Takeover::stored);
        let sockets = Sockets { listener, metrics, stopped };
        let vm = Vm::new(options, sockets, Arc::clone(&core), domain, devices, takeover)?;
        if let Some(ids) = ids {
            vm.session.complete(ids);
        }
        Ok(Self { vm: Box::new(vm), core, generation, stop, file, metrics_file, guardian, stored })
    }

    /// Returns a handle that stops the server from another thread.
    pub fn stopper(&self) -> Result<Stopper> {
        self.stop.try_clone().map(Stopper).map_err(Error::Poll)
    }

    /// Returns a handle of the loop for other threads of this process. It may be used before the loop runs and after it has
    /// ended.
    pub fn inside(&self) -> Inside {
        Inside::of(&self.core)
    }

    /// Returns the files of guest memory that were taken over from an earlier daemon.
    pub fn guest_files(&self) -> Vec<Weak<GuestFile>> {
        self.vm.session.guest_files()
    }

    /// Serves until stopped. Fails if regions cannot be closed in time ([`Error::StillOpen`]) or the loop fails.
    pub fn run(self) -> Result<()> {
        let (file, _metrics_file) = (self.file, self.metrics_file);
        if let Some(manager) = &self.vm.options.manager {
            manager.ready();
        }
        if let Some((store, stored)) = self.stored {
            // The socket's file stays: the service manager has the socket, and clients wait in its queue.
            std::mem::forget(file);
            let core = Arc::clone(&self.core);
            let result = event_loop::run(self.core, self.generation, self.vm);
            if core.handover_cancelled() {
                // As below: where the loop has failed, the guardian must stop the devices.
                if let Some(guardian) = self.guardian.filter(|_| result.is_ok()) {
                    guardian.bye();
                }
                stored.into_iter().for_each(|name| store.remove(name));
                store.settle();
            }
            return result;
        }
        let _file = file;
        // If the loop fails, the guardian gets no farewell message, and therefore stops the devices.
        event_loop::run(self.core, self.generation, self.vm)?;
        if let Some(guardian) = self.guardian {
            guardian.bye();
        }
        Ok(())
    }

    /// Serves on a thread of its own.
    pub fn spawn(self) -> Result<Handle> {
        let stop = self.stop.try_clone().map_err(Error::Poll)?;
        let path = self.file.as_ref().map(|file| file.path().to_owned()).unwrap_or_default();
        let thread = std::thread::Builder::new().name("session".into()).spawn(move || self.run());
        Ok(Handle { path, stop, thread: Some(thread.map_err(Error::Thread)?) })
    }
}

/// Stops a server that runs.
#[derive(Debug)]
pub struct Stopper(UnixStream);

impl Stopper {
    /// Stops the server, like a stop signal.
    pub fn stop(&self) {
        let _ = std::io::Write::write(&mut &self.0, &[0]);
    }
}

/// A server on a thread of its own; stopped when dropped.
#[derive(Debug)]
pub struct Handle {
    path: PathBuf,
    stop: UnixStream,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Handle {
    /// Returns the path of the control socket; empty where there is none.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops the server, waits for its end, and returns its result.
    pub fn stop(mut self) -> Result<()> {
        self.halt()
    }

    fn halt(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let _ = std::io::Write::write(&mut &self.stop, &[0]);
        thread.join().unwrap_or(Err(Error::Panicked("session")))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Err(error) = self.halt() {
            log::error!("{error}");
        }
    }
}
