//! Which processes have a VFIO device or its group open, as `/proc/PID/fd` shows it.
//!
//! A cdev or a group is known by its device number, whatever path it was opened by. The file of a device that came
//! from a group has no number; newer kernels name its device in `/proc/PID/fdinfo`, with others one only knows that
//! a process has some VFIO device. No file is opened: names are read, and only what is called vfio is looked at.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use passgate_bindings::vfio::PciAddress;
use passgate_bindings::vfio::pci::PciDevice;
use serde::Serialize;

use super::sight::{Blind, OpenFile, each_open_file, has_ended};

/// Longest command line that is kept, in characters.
const COMMAND: usize = 120;
/// Processes that are kept for one device.
const MANY: usize = 64;

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its command line, shortened; its name in brackets where it has none.
    pub command: String,
}

/// Who has a device, as far as this user may see.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Owner {
    /// The processes that have its cdev, its group, or the device by its group.
    pub processes: Vec<Process>,
    /// Processes that have some VFIO device, which the kernel does not name.
    pub perhaps: Vec<Process>,
    /// Why some process, or its files, could not be seen.
    pub unseen: Option<Blind>,
}

/// Everything open that is VFIO's, at one moment.
#[derive(Debug, Default)]
pub struct Holders {
    numbers: BTreeMap<(u32, u32), Vec<Process>>,
    devices: BTreeMap<PciAddress, Vec<Process>>,
    nameless: Vec<Process>,
    unseen: Option<Blind>,
}

impl Holders {
    /// Looks at every process in `proc`, which is `/proc` but in tests.
    pub fn scan(proc: &Path) -> Self {
        let mut found = Self::default();
        let blind = each_open_file(proc, |file| found.look_at(file));
        found.unseen = blind.or(found.unseen);
        found
    }

    fn look_at(&mut self, file: &OpenFile<'_>) {
        if !file.target.contains("vfio") {
            return;
        }
        let process = || Process { pid: file.pid, command: command(file.dir) };
        if file.target == "anon_inode:[vfio-device]" {
            let info = file.link.file_name().map(|fd| file.dir.join("fdinfo").join(fd));
            match info.and_then(|info| named(&info)) {
                Some(address) => keep(self.devices.entry(address).or_default(), process),
                None => keep(&mut self.nameless, process),
            }
        } else {
            match fs::metadata(&file.link) {
                Ok(meta) if meta.file_type().is_char_device() => {
                    let number = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
                    keep(self.numbers.entry(number).or_default(), process);
                }
                Ok(_) => {}
                Err(error) if has_ended(&error) => {}
                Err(_) => self.unseen = self.unseen.or(Some(Blind::Denied)),
            }
        }
    }

    /// Who has `device`, found in `sysfs`.
    pub fn of(&self, sysfs: &Path, device: &PciDevice) -> Owner {
        let mut processes = Vec::new();
        let cdev = device.cdev().map(|cdev| cdev.number);
        let group = device.group().and_then(|group| group_number(sysfs, group.id));
        let numbers = [cdev, group].into_iter().flatten();
        let lists = numbers.filter_map(|number| self.numbers.get(&number));
        for process in lists.chain(self.devices.get(&device.address())).flatten() {
            keep_one(&mut processes, process);
        }
        Owner { processes, perhaps: self.nameless.clone(), unseen: self.unseen }
    }

    /// Who has `device` or another of its group, which keeps it from us as well.
    pub fn of_group(&self, sysfs: &Path, device: &PciDevice) -> Owner {
        let mut owner = self.of(sysfs, device);
        for other in device.group().into_iter().flat_map(|group| group.members) {
            let Some(other) = PciDevice::find(sysfs, other) else { continue };
            for process in &self.of(sysfs, &other).processes {
                keep_one(&mut owner.processes, process);
            }
        }
        owner
    }
}

fn keep_one(list: &mut Vec<Process>, process: &Process) {
    if list.len() < MANY && !list.contains(process) {
        list.push(process.clone());
    }
}

/// Adds the process once, however many files it has.
fn keep(list: &mut Vec<Process>, process: impl FnOnce() -> Process) {
    let process = process();
    keep_one(list, &process);
}

/// The device number of a group's file.
fn group_number(sysfs: &Path, id: u32) -> Option<(u32, u32)> {
    let text = fs::read_to_string(sysfs.join(format!("class/vfio/{id}/dev"))).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The device that a VFIO device file is, where the kernel says so (`vfio-device-syspath`).
fn named(fdinfo: &Path) -> Option<PciAddress> {
    let text = fs::read_to_string(fdinfo).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
    path.trim().rsplit('/').next()?.parse().ok()
}

pub(crate) fn command(dir: &Path) -> String {
    let bytes = fs::read(dir.join("cmdline")).unwrap_or_default();
    let mut words: Vec<_> = bytes.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    while words.last().is_some_and(|word| word.is_empty()) {
        words.pop();
    }
    let line = match words.is_empty() {
        true => format!("[{}]", fs::read_to_string(dir.join("comm")).unwrap_or_default().trim()),
        false => words.join(" "),
    };
    let clean = |c: char| if c.is_control() { '?' } else { c };
    let mut kept: String = line.chars().take(COMMAND).map(clean).collect();
    if line.chars().nth(COMMAND).is_some() {
        kept.push('…');
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::host::inventory::fake::Tree;

    fn pids(processes: &[Process]) -> Vec<u32> {
        processes.iter().map(|process| process.pid).collect()
    }

    /// `/dev/null` is 1:3 and `/dev/zero` 1:5 everywhere: they stand for a cdev and a group.
    #[test]
    fn who_has_a_device_is_found_by_its_number_its_group_and_its_name() {
        let tree = Tree::new();
        tree.device("0000:04:00.0", 0x010802, Some("vfio-pci"), Some(7));
        tree.device("0000:04:00.1", 0x010802, Some("vfio-pci"), Some(7));
        tree.write("bus/pci/devices/0000:04:00.0/vfio-dev/vfio0/dev", "1:3\n");
        tree.write("class/vfio/7/dev", "1:5\n");
        for (pid, fd, target) in [
            (10, 3, "vfio/devices/vfio0"),
            (10, 4, "vfio/devices/vfio0"),
            (11, 5, "vfio/7"),
            (12, 6, "unrelated"),
        ] {
            let name = tree.path().join(target);
            fs::create_dir_all(name.parent().unwrap()).unwrap();
            let _ = symlink(if target == "vfio/7" { "/dev/zero" } else { "/dev/null" }, &name);
            tree.link(&format!("proc/{pid}/fd/{fd}"), name.to_str().unwrap());
        }
        for pid in [13, 14] {
            tree.link(&format!("proc/{pid}/fd/9"), "anon_inode:[vfio-device]");
        }
        tree.write(
            "proc/13/fdinfo/9",
            "pos:\t0\nvfio-device-syspath:\t/sys/devices/pci0000:00/0000:04:00.1\n",
        );
        tree.write("proc/14/fdinfo/9", "pos:\t0\n");
        tree.write("proc/10/cmdline", "passgate\0serve\0--device\x1b\0");
        tree.write("proc/11/comm", "vhost\n");
        tree.write("proc/11/cmdline", "");
        tree.write("proc/sys/kernel", "no process");

        let holders = Holders::scan(&tree.path().join("proc"));
        let find = |address: &str| PciDevice::find(tree.path(), address.parse().unwrap()).unwrap();
        let first = holders.of(tree.path(), &find("04:00.0"));
        assert_eq!(pids(&first.processes), [10, 11], "once each");
        assert_eq!(first.processes[0].command, "passgate serve --device?");
        assert_eq!(first.processes[1].command, "[vhost]");
        assert_eq!((pids(&first.perhaps), first.unseen), (vec![14], None));
        let second = find("04:00.1");
        assert_eq!(pids(&holders.of(tree.path(), &second).processes), [11, 13]);
        assert_eq!(pids(&holders.of_group(tree.path(), &second).processes), [11, 13, 10]);
    }

    #[test]
    fn a_long_command_line_is_shortened() {
        let tree = Tree::new();
        tree.write("proc/1/cmdline", "ü".repeat(500));
        let kept = command(&tree.path().join("proc/1"));
        assert_eq!(kept.chars().count(), COMMAND + 1);
        assert!(kept.ends_with('…'));
    }

    #[test]
    fn without_procfs_the_holder_is_unknown_and_not_nobody() {
        let holders = Holders::scan(Path::new("/nowhere"));
        assert!(holders.numbers.is_empty());
        assert_eq!(holders.unseen, Some(Blind::NoProcfs));
    }
}
