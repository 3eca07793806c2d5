//! Runs one test program with one plant switched on.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::build::{Build, Program};
use crate::plants::Plant;

/// The time without output and without processor time after which a program counts as hanging.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);
/// The time without output after which a program counts as hanging: a million random events, beside two busy loops, take less
/// than a third of it.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(1200);
/// The interval at which a program's output is read.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The result of a run.
#[derive(Debug, PartialEq, Eq)]
enum RunResult {
    /// Every test passed.
    Passed,
    /// This test failed; if the name is empty, the program as a whole.
    Failed(String),
    /// It stopped making progress.
    Hangs,
}

/// Returns the test of `filter` that finds the plant; none if all pass. A test counts only if it also fails with the plant when it
/// runs by itself, and passes without the plant: a test that fails now and then on a busy machine finds nothing.
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
            RunResult::Passed => return Ok(None),
            RunResult::Failed(name) if name.is_empty() => (format!("{target} {filter} ends"), chosen.clone()),
            RunResult::Failed(name) => (format!("{target} {name}"), vec!["--exact".to_owned(), name.clone()]),
            RunResult::Hangs => (format!("{target} {filter} hangs"), chosen.clone()),
        };
        let fails = || Ok::<_, String>(run(program, &alone, switch, &log)? != RunResult::Passed);
        if (ended == RunResult::Hangs || fails()? || fails()? || fails()?)
            && passes(build, program, &by, &alone)?
        {
            return Ok(Some(by));
        }
        println!("{}: {by}: fails without the plant too, or only now and then: not counted", plant.id);
        match ended {
            // The tests after it may find the plant.
            RunResult::Failed(name) if !name.is_empty() => chosen.extend(["--skip".to_owned(), name]),
            _ => return Ok(None),
        }
    }
}

/// True if the test passes without a plant.
fn passes(build: &Build, program: &Program, by: &str, arguments: &[String]) -> Result<bool, String> {
    let known = build.witnesses.borrow().contains(by);
    let passes =
        known || run(program, arguments, None, &build.cache.join("logs/without"))? == RunResult::Passed;
    if passes {
        build.witnesses.borrow_mut().insert(by.to_owned());
    }
    Ok(passes)
}

fn arguments(filter: &str) -> Vec<String> {
    filter.split_whitespace().map(str::to_owned).collect()
}

/// Runs a test program until a test fails, all have passed, or it stops making progress.
fn run(
    program: &Program,
    arguments: &[String],
    plant: Option<(&str, &Path)>,
    log: &Path,
) -> Result<RunResult, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", program.path.display());
    let output = File::create(log).map_err(failed)?;
    let mut command = Command::new(&program.path);
    command.args(arguments).current_dir(&program.folder).env("CARGO_MANIFEST_DIR", &program.folder);
    command.stdin(Stdio::null()).stdout(output.try_clone().map_err(failed)?).stderr(output);
    // A process group of its own, so that the processes that the tests started are killed with it.
    command.process_group(0).env_remove("PASSGATE_PLANT");
    if let Some((id, marker)) = plant {
        command.env("PASSGATE_PLANT", id).env("PASSGATE_PLANT_REACHED", marker);
    }
    let mut child = command.spawn().map_err(failed)?;
    let ended = watch(&mut child, log).map_err(failed);
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // The group is empty already if every test cleaned up.
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
    ended
}

fn watch(child: &mut Child, log: &Path) -> std::io::Result<RunResult> {
    let now = Instant::now();
    let (mut written, mut wrote, mut used, mut worked) = (0, now, String::new(), now);
    loop {
        let over = child.try_wait()?;
        let length = fs::metadata(log)?.len();
        if length != written {
            (written, wrote) = (length, Instant::now());
            if let Some(name) = failure(&String::from_utf8_lossy(&fs::read(log)?)) {
                return Ok(RunResult::Failed(name));
            }
        }
        let time = processor_time(child.id());
        if time != used {
            (used, worked) = (time, Instant::now());
        }
        match over {
            Some(status) if status.success() => return Ok(RunResult::Passed),
            Some(_) => return Ok(RunResult::Failed(String::new())),
            None if wrote.elapsed() > OUTPUT_TIMEOUT => return Ok(RunResult::Hangs),
            None if wrote.elapsed() > STALL_TIMEOUT && worked.elapsed() > STALL_TIMEOUT => {
                return Ok(RunResult::Hangs);
            }
            None => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

/// Returns the processor time that a process has used: `utime` and `stime` of proc_pid_stat(5), as text.
fn processor_time(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The program's name, which may contain blanks and parentheses, ends with the last parenthesis.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    fields.split_whitespace().skip(11).take(2).collect::<Vec<_>>().join(" ")
}

/// Returns the first test that the output reports as failed.
fn failure(output: &str) -> Option<String> {
    let line = output.lines().find(|line| line.starts_with("test ") && line.ends_with("... FAILED"))?;
    line.split_whitespace().nth(1).map(str::to_owned)
}
