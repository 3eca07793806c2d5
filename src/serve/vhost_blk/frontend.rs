//! The messages of one front-end (vhost-user protocol), on the handler trait of the `vhost` crate.
//!
//! The handler of `vhost-user-backend`, whose virtqueues are used here, is not used: it answers `GET_INFLIGHT_FD` with an error
//! and cannot be replaced from outside; it calls the device only after a region has left its memory table, so that the device
//! could neither wait nor refuse; and it closes the connection at every error of the device. Here a region is unmapped from
//! every domain, with proof, before its removal is answered. A removal is never refused while a fence is left to try: if it
//! fails all the same, the error ends the connection.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use passgate_backends::nvme::Geometry;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost_user_backend::VringT;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::config;
use super::inflight::Inflight;
use super::memory::{Shape, Table};
use super::ring::{MAX_QUEUE_SIZE, Memory, Vring};
use super::worker::{Mailbox, WorkerCommand, replace_memory};

/// The time that a ring may take to stop: longer than the drive needs to give a command up (abort, then controller resets).
const RING_STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// The time that all rings of a front-end that has disconnected have to stop before its memory is taken from the drive.
const DISCONNECT_GRACE: Duration = Duration::from_secs(1);
/// The number of memory regions of a front-end, at most (`GET_MAX_MEM_SLOTS`).
const MAX_MEM_SLOTS: u64 = 509;

/// The virtio device, which outlives connections: its virtqueues, the workers that serve them, and the memory they see.
#[derive(Clone)]
pub(super) struct BlockDevice {
    pub(super) geometry: Arc<Geometry>,
    pub(super) read_only: bool,
    pub(super) memory: Memory,
    /// The virtqueues by their index, each with the mailbox of the worker that serves it.
    pub(super) rings: Arc<Vec<(Vring, Mailbox)>>,
    /// As [`super::ring::RingContext::write_through`].
    pub(super) write_through: Arc<AtomicBool>,
}

/// The state of a front-end's connection.
pub(super) struct Frontend {
    device: BlockDevice,
    table: Table,
    features: u64,
    inflight: Option<Inflight>,
    /// The `writeback` field of the configuration, as the guest has set it.
    write_back: bool,
    has_owner: bool,
    /// The channel of `SET_BACKEND_REQ_FD`. Nothing is sent on it, but it must stay open: the front-end takes its end for that
    /// of the back-end.
    backend_channel: Option<Backend>,
}

/// Logs why a message fails, and returns the error for the `vhost` crate, which has no text.
fn invalid(why: impl fmt::Display) -> Error {
    log::warn!("vhost-user: {why}");
    Error::InvalidParam
}

impl Frontend {
    pub(super) fn new(device: BlockDevice, table: Table) -> Self {
        Self {
            device,
            table,
            features: 0,
            inflight: None,
            write_back: true,
            has_owner: false,
            backend_channel: None,
        }
    }

    /// Returns the virtqueue of this index and its worker's mailbox.
    fn ring(&self, index: u32) -> Result<(&Vring, &Mailbox)> {
        let ring = usize::try_from(index).ok().and_then(|index| self.device.rings.get(index));
        ring.map(|(vring, worker)| (vring, worker)).ok_or_else(|| {
            invalid(format_args!("there is no queue {index}: {} are", self.device.rings.len()))
        })
    }

    /// Publishes to the workers whether writes go through to the medium. It applies to every write that is offered after this
    /// has returned. Without `VIRTIO_BLK_F_CONFIG_WCE` writes go through if the guest cannot flush (virtio 1.2, 5.2.5).
    fn publish_write_through(&self) {
        let chosen = config::has_feature(self.features, VIRTIO_BLK_F_CONFIG_WCE);
        let flushes = config::has_feature(self.features, VIRTIO_BLK_F_FLUSH);
        let back = if chosen { self.write_back } else { flushes };
        self.device.write_through.store(!back, Ordering::Release);
    }

    /// Starts a ring, unless it runs already.
    fn start(&self, index: u32) -> Result<()> {
        let (vring, worker) = self.ring(index)?;
        let (ready, len) = {
            let locked = vring.get_ref();
            (locked.get_queue().ready(), locked.get_queue().size())
        };
        let ring = index as u16; // there is such a ring
        if ready {
            return Ok(());
        }
        let inflight = match &self.inflight {
            None => None,
            Some(inflight) => Some(inflight.queue(ring, len).ok_or_else(|| {
                invalid(format_args!("queue {index} is longer than what was agreed for requests in flight"))
            })?),
        };
        vring.set_queue_ready(true);
        worker.send(WorkerCommand::Start { ring, inflight });
        Ok(())
    }

    /// Requests a ring to stop. Returns the receiver of the next index of its available ring, which is sent once none of its
    /// requests is in flight at the drive; none if the ring does not run.
    fn request_stop(&self, index: u32) -> Result<Option<Receiver<u16>>> {
        let (vring, worker) = self.ring(index)?;
        if !vring.get_ref().get_queue().ready() {
            return Ok(None);
        }
        let (ended, wait) = mpsc::channel();
        worker.send(WorkerCommand::Stop { ring: index as u16, ended }); // there is such a ring
        Ok(Some(wait))
    }

    /// Stops a ring, and returns the next index of its available ring once none of its requests is in flight at the drive.
    /// Fails after [`RING_STOP_TIMEOUT`].
    fn stop(&self, index: u32) -> Result<u16> {
        let (vring, worker) = self.ring(index)?;
        let Some(wait) = self.request_stop(index)? else { return Ok(vring.queue_next_avail()) };
        let next = wait.recv_timeout(RING_STOP_TIMEOUT).map_err(|_| {
            invalid(format_args!(
                "queue {index}: the drive has not ended its requests in {RING_STOP_TIMEOUT:?}"
            ))
        })?;
        vring.set_queue_ready(false);
        vring.set_kick(None);
        vring.set_call(None);
        worker.send(WorkerCommand::Kick { ring: index as u16, kick: None });
        Ok(next)
    }

    /// Ends a ring of which requests are still in flight at the drive: their completions must not be written to the memory of
    /// the next front-end.
    fn abandon(&self, index: u32) {
        let Ok((vring, worker)) = self.ring(index) else { return };
        let (done, wait) = mpsc::channel();
        worker.send(WorkerCommand::Abandon { ring: index as u16, done }); // there is such a ring
        if let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(RING_STOP_TIMEOUT) {
            log::error!("queue {index}: its worker hangs; this is a bug of passgate");
        }
        vring.set_queue_ready(false);
        vring.set_kick(None);
        vring.set_call(None);
        worker.send(WorkerCommand::Kick { ring: index as u16, kick: None });
    }

    fn enable(&self, index: u32, enable: bool) -> Result<()> {
        let (vring, worker) = self.ring(index)?;
        vring.set_enabled(enable);
        worker.send(WorkerCommand::Poll);
        Ok(())
    }

    /// Returns the indices of all rings.
    fn indices(&self) -> std::ops::Range<u32> {
        0..self.device.rings.len() as u32 // at most 65 535
    }

    /// Ends the connection's use of the device. Afterwards no request of its rings is in flight at the drive, and its memory is
    /// not mapped for any device.
    pub(super) fn disconnect(mut self) {
        // All rings at once, and only for a short time: requests that do not end by themselves are ended by the fences of the
        // removal that follows.
        let stops: Vec<_> =
            self.indices().filter_map(|index| self.request_stop(index).ok().flatten()).collect();
        let until = Instant::now() + DISCONNECT_GRACE;
        for stop in stops {
            let _ = stop.recv_timeout(until.saturating_duration_since(Instant::now()));
        }
        show_memory(&self.device, GuestMemoryMmap::new());
        if let Err(error) = self.table.clear() {
            log::error!("vhost-user: {error}");
        }
        for index in self.indices() {
            if self.stop(index).is_err() {
                log::error!("queue {index} is stopped with requests that the drive has not completed");
                self.abandon(index);
            }
            if let Ok((vring, _)) = self.ring(index) {
                vring.set_enabled(false);
                vring.get_mut().get_queue_mut().reset();
            }
        }
    }
}

/// Makes a descriptor of the front-end non-blocking, so that no worker blocks on it.
fn set_nonblocking(file: File) -> Result<File> {
    let flags = rustix::fs::fcntl_getfl(&file).map_err(invalid)?;
    rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::NONBLOCK).map_err(invalid)?;
    Ok(file)
}

/// Replaces the memory that workers see. When this returns, no worker accesses the previous memory.
fn show_memory(device: &BlockDevice, memory: GuestMemoryMmap) {
    replace_memory(&device.memory, device.rings.iter().map(|(vring, _)| vring), memory);
}

impl VhostUserBackendReqHandlerMut for Frontend {
    fn set_owner(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.has_owner, true) {
            false => Ok(()),
            true => Err(Error::InvalidOperation("it has an owner")),
        }
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.has_owner = false;
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        for index in self.indices() {
            self.stop(index)?;
            self.enable(index, false)?;
        }
        // A reset ends requests that were not answered: the next back-end must not do them again.
        if let Some(inflight) = &self.inflight {
            inflight.reset();
        }
        self.features = 0;
        self.write_back = true;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(&self.device.geometry, self.device.read_only))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_features()?;
        if features & !offered != 0 {
            return Err(invalid(format_args!("features {:#x} are not offered", features & !offered)));
        }
        self.features = features;
        let event_idx = config::has_feature(features, VIRTIO_RING_F_EVENT_IDX);
        self.device.rings.iter().for_each(|(vring, _)| vring.set_queue_event_idx(event_idx));
        // Without VHOST_USER_F_PROTOCOL_FEATURES rings start enabled: there is no SET_VRING_ENABLE (vhost-user protocol, "Ring
        // states").
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            self.indices().try_for_each(|index| self.enable(index, true))?;
        }
        self.publish_write_through();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let wanted = regions.iter().zip(files);
        let wanted = wanted.map(|(region, file)| (Shape::of(region), region.user_addr, file)).collect();
        let device = self.device.clone();
        self.table.set(wanted, |memory| show_memory(&device, memory)).map_err(invalid)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let (vring, _) = self.ring(index)?;
        let size = u16::try_from(num).ok().filter(|num| num.is_power_of_two() && *num <= MAX_QUEUE_SIZE);
        let size = size.ok_or_else(|| {
            invalid(format_args!(
                "queue {index}: {num} descriptors; give a power of two up to {MAX_QUEUE_SIZE}"
            ))
        })?;
        self.ensure_stopped(index)?;
        vring.set_queue_size(size);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let (vring, _) = self.ring(index)?;
        // With VIRTIO_F_ACCESS_PLATFORM these are I/O virtual addresses (vhost-user protocol, "Ring addresses"): guest-physical
        // ones here, because there is no translation. Some front-ends send their own virtual addresses all the same: an address
        // that is not a guest-physical one is taken for one of those.
        let physical = config::has_feature(self.features, VIRTIO_F_ACCESS_PLATFORM);
        let at = |address: u64| {
            let gpa = Some(address).filter(|gpa| physical && self.table.has(*gpa));
            gpa.or_else(|| self.table.gpa(address))
                .ok_or_else(|| invalid(format_args!("queue {index}: {address:#x} is in no region")))
        };
        let (descriptor, available, used) = (at(descriptor)?, at(available)?, at(used)?);
        let mut locked = vring.get_mut();
        // A front-end may repeat the same addresses while the ring runs, for example after SET_MEM_TABLE.
        let queue = locked.get_queue();
        let same = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
        if queue.ready() && same != (descriptor, available, used) {
            return Err(invalid(format_args!(
                "queue {index} is running: stop it before its addresses are changed"
            )));
        }
        locked.set_queue_info(descriptor, available, used).map_err(invalid)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (vring, _) = self.ring(index)?;
        self.ensure_stopped(index)?;
        let base = u16::try_from(base);
        vring.set_queue_next_avail(base.map_err(|_| invalid("the base of a split queue has 16 bits"))?);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop(index).map(|next| VhostUserVringState::new(index, next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (vring, worker) = self.ring(index.into())?;
        let file = file.ok_or_else(|| invalid(format_args!("queue {index} without a kick is not served")))?;
        let file = set_nonblocking(file)?;
        let kick = file.try_clone().map_err(invalid)?;
        vring.set_kick(Some(file));
        worker.send(WorkerCommand::Kick { ring: index.into(), kick: Some(kick.into()) });
        self.start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let file = file.map(set_nonblocking).transpose()?;
        let (vring, _) = self.ring(index.into())?;
        vring.set_call(file);
        // One notification without a cause: an earlier back-end may have died between adding a used buffer and notifying the
        // guest, and recovered requests may have been answered before this descriptor came.
        if let Err(error) = vring.signal_used_queue() {
            log::debug!("queue {index}: the guest cannot be notified: {error}");
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.ring(index.into())?.0.set_err(file);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(config::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        match features & !config::protocol_features().bits() {
            0 => Ok(()),
            more => Err(invalid(format_args!("protocol features {more:#x} are not offered"))),
        }
    }

    fn set_backend_req_fd(&mut self, backend_channel: Backend) {
        self.backend_channel = Some(backend_channel);
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.device.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.enable(index, enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let queues = self.device.rings.len() as u16; // at most 65 535
        config::config_space(&self.device.geometry, queues, self.write_back, offset, size)
            .ok_or_else(|| invalid(format_args!("there is no configuration at {offset}..+{size}")))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let (config::WRITEBACK_OFFSET, [back @ (0 | 1)]) = (offset, buf) else {
            return Err(invalid("of the configuration only `writeback` can be set, to 0 or 1"));
        };
        self.write_back = *back == 1;
        if let Some(inflight) = &self.inflight {
            inflight.set_write_through(!self.write_back);
        }
        self.publish_write_through();
        Ok(())
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let VhostUserInflight { num_queues, queue_size, .. } = *inflight;
        if usize::from(num_queues) > self.device.rings.len() || num_queues == 0 || queue_size > MAX_QUEUE_SIZE
        {
            return Err(invalid(format_args!("{num_queues} queues of {queue_size} are more than there are")));
        }
        let (made, fd) = Inflight::new(num_queues, queue_size).map_err(invalid)?;
        self.inflight = Some(made);
        let size = Inflight::size(num_queues, queue_size);
        Ok((VhostUserInflight::new(size, 0, num_queues, queue_size), fd.into()))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *inflight;
        let fd = OwnedFd::from(file);
        let back = Inflight::from_fd(fd, mmap_size, mmap_offset, num_queues, queue_size).map_err(invalid)?;
        // A front-end that reconnects does not send SET_CONFIG again: the choice is taken from this memory,
        self.write_back &= !back.is_write_through();
        // and stored there, if the guest has chosen before this message.
        back.set_write_through(!self.write_back);
        self.inflight = Some(back);
        self.publish_write_through();
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEM_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let device = &self.device;
        let (shape, user) = (Shape::of(region), region.user_addr);
        self.table.add(shape, user, file, |memory| show_memory(device, memory)).map_err(invalid)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let device = &self.device;
        let (shape, user) = (Shape::of(region), region.user_addr);
        self.table.remove(shape, user, |memory| show_memory(device, memory)).map_err(invalid)
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("this is a block device"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("it shares no objects"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("an assigned drive does not migrate"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("an assigned drive does not migrate"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("it has no shared memory"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("an assigned drive does not migrate"))
    }
}

impl Frontend {
    /// Fails if the ring runs.
    fn ensure_stopped(&self, index: u32) -> Result<()> {
        let (vring, _) = self.ring(index)?;
        match vring.get_ref().get_queue().ready() {
            false => Ok(()),
            true => Err(invalid(format_args!("queue {index} is running: stop it before it is changed"))),
        }
    }
}
