//! A state directory: what is written there delays nobody.

use std::os::unix::fs::MetadataExt;

use passgate::client::{AddMemory, Answer, Outcome, PageState};
use passgate::observe::keep::FILE;
use passgate::observe::records::StateOptions;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::{Iova, PAGE, PageRange};

use crate::common::fake::Hanging;
use crate::common::{PATIENT_MS, Setup, granted, memory, pages};

/// Ranges of the batch, each a page apart from the next.
const RANGES: u64 = 4096;

/// Their unmaps return one by one once they are in quarantine, and each lifts one of them, while another client converts.
#[test]
fn quarantine_of_a_batch_is_lifted_range_by_range_without_a_new_file() {
    let dir = tempfile::tempdir().unwrap();
    let batch: PageRange<Iova> = PageRange::new(0, 2 * RANGES * PAGE).unwrap();
    let mut hanging = None;
    let setup = Setup::behind(
        || SoftDomain::open().unwrap(),
        |soft| hanging.insert(Hanging::over(soft, batch)).clone(),
        |options| options.state = Some(StateOptions::at(dir.path())),
    );
    let hanging = hanging.unwrap();
    let (mut client, mut channel, _file) = setup.client(2 * RANGES);
    let (mut other, file) = (setup.connect(), memory(1));
    let mut add = AddMemory::shared(4 * RANGES * PAGE, PAGE);
    add.piece = PAGE;
    other.add_memory(&add, &[&*file]).unwrap();
    let mut beside = other.open_channel().unwrap();

    hanging.hang_unmaps();
    let ranges: Vec<_> = (0..RANGES).map(|nth| pages(2 * nth, 1)).collect();
    let answer = channel.begin_many(&ranges, PageState::Private, Some(10)).unwrap();
    assert!(matches!(answer, Answer::Unknown(_)), "{answer:?}");
    // Mappings may be larger than the pages that go.
    assert!(client.status().unwrap().quarantined >= RANGES * PAGE);
    let file = || std::fs::metadata(dir.path().join(FILE)).unwrap();
    let before = file();
    hanging.release();
    let mut converted = 0;
    while client.status().unwrap().quarantined > 0 {
        let page = pages(4 * RANGES, 1);
        let invalidation = granted(beside.begin(page, PageState::Private, Some(PATIENT_MS)));
        beside.end(invalidation, Outcome::NotCommitted).unwrap();
        converted += 1;
    }
    assert!(converted > 0);
    assert_eq!(file().ino(), before.ino(), "it was written anew");
}
