//! What the guest is told of the drive (virtio 1.2, 5.2.3 and 5.2.4), and what it may choose.

use passgate_backends::nvme::Geometry;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::request::{SECTOR, SEGMENTS};

/// Bytes of `struct virtio_blk_config` up to its write-zeroes fields.
const LEN: usize = 60;
/// Where `writeback` is in it.
pub(super) const WRITEBACK: u32 = 32;
/// Bytes that may be asked for at most; what is beyond [`LEN`] is zero.
pub(super) const MOST: u32 = 256;

/// The features of the device that a drive makes.
pub(super) fn features(drive: &Geometry, read_only: bool) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        // Guests of SEV and TDX refuse a device without it ([`super::iotlb`]).
        VIRTIO_F_ACCESS_PLATFORM,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_MQ,
    ];
    match read_only {
        true => bits.push(VIRTIO_BLK_F_RO),
        false => {
            bits.extend((drive.discard > 0).then_some(VIRTIO_BLK_F_DISCARD));
            bits.extend((drive.write_zeroes > 0).then_some(VIRTIO_BLK_F_WRITE_ZEROES));
        }
    }
    let bits = bits.into_iter().fold(0, |all, bit| all | 1 << bit);
    bits | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
}

/// What of the vhost-user protocol is served beyond its core.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::REPLY_ACK
        // QEMU demands both of a back-end with VIRTIO_F_ACCESS_PLATFORM.
        | VhostUserProtocolFeatures::BACKEND_REQ
}

/// Whether these features have this one.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// The configuration space: `size` bytes from `offset` on; none where that is beyond what may be asked.
pub(super) fn space(
    drive: &Geometry,
    queues: u16,
    write_back: bool,
    offset: u32,
    size: u32,
) -> Option<Vec<u8>> {
    let end = offset.checked_add(size).filter(|end| *end <= MOST)?;
    let mut space = vec![0; MOST as usize];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = space.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    let block = u64::from(drive.block);
    let sectors = |blocks: u32| u32::try_from(u64::from(blocks) * block / SECTOR).unwrap_or(u32::MAX);
    put(0, &(drive.blocks.saturating_mul(block / SECTOR)).to_le_bytes());
    put(12, &(SEGMENTS as u32).to_le_bytes());
    put(20, &drive.block.to_le_bytes());
    // One block is the physical and the least good transfer: exponent 0, alignment 0.
    put(26, &1u16.to_le_bytes());
    put(WRITEBACK as usize, &[u8::from(write_back)]);
    put(34, &queues.to_le_bytes());
    put(36, &sectors(drive.discard).to_le_bytes());
    put(40, &u32::from(drive.discard > 0).to_le_bytes());
    put(44, &sectors(1).to_le_bytes());
    put(48, &sectors(drive.write_zeroes).to_le_bytes());
    put(52, &u32::from(drive.write_zeroes > 0).to_le_bytes());
    put(56, &[1]); // what is zeroed may be given up
    debug_assert!(space.iter().skip(LEN).all(|byte| *byte == 0));
    space.get(offset as usize..end as usize).map(<[u8]>::to_vec)
}
