//! `passgate list`: prints the PCI devices of this host.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use passgate_bindings::vfio::pci::SYSFS;

use super::{Output, note};
use crate::error::Result;
use crate::host::inventory::{ListedDevice, inventory};

/// Lists PCI devices: holders, steps that stop their DMA, refusals.
#[derive(Debug, Args)]
pub(super) struct List {
    #[command(flatten)]
    output: Output,
}

impl List {
    pub(super) fn run(self) -> Result<ExitCode> {
        let iommufd = Path::new("/dev/iommu").exists();
        let devices = inventory(Path::new(SYSFS), Path::new("/proc"), iommufd);
        if devices.is_empty() {
            note(&format!("this host shows no PCI devices ({SYSFS}/bus/pci/devices)"));
        } else if devices.iter().all(|device| device.group.is_none()) {
            note(
                "this host has no IOMMU groups: switch the IOMMU on in the firmware and the kernel \
                 (intel_iommu=on, amd_iommu=on)",
            );
        }
        self.output.print(&devices, |devices| text(devices))?;
        Ok(ExitCode::SUCCESS)
    }
}

const HEADING: &str =
    "ADDRESS       IDS        CLASS                     DRIVER            GROUP  NODE  RESET";

fn text(devices: &[ListedDevice]) -> String {
    let mut text = if devices.is_empty() { String::new() } else { HEADING.to_owned() };
    for device in devices {
        let number = |number: Option<u32>| number.map_or("-".to_owned(), |number| number.to_string());
        let row = format!(
            "\n{:<13} {:<10} {:<25} {:<17} {:>5}  {:>4}  {}",
            device.address,
            device.ids,
            device.class,
            device.driver.as_deref().unwrap_or("-"),
            number(device.group.as_ref().map(|group| group.id)),
            number(device.numa_node),
            device.reset.join(" "),
        );
        text.push_str(row.trim_end());
        for note in notes(device) {
            _ = write!(text, "\n    {note}");
        }
    }
    text
}

/// Returns the lines that follow the row of a device.
fn notes(device: &ListedDevice) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(refused) = &device.refused {
        let bound = device.driver.as_deref().is_some_and(|driver| driver.contains("vfio"));
        notes.push(format!("not taken: {}", if bound { refused } else { shorten(refused, &device.address) }));
    } else {
        let stop = &device.stop;
        notes.push(format!("stopped by {} (type1: {})", stop.iommufd.join(", "), stop.type1.join(", ")));
    }
    if device.unstoppable.is_some() {
        notes.push("nothing stops it for certain: needs serve --allow-unstoppable (see --json)".to_owned());
    }
    if let Some(group) = device.group.as_ref().filter(|group| !group.isolated) {
        notes.push(format!("not alone in its group: {}", group.companions.join(", ")));
    }
    let caches = match (device.ats, device.pri) {
        (Some(true), Some(true)) => Some("caches translations (ATS) and requests pages (PRI)"),
        (Some(true), _) => Some("caches translations (ATS)"),
        (_, Some(true)) => Some("requests pages (PRI)"),
        _ => None,
    };
    notes.extend(caches.map(str::to_owned));
    if device.tdi {
        notes.push("a TDI, locked or running: bus mastering off or a reset ends it".to_owned());
    }
    for process in &device.owner {
        notes.push(format!("process {} has it: {}", process.pid, process.command));
    }
    if !device.owner_known && device.refused.is_none() {
        let why = device.owner_unknown.unwrap_or("a process has a VFIO device that the kernel does not name");
        notes.push(format!("owner unknown: {why}"));
    }
    notes
}

/// Returns a refusal without the address, which its row has, and without the remedy, which `--json` prints.
fn shorten<'a>(refusal: &'a str, address: &str) -> &'a str {
    let text = refusal.strip_prefix(address).unwrap_or(refusal).trim_start_matches([':', ' ']);
    let end = [text.find("; "), text.find(": ")].into_iter().flatten().min().unwrap_or(text.len());
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::holder::Process;
    use crate::host::inventory::{Group, StopSteps};
    use crate::host::visibility::Blind;

    fn device() -> ListedDevice {
        ListedDevice {
            address: "0000:01:00.0".into(),
            class: "NVMe drive",
            class_code: "010802".into(),
            ids: "1b36:0010".into(),
            driver: Some("vfio-pci".into()),
            group: Some(Group {
                id: 7,
                companions: vec!["0000:01:00.1".into()],
                isolated: false,
                default_domain: None,
                noiommu: false,
            }),
            numa_node: None,
            reset: vec!["flr".into()],
            ats: Some(true),
            pri: None,
            tdi: false,
            stop: StopSteps { iommufd: vec!["unmap", "reset"], type1: vec!["unmap"] },
            owner: vec![Process { pid: 57, command: "passgate serve".into() }],
            owner_known: true,
            owner_unknown: None,
            refused: None,
            unstoppable: None,
        }
    }

    #[test]
    fn list_prints_row_per_device_and_line_per_note() {
        let printed = text(&[device()]);
        let lines: Vec<_> = printed.lines().collect();
        assert_eq!(lines[0], HEADING);
        assert_eq!(
            lines[1..],
            [
                "0000:01:00.0  1b36:0010  NVMe drive                vfio-pci              7     -  flr",
                "    stopped by unmap, reset (type1: unmap)",
                "    not alone in its group: 0000:01:00.1",
                "    caches translations (ATS)",
                "    process 57 has it: passgate serve",
            ]
        );
        assert_eq!(text(&[]), "");
    }

    #[test]
    fn invisible_owner_is_listed_as_unknown() {
        let reason = Blind::Namespace.describe();
        let hidden =
            ListedDevice { owner: vec![], owner_known: false, owner_unknown: Some(reason), ..device() };
        assert_eq!(notes(&hidden).pop().unwrap(), format!("owner unknown: {reason}"));
    }

    #[test]
    fn refusal_is_shortened_unless_bound_to_vfio() {
        let whole = "0000:01:00.0 is bound to nvme, not to vfio-pci; bind it: echo vfio-pci > /sys";
        let refused = |driver: &str| {
            let device =
                ListedDevice { driver: Some(driver.into()), refused: Some(whole.into()), ..device() };
            notes(&device).remove(0)
        };
        assert_eq!(refused("nvme"), "not taken: is bound to nvme, not to vfio-pci");
        assert_eq!(refused("vfio-pci"), format!("not taken: {whole}"));
        let shared = "0000:04:00.0: its IOMMU group 4 also holds 0000:04:00.1, which snd has: bind";
        assert_eq!(
            shorten(shared, "0000:04:00.0"),
            "its IOMMU group 4 also holds 0000:04:00.1, which snd has"
        );
    }
}
