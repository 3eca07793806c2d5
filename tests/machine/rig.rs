//! The fixtures of a trial: the machine's edu device, a daemon that serves it, memory, and checks of both.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange, guest_memfd};
use passgate_client::{AddMemory, Answer, Channel, Client, Outcome, PageState};

use crate::daemon::Daemon;

/// The path of the passgate binary that tests/vm/run has put into the machine.
pub const PASSGATE: &str = "/bin/passgate";

/// The guest-physical address of the trials' memory.
pub const GPA: u64 = 0x4000_0000;

/// The bytes that the engine reads where its DMA is blocked.
pub const BLOCKED: [u8; DMA_BYTES] = [0; DMA_BYTES];

/// The length of one DMA in bytes: a transfer takes 100 ms whatever its length.
pub const DMA_BYTES: usize = 64;

/// The machine, with one API to its IOMMU.
pub struct Rig {
    /// The value of `--iommu`: `iommufd` or `type1`.
    pub iommu: &'static str,
    /// The PCI address of the edu device that the trials use.
    pub edu: String,
}

impl Rig {
    pub fn new(iommu: &'static str) -> Self {
        let engines = std::env::var("PASSGATE_EDU").unwrap();
        Self { iommu, edu: engines.split_whitespace().next().unwrap().to_owned() }
    }

    /// Starts a daemon that serves the edu device.
    pub fn serve(&self) -> Daemon {
        self.serve_with(&[])
    }

    /// Starts a daemon that serves the edu device, with more options.
    pub fn serve_with(&self, options: &[&str]) -> Daemon {
        Daemon::start(Path::new(PASSGATE), &self.arguments(options))
    }

    /// Returns the arguments of a daemon that serves the edu device.
    pub fn arguments<'a>(&'a self, options: &[&'a str]) -> Vec<&'a str> {
        // On type1 nothing stops the edu device for certain: it has no reset.
        let allow_unstoppable: &[&str] = if self.iommu == "type1" { &["--allow-unstoppable"] } else { &[] };
        [&["--iommu", self.iommu, "--device", &self.edu, "--allow-dma"], allow_unstoppable, options].concat()
    }

    /// Starts a daemon; returns it with a VMM of `pages` pages, each mapped by itself.
    pub fn vmm(&self, pages: u64) -> (Daemon, Vmm) {
        let daemon = self.serve();
        let vmm = self.join(&daemon, memfd(pages), PAGE);
        (daemon, vmm)
    }

    /// Returns a VMM with this memory, mapped in pieces of `piece` bytes.
    pub fn join(&self, daemon: &Daemon, memory: Arc<GuestFile>, piece: u64) -> Vmm {
        let mut client = daemon.client();
        let region = AddMemory { piece, ..AddMemory::shared(GPA, memory.size()) };
        let added = client.add_memory(&region, &[&*memory]).unwrap();
        assert_eq!(added.mapped, memory.size());
        let channel = client.open_channel().unwrap();
        Vmm { client, channel, memory, engine: Engine::connect(daemon, &self.edu) }
    }
}

/// A VMM as passgate sees it (its connections and its memory), and the engine that its guest would drive.
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

    /// Ends the conversion as committed.
    pub fn end(&mut self, invalidation: u64) {
        self.channel.end(invalidation, Outcome::Committed).unwrap();
    }

    /// Converts a page to a hole: begin, punch, end.
    pub fn convert_to_hole(&mut self, page: u64) {
        let invalidation = self.begin(page, PageState::Hole);
        self.memory.punch(page * PAGE, PAGE).unwrap();
        self.end(invalidation);
    }

    /// Converts a page to shared.
    pub fn convert_to_shared(&mut self, page: u64) {
        let invalidation = self.begin(page, PageState::Shared);
        self.end(invalidation);
    }

    /// Returns the first bytes of a page as the owner sees them.
    pub fn bytes(&self, page: u64) -> Vec<u8> {
        bytes(&self.memory, page)
    }

    /// Writes new bytes to a page as the owner, and returns them.
    pub fn fill(&self, page: u64) -> Vec<u8> {
        let unique_bytes = unique_bytes();
        self.memory.write(page * PAGE, &unique_bytes).unwrap();
        unique_bytes
    }

    /// Returns true if DMA and the owner access the same page, for reads and for writes.
    pub fn reaches(&mut self, page: u64) -> bool {
        let written = self.fill(page);
        let read = self.engine.read(page) == written;
        let sent = self.engine.write(page);
        let arrived = self.bytes(page) == sent;
        assert_eq!(read, arrived, "DMA works in one direction only");
        read
    }

    /// Asserts that DMA neither reads nor changes the page.
    pub fn assert_unreachable(&mut self, page: u64) {
        let before = self.fill(page);
        assert_eq!(self.engine.read(page), BLOCKED, "the device reads page {page}");
        self.engine.write(page);
        assert_eq!(self.bytes(page), before, "the device writes to page {page}");
    }
}

/// The DMA engine of a device, driven over a connection of its own.
pub struct Engine {
    client: Client,
    device: String,
}

impl Engine {
    pub fn connect(daemon: &Daemon, device: &str) -> Self {
        Self::over_client(daemon.client(), device)
    }

    pub fn over_client(client: Client, device: &str) -> Self {
        Self { client, device: device.to_owned() }
    }

    /// Reads the start of a page by DMA.
    pub fn read(&mut self, page: u64) -> Vec<u8> {
        self.client.dma_read(&self.device, GPA + page * PAGE, DMA_BYTES as u32).unwrap()
    }

    /// Writes new bytes to the start of a page by DMA, and returns them.
    pub fn write(&mut self, page: u64) -> Vec<u8> {
        self.try_write(page).unwrap()
    }

    /// Like [`Engine::write`], but returns the error of a daemon that refuses or has ended.
    pub fn try_write(&mut self, page: u64) -> passgate_client::Result<Vec<u8>> {
        let bytes = unique_bytes();
        self.client.dma_write(&self.device, GPA + page * PAGE, &bytes)?;
        Ok(bytes)
    }
}

pub fn range(page: u64) -> PageRange<Gpa> {
    PageRange::new(GPA + page * PAGE, PAGE).unwrap()
}

/// Returns the first bytes of a page of `memory` as its owner sees them.
pub fn bytes(memory: &GuestFile, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; DMA_BYTES];
    memory.read(page * PAGE, &mut bytes).unwrap();
    bytes
}

pub fn memfd(pages: u64) -> Arc<GuestFile> {
    Arc::new(GuestFile::memfd("machine", pages * PAGE).unwrap())
}

/// Returns a guest_memfd that the host can map.
pub fn guest(pages: u64) -> Arc<GuestFile> {
    Arc::new(guest_memfd::shared(pages * PAGE).unwrap().1)
}

/// Returns a duplicate of the descriptor.
pub fn copy(file: &impl AsFd) -> OwnedFd {
    file.as_fd().try_clone_to_owned().unwrap()
}

/// Returns bytes that differ from those of the calls before; none is 0.
pub fn unique_bytes() -> Vec<u8> {
    static NEXT_SALT: AtomicU8 = AtomicU8::new(1);
    let salt = usize::from(NEXT_SALT.fetch_add(7, Ordering::Relaxed));
    (0..DMA_BYTES).map(|i| 1 + ((i * 31 + salt * 17) % 251) as u8).collect()
}
