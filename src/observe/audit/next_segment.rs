//! The next segment, allocated on a thread of its own: creating, closing and removing files may take long, and the session must not
//! wait for it.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use passgate_bindings::Failed;
use passgate_bindings::segment::Segment;

use super::files;

/// A segment that nothing is written to yet. When it is dropped, its file is removed.
#[derive(Debug)]
struct UnusedSegment {
    segment: Option<Segment>,
    path: PathBuf,
}

type Created = Result<UnusedSegment, Failed>;

impl Drop for UnusedSegment {
    fn drop(&mut self) {
        if self.segment.take().is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The thread that allocates the next segment and closes full ones.
#[derive(Debug)]
pub(super) struct NextSegment {
    /// The channel of new segments, and that of full ones.
    channels: Option<(Receiver<Created>, SyncSender<Segment>)>,
    thread: Option<JoinHandle<()>>,
    /// The time to wait for a segment that is not ready when it is needed.
    timeout: Duration,
}

impl NextSegment {
    /// Starts the thread. It creates segments of `len` bytes with the numbers from `number` on, and removes the oldest if there are
    /// more than `max_files` files.
    pub(super) fn start(
        dir: &Path,
        number: u64,
        len: u64,
        max_files: usize,
        timeout: Duration,
    ) -> std::io::Result<Self> {
        // Without a buffer: the thread is one segment ahead, not two.
        let (sender, ready) = sync_channel(0);
        let (full, filled) = sync_channel::<Segment>(2);
        let dir = dir.to_owned();
        let work = move || {
            let mut number = number;
            loop {
                let path = files::path(&dir, number);
                let created =
                    Segment::create(&path, len).map(|segment| UnusedSegment { segment: Some(segment), path });
                number += 1;
                files::remove_oldest(&dir, max_files);
                if sender.send(created).is_err() {
                    return;
                }
                // Received and dropped, which closes the file: that may write to the disk.
                while filled.try_recv().is_ok() {}
            }
        };
        let thread = std::thread::Builder::new().name("audit".into()).spawn(work)?;
        Ok(Self { channels: Some((ready, full)), thread: Some(thread), timeout })
    }

    /// Returns the next segment. `ETIMEDOUT` if it is not ready in time.
    pub(super) fn take(&self) -> Result<Segment, Failed> {
        let slow = |_: RecvTimeoutError| Failed::new("waiting for the disk", rustix::io::Errno::TIMEDOUT);
        let gone = Failed::new("making a file", rustix::io::Errno::IO);
        let (ready, _) = self.channels.as_ref().ok_or(gone)?;
        let mut unused = ready.recv_timeout(self.timeout).map_err(slow)??;
        unused.segment.take().ok_or(gone)
    }

    /// Sets the time to wait for the segments to come.
    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Closes a segment that is full.
    pub(super) fn finish(&self, segment: Segment) {
        if let Some((_, full)) = &self.channels {
            // If the thread is behind, or has ended, the segment is dropped here.
            let _ = full.try_send(segment);
        }
    }
}

impl Drop for NextSegment {
    fn drop(&mut self) {
        // Without the other ends of its channels the thread ends; the file of the segment that it has ready is removed.
        self.channels = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
