//! A minimal guest with a front-end: memory, split virtqueues that the test writes itself, and the `vhost` crate's front-end. A
//! test can write anything into the rings.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use passgate_bindings::memory::GuestFile;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The size of the guest's memory in bytes.
pub const MEMORY_BYTES: u64 = 16 << 20;
/// The address of the guest's memory in the front-end's address space, as it announces it.
pub const USER_ADDR: u64 = 0x7000_0000_0000;
/// The feature bit `VIRTIO_F_ACCESS_PLATFORM` (virtio 1.2, 6).
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// The number of descriptors of a virtqueue.
pub const QUEUE_SIZE: u16 = 64;
/// The size of one virtqueue in bytes: descriptor table, available ring and used ring, each in a page of its own.
const RING_BYTES: u64 = 3 * 4096;
/// The guest-physical address of the headers and status bytes of requests: one of each for each descriptor.
const HEADERS_GPA: u64 = 0x10_0000;
/// The guest-physical address of the memory for data.
pub const DATA_GPA: u64 = 0x20_0000;

/// Request types `VIRTIO_BLK_T_…` (virtio 1.2, 5.2.6).
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;
/// Status bytes `VIRTIO_BLK_S_…` (virtio 1.2, 5.2.6).
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
/// A status that no device writes.
pub const UNTOUCHED: u8 = 0xee;

/// Descriptor flags `VIRTQ_DESC_F_…` (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor of a virtqueue (virtio 1.2, 2.7.5).
#[derive(Debug, Clone, Copy)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// A virtqueue as its driver sees it.
#[derive(Debug)]
pub struct Ring {
    base: u64,
    pub avail: u16,
    pub used: u16,
    pub kick: EventFd,
    pub call: EventFd,
    /// An epoll instance that is ready while `call` is signalled: for waits with a timeout.
    call_epoll: RawFd,
}

impl Drop for Ring {
    fn drop(&mut self) {
        let _ = epoll::close(self.call_epoll);
    }
}

/// A guest and its front-end.
pub struct Guest {
    pub memory: GuestFile,
    pub frontend: Frontend,
    /// A duplicate of the front-end's connection, for messages that the `vhost` crate would not send.
    pub socket: UnixStream,
    pub rings: Vec<Ring>,
    pub features: u64,
    /// Features that it does not accept; by default [`ACCESS_PLATFORM`], as QEMU without a virtual IOMMU.
    pub declined_features: u64,
    /// Added to the addresses of the rings that are announced: [`USER_ADDR`], or 0 for guest-physical addresses.
    pub ring_address_base: u64,
    pub inflight: Option<(VhostUserInflight, std::fs::File)>,
}

fn connect_front_end(path: &Path, queues: usize) -> (Frontend, UnixStream) {
    let socket = UnixStream::connect(path).unwrap();
    (Frontend::from_stream(socket.try_clone().unwrap(), queues as u64), socket)
}

impl Guest {
    /// Connects to the back-end at `path`, and sends nothing yet.
    pub fn connect(path: &Path, queues: usize) -> Self {
        let memory = GuestFile::memfd("guest", MEMORY_BYTES).unwrap();
        Self::with(memory, path, queues)
    }

    fn with(memory: GuestFile, path: &Path, queues: usize) -> Self {
        let rings = (0..queues).map(|index| {
            let call = EventFd::new(EFD_NONBLOCK).unwrap();
            let call_epoll = epoll::create(true).unwrap();
            let event = epoll::Event::new(epoll::Events::EPOLLIN, 0);
            epoll::ctl(call_epoll, epoll::ControlOptions::EPOLL_CTL_ADD, call.as_raw_fd(), event).unwrap();
            let kick = EventFd::new(EFD_NONBLOCK).unwrap();
            Ring { base: index as u64 * RING_BYTES, avail: 0, used: 0, kick, call, call_epoll }
        });
        let rings = rings.collect();
        let (frontend, socket) = connect_front_end(path, queues);
        Self {
            memory,
            frontend,
            socket,
            rings,
            features: 0,
            declined_features: ACCESS_PLATFORM,
            ring_address_base: USER_ADDR,
            inflight: None,
        }
    }

    /// Returns the same guest with a new connection, after its back-end has ended: with its memory and its inflight buffer.
    pub fn reconnect(self, path: &Path) -> Self {
        let Self { memory, rings, inflight, .. } = self;
        let (frontend, socket) = connect_front_end(path, rings.len());
        Self {
            memory,
            frontend,
            socket,
            rings,
            features: 0,
            declined_features: ACCESS_PLATFORM,
            ring_address_base: USER_ADDR,
            inflight,
        }
    }

    /// Sends every message that a front-end sends until its rings run.
    pub fn start(&mut self) -> vhost::Result<()> {
        self.negotiate()?;
        self.frontend.set_mem_table(&[self.whole_region()])?;
        (0..self.rings.len()).try_for_each(|ring| self.start_ring(ring))
    }

    /// Negotiates features and protocol features.
    pub fn negotiate(&mut self) -> vhost::Result<()> {
        self.frontend.set_owner()?;
        self.features = self.frontend.get_features()?;
        // Without VIRTIO_F_EVENT_IDX (bit 29), so that every used buffer is signalled.
        self.features &= !(1 << 29) & !self.declined_features;
        let offered = self.frontend.get_protocol_features().unwrap();
        self.frontend.set_protocol_features(offered).unwrap();
        if offered.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        }
        self.frontend.set_features(self.features)?;
        assert_ne!(self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), 0);
        Ok(())
    }

    /// Sets the inflight buffer (`SET_INFLIGHT_FD`): a new one from the back-end, or the one of the connection before.
    pub fn set_up_inflight(&mut self) {
        if let Some((inflight, file)) = &self.inflight {
            self.frontend.set_inflight_fd(inflight, file.as_raw_fd()).unwrap();
            return;
        }
        let request = VhostUserInflight::new(0, 0, self.rings.len() as u16, QUEUE_SIZE);
        let (inflight, file) = self.frontend.get_inflight_fd(&request).unwrap();
        self.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        self.inflight = Some((inflight, file));
    }

    /// Returns the mark of a request in the inflight buffer: 1 while it is in flight (vhost-user, `DescStateSplit`).
    pub fn inflight_mark(&self, ring: usize, head: u16) -> u8 {
        use std::os::unix::fs::FileExt;
        let (_, file) = self.inflight.as_ref().unwrap();
        let part = (16 + 16 * u64::from(QUEUE_SIZE)).next_multiple_of(64);
        let mut mark = [0];
        file.read_exact_at(&mut mark, part * ring as u64 + 16 + 16 * u64::from(head)).unwrap();
        mark[0]
    }

    /// Returns all of its memory as one region.
    pub fn whole_region(&self) -> VhostUserMemoryRegionInfo {
        self.region_of(0, MEMORY_BYTES)
    }

    /// Returns a part of its memory as a region.
    pub fn region_of(&self, gpa: u64, len: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: USER_ADDR + gpa,
            mmap_offset: gpa,
            mmap_handle: self.memory.as_fd().as_raw_fd(),
        }
    }

    /// Sets a ring up and enables it.
    pub fn start_ring(&mut self, ring: usize) -> vhost::Result<()> {
        let (Ring { base, used, .. }, at) = (&self.rings[ring], self.ring_address_base);
        let (base, used) = (*base, *used);
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: at + base,
            avail_ring_addr: at + base + 4096,
            used_ring_addr: at + base + 8192,
            log_addr: None,
        };
        self.frontend.set_vring_num(ring, QUEUE_SIZE)?;
        // As QEMU does after a back-end has ended: requests that were not answered count as not taken.
        self.frontend.set_vring_base(ring, used)?;
        self.frontend.set_vring_addr(ring, &config)?;
        self.frontend.set_vring_call(ring, &self.rings[ring].call)?;
        self.frontend.set_vring_kick(ring, &self.rings[ring].kick)?;
        self.frontend
            .set_vring_enable(ring, true)
            .map_err(|_| vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::BackendInternalError))
    }

    /// Returns the guest-physical address of a virtqueue.
    pub fn ring_base(&self, ring: usize) -> u64 {
        self.rings[ring].base
    }

    /// Writes descriptor `index` of a virtqueue.
    pub fn write_descriptor(&self, ring: usize, index: u16, desc: Desc) {
        self.write_descriptor_at(self.rings[ring].base, index, desc);
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn write_descriptor_at(&self, table: u64, index: u16, desc: Desc) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&desc.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&desc.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&desc.next.to_le_bytes());
        self.memory.write(table + u64::from(index) * 16, &bytes).unwrap();
    }

    /// Makes the chain that begins with descriptor `head` available, without a kick.
    pub fn make_available(&mut self, ring: usize, head: u16) {
        let Ring { base, avail, .. } = self.rings[ring];
        let at = base + 4096 + 4 + u64::from(avail % QUEUE_SIZE) * 2;
        self.memory.write(at, &head.to_le_bytes()).unwrap();
        self.set_avail(ring, avail.wrapping_add(1));
    }

    /// Writes the available index.
    pub fn set_avail(&mut self, ring: usize, index: u16) {
        self.rings[ring].avail = index;
        // The device must see the ring entry before the index (virtio 1.2, 2.7.13.3).
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.memory.write(self.rings[ring].base + 4096 + 2, &index.to_le_bytes()).unwrap();
    }

    /// Signals the kick descriptor of a ring.
    pub fn kick(&self, ring: usize) {
        self.rings[ring].kick.write(1).unwrap();
    }

    /// Writes a request's header and its descriptors from `head` on, with its data in these pieces, and makes it available. Its
    /// status is [`Guest::status`].
    pub fn request(&mut self, ring: usize, head: u16, kind: u32, sector: u64, data: &[(u64, u32)]) {
        self.write_header(ring, head, kind, sector);
        let (header, status) = self.header_and_status(ring, head);
        let reads = matches!(kind, IN | GET_ID);
        let mut chain = vec![(header, 16, 0)];
        chain.extend(data.iter().map(|(addr, len)| (*addr, *len, if reads { WRITE } else { 0 })));
        chain.push((status, 1, WRITE));
        let last = chain.len() - 1;
        for (nth, (addr, len, flags)) in chain.into_iter().enumerate() {
            let index = head + nth as u16;
            let (flags, next) = if nth == last { (flags, 0) } else { (flags | NEXT, index + 1) };
            self.write_descriptor(ring, index, Desc { addr, len, flags, next });
        }
        self.make_available(ring, head);
    }

    /// Writes a request's header, and a status that no device writes.
    pub fn write_header(&self, ring: usize, head: u16, kind: u32, sector: u64) {
        let (header, status) = self.header_and_status(ring, head);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write(header, &bytes).unwrap();
        self.memory.write(status, &[UNTOUCHED]).unwrap();
    }

    /// Returns the guest-physical addresses of a request's header and status.
    pub fn header_and_status(&self, ring: usize, head: u16) -> (u64, u64) {
        let at = HEADERS_GPA + (ring as u64 * u64::from(QUEUE_SIZE) + u64::from(head)) * 32;
        (at, at + 16)
    }

    /// Returns the status byte of the request with this head.
    pub fn status(&self, ring: usize, head: u16) -> u8 {
        let mut byte = [0];
        self.memory.read(self.header_and_status(ring, head).1, &mut byte).unwrap();
        byte[0]
    }

    /// Returns the used elements since the last call: heads and written lengths.
    pub fn used(&mut self, ring: usize) -> Vec<(u32, u32)> {
        let Ring { base, .. } = self.rings[ring];
        let mut index = [0; 2];
        self.memory.read(base + 8192 + 2, &mut index).unwrap();
        // The index must be read before the entries that it covers.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let mut found = Vec::new();
        while self.rings[ring].used != u16::from_le_bytes(index) {
            let at = base + 8192 + 4 + u64::from(self.rings[ring].used % QUEUE_SIZE) * 8;
            let mut bytes = [0; 8];
            self.memory.read(at, &mut bytes).unwrap();
            let word = u64::from_le_bytes(bytes);
            found.push((word as u32, (word >> 32) as u32));
            self.rings[ring].used = self.rings[ring].used.wrapping_add(1);
        }
        found
    }

    /// Waits until the device has used at least `count` more chains; returns all new used elements.
    pub fn await_used(&mut self, ring: usize, count: usize) -> Vec<(u32, u32)> {
        let found = self.used_within(ring, count, Duration::from_secs(20));
        assert!(found.len() >= count, "only {} of {count} requests have ended: {found:?}", found.len());
        found
    }

    /// Like [`Guest::await_used`], but returns what there is after `timeout`.
    pub fn used_within(&mut self, ring: usize, count: usize, timeout: Duration) -> Vec<(u32, u32)> {
        let deadline = Instant::now() + timeout;
        let mut found = self.used(ring);
        while found.len() < count {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                break;
            }
            let mut events = [epoll::Event { events: 0, data: 0 }];
            let remaining = i32::try_from(remaining.as_millis() + 1).unwrap();
            let _ = epoll::wait(self.rings[ring].call_epoll, remaining, &mut events);
            let _ = self.rings[ring].call.read();
            found.extend(self.used(ring));
        }
        found
    }

    /// Runs one request to its end, and returns its status.
    pub fn run_request(&mut self, ring: usize, kind: u32, sector: u64, data: &[(u64, u32)]) -> u8 {
        self.request(ring, 0, kind, sector, data);
        self.kick(ring);
        let used = self.await_used(ring, 1);
        assert_eq!(used[0].0, 0);
        self.status(ring, 0)
    }
}
