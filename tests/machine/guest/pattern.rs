//! The data that the guest writes and that both sides verify: self-describing blocks, and checksums over them.
//!
//! A block contains its number, its version and a pseudo-random stream derived from both, so that an old, a torn and a misplaced
//! block are each distinguished from the right one. Version 0 is a block of zeros.

/// The size of a block in bytes.
pub const BLOCK: usize = 4096;

/// The first word of every block but those of version 0: "passgate" in ASCII.
const MAGIC: u64 = 0x7061_7373_6761_7465;

/// A pseudo-random number generator (xorshift64): equal sequences for equal seeds.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Returns a number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}

/// Fills `bytes` with the pseudo-random stream of `seed`.
pub fn stream(bytes: &mut [u8], seed: u64) {
    let mut random = Random::new(seed);
    for word in bytes.chunks_mut(8) {
        let next = random.next().to_le_bytes();
        word.copy_from_slice(&next[..word.len()]);
    }
}

/// Fills a block with the contents of this number and version.
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

/// Compares a block with the contents of this number and version; the error describes the first difference and the block's head.
pub fn check(block: &[u8], seed: u64, number: u64, version: u64) -> Result<(), String> {
    let mut expected = [0; BLOCK];
    fill(&mut expected, seed, number, version);
    if block == expected {
        return Ok(());
    }
    let word = |nth: usize| {
        block.get(nth * 8..nth * 8 + 8).map_or(0, |b| b.iter().rfold(0, |n, &b| n << 8 | u64::from(b)))
    };
    let first = block.iter().zip(&expected).position(|(actual, expected)| actual != expected);
    Err(format!(
        "block {number} should be version {version}: from byte {first:?} on it is not; its head says magic {:#x}, block {}, version {}, seed {:#x}",
        word(0),
        word(1),
        word(2),
        word(3)
    ))
}

/// Returns the checksum of `bytes`, continued from `sum` (FNV-1a over 64-bit words).
pub fn sum(mut sum: u64, bytes: &[u8]) -> u64 {
    for word in bytes.chunks(8) {
        let word = word.iter().rfold(0, |n, &b| n << 8 | u64::from(b));
        sum = (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }
    sum
}
