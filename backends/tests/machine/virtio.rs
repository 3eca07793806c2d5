//! DMA on demand and fences of the virtio NIC and GPU.

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

pub fn net_fence_stops_dma_until_attach(bench: &Bench) -> Outcome {
    traffic::fence_stops_dma_until_attach(&traffic::engine(bench, NET)?)
}

pub fn net_every_fence_is_undone_by_an_attach(bench: &Bench) -> Outcome {
    traffic::every_fence_is_undone_by_an_attach(bench, &traffic::engine(bench, NET)?)
}

pub fn net_can_be_opened_again(bench: &Bench) -> Outcome {
    traffic::can_be_opened_again(bench, NET)
}

pub fn gpu_dma_moves_the_right_bytes(bench: &Bench) -> Outcome {
    traffic::dma_moves_the_right_bytes(&traffic::engine(bench, GPU)?)
}

pub fn gpu_unmapped_memory_is_out_of_reach(bench: &Bench) -> Outcome {
    traffic::unmapped_memory_is_out_of_reach(&traffic::engine(bench, GPU)?)
}

pub fn gpu_fence_stops_dma_until_attach(bench: &Bench) -> Outcome {
    traffic::fence_stops_dma_until_attach(&traffic::engine(bench, GPU)?)
}

pub fn gpu_every_fence_is_undone_by_an_attach(bench: &Bench) -> Outcome {
    traffic::every_fence_is_undone_by_an_attach(bench, &traffic::engine(bench, GPU)?)
}

pub fn gpu_can_be_opened_again(bench: &Bench) -> Outcome {
    traffic::can_be_opened_again(bench, GPU)
}

pub fn net_no_dma_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, NET)?;
    traffic::no_dma_reaches_a_page_after_its_unmap(&*engine.domain, &[engine.device])
}

pub fn gpu_no_dma_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, GPU)?;
    traffic::no_dma_reaches_a_page_after_its_unmap(&*engine.domain, &[engine.device])
}

/// All of the machine's NICs and its GPU at the same time, in one domain.
pub fn no_device_of_several_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    let names = [&bench.igb, &traffic::named(NET)?, &traffic::named(GPU)?];
    let set = bench.assign(&names)?;
    traffic::no_dma_reaches_a_page_after_its_unmap(&*set.domain, &set.devices)
}

pub fn net_load_continues_during_unmaps(bench: &Bench) -> Outcome {
    traffic::load_continues_during_unmaps(&traffic::engine(bench, NET)?)
}

pub fn gpu_load_continues_during_unmaps(bench: &Bench) -> Outcome {
    traffic::load_continues_during_unmaps(&traffic::engine(bench, GPU)?)
}
