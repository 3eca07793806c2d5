//! A daemon is killed while its device does DMA, and the next one must be able to take the device.

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
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use super::pump::LEN;
use super::{Checked, Options, Trouble};
use crate::client::{AddMemory, Client};
use crate::error::{Error, Result as Done};

/// The hidden subcommand that runs [`run`].
pub const SUBCOMMAND: &str = "until-parent-dies";

/// Where the memory is.
const GPA: u64 = 0x4000_0000;
const PAGES: u64 = 4;
/// How often.
const CRASHES: u32 = 3;
/// How long to wait for the first DMA: a device without a driver here does none.
const SOME: Duration = Duration::from_millis(500);
/// How long a daemon may take to come up, which is how long a device may take to be free again.
const LONG: Duration = Duration::from_secs(30);

/// A daemon, killed when dropped.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Becomes `passgate WORDS`, which ends with the process `parent` that started this one: a test that is killed must not
/// leave a daemon behind that has the device. Returns only where that is not possible.
pub fn run(parent: u32, words: &[OsString]) -> Done<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before it could be told of.
    if getppid().map(Pid::as_raw_pid).and_then(|pid| pid.try_into().ok()) != Some(parent) {
        return Err(Error::Over);
    }
    Err(Error::Output(Command::new("/proc/self/exe").args(words).exec()))
}

/// A directory for the socket and what the daemons say, removed with it.
struct Place(PathBuf);

impl Place {
    fn new() -> std::io::Result<Self> {
        let name = format!("passgate-selftest-{}", std::process::id());
        // A selftest that was killed, with the same process ID, has left its own.
        let mut paths = (0..1000).map(|nth| std::env::temp_dir().join(format!("{name}-{nth}")));
        let made = paths.find_map(|path| match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => None,
            made => Some(made.map(|()| Self(path))),
        });
        made.unwrap_or_else(|| Err(ErrorKind::AlreadyExists.into()))
    }

    fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }

    /// The log of the daemon after `nth` crashes. Each has its own: the guardian of the one before still writes.
    fn log(&self, nth: u32) -> PathBuf {
        self.0.join(format!("log.{nth}"))
    }

    fn last_words(&self, nth: u32) -> String {
        last_words(&std::fs::read(self.log(nth)).unwrap_or_default())
    }
}

/// What a daemon that does not start has said last, in one line: why it does not, where it says so.
fn last_words(log: &[u8]) -> String {
    let text = String::from_utf8_lossy(log);
    let shown = |c: char| !c.is_control();
    let mut lines = text.lines().map(|line| line.chars().filter(|c| shown(*c)).collect::<String>()).rev();
    let lines: Vec<_> = lines.by_ref().filter(|line| !line.trim().is_empty()).collect();
    let why = lines.iter().find(|line| line.starts_with("passgate: "));
    why.or(lines.first()).cloned().unwrap_or_else(|| "nothing was said".to_owned())
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Kills a daemon under DMA and starts the next, some times over.
pub(super) fn recovers(options: &Options) -> Checked {
    if !options.crash {
        return Err(Trouble::Skipped("left out".to_owned()));
    }
    let place = Place::new()?;
    let (mut slowest, mut writes) = (Duration::ZERO, 0);
    for nth in 0..=CRASHES {
        let begun = Instant::now();
        let (victim, mut client) = start(&options.program, options, &place, nth)
            .map_err(|why| Trouble::Failed(format!("the daemon did not start after {nth} crashes: {why}")))?;
        if nth > 0 {
            slowest = slowest.max(begun.elapsed());
        }
        let memory = GuestFile::memfd("passgate-selftest", PAGES * PAGE)?;
        client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory])?;
        writes += crash(victim, client, &options.device);
    }
    let slowest = slowest.as_secs_f64() * 1e3;
    Ok(format!("{CRASHES} crashes beside {writes} DMA writes; back within {slowest:.0} ms"))
}

/// Starts a daemon and waits until it listens.
fn start(program: &Path, options: &Options, place: &Place, nth: u32) -> Result<(Victim, Client), String> {
    let iommu = match options.iommu {
        Kind::Auto => "auto",
        Kind::Iommufd => "iommufd",
        Kind::Type1 => "type1",
        Kind::Soft => "soft",
    };
    let begun = Instant::now();
    let log = File::options()
        .append(true)
        .create_new(true)
        .open(place.log(nth))
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
    command.args(options.scratch.then_some("--scratch")).arg("--socket-path").arg(place.socket());
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
    let mut victim = Victim(child.map_err(|error| error.to_string())?);
    loop {
        match Client::connect(place.socket()) {
            Ok(client) => return Ok((victim, client)),
            Err(_) if begun.elapsed() < LONG && matches!(victim.0.try_wait(), Ok(None)) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(_) => return Err(place.last_words(nth)),
        }
    }
}

/// Kills the daemon in the middle of DMA; how many operations went.
fn crash(victim: Victim, mut client: Client, device: &str) -> u64 {
    let went = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for nth in 0.. {
                let done = client.dma_write(device, GPA + nth % PAGES * PAGE, &[7; LEN]);
                if done.is_err() {
                    return;
                }
                went.fetch_add(1, Relaxed);
            }
        });
        let begun = Instant::now();
        while went.load(Relaxed) < 2 && begun.elapsed() < SOME {
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(victim);
    });
    went.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_daemon_said_last_is_one_line_that_can_be_read() {
        assert_eq!(last_words(b""), "nothing was said");
        assert_eq!(last_words(b"\0\0\0\0one\ntwo\x1b[0m\n\0\0\n"), "two[0m");
        let both = b"[WARN] busy\npassgate: 0000:03:00.0: timed out\n[WARN] guardian: reset\n";
        assert_eq!(
            last_words(both),
            "passgate: 0000:03:00.0: timed out",
            "the reason, whoever else writes after it"
        );
    }
}
