//! The NVMe drive as a block device: every block is transferred, through several queues and their interrupts, and no
//! fence, reset or unmap meanwhile loses a request.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use passgate_backends::device::Guard;
use passgate_backends::nvme::{Drive, DriveOptions, Fault, Op, Queue, Submitted};
use passgate_backends::{Accept, Assignment, Device, Domain, Segment, Step, Unmap, Windowed, assign};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::vfio::device::DeviceFile;
use passgate_bindings::{Iova, PAGE};
use passgate_exercise::Drivers;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::bench::{BASE, Bench, bytes, check, fresh, memfd, range, same};
use super::traffic::Outcome;

/// The number of pages of guest memory for requests with several segments, and as many for requests with one.
const HALF: u64 = 272;
const PAGES: u64 = 2 * HALF;
const BLOCK: usize = 512;
const QUEUES: u16 = 4;
/// The time-out for events that must come.
const EVENT_TIMEOUT: Duration = Duration::from_secs(60);
/// The number of requests that a load has in flight in each queue.
const QUEUE_DEPTH: u64 = 8;

struct Served {
    drive: Arc<Drive>,
    windowed: Windowed,
    memory: Arc<GuestFile>,
}

impl Served {
    fn open(bench: &Bench) -> Result<Self, Failed> {
        let options = DriveOptions { queues: QUEUES, deadline: Duration::from_secs(1), ..Default::default() };
        let accept = Accept { unstoppable: true, drive: Some(options) };
        let Assignment { domain, mut drives, .. } =
            assign(bench.kind, std::slice::from_ref(&bench.nvme), accept, &Drivers::default(), bench.tables)?;
        let drive = drives.pop().ok_or("no drive")?;
        let served = Self {
            windowed: Windowed::new(domain, Arc::clone(drive.window())).with_timeout(Duration::from_secs(5)),
            drive,
            memory: memfd(PAGES)?,
        };
        served.map(0, PAGES)?;
        Ok(served)
    }

    fn map(&self, page: u64, pages: u64) -> Outcome {
        // In mappings of this size, so that a part of memory can be unmapped without a cut.
        Ok(self.windowed.map(
            range(page, pages),
            QUEUE_DEPTH * PAGE,
            &self.memory,
            Offset(page * PAGE),
            true,
        )?)
    }

    fn owner(&self, nth: u16) -> Result<Owner, Failed> {
        Ok(Owner { queue: self.drive.take_queue(nth)?, results: BTreeMap::new() })
    }

    fn fill(&self, segments: &[Segment], bytes: &[u8]) -> Outcome {
        let mut rest = bytes;
        for segment in segments {
            let (now, later) = rest.split_at(segment.len as usize);
            self.memory.write(segment.iova.0 - BASE, now)?;
            rest = later;
        }
        Ok(())
    }

    fn page(&self, page: u64) -> Result<Vec<u8>, Failed> {
        bytes(&self.memory, page * PAGE, PAGE as usize)
    }
}

/// The owner of a queue, with the results of its requests by tag.
struct Owner {
    queue: Queue,
    results: BTreeMap<u32, Result<(), Fault>>,
}

impl Owner {
    fn submit(&mut self, tag: u32, op: Op, segments: &[Segment]) -> Submitted {
        let submitted = self.queue.submit(tag, &op, segments);
        self.queue.ring();
        submitted
    }

    /// Waits for the interrupt, at most `timeout`, and takes the completed requests.
    fn wait(&mut self, timeout: Duration) -> Outcome {
        let wait = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
        poll(&mut [PollFd::new(&self.queue.interrupt(), PollFlags::IN)], Some(&wait))?;
        let _ = rustix::io::read(self.queue.interrupt(), &mut [0; 8]); // the count does not matter
        let mut done = Vec::new();
        self.queue.complete(&mut done);
        for completed in done {
            let before = self.results.insert(completed.tag, completed.result);
            same("an earlier result of it", before, None)?;
        }
        Ok(())
    }

    /// Submits a request and waits until it succeeds.
    fn run(&mut self, op: Op, segments: &[Segment]) -> Outcome {
        same("submitting", self.submit(7, op, segments), Submitted::Started)?;
        let begun = Instant::now();
        loop {
            self.wait(Duration::from_secs(2))?;
            match self.results.remove(&7) {
                Some(result) => return same("its result", result, Ok(())),
                None => check("it ends", begun.elapsed() < EVENT_TIMEOUT)?,
            }
        }
    }
}

fn piece(at: u64, len: u32) -> Segment {
    Segment { iova: Iova(BASE + at), len }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

fn write(first: u64, bytes: usize) -> Op {
    Op::Write { first, blocks: (bytes / BLOCK) as u32, fua: false }
}

fn read(first: u64, bytes: usize) -> Op {
    Op::Read { first, blocks: (bytes / BLOCK) as u32 }
}

pub fn reports_its_geometry(bench: &Bench) -> Outcome {
    let served = Served::open(bench)?;
    let geometry = served.drive.geometry();
    same("its blocks", (geometry.block, geometry.blocks >= 1 << 17), (BLOCK as u32, true))?;
    same("its serial number", geometry.serial.as_str(), "s1")?;
    same("write-protected", geometry.read_only, false)?;
    same("its capabilities", (geometry.write_zeroes > 0, geometry.discard > 0), (true, true))?;
    same("its queues", served.drive.queues(), QUEUES)?;
    {
        let _owner = served.owner(0)?;
        check("a queue has one owner", served.drive.take_queue(0).is_err())?;
    }
    same("its doorbells are mapped", has_bar_mapping()?, true)?;
    drop(served);
    same("mapped after it was closed", has_bar_mapping()?, false)
}

/// Returns true if this process has a BAR mapping.
fn has_bar_mapping() -> Result<bool, Failed> {
    Ok(std::fs::read_to_string("/proc/self/maps")?.contains("vfio"))
}

/// Memory in every shape: PRP lists, SGLs, more than one command can transfer. No other byte changes.
pub fn requests_of_every_shape_move_the_right_bytes(bench: &Bench) -> Outcome {
    let served = Served::open(bench)?;
    let mut owner = served.owner(QUEUES - 1)?;
    let list = |count: u64, offset: &dyn Fn(u64) -> u64, len| -> Vec<Segment> {
        (0..count).map(|nth| piece(offset(nth), len)).collect()
    };
    let shapes = [
        ("a block", vec![piece(512, 512)]),
        ("a page", vec![piece(0, 4096)]),
        ("across two pages", vec![piece(3584, 4096)]),
        ("128 KiB", vec![piece(0x1_0000, 128 << 10)]),
        ("128 KiB in pages, backwards", list(32, &|nth| (200 - 2 * nth) * PAGE, 4096)),
        ("1 MiB, more than a command can transfer", vec![piece(512, 1 << 20)]),
        ("pieces at odd bytes", vec![piece(1, 100), piece(5000, 411), piece(9001, 513)]),
        ("more pieces than a list holds", list(160, &|nth| nth * 1500 + 7, 512)),
        ("pages, and then none", vec![piece(0x800, 0x800), piece(0x3000, 0x1000), piece(0x5200, 0x200)]),
    ];
    let mut model = vec![0; (PAGES * PAGE) as usize];
    for (seed, (shape, pieces)) in (0..).zip(shapes) {
        let len = pieces.iter().map(|piece| piece.len as usize).sum::<usize>();
        let whole = [piece(HALF * PAGE, len as u32)];
        let first = 5000 + seed * 3;
        for (turn, (from, to)) in [(&pieces[..], &whole[..]), (&whole, &pieces)].into_iter().enumerate() {
            let content = pattern(seed * 2 + turn as u64, len);
            served.fill(from, &content)?;
            put(&mut model, from, &content);
            let outcome = owner.run(write(first, len), from).and_then(|()| owner.run(read(first, len), to));
            outcome.map_err(|failed| format!("{shape}: {}", failed.message().unwrap_or("failed")))?;
            put(&mut model, to, &content);
            check(shape, bytes(&served.memory, 0, model.len())? == model)?;
        }
    }
    Ok(())
}

fn put(model: &mut [u8], segments: &[Segment], content: &[u8]) {
    let mut rest = content;
    for segment in segments {
        let (now, later) = rest.split_at(segment.len as usize);
        model[(segment.iova.0 - BASE) as usize..][..now.len()].copy_from_slice(now);
        rest = later;
    }
}

pub fn flushes_zeroes_and_discards(bench: &Bench) -> Outcome {
    let served = Served::open(bench)?;
    let mut owner = served.owner(0)?;
    let (here, len) = ([piece(0, 0x8000)], 0x8000);
    let content = pattern(1, len);
    for unmap in [false, true] {
        served.fill(&here, &content)?;
        owner.run(Op::Write { first: 64, blocks: 64, fua: true }, &here)?;
        owner.run(Op::Flush, &[])?;
        owner.run(Op::WriteZeroes { first: 72, blocks: 16, unmap, fua: false }, &[])?;
        owner.run(read(64, len), &here)?;
        let mut expected = content.clone();
        expected[8 * BLOCK..24 * BLOCK].fill(0);
        check("zeroes in the requested blocks only", bytes(&served.memory, 0, len)? == expected)?;
    }
    owner.run(Op::Discard { first: 72, blocks: 16 }, &[])?;
    owner.run(read(64, len), &here)?;
    let after = bytes(&served.memory, 0, len)?;
    check("the blocks before are unchanged", after[..8 * BLOCK] == content[..8 * BLOCK])?;
    check("the blocks after are unchanged", after[24 * BLOCK..] == content[24 * BLOCK..])?;
    let end = served.drive.geometry().blocks;
    same("beyond its end", owner.submit(1, read(end - 63, len), &here), Submitted::Wrong)?;
    same("at its end", owner.run(read(end - 64, len), &here).is_ok(), true)
}

/// Each queue has its own interrupt. If one were lost, the watchdog would find the completion, a second later each
/// time.
pub fn each_queue_completes_by_its_own_interrupt(bench: &Bench) -> Outcome {
    let served = Served::open(bench)?;
    for nth in 0..QUEUES {
        let mut owner = served.owner(nth)?;
        owner.run(read(0, 512), &[piece(0, 512)])?;
        let begun = Instant::now();
        for _ in 0..40 {
            owner.run(read(0, 512), &[piece(0, 512)])?;
        }
        check(&format!("queue {nth}: 40 requests in {:?}", begun.elapsed()), begun.elapsed().as_secs() < 10)?;
    }
    Ok(())
}

/// The progress of a load, and the request to stop it.
#[derive(Default)]
struct Work {
    done: AtomicU64,
    check_vfio_accepts: AtomicU64,
    stop: AtomicBool,
}

impl Work {
    fn await_more(&self, more: u64) -> Outcome {
        let (from, begun) = (self.done.load(Ordering::Relaxed), Instant::now());
        while self.done.load(Ordering::Relaxed) < from + more {
            check(
                "the load continues",
                begun.elapsed() < EVENT_TIMEOUT && !self.stop.load(Ordering::Relaxed),
            )?;
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// Stops a load when it is dropped.
struct Stop<'a>(&'a Work);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

/// Writes pages, reads them back to other pages and compares, several at a time, until it is stopped. Requests that are
/// withheld or refused by a closed page are repeated; any other error fails the trial.
fn load(served: &Served, mut owner: Owner, nth: u64, work: &Work) -> Outcome {
    let _stops_all = Stop(work);
    let (from, to) = (nth * 2 * QUEUE_DEPTH, nth * 2 * QUEUE_DEPTH + QUEUE_DEPTH);
    // Of each job: its round, whether it reads, and whether it is in flight.
    let mut jobs = [(0u64, false, false); QUEUE_DEPTH as usize];
    let seed = |job, round| nth << 32 | round << 8 | job;
    loop {
        let (stop, mut closed) = (work.stop.load(Ordering::Relaxed), false);
        for (job, (round, reads, in_flight)) in (0..).zip(&mut jobs) {
            if *in_flight || stop {
                continue;
            }
            let first = 10_000 + (nth * QUEUE_DEPTH + job) * 8;
            let (op, page) =
                if *reads { (read(first, 4096), to + job) } else { (write(first, 4096), from + job) };
            let here = [piece(page * PAGE, 4096)];
            if !*reads {
                served.fill(&here, &pattern(seed(job, *round), 4096))?;
            }
            match owner.submit(job as u32, op, &here) {
                Submitted::Started => *in_flight = true,
                Submitted::Closed => closed = true,
                other => return Err(format!("submitting: {other:?}").into()),
            }
        }
        if stop && owner.queue.in_flight() == 0 {
            return Ok(());
        }
        // No interrupt signals that pages are open again, so the wait is short.
        owner.wait(Duration::from_millis(if closed { 5 } else { 2000 }))?;
        for (job, result) in std::mem::take(&mut owner.results) {
            let Some((round, reads, in_flight)) = jobs.get_mut(job as usize) else { continue };
            *in_flight = false;
            match result {
                Ok(()) if *reads => {
                    let job = u64::from(job);
                    let right = served.page(to + job)? == pattern(seed(job, *round), 4096);
                    check(&format!("queue {nth}, job {job}, round {round}: its bytes"), right)?;
                    (*round, *reads) = (*round + 1, false);
                    work.done.fetch_add(1, Ordering::Relaxed);
                }
                Ok(()) => *reads = true,
                Err(Fault::Withheld) => _ = work.check_vfio_accepts.fetch_add(1, Ordering::Relaxed),
                Err(fault) => return Err(format!("queue {nth}, job {job}: {fault:?}").into()),
            }
        }
    }
}

/// Runs `action` with a load on every queue.
fn under_load(served: &Served, action: impl FnOnce(&Work) -> Outcome) -> Outcome {
    let work = Work::default();
    let owners = (0..QUEUES).map(|nth| served.owner(nth)).collect::<Result<Vec<_>, _>>()?;
    std::thread::scope(|scope| {
        let loads = (0..).zip(owners).map(|(nth, owner)| {
            let work = &work;
            scope.spawn(move || load(served, owner, nth, work))
        });
        let loads: Vec<_> = loads.collect();
        let outcome = {
            let _stop = Stop(&work);
            action(&work)
        };
        let ends = loads.into_iter().map(|load| load.join().expect("no panic"));
        // Errors of the loads first: they name the cause.
        ends.chain([outcome]).collect()
    })
}

pub fn load_survives_every_fence(bench: &Bench) -> Outcome {
    let served = Served::open(bench)?;
    let drive = &served.drive;
    let steps = [Step::Drain, Step::Master, Step::Detach, Step::Reset];
    under_load(&served, |work| {
        for step in steps.into_iter().filter(|step| drive.stop_class().has(*step)).cycle().take(12) {
            work.await_more(20)?;
            drive.fence(step)?;
            check("nothing is in flight after a fence", drive.window().idle())?;
            let before = work.done.load(Ordering::Relaxed);
            drive.attach()?;
            check("there was a load", before > 0)?;
        }
        work.await_more(100)
    })
}

/// The device is reset without its driver, and loses all commands.
pub fn reset_under_load_loses_no_request(bench: &Bench) -> Outcome {
    let served = Served::open(bench)?;
    let drive = &served.drive;
    let device = match drive.guard() {
        Guard::Cdev(device) | Guard::Type1 { device, .. } => device.try_clone_to_owned()?,
        Guard::None => return Err("no device".into()),
    };
    let device = DeviceFile::from_fd(device);
    under_load(&served, |work| {
        for _ in 0..2 {
            work.await_more(50)?;
            device.reset()?;
            work.await_more(200)?;
        }
        same("withheld", work.check_vfio_accepts.load(Ordering::Relaxed), 0)
    })
}

/// Long reads into the same pages, several in flight at any time, while the pages are unmapped and mapped again: after
/// the unmap nothing is in flight, no page changes, and no read fails.
pub fn no_block_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    const LEN: usize = 128 * PAGE as usize;
    let served = Served::open(bench)?;
    let mut owner = served.owner(0)?;
    let (work, in_flight) = (Work::default(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> Outcome {
            let _stops_all = Stop(&work);
            let mut tag = 0;
            loop {
                let stop = work.stop.load(Ordering::Relaxed);
                let mut full = false;
                while !stop && !full && owner.queue.in_flight() < QUEUE_DEPTH as usize {
                    match owner.submit(tag, read(0, LEN), &[piece(0, LEN as u32)]) {
                        Submitted::Started => tag += 1,
                        Submitted::Closed => full = true,
                        other => return Err(format!("submitting: {other:?}").into()),
                    }
                }
                in_flight.store(owner.queue.in_flight() as u64, Ordering::Release);
                if stop && owner.queue.in_flight() == 0 {
                    return Ok(());
                }
                owner.wait(Duration::from_millis(if full { 2 } else { 2000 }))?;
                for result in std::mem::take(&mut owner.results).into_values() {
                    same("a read", result, Ok(()))?;
                    work.done.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let outcome = {
            let _stop = Stop(&work);
            (0..20).try_for_each(|_| {
                work.await_more(QUEUE_DEPTH)?;
                same("unmapped", served.windowed.unmap(range(0, 128)), Unmap::Gone { bytes: LEN as u64 })?;
                // QEMU's drive is fast, so a late transfer would seldom show in memory.
                let overlapping = served.drive.window().overlapping(range(0, 128));
                check("nothing is in flight after the unmap", !overlapping)?;
                let content = fresh(LEN); // the blocks contain zeroes
                served.memory.write(0, &content)?;
                while in_flight.load(Ordering::Acquire) > 0 && !work.stop.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                check("the pages are unchanged", bytes(&served.memory, 0, LEN)? == content)?;
                served.map(0, 128)
            })
        };
        outcome.and(reader.join().expect("no panic"))
    })
}

/// The drive is unbound, which the kernel signals; once the drive is closed, the unbind ends.
pub fn unbind_is_signalled_and_ends_when_the_drive_is_closed(bench: &Bench) -> Outcome {
    let served = Served::open(bench)?;
    let mut owner = served.owner(0)?;
    let unbind = format!("/sys/bus/pci/devices/{}/driver/unbind", bench.nvme);
    let name = bench.nvme.clone();
    let asked = std::thread::spawn(move || std::fs::write(unbind, name));
    let removal = served.drive.removal().ok_or("removal is not signalled")?;
    let wait = Timespec { tv_sec: 20, tv_nsec: 0 };
    let signalled = poll(&mut [PollFd::new(&removal, PollFlags::IN)], Some(&wait))?;
    let works = owner.run(read(0, 512), &[piece(0, 512)]);
    drop((owner, served));
    asked.join().expect("no panic")?;
    std::fs::write("/sys/bus/pci/drivers/vfio-pci/bind", &bench.nvme)?;
    same("signalled", signalled, 1)?;
    works?;
    Served::open(bench).map(drop)
}

/// After it was closed and opened again, the drive has the blocks that were written.
pub fn written_blocks_persist_after_reopening(bench: &Bench) -> Outcome {
    let content = pattern(99, 4096);
    for round in 0..3 {
        let served = Served::open(bench)?;
        let mut owner = served.owner(1)?;
        let here = [piece(round * PAGE, 4096)];
        if round > 0 {
            owner.run(read(77, 4096), &here)?;
            check("the content that was written", served.page(round)? == content)?;
        }
        served.fill(&here, &content)?;
        owner.run(write(77, 4096), &here)?;
    }
    Ok(())
}
