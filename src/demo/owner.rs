//! The demo's owner: what a VMM does. Asks through the real socket, converts, says how it went.

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

/// Pages that are kept away for a while, so that the device meets them.
const AWAY: usize = 8;
/// One conversion in so many takes a page away for a while.
const KEEP: u64 = 16;

/// The owner of the demo's memory.
pub(super) struct Owner {
    memory: Arc<Memory>,
    random: Box<dyn FnMut() -> u64>,
    way: Way,
}

enum Way {
    /// Through passgate.
    Asking { server: Box<Daemon>, away: VecDeque<u64> },
    /// Mapped once, for the device's life.
    Pinning,
}

/// The daemon and the owner's two sockets to it.
struct Daemon {
    handle: Handle,
    client: Client,
    channel: Channel,
    _place: Place,
}

/// A directory for the socket, removed with it.
struct Place(std::path::PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn page(number: u64) -> Result<PageRange<Gpa>> {
    Ok(PageRange::new(number * PAGE, PAGE)?)
}

impl Owner {
    /// An owner that asks passgate: a session of its own over `domain`, reached by its socket.
    pub(super) fn asking(memory: &Arc<Memory>, domain: &Arc<SoftDomain>) -> Result<Self> {
        let place = std::env::temp_dir().join(format!("passgate-demo-{}", std::process::id()));
        std::fs::create_dir_all(&place).map_err(|source| Error::Socket {
            path: place.clone(),
            source,
            mend: ": set TMPDIR to a directory that is writable",
        })?;
        let place = Place(place);
        let device = domain.device("soft:1")?;
        let server =
            Server::bind(Options::at(place.0.join("socket")), Arc::clone(domain) as _, vec![device])?;
        let handle = server.spawn()?;
        let mut client = Client::connect(handle.path())?;
        let added = AddMemory::shared(0, memory.pages() * PAGE);
        client.add_memory(&added, &[&*memory.file])?;
        let channel = client.open_channel()?;
        let server = Box::new(Daemon { handle, client, channel, _place: place });
        Ok(Self::new(memory, Way::Asking { server, away: VecDeque::new() }))
    }

    /// An owner of the old way: everything is mapped, and stays so.
    pub(super) fn pinning(memory: &Arc<Memory>, domain: &Arc<SoftDomain>) -> Result<Self> {
        let all = PageRange::<Iova>::new(0, memory.pages() * PAGE)?;
        domain.map(all, PAGE, &memory.file, Offset(0), true)?;
        Ok(Self::new(memory, Way::Pinning))
    }

    fn new(memory: &Arc<Memory>, way: Way) -> Self {
        Self { memory: Arc::clone(memory), random: Box::new(random()), way }
    }

    /// Converts random pages for `time`.
    pub(super) fn turn(&mut self, time: Duration, counters: &Counters) -> Result<Turn> {
        let mut turn = Turn::default();
        let start = Instant::now();
        let mut now = start;
        while now.duration_since(start) < time {
            let draw = (self.random)();
            let page = (draw >> 8) % self.memory.pages();
            if self.convert(page, draw.is_multiple_of(KEEP), counters)? {
                turn.rounds += 1;
                let after = Instant::now();
                turn.each.push(after.duration_since(now).as_secs_f32() * 1e6);
                now = after;
            } else {
                now = Instant::now();
            }
        }
        turn.time = start.elapsed();
        Ok(turn)
    }

    /// Converts one page: takes it away and brings a fresh one, at once or (`keep`) a few conversions later.
    /// False where nothing was converted.
    fn convert(&mut self, page: u64, keep: bool, counters: &Counters) -> Result<bool> {
        match &mut self.way {
            Way::Pinning => {
                self.memory.turn(page);
                self.memory.punch(page)?;
                self.memory.bring(page)?;
                self.memory.turn(page);
                counters.conversions.fetch_add(1, COUNT);
                Ok(true)
            }
            Way::Asking { server, away } => {
                if away.contains(&page) {
                    return Ok(false);
                }
                if keep
                    && away.len() == AWAY
                    && let Some(back) = away.pop_front()
                {
                    return server.bring_back(&self.memory, back, counters);
                }
                let to = if keep { PageState::Hole } else { PageState::Shared };
                let Some(invalidation) = server.begin(page, to, counters)? else { return Ok(false) };
                if !self.memory.is_sound(page)? {
                    counters.stale_dma.fetch_add(1, COUNT);
                }
                self.memory.turn(page);
                self.memory.punch(page)?;
                if keep {
                    away.push_back(page);
                    server.channel.end(invalidation, Outcome::Committed)?;
                } else {
                    self.memory.bring(page)?;
                    server.channel.end(invalidation, Outcome::Committed)?;
                    self.memory.turn(page);
                }
                counters.conversions.fetch_add(1, COUNT);
                Ok(true)
            }
        }
    }

    /// Brings back what is away, and takes over what the daemon counted.
    pub(super) fn settle(&mut self, counters: &Counters) -> Result<()> {
        let Way::Asking { server, away } = &mut self.way else { return Ok(()) };
        while let Some(back) = away.pop_front() {
            server.bring_back(&self.memory, back, counters)?;
        }
        let status = server.client.status()?;
        counters.late_dma_waited.store(status.totals.late_dma_waited, COUNT);
        counters.quarantined.store(status.quarantine.len() as u64, COUNT);
        Ok(())
    }

    /// Lets go of everything.
    pub(super) fn close(self) -> Result<()> {
        match self.way {
            Way::Asking { server, .. } => {
                let Daemon { handle, client, channel, _place } = *server;
                drop((client, channel));
                handle.stop()
            }
            Way::Pinning => Ok(()),
        }
    }
}

impl Daemon {
    /// Asks; the invalidation's name where it is granted.
    fn begin(&mut self, number: u64, to: PageState, counters: &Counters) -> Result<Option<u64>> {
        match self.channel.begin(page(number)?, to, None)? {
            Answer::Granted { invalidation } => {
                counters.done.fetch_add(1, COUNT);
                Ok(Some(invalidation))
            }
            Answer::Refused(_) | Answer::Unknown(_) => {
                counters.refused.fetch_add(1, COUNT);
                Ok(None)
            }
        }
    }

    /// Brings a page back that was away.
    fn bring_back(&mut self, memory: &Memory, number: u64, counters: &Counters) -> Result<bool> {
        let Some(invalidation) = self.begin(number, PageState::Shared, counters)? else { return Ok(false) };
        memory.bring(number)?;
        self.channel.end(invalidation, Outcome::Committed)?;
        memory.turn(number);
        counters.conversions.fetch_add(1, COUNT);
        Ok(true)
    }
}
