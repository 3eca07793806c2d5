//! Threads for what takes long: large maps, fences, resets. Results come back through one callback.
//!
//! A thread that never returns from the kernel is lost to the pool, so there are several; when all are busy, tasks
//! wait, and the gate's deadlines answer for them.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::call::{Call, Returned};

/// Threads at most.
const THREADS: usize = 8;

/// Something that takes long.
pub enum Task {
    /// A call of the gate's; what came of it goes to the callback.
    Call(Call),
    /// Anything else; it delivers for itself.
    Other(Box<dyn FnOnce() + Send>),
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(call) => call.fmt(f),
            Self::Other(_) => f.write_str("Other"),
        }
    }
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    threads: usize,
    idle: usize,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    more: Condvar,
    deliver: Box<dyn Fn(Returned) + Send + Sync>,
}

/// The pool. Its threads end once it is dropped and they come back from what they are at.
pub struct Pool {
    shared: Arc<Shared>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.lock().threads).finish()
    }
}

impl Pool {
    /// A pool without threads; they come with the tasks.
    pub fn new(deliver: impl Fn(Returned) + Send + Sync + 'static) -> Self {
        let shared = Shared { queue: Mutex::default(), more: Condvar::new(), deliver: Box::new(deliver) };
        Self { shared: Arc::new(shared) }
    }

    /// Runs `task` on some thread, soon.
    pub fn run(&self, task: Task) {
        let mut queue = self.lock();
        queue.tasks.push_back(task);
        if queue.idle >= queue.tasks.len() || queue.threads == THREADS {
            self.shared.more.notify_one();
            return;
        }
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new().name("worker".into()).spawn(move || shared.work());
        match started {
            Ok(_) => queue.threads += 1,
            // The task waits for a thread that exists; where none does, the gate's deadline answers.
            Err(error) => log::error!("cannot start a worker thread: {error}; raise the limit of tasks"),
        }
        self.shared.more.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.lock().closed = true;
        self.shared.more.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match queue.tasks.pop_front() {
                Some(task) => {
                    drop(queue);
                    match task {
                        Task::Call(call) => (self.deliver)(call.run()),
                        Task::Other(task) => task(),
                    }
                    queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                }
                None if queue.closed => return,
                None => {
                    queue.idle += 1;
                    queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
                    queue.idle -= 1;
                }
            }
        }
    }
}
