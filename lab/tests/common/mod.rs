//! What the tests of the binary share: a temporary directory with a text and a configuration, and the program run in it.
#![allow(dead_code)] // each test file compiles its own copy and uses a part of it

pub mod browser;

use std::path::PathBuf;
use std::process::{Command, Output};

use tempfile::TempDir;

pub struct Desk {
    dir: TempDir,
}

impl Desk {
    /// With a `text` of 20 kB whose next byte can mostly be told, and `small.toml`.
    pub fn new(small: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text: String = (0..2000).map(|i| format!("{} is odd. ", 2 * (i * i % 97) + 1)).collect();
        std::fs::write(dir.path().join("text"), text).unwrap();
        std::fs::write(dir.path().join("small.toml"), small).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rankgrad"));
        command.args(line.split_whitespace()).current_dir(self.dir.path());
        command
    }

    pub fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// Standard output and standard error of a command that must succeed.
    pub fn succeeds(&self, line: &str) -> [String; 2] {
        let output = self.run(line);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}\n{errors}");
        [String::from_utf8(output.stdout).unwrap(), errors]
    }

    /// Standard error of a command that must fail with one `error:` line or a usage message.
    pub fn refused(&self, line: &str) -> String {
        let output = self.run(line);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{line} succeeded");
        assert!(errors.contains("error:") && !errors.contains("panicked"), "{line}\n{errors}");
        errors
    }
}
