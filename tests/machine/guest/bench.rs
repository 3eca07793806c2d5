//! Measures the disk with a constant number of requests in flight, by io_uring and O_DIRECT.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use rustix::fs::OFlags;
use serde_json::{Value, json};

use super::buffer::Buffer;
use super::pattern::{Random, stream};
use super::{DISK, Failure};

/// The size of the part of the disk that is read and written, in bytes.
const SPAN_BYTES: u64 = 512 << 20;

/// Runs requests of `len` bytes for `ms` milliseconds, one after another in each of `depth` slots. Returns their number, rate
/// and latency percentiles.
pub fn run(command: &Value) -> Result<Value, Failure> {
    let parameter = |name: &str, default: u64| command[name].as_u64().unwrap_or(default);
    let (depth, len, ms) =
        (parameter("depth", 1).clamp(1, 1024), parameter("len", 4096), parameter("ms", 1000));
    let (write, sequential) = (command["write"] == true, command["sequential"] == true);
    let disk =
        OpenOptions::new().read(true).write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(DISK);
    let disk = disk.map_err(|e| format!("{DISK}: {e}"))?;
    let mut ring = IoUring::new(depth as u32).map_err(|e| format!("io_uring: {e}"))?;
    // Leaked on purpose: after an error below the kernel may still write to some of them. The guest is short-lived.
    let buffers: Vec<_> = (0..depth).map(|_| Buffer::new(len as usize, 4096)).collect();
    let buffers = buffers.leak();
    buffers.iter_mut().zip(1..).for_each(|(buffer, seed)| stream(buffer.get(), seed));
    let (mut random, mut next_block) = (Random::new(depth ^ len), 0);
    let (mut start_times, mut durations): (Vec<Option<Instant>>, Vec<Duration>) =
        (vec![None; depth as usize], Vec::new());
    let (start, limit) = (Instant::now(), Duration::from_millis(ms));
    let mut in_flight = 0;
    loop {
        for (slot, started) in start_times.iter_mut().enumerate().filter(|(_, started)| started.is_none()) {
            if start.elapsed() >= limit {
                break;
            }
            let offset = if sequential { next_block } else { random.below(SPAN_BYTES / len) } * len;
            next_block = (next_block + 1) % (SPAN_BYTES / len);
            let (fd, at) = (types::Fd(disk.as_raw_fd()), buffers[slot].get());
            let entry = if write {
                opcode::Write::new(fd, at.as_ptr(), len as u32).offset(offset).build()
            } else {
                opcode::Read::new(fd, at.as_mut_ptr(), len as u32).offset(offset).build()
            };
            // SAFETY: the buffer of this slot has `len` bytes and is never freed, and nothing else accesses it before the
            // completion of the same slot was taken; the kernel references the file from the submission on.
            unsafe { ring.submission().push(&entry.user_data(slot as u64)) }
                .map_err(|e| format!("io_uring: {e}"))?;
            *started = Some(Instant::now());
            in_flight += 1;
        }
        if in_flight == 0 {
            break;
        }
        ring.submit_and_wait(1).map_err(|e| format!("io_uring: {e}"))?;
        for completion in ring.completion() {
            if completion.result() != len as i32 {
                return Err(format!("a request of {len} bytes ended with {}", completion.result()));
            }
            if let Some(started) = start_times.get_mut(completion.user_data() as usize).and_then(Option::take)
            {
                durations.push(started.elapsed());
                in_flight -= 1;
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    durations.sort_unstable();
    let at = |part: usize| durations.get(durations.len() * part / 100).map_or(0.0, |d| d.as_secs_f64() * 1e6);
    Ok(json!({
        "requests": durations.len(), "seconds": seconds, "iops": durations.len() as f64 / seconds, "median_us": at(50), "p99_us": at(99),
    }))
}
