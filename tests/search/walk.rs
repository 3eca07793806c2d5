//! Random walks of hundreds of steps through worlds that are too large to be searched: clients connect and die, daemons are
//! killed and restarted, calls fail.

use crate::action::Action;
use crate::config::Config;
use crate::oracle::BrokenPromise;
use crate::world::World;

/// A reproducible random number generator: SplitMix64 (Steele, Lea, Flood 2014).
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// Returns the relative frequency of an action among those that are possible.
fn weight(action: &Action) -> usize {
    match action {
        Action::Call(_, crate::kernel::Outcome::Done) | Action::Result(_) => 12,
        Action::Call(..) => 1,
        Action::Begin(_) | Action::End(..) | Action::Drain | Action::Adopt | Action::Connect => 6,
        Action::Tick | Action::FlightEnds(_) | Action::Release(..) | Action::Settle(..) => 3,
        Action::Remove(_) | Action::AddAlias => 2,
        Action::Kill(_) | Action::ClientDies | Action::SecondDies | Action::GiveUp => 1,
    }
}

/// Takes at most `steps` steps and lets the world come to rest. Returns the number of steps.
///
/// # Errors
///
/// The broken promise, and the path that leads to it.
pub fn walk(config: &Config, seed: u64, steps: usize) -> Result<usize, (BrokenPromise, Vec<Action>)> {
    let mut rng = Rng(seed);
    let mut path = Vec::new();
    let mut world = World::new(config).map_err(|broken| (broken, Vec::new()))?;
    for _ in 0..steps {
        let enabled = world.enabled();
        let total: usize = enabled.iter().map(weight).sum();
        if total == 0 {
            break;
        }
        let mut at = rng.below(total);
        let chosen = enabled.into_iter().find(|action| match at.checked_sub(weight(action)) {
            Some(rest) => {
                at = rest;
                false
            }
            None => true,
        });
        let Some(action) = chosen else { break };
        path.push(action);
        world.act(action).map_err(|broken| (broken, path.clone()))?;
    }
    world.run_to_rest(|_, _| {}).map_err(|broken| (broken, path.clone()))?;
    Ok(path.len())
}
