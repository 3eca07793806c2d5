//! The address of a Unix socket: all code that binds or connects one checks its path here.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::net::SocketAddrUnix;

use crate::error::{Error, Result};

/// The maximum length in bytes of a Unix socket's path (unix(7): `sun_path` has 108, including the NUL).
pub const MAX_PATH_BYTES: usize = 107;

/// Returns the address of the socket at `path`, or [`Error::SocketPath`] where no socket can have this path.
pub fn address(path: &Path) -> Result<SocketAddrUnix> {
    let wrong = |why: String| Error::SocketPath { path: path.to_owned(), why };
    let bytes = path.as_os_str().as_bytes();
    match bytes.len() {
        // For an empty path the kernel would choose an abstract name, which has no file and no permissions (unix(7)).
        0 => return Err(wrong("the socket path is empty: give one".into())),
        1..=MAX_PATH_BYTES => {}
        length => {
            return Err(wrong(format!(
                "the path has {length} bytes, that of a Unix socket at most {MAX_PATH_BYTES}: choose a shorter \
                 one, or change to its directory and give the name alone"
            )));
        }
    }
    SocketAddrUnix::new(path)
        .map_err(|errno| wrong(format!("not a valid socket path ({errno}): choose another")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_socket_path_is_refused_with_the_reason() {
        assert!(address(Path::new(&"x".repeat(MAX_PATH_BYTES))).is_ok());
        for (path, why) in [
            ("x".repeat(MAX_PATH_BYTES + 1), "has 108 bytes, that of a Unix socket at most 107"),
            ("x".repeat(5000), "at most 107"),
            (String::new(), "is empty"),
            ("a\0b".into(), "not a valid socket path"),
        ] {
            let error = address(Path::new(&path)).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
            assert!(matches!(error, Error::SocketPath { .. }));
        }
    }
}
