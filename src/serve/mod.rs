//! The ways a VMM reaches a session: here the control socket and its notification channel, and what other threads of
//! this process ask of it ([`Inside`]).
//!
//! One process, one VM, one loop. [`Server::bind`] makes the socket, [`Server::run`] serves until it is stopped:
//! then devices are stopped, mappings go, and only then the process lets go of its files.

mod accept;
mod backlog;
mod baton;
mod channel;
mod connection;
mod control;
mod event_loop;
pub mod files_limit;
mod hold;
mod inside;
mod listen;
mod poller;
pub mod privilege;
mod release;
mod scrape;
mod socket_file;
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
use crate::observe::records::StateOptions;
use crate::session::fdstore::{FdStore, Name};
use crate::session::guardian::Watch;
use event_loop::Core;
use socket_file::{CONTROL, METRICS, SocketFile, listen};
use vm::{Sockets, Vm};

pub use hold::Hold;
pub use inside::Inside;

/// What a server is told once.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where its socket is made; none for no such socket, where all clients are of this process ([`Inside::connect`]).
    pub socket_path: Option<PathBuf>,
    /// The gate's policy.
    pub policy: Policy,
    /// Whether clients may have devices do DMA (`Dma`).
    pub allow_dma: bool,
    /// Whether a person may take a range out of quarantine (`Release`).
    pub allow_release: bool,
    /// Where the metrics socket is made; none for no such socket.
    pub metrics_path: Option<PathBuf>,
    /// Connections at most, but for a few short ones of operators.
    pub max_clients: usize,
    /// How long a stopped server waits for its memory to close.
    pub farewell: Duration,
    /// The program whose hidden subcommand is the guardian ([`crate::session::guardian`]); none for no guardian.
    pub guardian: Option<PathBuf>,
    /// The names of devices that a DMA fault does no harm ([`crate::gate::Nature::tolerant`]).
    pub tolerant: Vec<String>,
    /// Whether memory is taken whose file can be shrunk ([`crate::session::Trust::unsealed`]).
    pub unsealed: bool,
    /// Where the audit log and the quarantine are written down; none for nowhere.
    pub state: Option<StateOptions>,
    /// Signals that stop it.
    pub stop_signals: Vec<i32>,
    /// True where a door of this process stops the server, also where the host wants a device back.
    pub has_door: bool,
    /// The service manager that is told when it is ready and when it stops; none for nobody.
    pub manager: Option<FdStore>,
}

impl Options {
    /// The defaults, at `socket_path`.
    pub fn at(socket_path: impl Into<PathBuf>) -> Self {
        Self { socket_path: Some(socket_path.into()), ..Self::nowhere() }
    }

    /// The defaults, without a socket.
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
    turn: baton::Turn,
    stop: UnixStream,
    file: Option<SocketFile>,
    metrics_file: Option<SocketFile>,
    guardian: Option<Watch>,
    /// What is kept for the next daemon besides memory and the socket, and where; none where nothing outlives this one.
    kept: Option<(FdStore, Vec<Name>)>,
}

impl Server {
    /// Makes the socket, if any (mode 0600; one that nobody listens at is replaced, one in use is an error), and the
    /// session.
    pub fn bind(options: Options, domain: Arc<dyn Domain>, devices: Vec<Arc<dyn Device>>) -> Result<Self> {
        Self::holding(options, domain, devices, None)
    }

    /// The same, where what it has outlives it, and it goes on from what another had.
    pub fn holding(
        options: Options,
        domain: Arc<dyn Domain>,
        devices: Vec<Arc<dyn Device>>,
        mut hold: Option<Hold>,
    ) -> Result<Self> {
        let (stop, stopped) = UnixStream::pair().map_err(Error::Poll)?;
        // Before anybody can find the socket: who finds it may send a signal.
        for signal in &options.stop_signals {
            let stop = stop.as_fd().try_clone_to_owned().map_err(Error::Poll)?;
            signal_hook::low_level::pipe::register(*signal, stop).map_err(Error::Signal)?;
        }
        let ids = hold.as_mut().map(|hold| hold.keep(&*domain, &devices)).transpose()?;
        let path = options.socket_path.clone();
        let listener = match (&mut hold, &path) {
            (Some(hold), Some(path)) => Some(hold.listener(path, || listen(path, &CONTROL))?),
            (None, Some(path)) => Some(listen(path, &CONTROL)?),
            (_, None) => None,
        };
        let file = path.map(SocketFile::at);
        let metrics = options.metrics_path.as_deref().map(|path| listen(path, &METRICS)).transpose()?;
        let metrics_file = options.metrics_path.clone().map(SocketFile::at);
        let guardian = match &options.guardian {
            Some(program) => {
                let (store, left) = match (&mut hold, ids) {
                    (Some(hold), Some(ids)) => hold.guard(ids),
                    _ => (None, None),
                };
                Watch::holding(program.clone(), devices.clone(), store, left)?
            }
            None => None,
        };
        let (core, turn) = Core::new()?;
        let kept = hold.as_ref().map(Hold::kept);
        let sockets = Sockets { listener, metrics, stopped };
        let vm = Vm::new(options, sockets, Arc::clone(&core), domain, devices, hold)?;
        if let Some(ids) = ids {
            vm.session.complete(ids);
        }
        Ok(Self { vm: Box::new(vm), core, turn, stop, file, metrics_file, guardian, kept })
    }

    /// What stops it, for another thread.
    pub fn stopper(&self) -> Result<Stopper> {
        self.stop.try_clone().map(Stopper).map_err(Error::Poll)
    }

    /// Its loop, for other threads of this process: before it runs, while it does, and after.
    pub fn inside(&self) -> Inside {
        Inside::of(&self.core)
    }

    /// The files of guest memory, where it goes on from what another had.
    pub fn guest_files(&self) -> Vec<Weak<GuestFile>> {
        self.vm.session.guest_files()
    }

    /// Serves until stopped.
    pub fn run(self) -> Result<()> {
        let (file, _metrics_file) = (self.file, self.metrics_file);
        if let Some(manager) = &self.vm.options.manager {
            manager.ready();
        }
        if let Some((store, kept)) = self.kept {
            // The socket goes on listening: the next daemon has it.
            std::mem::forget(file);
            let core = Arc::clone(&self.core);
            let over = event_loop::run(self.core, self.turn, self.vm);
            if core.keeps_nothing() {
                // As below: where the loop fails the guardian stops the devices.
                if let Some(guardian) = self.guardian.filter(|_| over.is_ok()) {
                    guardian.bye();
                }
                kept.into_iter().for_each(|name| store.remove(name));
                store.settle();
            }
            return over;
        }
        let _file = file;
        // Where the loop fails the guardian hears no farewell, and stops the devices.
        event_loop::run(self.core, self.turn, self.vm)?;
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
    /// As a stop signal does.
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
    /// Where its socket is; empty where it has none.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops it, and says how it went.
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
