//! The relay: what the guest asks for goes through passgate, in the one right order.
//!
//! To private: begin, and only if granted convert, then end. To shared: the same calls, and devices see the page
//! after the end. Whatever is not granted is not done, and the guest is told; where the daemon is gone every call is
//! an error, and nothing is converted.

use passgate::Error;
use passgate::client::{Answer, Channel, Outcome, PageState};
use passgate_bindings::guest_memfd::Conversion;

use crate::Result;
use crate::guest::{self, REFUSED, Request};
use crate::machine::{Machine, outcome};
use crate::pages::Pages;

/// Between guest and passgate.
pub(crate) struct Relay<'a> {
    machine: &'a Machine,
    pages: &'a Pages,
    channel: Channel,
    /// The page and generation that the guest is about to stamp.
    stamping: Option<(u64, u32)>,
    /// Conversions that took place.
    pub(crate) conversions: u64,
    /// Conversions that did not.
    pub(crate) refused: u64,
    /// Private pages in which the guest found a mark of the device's.
    pub(crate) stale: u64,
}

impl<'a> Relay<'a> {
    /// A relay over a channel of the connection that added the memory.
    pub(crate) fn new(machine: &'a Machine, pages: &'a Pages, channel: Channel) -> Self {
        Self { machine, pages, channel, stamping: None, conversions: 0, refused: 0, stale: 0 }
    }

    /// Does what the guest asks for, if it may be done. The page's new generation, or [`REFUSED`].
    pub(crate) fn ask(&mut self, request: Request) -> Result<u32> {
        let page = request.page;
        let now = self.pages.generation(page);
        if request.to_private == (now % 2 == 1) {
            return Err(
                format!("the guest asks for what page {page} is already: its stamp was overwritten").into()
            );
        }
        if !request.to_private && request.mark != 0 {
            self.stale += 1;
        }
        let to = if request.to_private { PageState::Private } else { PageState::Shared };
        let invalidation = match self.channel.begin(guest::gpa(page)?, to, None) {
            Ok(Answer::Granted { invalidation }) => invalidation,
            // There is nothing to end: passgate has told everybody who listens, and keeps what failed.
            Ok(Answer::Refused(_) | Answer::Unknown(_)) => return Ok(self.refuse()),
            // The request was wrong (the page is in quarantine): nothing has changed.
            Err(Error::Refused { .. }) => return Ok(self.refuse()),
            Err(gone) => return Err(gone.into()),
        };
        let next = now.wrapping_add(1);
        if request.to_private {
            // From here on no device may see the page.
            self.pages.turn(page, next);
        }
        let way = if request.to_private { Conversion::ToPrivate } else { Conversion::ToShared };
        let outcome = outcome(self.machine.convert(page, way));
        self.channel.end(invalidation, outcome)?;
        if outcome != Outcome::Committed {
            self.pages.turn(page, now);
            if outcome != Outcome::NotCommitted {
                self.pages.quarantine(page);
            }
            return Ok(self.refuse());
        }
        self.conversions += 1;
        self.stamping = Some((page, next));
        Ok(next)
    }

    /// Whether the guest has a page to stamp.
    pub(crate) fn is_stamping(&self) -> bool {
        self.stamping.is_some()
    }

    /// The guest has stamped the page that it got.
    pub(crate) fn stamped(&mut self) {
        if let Some((page, generation)) = self.stamping.take() {
            self.pages.turn(page, generation);
        }
    }

    fn refuse(&mut self) -> u32 {
        self.refused += 1;
        REFUSED
    }
}
