//! Breadth-first search over every state of a configuration.
//!
//! A session cannot be copied, so a state is the path that leads to it, replayed. States are the same where their
//! canonical texts are.

use std::collections::HashSet;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::action::Action;
use crate::config::Config;
use crate::truth::Broken;
use crate::world::World;

/// What a search found.
#[derive(Debug)]
pub struct Found {
    pub states: usize,
    pub transitions: usize,
    pub depth: usize,
    /// The processor's time.
    pub took: Duration,
    /// Whether every state was seen.
    pub complete: bool,
    /// The first broken promise, and the shortest path that leads to it.
    pub broken: Option<(Broken, Vec<Action>)>,
}

/// How the state was reached: from which other, by what.
type Step = (u32, Option<Action>);

fn path(steps: &[Step], mut at: u32) -> Vec<Action> {
    let mut path = Vec::new();
    while let (before, Some(action)) = steps[at as usize] {
        path.push(action);
        at = before;
    }
    path.reverse();
    path
}

/// The time that the processor has spent on this thread: what else runs on the machine does not count.
fn processor_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// When a search ends at the latest.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub states: usize,
    /// The processor's time.
    pub time: Duration,
}

/// Searches until every state has been seen, a promise is broken, or a limit is reached.
pub fn search(config: &Config, limits: Limits) -> Found {
    let began = processor_time();
    let mut found =
        Found { states: 0, transitions: 0, depth: 0, took: Duration::ZERO, complete: false, broken: None };
    let mut steps: Vec<Step> = vec![(0, None)];
    let mut seen = HashSet::new();
    match World::new(config) {
        Ok(world) => _ = seen.insert(world.fingerprint()),
        Err(broken) => found.broken = Some((broken, Vec::new())),
    }
    let mut next = 0;
    while next < steps.len() && found.broken.is_none() && steps.len() < limits.states {
        if processor_time() - began > limits.time {
            break;
        }
        let so_far = path(&steps, next as u32);
        found.depth = so_far.len();
        let replay =
            || World::replay(config, &so_far).expect("this was replayed before, and nothing was broken");
        let mut first = Some(replay());
        for action in first.as_ref().map(World::enabled).unwrap_or_default() {
            let mut world = first.take().unwrap_or_else(replay);
            found.transitions += 1;
            let mut judged = world.act(action);
            if judged.is_ok() && seen.insert(world.fingerprint()) {
                steps.push((next as u32, Some(action)));
                judged = world.come_to_rest(|_, _| {});
            }
            if let Err(broken) = judged {
                let mut path = so_far.clone();
                path.push(action);
                found.broken = Some((broken, path));
                break;
            }
        }
        next += 1;
    }
    found.complete = next == steps.len() && found.broken.is_none();
    found.states = steps.len();
    found.took = processor_time() - began;
    found
}

/// Returns how a path goes, step by step, for whoever reads a failure.
pub fn narrate(config: &Config, path: &[Action]) -> String {
    let mut told = String::new();
    let mut world = match World::new(config) {
        Ok(world) => world,
        Err(broken) => return broken.to_string(),
    };
    for action in path {
        let judged = world.act(*action);
        told += &format!("  {action:?}\n    {}\n", world.summary());
        if let Err(broken) = judged {
            return told + &broken.to_string();
        }
    }
    told += "  and then nothing more goes wrong:\n";
    let judged =
        world.come_to_rest(|action, world| told += &format!("  {action:?}\n    {}\n", world.summary()));
    told + &judged.err().map(|broken| broken.to_string()).unwrap_or_default()
}
