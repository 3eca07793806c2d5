//! A session as other threads of this process reach it: a door that is no socket of its own.

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use passgate_bindings::{Iova, PageRange};

use super::event_loop::{Core, Done};
use super::socket_error;
use crate::client::Client;
use crate::error::Result;
use crate::gate::Admits;

/// A way to a session, for as many threads as there are.
#[derive(Clone)]
pub struct Inside(Arc<Core>);

impl fmt::Debug for Inside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inside").finish_non_exhaustive()
    }
}

impl Inside {
    pub(super) fn of(core: &Arc<Core>) -> Self {
        Self(Arc::clone(core))
    }

    /// A new control connection, like one that comes by the socket: what is added by it goes when it is dropped. Its
    /// calls are answered once the loop runs; after its end they fail.
    pub fn connect(&self) -> Result<Client> {
        let failed = |e| socket_error(Path::new("the session"), e, "");
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        theirs.set_nonblocking(true).map_err(failed)?;
        self.0.deliver(Done::Connected(OwnedFd::from(theirs)));
        Ok(Client::from_fd(ours.into()))
    }

    /// placeholder
    pub fn ask(&self, _pages: Vec<PageRange<Iova>>, _writes: bool, _reply: Box<dyn FnOnce(Admits) + Send>) {}
}
