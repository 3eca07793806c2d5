//! The state of a gate as text, by which an exhaustive search tells states apart.
//!
//! It is made of the fields' own `Debug` output, so that a field that is added to a device, a region or an invalidation
//! is part of it at once. Left out is what no decision depends on: the evidence of receipts, and the policy, which
//! never changes.

use std::fmt::Write;

use passgate_bindings::units::{Address, LIMIT, Offset};
use passgate_bindings::{Iova, PAGE, PageRange};

use super::Gate;
use super::event::InvalidationId;
use super::ledger::Mapped;

/// Pages of one live range whose mappings' borders are listed one by one.
const LISTED_PAGES: u64 = 64;

impl Gate {
    /// Returns everything that decides how the gate goes on, as text. Two gates with the same policy whose texts differ
    /// only in the names of jobs and invalidations, in the same order, behave alike.
    pub fn canonical(&self) -> String {
        let Self {
            policy: _,
            domains,
            devices,
            files,
            regions,
            layout: _,
            invalidations,
            clearing,
            jobs,
            replacing,
            hanging,
            open_by_client,
            leaving,
            insisting,
            last_region,
            last_invalidation,
            last_of_earlier,
            unended,
            last_job: _,
            store: _,
        } = self;
        let mut text = String::with_capacity(4096);
        for domain in domains {
            let super::DomainEntry { id, able: _, mapped, reserved, frayed } = domain;
            line(&mut text, format_args!("{id:?} {reserved} {frayed:?}"));
            canonical_mappings(mapped, &mut text);
        }
        line(&mut text, format_args!("{devices:?}"));
        for (id, file) in files {
            let super::FileEntry { pages, holds, regions } = file;
            line(&mut text, format_args!("{id:?} {holds:?} {regions:?}"));
            if let Ok(everywhere) = PageRange::<Offset>::new(0, LIMIT) {
                line(&mut text, format_args!("{:?}", pages.runs(everywhere).collect::<Vec<_>>()));
            }
        }
        line(&mut text, format_args!("{regions:?}"));
        for (id, invalidation) in invalidations {
            line(&mut text, format_args!("{id:?} {}", without_evidence(&format!("{invalidation:?}"))));
        }
        line(&mut text, format_args!("{clearing:?} {jobs:?} {replacing:?} {hanging:?}"));
        line(
            &mut text,
            format_args!("{open_by_client:?} {leaving:?} {insisting:?} {last_region} {unended:?}"),
        );
        let counted = [last_invalidation, last_of_earlier].map(|id| InvalidationId(*id));
        line(&mut text, format_args!("{counted:?}"));
        text
    }
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{arguments}");
}

fn canonical_mappings(mapped: &Mapped, text: &mut String) {
    let Ok(everywhere) = PageRange::<Iova>::new(0, LIMIT) else { return };
    for live in mapped.live(everywhere) {
        let borders = (0..live.pages().min(LISTED_PAGES)).filter(|page| {
            let page = PageRange::<Iova>::new(live.start().raw() + page * PAGE, PAGE);
            page.is_ok_and(|page| mapped.starts(page) > 0)
        });
        line(text, format_args!("{live:?} {} {:?}", mapped.starts(live), borders.collect::<Vec<_>>()));
    }
    line(text, format_args!("{:?}", mapped.runs(everywhere).collect::<Vec<_>>()));
}

/// `text` without the steps of receipts.
fn without_evidence(text: &str) -> String {
    const STEPS: &str = "steps: [";
    let mut rest = text;
    let mut kept = String::with_capacity(text.len());
    while let Some(at) = rest.find(STEPS) {
        kept.push_str(&rest[..at]);
        rest = &rest[at + STEPS.len()..];
        let mut depth = 1;
        let end = rest.bytes().position(|byte| {
            depth += i32::from(byte == b'[') - i32::from(byte == b']');
            depth == 0
        });
        rest = end.map_or("", |end| &rest[end + 1..]);
    }
    kept.push_str(rest);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_is_left_out_and_nothing_else() {
        assert_eq!(without_evidence("a { steps: [b { c: [1] }, d], more: 2 }"), "a { , more: 2 }");
        assert_eq!(without_evidence("a { steps: [] } b { steps: [x] }"), "a {  } b {  }");
        assert_eq!(without_evidence("a"), "a");
    }
}
