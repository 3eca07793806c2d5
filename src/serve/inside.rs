//! What the other threads of this process want of a VM's loop: its answer about a page, and connections of their own.
//!
//! Nothing here waits for the loop, and the loop waits for nobody: a question is handed in and answered by a callback on
//! the loop's thread, a connection is one half of a pair of sockets. A question is always answered, and once.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use passgate_bindings::{Failed, Iova, PageRange};
use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::connection::Place;
use super::event_loop::{Core, Done};
use super::vhost_blk::Counted;
use super::vm::Vm;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::gate::{Admits, Event};
use crate::session::Session;

/// Questions that wait for their answer at most.
const MOST: usize = 4096;

/// The loop of a VM, for other threads of this process. Cloning shares it; it keeps nothing alive.
#[derive(Debug, Clone)]
pub struct Inside {
    core: Arc<Core>,
}

impl Inside {
    pub(super) fn of(core: &Arc<Core>) -> Self {
        Self { core: Arc::clone(core) }
    }

    /// Asks what a device's request over these ranges may come to; `writes` where it would write to them. Where that is
    /// [`Admits::Later`] the answer waits until it is one of the other two, but for the ten-thousands of such
    /// questions, of which the loop remembers 4096 at a time: `Later` is heard by those beyond. Once the loop has ended,
    /// and where it ends before the answer, that is [`Admits::Never`].
    ///
    /// `reply` is called on the loop's thread (or on this one, where the loop has ended): it must not block, and must not
    /// call this.
    pub fn ask(&self, iova: Vec<PageRange<Iova>>, writes: bool, reply: Box<dyn FnOnce(Admits) + Send>) {
        self.core.deliver(Done::Ask(Ask { iova, writes, reply: Some(reply) }));
    }

    /// A control connection of this process's own, at any time. It counts for no limit of connections, and cannot be told
    /// no ([`Event::Insists`]): what it added goes with it, whatever that takes. [`Error::Over`] once the loop has ended;
    /// where it is about to, the first call fails as with any daemon that is gone.
    pub fn connect(&self) -> Result<Client> {
        let failed = |call| move |errno| Error::Call(Failed::new(call, errno));
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(failed("socketpair"))?;
        rustix::fs::fcntl_setfl(&ours, OFlags::NONBLOCK).map_err(failed("fcntl"))?;
        match self.core.deliver(Done::Connect(ours)) {
            true => Ok(Client::from_fd(theirs)),
            false => Err(Error::Over),
        }
    }

    /// Has status and metrics say what this disk's numbers are, as long as somebody keeps them.
    pub(super) fn show(&self, disk: Weak<Counted>) {
        self.core.deliver(Done::Disk(disk));
    }
}

/// A question. Where nobody answers it, its end does: never.
pub(super) struct Ask {
    iova: Vec<PageRange<Iova>>,
    writes: bool,
    reply: Option<Box<dyn FnOnce(Admits) + Send>>,
}

impl Ask {
    fn look(&self, session: &Session) -> Admits {
        let each = self.iova.iter().map(|range| session.admits(*range, self.writes));
        each.max().unwrap_or(Admits::Open)
    }

    fn answer(mut self, admits: Admits) {
        if let Some(reply) = self.reply.take() {
            reply(admits);
        }
    }
}

impl Drop for Ask {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            reply(Admits::Never);
        }
    }
}

impl fmt::Debug for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ask").field("iova", &self.iova).field("writes", &self.writes).finish_non_exhaustive()
    }
}

impl Vm {
    /// Answers a question, or remembers it.
    pub(super) fn asked(&mut self, ask: Ask) {
        match ask.look(&self.session) {
            Admits::Later if self.asks.len() < MOST => self.asks.push(ask),
            admits => ask.answer(admits),
        }
    }

    /// Answers what was remembered, as far as it can be by now.
    pub(super) fn look_again(&mut self) {
        if self.asks.is_empty() {
            return;
        }
        for ask in std::mem::take(&mut self.asks) {
            self.asked(ask);
        }
    }

    /// Takes a connection of this process's own.
    pub(super) fn connected(&mut self, socket: OwnedFd) {
        if let Some(client) = self.welcome(socket, Place::Inside) {
            self.session.handle(Event::Insists { client });
        }
    }
}
