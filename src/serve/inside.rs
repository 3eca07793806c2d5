//! Access to a VM's loop for the other threads of this process: queries about pages, and control connections.
//!
//! Nothing here blocks, on either side: a query is delivered as a message and answered by a callback on the loop's thread, a
//! connection is one half of a socket pair. Every query is answered exactly once.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use passgate_bindings::{Failed, Iova, PageRange};
use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::connection::ConnectionClass;
use super::event_loop::{Core, Message};
use super::vm::Vm;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::gate::{DmaAccess, Event};
use crate::observe::disk::ReadDisk;
use crate::session::Session;

/// The number of queries that may wait for their answer.
const MAX_PENDING_QUERIES: usize = 4096;

/// A handle of a VM's loop for other threads of this process. Clones share it; it does not keep the loop running.
#[derive(Debug, Clone)]
pub struct Inside {
    core: Arc<Core>,
}

impl Inside {
    pub(super) fn of(core: &Arc<Core>) -> Self {
        Self { core: Arc::clone(core) }
    }

    /// Queries whether a device may access these ranges; `writes` is true if it would write to them. An answer
    /// [`DmaAccess::Later`] is delayed until it is one of the other two; only where 4096 queries are waiting already is `Later`
    /// given. If the loop has ended, or ends before the answer, it is [`DmaAccess::Never`].
    ///
    /// `reply` is called on the loop's thread, or on the caller's if the loop has ended. It must not block and must not call
    /// this function.
    pub fn ask(&self, iova: Vec<PageRange<Iova>>, writes: bool, reply: Box<dyn FnOnce(DmaAccess) + Send>) {
        self.core.deliver(Message::AccessQuery(AccessQuery { iova, writes, reply: Some(reply) }));
    }

    /// Opens a control connection of this process itself. It counts against no limit, and what it removes is never refused: the
    /// gate uses every fence that it takes ([`Event::MustUnmap`]). Returns [`Error::Over`] once the loop has ended. If the loop
    /// ends right after, the first call fails like one to a daemon that is gone.
    pub fn connect(&self) -> Result<Client> {
        let failed = |call| move |errno| Error::Call(Failed::new(call, errno));
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(failed("socketpair"))?;
        rustix::fs::fcntl_setfl(&ours, OFlags::NONBLOCK).map_err(failed("fcntl"))?;
        match self.core.deliver(Message::Connect(ours)) {
            true => Ok(Client::in_process(theirs)),
            false => Err(Error::Over),
        }
    }

    /// Reports the counters of this disk in status and metrics for as long as they exist.
    pub(super) fn report_disk(&self, disk: Weak<dyn ReadDisk>) {
        self.core.deliver(Message::Disk(disk));
    }
}

/// A query about pages. Dropped without an answer, it answers [`DmaAccess::Never`].
pub(super) struct AccessQuery {
    iova: Vec<PageRange<Iova>>,
    writes: bool,
    reply: Option<Box<dyn FnOnce(DmaAccess) + Send>>,
}

impl AccessQuery {
    fn admits(&self, session: &Session) -> DmaAccess {
        let each = self.iova.iter().map(|range| session.admits(*range, self.writes));
        each.max().unwrap_or(DmaAccess::Open)
    }

    fn answer(mut self, admits: DmaAccess) {
        if let Some(reply) = self.reply.take() {
            reply(admits);
        }
    }
}

impl Drop for AccessQuery {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            reply(DmaAccess::Never);
        }
    }
}

impl fmt::Debug for AccessQuery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessQuery")
            .field("iova", &self.iova)
            .field("writes", &self.writes)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// Answers a query, or stores it until it can be answered.
    pub(super) fn answer_query(&mut self, query: AccessQuery) {
        match query.admits(&self.session) {
            DmaAccess::Later if self.access_queries.len() < MAX_PENDING_QUERIES => {
                self.access_queries.push(query)
            }
            admits => query.answer(admits),
        }
    }

    /// Answers the stored queries that can be answered by now.
    pub(super) fn retry_access_queries(&mut self) {
        if self.access_queries.is_empty() {
            return;
        }
        for query in std::mem::take(&mut self.access_queries) {
            self.answer_query(query);
        }
    }

    /// Adds a connection that this process itself has made.
    pub(super) fn add_internal_connection(&mut self, socket: OwnedFd) {
        if let Some(client) = self.add_connection(socket, ConnectionClass::Internal) {
            self.session.handle(Event::MustUnmap { client });
        }
    }
}
