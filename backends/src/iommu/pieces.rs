//! The grid on which [`Domain::map`](super::Domain::map) makes mappings, and mapping a range piece by piece, all or
//! nothing, for the domains that make one kernel call for each piece.

use passgate_bindings::units::Offset;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::Unmap;
use crate::{Error, Result};

/// Returns the parts of `iova` between the multiples of `piece` bytes, ascending. `piece` is a multiple of the page
/// size, or `u64::MAX` for one part.
pub fn grid(iova: PageRange<Iova>, piece: u64) -> impl Iterator<Item = PageRange<Iova>> {
    let mut at = iova.start();
    std::iter::from_fn(move || {
        // The next line of the grid above `at`, which may lie on one itself. It is below 2^62, so adding one never overflows.
        let border = (at.0 + 1).checked_next_multiple_of(piece).map_or(iova.end(), Iova);
        let next = PageRange::between(at, border.min(iova.end()))?;
        at = next.end();
        Some(next)
    })
}

/// Returns the number of parts of [`grid`].
pub fn count(iova: PageRange<Iova>, piece: u64) -> u64 {
    let nth = |address: u64| address.checked_div(piece).unwrap_or(0);
    nth(iova.end().0 - 1) - nth(iova.start().0) + 1
}

/// Maps each part of the [`grid`] of `piece` bytes over `iova` by one call of `map`. If one fails, removes the parts
/// made before by `unmap`, and checks that every byte of them was removed.
pub(super) fn map(
    iova: PageRange<Iova>,
    piece: u64,
    offset: Offset,
    mut map: impl FnMut(PageRange<Iova>, Offset) -> Result<(), Failed>,
    unmap: impl FnOnce(PageRange<Iova>) -> Unmap,
) -> Result<()> {
    for next in grid(iova, piece) {
        let from = Offset(offset.0 + (next.start().0 - iova.start().0));
        if let Err(source) = map(next, from) {
            let remedy = remedy(source.errno);
            let made = PageRange::between(iova.start(), next.start());
            return Err(match made.map_or(Ok(()), |made| check_rolled_back(made, unmap(made))) {
                Ok(()) => Error::Map { iova, source, remedy },
                Err(rollback) => Error::HalfMapped { iova, source, rollback, remedy },
            });
        }
    }
    Ok(())
}

/// Checks that a roll-back removed all of `made`. Returns the errno of one that did not.
fn check_rolled_back(made: PageRange<Iova>, unmapped: Unmap) -> Result<(), Errno> {
    let errno = match unmapped {
        Unmap::Gone { bytes } if bytes == made.len() => return Ok(()),
        // A short one, or one with operations in flight, proves nothing and has no errno.
        Unmap::Gone { .. } | Unmap::InFlight { .. } => Errno::IO,
        Unmap::Failed { errno, .. } => errno,
    };
    Err(errno)
}

/// Returns the remedy for a map that failed with `errno`, to be appended to the error.
fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::NOMEM => {
            "; pinned pages count against RLIMIT_MEMLOCK: raise it (ulimit -l, or LimitMEMLOCK= in the systemd unit)"
        }
        Errno::NOSPC => {
            "; the VFIO container has no free mapping: raise vfio_iommu_type1.dma_entry_limit, or use larger mappings (leave `piece` out; --hitless off)"
        }
        Errno::EXIST => "; something is mapped there already",
        Errno::FAULT => "; the pages cannot be pinned: they are private, or the file has no such page",
        Errno::ACCESS => "; the file was opened read-only: pass it open for writing, or map it read-only",
        Errno::INVAL => "; the range is reserved, beyond what the IOMMU can address, or beyond the file",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use passgate_bindings::PAGE;

    use super::*;
    use crate::Ticket;

    fn range(page: u64, pages: u64) -> PageRange<Iova> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    #[test]
    fn pieces_lie_on_the_grid_except_at_both_ends() {
        let made = RefCell::new(Vec::new());
        let one = |iova, offset: Offset| {
            made.borrow_mut().push((iova, offset.0 / PAGE));
            Ok(())
        };
        map(range(10, 5), 4 * PAGE, Offset(PAGE), one, |_| unreachable!()).unwrap();
        assert_eq!(*made.borrow(), [(range(10, 2), 1), (range(12, 3), 3)]);
        made.borrow_mut().clear();
        map(range(11, 5), 2 * PAGE, Offset(0), one, |_| unreachable!()).unwrap();
        assert_eq!(*made.borrow(), [(range(11, 1), 0), (range(12, 2), 1), (range(14, 2), 3)]);
        made.borrow_mut().clear();
        map(range(10, 5), u64::MAX, Offset(0), one, |_| unreachable!()).unwrap();
        assert_eq!(*made.borrow(), [(range(10, 5), 0)]);
    }

    #[test]
    fn count_equals_number_of_grid_parts() {
        for start in 0..9 {
            for pages in 1..9 {
                for piece in [PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE, u64::MAX] {
                    let iova = range(start, pages);
                    assert_eq!(count(iova, piece), grid(iova, piece).count() as u64, "{iova} by {piece}");
                }
            }
        }
    }

    #[test]
    fn failed_piece_rolls_back_all_before_it() {
        for fails in 0..5 {
            let one = |iova: PageRange<Iova>, _| match iova.start().0 / PAGE {
                page if page == fails => Err(Failed::new("map", Errno::NOMEM)),
                _ => Ok(()),
            };
            let mut back = None;
            let error = map(range(0, 5), PAGE, Offset(0), one, |iova| {
                back = Some(iova);
                Unmap::Gone { bytes: iova.len() }
            })
            .unwrap_err();
            assert!(matches!(error, Error::Map { .. }), "{error}");
            assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}");
            assert_eq!(back, (fails > 0).then(|| range(0, fails)));
        }
    }

    #[test]
    fn incomplete_roll_back_is_half_mapped() {
        for (unmapped, errno) in [
            (Unmap::Gone { bytes: PAGE }, Errno::IO),
            (Unmap::InFlight { bytes: 2 * PAGE, ticket: Ticket(1) }, Errno::IO),
            (Unmap::Failed { errno: Errno::BUSY, bytes: 0 }, Errno::BUSY),
        ] {
            let one = |iova: PageRange<Iova>, _| match iova.start().0 / PAGE {
                2 => Err(Failed::new("map", Errno::NOMEM)),
                _ => Ok(()),
            };
            let error = map(range(0, 4), PAGE, Offset(0), one, |_| unmapped).unwrap_err();
            let Error::HalfMapped { source, rollback, .. } = &error else { panic!("{error}") };
            assert_eq!((source.errno, *rollback), (Errno::NOMEM, errno));
            assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}");
        }
    }
}
