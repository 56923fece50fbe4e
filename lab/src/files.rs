//! Files written whole or not at all, files read where they lie, and directories that one process writes to.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result, cannot};

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
        return Err(Error::new(format!(
            "cannot write {}: {cause}; what was saved before is untouched",
            path.display()
        )));
    }
    // The rename itself is on disk only once the directory is; other systems offer no such call.
    #[cfg(unix)]
    File::open(directory).and_then(|d| d.sync_all()).map_err(cannot("sync", directory))?;
    Ok(())
}

/// Writes a value as JSON for people to read, like [`write_atomically`].
///
/// # Errors
/// As there.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(value).expect("plain values") + "\n";
    write_atomically(path, json.as_bytes())
}

/// Keeps other processes of this program from writing to a directory, for as long as what is returned lives, and no longer than this
/// process. Readers are not kept out. `what` is the trouble and the way out, for the message.
///
/// # Errors
/// That another process has it; a directory that cannot be opened. A file system without locks locks nothing.
pub fn claim(directory: &Path, what: &str) -> Result<Claim> {
    // a directory can be opened, and so locked, on Unix only
    let opened = if cfg!(unix) { Some(File::open(directory)) } else { None };
    let handle = opened.transpose().map_err(cannot("open", directory))?;
    match handle.as_ref().map(File::try_lock) {
        Some(Err(TryLockError::WouldBlock)) => {
            Err(Error::new(format!("{} is in use: {what}", directory.display())))
        }
        _ => Ok(Claim { _handle: handle }),
    }
}

/// A directory that is this process's to write to.
#[derive(Debug)]
pub struct Claim {
    _handle: Option<File>,
}

/// The bytes of a file in memory, read from the disk where they are looked at. `act` is what for, as in [`cannot`].
///
/// # Errors
/// A file that cannot be opened or mapped.
pub fn mapped(act: &str, path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(cannot(act, path))?;
    // SAFETY: the mapping is only read, and bytes of any value are valid u8. Nobody may change the file meanwhile: this program
    // never does, it replaces files by renaming others; where another program shortens one, the system ends the process (SIGBUS)
    // on the next access behind the new end, and what it writes may be read in part, as by any reader of a file being written.
    unsafe { Mmap::map(&file) }.map_err(cannot(act, path))
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
    fn a_file_is_read_where_it_lies() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        for bytes in [&b""[..], b"some bytes"] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(&mapped("read", &path).unwrap()[..], bytes);
        }
        let error = mapped("read the words", &dir.path().join("b")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read the words ") && error.contains("/b: "), "{error}");
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = write_atomically(Path::new("/no/such/place/a"), b"").unwrap_err().to_string();
        assert!(error.starts_with("cannot write /no/such/place/a: "), "{error}");
    }
}
