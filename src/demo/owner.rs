//! The owner of the demo, which does what a VMM does: it begins an invalidation through the socket, converts, and ends it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_backends::Domain;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

use super::COUNT;
use super::device::random;
use super::memory::Memory;
use super::report::{Counters, Turn};
use crate::client::{AddMemory, Answer, Channel, Client, Outcome, PageState};
use crate::error::{Error, Result};
use crate::serve::{Handle, Options, Server};

/// The maximum number of pages that are holes at a time, so that the device accesses some.
const MAX_HOLES: usize = 8;
/// One conversion in this many leaves a hole for some time.
const HOLE_INTERVAL: u64 = 16;

/// The owner of the guest memory.
pub(super) struct Owner {
    memory: Arc<Memory>,
    random: Box<dyn FnMut() -> u64>,
    mode: Mode,
}

enum Mode {
    /// Conversions go through passgate. `holes` are the punched pages, oldest first.
    Revocable { server: Box<Daemon>, holes: VecDeque<u64> },
    /// The memory is mapped once, for the life of the device.
    Pinned,
}

/// The daemon and the owner's two sockets to it.
struct Daemon {
    handle: Handle,
    client: Client,
    channel: Channel,
    _dir: SocketDir,
}

/// A directory for the socket. It is removed when this is dropped.
struct SocketDir(std::path::PathBuf);

impl Drop for SocketDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn page(number: u64) -> Result<PageRange<Gpa>> {
    Ok(PageRange::new(number * PAGE, PAGE)?)
}

impl Owner {
    /// Returns an owner that converts through passgate: through the socket of a daemon of its own, over `domain`.
    pub(super) fn revocable(memory: &Arc<Memory>, domain: &Arc<SoftDomain>) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("passgate-demo-{}", std::process::id()));
        std::fs::create_dir_all(&dir).map_err(|source| Error::Socket {
            path: dir.clone(),
            source,
            remedy: ": set TMPDIR to a directory that is writable",
        })?;
        let dir = SocketDir(dir);
        let device = domain.device("soft:1")?;
        let server = Server::bind(Options::at(dir.0.join("socket")), Arc::clone(domain) as _, vec![device])?;
        let handle = server.spawn()?;
        let mut client = Client::connect(handle.path())?;
        let added = AddMemory::shared(0, memory.pages() * PAGE);
        client.add_memory(&added, &[&*memory.file])?;
        let channel = client.open_channel()?;
        let server = Box::new(Daemon { handle, client, channel, _dir: dir });
        Ok(Self::new(memory, Mode::Revocable { server, holes: VecDeque::new() }))
    }

    /// Returns an owner without passgate: all memory is mapped, and is never unmapped.
    pub(super) fn pinned(memory: &Arc<Memory>, domain: &Arc<SoftDomain>) -> Result<Self> {
        let all = PageRange::<Iova>::new(0, memory.pages() * PAGE)?;
        domain.map(all, PAGE, &memory.file, Offset(0), true)?;
        Ok(Self::new(memory, Mode::Pinned))
    }

    fn new(memory: &Arc<Memory>, mode: Mode) -> Self {
        Self { memory: Arc::clone(memory), random: Box::new(random()), mode }
    }

    /// Converts random pages for `time`. Returns the number and the durations of the conversions.
    pub(super) fn turn(&mut self, time: Duration, counters: &Counters) -> Result<Turn> {
        let mut turn = Turn::default();
        let start = Instant::now();
        let mut now = start;
        while now.duration_since(start) < time {
            let draw = (self.random)();
            let page = (draw >> 8) % self.memory.pages();
            if self.convert(page, draw.is_multiple_of(HOLE_INTERVAL), counters)? {
                turn.rounds += 1;
                let after = Instant::now();
                turn.latencies_us.push(after.duration_since(now).as_secs_f32() * 1e6);
                now = after;
            } else {
                now = Instant::now();
            }
        }
        turn.time = start.elapsed();
        Ok(turn)
    }

    /// Converts one page: punches it and restores a fresh one, at once or (with `leave_hole`) some conversions later.
    /// Returns false if no page was converted.
    fn convert(&mut self, page: u64, leave_hole: bool, counters: &Counters) -> Result<bool> {
        match &mut self.mode {
            Mode::Pinned => {
                self.memory.advance_generation(page);
                self.memory.punch(page)?;
                self.memory.restore(page)?;
                self.memory.advance_generation(page);
                counters.conversions.fetch_add(1, COUNT);
                Ok(true)
            }
            Mode::Revocable { server, holes } => {
                if holes.contains(&page) {
                    return Ok(false);
                }
                if leave_hole
                    && holes.len() == MAX_HOLES
                    && let Some(hole) = holes.pop_front()
                {
                    return server.refill(&self.memory, hole, counters);
                }
                let to = if leave_hole { PageState::Hole } else { PageState::Shared };
                let Some(invalidation) = server.begin(page, to, counters)? else { return Ok(false) };
                if !self.memory.is_intact(page)? {
                    counters.stale_dma.fetch_add(1, COUNT);
                }
                self.memory.advance_generation(page);
                self.memory.punch(page)?;
                if leave_hole {
                    holes.push_back(page);
                    server.channel.end(invalidation, Outcome::Committed)?;
                } else {
                    self.memory.restore(page)?;
                    server.channel.end(invalidation, Outcome::Committed)?;
                    self.memory.advance_generation(page);
                }
                counters.conversions.fetch_add(1, COUNT);
                Ok(true)
            }
        }
    }

    /// Restores all holes, and reads the counters of the daemon.
    pub(super) fn finish(&mut self, counters: &Counters) -> Result<()> {
        let Mode::Revocable { server, holes } = &mut self.mode else { return Ok(()) };
        while let Some(hole) = holes.pop_front() {
            server.refill(&self.memory, hole, counters)?;
        }
        let status = server.client.status()?;
        counters.late_dma_waited.store(status.totals.late_dma_waited, COUNT);
        counters.quarantined.store(status.quarantine.len() as u64, COUNT);
        Ok(())
    }

    /// Closes the sockets and stops the daemon.
    pub(super) fn close(self) -> Result<()> {
        match self.mode {
            Mode::Revocable { server, .. } => {
                let Daemon { handle, client, channel, _dir } = *server;
                drop((client, channel));
                handle.stop()
            }
            Mode::Pinned => Ok(()),
        }
    }
}

impl Daemon {
    /// Begins an invalidation. Returns its id; none if it was refused.
    fn begin(&mut self, number: u64, to: PageState, counters: &Counters) -> Result<Option<u64>> {
        match self.channel.begin(page(number)?, to, None)? {
            Answer::Granted { invalidation } => {
                counters.done.fetch_add(1, COUNT);
                Ok(Some(invalidation))
            }
            Answer::Refused(_) | Answer::Unknown(_) | Answer::Quarantined { .. } => {
                counters.refused.fetch_add(1, COUNT);
                Ok(None)
            }
        }
    }

    /// Restores a page that is a hole. Returns false if that was refused.
    fn refill(&mut self, memory: &Memory, number: u64, counters: &Counters) -> Result<bool> {
        let Some(invalidation) = self.begin(number, PageState::Shared, counters)? else { return Ok(false) };
        memory.restore(number)?;
        self.channel.end(invalidation, Outcome::Committed)?;
        memory.advance_generation(number);
        counters.conversions.fetch_add(1, COUNT);
        Ok(true)
    }
}
