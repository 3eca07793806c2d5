//! The igb NIC does DMA on demand, and can be stopped.

use super::bench::Bench;
use super::traffic::{self, Outcome};

const IGB: &str = "PASSGATE_IGB";

pub fn dma_moves_the_right_bytes(bench: &Bench) -> Outcome {
    traffic::dma_moves_the_right_bytes(&traffic::engine(bench, IGB)?)
}

pub fn unmapped_memory_is_out_of_reach(bench: &Bench) -> Outcome {
    traffic::unmapped_memory_is_out_of_reach(&traffic::engine(bench, IGB)?)
}

pub fn a_fence_under_dma_stops_it_until_the_attach(bench: &Bench) -> Outcome {
    traffic::a_fence_under_dma_stops_it_until_the_attach(&traffic::engine(bench, IGB)?)
}

pub fn every_fence_is_undone_by_an_attach(bench: &Bench) -> Outcome {
    traffic::every_fence_is_undone_by_an_attach(bench, &traffic::engine(bench, IGB)?)
}

pub fn it_can_be_opened_again(bench: &Bench) -> Outcome {
    traffic::it_can_be_opened_again(bench, IGB)
}

pub fn no_dma_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, IGB)?;
    traffic::no_dma_reaches_a_page_after_its_unmap(&*engine.domain, &[engine.device])
}

pub fn a_load_runs_beside_unmaps(bench: &Bench) -> Outcome {
    traffic::a_load_runs_beside_unmaps(&traffic::engine(bench, IGB)?)
}
