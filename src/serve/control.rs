//! The control socket: varlink calls in, replies out.

use std::os::fd::OwnedFd;

use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::connection::{self, Channel, Connection, Waiting};
use super::event_loop::Done;
use super::poller::Interest;
use super::vm::Vm;
use crate::gate::{Answer, Caller, ClientId, Door, Event, InvalidationId, Performer, RegionId, Verdict};
use crate::observe::{events, status};
use crate::protocol::frame::{Frame, FrameError};
use crate::protocol::verbs::{self, Call, Converted, DmaDone, MemoryAdded, Reply};
use crate::protocol::{hex, record};
use crate::session::{BorderError, Task};

/// The interface that every varlink service has.
const VARLINK: &str = "org.varlink.service";

/// Most bytes of one DMA on demand.
const MAX_DMA: usize = 4096;

/// The answer to a call whose descriptors the kernel could not pass.
const LOST: &str = "the daemon has as many files open as it may, and file descriptors of this call were lost: raise its \
                    limit (`ulimit -n`, `LimitNOFILE=`), then call again; nothing changed";

/// What a call comes to at once.
pub(super) enum Said {
    /// This reply.
    Now(Value),
    /// This reply, with a descriptor.
    With(Value, OwnedFd),
    /// The answer comes later.
    Later,
    /// Notices come, from there on.
    Notices(verbs::Subscribe),
    /// It was wrong.
    Wrong(String, i32),
    /// It is not a call for a connection of the reserve, which ends thereby.
    Full,
    /// An error of varlink's own, with its one parameter.
    Varlink(&'static str, &'static str, String),
}

impl Said {
    fn wrong(error: impl std::fmt::Display) -> Self {
        Self::Wrong(error.to_string(), 22)
    }
}

impl Vm {
    /// Reads what has come and does the next call; whether there may be more.
    pub(super) fn control_ready(&mut self, client: ClientId) -> bool {
        let Some(connection) = self.connections.get_mut(&client) else { return false };
        if connection.is_behind() {
            if connection.flush().is_err() {
                self.hang_up(client);
                return false;
            }
            if connection.is_behind() {
                return false;
            }
            if !self.replay(client) {
                self.watch_control(client, Interest::Read);
                return true;
            }
            return false;
        }
        if matches!(connection.waiting, Waiting::Notices { .. }) && self.replay(client) {
            return false;
        }
        let Some(connection) = self.connections.get_mut(&client) else { return false };
        if connection.waiting == Waiting::No
            && let Some(frame) = connection.frames.take()
        {
            self.call(client, frame);
            return true;
        }
        let known = connection.frames.read(&connection.socket);
        match known {
            Ok(more) => more && connection.waiting == Waiting::No,
            Err(FrameError::Closed) => {
                self.hang_up(client);
                false
            }
            Err(error) => {
                log::warn!("client {}: {error}", client.0);
                self.reply(client, refused(&error.to_string(), 90), None);
                self.hang_up(client);
                false
            }
        }
    }

    fn call(&mut self, client: ClientId, Frame { bytes, fds }: Frame) {
        let Some(connection) = self.connections.get_mut(&client) else { return };
        connection.calls += 1;
        let caller = Caller { client, door: Door::Control, cookie: connection.calls };
        let said = match serde_json::from_slice::<Call>(&bytes) {
            Ok(call) if call.oneway || call.upgrade => {
                Said::wrong("`oneway` and `upgrade` are not supported: call without")
            }
            Ok(call) => match fds {
                Ok(fds) => self.verb(caller, &call, fds),
                Err(_) => Said::Wrong(LOST.into(), Errno::MFILE.raw_os_error()),
            },
            Err(error) => Said::wrong(format!("the frame is no varlink call: {error}")),
        };
        if matches!(said, Said::Wrong(..) | Said::Varlink(..)) {
            self.session.meter().wrong();
        }
        let (reply, fd) = match said {
            Said::Now(parameters) => (Reply { parameters, ..Reply::default() }, None),
            Said::With(parameters, fd) => (Reply { parameters, ..Reply::default() }, Some(fd)),
            Said::Wrong(message, errno) => (refused(&message, errno), None),
            Said::Varlink(error, parameter, value) => {
                let error = Some(format!("{VARLINK}.{error}"));
                (Reply { error, parameters: json!({ parameter: value }), ..Reply::default() }, None)
            }
            Said::Full => {
                self.reply(client, refused(&self.full(), Errno::USERS.raw_os_error()), None);
                return self.hang_up(client);
            }
            Said::Later => return self.wait_for(client, Waiting::Answer(caller.cookie)),
            Said::Notices(subscribe) => return self.listen(client, &subscribe),
        };
        self.reply(client, reply, fd);
    }

    fn wait_for(&mut self, client: ClientId, waiting: Waiting) {
        if let Some(connection) = self.connections.get_mut(&client) {
            connection.waiting = waiting;
        }
    }

    fn verb(&mut self, caller: Caller, call: &Call, fds: Vec<OwnedFd>) -> Said {
        let name = call.method.strip_prefix(verbs::INTERFACE).and_then(|rest| rest.strip_prefix('.'));
        if !self.may_call(caller.client, name) {
            return Said::Full;
        }
        if name != Some("AddMemory") && !fds.is_empty() {
            return Said::wrong(format!("{} file descriptors came along, 0 belong to this call", fds.len()));
        }
        if matches!(name, Some("AddMemory" | "OpenChannel" | "Adopt"))
            && let Some(connection) = self.connections.get_mut(&caller.client)
        {
            connection.speaks_for_vm = true;
        }
        let parameters = &call.parameters;
        match name {
            Some("AddMemory") => with(parameters, |memory| {
                self.session.add_memory(caller, memory, fds);
                Said::Later
            }),
            Some("RemoveMemory") => with(parameters, |verbs::RemoveMemory { region }| {
                if let Some(connection) = self.connections.get_mut(&caller.client) {
                    connection.removal = Some(caller.cookie);
                }
                self.session.handle(Event::RemoveRegion { caller, region: RegionId(region) });
                Said::Later
            }),
            Some("OpenChannel") => self.open_channel(caller.client),
            Some("Convert") => with(parameters, |convert| self.convert(caller, convert)),
            Some("Status") => now(&self.status()),
            Some("Metrics") => now(&verbs::Metrics { text: self.metrics() }),
            Some("Release") => with(parameters, |release| self.release(caller, release)),
            Some("Subscribe") if call.more => with(parameters, Said::Notices),
            Some("Subscribe") => Said::wrong("Subscribe answers more than once: call it with \"more\":true"),
            Some("Explain") => with(parameters, |verbs::Explain { invalidation }| {
                match self.session.receipt(InvalidationId(invalidation)) {
                    Some(receipt) => Said::Now(json!({ "receipt": events::receipt(receipt, &self.session) })),
                    None => Said::Wrong(
                        format!("invalidation {invalidation} is not over yet, or not remembered any more"),
                        2,
                    ),
                }
            }),
            Some("Adopt") => with(parameters, |verbs::Adopt {}| self.adopt(caller)),
            Some("Dma") => with(parameters, |dma| self.dma(caller, dma)),
            _ => varlink(call),
        }
    }

    fn open_channel(&mut self, client: ClientId) -> Said {
        let made = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|errno| Failed::new("socketpair", errno).into())
            .and_then(|(ours, theirs)| {
                self.poller
                    .add(&ours, Interest::Read, Self::token(client, Door::Channel))
                    .map(|()| (ours, theirs))
            });
        let connection = self.connections.get_mut(&client);
        match (made, connection) {
            (Ok((ours, theirs)), Some(connection)) if connection.channel.is_none() => {
                connection.channel = Some(Channel::new(ours));
                Said::With(json!({}), theirs)
            }
            (Ok(_), _) => Said::Wrong("this connection has a channel already: use that one".into(), 16),
            (Err(error), _) => {
                let mend = "raise the daemon's limit of files (`ulimit -n`, `LimitNOFILE=`)";
                Said::Wrong(format!("cannot make a channel: {error}; {mend}"), Errno::MFILE.raw_os_error())
            }
        }
    }

    fn convert(&mut self, caller: Caller, convert: verbs::Convert) -> Said {
        let range = match PageRange::new(convert.gpa, convert.length) {
            Ok(range) => range,
            Err(error) => return Said::wrong(error),
        };
        if let Err(error) = self.session.may_convert(range) {
            return Said::Wrong(error.to_string(), error.errno());
        }
        let deadline_ms = match record::deadline_ms(convert.deadline_ms) {
            Ok(deadline_ms) => deadline_ms,
            Err(error) => return Said::wrong(error),
        };
        self.session.handle(Event::Begin {
            caller,
            ranges: range.into(),
            to: convert.to.into(),
            performer: Performer::Passgate,
            deadline_ns: u64::from(deadline_ms) * 1_000_000,
        });
        Said::Later
    }

    fn dma(&mut self, caller: Caller, dma: verbs::Dma) -> Said {
        if !self.options.allow_dma {
            return Said::Wrong("DMA on demand is off: start the daemon with --allow-dma".into(), 1);
        }
        let device = self.session.devices().iter().find(|device| device.name() == dma.device).cloned();
        let Some(device) = device else {
            return Said::Wrong(format!("no device {}: Status lists them", dma.device), 19);
        };
        let bytes = dma.write.as_deref().map(hex::decode);
        let iova = Iova(dma.iova);
        let task: Box<dyn FnOnce() -> passgate_backends::Result<DmaDone> + Send> = match (bytes, dma.read) {
            (Some(Some(bytes)), None) if !bytes.is_empty() && bytes.len() <= MAX_DMA => {
                Box::new(move || device.dma_write(iova, &bytes).map(|()| DmaDone { read: None }))
            }
            (None, Some(len)) if len > 0 && len as usize <= MAX_DMA => Box::new(move || {
                let bytes = device.dma_read(iova, len as usize)?;
                Ok(DmaDone { read: Some(hex::encode(&bytes)) })
            }),
            _ => return Said::wrong("give either `write` in hexadecimal or `read`, of 1 to 4096 bytes"),
        };
        let core = std::sync::Arc::clone(&self.core);
        self.pool.run(Task::Other(Box::new(move || {
            core.deliver(Done::Dma { client: caller.client, cookie: caller.cookie, result: task() });
        })));
        Said::Later
    }

    pub(super) fn dma_done(
        &mut self,
        client: ClientId,
        cookie: u64,
        result: Result<DmaDone, passgate_backends::Error>,
    ) {
        let reply = match result {
            Ok(done) => Reply { parameters: json!(done), ..Reply::default() },
            Err(error) => refused(&error.to_string(), error.errno().map_or(5, |errno| errno.raw_os_error())),
        };
        self.reply_later(client, cookie, reply);
    }

    /// Answers a call that waited.
    pub(super) fn answer_control(&mut self, caller: Caller, answer: Answer) {
        let parameters = match answer {
            Answer::RegionAdded { region, mapped } => json!(MemoryAdded { region: region.0, mapped }),
            Answer::Released { bytes } => json!({ "bytes": bytes }),
            Answer::Adopted { regions, unended } => json!(status::adopted(&regions, &unended)),
            Answer::RegionRemoved { .. } | Answer::Ended { .. } => json!({}),
            Answer::Verdict { invalidation, verdict } => {
                let removal = self.connections.get(&caller.client).and_then(|client| client.removal);
                if removal == Some(caller.cookie) {
                    let (message, errno) = stays(verdict, invalidation);
                    return self.reply_later(caller.client, caller.cookie, refused(&message, errno));
                }
                let (word, failure) = events::verdict(verdict, &self.session);
                json!(Converted { verdict: word.into(), invalidation: invalidation.0, failure })
            }
            Answer::Refused(refusal) => {
                let reply = refused(&refusal.to_string(), refusal.errno());
                return self.reply_later(caller.client, caller.cookie, reply);
            }
        };
        self.reply_later(caller.client, caller.cookie, Reply { parameters, ..Reply::default() });
    }

    /// Memory will not do.
    pub(super) fn refuse(&mut self, caller: Caller, error: &BorderError) {
        self.session.meter().wrong();
        self.reply_later(caller.client, caller.cookie, refused(&error.to_string(), error.errno()));
    }

    fn reply_later(&mut self, client: ClientId, cookie: u64, reply: Reply) {
        let Some(connection) = self.connections.get_mut(&client) else { return };
        if connection.waiting == Waiting::Answer(cookie) {
            connection.waiting = Waiting::No;
            self.reply(client, reply, None);
            // What it sent meanwhile lies read, and no event will tell of it.
            while self.connections.get_mut(&client).is_some_and(Connection::has_call)
                && self.control_ready(client)
            {}
        }
    }

    fn reply(&mut self, client: ClientId, reply: Reply, fd: Option<OwnedFd>) {
        self.send_control(client, connection::frame(&reply), fd);
    }

    /// Sends whole frames; who lets too much of them wait is let go.
    pub(super) fn send_control(&mut self, client: ClientId, frames: Vec<u8>, fd: Option<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&client) else { return };
        let before = connection.is_behind();
        connection.send(frames, fd);
        let (behind, deaf) = (connection.is_behind(), connection.is_deaf());
        let listened = matches!(connection.waiting, Waiting::Notices { .. });
        if behind && !before {
            self.watch_control(client, Interest::Write);
        }
        if deaf {
            log::warn!("client {} does not read what it asked for: closed", client.0);
            if listened {
                self.session.meter().dropped();
            }
            self.hang_up(client);
        }
    }

    pub(super) fn watch_control(&mut self, client: ClientId, interest: Interest) {
        if let Some(connection) = self.connections.get(&client)
            && let Err(error) =
                self.poller.change(&connection.socket, interest, Self::token(client, Door::Control))
        {
            log::error!("epoll: {error}");
        }
    }
}

/// What every varlink service answers, and what there is not.
fn varlink(call: &Call) -> Said {
    let (interface, method) = call.method.rsplit_once('.').unwrap_or((&call.method, ""));
    match (interface, method) {
        (VARLINK, "GetInfo") => Said::Now(json!({
            "vendor": "passgate", "product": "passgate", "version": env!("CARGO_PKG_VERSION"),
            "url": "", "interfaces": [VARLINK, verbs::INTERFACE],
        })),
        (VARLINK, "GetInterfaceDescription") => match call.parameters["interface"].as_str() {
            Some(verbs::INTERFACE) => Said::Now(json!({ "description": verbs::DESCRIPTION })),
            Some(other) => Said::Varlink("InterfaceNotFound", "interface", other.to_owned()),
            None => Said::Varlink("InvalidParameter", "parameter", "interface".to_owned()),
        },
        (VARLINK | verbs::INTERFACE, _) => Said::Varlink("MethodNotFound", "method", call.method.clone()),
        _ => Said::Varlink("InterfaceNotFound", "interface", interface.to_owned()),
    }
}

/// Why a removal has failed, in words, and as an errno.
fn stays(verdict: Verdict, invalidation: InvalidationId) -> (String, i32) {
    let errno = match verdict {
        Verdict::Refused { reason, .. } | Verdict::Unknown { reason, .. } if reason.errno != 0 => {
            reason.errno
        }
        _ => 16,
    };
    let mend =
        "devices may still reach it: Explain says why, and it goes when they let go, or with this daemon";
    (format!("the region could not be removed (invalidation {}); {mend}", invalidation.0), errno)
}

pub(super) fn refused(message: &str, errno: i32) -> Reply {
    Reply {
        error: Some(format!("{}.Refused", verbs::INTERFACE)),
        parameters: json!({ "message": message, "errno": errno }),
        continues: false,
    }
}

fn read<T: DeserializeOwned>(parameters: &Value) -> Result<T, Said> {
    let empty = json!({});
    let parameters = if parameters.is_null() { &empty } else { parameters };
    T::deserialize(parameters).map_err(|error| Said::wrong(format!("parameters: {error}")))
}

fn with<T: DeserializeOwned>(parameters: &Value, then: impl FnOnce(T) -> Said) -> Said {
    read(parameters).map_or_else(|said| said, then)
}

fn now(reply: &impl Serialize) -> Said {
    serde_json::to_value(reply).map_or_else(Said::wrong, Said::Now)
}
