//! Measures the disk: so many requests in flight for so long, by io_uring on a file without a cache.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use rustix::fs::OFlags;
use serde_json::{Value, json};

use super::buffer::Buffer;
use super::pattern::{Numbers, stream};
use super::{DISK, Wrong};

/// Bytes of the disk that are read and written.
const SPAN: u64 = 512 << 20;

/// One request after another in each of `depth` places, for `ms` milliseconds.
pub fn run(asked: &Value) -> Result<Value, Wrong> {
    let number = |name: &str, default: u64| asked[name].as_u64().unwrap_or(default);
    let (depth, len, ms) = (number("depth", 1).clamp(1, 1024), number("len", 4096), number("ms", 1000));
    let (write, sequential) = (asked["write"] == true, asked["sequential"] == true);
    let disk =
        OpenOptions::new().read(true).write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(DISK);
    let disk = disk.map_err(|e| format!("{DISK}: {e}"))?;
    let mut ring = IoUring::new(depth as u32).map_err(|e| format!("io_uring: {e}"))?;
    // Never given back: an error below may leave the kernel with some of them, and the guest lives shortly.
    let buffers: Vec<_> = (0..depth).map(|_| Buffer::new(len as usize, 4096)).collect();
    let buffers = buffers.leak();
    buffers.iter_mut().zip(1..).for_each(|(buffer, seed)| stream(buffer.get(), seed));
    let (mut numbers, mut next) = (Numbers::new(depth ^ len), 0);
    let (mut begun, mut took): (Vec<Option<Instant>>, Vec<Duration>) =
        (vec![None; depth as usize], Vec::new());
    let (start, limit) = (Instant::now(), Duration::from_millis(ms));
    let mut flying = 0;
    loop {
        for (place, began) in begun.iter_mut().enumerate().filter(|(_, began)| began.is_none()) {
            if start.elapsed() >= limit {
                break;
            }
            let offset = if sequential { next } else { numbers.below(SPAN / len) } * len;
            next = (next + 1) % (SPAN / len);
            let (fd, at) = (types::Fd(disk.as_raw_fd()), buffers[place].get());
            let entry = if write {
                opcode::Write::new(fd, at.as_ptr(), len as u32).offset(offset).build()
            } else {
                opcode::Read::new(fd, at.as_mut_ptr(), len as u32).offset(offset).build()
            };
            // SAFETY: the buffer of this place is `len` bytes and is never freed, and nothing else touches it until the
            // completion of the same place has been taken; the kernel holds the file from the submission on.
            unsafe { ring.submission().push(&entry.user_data(place as u64)) }
                .map_err(|e| format!("io_uring: {e}"))?;
            *began = Some(Instant::now());
            flying += 1;
        }
        if flying == 0 {
            break;
        }
        ring.submit_and_wait(1).map_err(|e| format!("io_uring: {e}"))?;
        for done in ring.completion() {
            if done.result() != len as i32 {
                return Err(format!("a request of {len} bytes ended with {}", done.result()));
            }
            if let Some(began) = begun.get_mut(done.user_data() as usize).and_then(Option::take) {
                took.push(began.elapsed());
                flying -= 1;
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    took.sort_unstable();
    let at = |part: usize| took.get(took.len() * part / 100).map_or(0.0, |d| d.as_secs_f64() * 1e6);
    Ok(json!({
        "requests": took.len(), "seconds": seconds, "iops": took.len() as f64 / seconds, "median_us": at(50), "p99_us": at(99),
    }))
}
