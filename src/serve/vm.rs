//! The state of one VM's loop: its session, sockets, connections, alarms and the stages of its end.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use passgate_backends::{Device, Domain};
use passgate_bindings::PageRange;
use rustix::event::{PollFd, PollFlags, poll};

use super::accept::{ACCEPT_PAUSE, Acceptor};
use super::backlog::Backlog;
use super::connection::{Connection, ConnectionClass};
use super::ending::{EXTENSION, Ending};
use super::event_loop::{Core, Message};
use super::inside::AccessQuery;
use super::poller::{Interest, Poller};
use super::scrape::{MAX_METRICS_CLIENTS, Scrape};
use super::{Options, Takeover};
use crate::error::{Error, Result};
use crate::gate::{Answer, Caller, ClientId, Door, Event};
use crate::observe::disk::{Disk, ReadDisk};
use crate::protocol::batch::MAX_DATAGRAM;
use crate::protocol::verbs::Status;
use crate::session::records::Records;
use crate::session::{Pool, Returned, Session, SystemClock, Trust};

// Tokens of the poller.
const LISTENER: u64 = 0;
const KICK: u64 = 1;
const STOP: u64 = 2;
const WAKE: u64 = 3;
const METRICS: u64 = 4;
const DEVICE_REQUEST: u64 = 5;
/// The tokens of clients of the metrics socket: this one and the following, up to [`LAST_METRICS_CLIENT`].
const METRICS_CLIENT: u64 = 8;
const LAST_METRICS_CLIENT: u64 = METRICS_CLIENT + MAX_METRICS_CLIENTS as u64 - 1;
/// The tokens of connections: from here on twice the client's number, plus one for the notification channel.
const FIRST_CLIENT: u64 = 16;

/// The shortest time to an alarm, so that many deadlines do not cause as many wake-ups.
const MIN_ALARM_DELAY: Duration = Duration::from_micros(200);

/// One VM, with everything that its loop needs. Owned by the thread that runs the loop ([`super::handoff`]).
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) session: Session,
    /// The threads for calls that are not small.
    pub(super) pool: Pool,
    pub(super) options: Options,
    pub(super) core: Arc<Core>,
    pub(super) poller: Poller,
    pub(super) connections: BTreeMap<ClientId, Connection>,
    /// The receive buffer of all notification channels.
    pub(super) datagram: Box<[u8]>,
    pub(super) acceptor: Acceptor,
    /// The queries of other threads that cannot be answered yet.
    pub(super) access_queries: Vec<AccessQuery>,
    stopped: UnixStream,
    last_client: u32,
    pub(super) backlog: Backlog,
    pub(super) scrape: Option<Scrape>,
    /// The number of calls that have not returned and whose threads have lost the VM.
    pub(super) late_calls: usize,
    /// The counters of the disk that this process serves, for as long as it does.
    disk: Option<Weak<dyn ReadDisk>>,
    /// The time to which the alarm is set; none once it has fired.
    alarm: Option<Instant>,
    ending: Ending,
}

/// Closes the inbox: other threads learn that the VM is gone, whatever has ended it.
impl Drop for Vm {
    fn drop(&mut self) {
        self.core.close();
    }
}

/// The descriptors of a VM's loop that are made before it.
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) listener: Option<UnixListener>,
    pub(super) metrics: Option<UnixListener>,
    /// Readable once the server is to stop.
    pub(super) stopped: UnixStream,
}

impl Vm {
    pub(super) fn new(
        options: Options,
        sockets: Sockets,
        core: Arc<Core>,
        domain: Arc<dyn Domain>,
        devices: Vec<Arc<dyn Device>>,
        takeover: Option<Takeover>,
    ) -> Result<Self> {
        let Sockets { listener, metrics: scrape, stopped } = sockets;
        let resumed = takeover.as_ref().is_some_and(|takeover| takeover.session.earlier.is_some());
        let (leaves_open, adopt_within) =
            (takeover.is_some(), takeover.as_ref().map(|takeover| takeover.adopt_within));
        let workers = Arc::clone(&core);
        let pool = Pool::new(move |returned| _ = workers.deliver(Message::Call(returned)));
        let names = || devices.iter().map(|device| device.name().to_owned()).collect();
        let records = options
            .state
            .as_ref()
            .map(|state| Records::open(state, options.policy, domain.name(), names(), resumed))
            .transpose()?;
        let takeover = takeover.map(|takeover| takeover.session);
        let trust = Trust { tolerant: &options.tolerant, unsealed: options.unsealed };
        let clock = Arc::new(SystemClock);
        let session = Session::new(options.policy, domain, devices, trust, clock, records, takeover);
        let adopt_by = adopt_within.filter(|_| session.has_orphans()).map(|within| Instant::now() + within);
        let poller = Poller::new().map_err(Error::Poll)?;
        if let Some(listener) = &listener {
            poller.add(listener, Interest::Read, LISTENER).map_err(Error::Poll)?;
        }
        poller.add(core.kicked(), Interest::Read, KICK).map_err(Error::Poll)?;
        poller.add(&stopped, Interest::Read, STOP).map_err(Error::Poll)?;
        if let Some(listener) = &scrape {
            poller.add(listener, Interest::Read, METRICS).map_err(Error::Poll)?;
        }
        for wake in session.wakes() {
            poller.add(wake, Interest::Read, WAKE).map_err(Error::Poll)?;
        }
        for request in session.requests() {
            poller.add(request, Interest::ReadEdge, DEVICE_REQUEST).map_err(Error::Poll)?;
        }
        Ok(Self {
            session,
            pool,
            options,
            core,
            poller,
            connections: BTreeMap::new(),
            datagram: vec![0; MAX_DATAGRAM].into(),
            acceptor: Acceptor::new(listener),
            access_queries: Vec::new(),
            stopped,
            last_client: 0,
            backlog: Backlog::new()?,
            scrape: scrape.map(Scrape::new),
            late_calls: 0,
            disk: None,
            alarm: None,
            ending: Ending::new(leaves_open, adopt_by),
        })
    }

    /// Waits until a descriptor is ready, and replaces `tokens` by those that are. Returns without any to resume accepting, and
    /// every 50 ms during the end to check the shutdown deadline.
    pub(super) fn wait(&mut self, tokens: &mut Vec<u64>) -> Result<()> {
        if self.acceptor.is_pause_over(Instant::now()) {
            self.resume_accepting();
        }
        if let Some(manager) = &self.options.manager
            && self.ending.has_begun()
            && self.session.is_closing()
            && self.ending.needs_extension(Instant::now())
        {
            manager.extend_timeout(EXTENSION);
        }
        let timeout = match (self.ending.has_begun(), self.acceptor.is_paused()) {
            (true, _) => 50,
            (false, true) => ACCEPT_PAUSE.as_millis() as i32,
            (false, false) => -1,
        };
        self.poller.wait(timeout, tokens).map_err(Error::Poll)
    }

    /// Serves one request of a ready token. Returns true if there may be more.
    pub(super) fn ready(&mut self, token: u64) -> bool {
        match token {
            LISTENER => self.accept(),
            KICK => self.kicked(),
            STOP => {
                let _ = std::io::Read::read(&mut &self.stopped, &mut [0; 16]);
                // The disk's thread may have seen the host's request first, and have stopped this server because of it.
                self.handle_device_requests();
                self.begin_shutdown();
                false
            }
            WAKE => {
                self.session.poll_domains();
                false
            }
            METRICS => self.accept_metrics_client(METRICS_CLIENT),
            DEVICE_REQUEST => {
                self.handle_device_requests();
                false
            }
            METRICS_CLIENT..=LAST_METRICS_CLIENT => {
                self.metrics_client_ready(token, (token - METRICS_CLIENT) as usize);
                false
            }
            _ => match Self::client_of(token) {
                (client, Door::Control) => self.control_ready(client),
                (client, Door::Channel) => self.channel_ready(client),
            },
        }
    }

    /// Returns true if a request of the token has been read already, so that epoll does not report it.
    pub(super) fn has_read(&mut self, token: u64) -> bool {
        token >= FIRST_CLIENT
            && match Self::client_of(token) {
                (client, Door::Control) => {
                    self.connections.get_mut(&client).is_some_and(Connection::has_call)
                }
                (_, Door::Channel) => false,
            }
    }

    /// Returns true if the token is one of a notification channel.
    pub(super) fn is_channel(token: u64) -> bool {
        token >= FIRST_CLIENT && Self::client_of(token).1 == Door::Channel
    }

    fn client_of(token: u64) -> (ClientId, Door) {
        let token = token - FIRST_CLIENT;
        (ClientId((token >> 1) as u32), if token & 1 == 0 { Door::Control } else { Door::Channel })
    }

    /// Returns the token of one of a client's sockets.
    pub(super) fn token(client: ClientId, door: Door) -> u64 {
        FIRST_CLIENT + (u64::from(client.0) << 1 | u64::from(door == Door::Channel))
    }

    /// Adds a connected, non-blocking socket and returns its client number; none if the end has begun or epoll fails.
    pub(super) fn add_connection(&mut self, socket: OwnedFd, class: ConnectionClass) -> Option<ClientId> {
        if self.ending.has_begun() {
            return None;
        }
        self.last_client += 1;
        let client = ClientId(self.last_client);
        match self.poller.add(&socket, Interest::Read, Self::token(client, Door::Control)) {
            Ok(()) => _ = self.connections.insert(client, Connection::new(socket, class)),
            Err(error) => {
                log::error!("epoll: {error}");
                return None;
            }
        }
        Some(client)
    }

    /// Polls the listening sockets for this readiness.
    pub(super) fn watch_listeners(&self, interest: Interest) {
        let metrics = self.scrape.as_ref().map(|scrape| (&scrape.listener, METRICS));
        for (listener, token) in
            self.acceptor.listener().map(|listener| (listener, LISTENER)).into_iter().chain(metrics)
        {
            if let Err(error) = self.poller.change(listener, interest, token) {
                log::error!("epoll: {error}");
            }
        }
    }

    fn kicked(&mut self) -> bool {
        for done in self.core.take_messages() {
            match done {
                Message::Call(returned) => self.returned(returned),
                Message::LateCall(returned) => {
                    self.late_calls -= 1;
                    self.returned(returned);
                }
                Message::Dma { client, cookie, result } => self.dma_done(client, cookie, result),
                Message::AccessQuery(ask) => self.answer_query(ask),
                Message::Connect(socket) => self.add_internal_connection(socket),
                Message::Disk(disk) => self.disk = Some(disk),
            }
        }
        self.alarm = None;
        let now = Instant::now();
        self.session.expire(now);
        if self.ending.take_adoption_over(now) {
            self.give_up_orphans();
        }
        false
    }

    /// Expires the session's deadlines up to `now`.
    pub(super) fn expire_deadlines(&mut self, now: Instant) {
        if self.session.next_deadline().is_some_and(|when| when <= now) {
            self.session.expire(now);
        }
    }

    /// Passes the result of a call to the session. Memory that was examined for a client that has disconnected meanwhile is
    /// closed.
    pub(super) fn returned(&mut self, returned: Returned) {
        match returned {
            Returned::Examined { caller, memory, files } => {
                let taken = PageRange::new(memory.gpa, memory.length);
                if taken.is_ok_and(|gpa| self.session.is_taken(gpa)) {
                    self.close_dead_connections();
                }
                // The caller itself may have been closed by this.
                if self.connections.contains_key(&caller.client) {
                    self.session.returned(Returned::Examined { caller, memory, files });
                } else {
                    self.session.unwanted(files);
                }
            }
            returned => self.session.returned(returned),
        }
    }

    /// Closes the connections whose peers have hung up, before their tokens' turn: the memory of a VMM that restarts at once is
    /// being closed by the time that the new one adds the same range, and does not conflict with it.
    fn close_dead_connections(&mut self) {
        let mut sockets: Vec<_> = self
            .connections
            .values()
            .map(|connection| PollFd::new(&connection.socket, PollFlags::empty()))
            .collect();
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut sockets, Some(&now)).is_err() {
            return;
        }
        let hung_up = sockets.iter().map(|socket| socket.revents().contains(PollFlags::HUP));
        let dead: Vec<_> = self
            .connections
            .keys()
            .zip(hung_up)
            .filter(|(_, hung_up)| *hung_up)
            .map(|(client, _)| *client)
            .collect();
        for client in dead {
            self.close_connection(client);
        }
    }

    /// Sets the alarm to the earliest deadline, or to the time at which a call that starts now has taken `limit`, unless an
    /// earlier alarm is set. A deadline that is overdue waits for the alarm that is set: setting it again each time would
    /// postpone it for ever.
    pub(super) fn rearm(&mut self, limit: Option<Duration>) {
        let deadline = self.session.next_deadline().into_iter().chain(self.ending.adopt_by()).min();
        if deadline.is_none() && limit.is_none() {
            return;
        }
        let now = Instant::now();
        let call = limit.map(|limit| now + limit);
        let Some(next) = deadline.into_iter().chain(call).min() else { return };
        let next = next.max(now + MIN_ALARM_DELAY);
        if self.alarm.is_none_or(|set| next < set || set < now) {
            self.alarm = Some(next);
            self.core.set_alarm(now, next);
        }
    }

    /// Requests the end of this daemon if the host waits for a device (it is being unbound or removed). The kernel waits until
    /// no file of the device is open anywhere. So nothing is handed over to a next daemon either: devices are stopped, memory is
    /// closed.
    fn handle_device_requests(&mut self) {
        let names = self.session.wanted();
        if names.is_empty() {
            return;
        }
        log::error!(
            "the host wants {} back (it is being unbound or removed): this daemon closes it and ends",
            names.join(", ")
        );
        // Memory of an earlier daemon's clients cannot be adopted any more: it is closed at the next alarm.
        if self.ending.cancel_handover(Instant::now()) {
            self.core.cancel_handover();
        }
        // The disk's thread ends its requests first, and then stops this server.
        if !self.options.has_door {
            self.ending.request();
        }
    }

    /// Begins the end if a device's request has asked for it. Returns true if it did: the caller settles what follows. Called
    /// between requests, so that clients have been sent the reason.
    pub(super) fn begin_requested_end(&mut self) -> bool {
        let requested = self.ending.take_request();
        if requested {
            self.begin_shutdown();
        }
        requested
    }

    /// Closes every connection; the loop continues until their regions are closed, or until the shutdown deadline and the end of every
    /// close that progresses. Where the state is handed over, nothing is closed and the loop ends at once.
    fn begin_shutdown(&mut self) {
        if let Some(manager) = &self.options.manager {
            manager.stopping();
        }
        if self.ending.begin(Instant::now(), self.options.farewell) {
            let clients: Vec<ClientId> = self.connections.keys().copied().collect();
            for client in clients {
                self.close_connection(client);
            }
        }
    }

    /// Returns the result of the loop, once it is to end.
    pub(super) fn result(&self) -> Option<Result<()>> {
        let deadline = self.ending.deadline()?;
        if self.ending.leaves_open() {
            return Some(Ok(()));
        }
        let regions = self.session.region_count();
        if regions == 0 {
            return Some(Ok(()));
        }
        // A large region takes the kernel long, and its close has a deadline of its own.
        let is_over = Instant::now() >= deadline && !self.session.is_closing();
        is_over.then_some(Err(Error::StillOpen { regions }))
    }

    /// Closes a connection. The gate then closes the regions of its client.
    pub(super) fn close_connection(&mut self, client: ClientId) {
        if self.connections.remove(&client).is_some() {
            self.session.handle(Event::ClientGone { client });
            self.resume_accepting();
        }
    }

    /// Answers a request on the socket on which it came. The answer to a client that has disconnected is dropped.
    pub(super) fn answer(&mut self, caller: Caller, answer: Answer) {
        match caller.door {
            Door::Control => self.answer_control(caller, answer),
            Door::Channel => self.answer_channel(caller, &answer),
        }
    }

    /// Returns the reply to `Status`.
    pub(super) fn status(&self) -> Status {
        let policy = &self.options.policy;
        Status {
            clients: self.connections.len() as u64,
            instance: self.backlog.instance().to_owned(),
            sequence: self.backlog.last(),
            refused: self.backlog.refused(&self.session),
            disk: self.disk().map(|disk| disk.status()),
            ..self.session.status(policy)
        }
    }

    /// Returns the metrics as OpenMetrics text.
    pub(super) fn metrics(&self) -> String {
        let (session, clients) = (&self.session, self.connections.len() as u64);
        session.meter().text(&session.snapshot(), clients, session.audit_dropped(), self.disk())
    }

    /// Returns the counters of the disk, while one is served.
    fn disk(&self) -> Option<Disk> {
        self.disk.as_ref()?.upgrade().map(|disk| disk.read())
    }
}
