//! What the guest writes and both sides check: blocks that say what they are, and sums over them.
//!
//! A block carries its number, its version and a stream made of both, so that an old block, a torn one and one in the
//! wrong place are each told from the right one. Version 0 is a block of zeros.

/// Bytes of one block.
pub const BLOCK: usize = 4096;

const MAGIC: u64 = 0x7061_7373_6761_7465;

/// A small generator of numbers, the same everywhere for the same seed.
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// One below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}

/// Fills `bytes` from the stream of `seed`.
pub fn stream(bytes: &mut [u8], seed: u64) {
    let mut numbers = Numbers::new(seed);
    for word in bytes.chunks_mut(8) {
        let next = numbers.next().to_le_bytes();
        word.copy_from_slice(&next[..word.len()]);
    }
}

/// Fills a block.
pub fn fill(block: &mut [u8], seed: u64, number: u64, version: u64) {
    if version == 0 {
        return block.fill(0);
    }
    let (head, body) = block.split_at_mut(32);
    for (word, value) in head.chunks_mut(8).zip([MAGIC, number, version, seed]) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    stream(body, seed ^ (number << 32) ^ version);
}

/// Whether this is that version of the block, and if not, what it is.
pub fn check(block: &[u8], seed: u64, number: u64, version: u64) -> Result<(), String> {
    let mut wanted = [0; BLOCK];
    fill(&mut wanted, seed, number, version);
    if block == wanted {
        return Ok(());
    }
    let word = |nth: usize| {
        block.get(nth * 8..nth * 8 + 8).map_or(0, |b| b.iter().rfold(0, |n, &b| n << 8 | u64::from(b)))
    };
    let first = block.iter().zip(&wanted).position(|(is, should)| is != should);
    Err(format!(
        "block {number} should be version {version}: from byte {first:?} on it is not; its head says magic {:#x}, block {}, version {}, seed {:#x}",
        word(0),
        word(1),
        word(2),
        word(3)
    ))
}

/// The sum of `bytes`, going on from `sum` (FNV-1a over words).
pub fn sum(mut sum: u64, bytes: &[u8]) -> u64 {
    for word in bytes.chunks(8) {
        let word = word.iter().rfold(0, |n, &b| n << 8 | u64::from(b));
        sum = (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }
    sum
}
