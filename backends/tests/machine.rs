//! The backends against a real kernel, IOMMU and DMA engine: run inside the machines that tests/vm boots.
//!
//! `PASSGATE_RIG` says what the machine has (`iommufd`, or `type1` alone) and `PASSGATE_EDU`, `PASSGATE_NVME` and
//! `PASSGATE_IGB` the addresses of its devices. Where it is unset no trial is offered. Each trial is short: the
//! engine takes 100 ms for a transfer. Memory is the oracle, never a log or a return code.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the trial
#![allow(unreachable_pub)] // its modules are one program

mod machine {
    pub mod bench;
    pub mod calls;
    pub mod cut;
    pub mod domains;
    pub mod drive;
    pub mod faults;
    pub mod fences;
    pub mod groups;
    pub mod igb;
    pub mod interrupts;
    pub mod nvme;
    pub mod refusals;
    pub mod replace;
    pub mod traffic;
    pub mod virtio;
}

use libtest_mimic::{Arguments, Failed, Trial};
use machine::bench::Bench;
use machine::{
    calls, cut, domains, drive, faults, fences, groups, igb, interrupts, nvme, refusals, replace, virtio,
};
use passgate_backends::{Kind, Tables};

type Test = fn(&Bench) -> Result<(), Failed>;

/// What holds in every domain that maps for real devices.
const EVERY_DOMAIN: &[(&str, Test)] = &[
    ("dma_moves_the_right_bytes_of_a_memfd", domains::dma_moves_the_right_bytes_of_a_memfd),
    ("dma_moves_the_right_bytes_of_a_guest_memfd", domains::dma_moves_the_right_bytes_of_a_guest_memfd),
    ("dma_moves_the_right_bytes_of_huge_pages", domains::dma_moves_the_right_bytes_of_huge_pages),
    ("unmapped_memory_is_out_of_reach", domains::unmapped_memory_is_out_of_reach),
    ("a_read_only_mapping_takes_no_write", domains::a_read_only_mapping_takes_no_write),
    ("unmap_counts_bytes_and_leaves_holes_alone", domains::unmap_counts_bytes_and_leaves_holes_alone),
    ("an_unmap_that_would_cut_changes_nothing", domains::an_unmap_that_would_cut_changes_nothing),
    (
        "an_unmap_that_fails_half_way_says_what_it_removed",
        domains::an_unmap_that_fails_half_way_says_what_it_removed,
    ),
    ("a_map_that_fails_leaves_nothing", domains::a_map_that_fails_leaves_nothing),
    ("a_map_beyond_the_memlock_limit_says_so", domains::a_map_beyond_the_memlock_limit_says_so),
    ("an_alias_is_a_mapping_of_its_own", domains::an_alias_is_a_mapping_of_its_own),
    ("capabilities_are_probed", domains::capabilities_are_probed),
    ("two_devices_share_one_domain", domains::two_devices_share_one_domain),
    ("a_pinned_page_outlives_its_punch", domains::a_pinned_page_outlives_its_punch),
    ("reset_is_offered_where_the_device_has_it", fences::reset_is_offered_where_the_device_has_it),
    ("each_device_has_the_stop_class_that_it_shows", fences::each_device_has_the_stop_class_that_it_shows),
    (
        "bus_master_off_is_off_and_attach_brings_it_back",
        fences::bus_master_off_is_off_and_attach_brings_it_back,
    ),
    ("a_closed_device_can_be_opened_again", fences::a_closed_device_can_be_opened_again),
    (
        "class_13_interrupts_set_during_resets_leave_a_device_that_works",
        interrupts::class_13_interrupts_set_during_resets_leave_a_device_that_works,
    ),
    ("igb_dma_moves_the_right_bytes", igb::dma_moves_the_right_bytes),
    ("igb_unmapped_memory_is_out_of_reach", igb::unmapped_memory_is_out_of_reach),
    ("igb_a_fence_under_dma_stops_it_until_the_attach", igb::a_fence_under_dma_stops_it_until_the_attach),
    ("igb_every_fence_is_undone_by_an_attach", igb::every_fence_is_undone_by_an_attach),
    ("igb_no_dma_reaches_a_page_after_its_unmap", igb::no_dma_reaches_a_page_after_its_unmap),
    ("igb_a_load_runs_beside_unmaps", igb::a_load_runs_beside_unmaps),
    ("igb_it_can_be_opened_again", igb::it_can_be_opened_again),
    ("nvme_dma_moves_the_right_bytes", nvme::dma_moves_the_right_bytes),
    ("nvme_unmapped_memory_is_out_of_reach", nvme::unmapped_memory_is_out_of_reach),
    ("nvme_every_fence_is_undone_by_an_attach", nvme::every_fence_is_undone_by_an_attach),
    ("nvme_no_dma_reaches_a_page_after_its_unmap", nvme::no_dma_reaches_a_page_after_its_unmap),
    ("nvme_it_can_be_opened_again", nvme::it_can_be_opened_again),
    (
        "nvme_without_scratch_blocks_it_only_says_what_it_is",
        nvme::without_scratch_blocks_it_only_says_what_it_is,
    ),
    (
        "a_command_that_never_completes_fails_the_drain_and_not_the_next_fence",
        nvme::a_command_that_never_completes_fails_the_drain_and_not_the_next_fence,
    ),
    ("nvme_drive_says_what_it_is", drive::it_says_what_it_is),
    (
        "nvme_drive_requests_of_every_shape_move_the_right_bytes",
        drive::requests_of_every_shape_move_the_right_bytes,
    ),
    ("nvme_drive_flushes_zeroes_and_discards", drive::it_flushes_zeroes_and_discards),
    (
        "nvme_drive_completions_come_by_an_interrupt_of_each_queue",
        drive::completions_come_by_an_interrupt_of_each_queue,
    ),
    ("nvme_drive_a_load_survives_every_fence", drive::a_load_survives_every_fence),
    ("nvme_drive_a_reset_in_the_middle_loses_nothing", drive::a_reset_in_the_middle_loses_nothing),
    ("nvme_drive_no_block_reaches_a_page_after_its_unmap", drive::no_block_reaches_a_page_after_its_unmap),
    ("nvme_drive_the_kernel_gets_it_back_when_it_asks", drive::the_kernel_gets_it_back_when_it_asks),
    (
        "nvme_drive_what_was_written_is_there_when_it_is_opened_again",
        drive::what_was_written_is_there_when_it_is_opened_again,
    ),
    ("virtio_net_dma_moves_the_right_bytes", virtio::net_dma_moves_the_right_bytes),
    ("virtio_net_unmapped_memory_is_out_of_reach", virtio::net_unmapped_memory_is_out_of_reach),
    (
        "virtio_net_a_fence_under_dma_stops_it_until_the_attach",
        virtio::net_a_fence_under_dma_stops_it_until_the_attach,
    ),
    ("virtio_net_every_fence_is_undone_by_an_attach", virtio::net_every_fence_is_undone_by_an_attach),
    ("virtio_net_no_dma_reaches_a_page_after_its_unmap", virtio::net_no_dma_reaches_a_page_after_its_unmap),
    ("virtio_net_a_load_runs_beside_unmaps", virtio::net_a_load_runs_beside_unmaps),
    ("virtio_net_it_can_be_opened_again", virtio::net_it_can_be_opened_again),
    ("virtio_gpu_dma_moves_the_right_bytes", virtio::gpu_dma_moves_the_right_bytes),
    ("virtio_gpu_unmapped_memory_is_out_of_reach", virtio::gpu_unmapped_memory_is_out_of_reach),
    (
        "virtio_gpu_a_fence_under_dma_stops_it_until_the_attach",
        virtio::gpu_a_fence_under_dma_stops_it_until_the_attach,
    ),
    ("virtio_gpu_every_fence_is_undone_by_an_attach", virtio::gpu_every_fence_is_undone_by_an_attach),
    ("virtio_gpu_no_dma_reaches_a_page_after_its_unmap", virtio::gpu_no_dma_reaches_a_page_after_its_unmap),
    ("virtio_gpu_a_load_runs_beside_unmaps", virtio::gpu_a_load_runs_beside_unmaps),
    ("virtio_gpu_it_can_be_opened_again", virtio::gpu_it_can_be_opened_again),
    (
        "no_device_of_several_reaches_a_page_after_its_unmap",
        virtio::no_device_of_several_reaches_a_page_after_its_unmap,
    ),
    ("a_busy_device_is_refused", refusals::a_busy_device_is_refused),
    ("an_unbound_device_is_refused", refusals::an_unbound_device_is_refused),
];

const IOMMUFD: &[(&str, Test)] = &[
    ("a_detach_is_offered_for_the_whole_group_only", groups::a_detach_is_offered_for_the_whole_group_only),
    ("detach_stops_dma_and_attach_brings_it_back", fences::detach_stops_dma_and_attach_brings_it_back),
    ("a_window_stays_open_for_the_next_attach", fences::a_window_stays_open_for_the_next_attach),
    ("a_passed_cdev_must_be_the_device_named", refusals::a_passed_cdev_must_be_the_device_named),
    ("addresses_beyond_4_gib_reach_the_engine", domains::addresses_beyond_4_gib_reach_the_engine),
    ("auto_is_iommufd", refusals::auto_is_iommufd),
    ("ranges_and_options_of_an_ioas", calls::ranges_and_options_of_an_ioas),
    ("a_copy_maps_part_of_a_mapping", calls::a_copy_maps_part_of_a_mapping),
    ("cut_leaves_the_neighbours_alone", calls::cut_leaves_the_neighbours_alone),
    ("only_files_change_process", calls::only_files_change_process),
    ("attach_moves_a_device_between_spaces", calls::attach_moves_a_device_between_spaces),
    ("nvme_completions_come_by_interrupt", nvme::completions_come_by_interrupt),
    ("interrupts_features_and_registers", calls::interrupts_features_and_registers),
];

/// A domain with two page tables.
const STANDBY: &[(&str, Test)] = &[
    ("a_detach_is_offered_for_the_whole_group_only", groups::a_detach_is_offered_for_the_whole_group_only),
    ("detach_stops_dma_and_attach_brings_it_back", fences::detach_stops_dma_and_attach_brings_it_back),
    ("a_window_stays_open_for_the_next_attach", fences::a_window_stays_open_for_the_next_attach),
    (
        "a_replace_takes_its_ranges_out_and_leaves_the_rest",
        replace::a_replace_takes_its_ranges_out_and_leaves_the_rest,
    ),
    ("a_detached_device_stays_detached", replace::a_detached_device_stays_detached),
    ("a_device_that_does_not_move_fails_the_replace", replace::a_device_that_does_not_move_fails_the_replace),
];

/// Where mappings are cut in place.
const CUT: &[(&str, Test)] = &[
    ("a_cut_is_not_noticed_by_dma_to_both_neighbours", cut::a_cut_is_not_noticed_by_dma_to_both_neighbours),
    ("a_cut_takes_exactly_its_range", cut::a_cut_takes_exactly_its_range),
];

/// What needs a page of hugetlbfs of this many KiB.
const HUGE: &[(u32, &str, Test)] = &[
    (2048, "a_page_out_of_a_huge_page_and_back", cut::a_page_out_of_a_huge_page_and_back),
    (1 << 20, "a_page_out_of_a_gigantic_page_and_back", cut::a_page_out_of_a_gigantic_page_and_back),
];

const TYPE1: &[(&str, Test)] = &[
    (
        "what_cannot_be_stopped_is_refused_unless_accepted",
        refusals::what_cannot_be_stopped_is_refused_unless_accepted,
    ),
    ("detach_is_unsupported", fences::detach_is_unsupported),
    ("a_full_container_says_so", domains::a_full_container_says_so),
    ("the_container_says_what_it_can_do", calls::the_container_says_what_it_can_do),
];

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1); // they share the devices
    let rig = std::env::var("PASSGATE_RIG").ok();
    let mut trials = Vec::new();
    for (kind, tables, name, own) in [
        (Kind::Iommufd, Tables::Small, "iommufd", IOMMUFD),
        (Kind::Iommufd, Tables::Standby, "standby", STANDBY),
        (Kind::Type1, Tables::default(), "type1", TYPE1),
    ] {
        let Some(has) = &rig else {
            eprintln!("{name}: PASSGATE_RIG is unset: this is not one of the machines of tests/vm");
            continue;
        };
        let missing = kind == Kind::Iommufd && has == "type1";
        if missing {
            eprintln!("{name}: skipped, this kernel has no iommufd");
        }
        let mut offer = |test: &'static str, run: Test, why_not: Option<&str>| {
            if let (Some(why), false) = (why_not, missing) {
                eprintln!("{name}::{test}: skipped, {why}");
            }
            let run = move || run(&Bench::new(kind, tables)?);
            let trial = Trial::test(format!("{name}::{test}"), run);
            trials.push(trial.with_ignored_flag(missing || why_not.is_some()));
        };
        EVERY_DOMAIN.iter().chain(own).for_each(|(test, run)| offer(test, *run, None));
        if tables == Tables::Small {
            let cuts = (kind == Kind::Type1).then_some("type1 cuts no mapping");
            CUT.iter().for_each(|(test, run)| offer(test, *run, cuts));
        }
        let none = faults::no_injection();
        faults::trials(kind).into_iter().for_each(|(test, run)| offer(test, run, none));
        for (kib, test, run) in HUGE {
            let none = format!("this machine has no free page of {kib} KiB");
            offer(test, *run, (!has_huge(*kib)).then_some(&none));
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// Whether a page of hugetlbfs of this size can be had: it is reserved if none is.
fn has_huge(kib: u32) -> bool {
    let dir = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB");
    let count = |of| std::fs::read_to_string(format!("{dir}/{of}")).ok()?.trim().parse::<u64>().ok();
    if count("nr_hugepages") == Some(0) {
        // What comes of it is looked at next.
        let _ = std::fs::write(format!("{dir}/nr_hugepages"), "1");
    }
    count("free_hugepages").is_some_and(|free| free > 0)
}
