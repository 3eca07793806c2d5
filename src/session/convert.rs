//! passgate's own conversions: the kernel calls by which pages become private, shared or a hole.

use std::sync::Arc;

use passgate_bindings::guest_memfd::{self, Conversion};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Failed, PageRange};
use rustix::io::Errno;

use crate::gate::{Outcome, PageState};

/// Converts pages: in place if the file can, else by a punched hole. A page that becomes shared in a file that does not
/// convert in place is left as it is: it was punched when it became private, and the next access allocates a new one.
pub(super) fn convert(pages: &[(Arc<GuestFile>, PageRange<Offset>, bool)], to: PageState) -> Outcome {
    convert_by(pages, |file, range, in_place| match (to, in_place) {
        (PageState::Shared, true) => guest_memfd::convert(file, range, Conversion::ToShared),
        (PageState::Private, true) => guest_memfd::convert(file, range, Conversion::ToPrivate),
        (PageState::Shared, false) => Ok(()),
        _ => file.punch(range.start().0, range.len()).map_err(|failed| Failed {
            call: failed.call,
            errno: failed.errno,
            partial: 0,
        }),
    })
}

/// Converts pages by `change`, one part after the other, until one fails.
pub(super) fn convert_by(
    pages: &[(Arc<GuestFile>, PageRange<Offset>, bool)],
    mut change: impl FnMut(&GuestFile, PageRange<Offset>, bool) -> Result<(), Failed<u64>>,
) -> Outcome {
    let mut before = 0;
    for (file, range, in_place) in pages {
        match change(file, *range, *in_place) {
            Ok(()) => before += range.len(),
            // EAGAIN: the kernel found a page in use (pinned, or with a raised reference count) before it changed any.
            Err(failed) if failed.errno == Errno::AGAIN && before == 0 => return Outcome::NotCommitted,
            Err(failed) => {
                log::warn!("{failed}");
                // `partial` is the offset in the file at which the kernel stopped; 0 where it reports none.
                let into = failed.partial.saturating_sub(range.start().0).min(range.len());
                return Outcome::Unknown { errno: failed.errno.raw_os_error(), offset: before + into };
            }
        }
    }
    Outcome::Committed
}
