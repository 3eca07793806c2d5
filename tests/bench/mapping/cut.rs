//! One page out of a large mapping: through the gate, and by the bare call, in turns on one domain.

use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate::gate::{Hitless, PageState};
use passgate_backends::assign::Assignment;
use passgate_backends::{Tables, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};

use super::engine::Engine;
use super::trace::Step;
use super::{Asked, MIB, open};

/// Pages that leave each way.
const ROUNDS: u64 = 1000;

fn median(mut took: Vec<Duration>) -> f64 {
    took.sort_unstable();
    took[took.len() / 2].as_secs_f64() * 1e6
}

/// Begin, cut, verdict and end against the cut alone. No page leaves twice, so that each is truly cut out.
pub(crate) fn cut(asked: &Asked, file: &Arc<GuestFile>) {
    let Assignment { domain, devices: _devices, .. } = open(asked, Tables::Small);
    if !domain.capabilities().cut {
        println!("\ncut: {} cannot", domain.name());
        return;
    }
    let pages = asked.mib * MIB / PAGE;
    let mut engine = Engine::new(Arc::clone(&domain), Arc::clone(file), Hitless::Prefer);
    engine.add(pages, PageState::Shared);
    let rounds = ROUNDS.min(pages / 8);
    let (mut gate, mut bare) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // Both ways near each other, far from the last.
        let page = round * (pages / rounds);
        let step = |to| Step { ranges: vec![PageRange::new((page + 1) * PAGE, PAGE).unwrap()], to };
        let ours = |engine: &mut Engine| {
            let before = engine.spent();
            engine.convert(&step(PageState::Private));
            engine.spent() - before
        };
        let raw = PageRange::new((page + 4) * PAGE, PAGE).unwrap();
        let by_hand = || {
            let began = Instant::now();
            let gone = domain.unmap(raw);
            let took = began.elapsed();
            assert_eq!(gone, Unmap::Gone { bytes: PAGE });
            // The gate need not know: it is back before the gate looks.
            domain.map(raw, PAGE, file, Offset((page + 4) * PAGE), true).unwrap_or_else(|e| panic!("{e}"));
            took
        };
        if round % 2 == 0 {
            gate.push(ours(&mut engine));
            bare.push(by_hand());
        } else {
            bare.push(by_hand());
            gate.push(ours(&mut engine));
        }
    }
    let (gate, bare) = (median(gate), median(bare));
    println!(
        "\ncut: 4 KiB out of mappings of up to 64 MiB, {rounds} each, medians: bare {bare:.1} µs, through the gate \
         {gate:.1} µs, {:.2} ×",
        gate / bare
    );
}
