//! Processes that have a device file open, or mapped.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use super::descendants::Descendants;
use super::{Host, device_node};
use crate::host::holder::command_line;
use crate::host::visibility::{Blind, each_open_file, has_ended};

/// Refuses a device of which a process has a device file open, by whatever path, or mapped by its path in `/dev`.
pub(super) fn check(host: Host<'_>, dir: &Path, descendants: &Descendants) -> Result<(), String> {
    // The file of VFIO does not count: a process that has it open is waited for when the device is opened.
    let vfio_dir = dir.join("vfio-dev");
    let files = descendants.with_device_file().filter(|(entry, _)| !entry.dir.starts_with(&vfio_dir));
    let nodes: BTreeMap<(bool, (u32, u32)), PathBuf> = files
        .map(|(entry, file)| ((entry.subsystem == "block", file.number), device_node(host, &file.name)))
        .collect();
    let is_nvidia = fs::read_link(dir.join("driver")).is_ok_and(|driver| driver.ends_with("nvidia"));
    if nodes.is_empty() && !is_nvidia {
        return Ok(());
    }
    let (mut found, mut unread) = (None, false);
    let mut record = |pid: u32, process: &Path, file: &str| {
        found.get_or_insert_with(|| {
            format!("process {pid} (`{}`) has {file} open: stop it", command_line(process))
        });
    };
    // The nvidia driver creates device files that are not in sysfs.
    let is_nvidia_file = |target: &str| is_nvidia && target.starts_with("/dev/nvidia");
    let mut last_pid = 0;
    let blind = each_open_file(host.proc, |file| {
        if file.pid == std::process::id() {
            return;
        }
        if last_pid != file.pid {
            last_pid = file.pid;
            match read_maps(file.dir) {
                Ok(maps) => {
                    let mut names = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
                    let is_ours = |name: &&str| {
                        nodes.values().any(|node| Path::new(name) == node) || is_nvidia_file(name)
                    };
                    if let Some(name) = names.find(is_ours) {
                        record(file.pid, file.dir, name);
                    }
                }
                Err(error) => unread |= !has_ended(&error),
            }
        }
        if !file.target.starts_with('/') {
            return;
        }
        if is_nvidia_file(&file.target) {
            return record(file.pid, file.dir, &file.target);
        }
        // Not synced: a network file system may never answer.
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let Ok(meta) = statx(CWD, &file.link, flags, StatxFlags::TYPE) else {
            unread |= file.target.starts_with("/dev/");
            return;
        };
        let kind = FileType::from_raw_mode(meta.stx_mode.into());
        let is_block = kind == FileType::BlockDevice;
        let number = (meta.stx_rdev_major, meta.stx_rdev_minor);
        if (is_block || kind == FileType::CharacterDevice) && nodes.contains_key(&(is_block, number)) {
            record(file.pid, file.dir, &file.target);
        }
    });
    let blind = blind.or(unread.then_some(Blind::Denied));
    match (found, blind) {
        (Some(user), _) => Err(user),
        (None, Some(blind)) => {
            Err(format!("who has its device files open cannot be seen: {}", blind.describe()))
        }
        (None, None) => Ok(()),
    }
}

/// Returns the mappings of a process: proc_pid_maps(5).
fn read_maps(process: &Path) -> std::io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(process.join("maps"))?).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::super::fake::FakeHost;

    fn process(fake: &FakeHost, pid: u32, opens: &str) {
        let dir = fake.proc().join(pid.to_string());
        fs::create_dir_all(dir.join("fd")).unwrap();
        fs::write(dir.join("comm"), "glxgears\n").unwrap();
        symlink(opens, dir.join("fd/3")).unwrap();
    }

    /// `/dev/null` is 1:3 and `/dev/zero` 1:5 everywhere: they stand for two device files.
    #[test]
    fn device_open_in_process_is_in_use_by_any_path() {
        let fake = FakeHost::new();
        fake.entry("drm", "drm/renderD128", Some("1:3"));
        process(&fake, 41, "/dev/zero");
        assert_eq!(fake.user(), None);
        let elsewhere = fake.proc().join("null");
        symlink("/dev/null", &elsewhere).unwrap();
        process(&fake, 42, elsewhere.to_str().unwrap());
        let user = fake.user().unwrap();
        assert!(
            user.starts_with("process 42 (`[glxgears]`) has ") && user.ends_with(" open: stop it"),
            "{user}"
        );
    }

    #[test]
    fn mapped_device_file_is_in_use() {
        let fake = FakeHost::new();
        fake.entry("drm", "drm/renderD128", Some("1:3"));
        process(&fake, 42, "/dev/zero");
        let maps = fake.proc().join("42/maps");
        fs::write(&maps, "7f00-7f01 rw-s 00000000 00:06 333 /dev/dri/renderD128\n").unwrap();
        assert_eq!(fake.user(), None, "a device file of another device");
        let name = fake.dev().join("renderD128");
        fs::write(&maps, format!("7f00-7f01 rw-s 00000000 00:06 333    {}\n", name.display())).unwrap();
        assert!(fake.user().unwrap().starts_with("process 42 "));
    }

    #[test]
    fn device_whose_users_cannot_be_seen_is_in_use() {
        let fake = FakeHost::new();
        fake.entry("drm", "drm/renderD128", Some("1:3"));
        fake.leave_initial_pid_namespace();
        assert!(fake.user().unwrap().contains("processes outside this PID namespace cannot be seen"));
    }

    #[test]
    fn open_vfio_device_file_does_not_count_as_use() {
        let fake = FakeHost::new();
        fake.entry("vfio-dev", "vfio-dev/vfio0", Some("1:3"));
        process(&fake, 42, "/dev/null");
        assert_eq!(fake.user(), None);
    }
}
