//! The mappings according to the results of calls, by domain and address, and by file at all addresses.

use std::collections::BTreeMap;
use std::ops::Range;

use passgate_bindings::units::Address;
use passgate_bindings::{Iova, PageRange};

use super::spans::Spans;
use crate::gate::{DomainId, FileId};

/// A file, and a range of it in bytes.
pub(super) type Pages = (FileId, Range<u64>);

/// The difference between the IOVA at which a file is mapped and the offset in the file.
type Shift = i128;

/// The ranges of files that are mapped, about to be mapped, in flight, or not known to be gone.
#[derive(Debug, Default)]
pub(super) struct Mapped(BTreeMap<(DomainId, FileId, Shift), Spans>);

/// Returns pages as text for a message.
pub(super) fn show((file, range): &Pages) -> String {
    format!("{:#x}+{:#x} of file {}:{}", range.start, range.end - range.start, file.device, file.inode)
}

/// Returns a page range in bytes.
pub(super) fn bytes<A: Address>(range: PageRange<A>) -> Range<u64> {
    range.start().raw()..range.end().raw()
}

/// Returns the offsets of a file that is mapped with `shift` at `iova`; none if all of them would be negative.
fn offsets(iova: PageRange<Iova>, shift: Shift) -> Option<Range<u64>> {
    let offset = |at: u64| i128::from(at) - shift;
    let start = u64::try_from(offset(iova.start().0).max(0)).ok()?;
    let end = u64::try_from(offset(iova.end().0)).ok()?;
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

    /// Returns the number of bytes that are mapped at these addresses.
    pub(super) fn bytes_at(&self, domain: DomainId, iova: PageRange<Iova>) -> u64 {
        let here = self.0.iter().filter(|((at, ..), _)| *at == domain);
        let spans = here.filter_map(|((.., shift), spans)| Some(spans.within(offsets(iova, *shift)?)));
        spans.flatten().map(|span| span.end - span.start).sum()
    }

    /// Returns the parts of these pages that are mapped, at any address, with their domains.
    pub(super) fn of_file(&self, pages: &Pages) -> impl Iterator<Item = (DomainId, Range<u64>)> {
        let (file, range) = pages.clone();
        self.0
            .iter()
            .filter(move |((_, other, _), _)| *other == file)
            .flat_map(move |((domain, ..), spans)| spans.within(range.clone()).map(|span| (*domain, span)))
    }

    /// Returns a domain and the IOVAs of a part of `iova` that is mapped in it, if there is any.
    pub(super) fn at(&self, iova: PageRange<Iova>) -> Option<(DomainId, Range<u64>)> {
        self.0.iter().find_map(|((domain, _, shift), spans)| {
            let found = spans.within(offsets(iova, *shift)?).next()?;
            let address = |offset: u64| u64::try_from(i128::from(offset) + shift).unwrap_or(u64::MAX);
            Some((*domain, address(found.start)..address(found.end)))
        })
    }
}
