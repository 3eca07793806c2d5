//! DMA on demand and fences of the igb NIC.

use super::bench::Bench;
use super::traffic::{self, Outcome};

const IGB: &str = "PASSGATE_IGB";

pub fn dma_moves_the_right_bytes(bench: &Bench) -> Outcome {
    traffic::dma_moves_the_right_bytes(&traffic::engine(bench, IGB)?)
}

pub fn unmapped_memory_is_out_of_reach(bench: &Bench) -> Outcome {
    traffic::unmapped_memory_is_out_of_reach(&traffic::engine(bench, IGB)?)
}

pub fn fence_stops_dma_until_attach(bench: &Bench) -> Outcome {
    traffic::fence_stops_dma_until_attach(&traffic::engine(bench, IGB)?)
}

pub fn every_fence_is_undone_by_an_attach(bench: &Bench) -> Outcome {
    traffic::every_fence_is_undone_by_an_attach(bench, &traffic::engine(bench, IGB)?)
}

pub fn can_be_opened_again(bench: &Bench) -> Outcome {
    traffic::can_be_opened_again(bench, IGB)
}

pub fn no_dma_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, IGB)?;
    traffic::no_dma_reaches_a_page_after_its_unmap(&*engine.domain, &[engine.device])
}

pub fn load_continues_during_unmaps(bench: &Bench) -> Outcome {
    traffic::load_continues_during_unmaps(&traffic::engine(bench, IGB)?)
}
