//! A VM as the loop has it: its session, its sockets, its connections.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use passgate_backends::{Device, Domain};
use passgate_bindings::PageRange;
use rustix::event::{PollFd, PollFlags, poll};

use super::accept::{STARVED, Spare};
use super::backlog::Backlog;
use super::connection::{Connection, Place};
use super::event_loop::{Core, Done};
use super::inside::Ask;
use super::poller::{Interest, Poller};
use super::scrape::{Scrape, VISITORS};
use super::vhost_blk::Counted;
use super::{Hold, Options};
use crate::error::{Error, Result};
use crate::gate::{Answer, Caller, ClientId, Door, Event};
use crate::observe::disk::Disk;
use crate::observe::records::Records;
use crate::observe::status;
use crate::protocol::batch::MAX_DATAGRAM;
use crate::protocol::verbs::Status;
use crate::session::{Pool, Returned, Session, SystemClock, Trust};

const LISTENER: u64 = 0;
const KICK: u64 = 1;
const STOP: u64 = 2;
const WAKE: u64 = 3;
const METRICS: u64 = 4;
const WANTED: u64 = 5;
/// Tokens of the visitors of the metrics socket.
const VISITOR: u64 = 8;
const LAST_VISITOR: u64 = VISITOR + VISITORS as u64 - 1;
/// Tokens of connections: the client's number, and which of its sockets.
const CLIENTS: u64 = 16;

/// The least time to an alarm, so that many deadlines do not mean many wake-ups.
const LEAST: Duration = Duration::from_micros(200);

/// One VM, with everything that its loop needs.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) session: Session,
    /// The threads of calls that take long.
    pub(super) pool: Pool,
    pub(super) options: Options,
    pub(super) core: Arc<Core>,
    pub(super) poller: Poller,
    pub(super) connections: BTreeMap<ClientId, Connection>,
    /// Where a datagram is read into, whoever sends it.
    pub(super) datagram: Box<[u8]>,
    pub(super) listener: Option<UnixListener>,
    /// Questions of other threads that cannot be answered yet.
    pub(super) asks: Vec<Ask>,
    stopped: UnixStream,
    last_client: u32,
    pub(super) backlog: Backlog,
    pub(super) scrape: Option<Scrape>,
    /// Calls for which a thread of the loop was given up and that have not returned.
    pub(super) late_calls: usize,
    /// The disk that is served, while it is.
    disk: Weak<Counted>,
    /// Until when nobody is accepted.
    pub(super) starved: Option<Instant>,
    pub(super) spare: Spare,
    alarm: Option<Instant>,
    farewell: Option<Instant>,
    /// Until when somebody may come back for memory of an earlier daemon's clients.
    adopt_by: Option<Instant>,
    /// Whether what it has is the next daemon's.
    holds: bool,
    /// True once the host wants a device back, until the end has begun.
    ends: bool,
}

/// Whatever ends it: who hands something in from now on hears that nobody takes it.
impl Drop for Vm {
    fn drop(&mut self) {
        self.core.close();
    }
}

/// What a VM listens to, besides its clients.
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) listener: Option<UnixListener>,
    pub(super) metrics: Option<UnixListener>,
    /// Readable when it is to stop.
    pub(super) stopped: UnixStream,
}

impl Vm {
    pub(super) fn new(
        options: Options,
        sockets: Sockets,
        core: Arc<Core>,
        domain: Arc<dyn Domain>,
        devices: Vec<Arc<dyn Device>>,
        hold: Option<Hold>,
    ) -> Result<Self> {
        let Sockets { listener, metrics: scrape, stopped } = sockets;
        let resumed = hold.as_ref().is_some_and(|hold| hold.session.left.is_some());
        let (holds, within) = (hold.is_some(), hold.as_ref().map(|hold| hold.adopt_within));
        let workers = Arc::clone(&core);
        let pool = Pool::new(move |returned| _ = workers.deliver(Done::Call(returned)));
        let names = || devices.iter().map(|device| device.name().to_owned()).collect();
        let records = options
            .state
            .as_ref()
            .map(|state| Records::open(state, options.policy, domain.name(), names(), resumed))
            .transpose()?;
        let hold = hold.map(|hold| hold.session);
        let trust = Trust { tolerant: &options.tolerant, unsealed: options.unsealed };
        let clock = Arc::new(SystemClock);
        let session = Session::new(options.policy, domain, devices, trust, clock, records, hold);
        let adopt_by = within.filter(|_| session.has_orphans()).map(|within| Instant::now() + within);
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
            poller.add(request, Interest::News, WANTED).map_err(Error::Poll)?;
        }
        Ok(Self {
            session,
            pool,
            options,
            core,
            poller,
            connections: BTreeMap::new(),
            datagram: vec![0; MAX_DATAGRAM].into(),
            listener,
            asks: Vec::new(),
            stopped,
            last_client: 0,
            backlog: Backlog::new()?,
            scrape: scrape.map(Scrape::new),
            late_calls: 0,
            disk: Weak::new(),
            starved: None,
            spare: Spare::new(),
            alarm: None,
            farewell: None,
            adopt_by,
            holds,
            ends: false,
        })
    }

    /// Waits until something is ready.
    pub(super) fn wait(&mut self, tokens: &mut Vec<u64>) -> Result<()> {
        if self.starved.is_some_and(|until| until <= Instant::now()) {
            self.listen_again();
        }
        let timeout = match (self.farewell, self.starved) {
            (Some(_), _) => 50,
            (None, Some(_)) => STARVED.as_millis() as i32,
            (None, None) => -1,
        };
        self.poller.wait(timeout, tokens).map_err(Error::Poll)
    }

    /// Does one thing that a token stands for; whether there may be more of it.
    pub(super) fn ready(&mut self, token: u64) -> bool {
        match token {
            LISTENER => self.accept(),
            KICK => self.kicked(),
            STOP => {
                let _ = std::io::Read::read(&mut &self.stopped, &mut [0; 16]);
                // The door that stops this may have seen first what the host wants.
                self.given_back();
                self.say_goodbye();
                false
            }
            WAKE => {
                self.session.poll_domains();
                false
            }
            METRICS => self.visitor_comes(VISITOR),
            WANTED => {
                self.given_back();
                false
            }
            VISITOR..=LAST_VISITOR => {
                self.visitor_ready(token, (token - VISITOR) as usize);
                false
            }
            _ => match Self::client_of(token) {
                (client, Door::Control) => self.control_ready(client),
                (client, Door::Channel) => self.channel_ready(client),
            },
        }
    }

    /// Whether a request of a token lies read, so that waiting would not find it.
    pub(super) fn has_read(&mut self, token: u64) -> bool {
        token >= CLIENTS
            && match Self::client_of(token) {
                (client, Door::Control) => {
                    self.connections.get_mut(&client).is_some_and(Connection::has_call)
                }
                (_, Door::Channel) => false,
            }
    }

    /// Whether a token is a notification channel's.
    pub(super) fn is_channel(token: u64) -> bool {
        token >= CLIENTS && Self::client_of(token).1 == Door::Channel
    }

    fn client_of(token: u64) -> (ClientId, Door) {
        let token = token - CLIENTS;
        (ClientId((token >> 1) as u32), if token & 1 == 0 { Door::Control } else { Door::Channel })
    }

    /// The token of one of a client's sockets.
    pub(super) fn token(client: ClientId, door: Door) -> u64 {
        CLIENTS + (u64::from(client.0) << 1 | u64::from(door == Door::Channel))
    }

    /// Takes a connected socket that does not block; who it is from now on. None where the end has begun.
    pub(super) fn welcome(&mut self, socket: OwnedFd, place: Place) -> Option<ClientId> {
        if self.farewell.is_some() {
            return None;
        }
        self.last_client += 1;
        let client = ClientId(self.last_client);
        match self.poller.add(&socket, Interest::Read, Self::token(client, Door::Control)) {
            Ok(()) => _ = self.connections.insert(client, Connection::new(socket, place)),
            Err(error) => {
                log::error!("epoll: {error}");
                return None;
            }
        }
        Some(client)
    }

    pub(super) fn watch_doors(&self, interest: Interest) {
        let metrics = self.scrape.as_ref().map(|scrape| (&scrape.listener, METRICS));
        for (listener, token) in self.listener.iter().map(|listener| (listener, LISTENER)).chain(metrics) {
            if let Err(error) = self.poller.change(listener, interest, token) {
                log::error!("epoll: {error}");
            }
        }
    }

    fn kicked(&mut self) -> bool {
        for done in self.core.take_done() {
            match done {
                Done::Call(returned) => self.returned(returned),
                Done::LateCall(returned) => {
                    self.late_calls -= 1;
                    self.returned(returned);
                }
                Done::Dma { client, cookie, result } => self.dma_done(client, cookie, result),
                Done::Ask(ask) => self.asked(ask),
                Done::Connect(socket) => self.connected(socket),
                Done::Disk(disk) => self.disk = disk,
            }
        }
        self.alarm = None;
        let now = Instant::now();
        self.session.expire(now);
        if self.adopt_by.is_some_and(|by| by <= now) {
            self.adopt_by = None;
            self.give_up_orphans();
        }
        false
    }

    /// Tells the session of every deadline that is over by `now`.
    pub(super) fn keep_alarms(&mut self, now: Instant) {
        if self.session.next_deadline().is_some_and(|when| when <= now) {
            self.session.expire(now);
        }
    }

    /// Takes what came of a call. Memory of a client that is gone meanwhile comes too late.
    pub(super) fn returned(&mut self, returned: Returned) {
        match returned {
            Returned::Examined { caller, memory, files } => {
                let taken = PageRange::new(memory.gpa, memory.length);
                if taken.is_ok_and(|gpa| self.session.is_taken(gpa)) {
                    self.hang_up_the_dead();
                }
                // It may be one of these.
                if self.connections.contains_key(&caller.client) {
                    self.session.returned(Returned::Examined { caller, memory, files });
                } else {
                    self.session.unwanted(files);
                }
            }
            returned => self.session.returned(returned),
        }
    }

    /// Closes the connections whose other end is closed, before their sockets' turn: a VMM that starts again at once finds
    /// its memory on its way out and not in its way.
    fn hang_up_the_dead(&mut self) {
        let mut sockets: Vec<_> = self
            .connections
            .values()
            .map(|connection| PollFd::new(&connection.socket, PollFlags::empty()))
            .collect();
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut sockets, Some(&now)).is_err() {
            return;
        }
        let over = sockets.iter().map(|socket| socket.revents().contains(PollFlags::HUP));
        let dead: Vec<_> =
            self.connections.keys().zip(over).filter(|(_, over)| *over).map(|(client, _)| *client).collect();
        for client in dead {
            self.hang_up(client);
        }
    }

    /// Sets the alarm for the earliest deadline, or for when a call that begins now has taken `patience`; unless
    /// an alarm is set by then. A late deadline waits for the alarm that is set: to set it anew each time would put
    /// it off for ever.
    pub(super) fn rearm(&mut self, patience: Option<Duration>) {
        let deadline = self.session.next_deadline().into_iter().chain(self.adopt_by).min();
        if deadline.is_none() && patience.is_none() {
            return;
        }
        let now = Instant::now();
        let call = patience.map(|patience| now + patience);
        let Some(next) = deadline.into_iter().chain(call).min() else { return };
        let next = next.max(now + LEAST);
        if self.alarm.is_none_or(|set| next < set || set < now) {
            self.alarm = Some(next);
            self.core.set_alarm(now, next);
        }
    }

    /// The host wants a device back and waits for it. A file of it that stays open anywhere would keep it, so this daemon
    /// ends in order, and leaves nothing to a next one: its devices are stopped, its memory is closed.
    fn given_back(&mut self) {
        let names = self.session.wanted();
        if names.is_empty() {
            return;
        }
        log::error!(
            "the host wants {} back (it is being unbound or removed): this daemon lets go of it and ends",
            names.join(", ")
        );
        if std::mem::take(&mut self.holds) {
            self.core.keep_nothing();
            // Nobody comes back for what an earlier daemon's clients had.
            self.adopt_by = self.adopt_by.map(|_| Instant::now());
        }
        // A door ends its requests first, and stops this then.
        self.ends = !self.options.has_door;
    }

    /// Begins the end that a device asked for, once everybody has been told why; true where it does, so that the caller
    /// settles what that takes.
    pub(super) fn end_if_wanted(&mut self) -> bool {
        let ends = std::mem::take(&mut self.ends);
        if ends {
            self.say_goodbye();
        }
        ends
    }

    /// Closes every connection; the loop goes on until what they had is closed.
    fn say_goodbye(&mut self) {
        if let Some(manager) = &self.options.manager {
            manager.stopping();
        }
        if self.holds {
            // Regions stay as they are, and so do the ledger's records of them.
            self.farewell = Some(Instant::now());
            return;
        }
        if self.farewell.is_none() {
            self.farewell = Some(Instant::now() + self.options.farewell);
            let clients: Vec<ClientId> = self.connections.keys().copied().collect();
            for client in clients {
                self.hang_up(client);
            }
        }
    }

    /// How the loop ends, where it is to.
    pub(super) fn is_over(&self) -> Option<Result<()>> {
        let farewell = self.farewell?;
        if self.holds {
            return Some(Ok(()));
        }
        let regions = self.session.region_count();
        if regions == 0 {
            return Some(Ok(()));
        }
        (Instant::now() >= farewell).then_some(Err(Error::StillOpen { regions }))
    }

    /// Closes a connection: what it had goes.
    pub(super) fn hang_up(&mut self, client: ClientId) {
        if self.connections.remove(&client).is_some() {
            self.session.handle(Event::ClientGone { client });
            self.listen_again();
        }
    }

    /// Answers a request through the door by which it came. A client that is gone hears nothing.
    pub(super) fn answer(&mut self, caller: Caller, answer: Answer) {
        match caller.door {
            Door::Control => self.answer_control(caller, answer),
            Door::Channel => self.answer_channel(caller, &answer),
        }
    }

    /// What is known now.
    pub(super) fn status(&self) -> Status {
        let policy = &self.options.policy;
        Status {
            clients: self.connections.len() as u64,
            instance: self.backlog.instance().to_owned(),
            sequence: self.backlog.last(),
            refused: self.backlog.refused(&self.session),
            disk: self.disk().map(|disk| disk.status()),
            ..status::status(&self.session, policy)
        }
    }

    /// What is counted and timed, in OpenMetrics text.
    pub(super) fn metrics(&self) -> String {
        let (session, clients) = (&self.session, self.connections.len() as u64);
        session.meter().text(&session.snapshot(), clients, session.audit_dropped(), self.disk())
    }

    /// What is counted of the disk, where one is served.
    fn disk(&self) -> Option<Disk> {
        self.disk.upgrade().map(|disk| disk.read())
    }
}
