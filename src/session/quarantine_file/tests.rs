use std::cell::Cell;
use std::os::unix::fs::symlink;

use passgate_bindings::PageRange;
use rustix::fs::{FileType, Mode};

use super::*;
use crate::gate::{Cause, FileId, InvalidationId, Notice, Reason, Rung};

thread_local! {
    /// The number of bytes that this thread has written to the file.
    pub(crate) static WRITTEN_BYTES: Cell<u64> = const { Cell::new(0) };
}

const BOOT: &str = "0b6e-12";

fn status(page: u64) -> QuarantineStatus {
    QuarantineStatus {
        file: FileId { device: 1, inode: 2 },
        range: PageRange::new(page * PAGE, PAGE).unwrap(),
        invalidation: InvalidationId(page),
        reason: Reason { cause: Cause::OwnerUnknown, device: None, rung: Rung::Unmap, errno: 5 },
    }
}

/// A directory in which a daemon has put page 3 into quarantine on this boot.
fn used() -> (tempfile::TempDir, QuarantineFile) {
    let dir = tempfile::tempdir().unwrap();
    let mut file = QuarantineFile::new(dir.path(), BOOT.to_owned());
    assert_eq!(file.load(false).unwrap(), []);
    file.begin(&[]).unwrap();
    file.change(quarantined(3), || panic!("there is room for it"));
    (dir, file)
}

fn quarantined(page: u64) -> Changes {
    let QuarantineStatus { file, range, invalidation, reason } = status(page);
    let gpa = None;
    Changes::of(&[Effect::Notice(Notice::Quarantined { invalidation, file, range, gpa, reason })])
}

fn freed(page: u64) -> Changes {
    let QuarantineStatus { file, range, .. } = status(page);
    Changes::of(&[Effect::Notice(Notice::Freed { file, range, gpa: None })])
}

/// The quarantine that another daemon finds in a directory in use.
fn found(dir: &Path) -> Result<Vec<Event>> {
    QuarantineFile::new(dir, BOOT.to_owned()).load(false)
}

#[test]
fn quarantine_is_read_back_on_its_boot_and_void_on_another() {
    let (dir, file) = used();
    assert_eq!(file.load(false).unwrap().len(), 1);
    let mut other = QuarantineFile::new(dir.path(), "another".to_owned());
    assert_eq!(other.load(false).unwrap(), []);
    other.begin(&[]).unwrap();
    assert!(!file.mark().exists() && other.mark().exists());
    // The file is of the other boot now, and the quarantine of this one is not in it any more.
    assert_eq!(other.load(false).unwrap(), []);
}

#[test]
fn quarantine_file_is_exact_after_any_changes_however_its_daemon_ends() {
    for killed in [false, true] {
        let (dir, mut file) = used();
        let mut expected = std::collections::BTreeMap::from([(3, status(3))]);
        let mut random = 1_u64;
        for nth in 0..3000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = random >> 40 & 0x1ff;
            let change = if expected.remove(&page).is_some() {
                freed(page)
            } else {
                expected.insert(page, status(page));
                quarantined(page)
            };
            file.change(change, || expected.values().copied().collect());
            if nth % 100 == 0 {
                let events = expected.values().map(|status| Range::from(status).event());
                assert_eq!(found(dir.path()).unwrap(), events.collect::<Vec<_>>());
            }
        }
        let before = found(dir.path()).unwrap();
        if killed {
            std::mem::forget(file)
        } else {
            drop(file)
        }
        assert_eq!(found(dir.path()).unwrap(), before);
    }
}

/// A line is written from its second byte on, and its first byte last. A daemon that dies before has not sent the answer.
#[test]
fn line_torn_by_the_death_of_its_daemon_is_ignored() {
    let (dir, file) = used();
    std::mem::forget(file);
    let before = found(dir.path()).unwrap();
    assert_eq!(before.len(), 1);
    let path = dir.path().join(FILE);
    let bytes = std::fs::read(&path).unwrap();
    let end = bytes.iter().position(|byte| *byte == 0).expect("there is room");
    for torn in [1, 2, 20] {
        let mut bytes = bytes.clone();
        bytes[end + 1..end + 1 + torn].fill(b'x');
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(found(dir.path()).unwrap(), before, "{torn} bytes");
    }
}

#[test]
fn unreadable_quarantine_is_unknown_and_never_empty() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 13] = [
        ("gone", |file| std::fs::remove_file(file).unwrap()),
        ("empty", |file| std::fs::write(file, "").unwrap()),
        ("zeroes", |file| std::fs::write(file, [0; 64]).unwrap()),
        ("cut", |file| {
            let bytes = std::fs::read(file).unwrap();
            std::fs::write(file, &bytes[..bytes.len() - 1]).unwrap();
        }),
        ("cut behind a line", |file| {
            let bytes = std::fs::read(file).unwrap();
            let head = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
            std::fs::write(file, &bytes[..head]).unwrap();
        }),
        ("newer", |file| {
            let text = std::fs::read_to_string(file).unwrap();
            std::fs::write(file, text.replace("\"version\":2", "\"version\":3")).unwrap();
        }),
        ("of another boot", |file| {
            let text = std::fs::read_to_string(file).unwrap();
            std::fs::write(file, text.replace(BOOT, "another")).unwrap();
        }),
        ("a FIFO", |file| {
            std::fs::remove_file(file).unwrap();
            rustix::fs::mknodat(rustix::fs::CWD, file, FileType::Fifo, Mode::RWXU, 0).unwrap();
        }),
        ("a link to what has no end", |file| {
            std::fs::remove_file(file).unwrap();
            symlink("/dev/zero", file).unwrap();
        }),
        ("a link to a good one", |file| {
            let good = file.with_extension("good");
            std::fs::rename(file, &good).unwrap();
            symlink(good, file).unwrap();
        }),
        ("a directory", |file| {
            std::fs::remove_file(file).unwrap();
            std::fs::create_dir(file).unwrap();
        }),
        ("huge", |file| {
            let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
            file.set_len(MAX_BYTES + 1).unwrap();
        }),
        ("no page range", |file| {
            let text = std::fs::read_to_string(file).unwrap();
            std::fs::write(file, text.replace("4096", "4097")).unwrap();
        }),
    ];
    for (what, damage) in damages {
        for killed in [false, true] {
            let (dir, file) = used();
            if killed {
                std::mem::forget(file)
            } else {
                drop(file)
            }
            damage(&dir.path().join(FILE));
            let error = found(dir.path()).expect_err(what).to_string();
            assert!(error.contains("move the directory away"), "{what}: {error}");
        }
    }
}

#[test]
fn file_torn_by_a_machine_crash_does_not_prevent_a_start_on_the_next_boot() {
    type Tear = fn(&mut Vec<u8>);
    let tears: [Tear; 3] =
        [|bytes| bytes.truncate(40), |bytes| bytes[..40].fill(0), |bytes| bytes[200..210].fill(0)];
    for tear in tears {
        let (dir, file) = used();
        let (path, mark) = (dir.path().join(FILE), file.mark());
        drop(file);
        let mut bytes = std::fs::read(&path).unwrap();
        tear(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        assert!(found(dir.path()).is_err());
        std::fs::remove_file(mark).unwrap();
        assert_eq!(found(dir.path()).unwrap(), []);
    }
}

#[test]
fn older_formats_are_read() {
    let (dir, file) = used();
    let mark = file.mark();
    let old = r#"{"version":1,"boot":"0b6e-12","quarantine":[{"file":{"device":1,"inode":2},"range":[12288,4096],"invalidation":3,"reason":{"cause":"owner-unknown","device":null,"rung":"unmap","errno":5}}]}"#;
    drop(file);
    for text in [old, &old.replace("\"version\":1,", "")] {
        std::fs::write(dir.path().join(FILE), text).unwrap();
        assert_eq!(found(dir.path()).unwrap(), [Range::from(&status(3)).event()]);
    }
    // An older daemon leaves no mark.
    std::fs::remove_file(mark).unwrap();
    assert_eq!(found(dir.path()).unwrap().len(), 1);
    std::fs::write(dir.path().join(FILE), &old.replace("\"version\":1,", "")[..90]).unwrap();
    assert!(found(dir.path()).is_err());
    std::fs::write(dir.path().join(FILE), "").unwrap();
    let file = QuarantineFile::new(dir.path(), BOOT.to_owned());
    assert!(file.load(true).is_err(), "the log says that the directory was used on this boot");
    assert_eq!(file.load(false).unwrap(), [], "a crash of the machine leaves an empty file");
}

#[test]
fn quarantine_that_cannot_be_written_refuses_the_next_start() {
    let (dir, mut file) = used();
    // The new file cannot be created, as on a full disk.
    let obstacle = dir.path().join("quarantine.new");
    std::fs::create_dir(&obstacle).unwrap();
    file.save(&[]);
    assert_eq!(file.load(false).unwrap().len(), 1, "less is in quarantine: the old file is safe");
    file.change(quarantined(4), || panic!("there is room for it"));
    assert_eq!(file.load(false).unwrap().len(), 2, "the open file has room");
    let all: Vec<_> = (3..600).map(status).collect();
    let many = all.iter().map(|status| Change::Quarantined(status.into())).collect();
    file.change(Changes(many), || all.clone());
    let error = file.load(false).unwrap_err().to_string();
    assert!(error.contains(INCOMPLETE) && error.contains("could not write"), "{error}");
    file.change(quarantined(4), || panic!("nothing of it is believed, so it can wait"));
    assert!(file.begin(&[]).is_err(), "a daemon that cannot write does not start");
    // Once the disk has room the file is complete again.
    std::fs::remove_dir(&obstacle).unwrap();
    file.retry = Some((Instant::now(), RETRY_INTERVAL));
    file.change(freed(3), || vec![status(4), status(5)]);
    assert_eq!(file.load(false).unwrap().len(), 2);
}

/// A new file cannot be created, as on a full disk, while the returned directory exists.
fn obstruct(dir: &Path) -> std::path::PathBuf {
    let obstacle = dir.join("quarantine.new");
    std::fs::create_dir(&obstacle).unwrap();
    obstacle
}

/// As many ranges as do not fit behind those of the file.
fn many() -> Vec<QuarantineStatus> {
    (3..600).map(status).collect()
}

fn all_quarantined(ranges: &[QuarantineStatus]) -> Changes {
    Changes(ranges.iter().map(|status| Change::Quarantined(status.into())).collect())
}

/// Lets the time of the next retry come.
fn retry(file: &mut QuarantineFile, current: &[QuarantineStatus]) {
    let due = file.retry_at().expect("a write has failed");
    file.retry(due - Duration::from_millis(1), || panic!("it is not due"));
    file.retry(due, || current.to_vec());
}

#[test]
fn failed_write_is_tried_again_by_time_alone() {
    let (dir, mut file) = used();
    let obstacle = obstruct(dir.path());
    let all = many();
    file.change(all_quarantined(&all), || all.clone());
    for seconds in [2, 4, 8] {
        retry(&mut file, &all);
        assert!(found(dir.path()).is_err(), "the disk is still full");
        assert!(file.retry_at().unwrap() > Instant::now() + Duration::from_secs(seconds / 2));
    }
    std::fs::remove_dir(&obstacle).unwrap();
    retry(&mut file, &all);
    assert_eq!(found(dir.path()).unwrap().len(), all.len());
    assert_eq!(file.retry_at(), None);
}

#[test]
fn failed_lift_is_written_although_later_changes_fit() {
    let (dir, mut file) = used();
    let all = many();
    file.change(all_quarantined(&all[..350]), || panic!("there is room for it"));
    let obstacle = obstruct(dir.path());
    let lifted = (3..353).map(|page| {
        let QuarantineStatus { file, range, .. } = status(page);
        Change::Freed { file, range }
    });
    file.change(Changes(lifted.collect()), Vec::new);
    file.change(quarantined(1000), || panic!("it fits"));
    assert_eq!(found(dir.path()).unwrap().len(), 351, "too many, and none too few");
    std::fs::remove_dir(&obstacle).unwrap();
    retry(&mut file, &[status(1000)]);
    assert_eq!(found(dir.path()).unwrap().len(), 1);
}

#[test]
fn failed_rename_is_tried_again() {
    let (dir, mut file) = used();
    let _obstacle = obstruct(dir.path());
    // A file cannot take the name of a directory.
    let aside = dir.path().join(INCOMPLETE);
    std::fs::create_dir(&aside).unwrap();
    let all = many();
    file.change(all_quarantined(&all), || all.clone());
    file.change(quarantined(1), || panic!("each rewrite costs all ranges: it waits for its time"));
    std::fs::remove_dir(&aside).unwrap();
    retry(&mut file, &all);
    assert!(aside.is_file(), "the next daemon does not start");
    // If there is no file, its place is taken by an empty one.
    let (dir, mut file) = used();
    let _obstacle = obstruct(dir.path());
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    file.change(all_quarantined(&all), || all.clone());
    assert!(dir.path().join(INCOMPLETE).is_file());
}

#[test]
fn session_that_cannot_write_its_first_file_marks_the_directory_as_used() {
    let dir = tempfile::tempdir().unwrap();
    let obstacle = obstruct(dir.path());
    let mut file = QuarantineFile::new(dir.path(), BOOT.to_owned());
    assert!(file.begin(&[]).is_err());
    file.begin_unwritten();
    assert!(found(dir.path()).unwrap_err().to_string().contains("it is gone"));
    std::fs::remove_dir(obstacle).unwrap();
    retry(&mut file, &[status(4)]);
    assert_eq!(found(dir.path()).unwrap().len(), 1);
}

#[test]
fn file_is_never_larger_than_what_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = QuarantineFile::new(dir.path(), "b".repeat(MIN_BYTES as usize));
    let error = file.begin(&[]).unwrap_err();
    assert!(error.to_string().contains("File too large"), "{error}");
}

#[test]
fn newer_version_is_named_whatever_its_format() {
    for text in ["{\"version\":3}\n", "{\"version\":3,\"boot\":7,\"other\":[]}\nmore\0more"] {
        let error = format::read(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("version 3, this passgate reads up to 2"), "{error}");
    }
}
