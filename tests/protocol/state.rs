//! The state directory: writing to it delays no client.

use std::os::unix::fs::MetadataExt;

use passgate::session::quarantine_file::FILE;
use passgate::session::records::StateOptions;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::{Iova, PAGE, PageRange};
use passgate_client::{AddMemory, Answer, Outcome, PageState};

use crate::common::hanging::HangingDomain;
use crate::common::{GRANT_DEADLINE_MS, Setup, granted, memory, pages};

/// The number of ranges of the batch, each of one page, with a gap of one page between them.
const RANGES: u64 = 4096;

/// The unmaps of the batch return one by one when its ranges are in quarantine, and each lifts the quarantine of one range, while
/// another client converts. The quarantine file must not be written anew each time.
#[test]
fn quarantine_of_batch_is_lifted_range_by_range_without_new_file() {
    let dir = tempfile::tempdir().unwrap();
    let batch: PageRange<Iova> = PageRange::new(0, 2 * RANGES * PAGE).unwrap();
    let mut hanging = None;
    let setup = Setup::around_soft_domain(
        || SoftDomain::open().unwrap(),
        |soft| hanging.insert(HangingDomain::over_range(soft, batch)).clone(),
        |options| options.state = Some(StateOptions::at(dir.path())),
    );
    let hanging = hanging.unwrap();
    let (mut client, mut channel, _file) = setup.client(2 * RANGES);
    let (mut other, file) = (setup.connect(), memory(1));
    let mut add = AddMemory::shared(4 * RANGES * PAGE, PAGE);
    add.piece = PAGE;
    other.add_memory(&add, &[&*file]).unwrap();
    let mut other_channel = other.open_channel().unwrap();

    hanging.hang_unmaps();
    let ranges: Vec<_> = (0..RANGES).map(|nth| pages(2 * nth, 1)).collect();
    let answer = channel.begin_many(&ranges, PageState::Private, Some(10)).unwrap();
    assert!(matches!(answer, Answer::Unknown(_)), "{answer:?}");
    // At least: mappings may be larger than the pages of the batch.
    assert!(client.status().unwrap().quarantined >= RANGES * PAGE);
    let file = || std::fs::metadata(dir.path().join(FILE)).unwrap();
    let before = file();
    hanging.resume_calls();
    let mut conversions = 0;
    while client.status().unwrap().quarantined > 0 {
        let page = pages(4 * RANGES, 1);
        let invalidation = granted(other_channel.begin(page, PageState::Private, Some(GRANT_DEADLINE_MS)));
        other_channel.end(invalidation, Outcome::NotCommitted).unwrap();
        conversions += 1;
    }
    assert!(conversions > 0);
    assert_eq!(file().ino(), before.ino(), "the quarantine file was written anew");
}
