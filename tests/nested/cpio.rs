//! The initramfs archive (cpio format `newc`, Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// The directories of every archive.
const DIRECTORIES: [&str; 5] = ["dev", "proc", "sys", "tmp", "etc"];

/// An archive that is being built in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    names: BTreeSet<String>,
}

impl Archive {
    pub fn new() -> Self {
        let mut archive = Self::default();
        DIRECTORIES.iter().for_each(|directory| archive.entry(directory, 0o040_755, &[]));
        archive
    }

    /// Adds a program and the libraries that its loader lists.
    pub fn program(&mut self, from: &Path, to: &str) {
        self.file(from, to);
        let libraries = Command::new("/lib64/ld-linux-x86-64.so.2").arg("--list").arg(from).output().unwrap();
        let libraries = String::from_utf8_lossy(&libraries.stdout).into_owned();
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
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
        if !self.names.insert(name.to_owned()) {
            return;
        }
        self.inode += 1;
        let (size, name_len) = (bytes.len() as u32, name.len() as u32 + 1);
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_len, 0];
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

    /// Returns the finished archive, with its trailer.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
