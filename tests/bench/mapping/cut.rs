//! One page cut out of a large mapping: through the gate, and by the bare call, in turns on one domain.

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
use super::{Arguments, MIB, open};

/// The maximum number of pages that are cut out in each way.
const MAX_ROUNDS: u64 = 1000;

fn median(mut took: Vec<Duration>) -> f64 {
    took.sort_unstable();
    took[took.len() / 2].as_secs_f64() * 1e6
}

/// Compares begin, cut, verdict and end with the cut alone. No page is taken twice, so that each is really cut out of a mapping.
pub(crate) fn cut(arguments: &Arguments, file: &Arc<GuestFile>) {
    let Assignment { domain, devices: _devices, .. } = open(arguments, Tables::Small);
    if !domain.capabilities().cut {
        println!("\ncut: {} cannot", domain.name());
        return;
    }
    let pages = arguments.mib * MIB / PAGE;
    let mut engine = Engine::new(Arc::clone(&domain), Arc::clone(file), Hitless::Prefer);
    engine.add(pages, PageState::Shared);
    let rounds = MAX_ROUNDS.min(pages / 8);
    let (mut gate, mut bare) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // The two pages of a round are near each other and far from those of the last round.
        let page = round * (pages / rounds);
        let step = |to| Step { ranges: vec![PageRange::new((page + 1) * PAGE, PAGE).unwrap()], to };
        let through_gate = |engine: &mut Engine| {
            let before = engine.spent();
            engine.convert(&step(PageState::Private));
            engine.spent() - before
        };
        let raw = PageRange::new((page + 4) * PAGE, PAGE).unwrap();
        let bare_call = || {
            let began = Instant::now();
            let gone = domain.unmap(raw);
            let took = began.elapsed();
            assert_eq!(gone, Unmap::Gone { bytes: PAGE });
            // Mapped again at once, so the gate's ledger is right without knowing of it.
            domain.map(raw, PAGE, file, Offset((page + 4) * PAGE), true).unwrap_or_else(|e| panic!("{e}"));
            took
        };
        if round % 2 == 0 {
            gate.push(through_gate(&mut engine));
            bare.push(bare_call());
        } else {
            bare.push(bare_call());
            gate.push(through_gate(&mut engine));
        }
    }
    let (gate, bare) = (median(gate), median(bare));
    println!(
        "\ncut: 4 KiB out of mappings of up to 64 MiB, {rounds} each, medians: bare {bare:.1} µs, through the gate \
         {gate:.1} µs, {:.2} ×",
        gate / bare
    );
}
