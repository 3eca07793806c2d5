//! The next segment, made ready on a thread of its own: what the file system takes its time for must not keep the
//! session waiting.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use passgate_bindings::Failed;
use passgate_bindings::segment::Segment;

use super::files;

/// A segment that nothing is written to yet. When dropped, its file goes.
#[derive(Debug)]
struct Fresh {
    segment: Option<Segment>,
    path: PathBuf,
}

type Made = Result<Fresh, Failed>;

impl Drop for Fresh {
    fn drop(&mut self) {
        if self.segment.take().is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Where the next segment comes from.
#[derive(Debug)]
pub(super) struct Spare {
    ends: Option<(Receiver<Made>, SyncSender<Segment>)>,
    thread: Option<JoinHandle<()>>,
    /// How long a segment that is not ready when it is needed is waited for.
    patience: Duration,
}

impl Spare {
    /// Starts the thread. It makes segments of `len` bytes from `number` on, and keeps no more than `keep` files.
    pub(super) fn start(
        dir: &Path,
        number: u64,
        len: u64,
        keep: usize,
        patience: Duration,
    ) -> std::io::Result<Self> {
        let (hand, ready) = sync_channel(0);
        let (full, filled) = sync_channel::<Segment>(2);
        let dir = dir.to_owned();
        let work = move || {
            let mut number = number;
            loop {
                let path = files::path(&dir, number);
                let made = Segment::create(&path, len).map(|segment| Fresh { segment: Some(segment), path });
                number += 1;
                files::remove_oldest(&dir, keep);
                if hand.send(made).is_err() {
                    return;
                }
                // Closed here, because that writes to the disk too.
                while filled.try_recv().is_ok() {}
            }
        };
        let thread = std::thread::Builder::new().name("audit".into()).spawn(work)?;
        Ok(Self { ends: Some((ready, full)), thread: Some(thread), patience })
    }

    /// The next segment, or why there is none.
    pub(super) fn take(&self) -> Result<Segment, Failed> {
        let slow = |_: RecvTimeoutError| Failed::new("waiting for the disk", rustix::io::Errno::TIMEDOUT);
        let gone = Failed::new("making a file", rustix::io::Errno::IO);
        let (ready, _) = self.ends.as_ref().ok_or(gone)?;
        let mut fresh = ready.recv_timeout(self.patience).map_err(slow)??;
        fresh.segment.take().ok_or(gone)
    }

    /// Takes back a segment that is full.
    pub(super) fn finish(&self, segment: Segment) {
        if let Some((_, full)) = &self.ends {
            // Where the thread is behind, or gone, the segment is closed here.
            let _ = full.try_send(segment);
        }
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        // Without the other ends the thread ends; the file that it holds ready goes with it.
        self.ends = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
