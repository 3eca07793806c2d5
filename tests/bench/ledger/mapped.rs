//! The calls that a conversion of one page makes on the ledger of mappings, in a domain of 1 TiB.

use std::hint::black_box;

use passgate::gate::JobId;
use passgate::gate::ledger::{Mapped, Run, RunState};
use passgate_bindings::words;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::baselines::PAGES;
use super::{Rng, median_ns};

const ROUNDS: usize = 200_000;
const BATCH: usize = 200;

fn page(number: u64) -> PageRange<Iova> {
    match PageRange::new(number * PAGE, PAGE) {
        Ok(range) => range,
        Err(error) => unreachable!("{error}"),
    }
}

/// Returns a domain mapped in pieces of 2^`bits` pages, 1 GiB by each call.
fn domain(bits: u32) -> Mapped {
    let mut mapped = Mapped::new(words::private);
    for part in 0..PAGES >> 18 {
        if let Ok(range) = PageRange::<Iova>::new(part << 30, 1 << 30) {
            mapped.insert(Run::filling(range, PAGE << bits, JobId(1)));
            mapped.made(range.start());
        }
    }
    mapped
}

pub(crate) fn measure() {
    println!(
        "\nmappings of 1 TiB: median ns of one call on one random page; 30 000 pages are taken out before"
    );
    println!(
        "{:10} {:>9} {:>7} {:>7} {:>7} {:>7} {:>11} {:>14} {:>12}",
        "pieces", "is_clear", "extent", "starts", "whole", "taken", "take+remove", "insert+made", "objects"
    );
    for (name, bits) in [("4 KiB", 0), ("2 MiB", 9), ("1 GiB", 18)] {
        let (mut mapped, mut rng) = (domain(bits), Rng(5));
        let remove_page = |mapped: &mut Mapped, at: u64| {
            if !mapped.is_clear(page(at)) {
                mapped.take(page(at), RunState::Removing(JobId(2)));
                mapped.remove(page(at).start());
            }
        };
        (0..30_000).for_each(|_| remove_page(&mut mapped, rng.below(PAGES)));
        let mut measure_call = |question: &dyn Fn(&Mapped, PageRange<Iova>)| {
            let measured = median_ns(ROUNDS, BATCH, || {
                question(&mapped, page(rng.below(PAGES)));
                (0, 0)
            });
            measured.0
        };
        let questions = [
            measure_call(&|mapped, range| _ = black_box(mapped.is_clear(range))),
            measure_call(&|mapped, range| _ = black_box(mapped.extent(range))),
            measure_call(&|mapped, range| _ = black_box(mapped.starts(range))),
            measure_call(&|mapped, range| _ = black_box(mapped.whole(range))),
            measure_call(&|mapped, range| _ = black_box(mapped.taken(range))),
        ];
        // Other pages in each batch, removed and mapped again in turns.
        let pages: Vec<u64> = (0..BATCH as u64 * 50).map(|_| rng.below(PAGES / 8) * 8 + 3).collect();
        let (mut takes, mut makes) = (Vec::new(), Vec::new());
        for batch in pages.chunks(BATCH) {
            let mut at = batch.iter();
            let mut next = || at.next().copied().unwrap_or(0);
            takes.push(median_ns(BATCH, BATCH, || {
                remove_page(&mut mapped, next());
                (0, 0)
            }));
            let mut at = batch.iter();
            let mut next = || at.next().copied().unwrap_or(0);
            makes.push(median_ns(BATCH, BATCH, || {
                let range = page(next());
                if mapped.is_clear(range) {
                    mapped.insert(Run::filling(range, PAGE, JobId(3)));
                    mapped.made(range.start());
                }
                (0, 0)
            }));
        }
        let median = |mut times: Vec<(f64, (u64, u64))>| {
            times.sort_by(|one, other| one.0.total_cmp(&other.0));
            times[times.len() / 2].0
        };
        let [clear, extent, starts, whole, taken] = questions;
        println!(
            "{name:10} {clear:>9.0} {extent:>7.0} {starts:>7.0} {whole:>7.0} {taken:>7.0} {:>11.0} {:>14.0} {:>12}",
            median(takes),
            median(makes),
            mapped.mapping_count()
        );
    }
}
