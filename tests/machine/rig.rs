//! What a trial works with: the machine's engine, a daemon that has it, memory, and ways to look.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use passgate::client::{AddMemory, Answer, Channel, Client, Outcome, PageState};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange, guest_memfd};

use crate::daemon::Daemon;

/// The real program, as tests/vm/run carries it along.
pub const PASSGATE: &str = "/bin/passgate";

/// Where the trials' memory lies.
pub const GPA: u64 = 0x4000_0000;

/// What the engine reads where its DMA is blocked.
pub const BLOCKED: [u8; LEN] = [0; LEN];

/// Bytes of one DMA: a transfer takes 100 ms whatever its length.
pub const LEN: usize = 64;

/// The machine, by one interface to its IOMMU.
pub struct Rig {
    pub iommu: &'static str,
    /// The engine that the trials use.
    pub edu: String,
}

impl Rig {
    pub fn new(iommu: &'static str) -> Self {
        let engines = std::env::var("PASSGATE_EDU").unwrap();
        Self { iommu, edu: engines.split_whitespace().next().unwrap().to_owned() }
    }

    /// A daemon that has the engine.
    pub fn serve(&self) -> Daemon {
        self.serve_with(&[])
    }

    /// The same, with more arguments.
    pub fn serve_with(&self, more: &[&str]) -> Daemon {
        Daemon::start(Path::new(PASSGATE), &self.arguments(more))
    }

    pub fn arguments<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        // Nothing stops the engine for certain on type1: it has no reset.
        let accept: &[&str] = if self.iommu == "type1" { &["--allow-unstoppable"] } else { &[] };
        [&["--iommu", self.iommu, "--device", &self.edu, "--allow-dma"], accept, more].concat()
    }

    /// A daemon, and its VMM.
    pub fn vmm(&self, pages: u64) -> (Daemon, Vmm) {
        let daemon = self.serve();
        let vmm = self.join(&daemon, memfd(pages), PAGE);
        (daemon, vmm)
    }

    /// A VMM with this memory, mapped in pieces of so many bytes.
    pub fn join(&self, daemon: &Daemon, memory: Arc<GuestFile>, piece: u64) -> Vmm {
        let mut client = daemon.client();
        let region = AddMemory { piece, ..AddMemory::shared(GPA, memory.size()) };
        let added = client.add_memory(&region, &[&*memory]).unwrap();
        assert_eq!(added.mapped, memory.size());
        let channel = client.open_channel().unwrap();
        Vmm { client, channel, memory, engine: Engine::of(daemon, &self.edu) }
    }
}

/// What a VMM is to passgate: memory, and the word before each conversion; and an engine under its guest.
pub struct Vmm {
    pub client: Client,
    pub channel: Channel,
    pub memory: Arc<GuestFile>,
    pub engine: Engine,
}

/// The deadline, in milliseconds, of a conversion that must be granted: the longest there is. A machine under a load has
/// an emulated processor that may stand still for longer than the default of a second, and this is no test of that.
pub const UNHURRIED: Option<u32> = Some(60_000);

impl Vmm {
    /// Begins a conversion that must be granted.
    pub fn begin(&mut self, page: u64, to: PageState) -> u64 {
        match self.channel.begin(range(page), to, UNHURRIED).unwrap() {
            Answer::Granted { invalidation } => invalidation,
            other => panic!("page {page} is not granted: {other:x?}"),
        }
    }

    /// Says that it is done.
    pub fn end(&mut self, invalidation: u64) {
        self.channel.end(invalidation, Outcome::Committed).unwrap();
    }

    /// To a hole, in the right order.
    pub fn take_away(&mut self, page: u64) {
        let invalidation = self.begin(page, PageState::Hole);
        self.memory.punch(page * PAGE, PAGE).unwrap();
        self.end(invalidation);
    }

    /// Back to shared.
    pub fn give_back(&mut self, page: u64) {
        let invalidation = self.begin(page, PageState::Shared);
        self.end(invalidation);
    }

    /// What the owner sees.
    pub fn bytes(&self, page: u64) -> Vec<u8> {
        bytes(&self.memory, page)
    }

    /// Writes as the owner.
    pub fn fill(&self, page: u64) -> Vec<u8> {
        let fresh = fresh();
        self.memory.write(page * PAGE, &fresh).unwrap();
        fresh
    }

    /// Whether DMA and the owner meet in this page, both ways.
    pub fn reaches(&mut self, page: u64) -> bool {
        let written = self.fill(page);
        let read = self.engine.read(page) == written;
        let sent = self.engine.write(page);
        let arrived = self.bytes(page) == sent;
        assert_eq!(read, arrived, "DMA goes one way only");
        read
    }

    /// Fails where any DMA reaches the page, or leaves a trace in it.
    pub fn is_out_of_reach(&mut self, page: u64) {
        let before = self.fill(page);
        assert_eq!(self.engine.read(page), BLOCKED, "the device reads page {page}");
        self.engine.write(page);
        assert_eq!(self.bytes(page), before, "the device writes to page {page}");
    }
}

/// The engine, on a connection of its own.
pub struct Engine {
    client: Client,
    device: String,
}

impl Engine {
    pub fn of(daemon: &Daemon, device: &str) -> Self {
        Self::by(daemon.client(), device)
    }

    pub fn by(client: Client, device: &str) -> Self {
        Self { client, device: device.to_owned() }
    }

    /// What it reads from the start of a page.
    pub fn read(&mut self, page: u64) -> Vec<u8> {
        self.client.dma_read(&self.device, GPA + page * PAGE, LEN as u32).unwrap()
    }

    /// Has it write something new to the start of a page.
    pub fn write(&mut self, page: u64) -> Vec<u8> {
        self.try_write(page).unwrap()
    }

    pub fn try_write(&mut self, page: u64) -> passgate::Result<Vec<u8>> {
        let bytes = fresh();
        self.client.dma_write(&self.device, GPA + page * PAGE, &bytes)?;
        Ok(bytes)
    }
}

pub fn range(page: u64) -> PageRange<Gpa> {
    PageRange::new(GPA + page * PAGE, PAGE).unwrap()
}

/// What the owner of `memory` sees at the start of a page.
pub fn bytes(memory: &GuestFile, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    memory.read(page * PAGE, &mut bytes).unwrap();
    bytes
}

pub fn memfd(pages: u64) -> Arc<GuestFile> {
    Arc::new(GuestFile::memfd("machine", pages * PAGE).unwrap())
}

/// A guest_memfd that the host may map.
pub fn guest(pages: u64) -> Arc<GuestFile> {
    Arc::new(guest_memfd::shared(pages * PAGE).unwrap().1)
}

/// A copy of the descriptor.
pub fn copy(file: &impl AsFd) -> OwnedFd {
    file.as_fd().try_clone_to_owned().unwrap()
}

/// Bytes unlike any before, none of them 0.
pub fn fresh() -> Vec<u8> {
    static SALT: AtomicU8 = AtomicU8::new(1);
    let salt = usize::from(SALT.fetch_add(7, Ordering::Relaxed));
    (0..LEN).map(|i| 1 + ((i * 31 + salt * 17) % 251) as u8).collect()
}
