//! Refusal of a front-end that translates addresses (vhost-user protocol, "IOMMU support").
//!
//! The drive uses guest-physical addresses, which the gate maps. `VIRTIO_F_ACCESS_PLATFORM` is offered all the same, because
//! guests under SEV and TDX refuse a device without it. In a VM without a virtual IOMMU it changes no address, and no IOTLB
//! message ever comes. If one comes, the addresses in the guest's rings are not those that the drive would use: the connection
//! is closed, and no request is served.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, recv};

/// The number of the message `VHOST_USER_IOTLB_MSG`.
const IOTLB_MSG: u32 = 22;
/// The protocol version in the flags of a header.
const VERSION: u32 = 1;
/// The flag of a reply.
const REPLY: u32 = 1 << 2;
/// The flag of a message that wants a reply (`REPLY_ACK`).
const NEED_REPLY: u32 = 1 << 3;
/// The length of a header in bytes: request, flags, and length of the payload, 32 bits each.
const HEADER_LEN: usize = 12;
/// The length of a payload in bytes, at most, as for any other message.
const MAX_PAYLOAD_LEN: u32 = 4096;

/// The log line for such a front-end, with the remedy.
pub(super) const REFUSAL: &str = "the front-end translates addresses (IOTLB): the VM has a virtual IOMMU, and this disk \
    takes guest-physical addresses; start the VM without it (iommu_platform=on alone is fine)";

/// Returns true if the next message is an IOTLB message. It stays in the socket.
pub(super) fn is_next(stream: &UnixStream) -> bool {
    let mut request = [0; 4];
    let found = recv(stream, &mut request, RecvFlags::PEEK | RecvFlags::DONTWAIT);
    found.is_ok_and(|(_, len)| len == request.len()) && u32::from_ne_bytes(request) == IOTLB_MSG
}

/// Reads an IOTLB message, and answers that it has failed if a reply is wanted.
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
