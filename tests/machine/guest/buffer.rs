//! Memory for direct I/O: a slice with the alignment that O_DIRECT requires.

use super::pattern::Random;

/// A buffer whose slice is aligned.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Returns a buffer of `len` bytes, aligned to `alignment` bytes, a power of two.
    pub fn new(len: usize, alignment: usize) -> Self {
        let bytes = vec![0; len + 2 * alignment.max(4096)];
        let start = bytes.as_ptr().align_offset(alignment);
        Self { bytes, start, len }
    }

    /// Returns a buffer that begins at a random sector of a page: guests' buffers are not all page-aligned.
    pub fn at_random_sector(len: usize, random: &mut Random) -> Self {
        let mut buffer = Self::new(len, 4096);
        buffer.start += 512 * random.below(8) as usize;
        buffer
    }

    pub fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}
