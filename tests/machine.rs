//! The real `passgate serve`, driven by its client over the socket, with a real IOMMU, real devices and a DMA
//! engine: runs inside the machines that tests/vm boots. docs/guide/rig.md says how.
//!
//! `PASSGATE_RIG` says what the machine has (`iommufd`, or `type1` alone) and `PASSGATE_EDU` the addresses of its
//! engines. Where it is unset no trial is offered. Memory is the oracle, never a log or a return code: the engine
//! cannot tell that its DMA faulted.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the trial
#![allow(unreachable_pub)] // its modules are one program

mod daemon;
#[path = "common/keeper.rs"]
mod keeper;
mod nested;
mod machine {
    pub mod conversion;
    pub mod death;
    pub mod list;
    pub mod owner;
    pub mod partial;
    pub mod programs;
    pub mod recovery;
    pub mod refusals;
    pub mod restart;
    pub mod rig;
    pub mod selftest;
    pub mod strict;
    pub mod together;
    pub mod vhost_blk;
}

use libtest_mimic::{Arguments, Trial};
use machine::rig::Rig;
use machine::{
    conversion, death, list, owner, partial, programs, recovery, refusals, restart, selftest, strict,
    together, vhost_blk,
};

type Run = fn(&Rig);

/// What holds with either interface to the IOMMU.
const EVERY_DOMAIN: &[(&str, Run)] = &[
    ("unasked_a_punch_leaves_the_device_in_the_old_page", conversion::unasked),
    ("asked_first_no_device_sees_an_old_page", conversion::asked_first),
    ("neighbours_keep_their_dma_while_a_page_is_converted", conversion::neighbours_keep_their_dma),
    ("what_is_left_of_a_large_piece_is_mapped_again", conversion::the_rest_of_a_piece_is_mapped_again),
    ("a_conversion_that_did_not_happen_gives_the_page_back", conversion::not_committed),
    ("a_conversion_of_unknown_end_is_quarantined", conversion::unknown),
    ("a_killed_daemon_leaves_its_devices_stopped", death::a_killed_daemon),
    ("without_the_guardian_they_would_go_on", death::without_the_guardian),
    ("a_guardian_that_dies_is_replaced", death::the_guardian_is_replaced),
    ("a_killed_client_loses_its_devices_then_its_memory", death::a_killed_client),
    ("sigterm_frees_memory_and_devices_in_time", death::sigterm),
    ("after_a_session_the_memory_can_be_sealed", death::the_memory_can_be_sealed),
    ("no_device_meets_a_page_that_is_away", together::every_device),
    ("strictly_a_device_with_ats_is_detached_first", strict::a_device_with_ats),
    ("every_device_passes_its_selftest", selftest::every_device),
    ("a_device_that_is_not_free_is_refused_with_the_mend", refusals::not_free),
    ("a_taken_device_is_waited_for_and_its_holder_named", refusals::waited_for),
    ("what_a_user_has_no_right_to_is_named", refusals::without_rights),
    ("every_device_is_listed_with_its_stop_class_and_owner", list::every_device),
    ("a_user_without_rights_is_told_what_it_cannot_know", list::without_rights),
    ("a_restart_goes_on_under_dma", restart::goes_on),
    ("a_restart_that_never_comes_stops_the_devices", restart::let_go),
    ("a_split_loses_dma_and_the_judge_sees_it", partial::split),
    ("a_split_under_a_drained_drive_loses_nothing", partial::drained),
    ("after_any_crash_loop_the_next_start_has_the_devices", recovery::a_crash_loop),
    ("an_unbind_gets_the_device_and_ends_the_daemon", recovery::the_host_wants_a_device_back),
];

/// What type1 alone cannot do.
const TYPE1: &[(&str, Run)] = &[
    ("what_nothing_stops_is_refused_unless_accepted", refusals::unstoppable),
    ("a_device_whose_holder_cannot_be_seen_is_not_reset", refusals::unseen_holder),
];

/// What type1 cannot do at all.
const IOMMUFD: &[(&str, Run)] = &[
    ("a_cut_loses_no_dma_beside_it", partial::cut),
    ("strictly_the_next_daemon_still_detaches_first", strict::a_restart),
    ("a_replace_takes_away_what_it_must", partial::replace),
];

type OnGuest = fn(&str);

/// What needs a guest of a stock VMM: the only trials of a machine that has [`GUESTS_RUN`] set.
const GUESTS: &[(&str, OnGuest)] = &[
    ("a_guests_disk_works_while_its_memory_changes", vhost_blk::works_while_memory_changes),
    ("a_guests_disk_outlives_its_back_end_being_killed", vhost_blk::killed),
    ("a_guests_memory_stays_mapped_while_its_back_end_restarts", vhost_blk::restarted),
    ("a_guests_vmm_that_is_killed_leaves_nothing_behind", vhost_blk::front_end_killed),
];

/// Set where guests run, and nothing else: that machine has one processor (tests/vm/boot says why).
const GUESTS_RUN: &str = "PASSGATE_GUESTS";

/// Why a trial cannot run here, where it cannot.
type Excuse = fn() -> Option<&'static str>;

/// What needs no device.
const ONCE: &[(&str, fn(), Excuse)] = &[
    ("the_demo_shows_no_stale_dma", programs::demo, || None),
    ("a_guest_converts_under_dma", programs::minimal_vmm, programs::no_vmm),
    ("what_kvm_refuses_is_not_converted", programs::kvm_refuses, programs::no_private_memory),
];

fn main() {
    if let Some(path) = std::env::var_os(death::VICTIM) {
        return death::victim(path.as_ref());
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1); // they share the devices
    let mut trials = Vec::new();
    match std::env::var("PASSGATE_RIG") {
        Err(_) => eprintln!(
            "PASSGATE_RIG is unset: this is not one of the machines of tests/vm, no trial is offered"
        ),
        Ok(_) if std::env::var_os(GUESTS_RUN).is_some() => trials = guests(),
        Ok(has) => {
            for iommu in ["iommufd", "type1"] {
                let missing = (iommu == "iommufd" && has == "type1").then_some("this kernel has no iommufd");
                let own = if iommu == "type1" { TYPE1 } else { IOMMUFD };
                trials
                    .extend(EVERY_DOMAIN.iter().chain(own).map(|&(name, run)| on(iommu, name, run, missing)));
                let (name, run) = ("a_guest_converts_under_its_dma", programs::minimal_vmm_with_the_engine);
                trials.push(on(iommu, name, run, missing.or_else(programs::no_vmm)));
                let (name, run) =
                    ("a_page_leaves_a_huge_page_and_comes_back", conversion::a_page_of_a_huge_page as Run);
                trials.push(on(iommu, name, run, missing.or_else(conversion::no_huge_pages)));
                let (name, run) = ("a_borrowed_drive_is_given_back_as_it_was", selftest::borrowed as Run);
                trials.push(on(iommu, name, run, missing.or_else(selftest::no_driver)));
                let (name, run) = ("what_its_owner_cannot_say_outlives_the_daemon", owner::cannot_say as Run);
                trials.push(on(iommu, name, run, missing.or_else(programs::no_private_memory)));
            }
            trials.extend(ONCE.iter().map(|&(name, run, missing)| trial(name.to_owned(), run, missing())));
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn guests() -> Vec<Trial> {
    let missing = vhost_blk::no_guest();
    let stock = "a_stock_back_end_keeps_what_the_guest_wrote".to_owned();
    let mut trials = vec![trial(stock, vhost_blk::stock_back_end, missing)];
    for iommu in ["iommufd", "type1"] {
        let on = |&(name, run): &(_, OnGuest)| trial(format!("{iommu}::{name}"), move || run(iommu), missing);
        trials.extend(GUESTS.iter().map(on));
    }
    let platform = "iommufd::guest_that_demands_platform_access_works_its_disk".to_owned();
    trials.push(trial(platform, || vhost_blk::with_the_platform_feature("iommufd"), missing));
    trials
}

fn on(iommu: &'static str, name: &str, run: Run, missing: Option<&str>) -> Trial {
    trial(format!("{iommu}::{name}"), move || run(&Rig::new(iommu)), missing)
}

/// One that cannot run here is counted as skipped, and says why.
fn trial(name: String, run: impl FnOnce() + Send + 'static, missing: Option<&str>) -> Trial {
    if let Some(reason) = missing {
        eprintln!("{name}: skipped, {reason}");
    }
    let run = move || {
        run();
        Ok(())
    };
    Trial::test(name, run).with_ignored_flag(missing.is_some())
}
