//! The tickets of operations that an unmap left in flight.
//!
//! The result of the unmap and the end of the operations come from different threads, in either order. The gate must hear of
//! the result first: before it, it knows of no operations.

use std::collections::{BTreeMap, BTreeSet};

use passgate_backends::Ticket;

use crate::gate::{DomainId, JobId};

/// The tickets of which one of the two is known.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tickets {
    /// The unmaps with operations in flight, by the ticket of these.
    in_flight: BTreeMap<(DomainId, Ticket), JobId>,
    /// Tickets that ended before the result of their unmap arrived.
    early: BTreeSet<(DomainId, Ticket)>,
}

impl Tickets {
    /// Takes the ticket of an unmap whose result has arrived. Returns true if its operations have ended already.
    pub(super) fn returned(&mut self, domain: DomainId, ticket: Ticket, job: JobId) -> bool {
        let ended = self.early.remove(&(domain, ticket));
        if !ended {
            self.in_flight.insert((domain, ticket), job);
        }
        ended
    }

    /// Takes a ticket whose operations have ended. Returns the unmap; none if its result has not arrived yet.
    pub(super) fn ended(&mut self, domain: DomainId, ticket: Ticket) -> Option<JobId> {
        let job = self.in_flight.remove(&(domain, ticket));
        if job.is_none() {
            self.early.insert((domain, ticket));
        }
        job
    }
}
