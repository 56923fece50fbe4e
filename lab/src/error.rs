//! The application's one error type, and a file written whole or not at all.
//!
//! An `Error` is a finished sentence for the person at the terminal: what was wrong, where, and what to do.
//! It is not a type to match on: nothing in this application recovers by kind of error.

use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// A message that names what was wrong, where, and what to do about it.
pub struct Error(String);

/// What can fail here fails with an [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Error(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// Tests unwrap: the message should read there as it does at the terminal.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// For `map_err`: "cannot read PATH: CAUSE".
pub fn cannot<E: fmt::Display>(act: &str, path: &Path) -> impl FnOnce(E) -> Error {
    move |cause| Error(format!("cannot {act} {}: {cause}", path.display()))
}

/// Replaces `path` by `bytes` so that a crash at any moment leaves the old file or the new one, never half of either.
///
/// The bytes go to `.writing` in the same directory (a rename is atomic only within a file system), which a later
/// call overwrites should the machine stop in between.
///
/// # Errors
/// When the directory is missing or not writable, or the disk is full: `path` is then as it was.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = path.parent().filter(|d| *d != Path::new("")).unwrap_or(Path::new("."));
    let temporary = directory.join(".writing");
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    if let Err(cause) = written {
        let _ = fs::remove_file(&temporary);
        return Err(Error(format!(
            "cannot write {}: {cause}; what was saved before is untouched",
            path.display()
        )));
    }
    // The rename itself is on disk only once the directory is; other systems offer no such call.
    #[cfg(unix)]
    File::open(directory).and_then(|d| d.sync_all()).map_err(cannot("sync", directory))?;
    Ok(())
}

/// Prints part of a line of results to standard output, at once; returns false if its reader has gone (`| head`), which is no
/// error. A full disk is.
pub fn tell(part: std::fmt::Arguments) -> bool {
    let mut out = std::io::stdout().lock();
    match out.write_fmt(part).and_then(|()| out.flush()) {
        Ok(()) => true,
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => false,
        Err(e) => {
            eprintln!("error: cannot write to standard output: {e}");
            std::process::exit(1);
        }
    }
}

/// [`tell`]s a whole line.
pub fn say(line: std::fmt::Arguments) {
    tell(format_args!("{line}\n"));
}

/// As `println!`, through [`say`].
#[macro_export]
macro_rules! say {
    ($($part:tt)*) => { $crate::error::say(format_args!($($part)*)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_the_file_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_keeps_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomically(&path, b"one").unwrap();
        // Every write to /dev/full fails as on a full disk.
        std::os::unix::fs::symlink("/dev/full", dir.path().join(".writing")).unwrap();
        let error = write_atomically(&path, b"two").unwrap_err().to_string();
        assert!(error.contains("No space left") && error.contains("untouched"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = write_atomically(Path::new("/no/such/place/a"), b"").unwrap_err().to_string();
        assert!(error.starts_with("cannot write /no/such/place/a: "), "{error}");
    }
}
