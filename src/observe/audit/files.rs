//! The files of a log: `audit-NUMBER.jsonl`, with numbers that are never used again.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::regular_file;

/// Returns the path of the file with this number.
pub fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("audit-{number:08}.jsonl"))
}

/// Returns every file of a log with its number, in order.
pub fn list(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let number =
            name.to_str().and_then(|name| name.strip_prefix("audit-")?.strip_suffix(".jsonl")?.parse().ok());
        found.extend(number.map(|number| (number, entry.path())));
    }
    found.sort_unstable();
    Ok(found)
}

/// Removes the oldest files until there are no more than `max_files`. One that cannot be removed is logged, and stays.
pub fn remove_oldest(dir: &Path, max_files: usize) {
    let Ok(all) = list(dir) else { return };
    for (_, path) in &all[..all.len().saturating_sub(max_files)] {
        if let Err(error) = std::fs::remove_file(path) {
            log::warn!("{}: {error}: remove it yourself, it takes room", path.display());
        }
    }
}

/// Removes files that an earlier daemon had allocated and not written to.
pub fn remove_unwritten(dir: &Path) -> io::Result<()> {
    for (_, path) in list(dir)? {
        let mut first = [0];
        let got = regular_file::open(&path, false)
            .and_then(|mut file| file.read(&mut first))
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        if got == 0 || first == [0] {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}
