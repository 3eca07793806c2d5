//! The list of plants: reads it from `plants/`, checks that each plant still applies, and inserts plants into a file's text.
//!
//! A plant is written as
//!
//! ```text
//! ### gate-short-unmap-is-gone
//! file src/gate/results.rs
//! what An unmap that came up short counts as whole once a later one has succeeded.
//! test passgate/promises million_random_events
//! why  the reason why no test can find it, if none can
//! @@ original
//! text that occurs in the file exactly once
//! @@ planted
//! text that replaces it, with `planted!()` where the fault is switched on
//! ```
//!
//! with more than one pair of texts if the fault is in several places.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

/// The switch in the text of a plant, which is true while the plant is on.
const SWITCH: &str = "planted!()";

/// A test target, such as `passgate/promises` or `passgate-backends/lib`, and a filter of its tests.
#[derive(Debug, Clone, Hash)]
pub(crate) struct Test {
    pub(crate) target: String,
    pub(crate) filter: String,
}

/// One small fault.
#[derive(Debug, Clone, Hash, Default)]
pub(crate) struct Plant {
    pub(crate) id: String,
    pub(crate) file: String,
    pub(crate) what: String,
    /// The tests that are expected to find it.
    pub(crate) tests: Vec<Test>,
    /// The reason why no test finds it, if none can.
    pub(crate) why: String,
    /// Pairs of a text that occurs in the file exactly once, and the text that replaces it.
    texts: Vec<(String, String)>,
}

impl Plant {
    /// Returns the area of the plant: the first word of its id.
    pub(crate) fn area(&self) -> &str {
        self.id.split('-').next().unwrap_or_default()
    }

    /// Returns a hash that changes with the plant's id, file or texts, but not with its description or tests.
    pub(crate) fn version(&self) -> String {
        let mut hasher = DefaultHasher::new();
        (&self.id, &self.file, &self.texts).hash(&mut hasher);
        format!("{:08x}", hasher.finish() as u32)
    }
}

/// Reads every plant, in the order of the files' names.
pub(crate) fn read(folder: &Path) -> Result<Vec<Plant>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        files.push(entry.map_err(failed)?.path());
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    let mut plants = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        plants.append(&mut parse(&text).map_err(|error| format!("{}: {error}", file.display()))?);
    }
    Ok(plants)
}

/// The section of a plant to which a line belongs.
enum Section {
    Head,
    Original,
    Planted,
}

fn parse(text: &str) -> Result<Vec<Plant>, String> {
    let (mut plants, mut section) = (Vec::<Plant>::new(), Section::Head);
    for (nth, line) in (1..).zip(text.lines()) {
        if let Some(id) = line.strip_prefix("### ") {
            plants.push(Plant { id: id.trim().to_owned(), ..Plant::default() });
            section = Section::Head;
            continue;
        }
        let Some(plant) = plants.last_mut() else { continue };
        match (&section, line) {
            (_, "@@ original") => {
                plant.texts.push(Default::default());
                section = Section::Original;
            }
            (_, "@@ planted") => section = Section::Planted,
            (Section::Original, line) => {
                plant.texts.last_mut().iter_mut().for_each(|text| push(&mut text.0, line))
            }
            (Section::Planted, line) => {
                plant.texts.last_mut().iter_mut().for_each(|text| push(&mut text.1, line))
            }
            (Section::Head, "") => {}
            (Section::Head, line) => {
                let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
                let rest = rest.trim().to_owned();
                match word {
                    "file" => plant.file = rest,
                    "what" => plant.what = rest,
                    "why" => plant.why = rest,
                    "test" => {
                        let (target, filter) = rest.split_once(' ').unwrap_or((&rest, ""));
                        let (target, filter) = (target.to_owned(), filter.trim().to_owned());
                        plant.tests.push(Test { target, filter });
                    }
                    _ => return Err(format!("line {nth}: `{word}` is no part of a plant")),
                }
            }
        }
    }
    for plant in &mut plants {
        for (original, planted) in &mut plant.texts {
            original.truncate(original.trim_end().len());
            planted.truncate(planted.trim_end().len());
        }
    }
    Ok(plants)
}

fn push(text: &mut String, line: &str) {
    if !text.is_empty() {
        text.push('\n');
    }
    text.push_str(line);
}

/// Returns the problems of the plants: a line for each that does not apply.
pub(crate) fn check(root: &Path, plants: &[Plant]) -> Vec<String> {
    let (mut problems, mut ids) = (Vec::new(), BTreeSet::new());
    for plant in plants {
        if !ids.insert(&plant.id) {
            problems.push(format!("{}: there are two plants of that name", plant.id));
        }
        // The switch is in passgate-bindings, on which this package cannot depend.
        if plant.file.starts_with("bindings/client/") {
            problems.push(format!("{}: no plant can be in passgate-client", plant.id));
        }
        let switched = !plant.texts.is_empty() && plant.texts.iter().all(|(_, text)| text.contains(SWITCH));
        if plant.what.is_empty() || plant.tests.is_empty() || !switched {
            problems
                .push(format!("{}: it needs `what`, `test` and `{SWITCH}` in its planted text", plant.id));
        }
    }
    for (file, plants) in by_file(plants) {
        match fs::read_to_string(root.join(file)) {
            Err(error) => problems.push(format!("{file}: {error}")),
            Ok(text) => problems.extend(planted(&text, &plants).err().unwrap_or_default()),
        }
    }
    problems
}

/// Returns the plants of each file.
pub(crate) fn by_file(plants: &[Plant]) -> BTreeMap<&str, Vec<&Plant>> {
    let mut files: BTreeMap<&str, Vec<&Plant>> = BTreeMap::new();
    for plant in plants {
        files.entry(&plant.file).or_default().push(plant);
    }
    files
}

/// Returns the text of a file with all of its plants.
///
/// # Errors
///
/// A line for each plant that does not apply.
pub(crate) fn planted(text: &str, plants: &[&Plant]) -> Result<String, Vec<String>> {
    let (mut replacements, mut problems) = (Vec::new(), Vec::new());
    for (plant, (original, new)) in
        plants.iter().flat_map(|plant| plant.texts.iter().map(move |texts| (plant, texts)))
    {
        let mut found = text.match_indices(original.as_str());
        match (found.next(), found.next()) {
            (Some((at, _)), None) if !original.is_empty() => {
                replacements.push((at, at + original.len(), *plant, new));
            }
            (None, _) => problems.push(format!("{}: its text is not in {} any more", plant.id, plant.file)),
            _ => problems.push(format!("{}: its text is in {} more than once", plant.id, plant.file)),
        }
    }
    replacements.sort_unstable_by_key(|(from, ..)| *from);
    for pair in replacements.windows(2) {
        if pair[0].1 > pair[1].0 {
            problems.push(format!("{} and {} are in each other's way", pair[0].2.id, pair[1].2.id));
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let (mut whole, mut at) = (String::new(), 0);
    for (from, to, plant, new) in replacements {
        let owner = if plant.file.starts_with("bindings/") { "crate" } else { "passgate_bindings" };
        let switch = format!("::{owner}::planted!({:?})", plant.id).replace("::crate", "crate");
        whole.push_str(&text[at..from]);
        whole.push_str(&new.replace(SWITCH, &switch));
        at = to;
    }
    whole.push_str(&text[at..]);
    Ok(whole)
}
