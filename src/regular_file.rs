//! Opening regular files in a directory that another process may have changed.
//!
//! A name may have become a FIFO (whose open waits for a writer), a link, a device or a file without end. None of them may
//! block a start or exhaust its memory.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

/// Opens a regular file for reading. Without `follow_links`, a symbolic link is an error, and so is a file that neither this
/// process's user nor root owns.
pub(crate) fn open(path: &Path, follow_links: bool) -> io::Result<File> {
    // O_NONBLOCK: without it the open of a FIFO waits for a writer. It has no effect on a regular file.
    let mut flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    flags.set(OFlags::NOFOLLOW, !follow_links);
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(file.as_fd())?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("it is no regular file"));
    }
    let own = rustix::process::geteuid().as_raw();
    if !follow_links && stat.st_uid != own && stat.st_uid != 0 {
        return Err(io::Error::other(format!("it is user {}'s", stat.st_uid)));
    }
    Ok(file.into())
}

/// Reads a regular file of at most `max_bytes`, without following links.
pub(crate) fn read(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path, false)?.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it has more than {max_bytes} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_regular_files_of_bounded_size_are_read_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"four").unwrap();
        assert_eq!(read(&path, 4).unwrap(), b"four");
        assert!(read(&path, 3).unwrap_err().to_string().contains("more than 3 bytes"));
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        for follow_links in [false, true] {
            assert!(open(&fifo, follow_links).unwrap_err().to_string().contains("no regular file"));
            assert!(open(dir.path(), follow_links).is_err());
        }
        // Only root can give a file away.
        let other = dir.path().join("other");
        std::fs::write(&other, b"").unwrap();
        if std::os::unix::fs::chown(&other, Some(12_345), None).is_ok()
            && rustix::process::geteuid().is_root()
        {
            assert!(open(&other, false).unwrap_err().to_string().contains("user 12345's"));
            assert!(open(&other, true).is_ok());
        }
        let link = dir.path().join("link");
        symlink("/dev/zero", &link).unwrap();
        assert!(read(&link, 4).is_err() && open(&link, true).is_err());
        std::fs::remove_file(&link).unwrap();
        symlink(&path, &link).unwrap();
        assert!(open(&link, false).is_err() && open(&link, true).is_ok());
    }
}
