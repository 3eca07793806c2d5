//! A guest with a front-end, as small as they come: memory, virtqueues written by hand, and the `vhost` crate's
//! front-end. What it writes into its rings is anything that a test likes.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use passgate_bindings::memory::GuestFile;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of its memory.
pub const SIZE: u64 = 16 << 20;
/// Where the front-end says that it has its memory.
pub const USER: u64 = 0x7000_0000_0000;
/// `VIRTIO_F_ACCESS_PLATFORM`.
pub const PLATFORM: u64 = 1 << 33;
/// Descriptors of a ring.
pub const ENTRIES: u16 = 64;
/// Bytes of one ring: descriptors, available, used, each in a page of its own.
const RING: u64 = 3 * 4096;
/// Where headers and status bytes of requests are, one of each for each descriptor.
const HEADERS: u64 = 0x10_0000;
/// Where data may be.
pub const DATA: u64 = 0x20_0000;

/// Requests (virtio 1.2, 5.2.6).
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;
/// Statuses.
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
/// A status that no device writes.
pub const UNTOUCHED: u8 = 0xee;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// One descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// One virtqueue as its driver has it.
#[derive(Debug)]
pub struct Ring {
    base: u64,
    pub avail: u16,
    pub used: u16,
    pub kick: EventFd,
    pub call: EventFd,
    /// Ready when it was called.
    bell: RawFd,
}

impl Drop for Ring {
    fn drop(&mut self) {
        let _ = epoll::close(self.bell);
    }
}

/// A guest and its front-end.
pub struct Guest {
    pub memory: GuestFile,
    pub frontend: Frontend,
    /// Its connection, for who says what the front-end would not.
    pub socket: UnixStream,
    pub rings: Vec<Ring>,
    pub features: u64,
    /// Features that it does not take; at first [`PLATFORM`], as QEMU's without a virtual IOMMU.
    pub unwanted: u64,
    /// Where the front-end says that its rings are: in its own address space, or 0 for guest-physical addresses.
    pub rings_at: u64,
    pub inflight: Option<(VhostUserInflight, std::fs::File)>,
}

fn dial(path: &Path, queues: usize) -> (Frontend, UnixStream) {
    let socket = UnixStream::connect(path).unwrap();
    (Frontend::from_stream(socket.try_clone().unwrap(), queues as u64), socket)
}

impl Guest {
    /// Memory, and a connection to the back-end at `path`; nothing has been said yet.
    pub fn connect(path: &Path, queues: usize) -> Self {
        let memory = GuestFile::memfd("guest", SIZE).unwrap();
        Self::with(memory, path, queues)
    }

    fn with(memory: GuestFile, path: &Path, queues: usize) -> Self {
        let rings = (0..queues).map(|index| {
            let call = EventFd::new(EFD_NONBLOCK).unwrap();
            let bell = epoll::create(true).unwrap();
            let event = epoll::Event::new(epoll::Events::EPOLLIN, 0);
            epoll::ctl(bell, epoll::ControlOptions::EPOLL_CTL_ADD, call.as_raw_fd(), event).unwrap();
            let kick = EventFd::new(EFD_NONBLOCK).unwrap();
            Ring { base: index as u64 * RING, avail: 0, used: 0, kick, call, bell }
        });
        let rings = rings.collect();
        let (frontend, socket) = dial(path, queues);
        Self {
            memory,
            frontend,
            socket,
            rings,
            features: 0,
            unwanted: PLATFORM,
            rings_at: USER,
            inflight: None,
        }
    }

    /// The same guest with a new connection, after its back-end has gone: with its memory and what was in flight.
    pub fn again(self, path: &Path) -> Self {
        let Self { memory, rings, inflight, .. } = self;
        let (frontend, socket) = dial(path, rings.len());
        Self { memory, frontend, socket, rings, features: 0, unwanted: PLATFORM, rings_at: USER, inflight }
    }

    /// Says everything that a front-end says until its rings run.
    pub fn start(&mut self) -> vhost::Result<()> {
        self.greet()?;
        self.frontend.set_mem_table(&[self.region()])?;
        (0..self.rings.len()).try_for_each(|ring| self.start_ring(ring))
    }

    /// Features, as far as they are offered.
    pub fn greet(&mut self) -> vhost::Result<()> {
        self.frontend.set_owner()?;
        self.features = self.frontend.get_features()?;
        // Without event index: whoever wants to be told is told of everything.
        self.features &= !(1 << 29) & !self.unwanted;
        let offered = self.frontend.get_protocol_features().unwrap();
        self.frontend.set_protocol_features(offered).unwrap();
        if offered.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        }
        self.frontend.set_features(self.features)?;
        assert_ne!(self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), 0);
        Ok(())
    }

    /// Asks for memory for what is in flight, or hands it back.
    pub fn track(&mut self) {
        if let Some((inflight, file)) = &self.inflight {
            self.frontend.set_inflight_fd(inflight, file.as_raw_fd()).unwrap();
            return;
        }
        let asked = VhostUserInflight::new(0, 0, self.rings.len() as u16, ENTRIES);
        let (inflight, file) = self.frontend.get_inflight_fd(&asked).unwrap();
        self.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        self.inflight = Some((inflight, file));
    }

    /// Whether a request is noted as in flight.
    pub fn inflight_of(&self, ring: usize, head: u16) -> u8 {
        use std::os::unix::fs::FileExt;
        let (_, file) = self.inflight.as_ref().unwrap();
        let part = (16 + 16 * u64::from(ENTRIES)).next_multiple_of(64);
        let mut mark = [0];
        file.read_exact_at(&mut mark, part * ring as u64 + 16 + 16 * u64::from(head)).unwrap();
        mark[0]
    }

    /// All of its memory, as one region.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        self.part(0, SIZE)
    }

    /// A part of its memory.
    pub fn part(&self, gpa: u64, len: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: USER + gpa,
            mmap_offset: gpa,
            mmap_handle: self.memory.as_fd().as_raw_fd(),
        }
    }

    /// Sets a ring up and enables it.
    pub fn start_ring(&mut self, ring: usize) -> vhost::Result<()> {
        let (Ring { base, used, .. }, at) = (&self.rings[ring], self.rings_at);
        let (base, used) = (*base, *used);
        let config = VringConfigData {
            queue_max_size: ENTRIES,
            queue_size: ENTRIES,
            flags: 0,
            desc_table_addr: at + base,
            avail_ring_addr: at + base + 4096,
            used_ring_addr: at + base + 8192,
            log_addr: None,
        };
        self.frontend.set_vring_num(ring, ENTRIES)?;
        // As QEMU says it after a back-end has gone: what was not answered was not taken.
        self.frontend.set_vring_base(ring, used)?;
        self.frontend.set_vring_addr(ring, &config)?;
        self.frontend.set_vring_call(ring, &self.rings[ring].call)?;
        self.frontend.set_vring_kick(ring, &self.rings[ring].kick)?;
        self.frontend
            .set_vring_enable(ring, true)
            .map_err(|_| vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::BackendInternalError))
    }

    /// Where a ring begins.
    pub fn ring_base(&self, ring: usize) -> u64 {
        self.rings[ring].base
    }

    /// Writes descriptor `index` of a ring.
    pub fn describe(&self, ring: usize, index: u16, desc: Desc) {
        self.describe_at(self.rings[ring].base, index, desc);
    }

    /// Writes descriptor `index` of a table.
    pub fn describe_at(&self, table: u64, index: u16, desc: Desc) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&desc.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&desc.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&desc.next.to_le_bytes());
        self.memory.write(table + u64::from(index) * 16, &bytes).unwrap();
    }

    /// Offers the chain that begins with descriptor `head`, without a kick.
    pub fn offer(&mut self, ring: usize, head: u16) {
        let Ring { base, avail, .. } = self.rings[ring];
        let at = base + 4096 + 4 + u64::from(avail % ENTRIES) * 2;
        self.memory.write(at, &head.to_le_bytes()).unwrap();
        self.set_avail(ring, avail.wrapping_add(1));
    }

    /// Says how many chains were offered in all.
    pub fn set_avail(&mut self, ring: usize, index: u16) {
        self.rings[ring].avail = index;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.memory.write(self.rings[ring].base + 4096 + 2, &index.to_le_bytes()).unwrap();
    }

    /// Has the back-end look.
    pub fn kick(&self, ring: usize) {
        self.rings[ring].kick.write(1).unwrap();
    }

    /// Writes a request's header and descriptors from descriptor `head` on, with its data in these pieces, and offers
    /// it. Its status is [`Guest::status`].
    pub fn request(&mut self, ring: usize, head: u16, kind: u32, sector: u64, data: &[(u64, u32)]) {
        self.write_header(ring, head, kind, sector);
        let (header, status) = self.places(ring, head);
        let reads = matches!(kind, IN | GET_ID);
        let mut chain = vec![(header, 16, 0)];
        chain.extend(data.iter().map(|(addr, len)| (*addr, *len, if reads { WRITE } else { 0 })));
        chain.push((status, 1, WRITE));
        let last = chain.len() - 1;
        for (nth, (addr, len, flags)) in chain.into_iter().enumerate() {
            let index = head + nth as u16;
            let (flags, next) = if nth == last { (flags, 0) } else { (flags | NEXT, index + 1) };
            self.describe(ring, index, Desc { addr, len, flags, next });
        }
        self.offer(ring, head);
    }

    /// Writes a request's header, and a status that no device writes.
    pub fn write_header(&self, ring: usize, head: u16, kind: u32, sector: u64) {
        let (header, status) = self.places(ring, head);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write(header, &bytes).unwrap();
        self.memory.write(status, &[UNTOUCHED]).unwrap();
    }

    /// Where a request's header and its status are.
    pub fn places(&self, ring: usize, head: u16) -> (u64, u64) {
        let at = HEADERS + (ring as u64 * u64::from(ENTRIES) + u64::from(head)) * 32;
        (at, at + 16)
    }

    /// The status of the request with this head.
    pub fn status(&self, ring: usize, head: u16) -> u8 {
        let mut byte = [0];
        self.memory.read(self.places(ring, head).1, &mut byte).unwrap();
        byte[0]
    }

    /// What the device has used since the last time: heads and lengths.
    pub fn used(&mut self, ring: usize) -> Vec<(u32, u32)> {
        let Ring { base, .. } = self.rings[ring];
        let mut index = [0; 2];
        self.memory.read(base + 8192 + 2, &mut index).unwrap();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let mut found = Vec::new();
        while self.rings[ring].used != u16::from_le_bytes(index) {
            let at = base + 8192 + 4 + u64::from(self.rings[ring].used % ENTRIES) * 8;
            let mut bytes = [0; 8];
            self.memory.read(at, &mut bytes).unwrap();
            let word = u64::from_le_bytes(bytes);
            found.push((word as u32, (word >> 32) as u32));
            self.rings[ring].used = self.rings[ring].used.wrapping_add(1);
        }
        found
    }

    /// Waits until the device has used `count` chains more; all that it has.
    pub fn await_used(&mut self, ring: usize, count: usize) -> Vec<(u32, u32)> {
        let found = self.used_within(ring, count, Duration::from_secs(20));
        assert!(found.len() >= count, "only {} of {count} requests have ended: {found:?}", found.len());
        found
    }

    /// The same, with what there is when `patience` is over.
    pub fn used_within(&mut self, ring: usize, count: usize, patience: Duration) -> Vec<(u32, u32)> {
        let until = Instant::now() + patience;
        let mut found = self.used(ring);
        while found.len() < count {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let mut events = [epoll::Event { events: 0, data: 0 }];
            let left = i32::try_from(left.as_millis() + 1).unwrap();
            let _ = epoll::wait(self.rings[ring].bell, left, &mut events);
            let _ = self.rings[ring].call.read();
            found.extend(self.used(ring));
        }
        found
    }

    /// One request, from its offer to its status.
    pub fn ask(&mut self, ring: usize, kind: u32, sector: u64, data: &[(u64, u32)]) -> u8 {
        self.request(ring, 0, kind, sector, data);
        self.kick(ring);
        let used = self.await_used(ring, 1);
        assert_eq!(used[0].0, 0);
        self.status(ring, 0)
    }
}
