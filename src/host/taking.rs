//! Taking devices that somebody may still have, without a reboot.
//!
//! After a crash a device may be another's for a moment: the guardian of the daemon that died is stopping it, the
//! kernel is closing its files, it is being reset. So what is taken is tried again for a while; who has it is said
//! once, and a device that nobody has is reset after each failed try. What is still not free then is told with its
//! holder, and with what to do.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use passgate_backends::Tables;
use passgate_backends::assign::{Accept, Assignment, Kind, assign};
use passgate_bindings::vfio::pci::{PciDevice, SYSFS};

use super::holder::{Holders, Owner, Process};
use crate::error::{Error, Result};

/// The first pause between two tries, and the longest: each is twice the one before.
const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(1);

/// Assigns the devices; one that is taken is tried again for as long as `patience`.
pub fn take(
    kind: Kind,
    devices: &[String],
    accept: Accept,
    tables: Tables,
    patience: Duration,
) -> Result<Assignment> {
    persist(patience, &mut ThisHost, || assign(kind, devices, accept, tables))
}

/// What persisting needs to know and to do.
trait Host {
    fn now(&mut self) -> Instant;
    fn pause(&mut self, time: Duration);
    /// Who keeps this device from us.
    fn owner(&mut self, device: &str) -> Owner;
    /// Resets a device that nobody has, where it has a reset.
    fn reset(&mut self, device: &str);
    fn say(&mut self, line: String);
}

fn persist<T>(
    patience: Duration,
    host: &mut impl Host,
    mut attempt: impl FnMut() -> passgate_backends::Result<T>,
) -> Result<T> {
    let until = host.now() + patience;
    let (mut pause, mut said) = (FIRST, BTreeSet::new());
    loop {
        let error = match attempt() {
            Ok(taken) => return Ok(taken),
            Err(error) => error,
        };
        let Some((device, source)) = error.taken() else { return Err(error.into()) };
        let owner = host.owner(device);
        let left = until.saturating_duration_since(host.now());
        if left.is_zero() {
            return Err(Error::Taken { device: device.to_owned(), source, mend: owner.mend(device) });
        }
        // Once for each device: a device that changes hands all the time must not fill the journal.
        if said.insert(device.to_owned()) {
            let seconds = left.as_secs_f64().ceil();
            host.say(format!("{device}: {source}; {}; trying again for {seconds} s", owner.words()));
        }
        if owner.is_nobody() {
            host.reset(device);
        }
        host.pause(pause.min(left));
        pause = (pause * 2).min(LONGEST);
    }
}

/// This host.
#[derive(Debug)]
struct ThisHost;

impl Host for ThisHost {
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

    fn reset(&mut self, device: &str) {
        let Ok(address) = device.parse() else { return };
        let Some(found) = PciDevice::find(Path::new(SYSFS), address) else { return };
        match fs::write(found.dir().join("reset"), "1") {
            Ok(()) => log::info!("{device}: reset"),
            Err(error) => log::debug!("{device}: not reset: {error}"),
        }
    }

    fn say(&mut self, line: String) {
        log::warn!("{line}");
    }
}

impl Owner {
    /// Whether for certain no process has it.
    fn is_nobody(&self) -> bool {
        self.processes.is_empty() && self.perhaps.is_empty() && !self.unseen
    }

    /// Who has it, in words.
    pub fn words(&self) -> String {
        match (&self.processes[..], &self.perhaps[..]) {
            ([], []) if self.unseen => "another process has it, which this user may not see".to_owned(),
            ([], []) => "no process has it".to_owned(),
            ([], perhaps) => format!("{} has a VFIO device, perhaps this one", processes(perhaps)),
            (known, _) => format!("{} has it", processes(known)),
        }
    }

    /// The same, and what to do about it.
    fn mend(&self, device: &str) -> String {
        let words = self.words();
        if self.is_nobody() {
            return format!(
                "{words}: take it off the bus and have it found again (echo 1 > /sys/bus/pci/devices/{device}/remove; \
                 echo 1 > /sys/bus/pci/rescan), then bind it to vfio-pci (docs/guide/serve.md)"
            );
        }
        if self.processes.is_empty() && self.perhaps.is_empty() {
            return format!("{words}: `passgate list` as root names it; stop it");
        }
        format!("{words}: stop that process")
    }
}

/// The first of them, and how many there are more.
fn processes(all: &[Process]) -> String {
    let Some(first) = all.first() else { return String::new() };
    let more = if all.len() > 1 { format!(" (and {} more)", all.len() - 1) } else { String::new() };
    format!("process {} (`{}`){more}", first.pid, first.command)
}

#[cfg(test)]
mod tests {
    use passgate_bindings::Failed;
    use rustix::io::Errno;

    use super::*;

    const DEVICE: &str = "0000:04:00.0";

    /// A host whose time passes in pauses only.
    struct Fake {
        now: Instant,
        owner: Owner,
        resets: usize,
        said: Vec<String>,
    }

    impl Fake {
        fn new(owner: Owner) -> Self {
            Self { now: Instant::now(), owner, resets: 0, said: Vec::new() }
        }
    }

    impl Host for Fake {
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
        fn reset(&mut self, _: &str) {
            self.resets += 1;
        }
        fn say(&mut self, line: String) {
            self.said.push(line);
        }
    }

    fn failing(call: &'static str, errno: Errno) -> passgate_backends::Error {
        passgate_backends::Error::Device { device: DEVICE.into(), source: Failed::new(call, errno), mend: "" }
    }

    fn held() -> Owner {
        let process = |pid, command: &str| Process { pid, command: command.to_owned() };
        Owner { processes: vec![process(57, "qemu -device vfio"), process(60, "x")], ..Owner::default() }
    }

    const BIND: &str = "VFIO_DEVICE_BIND_IOMMUFD";
    const PATIENCE: Duration = Duration::from_secs(30);

    #[test]
    fn a_device_that_becomes_free_is_taken_and_its_holder_was_named_once() {
        let (mut host, mut tries) = (Fake::new(held()), 0);
        let taken = persist(PATIENCE, &mut host, || {
            tries += 1;
            if tries < 9 {
                Err(failing(BIND, [Errno::INVAL, Errno::BUSY, Errno::AGAIN][tries % 3]))
            } else {
                Ok(tries)
            }
        });
        assert_eq!(taken.unwrap(), 9);
        assert_eq!(host.resets, 0, "what a process has is never reset");
        let [said] = &host.said[..] else { panic!("{:?}", host.said) };
        assert!(
            said.contains("0000:04:00.0")
                && said.contains("process 57 (`qemu -device vfio`) (and 1 more) has it")
        );
    }

    #[test]
    fn a_device_that_is_never_free_is_told_with_its_holder_when_patience_ends() {
        for patience in [PATIENCE, Duration::ZERO] {
            let mut host = Fake::new(held());
            let begun = host.now;
            let error =
                persist(patience, &mut host, || Err::<(), _>(failing(BIND, Errno::INVAL))).unwrap_err();
            assert_eq!(host.now - begun, patience);
            assert_eq!(host.said.len(), usize::from(!patience.is_zero()));
            let text = error.to_string();
            assert!(text.starts_with("0000:04:00.0: VFIO_DEVICE_BIND_IOMMUFD"), "{text}");
            assert!(
                text.ends_with("process 57 (`qemu -device vfio`) (and 1 more) has it: stop that process"),
                "{text}"
            );
            assert_eq!((error.exit_code(), text.lines().count()), (3, 1));
        }
    }

    #[test]
    fn a_device_that_nobody_has_is_reset_after_each_try_and_then_the_way_out_is_told() {
        let (mut host, mut tries) = (Fake::new(Owner::default()), 0);
        let error = persist(PATIENCE, &mut host, || {
            tries += 1;
            Err::<(), _>(failing("open /dev/vfio/GROUP", Errno::BUSY))
        });
        let text = error.unwrap_err().to_string();
        assert_eq!(host.resets, tries - 1);
        assert!(tries > 10 && tries < 60, "{tries}");
        assert!(text.contains("no process has it: take it off the bus"), "{text}");
        assert!(
            text.contains("echo 1 > /sys/bus/pci/devices/0000:04:00.0/remove; echo 1 > /sys/bus/pci/rescan")
        );
    }

    #[test]
    fn where_not_everybody_can_be_seen_nothing_is_reset() {
        let nameless = Owner { perhaps: held().processes, ..Owner::default() };
        let hidden = Owner { unseen: true, ..Owner::default() };
        for (owner, says) in
            [(nameless, "process 57 (`qemu -device vfio`)"), (hidden, "`passgate list` as root")]
        {
            let mut host = Fake::new(owner);
            let error =
                persist(PATIENCE, &mut host, || Err::<(), _>(failing(BIND, Errno::BUSY))).unwrap_err();
            assert_eq!(host.resets, 0);
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn what_waiting_does_not_mend_is_told_at_once() {
        let (mut host, mut tries) = (Fake::new(held()), 0);
        let error = persist(PATIENCE, &mut host, || {
            tries += 1;
            Err::<(), _>(failing(BIND, Errno::PERM))
        });
        assert!(matches!(error, Err(Error::Backend(_))));
        assert_eq!((tries, host.said.len()), (1, 0));
    }
}
