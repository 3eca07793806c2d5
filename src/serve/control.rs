//! The control socket: varlink calls and their replies (docs/protocol.md).
//!
//! A client's calls are served one at a time, in order. A reply that waits for the gate is sent when its answer comes.

use std::os::fd::OwnedFd;

use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::connection::{self, Channel, Connection, ControlState};
use super::event_loop::Message;
use super::poller::Interest;
use super::vm::Vm;
use crate::gate::{Answer, Caller, ClientId, Door, Event, InvalidationId, Performer, RegionId, Verdict};
use crate::observe::events;
use crate::protocol::frame::{Frame, FrameError};
use crate::protocol::verbs::{self, Call, Converted, DmaDone, MemoryAdded, Reply};
use crate::protocol::{hex, request};
use crate::session::{BorderError, Task, adopted};

/// The interface that every varlink service implements.
const VARLINK: &str = "org.varlink.service";

/// The number of bytes of one DMA on demand, at most.
const MAX_DMA_LEN: usize = 4096;

/// The error of a call whose descriptors the kernel could not pass (`MSG_CTRUNC`).
const LOST_DESCRIPTORS: &str = "the daemon has as many files open as it may, and file descriptors of this call were lost: raise its \
                    limit (`ulimit -n`, `LimitNOFILE=`), then call again; nothing changed";

/// The immediate outcome of a call.
pub(super) enum CallOutcome {
    /// The call is answered with these parameters.
    Reply(Value),
    /// The call is answered with these parameters and a descriptor.
    ReplyWithFd(Value, OwnedFd),
    /// The reply is sent when the gate or a device has answered.
    Pending,
    /// The connection becomes a subscriber of events.
    Subscribe(verbs::Subscribe),
    /// The call is refused with this message and errno.
    Error(String, i32),
    /// The connection is one of the operators' reserve, which may not make this call: it is closed.
    LimitReached,
    /// An error of the `org.varlink.service` interface: its name, the name of its one parameter, and the value.
    VarlinkError(&'static str, &'static str, String),
}

impl CallOutcome {
    /// Refuses a call with `EINVAL`.
    fn invalid(error: impl std::fmt::Display) -> Self {
        Self::Error(error.to_string(), Errno::INVAL.raw_os_error())
    }
}

impl Vm {
    /// Sends what is queued, then serves the next call that has been read, or reads. Returns true if there may be more.
    pub(super) fn control_ready(&mut self, client: ClientId) -> bool {
        let Some(connection) = self.connections.get_mut(&client) else { return false };
        if connection.is_behind() {
            if connection.flush().is_err() {
                self.close_connection(client);
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
        if matches!(connection.control, ControlState::Subscribed { .. }) && self.replay(client) {
            return false;
        }
        let Some(connection) = self.connections.get_mut(&client) else { return false };
        if connection.control == ControlState::Idle
            && let Some(frame) = connection.frames.take()
        {
            self.call(client, frame);
            return true;
        }
        let read = connection.frames.read(&connection.socket);
        match read {
            Ok(more) => more && connection.control == ControlState::Idle,
            Err(FrameError::Closed) => {
                self.close_connection(client);
                false
            }
            Err(error) => {
                log::warn!("client {}: {error}", client.0);
                self.reply(client, refused(&error.to_string(), Errno::MSGSIZE.raw_os_error()), None);
                self.close_connection(client);
                false
            }
        }
    }

    fn call(&mut self, client: ClientId, Frame { bytes, fds }: Frame) {
        let Some(connection) = self.connections.get_mut(&client) else { return };
        connection.calls += 1;
        let caller = Caller { client, door: Door::Control, cookie: connection.calls };
        let outcome = match serde_json::from_slice::<Call>(&bytes) {
            Ok(call) if call.oneway || call.upgrade => {
                CallOutcome::invalid("`oneway` and `upgrade` are not supported: call without")
            }
            Ok(call) => match fds {
                Ok(fds) => self.verb(caller, &call, fds),
                Err(_) => CallOutcome::Error(LOST_DESCRIPTORS.into(), Errno::MFILE.raw_os_error()),
            },
            Err(error) => CallOutcome::invalid(format!("the frame is no varlink call: {error}")),
        };
        if matches!(outcome, CallOutcome::Error(..) | CallOutcome::VarlinkError(..)) {
            self.session.meter().wrong();
        }
        let (reply, fd) = match outcome {
            CallOutcome::Reply(parameters) => (Reply { parameters, ..Reply::default() }, None),
            CallOutcome::ReplyWithFd(parameters, fd) => (Reply { parameters, ..Reply::default() }, Some(fd)),
            CallOutcome::Error(message, errno) => (refused(&message, errno), None),
            CallOutcome::VarlinkError(error, parameter, value) => {
                let error = Some(format!("{VARLINK}.{error}"));
                (Reply { error, parameters: json!({ parameter: value }), ..Reply::default() }, None)
            }
            CallOutcome::LimitReached => {
                self.reply(client, refused(&self.limit_message(), Errno::USERS.raw_os_error()), None);
                return self.close_connection(client);
            }
            CallOutcome::Pending => {
                return self.wait_for(client, ControlState::AwaitingAnswer(caller.cookie));
            }
            CallOutcome::Subscribe(subscribe) => return self.subscribe(client, &subscribe),
        };
        self.reply(client, reply, fd);
    }

    fn wait_for(&mut self, client: ClientId, state: ControlState) {
        if let Some(connection) = self.connections.get_mut(&client) {
            connection.control = state;
        }
    }

    fn verb(&mut self, caller: Caller, call: &Call, fds: Vec<OwnedFd>) -> CallOutcome {
        let name = call.method.strip_prefix(verbs::INTERFACE).and_then(|rest| rest.strip_prefix('.'));
        if !self.may_call(caller.client, name) {
            return CallOutcome::LimitReached;
        }
        if name != Some("AddMemory") && !fds.is_empty() {
            return CallOutcome::invalid(format!(
                "{} file descriptors came along, 0 belong to this call",
                fds.len()
            ));
        }
        if matches!(name, Some("AddMemory" | "OpenChannel" | "Adopt"))
            && let Some(connection) = self.connections.get_mut(&caller.client)
        {
            connection.speaks_for_vm = true;
        }
        let parameters = &call.parameters;
        match name {
            Some("AddMemory") => with_parameters(parameters, |memory| {
                self.session.add_memory(caller, memory, fds);
                CallOutcome::Pending
            }),
            Some("RemoveMemory") => with_parameters(parameters, |verbs::RemoveMemory { region }| {
                if let Some(connection) = self.connections.get_mut(&caller.client) {
                    connection.removal = Some(caller.cookie);
                }
                self.session.handle(Event::RemoveRegion { caller, region: RegionId(region) });
                CallOutcome::Pending
            }),
            Some("OpenChannel") => self.open_channel(caller.client),
            Some("Convert") => with_parameters(parameters, |convert| self.convert(caller, convert)),
            Some("Status") => reply_with(&self.status()),
            Some("Metrics") => reply_with(&verbs::Metrics { text: self.metrics() }),
            Some("Release") => with_parameters(parameters, |release| self.release(caller, release)),
            Some("Subscribe") if call.more => with_parameters(parameters, CallOutcome::Subscribe),
            Some("Subscribe") => {
                CallOutcome::invalid("Subscribe answers more than once: call it with \"more\":true")
            }
            Some("Explain") => with_parameters(parameters, |verbs::Explain { invalidation }| {
                match self.session.receipt(InvalidationId(invalidation)) {
                    Some(receipt) => {
                        CallOutcome::Reply(json!({ "receipt": events::receipt(receipt, &self.session) }))
                    }
                    None => CallOutcome::Error(
                        format!("invalidation {invalidation} is not over yet, or not remembered any more"),
                        Errno::NOENT.raw_os_error(),
                    ),
                }
            }),
            Some("Adopt") => with_parameters(parameters, |verbs::Adopt {}| self.adopt(caller)),
            Some("Dma") => with_parameters(parameters, |dma| self.dma(caller, dma)),
            _ => varlink(call),
        }
    }

    fn open_channel(&mut self, client: ClientId) -> CallOutcome {
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
                CallOutcome::ReplyWithFd(json!({}), theirs)
            }
            (Ok(_), _) => CallOutcome::Error(
                "this connection has a channel already: use that one".into(),
                Errno::BUSY.raw_os_error(),
            ),
            (Err(error), _) => {
                let remedy = "raise the daemon's limit of files (`ulimit -n`, `LimitNOFILE=`)";
                CallOutcome::Error(
                    format!("cannot make a channel: {error}; {remedy}"),
                    Errno::MFILE.raw_os_error(),
                )
            }
        }
    }

    fn convert(&mut self, caller: Caller, convert: verbs::Convert) -> CallOutcome {
        let range = match PageRange::new(convert.gpa, convert.length) {
            Ok(range) => range,
            Err(error) => return CallOutcome::invalid(error),
        };
        if let Err(error) = self.session.may_convert(range) {
            return CallOutcome::Error(error.to_string(), error.errno());
        }
        let deadline_ms = match request::deadline_ms(convert.deadline_ms) {
            Ok(deadline_ms) => deadline_ms,
            Err(error) => return CallOutcome::invalid(error),
        };
        self.session.handle(Event::Begin {
            caller,
            ranges: range.into(),
            to: convert.to,
            performer: Performer::Passgate,
            deadline_ns: u64::from(deadline_ms) * 1_000_000,
        });
        CallOutcome::Pending
    }

    fn dma(&mut self, caller: Caller, dma: verbs::Dma) -> CallOutcome {
        if !self.options.allow_dma {
            return CallOutcome::Error(
                "DMA on demand is off: start the daemon with --allow-dma".into(),
                Errno::PERM.raw_os_error(),
            );
        }
        let device = self.session.devices().iter().find(|device| device.name() == dma.device).cloned();
        let Some(device) = device else {
            return CallOutcome::Error(
                format!("no device {}: Status lists them", dma.device),
                Errno::NODEV.raw_os_error(),
            );
        };
        let bytes = dma.write.as_deref().map(hex::decode);
        let iova = Iova(dma.iova);
        let task: Box<dyn FnOnce() -> passgate_backends::Result<DmaDone> + Send> = match (bytes, dma.read) {
            (Some(Some(bytes)), None) if !bytes.is_empty() && bytes.len() <= MAX_DMA_LEN => {
                Box::new(move || device.dma_write(iova, &bytes).map(|()| DmaDone { read: None }))
            }
            (None, Some(len)) if len > 0 && len as usize <= MAX_DMA_LEN => Box::new(move || {
                let bytes = device.dma_read(iova, len as usize)?;
                Ok(DmaDone { read: Some(hex::encode(&bytes)) })
            }),
            _ => {
                return CallOutcome::invalid(
                    "give either `write` in hexadecimal or `read`, of 1 to 4096 bytes",
                );
            }
        };
        let core = std::sync::Arc::clone(&self.core);
        self.pool.run(Task::Other(Box::new(move || {
            core.deliver(Message::Dma { client: caller.client, cookie: caller.cookie, result: task() });
        })));
        CallOutcome::Pending
    }

    pub(super) fn dma_done(
        &mut self,
        client: ClientId,
        cookie: u64,
        result: Result<DmaDone, passgate_backends::Error>,
    ) {
        let reply = match result {
            Ok(done) => Reply { parameters: json!(done), ..Reply::default() },
            Err(error) => refused(
                &error.to_string(),
                error.errno().map_or(Errno::IO.raw_os_error(), |errno| errno.raw_os_error()),
            ),
        };
        self.reply_later(client, cookie, reply);
    }

    /// Sends the reply to a call that has waited for this answer.
    pub(super) fn answer_control(&mut self, caller: Caller, answer: Answer) {
        let parameters = match answer {
            Answer::RegionAdded { region, mapped } => json!(MemoryAdded { region: region.0, mapped }),
            Answer::Released { bytes } => json!({ "bytes": bytes }),
            Answer::Adopted { regions, unended } => json!(adopted(&regions, &unended)),
            Answer::RegionRemoved { .. } | Answer::Ended { .. } => json!({}),
            Answer::Verdict { invalidation, verdict } => {
                let removal = self.connections.get(&caller.client).and_then(|client| client.removal);
                if removal == Some(caller.cookie) {
                    let (message, errno) = removal_failure(verdict, invalidation);
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

    /// Refuses an `AddMemory` call whose memory was examined and cannot be admitted.
    pub(super) fn refuse(&mut self, caller: Caller, error: &BorderError) {
        self.session.meter().wrong();
        self.reply_later(caller.client, caller.cookie, refused(&error.to_string(), error.errno()));
    }

    fn reply_later(&mut self, client: ClientId, cookie: u64, reply: Reply) {
        let Some(connection) = self.connections.get_mut(&client) else { return };
        if connection.control == ControlState::AwaitingAnswer(cookie) {
            connection.control = ControlState::Idle;
            self.reply(client, reply, None);
            // Calls that came meanwhile may have been read already: epoll does not report those.
            while self.connections.get_mut(&client).is_some_and(Connection::has_call)
                && self.control_ready(client)
            {}
        }
    }

    fn reply(&mut self, client: ClientId, reply: Reply, fd: Option<OwnedFd>) {
        self.send_control(client, connection::frame(&reply), fd);
    }

    /// Sends whole frames. A client that lets too many bytes wait is disconnected.
    pub(super) fn send_control(&mut self, client: ClientId, frames: Vec<u8>, fd: Option<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&client) else { return };
        let before = connection.is_behind();
        connection.send(frames, fd);
        let (behind, over_limit) = (connection.is_behind(), connection.exceeds_unsent_limit());
        let listened = matches!(connection.control, ControlState::Subscribed { .. });
        if behind && !before {
            self.watch_control(client, Interest::Write);
        }
        if over_limit {
            log::warn!("client {} does not read its replies: its connection is closed", client.0);
            if listened {
                self.session.meter().dropped();
            }
            self.close_connection(client);
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

/// Answers a call of `org.varlink.service`, and with an error one of an unknown interface or method.
fn varlink(call: &Call) -> CallOutcome {
    let (interface, method) = call.method.rsplit_once('.').unwrap_or((&call.method, ""));
    match (interface, method) {
        (VARLINK, "GetInfo") => CallOutcome::Reply(json!({
            "vendor": "passgate", "product": "passgate", "version": env!("CARGO_PKG_VERSION"),
            "url": "", "interfaces": [VARLINK, verbs::INTERFACE],
        })),
        (VARLINK, "GetInterfaceDescription") => match call.parameters["interface"].as_str() {
            Some(verbs::INTERFACE) => CallOutcome::Reply(json!({ "description": verbs::DESCRIPTION })),
            Some(other) => CallOutcome::VarlinkError("InterfaceNotFound", "interface", other.to_owned()),
            None => CallOutcome::VarlinkError("InvalidParameter", "parameter", "interface".to_owned()),
        },
        (VARLINK | verbs::INTERFACE, _) => {
            CallOutcome::VarlinkError("MethodNotFound", "method", call.method.clone())
        }
        _ => CallOutcome::VarlinkError("InterfaceNotFound", "interface", interface.to_owned()),
    }
}

/// Returns the message and errno of a removal whose unmap was refused or is unknown. `EBUSY` where no errno is known.
fn removal_failure(verdict: Verdict, invalidation: InvalidationId) -> (String, i32) {
    let errno = match verdict {
        Verdict::Refused { reason, .. } | Verdict::Unknown { reason, .. } if reason.errno != 0 => {
            reason.errno
        }
        _ => Errno::BUSY.raw_os_error(),
    };
    let remedy = "devices may still reach it: Explain says why; it is removed once they cannot, or when this daemon ends";
    (format!("the region could not be removed (invalidation {}); {remedy}", invalidation.0), errno)
}

pub(super) fn refused(message: &str, errno: i32) -> Reply {
    Reply {
        error: Some(format!("{}.Refused", verbs::INTERFACE)),
        parameters: json!({ "message": message, "errno": errno }),
        continues: false,
    }
}

fn parse<T: DeserializeOwned>(parameters: &Value) -> Result<T, CallOutcome> {
    let empty = json!({});
    let parameters = if parameters.is_null() { &empty } else { parameters };
    T::deserialize(parameters).map_err(|error| CallOutcome::invalid(format!("parameters: {error}")))
}

fn with_parameters<T: DeserializeOwned>(
    parameters: &Value,
    then: impl FnOnce(T) -> CallOutcome,
) -> CallOutcome {
    parse(parameters).map_or_else(|outcome| outcome, then)
}

fn reply_with(reply: &impl Serialize) -> CallOutcome {
    serde_json::to_value(reply).map_or_else(CallOutcome::invalid, CallOutcome::Reply)
}
