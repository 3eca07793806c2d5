//! Files of random size and content in a file system on the disk: written, synced, renamed, read back with and without O_DIRECT,
//! removed.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use rustix::fs::{Advice, OFlags, fadvise};

use super::Failure;
use super::buffer::Buffer;
use super::pattern::{Random, stream};
use super::soak::Progress;

/// The largest number of files of one thread.
const MAX_FILES: usize = 24;
/// The largest length of a file, in bytes.
const MAX_FILE_BYTES: u64 = 192 << 10;

/// One thread's directory, and the model of its contents: each file's seed and length.
#[derive(Debug)]
pub struct Folder<'a> {
    pub path: PathBuf,
    pub files: BTreeMap<String, (u64, usize)>,
    random: Random,
    /// The number of files created so far, from which their names are made.
    created: u64,
    progress: &'a Progress,
}

impl<'a> Folder<'a> {
    pub fn new(path: PathBuf, seed: u64, progress: &'a Progress) -> Result<Self, Failure> {
        fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Self { path, files: BTreeMap::new(), random: Random::new(seed), created: 0, progress })
    }

    /// Works until it is to stop.
    pub fn work(&mut self) -> Result<(), Failure> {
        while !self.progress.stop.load(Ordering::Relaxed) {
            let full = self.files.len() >= MAX_FILES;
            match self.random.below(10) {
                0..4 if !full => self.write()?,
                4..8 => self.read_any()?,
                _ if full => self.remove()?,
                _ => {}
            }
        }
        Ok(())
    }

    fn random_name(&mut self) -> Option<String> {
        let nth = self.random.below(self.files.len().max(1) as u64) as usize;
        self.files.keys().nth(nth).cloned()
    }

    /// Writes a file under a temporary name, syncs it, renames it, and syncs the directory.
    fn write(&mut self) -> Result<(), Failure> {
        self.created += 1;
        let name = format!("{:06}", self.created);
        let (seed, len) = (self.random.next(), 1 + self.random.below(MAX_FILE_BYTES) as usize);
        let mut bytes = vec![0; len];
        stream(&mut bytes, seed);
        let (new, path) = (self.path.join("new"), self.path.join(&name));
        let written = self.progress.timed(|| {
            let mut file = File::create(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.path)?.sync_all()
        });
        written.map_err(|e| format!("{}: {e}", path.display()))?;
        self.files.insert(name, (seed, len));
        self.progress.files.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn read_any(&mut self) -> Result<(), Failure> {
        let Some(name) = self.random_name() else { return Ok(()) };
        let direct = self.random.below(2) == 0;
        self.read(&name, direct)
    }

    /// Reads a file from the disk, not from the page cache, and compares it with the model.
    pub fn read(&self, name: &str, direct: bool) -> Result<(), Failure> {
        let path = self.path.join(name);
        let &(seed, len) = self.files.get(name).ok_or("no such file")?;
        let mut expected = vec![0; len];
        stream(&mut expected, seed);
        let mut buffer = Buffer::new(len.next_multiple_of(4096) + 4096, 4096);
        let read = self.progress.timed(|| {
            let flags = if direct { OFlags::DIRECT } else { OFlags::empty() };
            let mut file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(&path)?;
            fadvise(file.as_fd(), 0, None, Advice::DontNeed)?;
            let mut read_len = 0;
            loop {
                match file.read(&mut buffer.get()[read_len..])? {
                    0 => return Ok::<_, std::io::Error>(read_len),
                    more => read_len += more,
                }
            }
        });
        let read_len = read.map_err(|e| format!("{} (direct: {direct}): {e}", path.display()))?;
        let first =
            buffer.get()[..read_len].iter().zip(&expected).position(|(actual, expected)| actual != expected);
        if read_len != len || first.is_some() {
            return Err(format!(
                "{} (direct: {direct}) has {read_len} bytes of {len} and is not what was written from byte {first:?} on",
                path.display()
            ));
        }
        Ok(())
    }

    fn remove(&mut self) -> Result<(), Failure> {
        let Some(name) = self.random_name() else { return Ok(()) };
        let path = self.path.join(&name);
        self.progress.timed(|| fs::remove_file(&path)).map_err(|e| format!("{}: {e}", path.display()))?;
        self.files.remove(&name);
        Ok(())
    }

    /// Reads every file, and compares the directory with the model.
    pub fn verify(&self) -> Result<(), Failure> {
        for name in self.files.keys() {
            self.read(name, true)?;
            self.progress.verified.fetch_add(1, Ordering::Relaxed);
            self.progress.report_at_times();
        }
        let found = fs::read_dir(&self.path).map_err(|e| format!("{}: {e}", self.path.display()))?;
        let found = found.filter_map(Result::ok).filter(|entry| entry.file_name() != "new").count();
        if found == self.files.len() { Ok(()) } else { Err(format!("{found} files of {}", self.files.len())) }
    }
}
