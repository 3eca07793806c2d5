//! The features and the configuration space of the device (virtio 1.2, 5.2.3 and 5.2.4).

use passgate_backends::nvme::Geometry;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::request::{MAX_SEGMENTS, SECTOR};

/// The length in bytes of `struct virtio_blk_config` up to and including its write-zeroes fields.
const CONFIG_LEN: usize = 60;
/// The offset of the field `writeback`.
pub(super) const WRITEBACK_OFFSET: u32 = 32;
/// The length in bytes that a front-end may read. The bytes beyond [`CONFIG_LEN`] are zero.
pub(super) const MAX_CONFIG_LEN: u32 = 256;

/// Returns the features that are offered for this drive.
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

/// Returns the protocol features of vhost-user that are offered.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::REPLY_ACK
        // QEMU requires both of a back-end that offers VIRTIO_F_ACCESS_PLATFORM.
        | VhostUserProtocolFeatures::BACKEND_REQ
}

/// Returns true if `features` has this bit.
pub(super) fn has_feature(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// Returns `size` bytes of the configuration space from `offset` on; none if that is beyond [`MAX_CONFIG_LEN`].
pub(super) fn config_space(
    drive: &Geometry,
    queues: u16,
    write_back: bool,
    offset: u32,
    size: u32,
) -> Option<Vec<u8>> {
    let end = offset.checked_add(size).filter(|end| *end <= MAX_CONFIG_LEN)?;
    let mut space = vec![0; MAX_CONFIG_LEN as usize];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(field) = space.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    let block = u64::from(drive.block);
    let sectors = |blocks: u32| u32::try_from(u64::from(blocks) * block / SECTOR).unwrap_or(u32::MAX);
    put(0, &(drive.blocks.saturating_mul(block / SECTOR)).to_le_bytes()); // capacity
    put(12, &(MAX_SEGMENTS as u32).to_le_bytes()); // seg_max
    put(20, &drive.block.to_le_bytes()); // blk_size
    // Topology: physical_block_exp 0, alignment_offset 0, min_io_size one block.
    put(26, &1u16.to_le_bytes());
    put(WRITEBACK_OFFSET as usize, &[u8::from(write_back)]);
    put(34, &queues.to_le_bytes()); // num_queues
    put(36, &sectors(drive.discard).to_le_bytes()); // max_discard_sectors
    put(40, &u32::from(drive.discard > 0).to_le_bytes()); // max_discard_seg
    put(44, &sectors(1).to_le_bytes()); // discard_sector_alignment
    put(48, &sectors(drive.write_zeroes).to_le_bytes()); // max_write_zeroes_sectors
    put(52, &u32::from(drive.write_zeroes > 0).to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    debug_assert!(space.iter().skip(CONFIG_LEN).all(|byte| *byte == 0));
    space.get(offset as usize..end as usize).map(<[u8]>::to_vec)
}
