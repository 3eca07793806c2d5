//! One test program with one plant switched on.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::build::{Build, Program};
use crate::plants::Plant;

/// A program that neither writes anything nor takes any processor time for so long has stopped making progress.
const SILENCE: Duration = Duration::from_secs(120);
/// The longest time in which a program writes nothing: a million random events, with two busy loops beside them, take
/// less than a third of it.
const LONGEST_TEST: Duration = Duration::from_secs(1200);
/// How often a program's output is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// Every test passed.
    Passed,
    /// This test failed, or the program did as a whole.
    Failed(String),
    /// It made no progress any more.
    Hangs,
}

/// The test of `filter` that finds the plant; none where all pass. A test is a witness if it fails with the plant when it
/// runs by itself, too, and passes without: one that fails now and then on a busy machine finds nothing.
pub(crate) fn catches(
    build: &Build,
    program: &Program,
    target: &str,
    filter: &str,
    plant: &Plant,
    marker: &Path,
) -> Result<Option<String>, String> {
    let log = build.cache.join("logs").join(&plant.id);
    let switch = Some((plant.id.as_str(), marker));
    let mut chosen = arguments(filter);
    loop {
        let ended = run(program, &chosen, switch, &log)?;
        let (by, alone) = match &ended {
            Ended::Passed => return Ok(None),
            Ended::Failed(name) if name.is_empty() => (format!("{target} {filter} ends"), chosen.clone()),
            Ended::Failed(name) => (format!("{target} {name}"), vec!["--exact".to_owned(), name.clone()]),
            Ended::Hangs => (format!("{target} {filter} hangs"), chosen.clone()),
        };
        let fails = || Ok::<_, String>(run(program, &alone, switch, &log)? != Ended::Passed);
        if (ended == Ended::Hangs || fails()? || fails()? || fails()?) && passes(build, program, &by, &alone)?
        {
            return Ok(Some(by));
        }
        println!("{}: {by}: fails without the plant too, or now and then, and so is no witness", plant.id);
        match ended {
            // The tests behind it may be.
            Ended::Failed(name) if !name.is_empty() => chosen.extend(["--skip".to_owned(), name]),
            _ => return Ok(None),
        }
    }
}

/// True where a witness passes without a plant.
fn passes(build: &Build, program: &Program, by: &str, arguments: &[String]) -> Result<bool, String> {
    let known = build.witnesses.borrow().contains(by);
    let passes = known || run(program, arguments, None, &build.cache.join("logs/without"))? == Ended::Passed;
    if passes {
        build.witnesses.borrow_mut().insert(by.to_owned());
    }
    Ok(passes)
}

fn arguments(filter: &str) -> Vec<String> {
    filter.split_whitespace().map(str::to_owned).collect()
}

/// Runs a test program until a test fails, all have passed, or nothing goes on.
fn run(
    program: &Program,
    arguments: &[String],
    plant: Option<(&str, &Path)>,
    log: &Path,
) -> Result<Ended, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", program.path.display());
    let output = File::create(log).map_err(failed)?;
    let mut command = Command::new(&program.path);
    command.args(arguments).current_dir(&program.folder).env("CARGO_MANIFEST_DIR", &program.folder);
    command.stdin(Stdio::null()).stdout(output.try_clone().map_err(failed)?).stderr(output);
    // What the tests have started goes with them.
    command.process_group(0).env_remove("PASSGATE_PLANT");
    if let Some((id, marker)) = plant {
        command.env("PASSGATE_PLANT", id).env("PASSGATE_PLANT_REACHED", marker);
    }
    let mut child = command.spawn().map_err(failed)?;
    let ended = watch(&mut child, log).map_err(failed);
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // Nobody is left in it where all is well.
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
    ended
}

fn watch(child: &mut Child, log: &Path) -> std::io::Result<Ended> {
    let now = Instant::now();
    let (mut written, mut wrote, mut used, mut worked) = (0, now, String::new(), now);
    loop {
        let over = child.try_wait()?;
        let length = fs::metadata(log)?.len();
        if length != written {
            (written, wrote) = (length, Instant::now());
            if let Some(name) = failure(&String::from_utf8_lossy(&fs::read(log)?)) {
                return Ok(Ended::Failed(name));
            }
        }
        let time = processor_time(child.id());
        if time != used {
            (used, worked) = (time, Instant::now());
        }
        match over {
            Some(status) if status.success() => return Ok(Ended::Passed),
            Some(_) => return Ok(Ended::Failed(String::new())),
            None if wrote.elapsed() > LONGEST_TEST => return Ok(Ended::Hangs),
            None if wrote.elapsed() > SILENCE && worked.elapsed() > SILENCE => return Ok(Ended::Hangs),
            None => std::thread::sleep(LOOK_EVERY),
        }
    }
}

/// The processor time that a process has used: `utime` and `stime` of proc_pid_stat(5).
fn processor_time(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name of the program, which may have blanks in it, ends with the last parenthesis.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    fields.split_whitespace().skip(11).take(2).collect::<Vec<_>>().join(" ")
}

/// The first test that the output says has failed.
fn failure(output: &str) -> Option<String> {
    let line = output.lines().find(|line| line.starts_with("test ") && line.ends_with("... FAILED"))?;
    line.split_whitespace().nth(1).map(str::to_owned)
}
