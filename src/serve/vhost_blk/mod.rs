//! The vhost-user door: a virtio block device over an assigned NVMe drive, for a VMM as it is.
//!
//! The drive's DMA goes straight into guest memory, at guest-physical addresses, through the gate. The front-end is one
//! more client of the session, by a connection inside this process: its memory table is regions, what it removes is
//! invalidations. It hears no "no": what cannot be taken from the drive otherwise is fenced, up to a reset.
//!
//! Threads: one for the front-end's connection (one at a time; the next is served after it), and one worker for each
//! queue of the drive. A request takes no lock for its check and its account ([`passgate_backends::window`]).
//!
//! What it must never do: look at a guest's descriptor twice, answer a removal before the gate has, or answer a write
//! before the drive has.

mod config;
mod counts;
mod frontend;
mod inflight;
mod iotlb;
mod memory;
mod poll;
mod request;
mod ring;
mod slot;
mod worker;

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use passgate_backends::nvme::Drive;
use passgate_bindings::Failed;
use passgate_bindings::memory::GuestFile;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vhost_user_backend::VringT;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::Inside;
use super::socket_file::{Mends, SocketFile, listen, socket_error};
use crate::client::Client;
use crate::error::{Error, Result};
use counts::{Counts, FrontEnd};
use frontend::{Frontend, Rings};
use memory::Table;
use ring::{Desk, LONGEST, MOST, Vring};
use worker::{Mailbox, Order, Worker};

pub(super) use counts::Counted;
pub use poll::Polling;

const MENDS: Mends = Mends {
    no_socket: ": that is no socket; choose another --socket-path",
    in_use: ": another back-end serves there; choose another --socket-path",
    full: ": who listens there accepts nobody; end that process, or choose another --socket-path",
    other: ": choose another --socket-path",
};

/// Where front-ends come from.
#[derive(Debug)]
pub enum Socket {
    /// They connect here (mode 0600).
    Path(PathBuf),
    /// A socket that was handed to this process: one that listens, or one that is connected already. After the latter
    /// has left, the door is shut.
    Handed(OwnedFd),
}

/// What a door is told once.
#[derive(Debug)]
pub struct Options {
    /// Where front-ends come from.
    pub socket: Socket,
    /// Virtqueues that are offered.
    pub queues: u16,
    /// Whether nothing may be written.
    pub read_only: bool,
    /// When workers look instead of sleeping.
    pub polling: Polling,
    /// The files of memory that an earlier daemon may have left to take over (`--restart hold`).
    pub kept: Vec<Weak<GuestFile>>,
    /// Signals that shut the door.
    pub stop_signals: Vec<i32>,
}

/// How long nobody is accepted where descriptors have run out.
const STARVED: Duration = Duration::from_millis(100);
/// How long a front-end may take for the rest of a message that it has begun.
const MESSAGE: Duration = Duration::from_secs(5);
/// How long the message under way may take once the door is to be shut.
const LAST_MESSAGE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// An open door.
#[derive(Debug)]
pub struct Door {
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
    workers: Vec<(Mailbox, JoinHandle<()>)>,
    _file: Option<SocketFile>,
}

enum Entrance {
    Listening(UnixListener),
    Connected(UnixStream),
}

impl Door {
    /// Opens it: from here on front-ends are served. `over` is called when no front-end can come any more.
    pub fn open(
        options: Options,
        drive: &Arc<Drive>,
        inside: Inside,
        over: impl FnOnce() + Send + 'static,
    ) -> Result<Self> {
        let (entrance, file) = match options.socket {
            Socket::Path(path) => {
                let listener = listen(&path, &MENDS)?;
                (Entrance::Listening(listener), Some(SocketFile::at(path)))
            }
            Socket::Handed(fd) => (entrance(fd)?, None),
        };
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        if !(1..=MOST).contains(&options.queues) {
            return Err(Error::Usage(format!("--num-queues: give 1 to {MOST}")));
        }
        let vring = || Vring::new(memory.clone(), LONGEST);
        let vrings = (0..options.queues).map(|_| vring()).collect::<std::result::Result<Vec<_>, _>>();
        let vrings = vrings.map_err(|error| Error::Usage(format!("--num-queues: {error}")))?;
        let count = drive.queues().min(options.queues);
        let read_only = options.read_only || drive.geometry().read_only;
        let counts: Vec<_> = (0..count).map(|_| Arc::new(Counts::default())).collect();
        let write_through = Arc::new(AtomicBool::new(false));
        let mut workers = Vec::new();
        for (nth, counts) in (0..count).zip(&counts) {
            let desk = Desk {
                drive: drive.take_queue(nth)?,
                geometry: drive.geometry().clone(),
                read_only,
                write_through: Arc::clone(&write_through),
            };
            let share = (0..options.queues).filter(|ring| ring % count == nth);
            let share = share.filter_map(|ring| Some((ring, vrings.get(usize::from(ring))?.clone())));
            let rings = share.collect();
            let (memory, inside, counts) = (memory.clone(), inside.clone(), Arc::clone(counts));
            workers.push(Worker::spawn(desk, memory, rings, inside, options.polling, counts)?);
        }
        let mailboxes: Vec<_> = workers.iter().map(|(mailbox, _)| mailbox.clone()).collect();
        let of = |ring: usize| mailboxes[ring % mailboxes.len()].clone();
        let rings = Rings {
            geometry: Arc::new(drive.geometry().clone()),
            read_only,
            memory,
            rings: Arc::new(vrings.into_iter().enumerate().map(|(nth, vring)| (vring, of(nth))).collect()),
            write_through,
        };
        let (stop, stopped) = UnixStream::pair().map_err(|e| socket_error(Path::new("the door"), e, ""))?;
        for signal in options.stop_signals {
            let stop = stop.try_clone().map_err(|e| socket_error(Path::new("the door"), e, ""))?;
            signal_hook::low_level::pipe::register(signal, stop).map_err(Error::Signal)?;
        }
        let counted = Arc::new(Counted::new(Arc::clone(drive), counts));
        inside.show(Arc::downgrade(&counted));
        let ending = Ending { stopped, drive: Arc::clone(drive), kept: options.kept, counted };
        let run = move || {
            serve_all(&ending, entrance, &rings, &inside);
            drop(ending);
            over();
        };
        let thread = std::thread::Builder::new().name("vhost-user".into()).spawn(run);
        Ok(Self { stop, thread: Some(thread.map_err(Error::Thread)?), workers, _file: file })
    }

    fn shut(&mut self) {
        let _ = std::io::Write::write(&mut &self.stop, &[0]);
        // The workers end what the connection had; only then they go.
        let join = |thread: JoinHandle<()>| {
            if thread.join().is_err() {
                log::error!("a thread of the vhost-user door panicked; this is a bug of passgate");
            }
        };
        self.thread.take().map(join);
        self.workers.iter().for_each(|(mailbox, _)| mailbox.send(Order::Leave));
        self.workers.drain(..).for_each(|(_, thread)| join(thread));
    }
}

impl Drop for Door {
    /// The front-end's connection ends, then the workers do; the drive is left with nothing to do.
    fn drop(&mut self) {
        self.shut();
    }
}

/// What a socket that was handed over is.
fn entrance(fd: OwnedFd) -> Result<Entrance> {
    let failed = |call| move |errno| Error::Call(Failed::new(call, errno));
    let listens = rustix::net::sockopt::socket_acceptconn(&fd).map_err(failed("--fd: getsockopt"))?;
    Ok(if listens {
        let listener = UnixListener::from(fd);
        listener.set_nonblocking(true).map_err(|source| Error::Socket {
            path: Path::new("--fd").to_owned(),
            source,
            mend: "",
        })?;
        Entrance::Listening(listener)
    } else {
        Entrance::Connected(UnixStream::from(fd))
    })
}

/// What shuts the door, and what its thread is told.
struct Ending {
    /// Readable where somebody here wants it shut.
    stopped: UnixStream,
    /// The kernel may want the drive back.
    drive: Arc<Drive>,
    kept: Vec<Weak<GuestFile>>,
    counted: Arc<Counted>,
}

impl Ending {
    /// Waits until `fd` is ready; false where the door is to be shut.
    fn await_ready(&self, fd: impl AsFd) -> bool {
        let [stopped, removal] = self.wait(Some(fd.as_fd()), None);
        if removal {
            log::warn!("the kernel wants the drive back: its front-end is let go, and this back-end ends");
        }
        !stopped && !removal
    }

    /// Whether the door is to be shut.
    fn is_over(&self) -> bool {
        self.wait(None, Some(&Timespec::default())).contains(&true)
    }

    /// Once the door is to be shut, ends a message that the front-end does not go on with, and answers that it does not
    /// read. A message that takes its time is answered, and the front-end learns of the end when its memory is no
    /// device's. `served` becomes readable when no message is answered any more.
    fn cut_off(&self, connection: &UnixStream, served: &UnixStream) {
        if !self.wait(Some(served.as_fd()), None).contains(&true) {
            return;
        }
        while !is_ready(served, PollFlags::IN, &LAST_MESSAGE) {
            log::warn!("vhost-user: the front-end's message is not over yet; no more are read");
            let reads = is_ready(connection, PollFlags::OUT, &Timespec::default());
            let _ = connection.shutdown(if reads { Shutdown::Read } else { Shutdown::Both });
        }
    }

    /// Waits until `fd` is ready, the door is to be shut or the time is over: whether somebody here wants it shut, and
    /// whether the kernel wants the drive back. An error of the kernel shuts the door.
    fn wait(&self, fd: Option<BorrowedFd<'_>>, within: Option<&Timespec>) -> [bool; 2] {
        let mut ready = vec![PollFd::new(&self.stopped, PollFlags::IN)];
        let removal = self.drive.removal();
        ready.extend(removal.into_iter().chain(fd).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        loop {
            match poll(&mut ready, within) {
                Err(Errno::INTR) => continue,
                Err(errno) => {
                    log::error!("poll: {errno}");
                    return [true, false];
                }
                Ok(_) => {}
            }
            let is_ready = |nth: usize| ready.get(nth).is_some_and(|fd| !fd.revents().is_empty());
            return [is_ready(0), removal.is_some() && is_ready(1)];
        }
    }
}

fn is_ready(socket: &UnixStream, what: PollFlags, within: &Timespec) -> bool {
    poll(&mut [PollFd::new(socket, what)], Some(within)).is_ok_and(|count| count > 0)
}

/// Serves one front-end after the other.
fn serve_all(ending: &Ending, entrance: Entrance, rings: &Rings, inside: &Inside) {
    let listener = match entrance {
        Entrance::Connected(stream) => {
            serve_one(ending, stream, rings, inside);
            return;
        }
        Entrance::Listening(listener) => listener,
    };
    let mut starved_logged = false;
    while ending.await_ready(&listener) {
        match listener.accept() {
            Ok((stream, _)) => {
                starved_logged = false;
                let connection = serve_one(ending, stream, rings, inside);
                if ending.is_over() {
                    // Nobody listens any more when the front-end hears that it is alone: one that comes back at once
                    // would wait in a queue that is about to go, and Cloud Hypervisor gives its disk up for that.
                    drop(listener);
                    drop(connection);
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                if !std::mem::replace(&mut starved_logged, true) {
                    let mend = "raise the limit of files (`LimitNOFILE=`)";
                    log::warn!("vhost-user: no front-end can be accepted: {error}; {mend}");
                }
                std::thread::sleep(STARVED);
            }
        }
    }
}

/// Serves a front-end until it leaves, or the door is shut. Its connection, still open, and what counts it until that is
/// closed; none where it was not served.
fn serve_one<'a>(
    ending: &'a Ending,
    stream: UnixStream,
    rings: &Rings,
    inside: &Inside,
) -> Option<(UnixStream, FrontEnd<'a>)> {
    let prepared = (inside.connect(), stream.try_clone(), stream.set_nonblocking(false));
    let (client, copy) = match (prepared, stream.set_read_timeout(Some(MESSAGE))) {
        ((Ok(client), Ok(copy), Ok(())), Ok(())) => (client, copy),
        ((Err(error), ..), _) => {
            log::error!("vhost-user: {error}");
            return None;
        }
        (_, _) => {
            log::error!("vhost-user: the front-end's socket will not do");
            return None;
        }
    };
    let Ok((over, served)) = UnixStream::pair() else {
        log::error!("vhost-user: no descriptors are left; raise the limit of files (`LimitNOFILE=`)");
        return None;
    };
    log::info!("vhost-user: a front-end has come");
    // Until its memory is no device's, and its connection is closed.
    let counted = ending.counted.front_end();
    let connection = &copy;
    std::thread::scope(|scope| {
        let cut_off = || ending.cut_off(connection, &served);
        if let Err(error) =
            std::thread::Builder::new().name("vhost-user-end".into()).spawn_scoped(scope, cut_off)
        {
            log::error!("vhost-user: {error}");
            return;
        }
        serve_messages(ending, (stream, connection), client, rings, over);
    });
    Some((copy, counted))
}

/// Answers a front-end's messages until it leaves, or the door is shut; closes `answering` and takes back what the
/// front-end had.
fn serve_messages(
    ending: &Ending,
    (stream, connection): (UnixStream, &UnixStream),
    client: Client,
    rings: &Rings,
    answering: UnixStream,
) {
    let table = Table::new(client, ending.kept.clone());
    let frontend = Arc::new(Mutex::new(Frontend::new(rings.clone(), table)));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&frontend));
    while ending.await_ready(connection) {
        if iotlb::is_next(connection) {
            log::error!("vhost-user: {}", iotlb::REFUSAL);
            if let Err(error) = iotlb::refuse(connection) {
                log::debug!("vhost-user: the refusal: {error}");
            }
            break;
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(VhostError::Disconnected | VhostError::PartialMessage) => {
                log::info!("vhost-user: the front-end has left");
                break;
            }
            Err(error) => {
                log::warn!("vhost-user: the front-end is let go: {error}");
                break;
            }
        }
    }
    drop((handler, answering));
    if let Some(frontend) = Arc::into_inner(frontend) {
        frontend.into_inner().unwrap_or_else(PoisonError::into_inner).leave();
    }
}
