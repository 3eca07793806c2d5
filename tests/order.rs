//! Conversions that KVM refuses: the outcome that the client reports at the end decides the state of the range.
//!
//! Real KVM, real guest_memfd, a daemon in this process with a software device. `minimal-vmm --fail-attributes`, which runs in
//! the machine tier, does the same on a VM with private memory.

#![allow(clippy::unwrap_used)] // a panic fails the test

#[path = "common/skip.rs"]
mod skip;

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kvm_ioctls::VmFd;
use passgate::serve::{Handle, Options, Server};
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::guest_memfd::{self, Conversion};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Failed, Gpa, PAGE, PageRange};
use passgate_client::{AddMemory, Answer, Channel, Client, Error, Event, Outcome, PageState};
use rustix::io::Errno;
use tempfile::TempDir;

const DEVICE: &str = "soft:0";
const PAGES: u64 = 4;
/// The guest-physical address of the page that is converted; the other pages are its neighbours.
const CONVERTED_GPA: u64 = PAGE;
/// The guest-physical address at which a second region shows the same file.
const ALIAS_GPA: u64 = 0x100_0000;
/// The maximum time to wait for an event: longer than any of them takes.
const EVENT_TIMEOUT: Duration = Duration::from_secs(60);

/// A VM, its memory, and a daemon with that memory.
struct Setup {
    client: Client,
    channel: Channel,
    /// A second client, which owns no memory.
    other: Client,
    vm: VmFd,
    file: GuestFile,
    daemon: Handle,
    _directory: TempDir,
}

impl Setup {
    /// Returns a VM whose pages each contain their number plus 100; none if this host has no guest_memfd.
    fn new() -> Option<Self> {
        let (vm, file) = guest_memfd::shared(PAGES * PAGE).map_err(skip::skip).ok()?;
        for page in 0..PAGES {
            file.store(page * PAGE, page + 100).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let domain = match SoftDomain::open() {
            Ok(domain) => domain,
            Err(why) => {
                skip::skip(why);
                return None;
            }
        };
        let device = domain.device(DEVICE).unwrap();
        let options = Options { allow_dma: true, ..Options::at(directory.path().join("socket")) };
        let daemon = Server::bind(options, domain, vec![device]).unwrap().spawn().unwrap();
        let mut client = Client::connect(daemon.path()).unwrap();
        client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&file]).unwrap();
        let channel = client.open_channel().unwrap();
        let other = Client::connect(daemon.path()).unwrap();
        let mut setup = Self { client, channel, other, vm, file, daemon, _directory: directory };
        for page in 0..PAGES {
            assert_eq!(setup.dma(page * PAGE), Some(page + 100));
        }
        Some(setup)
    }

    fn dma(&mut self, gpa: u64) -> Option<u64> {
        dma(&mut self.other, gpa)
    }

    /// Begins a conversion of the page to private and makes KVM refuse it. Returns the invalidation and KVM's error.
    fn begin_and_fail(&mut self) -> (u64, Failed) {
        let Answer::Granted { invalidation } =
            self.channel.begin(page(CONVERTED_GPA), PageState::Private, Some(20_000)).unwrap()
        else {
            panic!("not granted");
        };
        assert_eq!(self.dma(CONVERTED_GPA), None, "between begin and end");
        let failed =
            guest_memfd::set_attributes(&self.vm, page(CONVERTED_GPA), Conversion::ToPrivate).unwrap_err();
        // EINVAL from a kernel that has private memory for other types of VM, ENOTTY from one that has none.
        assert!([Errno::INVAL, Errno::NOTTY].contains(&failed.errno), "{failed}");
        (invalidation, failed)
    }

    /// Begins a conversion that KVM refuses, and ends it with an unknown outcome.
    fn end_unknown(&mut self) {
        let (invalidation, failed) = self.begin_and_fail();
        let outcome = Outcome::Unknown { errno: failed.errno.raw_os_error(), offset: 0 };
        self.channel.end(invalidation, outcome).unwrap();
    }

    /// Returns a receiver of all events from now on.
    fn subscribe_events(&self) -> Receiver<Event> {
        let events = Client::connect(self.daemon.path()).unwrap().subscribe().unwrap();
        let (sender, received) = channel();
        std::thread::spawn(move || events.map_while(Result::ok).try_for_each(|event| sender.send(event)));
        received
    }
}

fn page(gpa: u64) -> PageRange<Gpa> {
    PageRange::new(gpa, PAGE).unwrap()
}

/// Returns the word that the device reads at `gpa`; none if the DMA faults.
fn dma(client: &mut Client, gpa: u64) -> Option<u64> {
    match client.dma_read(DEVICE, gpa, 8) {
        Ok(bytes) => Some(u64::from_le_bytes(bytes.try_into().unwrap())),
        Err(Error::Refused { errno, .. }) if errno == Errno::FAULT.raw_os_error() => None,
        Err(error) => panic!("{error}"),
    }
}

/// Returns the next event with that name.
fn wait_for(received: &Receiver<Event>, name: &str) -> Event {
    loop {
        let event = received.recv_timeout(EVENT_TIMEOUT).unwrap();
        if event.event == name {
            return event;
        }
    }
}

/// Asserts that a begin over `range` is refused because it is in quarantine.
fn assert_quarantined(channel: &mut Channel, range: PageRange<Gpa>) {
    for to in [PageState::Private, PageState::Shared] {
        match channel.begin(range, to, None) {
            Ok(Answer::Quarantined { gpa }) => assert_eq!(gpa, range.start()),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn unknown_outcome_quarantines_the_range() {
    let Some(mut setup) = Setup::new() else { return };
    let received = setup.subscribe_events();
    setup.end_unknown();

    let event = wait_for(&received, "range.quarantined");
    assert_eq!(
        (event.details["gpa"].as_u64(), event.details["length"].as_u64()),
        (Some(CONVERTED_GPA), Some(PAGE))
    );
    assert_eq!(event.details["cause"], "owner-unknown");
    let invalidation = event.details["invalidation"].as_u64().unwrap();

    let status = setup.other.status().unwrap();
    let [quarantined] = &status.quarantine[..] else { panic!("{:?}", status.quarantine) };
    assert_eq!(
        (quarantined.gpa, quarantined.offset, quarantined.length),
        (Some(CONVERTED_GPA), CONVERTED_GPA, PAGE)
    );
    assert_eq!((quarantined.cause.as_str(), quarantined.invalidation), ("owner-unknown", invalidation));
    assert_eq!((status.open, status.regions[0].unknown), (0, PAGE));

    // The receipt has KVM's own errno.
    let receipt = setup.other.explain(invalidation).unwrap();
    let errno = receipt["outcome"]["unknown"]["errno"].as_i64();
    assert!([Errno::INVAL, Errno::NOTTY].map(|errno| Some(errno.raw_os_error().into())).contains(&errno));

    assert_quarantined(&mut setup.channel, page(CONVERTED_GPA));
    assert_quarantined(&mut setup.other.open_channel().unwrap(), page(CONVERTED_GPA));
    assert_eq!(setup.dma(CONVERTED_GPA), None);
    assert_eq!((setup.dma(0), setup.dma(2 * PAGE)), (Some(100), Some(102)), "the neighbours");
    // passgate has not touched the file.
    assert_eq!(setup.file.load(CONVERTED_GPA).unwrap(), 101);
}

#[test]
fn uncommitted_conversion_maps_the_range_again() {
    let Some(mut setup) = Setup::new() else { return };
    for _ in 0..3 {
        let (invalidation, _) = setup.begin_and_fail();
        setup.channel.end(invalidation, Outcome::NotCommitted).unwrap();
        assert_eq!(setup.dma(CONVERTED_GPA), Some(101));
    }
    let status = setup.other.status().unwrap();
    assert_eq!((status.quarantine.len(), status.open), (0, 0));
    assert_eq!((status.regions[0].shared, status.regions[0].unknown), (PAGES * PAGE, 0));
    // A second end is refused.
    let (invalidation, _) = setup.begin_and_fail();
    setup.channel.end(invalidation, Outcome::NotCommitted).unwrap();
    assert!(matches!(
        setup.channel.end(invalidation, Outcome::Committed),
        Err(Error::Refused { errno, .. }) if errno == Errno::NOENT.raw_os_error()
    ));
    assert_eq!(setup.dma(CONVERTED_GPA), Some(101));
}

#[test]
fn client_death_between_begin_and_end_quarantines_the_range() {
    let Some(mut setup) = Setup::new() else { return };
    let received = setup.subscribe_events();
    // Another client adds the same file at another address.
    let mut second_client = Client::connect(setup.daemon.path()).unwrap();
    second_client.add_memory(&AddMemory::shared(ALIAS_GPA, PAGES * PAGE), &[&setup.file]).unwrap();
    assert_eq!(setup.dma(ALIAS_GPA + CONVERTED_GPA), Some(101));
    setup.begin_and_fail();
    assert_eq!(setup.dma(ALIAS_GPA + CONVERTED_GPA), None, "one begin covers every alias");

    // Control socket and channel go, as they do when the process dies.
    let Setup { client, channel, mut other, file, daemon: _daemon, _directory, .. } = setup;
    drop((client, channel));
    let event = wait_for(&received, "range.quarantined");
    assert_eq!(event.details["cause"], "client-gone");
    assert_eq!(event.details["offset"].as_u64(), Some(CONVERTED_GPA));
    wait_for(&received, "session.closed");

    let status = other.status().unwrap();
    let [quarantined] = &status.quarantine[..] else { panic!("{:?}", status.quarantine) };
    assert_eq!((quarantined.offset, quarantined.length), (CONVERTED_GPA, PAGE));
    assert_eq!(quarantined.cause, "client-gone");
    assert_quarantined(&mut second_client.open_channel().unwrap(), page(ALIAS_GPA + CONVERTED_GPA));
    assert_eq!(dma(&mut other, ALIAS_GPA + CONVERTED_GPA), None);
    assert_eq!(dma(&mut other, ALIAS_GPA), Some(100), "the other client's neighbours");
    // Memory that is added after the quarantine, at the dead client's addresses.
    second_client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&file]).unwrap();
    assert_eq!(dma(&mut other, 2 * PAGE), Some(102));
    assert_eq!(dma(&mut other, CONVERTED_GPA), None);
}

#[test]
fn quarantine_covers_every_alias_of_the_file() {
    let Some(mut setup) = Setup::new() else { return };
    setup.end_unknown();
    // A second region of the file, and a third by another client: both are mapped, except for the page in quarantine.
    setup.client.add_memory(&AddMemory::shared(ALIAS_GPA, PAGES * PAGE), &[&setup.file]).unwrap();
    setup.other.add_memory(&AddMemory::shared(2 * ALIAS_GPA, PAGES * PAGE), &[&setup.file]).unwrap();
    for alias in [ALIAS_GPA, 2 * ALIAS_GPA] {
        assert_eq!(setup.dma(alias + CONVERTED_GPA), None);
        assert_eq!((setup.dma(alias), setup.dma(alias + 2 * PAGE)), (Some(100), Some(102)));
        assert_quarantined(&mut setup.channel, page(alias + CONVERTED_GPA));
    }
    // A conversion of its neighbours does not map it again.
    for to in [PageState::Private, PageState::Shared] {
        let Answer::Granted { invalidation } = setup.channel.begin(page(ALIAS_GPA), to, None).unwrap() else {
            panic!("not granted");
        };
        setup.channel.end(invalidation, Outcome::Committed).unwrap();
    }
    assert_eq!(setup.dma(ALIAS_GPA), Some(100));
    assert_eq!((setup.dma(CONVERTED_GPA), setup.dma(ALIAS_GPA + CONVERTED_GPA)), (None, None));
    assert_eq!(setup.client.status().unwrap().quarantine.iter().map(|q| q.length).max(), Some(PAGE));
}
