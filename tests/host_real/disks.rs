//! Claims of real block devices: loop devices, which a sysfs made of files shows as disks of a PCI device.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use passgate::selftest::in_use::{Claims, Host, claim};
use rustix::fs::{major, minor};
use tempfile::TempDir;

const ADDRESS: &str = "0000:04:00.0";
/// The size of a disk: a btrfs needs at least 109 MiB on each device.
const DISK_BYTES: u64 = 128 << 20;

/// Runs a command; returns its standard output, or the reason of its failure.
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

/// A loop device, detached when dropped.
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

    /// Returns its device number as `MAJOR:MINOR`.
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

/// Runs a command when dropped, also where the test fails.
struct UndoOnDrop(Vec<String>);

impl UndoOnDrop {
    fn running(words: &[&str]) -> Self {
        Self(words.iter().map(|&word| word.to_owned()).collect())
    }
}

impl Drop for UndoOnDrop {
    fn drop(&mut self) {
        let words: Vec<_> = self.0.iter().map(String::as_str).collect();
        if let Err(error) = run(&words) {
            eprintln!("{error}");
        }
    }
}

/// A sysfs that contains one PCI device with this disk and nothing else, so that no list there names a user of the disk; and
/// a procfs with the real mounts but without the real processes, because a test may not be allowed to read the files of PID 1.
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

    /// Shows a real process in the procfs.
    fn show_process(&self, process: u32) {
        let process = process.to_string();
        symlink(Path::new("/proc").join(&process), self.proc().join(&process)).unwrap();
    }

    fn claim(&self) -> Result<Claims, String> {
        let host = Host { sysfs: self.0.path(), proc: &self.proc(), dev: Path::new("/dev") };
        claim(host, ADDRESS.parse().unwrap())
    }

    /// Asserts that the claim fails, and returns the reason.
    fn claim_error(&self) -> String {
        self.claim().expect_err("a disk in use counts as free")
    }
}

/// Returns why a test with loop devices cannot run here, if it cannot.
pub(crate) fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("loop devices need root".to_owned());
    }
    Disk::new().err()
}

/// Returns why a test that also needs these programs cannot run here, if it cannot.
fn missing_with(programs: &[&str]) -> Option<String> {
    missing().or_else(|| {
        let is_missing = |name: &&&str| run(&["sh", "-c", &format!("command -v {name}")]).is_err();
        programs.iter().find(is_missing).map(|name| format!("{name} is not installed"))
    })
}

pub(crate) fn btrfs_missing() -> Option<String> {
    let kernel = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let unsupported = !kernel.contains("\tbtrfs\n");
    missing_with(&["mkfs.btrfs"]).or_else(|| unsupported.then(|| "this kernel has no btrfs".to_owned()))
}

pub(crate) fn mapper_missing() -> Option<String> {
    missing_with(&["dmsetup"])
        .or_else(|| run(&["dmsetup", "version"]).err().map(|error| format!("no device mapper: {error}")))
}

pub(crate) fn swap_missing() -> Option<String> {
    missing_with(&["mkswap", "swapon"])
}

pub(crate) fn mount_missing() -> Option<String> {
    missing_with(&["mkfs.ext4", "unshare"])
}

pub(crate) fn disk_claim_is_exclusive() {
    let disk = Disk::new().unwrap();
    let sysfs = Sysfs::with(&disk);
    let claims = sysfs.claim().expect("the disk is free");
    let error = sysfs.claim_error();
    assert!(error.contains("cannot be opened exclusively"), "{error}");
    drop(claims);
    drop(sysfs.claim().expect("the disk is free again"));
}

/// The second device of a btrfs is in no list of mounts, and its `holders` directory in sysfs is empty.
pub(crate) fn every_device_of_mounted_btrfs_is_in_use() {
    let disks = [Disk::new().unwrap(), Disk::new().unwrap()];
    run(&["mkfs.btrfs", "--quiet", "--data", "raid0", "--metadata", "raid1", &disks[0].node, &disks[1].node])
        .unwrap();
    let sysfs = disks.each_ref().map(Sysfs::with);
    for sysfs in &sysfs {
        drop(sysfs.claim().expect("not mounted"));
    }
    run(&["btrfs", "device", "scan", &disks[0].node, &disks[1].node]).unwrap();
    let mount_dir = tempfile::tempdir().unwrap();
    let path = mount_dir.path().to_str().unwrap();
    run(&["mount", "-t", "btrfs", &disks[0].node, path]).unwrap();
    let mounted = UndoOnDrop::running(&["umount", path]);
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(&disks[1].node), "the kernel lists one of them only");
    for sysfs in &sysfs {
        let error = sysfs.claim_error();
        assert!(error.contains("cannot be opened exclusively"), "{error}");
    }
    // With the real /sys/fs/btrfs the reason names the file system.
    let real = Path::new("/sys/fs/btrfs");
    if real.exists() {
        fs::create_dir_all(sysfs[1].0.path().join("fs")).unwrap();
        symlink(real, sysfs[1].0.path().join("fs/btrfs")).unwrap();
        let error = sysfs[1].claim_error();
        assert!(error.contains(&format!("{} is a device of the mounted btrfs", disks[1].node)), "{error}");
    }
    drop(mounted);
    for sysfs in &sysfs {
        drop(sysfs.claim().expect("not mounted any more"));
    }
}

pub(crate) fn device_mapper_member_is_in_use() {
    let disk = Disk::new().unwrap();
    let sysfs = Sysfs::with(&disk);
    let name = format!("passgate-test-{}", std::process::id());
    let table = format!("0 2048 linear {} 0", disk.node);
    run(&["dmsetup", "create", &name, "--noudevsync", "--table", &table]).unwrap();
    let mapped = UndoOnDrop::running(&["dmsetup", "remove", "--retry", "--noudevsync", &name]);
    assert!(sysfs.claim_error().contains("cannot be opened exclusively"));
    drop(mapped);
    drop(sysfs.claim().expect("the disk is free again"));
}

pub(crate) fn swap_disk_is_in_use() {
    let disk = Disk::new().unwrap();
    let sysfs = Sysfs::with(&disk);
    run(&["mkswap", &disk.node]).unwrap();
    run(&["swapon", "--priority", "0", &disk.node]).unwrap();
    let swapped = UndoOnDrop::running(&["swapoff", &disk.node]);
    assert!(sysfs.claim_error().ends_with(&format!("is swapped to: swapoff {}", disk.node)));
    drop(swapped);
    drop(sysfs.claim().expect("the disk is free again"));
}

/// A mount of another namespace is in no list that this process can read.
pub(crate) fn disk_mounted_in_other_namespace_is_in_use() {
    let disk = Disk::new().unwrap();
    let sysfs = Sysfs::with(&disk);
    run(&["mkfs.ext4", "-q", &disk.node]).unwrap();
    let mount_dir = tempfile::tempdir().unwrap();
    let mount = format!("mount {} {} && echo mounted && read end", disk.node, mount_dir.path().display());
    let mut namespace_holder = Command::new("unshare")
        .args(["--mount", "sh", "-c", &mount])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(
        &mut std::io::BufReader::new(namespace_holder.stdout.as_mut().unwrap()),
        &mut line,
    )
    .unwrap();
    assert_eq!(line, "mounted\n");
    assert!(!fs::read_to_string("/proc/mounts").unwrap().contains(&disk.node));
    let error = sysfs.claim_error();
    drop(namespace_holder.stdin.take());
    namespace_holder.wait().unwrap();
    assert!(error.contains("it is mounted in another namespace"), "{error}");
}

/// A VMM or a server opens a disk without O_EXCL: an exclusive open succeeds, and the disk is in use all the same.
pub(crate) fn disk_open_in_process_is_in_use_under_any_name() {
    let disk = Disk::new().unwrap();
    let sysfs = Sysfs::with(&disk);
    let temp_dir = tempfile::tempdir().unwrap();
    let alias: PathBuf = temp_dir.path().join("alias");
    let number = disk.number();
    let (major, minor) = number.split_once(':').unwrap();
    run(&["mknod", alias.to_str().unwrap(), "b", major, minor]).unwrap();
    let mut process =
        Command::new("sleep").arg("1000").stdin(fs::File::open(&alias).unwrap()).spawn().unwrap();
    // The kernel closes the files of the old program (which is when `spawn` returns) before it knows the new one's arguments.
    let command_line = format!("/proc/{}/cmdline", process.id());
    while fs::read(&command_line).unwrap().is_empty() {
        std::thread::yield_now();
    }
    sysfs.show_process(process.id());
    let error = sysfs.claim_error();
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(error.starts_with(&format!("process {} (`sleep 1000`) has ", process.id())), "{error}");
    drop(sysfs.claim().expect("it has ended"));
}
