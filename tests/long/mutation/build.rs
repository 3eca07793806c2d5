//! The copy of the source tree with all plants, and its test programs.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::plants::{self, Plant};

/// The source that is appended to `bindings/src/lib.rs` in the copy: the switch of every plant. Each place reads its switch once,
/// because the environment does not change; a plant that is reached leaves a marker file.
const SWITCH_SOURCE: &str = r#"
/// True while this plant is switched on.
#[macro_export]
macro_rules! planted {
    ($id:literal) => {{
        static ON: ::std::sync::OnceLock<bool> = ::std::sync::OnceLock::new();
        *ON.get_or_init(|| $crate::is_planted($id))
    }};
}

/// True if the environment names this plant.
pub fn is_planted(id: &str) -> bool {
    let named = std::env::var("PASSGATE_PLANT").is_ok_and(|name| name == id);
    if named && let Ok(marker) = std::env::var("PASSGATE_PLANT_REACHED") {
        let _ = std::fs::write(marker, id);
    }
    named
}
"#;

/// A test program, and the folder in which it runs.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) folder: PathBuf,
}

/// The built copy.
#[derive(Debug)]
pub(crate) struct Build {
    pub(crate) cache: PathBuf,
    programs: BTreeMap<String, Program>,
    /// The tests that have passed without a plant.
    pub(crate) witnesses: RefCell<BTreeSet<String>>,
}

impl Build {
    /// Copies the tree to `target/mutation`, inserts every plant, and builds the native tests there.
    pub(crate) fn make(root: &Path, plants: &[Plant]) -> Result<Self, String> {
        let cache = root.join("target/mutation");
        let tree = cache.join("tree");
        fs::create_dir_all(cache.join("logs")).map_err(|error| format!("{}: {error}", cache.display()))?;
        copy(root, &tree, plants)?;
        let programs = compile(&tree, &cache.join("build"))?;
        Ok(Self { cache, programs, witnesses: RefCell::default() })
    }

    /// Returns the names of all test targets, as `package/target`.
    pub(crate) fn targets(&self) -> impl Iterator<Item = &str> {
        self.programs.keys().map(String::as_str)
    }

    pub(crate) fn program(&self, target: &str) -> Option<&Program> {
        self.programs.get(target)
    }
}

/// Brings the copy up to date. Files that have not changed keep their modification time, so that they are not built again.
fn copy(root: &Path, tree: &Path, plants: &[Plant]) -> Result<(), String> {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .map_err(|error| format!("git: {error}"))?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let names: BTreeSet<&str> = listed.split('\0').filter(|name| !name.is_empty()).collect();
    let by_file = plants::by_file(plants);
    for name in &names {
        let Ok(mut bytes) = fs::read(root.join(name)) else { continue };
        if let Some(plants) = by_file.get(name) {
            let text = String::from_utf8(bytes).map_err(|error| format!("{name}: {error}"))?;
            bytes = plants::planted(&text, plants).map_err(|problems| problems.join("\n"))?.into_bytes();
        }
        if *name == "bindings/src/lib.rs" {
            bytes.extend_from_slice(SWITCH_SOURCE.as_bytes());
        }
        let to = tree.join(name);
        if fs::read(&to).is_ok_and(|there| there == bytes) {
            continue;
        }
        let failed = |error: std::io::Error| format!("{}: {error}", to.display());
        fs::create_dir_all(to.parent().unwrap_or(tree)).map_err(failed)?;
        fs::write(&to, bytes).map_err(failed)?;
        let mode = fs::metadata(root.join(name)).map_err(failed)?.permissions();
        fs::set_permissions(&to, mode).map_err(failed)?;
    }
    remove_others(tree, tree, &names)
}

/// Removes files from the copy that are not in the tree any more.
fn remove_others(tree: &Path, folder: &Path, names: &BTreeSet<&str>) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            remove_others(tree, &path, names)?;
        } else if let Ok(name) = path.strip_prefix(tree)
            && !names.contains(name.to_string_lossy().as_ref())
        {
            fs::remove_file(&path).map_err(failed)?;
        }
    }
    Ok(())
}

/// Builds every test of the copy. Returns the programs by `package/target`; the unit tests of a library are `package/lib`.
fn compile(tree: &Path, target: &Path) -> Result<BTreeMap<String, Program>, String> {
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--workspace", "--lib", "--bins", "--tests", "--no-run"]);
    cargo.arg("--message-format=json-render-diagnostics").current_dir(tree);
    cargo.env("CARGO_TARGET_DIR", target).env("CARGO_PROFILE_DEV_DEBUG", "0");
    let built = cargo.stderr(Stdio::inherit()).output().map_err(|error| format!("cargo: {error}"))?;
    if !built.status.success() {
        return Err("the planted copy does not compile".to_owned());
    }
    let mut programs = BTreeMap::new();
    for line in String::from_utf8_lossy(&built.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
        let text = |pointer: &str| message.pointer(pointer).and_then(Value::as_str);
        let is_test = message.pointer("/profile/test").and_then(Value::as_bool) == Some(true);
        let (Some(path), Some(manifest), Some(name), true) =
            (text("/executable"), text("/manifest_path"), text("/target/name"), is_test)
        else {
            continue;
        };
        let folder = Path::new(manifest).parent().unwrap_or(tree).to_owned();
        // A member is called after its folder: passgate-sim in backends/sim.
        let package = match folder.strip_prefix(tree).ok().and_then(Path::file_name) {
            None => "passgate".to_owned(),
            Some(member) => format!("passgate-{}", member.to_string_lossy()),
        };
        let name = match text("/target/kind/0") {
            Some("lib") => "lib",
            Some("bin") => "bin",
            _ => name,
        };
        programs.insert(format!("{package}/{name}"), Program { path: path.into(), folder });
    }
    Ok(programs)
}
