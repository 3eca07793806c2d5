//! Taking devices that somebody may still have, without a reboot.
//!
//! After a crash a device may be another's for a moment: the guardian of the daemon that died is stopping it, the
//! kernel is closing its files, it is being reset. So what is taken is tried again for a while, and who has it is said
//! once. What is still not free then is told with its holder, and with what to do.
//!
//! Nothing is reset here. Opening a device by VFIO resets it, and from then on it is ours; a device that does not open
//! is somebody's, also where no process is found that has it: outside the initial PID namespace none can be found,
//! descriptors lie in sockets and io_uring tables, and the kernel closes a device long after the process is gone. A
//! reset by sysfs that meets that close ruins the device: vfio-pci restores the configuration outside the device's
//! lock, so that the reset may save, and restore for ever, the empty configuration that follows a function level reset
//! (`vfio_pci_core_disable`, drivers/vfio/pci/vfio_pci_core.c).

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use passgate_backends::Tables;
use passgate_backends::assign::{Accept, Assignment, Kind, assign};
use passgate_bindings::Failed;
use passgate_bindings::vfio::pci::{PciDevice, SYSFS};
use rustix::io::Errno;

use super::config;
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
    /// What its configuration has lost, where it has.
    fn lost(&mut self, device: &str) -> Option<String>;
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
        let mend = owner.mend(device, source);
        // What was opened is closed again, and nobody restores a configuration after that.
        if opened_it(source)
            && let Some(lost) = host.lost(device)
        {
            return Err(Error::Taken { device: device.to_owned(), source, mend: format!("{lost}; {mend}") });
        }
        let left = until.saturating_duration_since(host.now());
        if left.is_zero() {
            return Err(Error::Taken { device: device.to_owned(), source, mend });
        }
        // Once for each device: a device that changes hands all the time must not fill the journal.
        if said.insert(device.to_owned()) {
            let seconds = left.as_secs_f64().ceil();
            host.say(format!("{device}: {source}; {}; trying again for {seconds} s", owner.words()));
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

    fn lost(&mut self, device: &str) -> Option<String> {
        config::lost(&PciDevice::find(Path::new(SYSFS), device.parse().ok()?)?)
    }

    fn say(&mut self, line: String) {
        log::warn!("{line}");
    }
}

/// True where the call that failed follows an open that only one process can have: then nobody else has the device.
/// Every other answer (EBUSY, EINVAL, EAGAIN) says that somebody has it, or is resetting it.
fn opened_it(source: Failed) -> bool {
    source.errno == Errno::TIMEDOUT
}

impl Owner {
    /// Who has it, in words.
    pub fn words(&self) -> String {
        match (&self.processes[..], &self.perhaps[..], self.unseen) {
            ([], [], Some(blind)) => format!("who has it cannot be seen: {}", blind.words()),
            ([], [], None) => "no process is seen to have it".to_owned(),
            ([], perhaps, _) => format!("{} has a VFIO device, perhaps this one", processes(perhaps)),
            (known, ..) => format!("{} has it", processes(known)),
        }
    }

    /// The same, and what to do about it. A device is taken off the bus only where it is certain that nobody has it:
    /// the kernel would wait for whoever does.
    fn mend(&self, device: &str, source: Failed) -> String {
        let words = self.words();
        match (&self.processes[..], &self.perhaps[..]) {
            ([], []) if opened_it(source) => format!(
                "it opens, so that nobody else has it, and does not work: take it off the bus and have it found again \
                 (echo 1 > /sys/bus/pci/devices/{device}/remove; echo 1 > /sys/bus/pci/rescan), then bind it to \
                 vfio-pci (docs/guide/serve.md)"
            ),
            ([], []) if self.unseen.is_some() => format!("{words}, then stop it; nothing was reset"),
            ([], []) => format!(
                "{words}: the kernel may still be closing it, or its descriptor waits in a socket or is registered with \
                 io_uring; stop what used it last; nothing was reset"
            ),
            _ => format!("{words}: stop that process"),
        }
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
    use super::*;
    use crate::host::sight::Blind;

    const DEVICE: &str = "0000:04:00.0";

    /// A host whose time passes in pauses only.
    struct Fake {
        now: Instant,
        owner: Owner,
        lost: Option<&'static str>,
        said: Vec<String>,
    }

    impl Fake {
        fn new(owner: Owner) -> Self {
            Self { now: Instant::now(), owner, lost: None, said: Vec::new() }
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
        fn lost(&mut self, _: &str) -> Option<String> {
            self.lost.map(str::to_owned)
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

    /// The kernel's answer, and not an empty list of processes, says whether somebody has a device.
    #[test]
    fn a_device_that_does_not_open_is_somebodys_although_no_process_is_seen() {
        for (call, errno) in
            [("open /dev/vfio/GROUP", Errno::BUSY), (BIND, Errno::INVAL), (BIND, Errno::AGAIN)]
        {
            let (mut host, mut tries) =
                (Fake { lost: Some("BAR 0 is lost"), ..Fake::new(Owner::default()) }, 0);
            let error = persist(PATIENCE, &mut host, || {
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
    fn a_device_that_opens_and_does_not_work_is_told_with_what_it_lost_and_the_way_out() {
        for (lost, waited) in [(None, PATIENCE), (Some("BAR 0 is lost"), Duration::ZERO)] {
            let mut host = Fake { lost, ..Fake::new(Owner::default()) };
            let begun = host.now;
            let stuck = "writing to the PHY of an igb NIC";
            let error = persist(PATIENCE, &mut host, || Err::<(), _>(failing(stuck, Errno::TIMEDOUT)));
            let text = error.unwrap_err().to_string();
            assert_eq!(host.now - begun, waited, "a lost configuration does not come back");
            let says = format!(
                "{}it opens, so that nobody else has it",
                lost.map_or(String::new(), |it| format!("{it}; "))
            );
            assert!(text.contains(&says), "{text}");
            assert!(
                text.contains(
                    "echo 1 > /sys/bus/pci/devices/0000:04:00.0/remove; echo 1 > /sys/bus/pci/rescan"
                ),
                "{text}"
            );
        }
    }

    #[test]
    fn who_cannot_be_seen_is_not_nobody() {
        let nameless = Owner { perhaps: held().processes, ..Owner::default() };
        let hidden = Owner { unseen: Some(Blind::Namespace), ..Owner::default() };
        for (owner, says) in [
            (nameless, "process 57 (`qemu -device vfio`)"),
            (hidden, "who has it cannot be seen: processes outside this PID namespace cannot be seen"),
        ] {
            let mut host = Fake::new(owner);
            let error =
                persist(PATIENCE, &mut host, || Err::<(), _>(failing(BIND, Errno::BUSY))).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(says) && !text.contains("remove"), "{text}");
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
