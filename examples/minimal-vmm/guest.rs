//! The guest: 61 bytes of real-mode code, and the words that it shares with the VMM.
//!
//! It goes through its pages in a fixed, mixed-up order and asks for each one's other state. Of the page itself it
//! knows what lies in it: its *stamp*, which is the page's number, a tag and its generation. The generation is even
//! while the page is shared and odd while it is private, and goes up by one with each conversion.

use passgate_bindings::{Gpa, Iova, PAGE, PageRange, RangeError};

/// Pages that the guest converts; the code's `and si, 63` must say the same.
pub(crate) const PAGES: u64 = 64;
/// Where they lie. Devices see them at the same address.
pub(crate) const MEMORY: u64 = 0x1_0000;
/// Where the code lies, in a page that no device ever gets.
pub(crate) const CODE_AT: u64 = 0x1000;

/// The port of requests (out) and answers (in).
pub(crate) const ASK: u16 = 0x50;
/// The port on which the guest says that the page it asked for is stamped.
pub(crate) const STAMPED: u16 = 0x54;
/// The answer to a request that was not granted: the page is as it was.
pub(crate) const REFUSED: u32 = 0;

/// The generation of a page that was never converted. Even, and not [`REFUSED`].
pub(crate) const FIRST: u32 = 2;
/// In the stamp, after the page's number.
const TAG: u16 = 0x5047;
/// Where in a page the device leaves its marks, eight bytes.
pub(crate) const MARK: u64 = 64;

/// The code. It needs no stack and no memory but the pages; `si` is the page's number.
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
    //                                          the request: what lies where the device leaves its marks,
    0x66, 0xa1, 0x3e, 0x00,                  // mov eax, [62]    in the upper half
    0x89, 0xf0,                              // mov ax, si       the page in the lowest byte
    0x8a, 0x26, 0x04, 0x00,                  // mov ah, [4]      and its generation in the next, of which
    0x80, 0xf4, 0x01,                        // xor ah, 1        the lowest bit turned is the wish: 1 = private
    0x66, 0xe7, 0x50,                        // out 0x50, eax    ask
    0x66, 0xe5, 0x50,                        // in eax, 0x50     the generation from now on, or 0: refused
    0x66, 0x85, 0xc0,                        // test eax, eax
    0x74, 0xd5,                              // jz next          refused: the page is as it was
    //                                          the page is another one now: stamp it
    0x66, 0xa3, 0x04, 0x00,                  // mov [4], eax     its generation
    0x89, 0x36, 0x00, 0x00,                  // mov [0], si      its number
    0xc7, 0x06, 0x02, 0x00, 0x47, 0x50,      // mov word [2], 0x5047
    0xe6, 0x54,                              // out 0x54, al     stamped
    0xeb, 0xc3,                              // jmp next
];

/// What the guest asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    /// Which page.
    pub(crate) page: u64,
    /// What it is to be: private, or else shared.
    pub(crate) to_private: bool,
    /// What the guest found where the device leaves its marks.
    pub(crate) mark: u16,
}

impl Request {
    /// Reads what the guest put on the port; none where that is no request.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let [page, wish, mark @ ..] = *<&[u8; 4]>::try_from(bytes).ok()?;
        let page = u64::from(page);
        let to_private = wish & 1 == 1;
        (page < PAGES).then_some(Self { page, to_private, mark: u16::from_le_bytes(mark) })
    }
}

/// The stamp of a page at a generation.
pub(crate) fn stamp(page: u64, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(TAG) << 16 | page
}

/// Where the guest sees a page.
pub(crate) fn gpa(page: u64) -> Result<PageRange<Gpa>, RangeError> {
    PageRange::new(MEMORY + page * PAGE, PAGE)
}

/// Where devices see a page's byte `at`.
pub(crate) fn iova(page: u64, at: u64) -> Iova {
    Iova(MEMORY + page * PAGE + at)
}
