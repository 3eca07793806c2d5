//! A daemon is killed while its device does DMA, and the next one must be able to take the device.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use passgate_backends::Kind;
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;

use super::pump::LEN;
use super::{Checked, Options, Trouble};
use crate::client::{AddMemory, Client};

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

/// Kills a daemon under DMA and starts the next, some times over.
pub(super) fn recovers(options: &Options) -> Checked {
    let Some(program) = &options.program else {
        return Err(Trouble::Skipped("left out".to_owned()));
    };
    let socket = std::env::temp_dir().join(format!("passgate-selftest-{}", std::process::id()));
    let iommu = match options.iommu {
        Kind::Auto => "auto",
        Kind::Iommufd => "iommufd",
        Kind::Type1 => "type1",
        Kind::Soft => "soft",
    };
    let (mut slowest, mut writes) = (Duration::ZERO, 0);
    for nth in 0..=CRASHES {
        let begun = Instant::now();
        let mut command = Command::new(program);
        command.args([
            "serve",
            "--allow-dma",
            "--allow-unstoppable",
            "--iommu",
            iommu,
            "--device",
            &options.device,
            "--socket-path",
        ]);
        command.arg(&socket).args(options.scratch.then_some("--scratch"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut victim = Victim(child.spawn()?);
        let mut client = loop {
            match Client::connect(&socket) {
                Ok(client) => break client,
                Err(_) if begun.elapsed() < LONG && victim.0.try_wait()?.is_none() => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => {
                    return Err(Trouble::Failed(format!(
                        "the daemon did not start after {nth} crashes: {error}"
                    )));
                }
            }
        };
        if nth > 0 {
            slowest = slowest.max(begun.elapsed());
        }
        let memory = GuestFile::memfd("passgate-selftest", PAGES * PAGE)?;
        client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory])?;
        writes += crash(victim, client, &options.device);
    }
    let _ = std::fs::remove_file(&socket);
    Ok(format!(
        "{CRASHES} crashes beside {writes} DMA writes; back within {:.0} ms",
        slowest.as_secs_f64() * 1e3
    ))
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
