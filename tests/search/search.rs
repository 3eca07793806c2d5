//! Breadth-first search over every state of a configuration.
//!
//! A session cannot be copied, so a state is stored as the path that leads to it, and replayed. States are the same if their
//! canonical texts are.

use std::collections::HashSet;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::action::Action;
use crate::config::Config;
use crate::oracle::BrokenPromise;
use crate::world::World;

/// The result of a search.
#[derive(Debug)]
pub struct SearchResult {
    pub states: usize,
    pub transitions: usize,
    pub depth: usize,
    /// The processor time that the search took.
    pub took: Duration,
    /// True if every state was visited.
    pub complete: bool,
    /// The first broken promise, and the shortest path that leads to it.
    pub broken: Option<(BrokenPromise, Vec<Action>)>,
}

/// The step that led to a state: the index of the state before, and the action.
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

/// Returns the processor time of this thread, which other load on the machine does not affect.
fn processor_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// The limits of a search.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The maximum number of states.
    pub states: usize,
    /// The maximum processor time.
    pub time: Duration,
}

/// Searches until every state has been visited, a promise is broken, or a limit is reached.
pub fn search(config: &Config, limits: Limits) -> SearchResult {
    let began = processor_time();
    let mut result = SearchResult {
        states: 0,
        transitions: 0,
        depth: 0,
        took: Duration::ZERO,
        complete: false,
        broken: None,
    };
    let mut steps: Vec<Step> = vec![(0, None)];
    let mut seen = HashSet::new();
    match World::new(config) {
        Ok(world) => _ = seen.insert(world.fingerprint()),
        Err(broken) => result.broken = Some((broken, Vec::new())),
    }
    let mut next = 0;
    while next < steps.len() && result.broken.is_none() && steps.len() < limits.states {
        if processor_time() - began > limits.time {
            break;
        }
        let so_far = path(&steps, next as u32);
        result.depth = so_far.len();
        let replay =
            || World::replay(config, &so_far).expect("this was replayed before, and nothing was broken");
        // The replay that lists the actions also serves for the first of them.
        let mut first = Some(replay());
        for action in first.as_ref().map(World::enabled).unwrap_or_default() {
            let mut world = first.take().unwrap_or_else(replay);
            result.transitions += 1;
            let mut judged = world.act(action);
            if judged.is_ok() && seen.insert(world.fingerprint()) {
                steps.push((next as u32, Some(action)));
                judged = world.run_to_rest(|_, _| {});
            }
            if let Err(broken) = judged {
                let mut path = so_far.clone();
                path.push(action);
                result.broken = Some((broken, path));
                break;
            }
        }
        next += 1;
    }
    result.complete = next == steps.len() && result.broken.is_none();
    result.states = steps.len();
    result.took = processor_time() - began;
    result
}

/// Returns a path step by step, with the state after each step, for a failure's message.
pub fn describe_path(config: &Config, path: &[Action]) -> String {
    let mut text = String::new();
    let mut world = match World::new(config) {
        Ok(world) => world,
        Err(broken) => return broken.to_string(),
    };
    for action in path {
        let judged = world.act(*action);
        text += &format!("  {action:?}\n    {}\n", world.summary());
        if let Err(broken) = judged {
            return text + &broken.to_string();
        }
    }
    text += "  from here on no call fails:\n";
    let judged =
        world.run_to_rest(|action, world| text += &format!("  {action:?}\n    {}\n", world.summary()));
    text + &judged.err().map(|broken| broken.to_string()).unwrap_or_default()
}
