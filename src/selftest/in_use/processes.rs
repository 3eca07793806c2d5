//! Processes that have a device file open, or mapped.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use super::below::Below;
use super::{Host, node};
use crate::host::holder::command;
use crate::host::sight::{Blind, each_open_file, has_ended};

/// A process that has a device file below the device open, by whatever name, or mapped.
pub(super) fn check(host: Host<'_>, dir: &Path, below: &Below) -> Result<(), String> {
    // VFIO's own file: who has that is waited for.
    let ours = dir.join("vfio-dev");
    let files = below.files().filter(|(entry, _)| !entry.dir.starts_with(&ours));
    let nodes: BTreeMap<(bool, (u32, u32)), PathBuf> = files
        .map(|(entry, file)| ((entry.subsystem == "block", file.number), node(host, &file.name)))
        .collect();
    let is_nvidia = fs::read_link(dir.join("driver")).is_ok_and(|driver| driver.ends_with("nvidia"));
    if nodes.is_empty() && !is_nvidia {
        return Ok(());
    }
    let (mut found, mut unread) = (None, false);
    let mut look = |pid: u32, process: &Path, file: &str| {
        found.get_or_insert_with(|| {
            format!("process {pid} (`{}`) has {file} open: stop it", command(process))
        });
    };
    // Its driver makes device files that sysfs does not know of.
    let of_nvidia = |target: &str| is_nvidia && target.starts_with("/dev/nvidia");
    let mut last = 0;
    let blind = each_open_file(host.proc, |file| {
        if file.pid == std::process::id() {
            return;
        }
        if last != file.pid {
            last = file.pid;
            match mapped(file.dir) {
                Ok(names) => {
                    let mut names = names.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
                    let is =
                        |name: &&str| nodes.values().any(|node| Path::new(name) == node) || of_nvidia(name);
                    if let Some(name) = names.find(is) {
                        look(file.pid, file.dir, name);
                    }
                }
                Err(error) => unread |= !has_ended(&error),
            }
        }
        if !file.target.starts_with('/') {
            return;
        }
        if of_nvidia(&file.target) {
            return look(file.pid, file.dir, &file.target);
        }
        // Without a question to the file system behind it, which may be far away and never answer.
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let Ok(meta) = statx(CWD, &file.link, flags, StatxFlags::TYPE) else {
            unread |= file.target.starts_with("/dev/");
            return;
        };
        let kind = FileType::from_raw_mode(meta.stx_mode.into());
        let is_block = kind == FileType::BlockDevice;
        let number = (meta.stx_rdev_major, meta.stx_rdev_minor);
        if (is_block || kind == FileType::CharacterDevice) && nodes.contains_key(&(is_block, number)) {
            look(file.pid, file.dir, &file.target);
        }
    });
    let blind = blind.or(unread.then_some(Blind::Denied));
    match (found, blind) {
        (Some(user), _) => Err(user),
        (None, Some(blind)) => {
            Err(format!("who has its device files open cannot be seen: {}", blind.words()))
        }
        (None, None) => Ok(()),
    }
}

/// The mappings of a process, as text.
fn mapped(process: &Path) -> std::io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(process.join("maps"))?).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::super::fake::Fake;

    fn process(fake: &Fake, pid: u32, opens: &str) {
        let dir = fake.proc().join(pid.to_string());
        fs::create_dir_all(dir.join("fd")).unwrap();
        fs::write(dir.join("comm"), "glxgears\n").unwrap();
        symlink(opens, dir.join("fd/3")).unwrap();
    }

    /// `/dev/null` is 1:3 and `/dev/zero` 1:5 everywhere: they stand for two device files.
    #[test]
    fn a_device_with_a_process_on_it_is_in_use_by_whatever_name() {
        let fake = Fake::new();
        fake.entry("drm", "drm/renderD128", Some("1:3"));
        process(&fake, 41, "/dev/zero");
        assert_eq!(fake.says(), None);
        let elsewhere = fake.proc().join("null");
        symlink("/dev/null", &elsewhere).unwrap();
        process(&fake, 42, elsewhere.to_str().unwrap());
        let said = fake.says().unwrap();
        assert!(
            said.starts_with("process 42 (`[glxgears]`) has ") && said.ends_with(" open: stop it"),
            "{said}"
        );
    }

    #[test]
    fn a_device_file_that_is_mapped_is_in_use() {
        let fake = Fake::new();
        fake.entry("drm", "drm/renderD128", Some("1:3"));
        process(&fake, 42, "/dev/zero");
        let maps = fake.proc().join("42/maps");
        fs::write(&maps, "7f00-7f01 rw-s 00000000 00:06 333 /dev/dri/renderD128\n").unwrap();
        assert_eq!(fake.says(), None, "another's");
        let name = fake.dev().join("renderD128");
        fs::write(&maps, format!("7f00-7f01 rw-s 00000000 00:06 333    {}\n", name.display())).unwrap();
        assert!(fake.says().unwrap().starts_with("process 42 "));
    }

    #[test]
    fn a_device_whose_users_cannot_be_seen_is_in_use() {
        let fake = Fake::new();
        fake.entry("drm", "drm/renderD128", Some("1:3"));
        fake.leave_the_namespace();
        assert!(fake.says().unwrap().contains("processes outside this PID namespace cannot be seen"));
    }

    #[test]
    fn who_has_vfios_own_file_is_waited_for() {
        let fake = Fake::new();
        fake.entry("vfio-dev", "vfio-dev/vfio0", Some("1:3"));
        process(&fake, 42, "/dev/null");
        assert_eq!(fake.says(), None);
    }
}
