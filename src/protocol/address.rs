//! The address of a Unix socket: the one check of a path, for every door and every command.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::net::SocketAddrUnix;

use crate::error::{Error, Result};

/// Bytes of the longest path of a Unix socket (unix(7): `sun_path` has 108, one of them the NUL).
pub const MAX_PATH_BYTES: usize = 107;

/// Returns the address of the socket at `path`, or the reason why no socket can have this path.
pub fn address(path: &Path) -> Result<SocketAddrUnix> {
    let wrong = |why: String| Error::SocketPath { path: path.to_owned(), why };
    let bytes = path.as_os_str().as_bytes();
    match bytes.len() {
        // The kernel would choose an abstract name, which has no file and no permissions.
        0 => return Err(wrong("the path of a socket is empty: give one".into())),
        1..=MAX_PATH_BYTES => {}
        length => {
            return Err(wrong(format!(
                "the path has {length} bytes, that of a Unix socket at most {MAX_PATH_BYTES}: choose a shorter \
                 one, or change to its directory and give the name alone"
            )));
        }
    }
    SocketAddrUnix::new(path).map_err(|errno| wrong(format!("no path of a socket ({errno}): choose another")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_beyond_the_limit_is_refused_with_the_limit() {
        assert!(address(Path::new(&"x".repeat(MAX_PATH_BYTES))).is_ok());
        for (path, why) in [
            ("x".repeat(MAX_PATH_BYTES + 1), "has 108 bytes, that of a Unix socket at most 107"),
            ("x".repeat(5000), "at most 107"),
            (String::new(), "is empty"),
            ("a\0b".into(), "no path of a socket"),
        ] {
            let error = address(Path::new(&path)).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
