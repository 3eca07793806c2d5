//! The real `passgate serve`, driven by its client over the socket, with a real IOMMU, real devices and a DMA
//! engine: runs inside the machines that tests/vm boots (docs/guide/rig.md).
//!
//! `PASSGATE_RIG` names the IOMMU API of the machine (`iommufd`, which includes type1, or `type1` alone), `PASSGATE_EDU` the
//! addresses of its edu devices, whose DMA engines the trials use. Without `PASSGATE_RIG` no trial is offered. Memory is the
//! oracle, never a log or a return code: the engine does not report that its DMA faulted.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the trial
#![allow(unreachable_pub)] // its modules are one program

mod daemon;
mod nested;
#[path = "common/service_manager.rs"]
mod service_manager;
mod machine {
    pub mod all_devices;
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
    pub mod vhost_blk;
}

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use libtest_mimic::{Arguments, Completion, Trial};
use machine::rig::Rig;
use machine::{
    all_devices, conversion, death, list, owner, partial, programs, recovery, refusals, restart, selftest,
    strict, vhost_blk,
};
use nested::console;

type Run = fn(&Rig);

/// The trials that run with iommufd and with type1.
const BOTH_APIS: &[(&str, Run)] = &[
    ("punch_without_begin_leaves_device_on_old_page", conversion::punch_without_begin),
    ("punch_after_begin_leaves_no_stale_dma", conversion::punch_after_begin),
    ("neighbours_keep_dma_during_conversion", conversion::neighbours_keep_dma),
    ("remainder_of_large_piece_is_remapped", conversion::remainder_is_remapped),
    ("not_committed_conversion_remaps_page", conversion::not_committed),
    ("unknown_outcome_quarantines_page", conversion::unknown_outcome),
    ("killed_daemon_leaves_devices_stopped", death::killed_daemon),
    ("dma_continues_after_kill_without_guardian", death::kill_without_guardian),
    ("killed_guardian_is_replaced", death::guardian_is_replaced),
    ("killed_client_loses_devices_before_memory", death::killed_client),
    ("sigterm_frees_memory_and_devices", death::sigterm),
    ("memory_can_be_sealed_after_session", death::memory_can_be_sealed),
    ("no_device_reaches_converted_page", all_devices::convert_under_dma),
    ("strict_detaches_ats_device_before_unmap", strict::ats_device),
    ("selftest_passes_on_every_device", selftest::every_device),
    ("busy_device_is_refused_with_remedy", refusals::busy_device),
    ("busy_device_is_waited_for_and_holder_named", refusals::wait_for_device),
    ("missing_permission_is_named", refusals::missing_permission),
    ("list_shows_stop_class_and_owner_of_every_device", list::every_device),
    ("unprivileged_list_marks_unknown_owner", list::unprivileged),
    ("restart_keeps_dma_running", restart::dma_continues),
    ("abandoned_restart_stops_devices", restart::abandoned),
    ("split_loses_dma_and_oracle_detects_it", partial::split),
    ("split_with_drained_drive_loses_no_dma", partial::drained),
    ("crash_loop_leaves_devices_usable", recovery::crash_loop),
    ("unbind_request_ends_daemon_and_returns_device", recovery::device_request),
];

/// The trials of what is missing in type1 only.
const TYPE1_ONLY: &[(&str, Run)] = &[
    ("unstoppable_device_is_refused_unless_allowed", refusals::unstoppable),
    ("device_with_unseen_holder_is_not_reset", refusals::unseen_holder),
];

/// The trials of what type1 cannot do.
const IOMMUFD_ONLY: &[(&str, Run)] = &[
    ("cut_loses_no_neighbouring_dma", partial::cut),
    ("strict_detaches_first_after_restart", strict::restart),
    ("replace_unmaps_requested_pages", partial::replace),
];

type RunOnGuest = fn(&str);

/// The trials that need a guest of a stock VMM: the only ones of a machine where [`GUESTS_ENV`] is set.
const GUEST_TRIALS: &[(&str, RunOnGuest)] = &[
    ("guest_disk_works_during_hotplug_and_conversions", vhost_blk::hotplug_and_conversions),
    ("guest_disk_survives_back_end_kill", vhost_blk::back_end_killed),
    ("guest_memory_stays_mapped_across_back_end_restart", vhost_blk::back_end_restarted),
    ("killed_vmm_leaves_no_memory_mapped", vhost_blk::front_end_killed),
];

/// Set in the machine that runs only trials with guests: it has one processor (tests/vm/boot gives the reason).
const GUESTS_ENV: &str = "PASSGATE_GUESTS";

/// Returns the reason why a trial cannot run here, if there is one.
type SkipReason = fn() -> Option<&'static str>;

/// The trials that need no device.
const WITHOUT_DEVICE: &[(&str, fn(), SkipReason)] = &[
    ("demo_shows_no_stale_dma", programs::demo, || None),
    ("guest_converts_under_software_dma", programs::minimal_vmm, programs::no_vmm),
    ("conversion_refused_by_kvm_is_not_committed", programs::kvm_refuses, programs::no_private_memory),
];

fn main() {
    if let Some(path) = std::env::var_os(death::CLIENT_SOCKET_ENV) {
        return death::client_process(path.as_ref());
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1); // the trials share the devices
    let mut trials = Vec::new();
    match std::env::var("PASSGATE_RIG") {
        Err(_) => eprintln!(
            "PASSGATE_RIG is unset: this is not one of the machines of tests/vm, no trial is offered"
        ),
        Ok(_) if std::env::var_os(GUESTS_ENV).is_some() => trials = guests(),
        Ok(rig_api) => {
            for iommu in ["iommufd", "type1"] {
                let missing =
                    (iommu == "iommufd" && rig_api == "type1").then_some("this kernel has no iommufd");
                let specific = if iommu == "type1" { TYPE1_ONLY } else { IOMMUFD_ONLY };
                trials.extend(
                    BOTH_APIS
                        .iter()
                        .chain(specific)
                        .map(|&(name, run)| device_trial(iommu, name, run, missing)),
                );
                let (name, run) = ("guest_converts_under_hardware_dma", programs::minimal_vmm_with_edu);
                trials.push(device_trial(iommu, name, run, missing.or_else(programs::no_vmm)));
                let (name, run) = ("page_leaves_and_rejoins_huge_page", conversion::page_of_huge_page as Run);
                trials.push(device_trial(iommu, name, run, missing.or_else(conversion::no_huge_pages)));
                let (name, run) = ("borrowed_drive_is_returned_unchanged", selftest::borrowed as Run);
                trials.push(device_trial(iommu, name, run, missing.or_else(selftest::no_driver)));
                let (name, run) = ("unknown_outcome_survives_daemon_restart", owner::unknown_outcome as Run);
                trials.push(device_trial(iommu, name, run, missing.or_else(programs::no_private_memory)));
            }
            trials.extend(
                WITHOUT_DEVICE.iter().map(|&(name, run, missing)| trial(name.to_owned(), run, missing())),
            );
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn guests() -> Vec<Trial> {
    let mut trials = vec![
        trial("doubled_interrupt_is_recognised".to_owned(), console::doubled_interrupt_is_recognised, None),
        guest_trial("stock_back_end_preserves_guest_writes".to_owned(), vhost_blk::stock_back_end),
    ];
    for iommu in ["iommufd", "type1"] {
        let on_iommu =
            |&(name, run): &(_, RunOnGuest)| guest_trial(format!("{iommu}::{name}"), move || run(iommu));
        trials.extend(GUEST_TRIALS.iter().map(on_iommu));
    }
    let platform = "iommufd::guest_requiring_platform_access_uses_disk".to_owned();
    trials.push(guest_trial(platform, || vhost_blk::with_platform_access("iommufd")));
    trials
}

/// Returns a trial with a guest. One that failed with a guest whose interrupt the emulator delivered twice counts as skipped, once in a
/// run.
fn guest_trial(name: String, run: impl FnOnce() + Send + 'static) -> Trial {
    let missing = vhost_blk::no_guest();
    let skipped = name.clone();
    let run = move || match catch_unwind(AssertUnwindSafe(|| console::forget_then(run))) {
        Ok(()) => Ok(Completion::Completed),
        Err(_) if console::take_doubled_interrupt() => {
            eprintln!("\n{skipped}: skipped, {}", console::DOUBLED_INTERRUPT);
            Ok(Completion::ignored_with(console::DOUBLED_INTERRUPT))
        }
        Err(panic) => resume_unwind(panic),
    };
    print_missing(&name, missing);
    Trial::ignorable_test(name, run).with_ignored_flag(missing.is_some())
}

fn device_trial(iommu: &'static str, name: &str, run: Run, missing: Option<&str>) -> Trial {
    trial(format!("{iommu}::{name}"), move || run(&Rig::new(iommu)), missing)
}

/// Returns a trial. If it cannot run here, its reason is printed and it counts as skipped.
fn trial(name: String, run: impl FnOnce() + Send + 'static, missing: Option<&str>) -> Trial {
    print_missing(&name, missing);
    let run = move || {
        run();
        Ok(())
    };
    Trial::test(name, run).with_ignored_flag(missing.is_some())
}

fn print_missing(name: &str, missing: Option<&str>) {
    if let Some(reason) = missing {
        eprintln!("{name}: skipped, {reason}");
    }
}
