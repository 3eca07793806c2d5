//! The effect of each call on a simulated domain, with and without an injected fault.

use passgate_backends::iommu::pieces;
use passgate_backends::{Error, Result, Ticket, Unmap};
use passgate_bindings::{Failed, Iova, PAGE, PageRange};
use rustix::io::Errno;

use super::fault::Fault;
use super::port::{Port, StaleUntil};
use super::table::Mapping;
use super::{Shared, State};

impl Shared {
    pub(super) fn map(&self, whole: Mapping, piece: u64, fault: Option<Fault>) -> Result<()> {
        let refuse = |errno, remedy| {
            Err(Error::Map { iova: whole.iova, source: Failed::new("sim map", errno), remedy })
        };
        if let Some(Fault::Errno(errno)) = fault {
            return refuse(errno, "");
        }
        let end = whole.offset.0.checked_add(whole.iova.len());
        let fits = end.is_some_and(|end| end <= whole.memory.size());
        if piece == 0 || !piece.is_multiple_of(PAGE) || piece > self.capabilities.max_mapping_len || !fits {
            return refuse(Errno::INVAL, "");
        }
        if whole.writable && !whole.memory.writable() {
            return refuse(Errno::ACCESS, ": the file is read-only");
        }
        let mut state = self.lock();
        if state.table.overlapping(whole.iova).next().is_some() {
            return refuse(Errno::EXIST, "");
        }
        let count = pieces::count(whole.iova, piece);
        if state.table.len() + count > self.capabilities.max_mappings {
            return refuse(Errno::NOSPC, ": map in larger pieces");
        }
        if let Some(Fault::HalfMapped(errno)) = fault {
            state.table.insert(&whole, piece, count.div_ceil(2) as usize);
            let source = Failed::new("sim map", errno);
            return Err(Error::HalfMapped { iova: whole.iova, source, rollback: errno, remedy: "" });
        }
        state.table.insert(&whole, piece, count as usize);
        Ok(())
    }

    /// Removes ranges, which must be ascending and must not overlap, as [`Shared::unmap`] does.
    pub(super) fn replace(&self, gone: &[PageRange<Iova>], fault: Option<Fault>) -> Unmap {
        let refuse = |errno| Unmap::Failed { errno, bytes: 0 };
        if !self.capabilities.replace {
            return refuse(Errno::NOSYS);
        }
        if !gone.is_sorted_by(|one, next| one.end() <= next.start()) {
            return refuse(Errno::INVAL);
        }
        if let Some(Fault::HalfDone(errno)) = fault {
            self.lock().ports.iter_mut().for_each(|port| port.attached = false);
            return refuse(errno);
        }
        self.unmap(gone, true, fault)
    }

    /// Removes `ranges` from the table; they may cut mappings if `cuts` is set. A cut that exceeds `max_mappings` is
    /// not refused: no kernel that cuts has such a limit.
    pub(super) fn unmap(&self, ranges: &[PageRange<Iova>], cuts: bool, fault: Option<Fault>) -> Unmap {
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some(Fault::Errno(errno)) = fault {
            return Unmap::Failed { errno, bytes: 0 };
        }
        let mut parts = Vec::new();
        for range in ranges {
            match state.table.inside(*range, cuts) {
                Ok(inside) => parts.extend(inside),
                Err(errno) => return Unmap::Failed { errno, bytes: 0 },
            }
        }
        match fault {
            Some(Fault::HalfUnmapped(_)) => parts.truncate(parts.len().div_ceil(2)),
            Some(Fault::Short | Fault::ShortLate) => parts.truncate(parts.len() / 2),
            _ => {}
        }
        let gone: Vec<Mapping> = parts.into_iter().filter_map(|part| state.table.remove(part)).collect();
        let bytes = gone.iter().map(|mapping| mapping.iova.len()).sum();
        match fault {
            Some(Fault::HalfUnmapped(errno)) => {
                Unmap::Failed { errno, bytes: if self.capabilities.counts_partial { bytes } else { 0 } }
            }
            Some(late @ (Fault::Late | Fault::ShortLate | Fault::Stuck))
                if bytes > 0 && state.ports.iter().any(Port::is_active) =>
            {
                let until = if late == Fault::Stuck { StaleUntil::Unstuck } else { StaleUntil::Flush };
                Unmap::InFlight { bytes, ticket: state.leave_in_flight(&gone, until) }
            }
            Some(Fault::Cached) => {
                for port in state.ports.iter_mut().filter(|port| port.attached && port.ats) {
                    port.add_stale(&gone, None, StaleUntil::CacheCleared);
                }
                Unmap::Gone { bytes }
            }
            _ => Unmap::Gone { bytes },
        }
    }
}

impl State {
    /// Leaves operations of every active device in flight over `gone`, under a new ticket.
    fn leave_in_flight(&mut self, gone: &[Mapping], until: StaleUntil) -> Ticket {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.running.push(ticket);
        for port in self.ports.iter_mut().filter(|port| port.is_active()) {
            port.add_stale(gone, Some(ticket), until);
        }
        ticket
    }
}
