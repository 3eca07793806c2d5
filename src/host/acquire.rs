//! Acquiring devices that another process may still have open, without a reboot of the host.
//!
//! After a crash a device may be busy for a short time: the guardian of the daemon that died is stopping it, the kernel is
//! closing its files, or it is being reset. So the assignment of a busy device is retried with a backoff, and its holder is
//! logged once. If it is still busy at the end, the error names the holder and the remedy.
//!
//! No device is reset here. VFIO resets a device when it is opened, and from then on no other process has it. A device
//! that does not open is in use, even if no process is found that has it open: none can be found from outside the initial
//! PID namespace, descriptors may be in sockets and io_uring tables, and the kernel closes a device long after its
//! process has ended. A reset by sysfs during that close destroys the configuration of the device: vfio-pci restores it
//! outside the device's lock, so that the reset may save, and restore ever after, the empty configuration that follows a
//! function level reset (`vfio_pci_core_disable`, drivers/vfio/pci/vfio_pci_core.c).

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use passgate_backends::assign::{Accept, Assignment, Kind, assign};
use passgate_backends::{Drivers, Tables};
use passgate_bindings::Failed;
use passgate_bindings::vfio::pci::{PciDevice, SYSFS};
use rustix::io::Errno;

use super::config;
use super::holder::{Holders, Owner, Process};
use crate::error::{Error, Result};

/// The pause before the first retry. Each further one is twice as long as the one before.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
/// The maximum pause between two attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// Assigns the devices. Retries for `timeout` while one of them is busy; then returns [`Error::Taken`].
pub fn acquire(
    kind: Kind,
    devices: &[String],
    accept: Accept,
    drivers: &dyn Drivers,
    tables: Tables,
    timeout: Duration,
) -> Result<Assignment> {
    retry(timeout, &mut ThisHost, || assign(kind, devices, accept, drivers, tables))
}

/// The time and the state of the host, which tests replace.
trait Environment {
    fn now(&mut self) -> Instant;
    fn pause(&mut self, time: Duration);
    /// Returns the processes that prevent this device from being opened.
    fn owner(&mut self, device: &str) -> Owner;
    /// Returns text about a base address register that the device has lost; none if it has lost none.
    fn lost_bar(&mut self, device: &str) -> Option<String>;
    fn warn(&mut self, line: String);
}

fn retry<T>(
    timeout: Duration,
    env: &mut impl Environment,
    mut attempt: impl FnMut() -> passgate_backends::Result<T>,
) -> Result<T> {
    let until = env.now() + timeout;
    let (mut pause, mut warned) = (FIRST_BACKOFF, BTreeSet::new());
    loop {
        let error = match attempt() {
            Ok(acquired) => return Ok(acquired),
            Err(error) => error,
        };
        let Some((device, source)) = error.taken() else { return Err(error.into()) };
        let owner = env.owner(device);
        let remedy = owner.remedy(device, source);
        // The device was opened and is closed again, so nothing will restore its configuration any more: a retry is useless.
        if failed_after_open(source)
            && let Some(lost) = env.lost_bar(device)
        {
            return Err(Error::Taken {
                device: device.to_owned(),
                source,
                remedy: format!("{lost}; {remedy}"),
            });
        }
        let remaining = until.saturating_duration_since(env.now());
        if remaining.is_zero() {
            return Err(Error::Taken { device: device.to_owned(), source, remedy });
        }
        // Once for each device: one that other processes open in turn must not fill the journal.
        if warned.insert(device.to_owned()) {
            let seconds = remaining.as_secs_f64().ceil();
            env.warn(format!("{device}: {source}; {}; trying again for {seconds} s", owner.describe()));
        }
        env.pause(pause.min(remaining));
        pause = (pause * 2).min(MAX_BACKOFF);
    }
}

/// The host that this process runs on.
#[derive(Debug)]
struct ThisHost;

impl Environment for ThisHost {
    fn now(&mut self) -> Instant {
        Instant::now()
    }

    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }

    fn owner(&mut self, device: &str) -> Owner {
        let found = device.parse().ok().and_then(|address| PciDevice::find(Path::new(SYSFS), address));
        let holders = Holders::scan(Path::new("/proc"));
        found.map(|found| holders.of_group(Path::new(SYSFS), &found)).unwrap_or_default()
    }

    fn lost_bar(&mut self, device: &str) -> Option<String> {
        config::find_lost_bar(&PciDevice::find(Path::new(SYSFS), device.parse().ok()?)?)
    }

    fn warn(&mut self, line: String) {
        log::warn!("{line}");
    }
}

/// Returns true if the call that failed follows a successful open, which only one process can have: then no other process has
/// the device. Every other error (EBUSY, EINVAL, EAGAIN) means that another process has it, or that it is being reset.
fn failed_after_open(source: Failed) -> bool {
    source.errno == Errno::TIMEDOUT
}

impl Owner {
    /// Returns text about the processes that have the device.
    pub fn describe(&self) -> String {
        match (&self.processes[..], &self.possible[..], self.incomplete) {
            ([], [], Some(blind)) => format!("who has it cannot be seen: {}", blind.describe()),
            ([], [], None) => "no process is seen to have it".to_owned(),
            ([], possible, _) => format!("{} has a VFIO device, perhaps this one", processes(possible)),
            (known, ..) => format!("{} has it", processes(known)),
        }
    }

    /// Returns the same text with the remedy. The removal of the device from the bus is proposed only if it is certain
    /// that no process has it open: else the kernel would wait for that process.
    fn remedy(&self, device: &str, source: Failed) -> String {
        let text = self.describe();
        match (&self.processes[..], &self.possible[..]) {
            ([], []) if failed_after_open(source) => format!(
                "it opens, so that nobody else has it, and does not work: take it off the bus and have it found again \
                 (echo 1 > /sys/bus/pci/devices/{device}/remove; echo 1 > /sys/bus/pci/rescan), then bind it to \
                 vfio-pci (docs/guide/serve.md)"
            ),
            ([], []) if self.incomplete.is_some() => format!("{text}, then stop it; nothing was reset"),
            ([], []) => format!(
                "{text}: the kernel may still be closing it, or its descriptor waits in a socket or is registered with \
                 io_uring; stop what used it last; nothing was reset"
            ),
            _ => format!("{text}: stop that process"),
        }
    }
}

/// Returns text about the first of the processes, and the number of further ones.
fn processes(all: &[Process]) -> String {
    let Some(first) = all.first() else { return String::new() };
    let more = if all.len() > 1 { format!(" (and {} more)", all.len() - 1) } else { String::new() };
    format!("process {} (`{}`){more}", first.pid, first.command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::visibility::Blind;

    const DEVICE: &str = "0000:04:00.0";

    /// A host on which time passes only in pauses.
    struct FakeEnvironment {
        now: Instant,
        owner: Owner,
        lost: Option<&'static str>,
        warnings: Vec<String>,
    }

    impl FakeEnvironment {
        fn new(owner: Owner) -> Self {
            Self { now: Instant::now(), owner, lost: None, warnings: Vec::new() }
        }
    }

    impl Environment for FakeEnvironment {
        fn now(&mut self) -> Instant {
            self.now
        }
        fn pause(&mut self, time: Duration) {
            assert!(!time.is_zero());
            self.now += time;
        }
        fn owner(&mut self, device: &str) -> Owner {
            assert_eq!(device, DEVICE);
            self.owner.clone()
        }
        fn lost_bar(&mut self, _: &str) -> Option<String> {
            self.lost.map(str::to_owned)
        }
        fn warn(&mut self, line: String) {
            self.warnings.push(line);
        }
    }

    fn failing(call: &'static str, errno: Errno) -> passgate_backends::Error {
        passgate_backends::Error::Device {
            device: DEVICE.into(),
            source: Failed::new(call, errno),
            remedy: "",
        }
    }

    fn busy_owner() -> Owner {
        let process = |pid, command: &str| Process { pid, command: command.to_owned() };
        Owner { processes: vec![process(57, "qemu -device vfio"), process(60, "x")], ..Owner::default() }
    }

    const BIND: &str = "VFIO_DEVICE_BIND_IOMMUFD";
    const TIMEOUT: Duration = Duration::from_secs(30);

    #[test]
    fn device_that_becomes_free_is_acquired_and_holder_is_logged_once() {
        let (mut env, mut tries) = (FakeEnvironment::new(busy_owner()), 0);
        let acquired = retry(TIMEOUT, &mut env, || {
            tries += 1;
            if tries < 9 {
                Err(failing(BIND, [Errno::INVAL, Errno::BUSY, Errno::AGAIN][tries % 3]))
            } else {
                Ok(tries)
            }
        });
        assert_eq!(acquired.unwrap(), 9);
        let [warning] = &env.warnings[..] else { panic!("{:?}", env.warnings) };
        assert!(
            warning.contains("0000:04:00.0")
                && warning.contains("process 57 (`qemu -device vfio`) (and 1 more) has it")
        );
    }

    #[test]
    fn device_that_stays_busy_is_refused_with_holder_after_timeout() {
        for timeout in [TIMEOUT, Duration::ZERO] {
            let mut env = FakeEnvironment::new(busy_owner());
            let started = env.now;
            let error = retry(timeout, &mut env, || Err::<(), _>(failing(BIND, Errno::INVAL))).unwrap_err();
            assert_eq!(env.now - started, timeout);
            assert_eq!(env.warnings.len(), usize::from(!timeout.is_zero()));
            let text = error.to_string();
            assert!(text.starts_with("0000:04:00.0: VFIO_DEVICE_BIND_IOMMUFD"), "{text}");
            assert!(
                text.ends_with("process 57 (`qemu -device vfio`) (and 1 more) has it: stop that process"),
                "{text}"
            );
            assert_eq!((error.exit_code(), text.lines().count()), (3, 1));
        }
    }

    /// The error of the kernel decides that a device is in use, and not a list of processes, which may be empty.
    #[test]
    fn device_that_does_not_open_is_in_use_although_no_process_is_visible() {
        for (call, errno) in
            [("open /dev/vfio/GROUP", Errno::BUSY), (BIND, Errno::INVAL), (BIND, Errno::AGAIN)]
        {
            let (mut env, mut tries) = (
                FakeEnvironment { lost: Some("BAR 0 is lost"), ..FakeEnvironment::new(Owner::default()) },
                0,
            );
            let error = retry(TIMEOUT, &mut env, || {
                tries += 1;
                Err::<(), _>(failing(call, errno))
            });
            let text = error.unwrap_err().to_string();
            assert!(tries > 10 && tries < 60, "{tries}");
            assert!(
                text.contains("no process is seen to have it: the kernel may still be closing it"),
                "{text}"
            );
            assert!(
                !text.contains("remove") && !text.contains("BAR 0"),
                "the kernel would wait for it: {text}"
            );
            assert!(text.ends_with("nothing was reset"), "{text}");
        }
    }

    #[test]
    fn device_that_opens_but_does_not_work_is_reported_with_lost_bar_and_remedy() {
        for (lost, waited) in [(None, TIMEOUT), (Some("BAR 0 is lost"), Duration::ZERO)] {
            let mut env = FakeEnvironment { lost, ..FakeEnvironment::new(Owner::default()) };
            let started = env.now;
            let stuck = "writing to the PHY of an igb NIC";
            let error = retry(TIMEOUT, &mut env, || Err::<(), _>(failing(stuck, Errno::TIMEDOUT)));
            let text = error.unwrap_err().to_string();
            assert_eq!(env.now - started, waited, "a lost configuration does not come back");
            let expected = format!(
                "{}it opens, so that nobody else has it",
                lost.map_or(String::new(), |it| format!("{it}; "))
            );
            assert!(text.contains(&expected), "{text}");
            assert!(
                text.contains(
                    "echo 1 > /sys/bus/pci/devices/0000:04:00.0/remove; echo 1 > /sys/bus/pci/rescan"
                ),
                "{text}"
            );
        }
    }

    #[test]
    fn invisible_holder_is_reported_as_unknown() {
        let unnamed = Owner { possible: busy_owner().processes, ..Owner::default() };
        let hidden = Owner { incomplete: Some(Blind::Namespace), ..Owner::default() };
        for (owner, expected) in [
            (unnamed, "process 57 (`qemu -device vfio`)"),
            (hidden, "who has it cannot be seen: processes outside this PID namespace cannot be seen"),
        ] {
            let mut env = FakeEnvironment::new(owner);
            let error = retry(TIMEOUT, &mut env, || Err::<(), _>(failing(BIND, Errno::BUSY))).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(expected) && !text.contains("remove"), "{text}");
        }
    }

    #[test]
    fn error_that_retrying_cannot_mend_is_returned_at_once() {
        let (mut env, mut tries) = (FakeEnvironment::new(busy_owner()), 0);
        let error = retry(TIMEOUT, &mut env, || {
            tries += 1;
            Err::<(), _>(failing(BIND, Errno::PERM))
        });
        assert!(matches!(error, Err(Error::Backend(_))));
        assert_eq!((tries, env.warnings.len()), (1, 0));
    }
}
