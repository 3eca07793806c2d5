//! The loop of one VM, and the supervisor that continues it when a kernel call does not return.
//!
//! Threads: the *loop* owns the VM and alone changes it; the *supervisor* sleeps on the alarm, and claims the VM if its owner
//! hangs in a call ([`super::handoff`]); the *pool* runs calls that may take long. Other threads only deliver messages.

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

use super::handoff::{Claim, Generation, Handoff};
use super::inside::AccessQuery;
use super::vm::Vm;
use crate::error::{Error, Result};
use crate::gate::ClientId;
use crate::observe::disk::ReadDisk;
use crate::protocol::verbs::DmaDone;
use crate::session::{Next, Returned, Task};

/// The duration of a call from which on the VM is claimed from its thread, once the alarm has fired.
const STALL_LIMIT: Duration = Duration::from_millis(2);

/// The time from the start of a small call to the alarm, where no deadline is earlier: while the call lasts, no other client
/// is served.
const CALL_ALARM_DELAY: Duration = Duration::from_millis(100);

/// The number of requests of one client that are served before the next client's turn.
const MAX_REQUESTS_PER_TURN: usize = 32;

/// The time for which the loop makes small calls itself before other clients' turn. The remaining ones go to the pool.
const INLINE_CALL_TIME: Duration = Duration::from_millis(1);

/// The number of small calls that are handed to the pool together.
const POOL_BATCH_CALLS: usize = 64;

/// The number of messages of other threads that are taken before the clients' turn.
const MAX_MESSAGES_PER_TURN: usize = 256;

/// A message of another thread to the loop.
#[derive(Debug)]
pub(super) enum Message {
    /// A call that the gate asked for has returned.
    Call(Returned),
    /// A call whose thread has lost the VM to the supervisor has returned.
    LateCall(Returned),
    /// A DMA on demand has ended.
    Dma { client: ClientId, cookie: u64, result: Result<DmaDone, passgate_backends::Error> },
    /// A thread asks about the pages of a request.
    AccessQuery(AccessQuery),
    /// A thread of this process has made a control connection; this is the daemon's end.
    Connect(OwnedFd),
    /// A thread serves a disk, whose counters `Status` and metrics report from now on.
    Disk(Weak<dyn ReadDisk>),
}

/// The state that the loop, the pool's workers and the supervisor share.
#[derive(Debug)]
pub(super) struct Core {
    handoff: Handoff<Vm>,
    inbox: Mutex<Inbox>,
    /// An eventfd that wakes the loop.
    kick: OwnedFd,
    /// A timerfd (`CLOCK_MONOTONIC`) that wakes the supervisor.
    alarm: OwnedFd,
    /// Set once nothing is handed over to a next daemon, although the server was bound for it.
    handover_cancelled: AtomicBool,
    /// The result of the loop, once it has ended.
    outcome: Mutex<Option<Result<()>>>,
    ended: Condvar,
    threads: Mutex<Threads>,
}

/// The messages that have been delivered and not been taken yet.
#[derive(Debug, Default)]
struct Inbox {
    messages: VecDeque<Message>,
    /// Set once the VM is gone: messages are refused.
    closed: bool,
}

/// The threads that end with the VM. A thread that has lost the VM in a call is not among them: it may never end.
#[derive(Debug, Default)]
struct Threads {
    loop_thread: Option<JoinHandle<()>>,
    supervisor: Option<JoinHandle<()>>,
}

impl Core {
    pub(super) fn new() -> Result<(Arc<Self>, Generation)> {
        let failed = |call| move |errno| Error::Call(Failed::new(call, errno));
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed("eventfd"))?;
        let alarm = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC);
        let (handoff, generation) = Handoff::new();
        let core = Self {
            handoff,
            inbox: Mutex::default(),
            kick,
            alarm: alarm.map_err(failed("timerfd_create"))?,
            handover_cancelled: AtomicBool::new(false),
            outcome: Mutex::new(None),
            ended: Condvar::new(),
            threads: Mutex::default(),
        };
        Ok((Arc::new(core), generation))
    }

    /// Delivers a message to the loop. Returns false if the VM is gone; the message is dropped then.
    pub(super) fn deliver(&self, message: Message) -> bool {
        let mut inbox = self.inbox();
        if inbox.closed {
            // Unlocked first: dropping a message may run a caller's callback (`AccessQuery`).
            drop(inbox);
            return false;
        }
        inbox.messages.push_back(message);
        drop(inbox);
        self.kick();
        true
    }

    /// Refuses messages from now on, and drops those that have not been taken: the VM is gone.
    pub(super) fn close(&self) {
        let mut inbox = self.inbox();
        inbox.closed = true;
        let remaining = std::mem::take(&mut inbox.messages);
        // Unlocked first, as in `deliver`.
        drop(inbox);
        drop(remaining);
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the first [`MAX_MESSAGES_PER_TURN`] messages, and wakes the loop again if there are more.
    pub(super) fn take_messages(&self) -> VecDeque<Message> {
        // Read before the inbox is locked: a message that comes in between leaves the eventfd readable.
        let _ = rustix::io::read(&self.kick, &mut [0; 8]);
        let mut inbox = self.inbox();
        let taken = MAX_MESSAGES_PER_TURN.min(inbox.messages.len());
        let rest = inbox.messages.split_off(taken);
        let taken = std::mem::replace(&mut inbox.messages, rest);
        let more = !inbox.messages.is_empty();
        drop(inbox);
        if more {
            self.kick();
        }
        taken
    }

    /// Records that nothing is handed over to a next daemon.
    pub(super) fn cancel_handover(&self) {
        self.handover_cancelled.store(true, Relaxed);
    }

    /// Returns true once nothing is handed over to a next daemon.
    pub(super) fn handover_cancelled(&self) -> bool {
        self.handover_cancelled.load(Relaxed)
    }

    /// Returns the eventfd that is readable while the loop has something to do.
    pub(super) fn kicked(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    fn kick(&self) {
        // It fails only if the counter is at its limit, and then the loop has been woken already.
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// Sets the alarm, which wakes the supervisor, to `when`; `now` is the current time.
    pub(super) fn set_alarm(&self, now: Instant, when: Instant) {
        // At least 1 ns: a zero `it_value` would disarm the timer (timerfd_settime(2)).
        let remaining = when.saturating_duration_since(now).max(Duration::from_nanos(1));
        let it_value =
            Timespec { tv_sec: remaining.as_secs() as i64, tv_nsec: remaining.subsec_nanos().into() };
        let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        if let Err(errno) = timerfd_settime(&self.alarm, TimerfdTimerFlags::empty(), &spec) {
            log::error!("timerfd_settime: {errno}; deadlines may be missed");
        }
    }

    fn outcome(&self) -> MutexGuard<'_, Option<Result<()>>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, result: Result<()>) {
        *self.outcome() = Some(result);
        self.ended.notify_all();
        // Wakes the supervisor, which ends because there is an outcome.
        let now = Instant::now();
        self.set_alarm(now, now);
    }
}

/// Serves until stopped. The caller's thread only waits for the outcome, so that a call that never returns does not block it
/// either.
pub(super) fn run(core: Arc<Core>, generation: Generation, vm: Box<Vm>) -> Result<()> {
    start_supervisor(&core)?;
    let shared = Arc::clone(&core);
    core.threads().loop_thread = Some(spawn("loop", move || run_loop(&shared, generation, vm))?);
    let outcome = core.ended.wait_while(core.outcome(), |outcome| outcome.is_none());
    let result = outcome.unwrap_or_else(PoisonError::into_inner).replace(Ok(()));
    let Threads { loop_thread, supervisor } = std::mem::take(&mut *core.threads());
    for thread in [loop_thread, supervisor].into_iter().flatten() {
        thread.join().map_err(|_| Error::Panicked("loop"))?;
    }
    result.unwrap_or(Ok(()))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(Error::Thread)
}

/// Starts a supervisor, which ends with the loop or becomes the loop.
fn start_supervisor(core: &Arc<Core>) -> Result<()> {
    // Locked until the handle is stored: a supervisor that claims the VM at once moves its own handle.
    let mut threads = core.threads();
    let shared = Arc::clone(core);
    threads.supervisor = Some(spawn("supervisor", move || run_supervisor(&shared))?);
    Ok(())
}

/// Waits for alarms, and becomes the loop if the VM's owner hangs in a call.
fn run_supervisor(core: &Arc<Core>) {
    while core.outcome().is_none() {
        match rustix::io::read(&core.alarm, &mut [0; 8]) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => log::error!("timerfd: {errno}"),
        }
        // A loop that is not in a call wakes up and expires the deadlines itself.
        core.kick();
        loop {
            match core.handoff.claim(STALL_LIMIT) {
                Claim::NotParked => break,
                Claim::TooEarly => std::thread::sleep(STALL_LIMIT),
                Claim::Claimed(mut vm, generation) => {
                    vm.late_calls += 1;
                    log::warn!("a kernel call does not return: another thread continues the loop");
                    let mut threads = core.threads();
                    threads.loop_thread = threads.supervisor.take();
                    drop(threads);
                    if let Err(error) = start_supervisor(core) {
                        log::error!("{error}");
                    }
                    return run_loop(core, generation, vm);
                }
            }
        }
    }
}

/// Ends the loop with an error if its thread panics.
struct PanicGuard<'a>(&'a Core);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Err(Error::Panicked("loop")));
        }
    }
}

/// Runs the loop until it ends, or until the VM is claimed from this thread.
fn run_loop(core: &Arc<Core>, generation: Generation, vm: Box<Vm>) {
    let _panic_guard = PanicGuard(core);
    if let Some(result) = serve(core, generation, vm) {
        core.end(result);
    }
}

/// Serves the VM. Returns the result of the loop, or none if the VM was claimed from this thread.
fn serve(core: &Arc<Core>, generation: Generation, mut vm: Box<Vm>) -> Option<Result<()>> {
    let mut tokens = Vec::new();
    vm = settle(core, generation, vm)?;
    loop {
        if vm.begin_requested_end() {
            // Settled here, because nothing may become ready after this.
            vm = settle(core, generation, vm)?;
        }
        vm.retry_access_queries();
        vm.rearm(None);
        if let Some(result) = vm.result() {
            return Some(result);
        }
        if let Err(error) = vm.wait(&mut tokens) {
            return Some(Err(error));
        }
        for token in &tokens {
            // A token may stand for many requests. Each is settled before the next is read, except for records behind the
            // first one of a channel: unmaps of neighbouring ranges among them are coalesced into one call. A client that
            // sends without a pause gives way to the others: epoll reports the rest again, unless it has been read already.
            let mut requests = 0;
            while vm.ready(*token) && (requests < MAX_REQUESTS_PER_TURN || vm.has_read(*token)) {
                if requests == 0 || !Vm::is_channel(*token) {
                    vm = settle(core, generation, vm)?;
                }
                requests += 1;
            }
            vm = settle(core, generation, vm)?;
        }
    }
}

/// Performs the session's steps until it is idle. Returns none if the VM was claimed from this thread during a call.
///
/// Deadlines are expired between any two steps, and small calls beyond [`INLINE_CALL_TIME`] go to the pool, so that a request
/// of thousands of pages delays no other client.
fn settle(core: &Arc<Core>, generation: Generation, mut vm: Box<Vm>) -> Option<Box<Vm>> {
    let start = Instant::now();
    let mut remaining = Vec::new();
    loop {
        let now = Instant::now();
        vm.expire_deadlines(now);
        match vm.session.next_step() {
            Next::Idle if remaining.is_empty() => return Some(vm),
            Next::Idle => vm.pool.run_all(std::mem::take(&mut remaining)),
            Next::Answer(caller, answer) => vm.answer(caller, answer),
            Next::Refused(caller, error) => vm.refuse(caller, &error),
            Next::Notice(notice) => vm.publish(&notice),
            Next::Call(call) if !call.is_small() => vm.pool.run(Task::Call(call)),
            // While a call hangs, the next one may hang as well, and would cost another thread.
            Next::Call(call) if now - start >= INLINE_CALL_TIME || vm.late_calls > 0 => {
                remaining.push(call);
                if remaining.len() == POOL_BATCH_CALLS {
                    vm.pool.run_all(std::mem::take(&mut remaining));
                }
            }
            Next::Call(call) => {
                vm.rearm(Some(CALL_ALARM_DELAY));
                match core.handoff.run(generation, vm, || call.run()) {
                    Ok((back, returned)) => {
                        vm = back;
                        vm.returned(returned);
                    }
                    Err(returned) => {
                        core.deliver(Message::LateCall(returned));
                        return None;
                    }
                }
            }
        }
    }
}
