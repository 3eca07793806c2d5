//! The archive that a kernel unpacks for its first process (`newc`, Documentation/driver-api/early-userspace).

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// Folders that the guest finds there.
const FOLDERS: [&str; 5] = ["dev", "proc", "sys", "tmp", "etc"];

/// An archive being made, in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    has: BTreeSet<String>,
}

impl Archive {
    pub fn new() -> Self {
        let mut archive = Self::default();
        FOLDERS.iter().for_each(|folder| archive.entry(folder, 0o040_755, &[]));
        archive
    }

    /// Takes a program and what its loader says that it needs.
    pub fn program(&mut self, from: &Path, to: &str) {
        self.file(from, to);
        let needs = Command::new("/lib64/ld-linux-x86-64.so.2").arg("--list").arg(from).output().unwrap();
        let needs = String::from_utf8_lossy(&needs.stdout).into_owned();
        for library in needs.split_whitespace().filter(|word| word.starts_with('/')) {
            self.file(Path::new(library), library);
        }
    }

    fn file(&mut self, from: &Path, to: &str) {
        let to = to.trim_start_matches('/');
        for (at, _) in to.match_indices('/') {
            self.entry(&to[..at], 0o040_755, &[]);
        }
        let bytes = std::fs::read(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
        self.entry(to, 0o100_755, &bytes);
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) {
        if !self.has.insert(name.to_owned()) {
            return;
        }
        self.inode += 1;
        let (size, named) = (bytes.len() as u32, name.len() as u32 + 1);
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, named, 0];
        self.bytes.extend_from_slice(b"070701");
        fields.iter().for_each(|field| write!(self.bytes, "{field:08x}").unwrap());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(bytes);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The whole of it, with its end.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
