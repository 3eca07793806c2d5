//! The mutation score: small faults (*plants*) in a copy of the source tree, and the native tests that must find them.
//!
//! All plants are compiled into one copy of the tree and switched on by an environment variable, so that one build serves them
//! all. The project's own sources never contain a plant.
//!
//!     tests/long/mutation/run --check                             each plant still applies; compiles nothing
//!     tests/long/mutation/run --list                              plants and results by area
//!     tests/long/mutation/run --record [--minutes 30] [ID…]       run the plants that have no result yet, or these
//!     tests/long/mutation/run [--minutes 30] [ID…]                run some plants that were found before, others every day
//!
//! The tests that are expected to find a plant run first. If they do not find it, the rest of the native suite runs, unless
//! `--expected` is given. With `--record` the results are written to `results.txt`, one line for each plant; a plant whose text
//! has changed since is run again, and `--again` runs all of them.

mod build;
mod plants;
mod record;
mod trial;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use build::Build;
use plants::Plant;
use record::{PlantResult, Record};

/// The number of plants by which each day's run begins after that of the day before.
const PLANTS_PER_DAY: usize = 10;

/// The options of the command line.
#[derive(Debug)]
struct Options {
    check: bool,
    list: bool,
    expected: bool,
    again: bool,
    record: bool,
    within: Duration,
    ids: Vec<String>,
}

impl Options {
    fn read(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let (minutes, ids) = (Duration::from_secs(30 * 60), Vec::new());
        let (check, list, expected, again, record) = Default::default();
        let mut options = Self { check, list, expected, again, record, within: minutes, ids };
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--check" => options.check = true,
                "--list" => options.list = true,
                "--expected" => options.expected = true,
                "--again" => options.again = true,
                "--record" => options.record = true,
                "--minutes" => {
                    let minutes = arguments.next().and_then(|minutes| minutes.parse::<u64>().ok());
                    options.within = Duration::from_secs(60 * minutes.ok_or("--minutes takes a number")?);
                }
                other if other.starts_with('-') => {
                    return Err(format!(
                        "there is no option {other}; tests/long/mutation/main.rs lists them"
                    ));
                }
                id => options.ids.push(id.to_owned()),
            }
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    match Options::read(std::env::args().skip(1)).and_then(|options| run(here, &options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mutation: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs as the options request. Returns false if a plant does not apply, or if no test finds one and no reason is stated.
fn run(root: &Path, options: &Options) -> Result<bool, String> {
    let own = root.join("tests/long/mutation");
    let plants = plants::read(&own.join("plants"))?;
    let problems = plants::check(root, &plants);
    problems.iter().for_each(|problem| eprintln!("{problem}"));
    if !problems.is_empty() {
        eprintln!("{} of {} plants do not apply: bring them up to date", problems.len(), plants.len());
        return Ok(false);
    }
    let mut record = Record::read(&own.join("results.txt"))?;
    if options.check {
        println!("{} plants apply", plants.len());
        return Ok(true);
    }
    if options.list {
        println!("{}", record.figures(&plants));
        return Ok(true);
    }
    let chosen = choose(&plants, options, &record)?;
    if !chosen.is_empty() {
        let build = Build::make(root, &plants)?;
        let begun = Instant::now();
        for plant in chosen {
            if begun.elapsed() > options.within {
                println!("time is up: run it again to continue");
                break;
            }
            let result = try_plant(&build, plant, options.expected)?;
            println!("{}: {}", plant.id, result.words());
            record.put(plant, result, root)?;
            if options.record {
                record.write(&plants)?;
            }
        }
    }
    println!("{}", record.figures(&plants));
    let unexplained: Vec<_> = plants.iter().filter(|plant| record.is_unexplained(plant)).collect();
    unexplained.iter().for_each(|plant| eprintln!("{}: no test finds it: {}", plant.id, plant.what));
    Ok(unexplained.is_empty())
}

fn choose<'a>(plants: &'a [Plant], options: &Options, record: &Record) -> Result<Vec<&'a Plant>, String> {
    for id in &options.ids {
        if !plants.iter().any(|plant| plant.id.starts_with(id.as_str())) {
            return Err(format!("there is no plant {id}"));
        }
    }
    let named = |plant: &&Plant| options.ids.iter().any(|id| plant.id.starts_with(id.as_str()));
    if !options.ids.is_empty() {
        return Ok(plants.iter().filter(named).collect());
    }
    if options.record {
        let missing = |plant: &&Plant| options.again || !record.has(plant, options.expected);
        return Ok(plants.iter().filter(missing).collect());
    }
    // Plants that were found before must still be found: all of them in turn, from another one on every day.
    let day = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs() / (24 * 3600));
    let mut found: Vec<_> = plants.iter().filter(|plant| record.is_caught(plant)).collect();
    let first = (day as usize * PLANTS_PER_DAY).checked_rem(found.len()).unwrap_or(0);
    found.rotate_left(first);
    Ok(found)
}

/// Runs the tests that are expected to find a plant, then the others, until one finds it.
fn try_plant(build: &Build, plant: &Plant, expected: bool) -> Result<PlantResult, String> {
    let begun = Instant::now();
    let expectations = plant.tests.iter().map(|test| (test.target.clone(), test.filter.clone()));
    let rest = build.targets().filter(|_| !expected).map(|target| (target.to_owned(), String::new()));
    let marker: PathBuf = build.cache.join("reached");
    let _ = std::fs::remove_file(&marker);
    for (target, filter) in expectations.chain(rest) {
        let Some(program) = build.program(&target) else {
            return Err(format!("{}: there is no test target {target}", plant.id));
        };
        if let Some(by) = trial::catches(build, program, &target, &filter, plant, &marker)? {
            return Ok(PlantResult::Caught { by, took: begun.elapsed() });
        }
    }
    let reached = marker.exists();
    Ok(if expected { PlantResult::Missed { reached } } else { PlantResult::Survived { reached } })
}
