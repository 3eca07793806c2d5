//! Threads for calls that may block for long: large maps, fences, resets. Results are delivered through one callback.
//!
//! A thread that never returns from the kernel is lost to the pool. So each kind of task has threads of its own: a fence, which
//! may be what ends a hung unmap, never waits for a thread in which such an unmap hangs, nor does an unmap wait for a client's
//! `Dma` request. While all threads of a kind are busy its tasks wait; clients are answered by the gate's deadlines all the same.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::call::{Call, Returned};

/// The maximum number of threads for maps, unmaps, replaces and conversions.
const MAX_CALL_THREADS: usize = 8;
/// The maximum number of threads for examinations of clients' files, and for tasks that are not the gate's.
const MAX_OTHER_THREADS: usize = 8;
/// The maximum number of threads for fences and attaches: no limit, because the gate has at most one such call in progress for
/// each device.
const MAX_FENCE_THREADS: usize = usize::MAX;

/// A task that may block for long.
pub enum Task {
    /// A call of the gate's; its result goes to the callback.
    Call(Call),
    /// Any other task; it reports its result itself.
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

type Deliver = dyn Fn(Returned) + Send + Sync;

#[derive(Default)]
struct Queue {
    /// The tasks that no thread has taken yet.
    tasks: VecDeque<Task>,
    /// The number of threads that were started.
    threads: usize,
    /// The number of threads that wait for a task.
    idle: usize,
    /// Set once the pool is dropped: threads end when the queue is empty.
    closed: bool,
}

/// The queue of one kind of tasks, and the threads that serve only it.
struct Workers {
    name: &'static str,
    max_threads: usize,
    queue: Mutex<Queue>,
    /// Notified when a task is added, and when the queue is closed.
    changed: Condvar,
    deliver: Arc<Deliver>,
}

/// The pool. After it is dropped, each thread ends as soon as its current task and the queue allow.
pub struct Pool {
    calls: Arc<Workers>,
    fences: Arc<Workers>,
    /// Examinations of clients' files: a file system in user space may never answer.
    examinations: Arc<Workers>,
    others: Arc<Workers>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads = |workers: &Workers| workers.lock().threads;
        f.debug_struct("Pool")
            .field("calls", &threads(&self.calls))
            .field("fences", &threads(&self.fences))
            .field("examinations", &threads(&self.examinations))
            .field("others", &threads(&self.others))
            .finish()
    }
}

impl Pool {
    /// Returns a pool without threads; they are started as tasks come. `deliver` is called on these threads.
    pub fn new(deliver: impl Fn(Returned) + Send + Sync + 'static) -> Self {
        let deliver: Arc<Deliver> = Arc::new(deliver);
        let workers = |name, max_threads| {
            let (queue, changed, deliver) = (Mutex::default(), Condvar::new(), Arc::clone(&deliver));
            Arc::new(Workers { name, max_threads, queue, changed, deliver })
        };
        Self {
            calls: workers("worker", MAX_CALL_THREADS),
            fences: workers("fence", MAX_FENCE_THREADS),
            examinations: workers("examination", MAX_OTHER_THREADS),
            others: workers("task", MAX_OTHER_THREADS),
        }
    }

    /// Runs small calls, each on the next thread that is free, so that one that hangs does not delay the others.
    pub fn run_all(&self, calls: Vec<Call>) {
        let is_fence = |call: &Call| matches!(call, Call::Fence { .. } | Call::Attach { .. });
        debug_assert!(!calls.iter().any(is_fence), "a fence is not small");
        let is_examination = |call: &Call| matches!(call, Call::Examine { .. });
        let (examinations, calls): (Vec<_>, Vec<_>) = calls.into_iter().partition(is_examination);
        self.examinations.run(examinations.into_iter().map(Task::Call));
        self.calls.run(calls.into_iter().map(Task::Call));
    }

    /// Runs `task` on a thread of its kind as soon as one is free.
    pub fn run(&self, task: Task) {
        match &task {
            Task::Call(Call::Fence { .. } | Call::Attach { .. }) => &self.fences,
            Task::Call(Call::Examine { .. }) => &self.examinations,
            Task::Call(_) => &self.calls,
            Task::Other(_) => &self.others,
        }
        .run(std::iter::once(task));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for workers in [&self.calls, &self.fences, &self.examinations, &self.others] {
            workers.lock().closed = true;
            workers.changed.notify_all();
        }
    }
}

impl Workers {
    fn run(self: &Arc<Self>, tasks: impl Iterator<Item = Task>) {
        let mut queue = self.lock();
        let before = queue.tasks.len();
        queue.tasks.extend(tasks);
        let new = queue.tasks.len() - before;
        for _ in 0..new {
            if queue.idle >= queue.tasks.len() || queue.threads >= self.max_threads {
                break;
            }
            let workers = Arc::clone(self);
            let started = std::thread::Builder::new().name(self.name.into()).spawn(move || workers.work());
            match started {
                Ok(_) => queue.threads += 1,
                // The task waits for an existing thread; if there is none, the gate's deadline answers the client.
                Err(error) => log::error!("cannot start a worker thread: {error}; raise the limit of tasks"),
            }
        }
        match new {
            1 => self.changed.notify_one(),
            _ => self.changed.notify_all(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut queue = self.lock();
        loop {
            match queue.tasks.pop_front() {
                Some(task) => {
                    drop(queue);
                    match task {
                        Task::Call(call) => (self.deliver)(call.run()),
                        Task::Other(task) => task(),
                    }
                    queue = self.lock();
                }
                None if queue.closed => return,
                None => {
                    queue.idle += 1;
                    queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                    queue.idle -= 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use passgate_backends::{Device, DeviceTraits, Domain, Step, Steps};
    use passgate_bindings::PageRange;
    use passgate_sim::iommu::{self as sim, Fault, FaultPlan, Memory, Sim};

    use super::*;
    use crate::gate::{Caller, ClientId, DeviceId, DomainId, Door, Event, JobId};

    /// The time after which a result is taken to be missing: longer than any machine takes to start a thread.
    const RESULT_TIMEOUT: Duration = Duration::from_secs(60);

    #[test]
    fn hung_calls_of_one_kind_leave_the_threads_of_the_others_free() {
        let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let hung = 4 * MAX_CALL_THREADS as u64;
        let plan = (1..=hung).fold(FaultPlan::new(), |plan, nth| plan.at(sim::Call::Unmap, nth, Fault::Hang));
        sim.plan(plan.at(sim::Call::Fence, 1, Fault::Hang));
        let (delivered, results) = mpsc::channel();
        let pool = Pool::new(move |returned| _ = delivered.send(returned));
        let domain: Arc<dyn Domain> = Arc::new(sim.clone());
        let page = PageRange::new(0, passgate_bindings::PAGE).unwrap();
        for job in 0..hung {
            let (job, domain, shares) = (JobId(job), Arc::clone(&domain), Vec::new());
            pool.run(Task::Call(Call::Unmap {
                job,
                id: DomainId(0),
                domain,
                iova: page,
                shares,
                already: 0,
            }));
        }
        let device =
            |name| -> Arc<dyn Device> { Arc::new(sim.device(name, Steps::all(), DeviceTraits::default())) };
        let (first, second) = (device("sim:0"), device("sim:1"));
        let fence = |job, device| {
            let (id, assumed) = (DeviceId(0), crate::gate::DeviceTraits::default());
            Task::Call(Call::Fence { job: JobId(job), device, id, assumed, step: Step::Detach })
        };
        // Wait until this fence hangs, so that the next one needs another thread.
        pool.run(fence(100, first));
        let begun = Instant::now();
        while sim.hanging() < MAX_CALL_THREADS + 1 {
            assert!(
                begun.elapsed() < RESULT_TIMEOUT,
                "the fence has not begun: {} calls hang",
                sim.hanging()
            );
            std::thread::yield_now();
        }
        pool.run(fence(101, Arc::clone(&second)));
        let fenced = |returned| match returned {
            Ok(Returned::Fact { event: Event::Fenced { job, errno: 0, .. }, .. }) => job,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            fenced(results.recv_timeout(RESULT_TIMEOUT)),
            JobId(101),
            "neither unmaps nor another fence delay it"
        );
        let (id, assumed) = (DeviceId(1), crate::gate::DeviceTraits::default());
        pool.run(Task::Call(Call::Attach { job: JobId(102), device: second, id, assumed }));
        let attached = results.recv_timeout(RESULT_TIMEOUT).unwrap();
        assert!(matches!(
            attached,
            Returned::Fact { event: Event::Attached { job: JobId(102), errno: 0 }, .. }
        ));
        let memory = crate::protocol::verbs::AddMemory::shared(0, passgate_bindings::PAGE);
        let caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };
        let examine = || Call::Examine {
            caller,
            memory: memory.clone(),
            fds: Vec::new(),
            in_use: Vec::new(),
            store: None,
        };
        pool.run(Task::Call(examine()));
        pool.run_all(vec![examine()]);
        for _ in 0..2 {
            assert!(matches!(results.recv_timeout(RESULT_TIMEOUT).unwrap(), Returned::Examined { .. }));
        }
        let (ran, other) = mpsc::channel();
        pool.run(Task::Other(Box::new(move || _ = ran.send(()))));
        other.recv_timeout(RESULT_TIMEOUT).unwrap();
        // The hanging calls continue and no later one hangs, so that the threads end.
        sim.plan(FaultPlan::new());
        sim.release();
        (0..hung + 1).for_each(|_| _ = results.recv_timeout(RESULT_TIMEOUT).unwrap());
    }
}
