//! One front-end's connection: what it says, by the `vhost` crate's handler trait.
//!
//! Not by the handler of `vhost-user-backend`, whose virtqueues are used here: that one answers GET_INFLIGHT_FD with an
//! error and cannot be replaced from outside; it calls the device only after a region has left its memory table, so
//! that nothing could refuse or wait; and it closes the connection at every error of the device. Here a region is taken
//! out of every domain, with proof, before its removal is answered. Where that cannot be had, every fence has been tried
//! before the error ends the connection: this client hears no "no".

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
use super::ring::{LONGEST, Memory, Vring};
use super::worker::{Mailbox, Order, replace_memory};

/// How long a ring may take to end: longer than the drive needs to give a command up.
const ENDING: Duration = Duration::from_secs(30);
/// How long rings have to end by themselves once their front-end is gone.
const LEAVING: Duration = Duration::from_secs(1);
/// Regions at most.
const SLOTS: u64 = 509;

/// What outlives a connection: rings, and whose they are.
#[derive(Clone)]
pub(super) struct Rings {
    pub(super) geometry: Arc<Geometry>,
    pub(super) read_only: bool,
    pub(super) memory: Memory,
    /// By their numbers, each with the worker whose share it is.
    pub(super) rings: Arc<Vec<(Vring, Mailbox)>>,
    /// As [`super::ring::Desk::write_through`].
    pub(super) write_through: Arc<AtomicBool>,
}

/// A connection.
pub(super) struct Frontend {
    rings: Rings,
    table: Table,
    features: u64,
    inflight: Option<Inflight>,
    /// What the guest has set `writeback` to.
    write_back: bool,
    owned: bool,
    /// The channel for requests of this back-end's own. It has none, but the front-end takes the end of the channel for the
    /// end of the back-end.
    requests: Option<Backend>,
}

/// Says why a request of the front-end's fails, where the crate has no words.
fn wrong(why: impl fmt::Display) -> Error {
    log::warn!("vhost-user: {why}");
    Error::InvalidParam
}

impl Frontend {
    pub(super) fn new(rings: Rings, table: Table) -> Self {
        Self { rings, table, features: 0, inflight: None, write_back: true, owned: false, requests: None }
    }

    fn ring(&self, index: u32) -> Result<(&Vring, &Mailbox)> {
        let ring = usize::try_from(index).ok().and_then(|index| self.rings.rings.get(index));
        ring.map(|(vring, worker)| (vring, worker))
            .ok_or_else(|| wrong(format_args!("there is no queue {index}: {} are", self.rings.rings.len())))
    }

    /// Tells the workers how writes are answered; who offers one after this has returned has it answered so.
    fn tell_through(&self) {
        let chosen = config::has(self.features, VIRTIO_BLK_F_CONFIG_WCE);
        let flushes = config::has(self.features, VIRTIO_BLK_F_FLUSH);
        let back = if chosen { self.write_back } else { flushes };
        self.rings.write_through.store(!back, Ordering::Release);
    }

    /// Lets a ring begin where it is all set up.
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
                wrong(format_args!("queue {index} is longer than what was agreed for requests in flight"))
            })?),
        };
        vring.set_queue_ready(true);
        worker.send(Order::Start { ring, inflight });
        Ok(())
    }

    /// Has a ring end: the next index of its available ring comes once the drive has nothing of it. None where it is at
    /// rest.
    fn ending(&self, index: u32) -> Result<Option<Receiver<u16>>> {
        let (vring, worker) = self.ring(index)?;
        if !vring.get_ref().get_queue().ready() {
            return Ok(None);
        }
        let (ended, wait) = mpsc::channel();
        worker.send(Order::Stop { ring: index as u16, ended }); // there is such a ring
        Ok(Some(wait))
    }

    /// Ends a ring: the next index of its available ring, once the drive has nothing of it.
    fn stop(&self, index: u32) -> Result<u16> {
        let (vring, worker) = self.ring(index)?;
        let Some(wait) = self.ending(index)? else { return Ok(vring.queue_next_avail()) };
        let next = wait.recv_timeout(ENDING).map_err(|_| {
            wrong(format_args!("queue {index}: the drive has not ended its requests in {ENDING:?}"))
        })?;
        vring.set_queue_ready(false);
        vring.set_kick(None);
        vring.set_call(None);
        worker.send(Order::Kick { ring: index as u16, kick: None });
        Ok(next)
    }

    /// Ends the life of a ring of which the drive still has something: what that becomes must not be written into the memory
    /// of the next front-end.
    fn abandon(&self, index: u32) {
        let Ok((vring, worker)) = self.ring(index) else { return };
        let (done, wait) = mpsc::channel();
        worker.send(Order::Abandon { ring: index as u16, done }); // there is such a ring
        if let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(ENDING) {
            log::error!("queue {index}: its worker hangs; this is a bug of passgate");
        }
        vring.set_queue_ready(false);
        vring.set_kick(None);
        vring.set_call(None);
        worker.send(Order::Kick { ring: index as u16, kick: None });
    }

    fn enable(&self, index: u32, enable: bool) -> Result<()> {
        let (vring, worker) = self.ring(index)?;
        vring.set_enabled(enable);
        worker.send(Order::Look);
        Ok(())
    }

    fn all(&self) -> std::ops::Range<u32> {
        0..self.rings.rings.len() as u32 // at most 65 535
    }

    /// Ends everything that the connection had: the drive has nothing of it any more, and its memory is no device's.
    pub(super) fn leave(mut self) {
        // All at once, and not for long: what the drive does not end by itself, the gate makes it end.
        let endings: Vec<_> = self.all().filter_map(|index| self.ending(index).ok().flatten()).collect();
        let until = Instant::now() + LEAVING;
        for ending in endings {
            let _ = ending.recv_timeout(until.saturating_duration_since(Instant::now()));
        }
        see(&self.rings, GuestMemoryMmap::new());
        if let Err(error) = self.table.clear() {
            log::error!("vhost-user: {error}");
        }
        for index in self.all() {
            if self.stop(index).is_err() {
                log::error!("queue {index} rests with requests that the drive has not ended");
                self.abandon(index);
            }
            if let Ok((vring, _)) = self.ring(index) {
                vring.set_enabled(false);
                vring.get_mut().get_queue_mut().reset();
            }
        }
    }
}

/// A descriptor of the front-end's at which no worker waits.
fn never_blocks(file: File) -> Result<File> {
    let flags = rustix::fs::fcntl_getfl(&file).map_err(wrong)?;
    rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::NONBLOCK).map_err(wrong)?;
    Ok(file)
}

/// Shows workers other memory; when this returns none of them is in what they had before.
fn see(rings: &Rings, memory: GuestMemoryMmap) {
    replace_memory(&rings.memory, rings.rings.iter().map(|(vring, _)| vring), memory);
}

impl VhostUserBackendReqHandlerMut for Frontend {
    fn set_owner(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.owned, true) {
            false => Ok(()),
            true => Err(Error::InvalidOperation("it has an owner")),
        }
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.owned = false;
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        for index in self.all() {
            self.stop(index)?;
            self.enable(index, false)?;
        }
        // What was taken and not answered is not to be done in a ring that has begun anew.
        if let Some(inflight) = &self.inflight {
            inflight.forget();
        }
        self.features = 0;
        self.write_back = true;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(&self.rings.geometry, self.rings.read_only))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_features()?;
        if features & !offered != 0 {
            return Err(wrong(format_args!("features {:#x} are not offered", features & !offered)));
        }
        self.features = features;
        let event_idx = config::has(features, VIRTIO_RING_F_EVENT_IDX);
        self.rings.rings.iter().for_each(|(vring, _)| vring.set_queue_event_idx(event_idx));
        // Without it nobody will enable them.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            self.all().try_for_each(|index| self.enable(index, true))?;
        }
        self.tell_through();
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
        let rings = self.rings.clone();
        self.table.set(wanted, |memory| see(&rings, memory)).map_err(wrong)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let (vring, _) = self.ring(index)?;
        let size = u16::try_from(num).ok().filter(|num| num.is_power_of_two() && *num <= LONGEST);
        let size = size.ok_or_else(|| {
            wrong(format_args!("queue {index}: {num} descriptors; a power of two up to {LONGEST} will do"))
        })?;
        self.at_rest(index)?;
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
        // Where VIRTIO_F_ACCESS_PLATFORM is negotiated these are I/O virtual addresses (vhost-user protocol, "Ring
        // addresses"): guest-physical ones, for nobody translates. Not every front-end keeps to that: what is no
        // guest-physical address is one of its own.
        let physical = config::has(self.features, VIRTIO_F_ACCESS_PLATFORM);
        let at = |address: u64| {
            let gpa = Some(address).filter(|gpa| physical && self.table.has(*gpa));
            gpa.or_else(|| self.table.gpa(address))
                .ok_or_else(|| wrong(format_args!("queue {index}: {address:#x} is in no region")))
        };
        let (descriptor, available, used) = (at(descriptor)?, at(available)?, at(used)?);
        let mut locked = vring.get_mut();
        // Said again with the same values while the ring runs, as after a table that only moved, is no change.
        let queue = locked.get_queue();
        let same = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
        if queue.ready() && same != (descriptor, available, used) {
            return Err(wrong(format_args!("queue {index} runs: stop it before it is moved")));
        }
        locked.set_queue_info(descriptor, available, used).map_err(wrong)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (vring, _) = self.ring(index)?;
        self.at_rest(index)?;
        let base = u16::try_from(base);
        vring.set_queue_next_avail(base.map_err(|_| wrong("the base of a split queue has 16 bits"))?);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop(index).map(|next| VhostUserVringState::new(index, next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (vring, worker) = self.ring(index.into())?;
        let file = file.ok_or_else(|| wrong(format_args!("queue {index} without a kick is not served")))?;
        let file = never_blocks(file)?;
        let kick = file.try_clone().map_err(wrong)?;
        vring.set_kick(Some(file));
        worker.send(Order::Kick { ring: index.into(), kick: Some(kick.into()) });
        self.start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let file = file.map(never_blocks).transpose()?;
        let (vring, _) = self.ring(index.into())?;
        vring.set_call(file);
        // Once unasked: who served the ring before may have died between an answer and saying so, and what the ring
        // was started with may have been answered before there was anything to say it by.
        if let Err(error) = vring.signal_used_queue() {
            log::debug!("queue {index}: the guest cannot be told: {error}");
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
            more => Err(wrong(format_args!("protocol features {more:#x} are not offered"))),
        }
    }

    fn set_backend_req_fd(&mut self, requests: Backend) {
        self.requests = Some(requests);
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.enable(index, enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let queues = self.rings.rings.len() as u16; // at most 65 535
        config::space(&self.rings.geometry, queues, self.write_back, offset, size)
            .ok_or_else(|| wrong(format_args!("there is no configuration at {offset}..+{size}")))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let (config::WRITEBACK, [back @ (0 | 1)]) = (offset, buf) else {
            return Err(wrong("of the configuration only `writeback` can be set, to 0 or 1"));
        };
        self.write_back = *back == 1;
        if let Some(inflight) = &self.inflight {
            inflight.set_write_through(!self.write_back);
        }
        self.tell_through();
        Ok(())
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let VhostUserInflight { num_queues, queue_size, .. } = *inflight;
        if usize::from(num_queues) > self.rings.rings.len() || num_queues == 0 || queue_size > LONGEST {
            return Err(wrong(format_args!("{num_queues} queues of {queue_size} are more than there are")));
        }
        let (made, fd) = Inflight::new(num_queues, queue_size).map_err(wrong)?;
        self.inflight = Some(made);
        let size = Inflight::size(num_queues, queue_size);
        Ok((VhostUserInflight::new(size, 0, num_queues, queue_size), fd.into()))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *inflight;
        let fd = OwnedFd::from(file);
        let back = Inflight::from_fd(fd, mmap_size, mmap_offset, num_queues, queue_size).map_err(wrong)?;
        // A front-end that comes back does not say the configuration again.
        self.write_back &= !back.is_write_through();
        // Nor does the guest to which it belongs, where it chose before this memory came.
        back.set_write_through(!self.write_back);
        self.inflight = Some(back);
        self.tell_through();
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let rings = &self.rings;
        let (shape, user) = (Shape::of(region), region.user_addr);
        self.table.add(shape, user, file, |memory| see(rings, memory)).map_err(wrong)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let rings = &self.rings;
        let (shape, user) = (Shape::of(region), region.user_addr);
        self.table.remove(shape, user, |memory| see(rings, memory)).map_err(wrong)
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
    fn at_rest(&self, index: u32) -> Result<()> {
        let (vring, _) = self.ring(index)?;
        match vring.get_ref().get_queue().ready() {
            false => Ok(()),
            true => Err(wrong(format_args!("queue {index} runs: stop it before it is changed"))),
        }
    }
}
