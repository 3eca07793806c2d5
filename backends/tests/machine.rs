//! The backends with a real kernel, IOMMU and DMA engine: run inside the machines that tests/vm boots.
//!
//! `PASSGATE_RIG` is the kind of kernel (`iommufd`, or `type1` for one without iommufd); `PASSGATE_EDU`,
//! `PASSGATE_NVME`, `PASSGATE_IGB`, `PASSGATE_VIRTIO_NET` and `PASSGATE_VIRTIO_GPU` are the addresses of the devices.
//! Without `PASSGATE_RIG` there are no trials. Each trial is short, because the edu engine takes 100 ms for a transfer.
//! The content of memory is the oracle, never a log or a return code.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the trial
#![allow(unreachable_pub)] // the modules are one program

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

/// The trials for every domain of real devices.
const EVERY_DOMAIN: &[(&str, Test)] = &[
    ("dma_moves_the_right_bytes_of_a_memfd", domains::dma_moves_the_right_bytes_of_a_memfd),
    ("dma_moves_the_right_bytes_of_a_guest_memfd", domains::dma_moves_the_right_bytes_of_a_guest_memfd),
    ("dma_moves_the_right_bytes_of_huge_pages", domains::dma_moves_the_right_bytes_of_huge_pages),
    ("unmapped_memory_is_out_of_reach", domains::unmapped_memory_is_out_of_reach),
    ("read_only_mapping_takes_no_write", domains::read_only_mapping_takes_no_write),
    ("unmap_counts_bytes_and_leaves_holes_alone", domains::unmap_counts_bytes_and_leaves_holes_alone),
    ("unmap_that_would_cut_changes_nothing", domains::unmap_that_would_cut_changes_nothing),
    ("partial_unmap_reports_the_bytes_removed", domains::partial_unmap_reports_the_bytes_removed),
    ("failed_map_leaves_nothing", domains::failed_map_leaves_nothing),
    ("map_beyond_the_memlock_limit_is_reported", domains::map_beyond_the_memlock_limit_is_reported),
    ("alias_is_a_mapping_of_its_own", domains::alias_is_a_mapping_of_its_own),
    ("capabilities_are_probed", domains::capabilities_are_probed),
    ("two_devices_share_one_domain", domains::two_devices_share_one_domain),
    ("pinned_page_outlives_its_punch", domains::pinned_page_outlives_its_punch),
    ("reset_is_offered_where_the_device_has_it", fences::reset_is_offered_where_the_device_has_it),
    ("each_device_has_its_expected_stop_class", fences::each_device_has_its_expected_stop_class),
    (
        "bus_master_off_takes_effect_and_attach_reverts_it",
        fences::bus_master_off_takes_effect_and_attach_reverts_it,
    ),
    ("closed_device_can_be_opened_again", fences::closed_device_can_be_opened_again),
    (
        "class_13_interrupts_set_during_resets_leave_a_device_that_works",
        interrupts::class_13_interrupts_set_during_resets_leave_a_device_that_works,
    ),
    ("igb_dma_moves_the_right_bytes", igb::dma_moves_the_right_bytes),
    ("igb_unmapped_memory_is_out_of_reach", igb::unmapped_memory_is_out_of_reach),
    ("igb_fence_stops_dma_until_attach", igb::fence_stops_dma_until_attach),
    ("igb_every_fence_is_undone_by_an_attach", igb::every_fence_is_undone_by_an_attach),
    ("igb_no_dma_reaches_a_page_after_its_unmap", igb::no_dma_reaches_a_page_after_its_unmap),
    ("igb_load_continues_during_unmaps", igb::load_continues_during_unmaps),
    ("igb_can_be_opened_again", igb::can_be_opened_again),
    ("nvme_dma_moves_the_right_bytes", nvme::dma_moves_the_right_bytes),
    ("nvme_unmapped_memory_is_out_of_reach", nvme::unmapped_memory_is_out_of_reach),
    ("nvme_every_fence_is_undone_by_an_attach", nvme::every_fence_is_undone_by_an_attach),
    ("nvme_no_dma_reaches_a_page_after_its_unmap", nvme::no_dma_reaches_a_page_after_its_unmap),
    ("nvme_can_be_opened_again", nvme::can_be_opened_again),
    ("nvme_without_scratch_blocks_refuses_dma_on_demand", nvme::without_scratch_blocks_refuses_dma_on_demand),
    (
        "command_that_never_completes_fails_the_drain_but_not_the_reset",
        nvme::command_that_never_completes_fails_the_drain_but_not_the_reset,
    ),
    ("nvme_drive_reports_its_geometry", drive::reports_its_geometry),
    (
        "nvme_drive_requests_of_every_shape_move_the_right_bytes",
        drive::requests_of_every_shape_move_the_right_bytes,
    ),
    ("nvme_drive_flushes_zeroes_and_discards", drive::flushes_zeroes_and_discards),
    (
        "nvme_drive_each_queue_completes_by_its_own_interrupt",
        drive::each_queue_completes_by_its_own_interrupt,
    ),
    ("nvme_drive_load_survives_every_fence", drive::load_survives_every_fence),
    ("nvme_drive_reset_under_load_loses_no_request", drive::reset_under_load_loses_no_request),
    ("nvme_drive_no_block_reaches_a_page_after_its_unmap", drive::no_block_reaches_a_page_after_its_unmap),
    (
        "nvme_drive_unbind_is_signalled_and_ends_when_the_drive_is_closed",
        drive::unbind_is_signalled_and_ends_when_the_drive_is_closed,
    ),
    ("nvme_drive_written_blocks_persist_after_reopening", drive::written_blocks_persist_after_reopening),
    ("virtio_net_dma_moves_the_right_bytes", virtio::net_dma_moves_the_right_bytes),
    ("virtio_net_unmapped_memory_is_out_of_reach", virtio::net_unmapped_memory_is_out_of_reach),
    ("virtio_net_fence_stops_dma_until_attach", virtio::net_fence_stops_dma_until_attach),
    ("virtio_net_every_fence_is_undone_by_an_attach", virtio::net_every_fence_is_undone_by_an_attach),
    ("virtio_net_no_dma_reaches_a_page_after_its_unmap", virtio::net_no_dma_reaches_a_page_after_its_unmap),
    ("virtio_net_load_continues_during_unmaps", virtio::net_load_continues_during_unmaps),
    ("virtio_net_can_be_opened_again", virtio::net_can_be_opened_again),
    ("virtio_gpu_dma_moves_the_right_bytes", virtio::gpu_dma_moves_the_right_bytes),
    ("virtio_gpu_unmapped_memory_is_out_of_reach", virtio::gpu_unmapped_memory_is_out_of_reach),
    ("virtio_gpu_fence_stops_dma_until_attach", virtio::gpu_fence_stops_dma_until_attach),
    ("virtio_gpu_every_fence_is_undone_by_an_attach", virtio::gpu_every_fence_is_undone_by_an_attach),
    ("virtio_gpu_no_dma_reaches_a_page_after_its_unmap", virtio::gpu_no_dma_reaches_a_page_after_its_unmap),
    ("virtio_gpu_load_continues_during_unmaps", virtio::gpu_load_continues_during_unmaps),
    ("virtio_gpu_can_be_opened_again", virtio::gpu_can_be_opened_again),
    (
        "no_device_of_several_reaches_a_page_after_its_unmap",
        virtio::no_device_of_several_reaches_a_page_after_its_unmap,
    ),
    ("busy_device_is_refused", refusals::busy_device_is_refused),
    ("unbound_device_is_refused", refusals::unbound_device_is_refused),
];

/// The trials for an iommufd domain with one IOAS.
const IOMMUFD: &[(&str, Test)] = &[
    ("detach_is_offered_for_the_whole_group_only", groups::detach_is_offered_for_the_whole_group_only),
    ("detach_stops_dma_and_attach_resumes_it", fences::detach_stops_dma_and_attach_resumes_it),
    ("mapping_by_address_survives_detach_and_attach", fences::mapping_by_address_survives_detach_and_attach),
    ("passed_cdev_must_be_of_the_named_device", refusals::passed_cdev_must_be_of_the_named_device),
    ("addresses_beyond_4_gib_reach_the_engine", domains::addresses_beyond_4_gib_reach_the_engine),
    ("auto_is_iommufd", refusals::auto_is_iommufd),
    ("ranges_and_options_of_an_ioas", calls::ranges_and_options_of_an_ioas),
    ("copy_maps_a_part_of_a_mapping", calls::copy_maps_a_part_of_a_mapping),
    ("cut_preserves_adjacent_pages", calls::cut_preserves_adjacent_pages),
    ("change_process_works_for_file_mappings_only", calls::change_process_works_for_file_mappings_only),
    ("attach_moves_a_device_between_spaces", calls::attach_moves_a_device_between_spaces),
    ("nvme_completions_come_by_interrupt", nvme::completions_come_by_interrupt),
    ("interrupts_features_and_registers", calls::interrupts_features_and_registers),
];

/// The trials for an iommufd domain with two page tables.
const STANDBY: &[(&str, Test)] = &[
    ("detach_is_offered_for_the_whole_group_only", groups::detach_is_offered_for_the_whole_group_only),
    ("detach_stops_dma_and_attach_resumes_it", fences::detach_stops_dma_and_attach_resumes_it),
    ("mapping_by_address_survives_detach_and_attach", fences::mapping_by_address_survives_detach_and_attach),
    (
        "replace_removes_its_ranges_and_preserves_the_rest",
        replace::replace_removes_its_ranges_and_preserves_the_rest,
    ),
    ("detached_device_stays_detached_after_replace", replace::detached_device_stays_detached_after_replace),
    ("device_that_cannot_move_fails_the_replace", replace::device_that_cannot_move_fails_the_replace),
];

/// The trials for domains that cut mappings in place.
const CUT: &[(&str, Test)] = &[
    ("cut_does_not_disturb_dma_to_adjacent_pages", cut::cut_does_not_disturb_dma_to_adjacent_pages),
    ("cut_removes_exactly_its_range", cut::cut_removes_exactly_its_range),
];

/// The trials that need a page of hugetlbfs, with its size in KiB.
const HUGE: &[(u32, &str, Test)] = &[
    (
        2048,
        "page_is_split_out_of_a_huge_page_and_restored",
        cut::page_is_split_out_of_a_huge_page_and_restored,
    ),
    (
        1 << 20,
        "page_is_split_out_of_a_gigantic_page_and_restored",
        cut::page_is_split_out_of_a_gigantic_page_and_restored,
    ),
];

/// The trials for a type1 domain.
const TYPE1: &[(&str, Test)] = &[
    (
        "unstoppable_device_is_refused_unless_accepted",
        refusals::unstoppable_device_is_refused_unless_accepted,
    ),
    ("detach_is_unsupported_on_type1", fences::detach_is_unsupported_on_type1),
    ("full_container_is_reported", domains::full_container_is_reported),
    ("container_reports_its_capabilities", calls::container_reports_its_capabilities),
];

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1); // the trials share the devices
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

/// Returns true if a page of hugetlbfs of this size is free, after reserving one if none is reserved.
fn has_huge(kib: u32) -> bool {
    let dir = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB");
    let count = |of| std::fs::read_to_string(format!("{dir}/{of}")).ok()?.trim().parse::<u64>().ok();
    if count("nr_hugepages") == Some(0) {
        // The result is checked below.
        let _ = std::fs::write(format!("{dir}/nr_hugepages"), "1");
    }
    count("free_hugepages").is_some_and(|free| free > 0)
}
