//! Files of random size and content in a file system on the disk: written, synced, renamed, read back by both ways, removed.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use rustix::fs::{Advice, OFlags, fadvise};

use super::Wrong;
use super::buffer::Buffer;
use super::pattern::{Numbers, stream};
use super::soak::Watch;

/// Files of one thread.
const MOST: usize = 24;
/// Bytes of the largest.
const LARGEST: u64 = 192 << 10;

/// One thread's folder, and what must be in it: each file's seed and length.
#[derive(Debug)]
pub struct Folder<'a> {
    pub path: PathBuf,
    pub files: BTreeMap<String, (u64, usize)>,
    numbers: Numbers,
    named: u64,
    watch: &'a Watch,
}

impl<'a> Folder<'a> {
    pub fn new(path: PathBuf, seed: u64, watch: &'a Watch) -> Result<Self, Wrong> {
        fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Self { path, files: BTreeMap::new(), numbers: Numbers::new(seed), named: 0, watch })
    }

    /// Works until told to stop.
    pub fn work(&mut self) -> Result<(), Wrong> {
        while !self.watch.stop.load(Ordering::Relaxed) {
            let full = self.files.len() >= MOST;
            match self.numbers.below(10) {
                0..4 if !full => self.write()?,
                4..8 => self.read_any()?,
                _ if full => self.remove()?,
                _ => {}
            }
        }
        Ok(())
    }

    fn any(&mut self) -> Option<String> {
        let nth = self.numbers.below(self.files.len().max(1) as u64) as usize;
        self.files.keys().nth(nth).cloned()
    }

    /// Writes a file under another name, syncs it, and gives it its own.
    fn write(&mut self) -> Result<(), Wrong> {
        self.named += 1;
        let name = format!("{:06}", self.named);
        let (seed, len) = (self.numbers.next(), 1 + self.numbers.below(LARGEST) as usize);
        let mut bytes = vec![0; len];
        stream(&mut bytes, seed);
        let (new, path) = (self.path.join("new"), self.path.join(&name));
        let written = self.watch.timed(|| {
            let mut file = File::create(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.path)?.sync_all()
        });
        written.map_err(|e| format!("{}: {e}", path.display()))?;
        self.files.insert(name, (seed, len));
        self.watch.files.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn read_any(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.any() else { return Ok(()) };
        let direct = self.numbers.below(2) == 0;
        self.read(&name, direct)
    }

    /// Reads a file from the disk, never from the cache, and compares it.
    pub fn read(&self, name: &str, direct: bool) -> Result<(), Wrong> {
        let path = self.path.join(name);
        let &(seed, len) = self.files.get(name).ok_or("no such file")?;
        let mut wanted = vec![0; len];
        stream(&mut wanted, seed);
        let mut buffer = Buffer::new(len.next_multiple_of(4096) + 4096, 4096);
        let read = self.watch.timed(|| {
            let flags = if direct { OFlags::DIRECT } else { OFlags::empty() };
            let mut file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(&path)?;
            fadvise(file.as_fd(), 0, None, Advice::DontNeed)?;
            let mut got = 0;
            loop {
                match file.read(&mut buffer.get()[got..])? {
                    0 => return Ok::<_, std::io::Error>(got),
                    more => got += more,
                }
            }
        });
        let got = read.map_err(|e| format!("{} (direct: {direct}): {e}", path.display()))?;
        let first = buffer.get()[..got].iter().zip(&wanted).position(|(is, should)| is != should);
        if got != len || first.is_some() {
            return Err(format!(
                "{} (direct: {direct}) has {got} bytes of {len} and is not what was written from byte {first:?} on",
                path.display()
            ));
        }
        Ok(())
    }

    fn remove(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.any() else { return Ok(()) };
        let path = self.path.join(&name);
        self.watch.timed(|| fs::remove_file(&path)).map_err(|e| format!("{}: {e}", path.display()))?;
        self.files.remove(&name);
        Ok(())
    }

    /// Reads every file again.
    pub fn verify(&self) -> Result<(), Wrong> {
        for name in self.files.keys() {
            self.read(name, true)?;
            self.watch.verified.fetch_add(1, Ordering::Relaxed);
            self.watch.report_at_times();
        }
        let found = fs::read_dir(&self.path).map_err(|e| format!("{}: {e}", self.path.display()))?;
        let found = found.filter_map(Result::ok).filter(|entry| entry.file_name() != "new").count();
        if found == self.files.len() { Ok(()) } else { Err(format!("{found} files of {}", self.files.len())) }
    }
}
