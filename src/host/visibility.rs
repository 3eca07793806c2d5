//! The open files of all processes of the host, and the reasons why some of them may not be visible to this one.
//!
//! That no process has a device open is certain only if every process was visible. So a search for holders also returns the
//! reason why its view may be incomplete. An error during the search counts as a process that was not visible.

use std::fs;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

use serde::Serialize;

/// The inode of the initial PID namespace: `PROC_PID_INIT_INO`, include/linux/proc_ns.h.
const INITIAL_PID_NAMESPACE_INODE: u64 = 0xefff_fffc;
/// `ESRCH`, the errno of a process that has ended: include/uapi/asm-generic/errno-base.h.
const ESRCH: i32 = 3;

/// The reason why some process, or some of its files, may not be visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Blind {
    /// procfs is not mounted.
    NoProcfs,
    /// `/proc` belongs to another PID namespace than that of this process.
    OtherProcfs,
    /// This process is outside the initial PID namespace.
    Namespace,
    /// procfs hides processes (mount option `hidepid`).
    HidePid,
    /// The files of some process could not be read.
    Denied,
}

impl Blind {
    /// Returns the reason and the remedy as text for the user.
    pub fn describe(self) -> &'static str {
        match self {
            Self::NoProcfs => "no procfs is mounted at /proc: mount it",
            Self::OtherProcfs => "/proc belongs to another PID namespace: mount this one's",
            Self::Namespace => {
                "processes outside this PID namespace cannot be seen: run in the host's (--pid=host for a container)"
            }
            Self::HidePid => "/proc hides processes (hidepid): run as root",
            Self::Denied => "the files of some process could not be read: run as root, with every capability",
        }
    }
}

/// Returns why `proc` does not show every process of the host, or none where it does.
pub fn blindness(proc: &Path) -> Option<Blind> {
    let Ok(own_pid) = fs::read_link(proc.join("self")) else {
        // The procfs of a namespace in which this process is not has no `self` for it.
        return Some(if proc.join("1").exists() { Blind::OtherProcfs } else { Blind::NoProcfs });
    };
    if own_pid.to_str().and_then(|pid| pid.parse().ok()) != Some(std::process::id()) {
        return Some(Blind::OtherProcfs);
    }
    let namespace = fs::read_link(proc.join("self/ns/pid")).unwrap_or_default();
    let initial = format!("pid:[{INITIAL_PID_NAMESPACE_INODE}]");
    if namespace != Path::new(&initial) {
        return Some(Blind::Namespace);
    }
    // Under hidepid=invisible and hidepid=ptraceable a process that may not be traced has no directory, and process 1 is the
    // least likely one that may.
    (!proc.join("1").exists()).then_some(Blind::HidePid)
}

/// An open file of a process.
#[derive(Debug)]
pub(crate) struct OpenFile<'a> {
    /// The process ID.
    pub(crate) pid: u32,
    /// The directory of the process in procfs.
    pub(crate) dir: &'a Path,
    /// The magic link in the `fd` directory of the process.
    pub(crate) link: PathBuf,
    /// The target of the link.
    pub(crate) target: String,
}

/// Calls `visit` for every open file of every process in `proc`. Returns the reason why some may be missing; none if none is.
pub(crate) fn each_open_file(proc: &Path, mut visit: impl FnMut(&OpenFile<'_>)) -> Option<Blind> {
    let mut blind = blindness(proc);
    let Ok(entries) = fs::read_dir(proc) else { return blind.or(Some(Blind::NoProcfs)) };
    for entry in entries {
        let Ok(entry) = entry else {
            blind = blind.or(Some(Blind::Denied));
            continue;
        };
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Err(error) = files_of(pid, &entry.path(), &mut visit)
            && !has_ended(&error)
        {
            blind = blind.or(Some(Blind::Denied));
        }
    }
    blind
}

fn files_of(pid: u32, dir: &Path, visit: &mut impl FnMut(&OpenFile<'_>)) -> Result<(), Error> {
    for file in fs::read_dir(dir.join("fd"))? {
        let link = file?.path();
        let target = match fs::read_link(&link) {
            Ok(target) => target.to_string_lossy().into_owned(),
            Err(error) if has_ended(&error) => continue, // The file was closed meanwhile.
            Err(error) => return Err(error),
        };
        visit(&OpenFile { pid, dir, link, target });
    }
    Ok(())
}

/// Returns true if the error means that the process has ended or the file was closed meanwhile: nothing is missing then.
pub(crate) fn has_ended(error: &Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::inventory::fake::FakeTree;

    fn view_of(tree: &FakeTree) -> Option<Blind> {
        blindness(&tree.path().join("proc"))
    }

    #[test]
    fn incomplete_procfs_view_is_reported_with_reason() {
        let tree = FakeTree::new();
        assert_eq!(view_of(&tree), None);
        let own = format!("proc/{}/ns/pid", std::process::id());
        tree.replace_link(&own, "pid:[4026532201]");
        assert_eq!(view_of(&tree), Some(Blind::Namespace));
        tree.remove(&own);
        assert_eq!(
            view_of(&tree),
            Some(Blind::Namespace),
            "a namespace without a name is not the initial one"
        );
        tree.link(&own, "pid:[4026531836]");
        tree.replace_link("proc/self", "1");
        assert_eq!(view_of(&tree), Some(Blind::OtherProcfs), "this process has another id there");
        tree.remove("proc/self");
        assert_eq!(view_of(&tree), Some(Blind::OtherProcfs), "this process is not in it");
        fs::remove_dir(tree.path().join("proc/1")).unwrap();
        assert_eq!(view_of(&tree), Some(Blind::NoProcfs));
        tree.link("proc/self", &std::process::id().to_string());
        assert_eq!(view_of(&tree), Some(Blind::HidePid));
        assert_eq!(blindness(Path::new("/nowhere")), Some(Blind::NoProcfs));
    }

    #[test]
    fn unreadable_files_make_view_incomplete() {
        let tree = FakeTree::new();
        let proc = tree.path().join("proc");
        assert_eq!(each_open_file(&proc, |file| panic!("{file:?}")), None);
        tree.write("proc/42/fd", "no directory, as it is no readable one for others");
        assert_eq!(each_open_file(&proc, |file| panic!("{file:?}")), Some(Blind::Denied));
        tree.write("proc/43/fd/7", "no link");
        assert_eq!(each_open_file(&proc, |file| panic!("{file:?}")), Some(Blind::Denied));
    }

    /// The real procfs, in the namespace of this process.
    #[test]
    fn real_procfs_shows_open_file_of_this_process() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (mut mine, name) = (0, file.path().to_str().unwrap());
        each_open_file(Path::new("/proc"), |open| {
            mine += u32::from(open.pid == std::process::id() && open.target == name);
        });
        assert_eq!(mine, 1);
    }
}
