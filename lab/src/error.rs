//! The application's one error type, and lines of results.
//!
//! An `Error` is a finished sentence for the person at the terminal: what was wrong, where, and what to do.
//! It is not a type to match on: nothing in this application recovers by kind of error.

use std::fmt;
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

/// Of work that several workers do together.
impl From<rankgrad::parallel::Failed> for Error {
    fn from(why: rankgrad::parallel::Failed) -> Self {
        Error(why.0)
    }
}

/// For `map_err`: "cannot read PATH: CAUSE".
pub fn cannot<E: fmt::Display>(act: &str, path: &Path) -> impl FnOnce(E) -> Error {
    move |cause| Error(format!("cannot {act} {}: {cause}", path.display()))
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
