//! The virtio NIC and GPU do DMA on demand, and can be stopped.

use super::bench::Bench;
use super::traffic::{self, Outcome};

const NET: &str = "PASSGATE_VIRTIO_NET";
const GPU: &str = "PASSGATE_VIRTIO_GPU";

pub fn net_dma_moves_the_right_bytes(bench: &Bench) -> Outcome {
    traffic::dma_moves_the_right_bytes(&traffic::engine(bench, NET)?)
}

pub fn net_unmapped_memory_is_out_of_reach(bench: &Bench) -> Outcome {
    traffic::unmapped_memory_is_out_of_reach(&traffic::engine(bench, NET)?)
}

pub fn net_a_fence_under_dma_stops_it_until_the_attach(bench: &Bench) -> Outcome {
    traffic::a_fence_under_dma_stops_it_until_the_attach(&traffic::engine(bench, NET)?)
}

pub fn net_every_fence_is_undone_by_an_attach(bench: &Bench) -> Outcome {
    traffic::every_fence_is_undone_by_an_attach(bench, &traffic::engine(bench, NET)?)
}

pub fn net_it_can_be_opened_again(bench: &Bench) -> Outcome {
    traffic::it_can_be_opened_again(bench, NET)
}

pub fn gpu_dma_moves_the_right_bytes(bench: &Bench) -> Outcome {
    traffic::dma_moves_the_right_bytes(&traffic::engine(bench, GPU)?)
}

pub fn gpu_unmapped_memory_is_out_of_reach(bench: &Bench) -> Outcome {
    traffic::unmapped_memory_is_out_of_reach(&traffic::engine(bench, GPU)?)
}

pub fn gpu_a_fence_under_dma_stops_it_until_the_attach(bench: &Bench) -> Outcome {
    traffic::a_fence_under_dma_stops_it_until_the_attach(&traffic::engine(bench, GPU)?)
}

pub fn gpu_every_fence_is_undone_by_an_attach(bench: &Bench) -> Outcome {
    traffic::every_fence_is_undone_by_an_attach(bench, &traffic::engine(bench, GPU)?)
}

pub fn gpu_it_can_be_opened_again(bench: &Bench) -> Outcome {
    traffic::it_can_be_opened_again(bench, GPU)
}

pub fn net_no_dma_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, NET)?;
    traffic::no_dma_reaches_a_page_after_its_unmap(&*engine.domain, &[engine.device])
}

pub fn gpu_no_dma_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, GPU)?;
    traffic::no_dma_reaches_a_page_after_its_unmap(&*engine.domain, &[engine.device])
}

/// All of the machine's NICs and its GPU, at once, in one domain.
pub fn no_device_of_several_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    let names = [&bench.igb, &traffic::named(NET)?, &traffic::named(GPU)?];
    let set = bench.assign(&names)?;
    traffic::no_dma_reaches_a_page_after_its_unmap(&*set.domain, &set.devices)
}

pub fn net_a_load_runs_beside_unmaps(bench: &Bench) -> Outcome {
    traffic::a_load_runs_beside_unmaps(&traffic::engine(bench, NET)?)
}

pub fn gpu_a_load_runs_beside_unmaps(bench: &Bench) -> Outcome {
    traffic::a_load_runs_beside_unmaps(&traffic::engine(bench, GPU)?)
}
