//! The results of the plants in `results.txt`: one line for each plant, and the figures above them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::plants::Plant;

/// The result of one plant.
#[derive(Debug)]
pub(crate) enum PlantResult {
    /// This test finds it.
    Caught { by: String, took: Duration },
    /// No native test finds it; `reached` if a test has executed it.
    Survived { reached: bool },
    /// The expected tests do not find it, and the others have not run; `reached` if a test has executed it.
    Missed { reached: bool },
}

impl PlantResult {
    pub(crate) fn words(&self) -> String {
        let reached = |reached: &bool| if *reached { "reached" } else { "not reached" };
        match self {
            Self::Caught { by, took } => format!("caught | {by} | {:.1} s", took.as_secs_f64()),
            Self::Survived { reached: it } => format!("survived | {} | -", reached(it)),
            Self::Missed { reached: it } => format!("missed | {} by the expected tests | -", reached(it)),
        }
    }
}

/// The results of all plants.
#[derive(Debug)]
pub(crate) struct Record {
    path: PathBuf,
    /// The version of each plant by id, and the rest of its line, which begins with `caught`, `survived` or `missed`.
    lines: BTreeMap<String, (String, String)>,
}

impl Record {
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let mut lines = BTreeMap::new();
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            text => text.map_err(|error| format!("{}: {error}", path.display()))?,
        };
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some((id, rest)) = line.split_once(" | ")
                && let Some((version, rest)) = rest.split_once(" | ")
            {
                lines.insert(id.to_owned(), (version.to_owned(), rest.to_owned()));
            }
        }
        Ok(Self { path: path.to_owned(), lines })
    }

    /// Returns the result of a plant in its present version.
    fn of(&self, plant: &Plant) -> Option<&str> {
        let (version, rest) = self.lines.get(&plant.id)?;
        (*version == plant.version()).then_some(rest)
    }

    /// True if a plant need not be run. If only the expected tests run, a result of theirs is enough.
    pub(crate) fn has(&self, plant: &Plant, expected: bool) -> bool {
        self.of(plant).is_some_and(|rest| expected || !rest.starts_with("missed"))
    }

    pub(crate) fn is_caught(&self, plant: &Plant) -> bool {
        self.of(plant).is_some_and(|rest| rest.starts_with("caught"))
    }

    /// True if no test finds the plant and no reason is stated.
    pub(crate) fn is_unexplained(&self, plant: &Plant) -> bool {
        plant.why.is_empty() && self.of(plant).is_some_and(|rest| rest.starts_with("survived"))
    }

    pub(crate) fn put(&mut self, plant: &Plant, result: PlantResult, root: &Path) -> Result<(), String> {
        let output_of = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).current_dir(root).output();
            let output = output.map_err(|error| format!("{program}: {error}"))?;
            Ok::<_, String>(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let (commit, date) =
            (output_of("git", &["rev-parse", "--short", "HEAD"])?, output_of("date", &["-u", "+%Y-%m-%d"])?);
        let rest = format!("{} | {date} | {commit}", result.words());
        self.lines.insert(plant.id.clone(), (plant.version(), rest));
        Ok(())
    }

    /// Writes the results of the present plants.
    pub(crate) fn write(&self, plants: &[Plant]) -> Result<(), String> {
        let mut text =
            String::from("# Written by tests/long/mutation/run: what became of each plant. Lines: plant,\n");
        text.push_str("# version of its text, fate, test that finds it, time until then, date, commit.\n");
        text.push_str("# missed: not found by the expected tests, and the others have not run. Not listed: not run.\n#\n");
        for line in self.figures(plants).lines() {
            let _ = writeln!(text, "# {line}");
        }
        for plant in plants {
            if let Some((version, rest)) = self.lines.get(&plant.id) {
                let _ = writeln!(text, "{} | {version} | {rest}", plant.id);
            }
        }
        fs::write(&self.path, text).map_err(|error| format!("{}: {error}", self.path.display()))
    }

    /// Returns a table of the plants by area: how many there are, have run, were caught, and are explained.
    pub(crate) fn figures(&self, plants: &[Plant]) -> String {
        let mut areas: BTreeMap<&str, [usize; 4]> = BTreeMap::new();
        for plant in plants {
            let count = areas.entry(plant.area()).or_default();
            count[0] += 1;
            let Some(rest) = self.of(plant) else { continue };
            let caught = rest.starts_with("caught");
            count[1] += 1;
            count[2] += usize::from(caught);
            count[3] += usize::from(!caught && !plant.why.is_empty());
        }
        let mut sum = [0; 4];
        let mut text = String::from("area      plants  run  caught  explained\n");
        for (area, counts) in &areas {
            (0..4).for_each(|nth| sum[nth] += counts[nth]);
            let [all, run, caught, explained] = counts;
            let _ = writeln!(text, "{area:<9} {all:>6} {run:>4} {caught:>7} {explained:>10}");
        }
        let [all, run, caught, explained] = sum;
        let percent = 100.0 * caught as f64 / (run.max(1)) as f64;
        let _ = write!(
            text,
            "{:<9} {all:>6} {run:>4} {caught:>7} {explained:>10}   {percent:.1} % caught",
            "all"
        );
        text
    }
}
