//! The persistent ledger of a path's first daemon.
//!
//! Paths are replayed a hundred thousand times, and a new memfd would cost more than the rest of a replay. So each thread has one
//! memfd, whose first bytes are reset to those of a new ledger. No entry there refers to the bytes behind them, and a store
//! initialises what it allocates.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use passgate::session::persist::PersistentState;
use passgate_backends::handover::DomainIds;

/// The number of bytes that are reset: more than the header, the directory and the first tables.
const IMAGE_BYTES: usize = 512 << 10;

struct Image {
    file: File,
    bytes: Vec<u8>,
    devices: usize,
}

thread_local! {
    static IMAGE: RefCell<Option<Image>> = const { RefCell::new(None) };
}

fn image(devices: usize) -> Image {
    let persistent = PersistentState::new().expect("a memfd");
    let names: Vec<_> = (0..devices).map(|nth| (format!("0000:00:{nth:02x}.0"), false)).collect();
    persistent.complete(DomainIds::Type1 { entries: 65_535 }, &names);
    let file = File::from(persistent.fd().and_then(|fd| fd.try_clone_to_owned().ok()).expect("a descriptor"));
    let mut bytes = vec![0; IMAGE_BYTES];
    file.read_exact_at(&mut bytes, 0).expect("a memfd is read");
    // Zeroes at the end need not be reset: no entry refers to what lies there.
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bytes.truncate(used);
    Image { file, bytes, devices }
}

/// Returns an empty ledger and its memfd. The ledger that this thread got before must have been dropped.
pub fn fresh(devices: usize) -> (PersistentState, OwnedFd) {
    IMAGE.with_borrow_mut(|cached| {
        let image = match cached {
            Some(image) if image.devices == devices => image,
            _ => cached.insert(image(devices)),
        };
        image.file.write_all_at(&image.bytes, 0).expect("a memfd is written");
        let fd = || OwnedFd::from(image.file.try_clone().expect("a descriptor"));
        let (persistent, _) = PersistentState::open(fd()).expect("a new ledger is opened");
        (persistent, fd())
    })
}
