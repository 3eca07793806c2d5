//! Memory for direct I/O: a slice that begins where a device may begin.

use super::pattern::Numbers;

/// A buffer whose slice is aligned to `to` bytes, a power of two.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    from: usize,
    len: usize,
}

impl Buffer {
    pub fn new(len: usize, to: usize) -> Self {
        let bytes = vec![0; len + 2 * to.max(4096)];
        let from = bytes.as_ptr().align_offset(to);
        Self { bytes, from, len }
    }

    /// One that begins at any sector within a page: guests' buffers are not all page-aligned.
    pub fn anywhere(len: usize, numbers: &mut Numbers) -> Self {
        let mut buffer = Self::new(len, 4096);
        buffer.from += 512 * numbers.below(8) as usize;
        buffer
    }

    pub fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.from..self.from + self.len]
    }
}
