//! A front-end that would translate addresses (vhost-user protocol, "IOMMU support").
//!
//! The drive takes guest-physical addresses: its translation is the gate's. `VIRTIO_F_ACCESS_PLATFORM` is offered all the
//! same, because the guests of SEV and TDX refuse a device without it: where the VM has no virtual IOMMU it changes no
//! address, and no IOTLB message ever comes. Where one comes, what the guest puts into its rings are other addresses than
//! the drive would use: the front-end is refused, and nothing of it is served.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, recv};

/// The message, by its number in the protocol.
const IOTLB_MSG: u32 = 22;
/// Header flags: the protocol's version, a reply, and that a reply is wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Bytes of a header: request, flags, bytes of the payload.
const HEADER_LEN: usize = 12;
/// Bytes of a payload that are taken at most, as of any other message.
const MAX_PAYLOAD_LEN: u32 = 4096;

/// Why such a front-end is let go, and what helps.
pub(super) const REFUSAL: &str = "the front-end translates addresses (IOTLB): the VM has a virtual IOMMU, and this disk \
    takes guest-physical addresses; start the VM without it (iommu_platform=on alone is fine)";

/// Returns true where the next message is one of a translating front-end. Nothing is taken off the socket.
pub(super) fn is_next(stream: &UnixStream) -> bool {
    let mut request = [0; 4];
    let found = recv(stream, &mut request, RecvFlags::PEEK | RecvFlags::DONTWAIT);
    found.is_ok_and(|(_, len)| len == request.len()) && u32::from_ne_bytes(request) == IOTLB_MSG
}

/// Takes that message, and answers that it has failed where an answer is wanted (`REPLY_ACK`).
pub(super) fn refuse(mut stream: &UnixStream) -> io::Result<()> {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header)?;
    let word = |at: usize| {
        header.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes)
    };
    let (flags, len) = (word(4), word(8));
    io::copy(&mut stream.take(len.min(MAX_PAYLOAD_LEN).into()), &mut io::sink())?;
    if flags & NEED_REPLY == 0 {
        return Ok(());
    }
    let failed = 1u64.to_ne_bytes();
    let header = [IOTLB_MSG, VERSION | REPLY, failed.len() as u32];
    let mut reply: Vec<u8> = header.into_iter().flat_map(u32::to_ne_bytes).collect();
    reply.extend(failed);
    stream.write_all(&reply)
}
