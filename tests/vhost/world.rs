//! A back-end in this process: a gate with a simulated IOMMU and a simulated drive, and the door.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use passgate::client::{Channel, Client};
use passgate::gate::Policy;
use passgate::serve::vhost_blk::{Door, Options as DoorOptions, Polling, Socket};
use passgate::serve::{Handle, Inside, Options, Server};
use passgate_backends::iommu::sim::{Memory, Sim};
use passgate_backends::nvme::{self, DriveOptions, sim};
use passgate_backends::{Device, Domain, Windowed};
use tempfile::TempDir;

use crate::guest::Guest;

/// Everything that a back-end is, in the order in which it goes.
pub struct World {
    pub door: Option<Door>,
    pub server: Option<Handle>,
    pub inside: Inside,
    pub drive: Arc<nvme::Drive>,
    pub sim: sim::Simulated,
    pub iommu: Arc<Sim>,
    pub dir: TempDir,
    clients: Vec<Client>,
    queues: u16,
    _turn: MutexGuard<'static, ()>,
}

/// A driver's own memory is one window for all drives of a process: one world at a time.
static TURN: Mutex<()> = Mutex::new(());

/// What differs from one test to the next.
pub struct Setup {
    pub drive: sim::Options,
    pub policy: Policy,
    pub queues: u16,
    pub deadline: Duration,
    pub polling: Polling,
    pub read_only: bool,
    /// Bytes of one kernel mapping are as many as can be; a page is cut out of them.
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
    /// A back-end as it is by default.
    pub fn new() -> Self {
        Self::with(Setup::default())
    }

    pub fn with(setup: Setup) -> Self {
        crate::listen();
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let capabilities = passgate_backends::Capabilities { cut: setup.cut, ..Sim::CAPABILITIES };
        let iommu = Arc::new(Sim::new(capabilities, Memory::new()).unwrap());
        let sim = sim::Simulated::new(&iommu, setup.drive).unwrap();
        let plain = Arc::clone(&iommu) as Arc<dyn Domain>;
        let options = DriveOptions { namespace: 1, queues: setup.queues, deadline: setup.deadline };
        let drive = nvme::Drive::open(sim.registers(), &plain, options).unwrap();
        let windowed = Arc::new(Windowed::new(plain, Arc::clone(drive.window())));
        let dir = tempfile::tempdir().unwrap();
        let options = Options { policy: setup.policy, ..Options::at(dir.path().join("control")) };
        let device = Arc::clone(&drive) as Arc<dyn Device>;
        let server = Server::bind(options, windowed, vec![device]).unwrap();
        let inside = server.inside();
        let server = server.spawn().unwrap();
        let mut world = Self {
            door: None,
            server: Some(server),
            inside,
            drive,
            sim,
            iommu,
            dir,
            clients: Vec::new(),
            queues: setup.queues,
            _turn: turn,
        };
        world.open_door(setup.polling, setup.read_only);
        world
    }

    /// The door is shut; the session stays.
    pub fn shut_door(&mut self) {
        self.door.take();
    }

    /// It opens again.
    pub fn open_door_again(&mut self) {
        self.open_door(Polling::Auto, false);
    }

    fn open_door(&mut self, polling: Polling, read_only: bool) {
        let options = DoorOptions {
            socket: Socket::Path(self.path()),
            queues: self.queues,
            read_only,
            polling,
            kept: Vec::new(),
            stop_signals: Vec::new(),
        };
        self.door = Some(Door::open(options, &self.drive, self.inside.clone(), || {}).unwrap());
    }

    /// Where the door is.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("door")
    }

    /// A guest whose rings run.
    pub fn guest(&self) -> Guest {
        let mut guest = Guest::connect(&self.path(), usize::from(self.queues));
        guest.start().unwrap();
        guest
    }

    /// A client of the control door.
    pub fn control(&self) -> Client {
        Client::connect(self.dir.path().join("control")).unwrap()
    }

    /// The notification channel of such a client, which stays.
    pub fn channel(&mut self) -> Channel {
        let mut client = self.control();
        let channel = client.open_channel().unwrap();
        self.clients.push(client);
        channel
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.door.take();
        let stopped = self.server.take().map(Handle::stop);
        if !std::thread::panicking() {
            stopped.map(Result::unwrap);
            assert_eq!(self.sim.complaints(), Vec::<String>::new(), "the controller was told nonsense");
        }
    }
}
