//! The guest: 61 bytes of real-mode code, and its interface to the VMM.
//!
//! The guest visits its pages in a fixed, scattered order and requests a conversion of each to its other state. The first
//! 8 bytes of a page are its *stamp*: the page's number, a tag and its generation. The generation is even while the page is
//! shared and odd while it is private; each conversion increments it.

use passgate_bindings::{Gpa, Iova, PAGE, PageRange, RangeError};

/// The number of pages that the guest converts. `and si, 63` in [`CODE`] depends on it.
pub(crate) const PAGES: u64 = 64;
/// The guest-physical address of the first page, in bytes. Devices access the pages at the same addresses.
pub(crate) const MEMORY: u64 = 0x1_0000;
/// The guest-physical address of the code, in bytes. Its page is never mapped for devices.
pub(crate) const CODE_AT: u64 = 0x1000;

/// The I/O port of requests (out) and answers (in).
pub(crate) const REQUEST_PORT: u16 = 0x50;
/// The I/O port on which the guest reports that it has stamped the converted page.
pub(crate) const STAMPED_PORT: u16 = 0x54;
/// The answer to a request that was not granted: the page has not changed.
pub(crate) const REFUSED: u32 = 0;

/// The generation of a page that was never converted. Even, and not [`REFUSED`].
pub(crate) const FIRST_GENERATION: u32 = 2;
/// The tag in a stamp, after the page's number.
const TAG: u16 = 0x5047;
/// The offset in a page, in bytes, at which the device writes its mark of 8 bytes.
pub(crate) const MARK_OFFSET: u64 = 64;

/// The code. It uses no stack and no memory other than the pages; `si` is the page's number.
#[rustfmt::skip]
pub(crate) const CODE: [u8; 61] = [
    // next:                                    the next page: 5 * si + 17 modulo 64 meets every one
    0x6b, 0xf6, 0x05,                        // imul si, si, 5
    0x83, 0xc6, 0x11,                        // add si, 17
    0x83, 0xe6, 0x3f,                        // and si, 63
    //                                          its segment: (0x10000 + si * 4096) / 16
    0x89, 0xf0,                              // mov ax, si
    0xc1, 0xe0, 0x08,                        // shl ax, 8
    0x80, 0xc4, 0x10,                        // add ah, 0x10
    0x8e, 0xd8,                              // mov ds, ax
    //                                          the request: the lower 16 bits of the device's mark
    0x66, 0xa1, 0x3e, 0x00,                  // mov eax, [62]    in the upper half
    0x89, 0xf0,                              // mov ax, si       the page in the lowest byte
    0x8a, 0x26, 0x04, 0x00,                  // mov ah, [4]      and its generation in the next, whose
    0x80, 0xf4, 0x01,                        // xor ah, 1        inverted lowest bit is the new state: 1 = private
    0x66, 0xe7, 0x50,                        // out 0x50, eax    send the request
    0x66, 0xe5, 0x50,                        // in eax, 0x50     the new generation, or 0: refused
    0x66, 0x85, 0xc0,                        // test eax, eax
    0x74, 0xd5,                              // jz next          refused: the page has not changed
    //                                          the page has new contents now: stamp it
    0x66, 0xa3, 0x04, 0x00,                  // mov [4], eax     its generation
    0x89, 0x36, 0x00, 0x00,                  // mov [0], si      its number
    0xc7, 0x06, 0x02, 0x00, 0x47, 0x50,      // mov word [2], 0x5047
    0xe6, 0x54,                              // out 0x54, al     stamped
    0xeb, 0xc3,                              // jmp next
];

/// A request of the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    /// The number of the page.
    pub(crate) page: u64,
    /// True for a conversion to private, false for one to shared.
    pub(crate) to_private: bool,
    /// The lower 16 bits of the device's mark that the guest found in the page.
    pub(crate) mark: u16,
}

impl Request {
    /// Parses the bytes that the guest wrote to the port; none where they are not a request.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let [page, generation, mark @ ..] = *<&[u8; 4]>::try_from(bytes).ok()?;
        let page = u64::from(page);
        let to_private = generation & 1 == 1;
        (page < PAGES).then_some(Self { page, to_private, mark: u16::from_le_bytes(mark) })
    }
}

/// Returns the stamp of a page at a generation.
pub(crate) fn stamp(page: u64, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(TAG) << 16 | page
}

/// Returns the guest-physical address range of a page.
pub(crate) fn gpa(page: u64) -> Result<PageRange<Gpa>, RangeError> {
    PageRange::new(MEMORY + page * PAGE, PAGE)
}

/// Returns the I/O virtual address of byte `at` of a page.
pub(crate) fn iova(page: u64, at: u64) -> Iova {
    Iova(MEMORY + page * PAGE + at)
}
