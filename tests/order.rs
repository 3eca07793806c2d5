//! Order against KVM's failure: what an end says of a conversion that KVM really refused is what becomes of the range.
//!
//! Real KVM, real guest_memfd, a daemon in this process with a software device. The same on a VM with private memory
//! is `minimal-vmm --fail-attributes`, which runs in the machine tier.

#![allow(clippy::unwrap_used)] // what is not as it should be fails the test

#[path = "common/skip.rs"]
mod skip;

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kvm_ioctls::VmFd;
use passgate::Error;
use passgate::client::{AddMemory, Answer, Channel, Client, Event, Outcome, PageState};
use passgate::serve::{Handle, Options, Server};
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::guest_memfd::{self, Conversion};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Failed, Gpa, PAGE, PageRange};
use rustix::io::Errno;
use tempfile::TempDir;

const DEVICE: &str = "soft:0";
const PAGES: u64 = 4;
/// The page that is converted; the others are its neighbours.
const PAGE_1: u64 = PAGE;
/// Where the same file is seen a second time.
const ALIAS: u64 = 0x100_0000;
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A VM, its memory, and the daemon that knows of both.
struct Setup {
    client: Client,
    channel: Channel,
    /// A second client, which owns nothing.
    other: Client,
    vm: VmFd,
    file: GuestFile,
    daemon: Handle,
    _directory: TempDir,
}

impl Setup {
    /// Every page holds its number, plus 100. None where there is no guest_memfd here.
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

    /// Begins on the page, and has KVM refuse.
    fn begin_and_fail(&mut self) -> (u64, Failed) {
        let Answer::Granted { invalidation } =
            self.channel.begin(page(PAGE_1), PageState::Private, Some(20_000)).unwrap()
        else {
            panic!("not granted");
        };
        assert_eq!(self.dma(PAGE_1), None, "between begin and end");
        let failed = guest_memfd::set_attributes(&self.vm, page(PAGE_1), Conversion::ToPrivate).unwrap_err();
        // EINVAL from a kernel that has private memory for other types of VM, ENOTTY from one that has none.
        assert!([Errno::INVAL, Errno::NOTTY].contains(&failed.errno), "{failed}");
        (invalidation, failed)
    }

    /// Begins, fails, and says that nobody knows.
    fn lose(&mut self) {
        let (invalidation, failed) = self.begin_and_fail();
        let outcome = Outcome::Unknown { errno: failed.errno.raw_os_error(), offset: 0 };
        self.channel.end(invalidation, outcome).unwrap();
    }

    /// Everything that is told from now on.
    fn listen(&self) -> Receiver<Event> {
        let events = Client::connect(self.daemon.path()).unwrap().subscribe().unwrap();
        let (tell, told) = channel();
        std::thread::spawn(move || events.map_while(Result::ok).try_for_each(|event| tell.send(event)));
        told
    }
}

fn page(gpa: u64) -> PageRange<Gpa> {
    PageRange::new(gpa, PAGE).unwrap()
}

/// What the device reads at `gpa`; none where that faults.
fn dma(client: &mut Client, gpa: u64) -> Option<u64> {
    match client.dma_read(DEVICE, gpa, 8) {
        Ok(bytes) => Some(u64::from_le_bytes(bytes.try_into().unwrap())),
        Err(Error::Refused { errno, .. }) if errno == Errno::FAULT.raw_os_error() => None,
        Err(error) => panic!("{error}"),
    }
}

/// The next notice of that name.
fn wait_for(told: &Receiver<Event>, name: &str) -> Event {
    loop {
        let event = told.recv_timeout(PATIENCE).unwrap();
        if event.event == name {
            return event;
        }
    }
}

/// Asserts that a begin is refused because of quarantine.
fn is_quarantined(channel: &mut Channel, range: PageRange<Gpa>) {
    for to in [PageState::Private, PageState::Shared] {
        match channel.begin(range, to, None) {
            Err(Error::Refused { errno, .. }) => assert_eq!(errno, Errno::IO.raw_os_error()),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_unknown_outcome_leaves_the_range_in_quarantine() {
    let Some(mut setup) = Setup::new() else { return };
    let told = setup.listen();
    setup.lose();

    let event = wait_for(&told, "range.quarantined");
    assert_eq!((event.details["gpa"].as_u64(), event.details["length"].as_u64()), (Some(PAGE_1), Some(PAGE)));
    assert_eq!(event.details["cause"], "owner-unknown");
    let invalidation = event.details["invalidation"].as_u64().unwrap();

    let status = setup.other.status().unwrap();
    let [quarantined] = &status.quarantine[..] else { panic!("{:?}", status.quarantine) };
    assert_eq!((quarantined.gpa, quarantined.offset, quarantined.length), (Some(PAGE_1), PAGE_1, PAGE));
    assert_eq!((quarantined.cause.as_str(), quarantined.invalidation), ("owner-unknown", invalidation));
    assert_eq!((status.open, status.regions[0].unknown), (0, PAGE));

    // The evidence is KVM's own.
    let receipt = setup.other.explain(invalidation).unwrap();
    let errno = receipt["outcome"]["unknown"]["errno"].as_i64();
    assert!([Errno::INVAL, Errno::NOTTY].map(|errno| Some(errno.raw_os_error().into())).contains(&errno));

    is_quarantined(&mut setup.channel, page(PAGE_1));
    is_quarantined(&mut setup.other.open_channel().unwrap(), page(PAGE_1));
    assert_eq!(setup.dma(PAGE_1), None);
    assert_eq!((setup.dma(0), setup.dma(2 * PAGE)), (Some(100), Some(102)), "the neighbours");
    // What nobody knows to be gone is as it was: passgate has not touched the file.
    assert_eq!(setup.file.load(PAGE_1).unwrap(), 101);
}

#[test]
fn a_conversion_that_was_not_committed_is_undone() {
    let Some(mut setup) = Setup::new() else { return };
    for _ in 0..3 {
        let (invalidation, _) = setup.begin_and_fail();
        setup.channel.end(invalidation, Outcome::NotCommitted).unwrap();
        assert_eq!(setup.dma(PAGE_1), Some(101));
    }
    let status = setup.other.status().unwrap();
    assert_eq!((status.quarantine.len(), status.open), (0, 0));
    assert_eq!((status.regions[0].shared, status.regions[0].unknown), (PAGES * PAGE, 0));
    // And an end counts once.
    let (invalidation, _) = setup.begin_and_fail();
    setup.channel.end(invalidation, Outcome::NotCommitted).unwrap();
    assert!(matches!(
        setup.channel.end(invalidation, Outcome::Committed),
        Err(Error::Refused { errno, .. }) if errno == Errno::NOENT.raw_os_error()
    ));
    assert_eq!(setup.dma(PAGE_1), Some(101));
}

#[test]
fn a_client_that_dies_between_begin_and_end_leaves_the_range_unknown() {
    let Some(mut setup) = Setup::new() else { return };
    let told = setup.listen();
    // Another client has the same file, elsewhere.
    let mut heir = Client::connect(setup.daemon.path()).unwrap();
    heir.add_memory(&AddMemory::shared(ALIAS, PAGES * PAGE), &[&setup.file]).unwrap();
    assert_eq!(setup.dma(ALIAS + PAGE_1), Some(101));
    setup.begin_and_fail();
    assert_eq!(setup.dma(ALIAS + PAGE_1), None, "one begin covers every alias");

    // Control socket and channel go, as they do when the process dies.
    let Setup { client, channel, mut other, file, daemon: _daemon, _directory, .. } = setup;
    drop((client, channel));
    let event = wait_for(&told, "range.quarantined");
    assert_eq!(event.details["cause"], "client-gone");
    assert_eq!(event.details["offset"].as_u64(), Some(PAGE_1));
    wait_for(&told, "session.closed");

    let status = other.status().unwrap();
    let [quarantined] = &status.quarantine[..] else { panic!("{:?}", status.quarantine) };
    assert_eq!((quarantined.offset, quarantined.length), (PAGE_1, PAGE));
    assert_eq!(quarantined.cause, "client-gone");
    is_quarantined(&mut heir.open_channel().unwrap(), page(ALIAS + PAGE_1));
    assert_eq!(dma(&mut other, ALIAS + PAGE_1), None);
    assert_eq!(dma(&mut other, ALIAS), Some(100), "the other client's neighbours");
    // Memory that comes after the quarantine, where the dead client's was.
    heir.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&file]).unwrap();
    assert_eq!(dma(&mut other, 2 * PAGE), Some(102));
    assert_eq!(dma(&mut other, PAGE_1), None);
}

#[test]
fn quarantine_is_of_the_file_and_holds_at_every_alias() {
    let Some(mut setup) = Setup::new() else { return };
    setup.lose();
    // A second region of the file, and a third by another client: both come, less the page of which nobody knows.
    setup.client.add_memory(&AddMemory::shared(ALIAS, PAGES * PAGE), &[&setup.file]).unwrap();
    setup.other.add_memory(&AddMemory::shared(2 * ALIAS, PAGES * PAGE), &[&setup.file]).unwrap();
    for alias in [ALIAS, 2 * ALIAS] {
        assert_eq!(setup.dma(alias + PAGE_1), None);
        assert_eq!((setup.dma(alias), setup.dma(alias + 2 * PAGE)), (Some(100), Some(102)));
        is_quarantined(&mut setup.channel, page(alias + PAGE_1));
    }
    // Nor does a conversion of the neighbours bring it back.
    for to in [PageState::Private, PageState::Shared] {
        let Answer::Granted { invalidation } = setup.channel.begin(page(ALIAS), to, None).unwrap() else {
            panic!("not granted");
        };
        setup.channel.end(invalidation, Outcome::Committed).unwrap();
    }
    assert_eq!(setup.dma(ALIAS), Some(100));
    assert_eq!((setup.dma(PAGE_1), setup.dma(ALIAS + PAGE_1)), (None, None));
    assert_eq!(setup.client.status().unwrap().quarantine.iter().map(|q| q.length).max(), Some(PAGE));
}
