//! Real block devices, claimed by the real kernel: loop devices that a made-up PCI device is said to have.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use passgate::selftest::in_use::{Claims, Host, claim};
use rustix::fs::{major, minor};
use tempfile::TempDir;

const ADDRESS: &str = "0000:04:00.0";
/// The smallest btrfs has 109 MiB a device.
const DISK_BYTES: u64 = 128 << 20;

/// Runs a command; what it printed, or why it failed.
fn run(words: &[&str]) -> Result<String, String> {
    let output = Command::new(words[0])
        .args(&words[1..])
        .output()
        .map_err(|error| format!("{}: {error}", words[0]))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{words:?}: {}", text(&output.stderr)))
    }
}

/// A loop device, which ends with it.
struct Disk {
    node: String,
    _file: tempfile::NamedTempFile,
}

impl Disk {
    fn new() -> Result<Self, String> {
        let file = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
        file.as_file().set_len(DISK_BYTES).map_err(|error| error.to_string())?;
        let node = run(&["losetup", "--find", "--show", file.path().to_str().unwrap_or_default()])?;
        Ok(Self { node, _file: file })
    }

    fn name(&self) -> &str {
        self.node.rsplit('/').next().unwrap()
    }

    fn number(&self) -> String {
        let meta = fs::metadata(&self.node).unwrap();
        assert!(meta.file_type().is_block_device());
        format!("{}:{}", major(meta.rdev()), minor(meta.rdev()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(&["losetup", "--detach", &self.node]).unwrap();
    }
}

/// Undoes something when dropped, also where the test fails.
struct Undo(Vec<String>);

impl Undo {
    fn by(words: &[&str]) -> Self {
        Self(words.iter().map(|&word| word.to_owned()).collect())
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        let words: Vec<_> = self.0.iter().map(String::as_str).collect();
        if let Err(why) = run(&words) {
            eprintln!("{why}");
        }
    }
}

/// A sysfs in which one PCI device has this disk, and is otherwise empty: no list gives a user away. A procfs with the
/// real mounts and without any process: not every machine shows the files of its first one to a test.
struct Sysfs(TempDir);

impl Sysfs {
    fn with(disk: &Disk) -> Self {
        let sysfs = Self(tempfile::tempdir().unwrap());
        let device = sysfs.0.path().join("devices/pci0000:00").join(ADDRESS);
        let entry = device.join("block").join(disk.name());
        for dir in [&entry, &sysfs.0.path().join("class/block"), &sysfs.0.path().join("bus/pci/devices")] {
            fs::create_dir_all(dir).unwrap();
        }
        symlink(&device, sysfs.0.path().join("bus/pci/devices").join(ADDRESS)).unwrap();
        symlink(sysfs.0.path().join("class/block"), entry.join("subsystem")).unwrap();
        fs::write(entry.join("dev"), disk.number()).unwrap();
        fs::write(entry.join("uevent"), format!("DEVNAME={}\n", disk.name())).unwrap();
        let own = std::process::id().to_string();
        fs::create_dir_all(sysfs.proc().join(&own).join("ns")).unwrap();
        fs::create_dir_all(sysfs.proc().join("1")).unwrap();
        symlink(&own, sysfs.proc().join("self")).unwrap();
        symlink("pid:[4026531836]", sysfs.proc().join("self/ns/pid")).unwrap();
        symlink("/proc/self/mountinfo", sysfs.proc().join("self/mountinfo")).unwrap();
        symlink("/proc/swaps", sysfs.proc().join("swaps")).unwrap();
        sysfs
    }

    fn proc(&self) -> PathBuf {
        self.0.path().join("proc")
    }

    fn show(&self, process: u32) {
        let process = process.to_string();
        symlink(Path::new("/proc").join(&process), self.proc().join(&process)).unwrap();
    }

    fn claim(&self) -> Result<Claims, String> {
        let host = Host { sysfs: self.0.path(), proc: &self.proc(), dev: Path::new("/dev") };
        claim(host, ADDRESS.parse().unwrap())
    }

    /// Asserts that the disk counts as used, and returns by whom.
    fn says(&self) -> String {
        self.claim().expect_err("a disk in use counts as free")
    }
}

pub(crate) fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("loop devices need root".to_owned());
    }
    Disk::new().err()
}

/// The same, and these programs.
fn missing_with(programs: &[&str]) -> Option<String> {
    missing().or_else(|| {
        let is_there = |name: &&&str| run(&["sh", "-c", &format!("command -v {name}")]).is_err();
        programs.iter().find(is_there).map(|name| format!("{name} is not installed"))
    })
}

pub(crate) fn btrfs_missing() -> Option<String> {
    let kernel = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has_none = !kernel.contains("\tbtrfs\n");
    missing_with(&["mkfs.btrfs"]).or_else(|| has_none.then(|| "this kernel has no btrfs".to_owned()))
}

pub(crate) fn mapper_missing() -> Option<String> {
    missing_with(&["dmsetup"])
        .or_else(|| run(&["dmsetup", "version"]).err().map(|why| format!("no device mapper: {why}")))
}

pub(crate) fn swap_missing() -> Option<String> {
    missing_with(&["mkswap", "swapon"])
}

pub(crate) fn mount_missing() -> Option<String> {
    missing_with(&["mkfs.ext4", "unshare"])
}

pub(crate) fn a_claim_keeps_others_out() {
    let disk = Disk::new().unwrap();
    let sysfs = Sysfs::with(&disk);
    let claims = sysfs.claim().expect("nobody uses it");
    let said = sysfs.says();
    assert!(said.contains("cannot be opened exclusively"), "{said}");
    drop(claims);
    drop(sysfs.claim().expect("nobody uses it any more"));
}

/// The second device of a btrfs is in no list of mounts, and has no holder in sysfs.
pub(crate) fn every_device_of_a_btrfs_is_in_use() {
    let disks = [Disk::new().unwrap(), Disk::new().unwrap()];
    run(&["mkfs.btrfs", "--quiet", "--data", "raid0", "--metadata", "raid1", &disks[0].node, &disks[1].node])
        .unwrap();
    let sysfs = disks.each_ref().map(Sysfs::with);
    for sysfs in &sysfs {
        drop(sysfs.claim().expect("not mounted"));
    }
    run(&["btrfs", "device", "scan", &disks[0].node, &disks[1].node]).unwrap();
    let at = tempfile::tempdir().unwrap();
    let path = at.path().to_str().unwrap();
    run(&["mount", "-t", "btrfs", &disks[0].node, path]).unwrap();
    let mounted = Undo::by(&["umount", path]);
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(&disks[1].node), "the kernel lists one of them only");
    for sysfs in &sysfs {
        let said = sysfs.says();
        assert!(said.contains("cannot be opened exclusively"), "{said}");
    }
    // With the host's own sysfs beside, it is named.
    let real = Path::new("/sys/fs/btrfs");
    if real.exists() {
        fs::create_dir_all(sysfs[1].0.path().join("fs")).unwrap();
        symlink(real, sysfs[1].0.path().join("fs/btrfs")).unwrap();
        let said = sysfs[1].says();
        assert!(said.contains(&format!("{} is a device of the mounted btrfs", disks[1].node)), "{said}");
    }
    drop(mounted);
    for sysfs in &sysfs {
        drop(sysfs.claim().expect("not mounted any more"));
    }
}

pub(crate) fn a_part_of_a_device_mapper_table_is_in_use() {
    let disk = Disk::new().unwrap();
    let sysfs = Sysfs::with(&disk);
    let name = format!("passgate-test-{}", std::process::id());
    let table = format!("0 2048 linear {} 0", disk.node);
    run(&["dmsetup", "create", &name, "--noudevsync", "--table", &table]).unwrap();
    let mapped = Undo::by(&["dmsetup", "remove", "--retry", "--noudevsync", &name]);
    assert!(sysfs.says().contains("cannot be opened exclusively"));
    drop(mapped);
    drop(sysfs.claim().expect("nobody uses it any more"));
}

pub(crate) fn what_is_swapped_to_is_in_use() {
    let disk = Disk::new().unwrap();
    let sysfs = Sysfs::with(&disk);
    run(&["mkswap", &disk.node]).unwrap();
    run(&["swapon", "--priority", "0", &disk.node]).unwrap();
    let swapped = Undo::by(&["swapoff", &disk.node]);
    assert!(sysfs.says().ends_with(&format!("is swapped to: swapoff {}", disk.node)));
    drop(swapped);
    drop(sysfs.claim().expect("nobody uses it any more"));
}

/// A mount of another namespace is in no list that this process sees.
pub(crate) fn what_another_mount_namespace_has_mounted_is_in_use() {
    let disk = Disk::new().unwrap();
    let sysfs = Sysfs::with(&disk);
    run(&["mkfs.ext4", "-q", &disk.node]).unwrap();
    let at = tempfile::tempdir().unwrap();
    let mount = format!("mount {} {} && echo mounted && read end", disk.node, at.path().display());
    let mut other = Command::new("unshare")
        .args(["--mount", "sh", "-c", &mount])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(other.stdout.as_mut().unwrap()), &mut line)
        .unwrap();
    assert_eq!(line, "mounted\n");
    assert!(!fs::read_to_string("/proc/mounts").unwrap().contains(&disk.node));
    let said = sysfs.says();
    drop(other.stdin.take());
    other.wait().unwrap();
    assert!(said.contains("it is mounted in another namespace"), "{said}");
}

/// A VMM or a server has a disk open in the ordinary way: nothing is claimed, and it is used all the same.
pub(crate) fn what_a_process_has_open_is_in_use_under_any_name() {
    let disk = Disk::new().unwrap();
    let sysfs = Sysfs::with(&disk);
    let place = tempfile::tempdir().unwrap();
    let alias: PathBuf = place.path().join("alias");
    let number = disk.number();
    let (major, minor) = number.split_once(':').unwrap();
    run(&["mknod", alias.to_str().unwrap(), "b", major, minor]).unwrap();
    let mut process =
        Command::new("sleep").arg("1000").stdin(fs::File::open(&alias).unwrap()).spawn().unwrap();
    sysfs.show(process.id());
    let said = sysfs.says();
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(said.starts_with(&format!("process {} (`sleep 1000`) has ", process.id())), "{said}");
    drop(sysfs.claim().expect("it has ended"));
}
