//! The vhost-user back-end: a virtio block device over an assigned NVMe drive, for an unmodified VMM.
//!
//! The drive's DMA goes straight into guest memory, at guest-physical addresses that the gate maps. The front-end is one more
//! client of the session, by a connection inside this process: its memory regions are regions of the gate, and a removal is an
//! invalidation. A removal is not refused: memory that the drive does not stop using is fenced, up to a reset.
//!
//! Threads: one for the front-end's connection (one at a time; the next is served after it), and one worker for each queue of
//! the drive. Checking and accounting a request takes no lock ([`passgate_backends::window`]).
//!
//! It must never read a guest's descriptor twice, answer a removal before the gate has, or answer a write before the drive has.

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
use super::socket_file::{Remedies, SocketFile, listen, socket_error};
use crate::client::Client;
use crate::error::{Error, Result};
use counts::{ConnectedFrontEnd, DiskCounters, WorkerCounters};
use frontend::{BlockDevice, Frontend};
use memory::Table;
use ring::{MAX_QUEUE_SIZE, MAX_QUEUES, RingContext, Vring};
use worker::{Mailbox, Worker, WorkerCommand};

pub use poll::Polling;

const SOCKET_REMEDIES: Remedies = Remedies {
    no_socket: ": that is no socket; choose another --socket-path",
    in_use: ": another back-end serves there; choose another --socket-path",
    full: ": who listens there accepts nobody; end that process, or choose another --socket-path",
    other: ": choose another --socket-path",
};

/// The socket of front-ends.
#[derive(Debug)]
pub enum Socket {
    /// A socket is made at this path (mode 0600).
    Path(PathBuf),
    /// A socket that this process was given: one that listens, or the connected one of a front-end. In the latter case the
    /// back-end ends when that front-end disconnects.
    InheritedFd(OwnedFd),
}

/// The configuration of a back-end.
#[derive(Debug)]
pub struct Options {
    /// The socket of front-ends.
    pub socket: Socket,
    /// The number of virtqueues that are offered, 1 to 64.
    pub queues: u16,
    /// True if guests may not write to the drive.
    pub read_only: bool,
    /// The policy by which idle workers poll.
    pub polling: Polling,
    /// The files of the regions that were taken over from an earlier daemon (`--restart hold`).
    pub kept: Vec<Weak<GuestFile>>,
    /// The signals that stop the back-end.
    pub stop_signals: Vec<i32>,
}

/// The time between two attempts to accept a front-end once descriptors have run out.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// The time that a front-end may take for the rest of a message that it has begun.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// The time that the message in progress may take once the back-end is to stop.
const LAST_MESSAGE_TIMEOUT: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// A running back-end. Stopped when dropped.
#[derive(Debug)]
pub struct Door {
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
    workers: Vec<(Mailbox, JoinHandle<()>)>,
    _file: Option<SocketFile>,
}

/// The socket from which front-ends come.
enum FrontEndSource {
    Listening(UnixListener),
    Connected(UnixStream),
}

impl Door {
    /// Starts the threads that serve front-ends. `on_end` is called on one of them when no front-end can connect any more.
    ///
    /// Fails if `queues` is not 1 to 64, or if the socket, a queue of the drive, a descriptor or a thread cannot be had.
    pub fn open(
        options: Options,
        drive: &Arc<Drive>,
        inside: Inside,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Result<Self> {
        let (source, file) = match options.socket {
            Socket::Path(path) => {
                let listener = listen(&path, &SOCKET_REMEDIES)?;
                (FrontEndSource::Listening(listener), Some(SocketFile::at(path)))
            }
            Socket::InheritedFd(fd) => (source_of(fd)?, None),
        };
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        if !(1..=MAX_QUEUES).contains(&options.queues) {
            return Err(Error::Usage(format!("--num-queues: give 1 to {MAX_QUEUES}")));
        }
        let vring = || Vring::new(memory.clone(), MAX_QUEUE_SIZE);
        let vrings = (0..options.queues).map(|_| vring()).collect::<std::result::Result<Vec<_>, _>>();
        let vrings = vrings.map_err(|error| Error::Usage(format!("--num-queues: {error}")))?;
        let count = drive.queues().min(options.queues);
        let read_only = options.read_only || drive.geometry().read_only;
        let counts: Vec<_> = (0..count).map(|_| Arc::new(WorkerCounters::default())).collect();
        let write_through = Arc::new(AtomicBool::new(false));
        let mut workers = Vec::new();
        for (index, counts) in (0..count).zip(&counts) {
            let context = RingContext {
                drive: drive.take_queue(index)?,
                geometry: drive.geometry().clone(),
                read_only,
                write_through: Arc::clone(&write_through),
            };
            let assigned = (0..options.queues).filter(|ring| ring % count == index);
            let assigned = assigned.filter_map(|ring| Some((ring, vrings.get(usize::from(ring))?.clone())));
            let rings = assigned.collect();
            let (memory, inside, counts) = (memory.clone(), inside.clone(), Arc::clone(counts));
            workers.push(Worker::spawn(context, memory, rings, inside, options.polling, counts)?);
        }
        let mailboxes: Vec<_> = workers.iter().map(|(mailbox, _)| mailbox.clone()).collect();
        let of = |ring: usize| mailboxes[ring % mailboxes.len()].clone();
        let device = BlockDevice {
            geometry: Arc::new(drive.geometry().clone()),
            read_only,
            memory,
            rings: Arc::new(
                vrings.into_iter().enumerate().map(|(index, vring)| (vring, of(index))).collect(),
            ),
            write_through,
        };
        let (stop, stopped) =
            UnixStream::pair().map_err(|e| socket_error(Path::new("vhost-user back-end"), e, ""))?;
        for signal in options.stop_signals {
            let stop = stop.try_clone().map_err(|e| socket_error(Path::new("vhost-user back-end"), e, ""))?;
            signal_hook::low_level::pipe::register(signal, stop).map_err(Error::Signal)?;
        }
        let counters = Arc::new(DiskCounters::new(Arc::clone(drive), counts));
        let reported = Arc::downgrade(&counters);
        inside.report_disk(reported);
        let serving = Serving { stopped, drive: Arc::clone(drive), inherited_files: options.kept, counters };
        let run = move || {
            serve_all(&serving, source, &device, &inside);
            drop(serving);
            on_end();
        };
        let thread = std::thread::Builder::new().name("vhost-user".into()).spawn(run);
        Ok(Self { stop, thread: Some(thread.map_err(Error::Thread)?), workers, _file: file })
    }

    fn shut_down(&mut self) {
        let _ = std::io::Write::write(&mut &self.stop, &[0]);
        // The connection's thread first: it needs the workers to stop its rings.
        let join = |thread: JoinHandle<()>| {
            if thread.join().is_err() {
                log::error!("a thread of the vhost-user back-end panicked; this is a bug of passgate");
            }
        };
        self.thread.take().map(join);
        self.workers.iter().for_each(|(mailbox, _)| mailbox.send(WorkerCommand::Exit));
        self.workers.drain(..).for_each(|(_, thread)| join(thread));
    }
}

impl Drop for Door {
    /// Ends the front-end's connection, then the workers. No request is in flight at the drive afterwards.
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// Returns what a given socket is: one that listens, or a connected one.
fn source_of(fd: OwnedFd) -> Result<FrontEndSource> {
    let failed = |call| move |errno| Error::Call(Failed::new(call, errno));
    let listens = rustix::net::sockopt::socket_acceptconn(&fd).map_err(failed("--fd: getsockopt"))?;
    Ok(if listens {
        let listener = UnixListener::from(fd);
        listener.set_nonblocking(true).map_err(|source| Error::Socket {
            path: Path::new("--fd").to_owned(),
            source,
            remedy: "",
        })?;
        FrontEndSource::Listening(listener)
    } else {
        FrontEndSource::Connected(UnixStream::from(fd))
    })
}

/// The state of the thread that serves front-ends, and the reasons for its end.
struct Serving {
    /// Readable once this process stops the back-end.
    stopped: UnixStream,
    /// The drive, which the kernel may want back.
    drive: Arc<Drive>,
    inherited_files: Vec<Weak<GuestFile>>,
    counters: Arc<DiskCounters>,
}

impl Serving {
    /// Waits until `fd` is readable. Returns false if the back-end is to stop.
    fn await_ready(&self, fd: impl AsFd) -> bool {
        let [stopped, removal] = self.wait(Some(fd.as_fd()), None);
        if removal {
            log::warn!(
                "the kernel wants the drive back: the front-end is disconnected and this back-end ends"
            );
        }
        !stopped && !removal
    }

    /// Returns true if the back-end is to stop.
    fn is_stopping(&self) -> bool {
        self.wait(None, Some(&Timespec::default())).contains(&true)
    }

    /// Waits until the back-end is to stop, then shuts the connection down if the message in progress does not end within
    /// [`LAST_MESSAGE_TIMEOUT`]: its rest is not read any more, and where the front-end does not read its answers, none is sent
    /// either. A message that only takes long to serve is answered. The connection itself is closed once the front-end's memory
    /// is mapped for no device. `served` becomes readable when no more messages are served.
    fn end_connection(&self, connection: &UnixStream, served: &UnixStream) {
        if !self.wait(Some(served.as_fd()), None).contains(&true) {
            return;
        }
        while !is_ready(served, PollFlags::IN, &LAST_MESSAGE_TIMEOUT) {
            log::warn!("vhost-user: the front-end's last message has not ended; no more is read");
            let reads = is_ready(connection, PollFlags::OUT, &Timespec::default());
            let _ = connection.shutdown(if reads { Shutdown::Read } else { Shutdown::Both });
        }
    }

    /// Waits until `fd` is readable, the back-end is to stop, or the time is over. Returns two flags: this process stops the
    /// back-end; the kernel wants the drive back. An error of poll(2) counts as the former.
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
            let is_ready = |index: usize| ready.get(index).is_some_and(|fd| !fd.revents().is_empty());
            return [is_ready(0), removal.is_some() && is_ready(1)];
        }
    }
}

/// Waits until `socket` has one of the events `what`, for at most `within`. Returns true if it has.
fn is_ready(socket: &UnixStream, what: PollFlags, within: &Timespec) -> bool {
    poll(&mut [PollFd::new(socket, what)], Some(within)).is_ok_and(|count| count > 0)
}

/// Serves one front-end after the other, until the back-end is to stop.
fn serve_all(serving: &Serving, source: FrontEndSource, device: &BlockDevice, inside: &Inside) {
    let listener = match source {
        FrontEndSource::Connected(stream) => {
            serve_one(serving, stream, device, inside);
            return;
        }
        FrontEndSource::Listening(listener) => listener,
    };
    let mut shortage_logged = false;
    while serving.await_ready(&listener) {
        match listener.accept() {
            Ok((stream, _)) => {
                shortage_logged = false;
                let connection = serve_one(serving, stream, device, inside);
                if serving.is_stopping() {
                    // The listener is closed before the connection: a front-end that reconnects at once would otherwise wait in
                    // a queue that is about to be closed, and Cloud Hypervisor gives its disk up for that.
                    drop(listener);
                    drop(connection);
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                if !std::mem::replace(&mut shortage_logged, true) {
                    let remedy = "raise the limit of files (`LimitNOFILE=`)";
                    log::warn!("vhost-user: no front-end can be accepted: {error}; {remedy}");
                }
                std::thread::sleep(ACCEPT_RETRY_DELAY);
            }
        }
    }
}

/// Serves a front-end until it disconnects or the back-end is to stop. Returns its connection, still open, and the value that
/// reports it as connected until both are dropped; none if it could not be served.
fn serve_one<'a>(
    serving: &'a Serving,
    stream: UnixStream,
    device: &BlockDevice,
    inside: &Inside,
) -> Option<(UnixStream, ConnectedFrontEnd<'a>)> {
    let prepared = (inside.connect(), stream.try_clone(), stream.set_nonblocking(false));
    let (client, copy) = match (prepared, stream.set_read_timeout(Some(MESSAGE_TIMEOUT))) {
        ((Ok(client), Ok(copy), Ok(())), Ok(())) => (client, copy),
        ((Err(error), ..), _) => {
            log::error!("vhost-user: {error}");
            return None;
        }
        (_, _) => {
            log::error!("vhost-user: the front-end's socket cannot be set up");
            return None;
        }
    };
    let Ok((answering, served)) = UnixStream::pair() else {
        log::error!("vhost-user: descriptors have run out; raise the limit of files (`LimitNOFILE=`)");
        return None;
    };
    log::info!("vhost-user: a front-end has connected");
    // Reported until the front-end's memory is mapped for no device and its connection is closed.
    let connected = serving.counters.front_end();
    let connection = &copy;
    std::thread::scope(|scope| {
        let end_connection = || serving.end_connection(connection, &served);
        if let Err(error) =
            std::thread::Builder::new().name("vhost-user-end".into()).spawn_scoped(scope, end_connection)
        {
            log::error!("vhost-user: {error}");
            return;
        }
        serve_messages(serving, (stream, connection), client, device, answering);
    });
    Some((copy, connected))
}

/// Serves a front-end's messages until it disconnects or the back-end is to stop. Then drops `answering` and removes the
/// front-end's memory and requests from the drive.
fn serve_messages(
    serving: &Serving,
    (stream, connection): (UnixStream, &UnixStream),
    client: Client,
    device: &BlockDevice,
    answering: UnixStream,
) {
    let table = Table::new(client, serving.inherited_files.clone());
    let frontend = Arc::new(Mutex::new(Frontend::new(device.clone(), table)));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&frontend));
    while serving.await_ready(connection) {
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
                log::info!("vhost-user: the front-end has disconnected");
                break;
            }
            Err(error) => {
                log::warn!("vhost-user: the front-end is disconnected: {error}");
                break;
            }
        }
    }
    drop((handler, answering));
    if let Some(frontend) = Arc::into_inner(frontend) {
        frontend.into_inner().unwrap_or_else(PoisonError::into_inner).disconnect();
    }
}
