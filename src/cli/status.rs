//! `passgate status`: prints the state of a daemon.

use std::fmt::Write;
use std::process::ExitCode;

use clap::Args;

use super::{ControlSocket, Output};
use crate::client::Status;
use crate::error::Result;
use crate::protocol::verbs::Disk;

/// Prints a daemon's regions, devices, quarantine and limits.
#[derive(Debug, Args)]
pub(super) struct StatusOf {
    #[command(flatten)]
    control: ControlSocket,
    #[command(flatten)]
    output: Output,
}

impl StatusOf {
    pub(super) fn run(self) -> Result<ExitCode> {
        let status = self.control.connect()?.status()?;
        self.output.print(&status, text)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn text(status: &Status) -> String {
    let mut text = format!(
        "passgate {}, {}, instance {}, {} events\n\
         {} of {} mappings in use ({} at worst), {} mapped\n\
         {} conversions open, {} connections\n\
         when DMA does not stop: {}; platform: {}; hitless: {}\n\
         conversions: {} done, {} refused, {} unknown; {} waited for DMA in flight\n\
         {} invalid requests",
        status.version,
        status.iommu,
        status.instance,
        status.sequence,
        status.mappings,
        status.max_mappings,
        status.forecast,
        bytes(status.pinned),
        status.open,
        status.clients,
        status.on_stuck_dma,
        status.platform,
        status.hitless,
        status.totals.done,
        status.totals.refused,
        status.totals.unknown,
        status.totals.late_dma_waited,
        status.totals.wrong,
    );
    for device in &status.devices {
        let fenced = device.fenced.as_ref().map(|step| format!(", FENCED by {step}")).unwrap_or_default();
        let only = if device.stop.len() == 1 { " only, which is not certain" } else { "" };
        let stop = device.stop.join(", ");
        _ = write!(text, "\ndevice {}: can be stopped by {stop}{only}{fenced}", device.device);
        if device.lost {
            text += ", LOST (could not be attached again)";
        }
        if device.ats {
            text += ", caches translations (ATS)";
        }
        if device.tdi {
            text += ", is a TDI (bus-master-off and reset would end it)";
        }
    }
    if let Some(served) = &status.disk {
        _ = write!(
            text,
            "\n{}; {} done, {} failed, {} of them for their memory",
            disk(served),
            served.done,
            served.failed,
            served.refused
        );
    }
    for region in &status.regions {
        let closing = if region.closing { ", closing" } else { "" };
        _ = write!(
            text,
            "\nregion {} at {:#x}+{:#x}: {} shared, {} private, {} hole, {} unknown{closing}",
            region.region,
            region.gpa,
            region.length,
            bytes(region.shared),
            bytes(region.private),
            bytes(region.hole),
            bytes(region.unknown),
        );
    }
    for range in &status.quarantine {
        let gpa = range.gpa.map_or_else(|| "no region now".to_owned(), |gpa| format!("{gpa:#x}"));
        _ = write!(
            text,
            "\nQUARANTINE {gpa}+{:#x}: {} (passgate explain --invalidation {})",
            range.length, range.cause, range.invalidation
        );
    }
    if status.quarantine.iter().map(|range| range.length).sum::<u64>() < status.quarantined {
        _ = write!(text, "\nQUARANTINE … and more: {} in all", bytes(status.quarantined));
    }
    for range in &status.refused {
        let device = range.device.as_ref().map(|device| format!(" by {device}")).unwrap_or_default();
        _ = write!(
            text,
            "\nrefused {} s ago: {:#x}+{:#x}: {}{device}, errno {} (passgate explain --invalidation {})",
            range.seconds_ago, range.gpa, range.length, range.cause, range.errno, range.invalidation
        );
    }
    text
}

/// Returns the state of a virtio disk as text.
pub(super) fn disk(disk: &Disk) -> String {
    let drive = if disk.lost { ", THE DRIVE IS GIVEN UP" } else { "" };
    let front_end = if disk.connected { "a front-end" } else { "no front-end" };
    let Disk { in_flight, held, .. } = disk;
    format!("disk: {front_end}{drive}; requests: {in_flight} in flight, {held} held")
}

/// Returns a number of bytes with the largest unit in which it is exact; all numbers are multiples of a page.
pub(super) fn bytes(bytes: u64) -> String {
    match bytes {
        _ if bytes >= 1 << 30 && bytes.is_multiple_of(1 << 30) => format!("{} GiB", bytes >> 30),
        _ if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        0 => "0".to_owned(),
        _ => format!("{} KiB", bytes >> 10),
    }
}
