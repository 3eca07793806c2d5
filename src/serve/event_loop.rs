//! The loop of one VM, and the supervisor that takes it over when a call does not return.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use passgate_bindings::Failed;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::baton::{Baton, Found, Turn};
use super::inside::Ask;
use super::vhost_blk::Counted;
use super::vm::Vm;
use crate::error::{Error, Result};
use crate::gate::ClientId;
use crate::protocol::verbs::DmaDone;
use crate::session::{Next, Returned, Task};

/// How long a call may take once a deadline is over before the VM is taken over.
const PATIENCE: Duration = Duration::from_millis(2);

/// How long a call may keep the loop even where no deadline is near: others wait.
const CALL: Duration = Duration::from_millis(100);

/// Requests of one client that are done before the next client's turn.
const BURST: usize = 32;

/// How long the loop makes small calls itself before others have their turn: what is left goes to the pool.
const SLICE: Duration = Duration::from_millis(1);

/// Small calls that are handed to the pool together.
const CHUNK: usize = 64;

/// Results of other threads that are taken before others have their turn.
const RESULTS: usize = 256;

/// What other threads hand in.
#[derive(Debug)]
pub(super) enum Done {
    /// A call of the gate's has returned.
    Call(Returned),
    /// So has one for which the loop's thread was given up.
    LateCall(Returned),
    /// A device has done, or not done, its DMA.
    Dma { client: ClientId, cookie: u64, result: Result<DmaDone, passgate_backends::Error> },
    /// Another thread wants to know what a page is.
    Ask(Ask),
    /// Another thread has a connection.
    Connect(OwnedFd),
    /// Another thread serves a disk.
    Disk(Weak<Counted>),
}

/// What the loop, its workers and its supervisor share.
#[derive(Debug)]
pub(super) struct Core {
    baton: Baton<Vm>,
    inbox: Mutex<Inbox>,
    kick: OwnedFd,
    alarm: OwnedFd,
    /// True once nothing is to be kept for a next daemon, whatever was said before.
    keeps_nothing: AtomicBool,
    /// How the loop ended, once it has.
    over: Mutex<Option<Result<()>>>,
    ended: Condvar,
    threads: Mutex<Threads>,
}

/// What was handed in and not taken yet.
#[derive(Debug, Default)]
struct Inbox {
    done: VecDeque<Done>,
    /// Whether nobody takes anything any more.
    closed: bool,
}

/// The threads that end with the VM. One that is in a call that does not return is not among them any more.
#[derive(Debug, Default)]
struct Threads {
    looping: Option<JoinHandle<()>>,
    supervisor: Option<JoinHandle<()>>,
}

impl Core {
    pub(super) fn new() -> Result<(Arc<Self>, Turn)> {
        let failed = |call| move |errno| Error::Call(Failed::new(call, errno));
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed("eventfd"))?;
        let alarm = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC);
        let (baton, turn) = Baton::new();
        let core = Self {
            baton,
            inbox: Mutex::default(),
            kick,
            alarm: alarm.map_err(failed("timerfd_create"))?,
            keeps_nothing: AtomicBool::new(false),
            over: Mutex::new(None),
            ended: Condvar::new(),
            threads: Mutex::default(),
        };
        Ok((Arc::new(core), turn))
    }

    /// Hands something in; whether somebody may take it.
    pub(super) fn deliver(&self, done: Done) -> bool {
        let mut inbox = self.inbox();
        if inbox.closed {
            // What it is dropped for may be somebody else's code.
            drop(inbox);
            return false;
        }
        inbox.done.push_back(done);
        drop(inbox);
        self.kick();
        true
    }

    /// Nothing is taken any more: the VM is gone.
    pub(super) fn close(&self) {
        let mut inbox = self.inbox();
        inbox.closed = true;
        let left = std::mem::take(&mut inbox.done);
        drop(inbox);
        drop(left);
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what was handed in, the first [`RESULTS`] of it: the loop is wanted again for the rest.
    pub(super) fn take_done(&self) -> VecDeque<Done> {
        let _ = rustix::io::read(&self.kick, &mut [0; 8]);
        let mut inbox = self.inbox();
        let taken = RESULTS.min(inbox.done.len());
        let rest = inbox.done.split_off(taken);
        let taken = std::mem::replace(&mut inbox.done, rest);
        let more = !inbox.done.is_empty();
        drop(inbox);
        if more {
            self.kick();
        }
        taken
    }

    /// Nothing is to be kept for a next daemon.
    pub(super) fn keep_nothing(&self) {
        self.keeps_nothing.store(true, Relaxed);
    }

    /// Whether nothing is to be kept for a next daemon.
    pub(super) fn keeps_nothing(&self) -> bool {
        self.keeps_nothing.load(Relaxed)
    }

    /// Readable when the loop is wanted.
    pub(super) fn kicked(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    fn kick(&self) {
        // It fails only where the counter is full, and then the loop is awake already.
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// Wakes the supervisor at `when`; `now` is the time.
    pub(super) fn set_alarm(&self, now: Instant, when: Instant) {
        let left = when.saturating_duration_since(now).max(Duration::from_nanos(1));
        let it_value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        if let Err(errno) = timerfd_settime(&self.alarm, TimerfdTimerFlags::empty(), &spec) {
            log::error!("timerfd_settime: {errno}; deadlines are not kept");
        }
    }

    fn over(&self) -> MutexGuard<'_, Option<Result<()>>> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, result: Result<()>) {
        *self.over() = Some(result);
        self.ended.notify_all();
        // The supervisor finds nothing more to do.
        let now = Instant::now();
        self.set_alarm(now, now);
    }
}

/// Serves until stopped. The caller only waits, so that a call that never returns does not keep it either.
pub(super) fn run(core: Arc<Core>, turn: Turn, vm: Box<Vm>) -> Result<()> {
    supervise(&core)?;
    let looping = Arc::clone(&core);
    core.threads().looping = Some(spawn("loop", move || rule(&looping, turn, vm))?);
    let over = core.ended.wait_while(core.over(), |over| over.is_none());
    let result = over.unwrap_or_else(PoisonError::into_inner).replace(Ok(()));
    let Threads { looping, supervisor } = std::mem::take(&mut *core.threads());
    for thread in [looping, supervisor].into_iter().flatten() {
        thread.join().map_err(|_| Error::Panicked("loop"))?;
    }
    result.unwrap_or(Ok(()))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(Error::Thread)
}

/// Starts a supervisor: it ends with the loop, or becomes it.
fn supervise(core: &Arc<Core>) -> Result<()> {
    // Held until the new supervisor is in its place, so that it finds itself there if it takes over at once.
    let mut threads = core.threads();
    let watching = Arc::clone(core);
    threads.supervisor = Some(spawn("supervisor", move || watch(&watching))?);
    Ok(())
}

/// What a supervisor does.
fn watch(core: &Arc<Core>) {
    while core.over().is_none() {
        match rustix::io::read(&core.alarm, &mut [0; 8]) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => log::error!("timerfd: {errno}"),
        }
        core.kick();
        loop {
            match core.baton.take_over(PATIENCE) {
                Found::Owned => break,
                Found::Young => std::thread::sleep(PATIENCE),
                Found::Yours(mut vm, turn) => {
                    vm.late_calls += 1;
                    log::warn!("a kernel call has not returned for too long: going on without its thread");
                    let mut threads = core.threads();
                    threads.looping = threads.supervisor.take();
                    drop(threads);
                    if let Err(error) = supervise(core) {
                        log::error!("{error}");
                    }
                    return rule(core, turn, vm);
                }
            }
        }
    }
}

/// Says that the loop is over also where it panics.
struct Ending<'a>(&'a Core);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Err(Error::Panicked("loop")));
        }
    }
}

/// Runs the loop to its end, or to where the VM is taken over.
fn rule(core: &Arc<Core>, turn: Turn, vm: Box<Vm>) {
    let _ending = Ending(core);
    if let Some(result) = serve(core, turn, vm) {
        core.end(result);
    }
}

/// The loop. None if the VM was taken over.
fn serve(core: &Arc<Core>, turn: Turn, mut vm: Box<Vm>) -> Option<Result<()>> {
    let mut tokens = Vec::new();
    vm = settle(core, turn, vm)?;
    loop {
        if vm.end_if_wanted() {
            // Nothing else may become ready before the end: what closes now is done here.
            vm = settle(core, turn, vm)?;
        }
        vm.look_again();
        vm.rearm(None);
        if let Some(result) = vm.is_over() {
            return Some(result);
        }
        if let Err(error) = vm.wait(&mut tokens) {
            return Some(Err(error));
        }
        for token in &tokens {
            // One token may hold many requests. The first is settled before the next is read, and so is every other,
            // but for records that lie behind the first: neighbours among them share a call. Who never pauses gives way:
            // what is left is found ready again, unless it lies read already.
            let mut requests = 0;
            while vm.ready(*token) && (requests < BURST || vm.has_read(*token)) {
                if requests == 0 || !Vm::is_channel(*token) {
                    vm = settle(core, turn, vm)?;
                }
                requests += 1;
            }
            vm = settle(core, turn, vm)?;
        }
    }
}

/// Does all that the session wants done. None if the VM was taken over in a call.
///
/// However much it is, alarms are kept meanwhile, and calls beyond the first few go to the pool: one request of
/// thousands of pages delays nobody else's.
fn settle(core: &Arc<Core>, turn: Turn, mut vm: Box<Vm>) -> Option<Box<Vm>> {
    let start = Instant::now();
    let mut left = Vec::new();
    loop {
        let now = Instant::now();
        vm.keep_alarms(now);
        match vm.session.next_step() {
            Next::Idle if left.is_empty() => return Some(vm),
            Next::Idle => vm.pool.run_all(std::mem::take(&mut left)),
            Next::Answer(caller, answer) => vm.answer(caller, answer),
            Next::Refused(caller, error) => vm.refuse(caller, &error),
            Next::Notice(notice) => vm.notice(&notice),
            Next::Call(call) if !call.is_small() => vm.pool.run(Task::Call(call)),
            // Where one does not return, the next may not either.
            Next::Call(call) if now - start >= SLICE || vm.late_calls > 0 => {
                left.push(call);
                if left.len() == CHUNK {
                    vm.pool.run_all(std::mem::take(&mut left));
                }
            }
            Next::Call(call) => {
                vm.rearm(Some(CALL));
                match core.baton.run(turn, vm, || call.run()) {
                    Ok((back, returned)) => {
                        vm = back;
                        vm.returned(returned);
                    }
                    Err(returned) => {
                        core.deliver(Done::LateCall(returned));
                        return None;
                    }
                }
            }
        }
    }
}
