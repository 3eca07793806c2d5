//! What is mapped, as the results of calls say: by domain, and by file whatever the address.

use std::collections::BTreeMap;
use std::ops::Range;

use passgate_bindings::units::Address;
use passgate_bindings::{Iova, PageRange};

use super::spans::Spans;
use crate::gate::{DomainId, FileId};

/// Pages of a file, from one byte to another.
pub(super) type Pages = (FileId, Range<u64>);

/// Where a file shows in a domain: what is added to an offset to come to the IOVA.
type Shift = i128;

/// Everything that is mapped, about to be, in flight, or not known to be gone.
#[derive(Debug, Default)]
pub(super) struct Mapped(BTreeMap<(DomainId, FileId, Shift), Spans>);

pub(super) fn show((file, range): &Pages) -> String {
    format!("{:#x}+{:#x} of file {}:{}", range.start, range.end - range.start, file.device, file.inode)
}

pub(super) fn bytes<A: Address>(range: PageRange<A>) -> Range<u64> {
    range.start().raw()..range.end().raw()
}

/// `iova` as offsets of a file that shows there shifted by `shift`; none where the file ends before.
fn offsets(iova: PageRange<Iova>, shift: Shift) -> Option<Range<u64>> {
    let back = |at: u64| i128::from(at) - shift;
    let start = u64::try_from(back(iova.start().0).max(0)).ok()?;
    let end = u64::try_from(back(iova.end().0)).ok()?;
    (start < end).then_some(start..end)
}

impl Mapped {
    pub(super) fn insert(&mut self, domain: DomainId, iova: PageRange<Iova>, file: FileId, offset: u64) {
        let shift = i128::from(iova.start().0) - i128::from(offset);
        let span = offset..offset.saturating_add(iova.len());
        self.0.entry((domain, file, shift)).or_default().insert(span);
    }

    pub(super) fn remove(&mut self, domain: DomainId, iova: PageRange<Iova>) {
        self.0.retain(|(at, _, shift), spans| {
            if *at == domain
                && let Some(range) = offsets(iova, *shift)
            {
                spans.remove(range);
            }
            !spans.is_empty()
        });
    }

    /// Bytes that are mapped at these addresses.
    pub(super) fn bytes_at(&self, domain: DomainId, iova: PageRange<Iova>) -> u64 {
        let here = self.0.iter().filter(|((at, ..), _)| *at == domain);
        let spans = here.filter_map(|((.., shift), spans)| Some(spans.within(offsets(iova, *shift)?)));
        spans.flatten().map(|span| span.end - span.start).sum()
    }

    /// What of these pages is mapped, wherever it shows.
    pub(super) fn of_file(&self, pages: &Pages) -> impl Iterator<Item = (DomainId, Range<u64>)> {
        let (file, range) = pages.clone();
        self.0
            .iter()
            .filter(move |((_, other, _), _)| *other == file)
            .flat_map(move |((domain, ..), spans)| spans.within(range.clone()).map(|span| (*domain, span)))
    }

    /// The first of what is mapped at these addresses, in any domain.
    pub(super) fn at(&self, iova: PageRange<Iova>) -> Option<(DomainId, Range<u64>)> {
        self.0.iter().find_map(|((domain, _, shift), spans)| {
            let found = spans.within(offsets(iova, *shift)?).next()?;
            let there = |at: u64| u64::try_from(i128::from(at) + shift).unwrap_or(u64::MAX);
            Some((*domain, there(found.start)..there(found.end)))
        })
    }
}
