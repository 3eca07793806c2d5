//! A vhost-user back-end in this process: a session with a simulated IOMMU and a simulated drive, and the back-end's socket.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use passgate::gate::Policy;
use passgate::serve::vhost_blk::{Door, Options as DoorOptions, Polling, Socket};
use passgate::serve::{Handle, Inside, Options, Server};
use passgate_backends::nvme::{self, DriveOptions};
use passgate_backends::{Device, Domain, Windowed};
use passgate_client::{Channel, Client};
use passgate_sim::iommu::{Memory, Sim};
use passgate_sim::nvme as sim;
use tempfile::TempDir;

use crate::guest::Guest;

/// The parts of a back-end, in the order in which they are dropped.
pub struct World {
    pub back_end: Option<Door>,
    pub server: Option<Handle>,
    pub inside: Inside,
    pub drive: Arc<nvme::Drive>,
    pub sim: sim::Simulated,
    pub iommu: Arc<Sim>,
    pub dir: TempDir,
    clients: Vec<Client>,
    queues: u16,
    _guard: MutexGuard<'static, ()>,
}

/// Serializes the tests of the process: all drives of a process have their driver memory in one IOVA range.
static SERIAL: Mutex<()> = Mutex::new(());

/// The parameters of a [`World`].
pub struct Setup {
    pub drive: sim::Options,
    pub policy: Policy,
    pub queues: u16,
    pub deadline: Duration,
    pub polling: Polling,
    pub read_only: bool,
    /// True if the domain can cut pages out of a mapping.
    pub cut: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            drive: sim::Options { blocks: 65_536, ..sim::Options::default() },
            policy: Policy::default(),
            queues: 2,
            deadline: Duration::from_secs(5),
            polling: Polling::Auto,
            read_only: false,
            cut: true,
        }
    }
}

impl World {
    /// Starts a back-end with the default parameters.
    pub fn new() -> Self {
        Self::with(Setup::default())
    }

    /// Starts a back-end.
    pub fn with(setup: Setup) -> Self {
        crate::init_logging();
        let guard = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
        let capabilities = passgate_backends::DomainCaps { cut: setup.cut, ..Sim::CAPABILITIES };
        let iommu = Arc::new(Sim::new(capabilities, Memory::new()).unwrap());
        let sim = sim::Simulated::new(&iommu, setup.drive).unwrap();
        let iommu_domain = Arc::clone(&iommu) as Arc<dyn Domain>;
        let options = DriveOptions { namespace: 1, queues: setup.queues, deadline: setup.deadline };
        let drive = nvme::Drive::open(sim.registers(), &iommu_domain, options).unwrap();
        let windowed = Arc::new(Windowed::new(iommu_domain, Arc::clone(drive.window())));
        let dir = tempfile::tempdir().unwrap();
        let options = Options { policy: setup.policy, ..Options::at(dir.path().join("control")) };
        let device = Arc::clone(&drive) as Arc<dyn Device>;
        let server = Server::bind(options, windowed, vec![device]).unwrap();
        let inside = server.inside();
        let server = server.spawn().unwrap();
        let mut world = Self {
            back_end: None,
            server: Some(server),
            inside,
            drive,
            sim,
            iommu,
            dir,
            clients: Vec::new(),
            queues: setup.queues,
            _guard: guard,
        };
        world.start_back_end(setup.polling, setup.read_only);
        world
    }

    /// Stops the back-end; the session continues.
    pub fn stop_back_end(&mut self) {
        self.back_end.take();
    }

    /// Starts the back-end again.
    pub fn restart_back_end(&mut self) {
        self.start_back_end(Polling::Auto, false);
    }

    fn start_back_end(&mut self, polling: Polling, read_only: bool) {
        let options = DoorOptions {
            socket: Socket::Path(self.socket_path()),
            queues: self.queues,
            read_only,
            polling,
            kept: Vec::new(),
            stop_signals: Vec::new(),
        };
        self.back_end = Some(Door::open(options, &self.drive, self.inside.clone(), || {}).unwrap());
    }

    /// Returns the path of the back-end's socket.
    pub fn socket_path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// Returns a guest whose rings run.
    pub fn guest(&self) -> Guest {
        let mut guest = Guest::connect(&self.socket_path(), usize::from(self.queues));
        guest.start().unwrap();
        guest
    }

    /// Returns a client of the control socket.
    pub fn control(&self) -> Client {
        Client::connect(self.dir.path().join("control")).unwrap()
    }

    /// Returns the notification channel of a new control client, which stays connected.
    pub fn channel(&mut self) -> Channel {
        let mut client = self.control();
        let channel = client.open_channel().unwrap();
        self.clients.push(client);
        channel
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.back_end.take();
        let stopped = self.server.take().map(Handle::stop);
        if !std::thread::panicking() {
            stopped.map(Result::unwrap);
            assert_eq!(
                self.sim.complaints(),
                Vec::<String>::new(),
                "the driver has violated the controller interface"
            );
        }
    }
}
