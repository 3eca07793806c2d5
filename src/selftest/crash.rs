//! The check that kills a daemon while its device does DMA: the next daemon must be able to open the device.

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use passgate_backends::Kind;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Failed, PAGE};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use super::dma_load::DMA_BYTES;
use super::{CheckError, CheckResult, Options};
use crate::client::{AddMemory, Client};
use crate::error::{Error, Result as ProgramResult};

/// The hidden subcommand that runs [`run`].
pub const SUBCOMMAND: &str = "until-parent-dies";

/// The guest-physical address of the memory.
const GPA: u64 = 0x4000_0000;
/// The number of pages of the memory.
const PAGES: u64 = 4;
/// The number of times that a daemon is killed.
const CRASHES: u32 = 3;
/// The time to wait for the first DMA operations. A device without a driver in passgate does none.
const FIRST_DMA_TIMEOUT: Duration = Duration::from_millis(500);
/// The maximum time in which a daemon starts to serve, and so in which the device becomes free.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A process that runs a daemon. It is killed when this is dropped.
struct DaemonProcess(Child);

impl Drop for DaemonProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Executes `passgate WORDS` in this process, which the kernel kills when `parent`, its parent process, dies: no daemon
/// that has the device open may outlive a test that is killed. Returns only on failure.
pub fn run(parent: u32, words: &[OsString]) -> ProgramResult<()> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|errno| Failed::new("prctl(PR_SET_PDEATHSIG)", errno))?;
    // A parent that died before the call above sends no signal.
    if getppid().map(Pid::as_raw_pid).and_then(|pid| pid.try_into().ok()) != Some(parent) {
        return Err(Error::Over);
    }
    Err(Error::Output(Command::new("/proc/self/exe").args(words).exec()))
}

/// A directory for the socket and the logs of the daemons. It is removed when this is dropped.
struct WorkDir(PathBuf);

impl WorkDir {
    fn new() -> std::io::Result<Self> {
        let name = format!("passgate-selftest-{}", std::process::id());
        // A selftest with the same process ID that was killed may have left its directory behind.
        let mut paths = (0..1000).map(|n| std::env::temp_dir().join(format!("{name}-{n}")));
        let made = paths.find_map(|path| match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => None,
            made => Some(made.map(|()| Self(path))),
        });
        made.unwrap_or_else(|| Err(ErrorKind::AlreadyExists.into()))
    }

    fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }

    /// Returns the log of the daemon after so many crashes. Each has its own, because the guardian of the one before
    /// still writes to its log.
    fn log(&self, crashes: u32) -> PathBuf {
        self.0.join(format!("log.{crashes}"))
    }

    fn failure_reason(&self, crashes: u32) -> String {
        failure_reason(&std::fs::read(self.log(crashes)).unwrap_or_default())
    }
}

/// Returns the line of a log that explains why the daemon did not start: the last one that `passgate` prefixes, else the
/// last.
fn failure_reason(log: &[u8]) -> String {
    let text = String::from_utf8_lossy(log);
    let shown = |c: char| !c.is_control();
    let mut lines = text.lines().map(|line| line.chars().filter(|c| shown(*c)).collect::<String>()).rev();
    let lines: Vec<_> = lines.by_ref().filter(|line| !line.trim().is_empty()).collect();
    let reason = lines.iter().find(|line| line.starts_with("passgate: "));
    reason.or(lines.first()).cloned().unwrap_or_else(|| "nothing was said".to_owned())
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Kills a daemon under DMA and starts the next, [`CRASHES`] times.
pub(super) fn crash_and_recover(options: &Options) -> CheckResult {
    if !options.crash {
        return Err(CheckError::Skipped("skipped by --no-crash".to_owned()));
    }
    let dir = WorkDir::new()?;
    let (mut slowest, mut writes) = (Duration::ZERO, 0);
    for crashes in 0..=CRASHES {
        let started = Instant::now();
        let (daemon, mut client) = start(&options.program, options, &dir, crashes).map_err(|why| {
            CheckError::Failed(format!("the daemon did not start after {crashes} crashes: {why}"))
        })?;
        if crashes > 0 {
            slowest = slowest.max(started.elapsed());
        }
        let memory = GuestFile::memfd("passgate-selftest", PAGES * PAGE)?;
        client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory])?;
        writes += crash(daemon, client, &options.device);
    }
    let slowest = slowest.as_secs_f64() * 1e3;
    Ok(format!("{CRASHES} crashes during {writes} DMA writes; restarted within {slowest:.0} ms"))
}

/// Starts a daemon, and waits until it accepts a connection.
fn start(
    program: &Path,
    options: &Options,
    dir: &WorkDir,
    crashes: u32,
) -> Result<(DaemonProcess, Client), String> {
    let iommu = match options.iommu {
        Kind::Auto => "auto",
        Kind::Iommufd => "iommufd",
        Kind::Type1 => "type1",
        Kind::Soft => "soft",
    };
    let started = Instant::now();
    let log = File::options()
        .append(true)
        .create_new(true)
        .open(dir.log(crashes))
        .map_err(|error| error.to_string())?;
    let mut command = Command::new(program);
    command.args([SUBCOMMAND, &std::process::id().to_string()]);
    command.args([
        "serve",
        "--allow-dma",
        "--allow-unstoppable",
        "--iommu",
        iommu,
        "--device",
        &options.device,
    ]);
    command.args(options.scratch.then_some("--scratch")).arg("--socket-path").arg(dir.socket());
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
    let mut daemon = DaemonProcess(child.map_err(|error| error.to_string())?);
    loop {
        match Client::connect(dir.socket()) {
            Ok(client) => return Ok((daemon, client)),
            Err(_) if started.elapsed() < START_TIMEOUT && matches!(daemon.0.try_wait(), Ok(None)) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(_) => return Err(dir.failure_reason(crashes)),
        }
    }
}

/// Kills the daemon while its device does DMA. Returns the number of operations that succeeded.
fn crash(daemon: DaemonProcess, mut client: Client, device: &str) -> u64 {
    let writes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0.. {
                let result = client.dma_write(device, GPA + n % PAGES * PAGE, &[7; DMA_BYTES]);
                if result.is_err() {
                    return;
                }
                writes.fetch_add(1, Relaxed);
            }
        });
        let started = Instant::now();
        while writes.load(Relaxed) < 2 && started.elapsed() < FIRST_DMA_TIMEOUT {
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(daemon);
    });
    writes.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_reason_of_daemon_is_one_readable_line() {
        assert_eq!(failure_reason(b""), "nothing was said");
        assert_eq!(failure_reason(b"\0\0\0\0one\ntwo\x1b[0m\n\0\0\n"), "two[0m");
        let both = b"[WARN] busy\npassgate: 0000:03:00.0: timed out\n[WARN] guardian: reset\n";
        assert_eq!(
            failure_reason(both),
            "passgate: 0000:03:00.0: timed out",
            "the reason, although the guardian writes after it"
        );
    }
}
