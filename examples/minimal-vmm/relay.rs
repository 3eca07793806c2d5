//! The relay: it performs the guest's requests through passgate, in the required order.
//!
//! Begin; if that is granted, convert; then end. After a conversion to shared, devices can access the page after the end. A
//! conversion that is not granted is not performed, and the guest's request is answered with [`REFUSED`]. If the daemon has
//! ended, every call fails and nothing is converted.

use passgate_bindings::guest_memfd::Conversion;
use passgate_client::{Answer, Channel, Error, Outcome, PageState};

use crate::Result;
use crate::guest::{self, REFUSED, Request};
use crate::machine::{Machine, outcome};
use crate::pages::Pages;

/// The relay between the guest and passgate.
pub(crate) struct Relay<'a> {
    machine: &'a Machine,
    pages: &'a Pages,
    channel: Channel,
    /// The page that the guest is to stamp, with its new generation.
    stamping: Option<(u64, u32)>,
    /// The number of conversions made.
    pub(crate) conversions: u64,
    /// The number of conversions not granted or failed.
    pub(crate) refused: u64,
    /// The number of private pages in which the guest found a mark of the device.
    pub(crate) stale: u64,
}

impl<'a> Relay<'a> {
    /// Returns a relay over a channel of the connection that added the memory.
    pub(crate) fn new(machine: &'a Machine, pages: &'a Pages, channel: Channel) -> Self {
        Self { machine, pages, channel, stamping: None, conversions: 0, refused: 0, stale: 0 }
    }

    /// Performs a request of the guest, if it is granted. Returns the page's new generation, or [`REFUSED`].
    pub(crate) fn request(&mut self, request: Request) -> Result<u32> {
        let page = request.page;
        let now = self.pages.generation(page);
        if request.to_private == (now % 2 == 1) {
            return Err(format!(
                "the guest requests the present state of page {page}: its stamp was overwritten"
            )
            .into());
        }
        // The page is private: no device may have written to it.
        if !request.to_private && request.mark != 0 {
            self.stale += 1;
        }
        let to = if request.to_private { PageState::Private } else { PageState::Shared };
        let invalidation = match self.channel.begin(guest::gpa(page)?, to, None) {
            Ok(Answer::Granted { invalidation }) => invalidation,
            // There is no invalidation to end: passgate has reported the failure and quarantined what failed.
            Ok(Answer::Refused(_) | Answer::Unknown(_)) => return Ok(self.refuse()),
            // Nothing has changed: the page is in quarantine, or (an error of this VMM) the request was not valid.
            Ok(Answer::Quarantined { .. }) | Err(Error::Refused { .. }) => return Ok(self.refuse()),
            Err(error) => return Err(error.into()),
        };
        let next = now.wrapping_add(1);
        if request.to_private {
            // No device may access the page from now on.
            self.pages.set_generation(page, next);
        }
        let conversion = if request.to_private { Conversion::ToPrivate } else { Conversion::ToShared };
        let outcome = outcome(self.machine.convert(page, conversion));
        self.channel.end(invalidation, outcome)?;
        if outcome != Outcome::Committed {
            self.pages.set_generation(page, now);
            // After `unknown` passgate has quarantined the page.
            if outcome != Outcome::NotCommitted {
                self.pages.quarantine(page);
            }
            return Ok(self.refuse());
        }
        self.conversions += 1;
        self.stamping = Some((page, next));
        Ok(next)
    }

    /// Returns true while the guest has a page to stamp.
    pub(crate) fn is_stamping(&self) -> bool {
        self.stamping.is_some()
    }

    /// The guest has stamped the page that it got.
    pub(crate) fn stamped(&mut self) {
        if let Some((page, generation)) = self.stamping.take() {
            self.pages.set_generation(page, generation);
        }
    }

    fn refuse(&mut self) -> u32 {
        self.refused += 1;
        REFUSED
    }
}
