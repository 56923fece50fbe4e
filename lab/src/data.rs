//! The corpus: bytes of files, each byte a token; the first 90 % are for training, the last 10 % for validation, unless
//! validation has files of its own.
//!
//! Batches are pure functions of their position (seed, step, micro-step), so a resumed run needs no saved state.
//! Not here: any other tokenizer. A window is `context` inputs and the same shifted by one as targets.

use std::fs;
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};
use toml::Table;
use walkdir::WalkDir;

use crate::error::{Error, Result, cannot};

/// The crates of the embedded default, in order: crates.io packages that every platform downloads to build this
/// project, with much prose in their comments. Not in it: crates that are mostly tables or generated code.
const CRATES: [&str; 12] = [
    "clap_builder",
    "indicatif",
    "matrixmultiply",
    "nalgebra",
    "ndarray",
    "num-traits",
    "rand",
    "rayon",
    "rayon-core",
    "serde",
    "serde_json",
    "toml",
];

/// Bytes to train and to validate on.
pub struct Corpus {
    bytes: Vec<u8>,
    /// Where the validation part begins.
    split: usize,
    /// What was read: files or crates, bytes, hash. One line.
    pub summary: String,
    /// SHA-256 of all bytes, in hexadecimal.
    pub sha256: String,
}

/// Windows of tokens, row-major [rows, context] each.
#[derive(Debug, PartialEq)]
pub struct Batch {
    pub inputs: Vec<u32>,
    pub targets: Vec<u32>,
    pub rows: usize,
}

impl Corpus {
    /// Reads files and, below directories, all that is not hidden; no `paths`: the embedded default. All of `validation`, if
    /// there is any, is for validation, and then all of `paths` for training.
    ///
    /// # Errors
    /// A path that is missing or unreadable, an empty file, a directory without files, too few bytes for one window
    /// of `context` tokens in either part, or an embedded default that is not on this disk.
    pub fn load(paths: &[PathBuf], validation: &[PathBuf], context: usize) -> Result<Self> {
        let (mut bytes, mut what) =
            if paths.is_empty() { read_crates(&cargo_sources()?)? } else { read_paths(paths)? };
        let mut split = (bytes.len() as u64 * 9 / 10) as usize;
        let mut parts = ["first 90 %, to train on", "last 10 %, to validate on"];
        let mut hash = Sha256::new();
        if !validation.is_empty() {
            let (own, files) = read_paths(validation)?;
            split = bytes.len();
            parts = ["files to train on", "files of --val-data"];
            what += &format!(", validation on {files}");
            bytes.extend(own);
            hash.update(split.to_le_bytes()); // the same bytes cut elsewhere are another corpus
        }
        hash.update(&bytes);
        let sha256: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let summary = format!("{what}, {} bytes, sha256 {}", bytes.len(), &sha256[..16]);
        let corpus = Corpus { bytes, split, summary, sha256 };
        for (name, part) in parts.into_iter().zip([corpus.train(), corpus.validation()]) {
            if part.len() <= context {
                return Err(Error::new(format!(
                    "data: the {name}, are {} of {} bytes, fewer than one window of context + 1 = {}; \
                     give more data with --data or a smaller --context",
                    part.len(),
                    corpus.bytes.len(),
                    context + 1
                )));
            }
        }
        Ok(corpus)
    }

    /// What to train on.
    pub fn train(&self) -> &[u8] {
        &self.bytes[..self.split]
    }

    /// What to validate on.
    pub fn validation(&self) -> &[u8] {
        &self.bytes[self.split..]
    }

    /// The validation loss, in nats per token, of a model that knows how often each byte comes and nothing else: the cross
    /// entropy under the training part's counts, each plus one.
    pub fn frequency_loss(&self) -> f64 {
        let mut counts = [1.0f64; 256];
        self.train().iter().for_each(|&byte| counts[usize::from(byte)] += 1.0);
        let total: f64 = counts.iter().sum();
        let sum: f64 = self.validation().iter().map(|&byte| (total / counts[usize::from(byte)]).ln()).sum();
        sum / self.validation().len() as f64
    }

    /// Windows at uniformly drawn positions of the training part.
    ///
    /// Micro-steps go on in the step's random stream where the one before ended: n micro-batches of b rows are the
    /// windows of one batch of n·b rows.
    pub fn training_batch(
        &self,
        batch: usize,
        context: usize,
        seed: u64,
        step: u64,
        micro_step: u64,
    ) -> Batch {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(step);
        rng.set_word_pos(2 * u128::from(micro_step) * batch as u128); // two words a draw
        let positions = self.train().len() - context;
        // The high half of a 64 × 64 bit product: uniform to 1 part in 2^64 / positions.
        let draw = |_| ((u128::from(rng.next_u64()) * positions as u128) >> 64) as usize;
        windows(self.train(), (0..batch).map(draw), context)
    }

    /// Windows that do not overlap, in batches (the last may have fewer rows): all of the validation part but its
    /// last bytes, fewer than a window; or, with a `limit` on the batches other than 0, evenly spread ones.
    pub fn validation_batches(
        &self,
        batch: usize,
        context: usize,
        limit: usize,
    ) -> impl Iterator<Item = Batch> {
        let part = self.validation();
        let all = (part.len() - 1) / context;
        let taken = if limit == 0 { all } else { all.min(limit * batch) };
        (0..taken).step_by(batch).map(move |first| {
            let rows = first..taken.min(first + batch);
            windows(part, rows.map(|i| i * all / taken * context), context)
        })
    }
}

fn windows(part: &[u8], starts: impl Iterator<Item = usize>, context: usize) -> Batch {
    let mut batch = Batch { inputs: Vec::new(), targets: Vec::new(), rows: 0 };
    for at in starts {
        batch.inputs.extend(part[at..at + context].iter().map(|&b| u32::from(b)));
        batch.targets.extend(part[at + 1..=at + context].iter().map(|&b| u32::from(b)));
        batch.rows += 1;
    }
    batch
}

fn read_paths(paths: &[PathBuf]) -> Result<(Vec<u8>, String)> {
    let mut bytes = Vec::new();
    let mut count = 0;
    for path in paths {
        let directory = fs::metadata(path).map_err(cannot("read the data", path))?.is_dir();
        let files = if directory { files_below(path)? } else { vec![path.clone()] };
        if files.is_empty() {
            return Err(Error::new(format!(
                "data: no files (hidden ones do not count) in {}",
                path.display()
            )));
        }
        for file in &files {
            let text = fs::read(file).map_err(cannot("read the data", file))?;
            // One empty file among many is nothing to stop for; one that was named is.
            if text.is_empty() && !directory {
                return Err(Error::new(format!("data: {} is empty", file.display())));
            }
            bytes.extend(text);
        }
        count += files.len();
    }
    Ok((bytes, format!("{count} file{}", if count == 1 { "" } else { "s" })))
}

/// Regular files that are not hidden, depth first, each directory by name bytewise.
fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let visible =
        |e: &walkdir::DirEntry| e.depth() == 0 || !e.file_name().as_encoded_bytes().starts_with(b".");
    for entry in
        WalkDir::new(directory).follow_links(true).sort_by_file_name().into_iter().filter_entry(visible)
    {
        let entry = entry.map_err(cannot("read the data", directory))?;
        if entry.file_type().is_file() {
            files.push(entry.into_path());
        }
    }
    Ok(files)
}

/// The directories into which cargo unpacks packages, one per registry.
fn cargo_sources() -> Result<Vec<PathBuf>> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::home_dir().map(|h| h.join(".cargo"))).unwrap_or_default();
    let src = home.join("registry/src");
    let entries = fs::read_dir(&src).map_err(|e| not_here(&format!("{}: {e}", src.display())))?;
    let mut directories: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    directories.sort();
    Ok(directories)
}

fn not_here(cause: &str) -> Error {
    Error::new(format!(
        "the default data, Rust sources that cargo downloaded to build this program, are not on this machine ({cause}); \
         pass --data FILE_OR_DIR"
    ))
}

/// The .rs files of `CRATES` in the versions that Cargo.lock pins.
fn read_crates(sources: &[PathBuf]) -> Result<(Vec<u8>, String)> {
    let mut bytes = Vec::new();
    for (name, version) in pinned() {
        let package = format!("{name}-{version}");
        let directory = sources.iter().map(|s| s.join(&package)).find(|d| d.is_dir());
        let directory = directory.ok_or_else(|| not_here(&format!("no {package}")))?;
        for file in files_below(&directory)? {
            if file.extension().is_some_and(|e| e == "rs") {
                bytes.extend(fs::read(&file).map_err(cannot("read the data", &file))?);
            }
        }
    }
    Ok((bytes, format!("Rust sources of {} crates ({})", CRATES.len(), CRATES.join(", "))))
}

fn pinned() -> Vec<(&'static str, String)> {
    let lock: Table = include_str!("../../Cargo.lock").parse().expect("cargo writes TOML");
    let packages = lock["package"].as_array().expect("a list of packages");
    let version = |name| {
        let package = packages.iter().find(|p| p["name"].as_str() == Some(name)).expect("a locked crate");
        package["version"].as_str().expect("text").to_owned()
    };
    CRATES.iter().map(|name| (*name, version(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1,000 bytes that count up.
    fn corpus() -> Corpus {
        let bytes = (0..1000).map(|i| i as u8).collect();
        Corpus { bytes, split: 900, summary: String::new(), sha256: String::new() }
    }

    fn error(paths: &[&Path], context: usize) -> String {
        let paths: Vec<PathBuf> = paths.iter().map(|p| p.to_path_buf()).collect();
        Corpus::load(&paths, &[], context).err().unwrap().to_string()
    }

    #[test]
    fn a_directory_is_read_in_order_without_hidden_files() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/.git")).unwrap();
        for (name, text) in [("b", "3333"), ("a/y", "2222"), ("a/x", "111"), ("a/.git/z", "!!"), (".h", "!!")]
        {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let corpus = Corpus::load(&[dir.path().to_owned(), dir.path().join("b")], &[], 1).unwrap();
        assert_eq!(corpus.bytes, b"111222233333333");
        assert_eq!((corpus.train().len(), corpus.validation().len()), (13, 2));
        assert!(corpus.summary.starts_with("4 files, 15 bytes, sha256 "), "{}", corpus.summary);
        assert_eq!(corpus.sha256.len(), 64);
    }

    /// By hand: of the 900 training bytes, each that is in the validation part comes 3 times; 3 + 1 of 900 + 256.
    #[test]
    fn frequencies_of_bytes_have_a_loss() {
        assert!((corpus().frequency_loss() - 289f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn unusable_data_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (empty, short) = (dir.path().join("empty"), dir.path().join("short"));
        assert!(error(&[dir.path()], 4).contains("no files"));
        fs::write(&empty, "").unwrap();
        fs::write(&short, "0123456789").unwrap();
        assert!(error(&[&short, &empty], 4).ends_with("empty is empty"));
        assert!(error(&[Path::new("/no/such")], 4).starts_with("cannot read the data /no/such: "));
        let message = error(&[&short], 4);
        assert!(message.contains("last 10 %, to validate on, are 1 of 10 bytes"), "{message}");
        assert!(message.contains("context + 1 = 5"), "{message}");
    }

    #[test]
    fn validation_may_have_files_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            fs::write(dir.path().join(name), text).unwrap();
            vec![dir.path().join(name)]
        };
        let (train, val, both) = (file("a", "0123456789"), file("b", "abcd"), file("c", "0123456789abcd"));
        let corpus = Corpus::load(&train, &val, 3).unwrap();
        assert_eq!((corpus.train(), corpus.validation()), (&b"0123456789"[..], &b"abcd"[..]));
        assert!(corpus.summary.starts_with("1 file, validation on 1 file, 14 bytes"), "{}", corpus.summary);
        assert_ne!(corpus.sha256, Corpus::load(&both, &[], 1).unwrap().sha256);
        let message = Corpus::load(&train, &val, 4).err().unwrap().to_string();
        assert!(message.contains("files of --val-data, are 4 of 14 bytes"), "{message}");
        let message = Corpus::load(&train, &["/no/such".into()], 1).err().unwrap().to_string();
        assert!(message.starts_with("cannot read the data /no/such: "), "{message}");
    }

    #[test]
    fn the_default_without_sources_asks_for_data() {
        let dir = tempfile::tempdir().unwrap();
        let message = read_crates(&[dir.path().to_owned()]).unwrap_err().to_string();
        assert!(
            message.contains("no clap_builder-") && message.ends_with("pass --data FILE_OR_DIR"),
            "{message}"
        );
    }

    #[test]
    fn each_default_crate_is_pinned_once() {
        let lock = include_str!("../../Cargo.lock");
        for name in CRATES {
            assert_eq!(lock.matches(&format!("name = \"{name}\"\n")).count(), 1, "{name}");
        }
    }

    #[test]
    fn targets_are_the_inputs_shifted() {
        let batch = corpus().training_batch(3, 16, 1, 5, 0);
        assert_eq!((batch.rows, batch.inputs.len(), batch.targets.len()), (3, 48, 48));
        assert!(batch.inputs.iter().zip(&batch.targets).all(|(i, t)| (i + 1) % 256 == *t));
    }

    #[test]
    fn batches_depend_on_position_only() {
        let c = corpus();
        assert_eq!(c.training_batch(4, 8, 1, 5, 0), c.training_batch(4, 8, 1, 5, 0));
        assert_ne!(c.training_batch(4, 8, 1, 5, 0), c.training_batch(4, 8, 2, 5, 0));
        assert_ne!(c.training_batch(4, 8, 1, 5, 0), c.training_batch(4, 8, 1, 6, 0));
        let halves = [c.training_batch(2, 8, 1, 5, 0), c.training_batch(2, 8, 1, 5, 1)];
        assert_eq!(
            c.training_batch(4, 8, 1, 5, 0).inputs,
            [&halves[0].inputs[..], &halves[1].inputs].concat()
        );
    }

    #[test]
    fn training_positions_cover_the_training_part() {
        let bytes: Vec<u8> = (0..20).collect(); // 18 bytes to train on: 16 windows of 2 + 1
        let c = Corpus { bytes, split: 18, summary: String::new(), sha256: String::new() };
        let mut starts: Vec<u32> =
            c.training_batch(400, 2, 1, 0, 0).inputs.iter().step_by(2).copied().collect();
        starts.sort();
        starts.dedup();
        assert_eq!(starts, (0..16).collect::<Vec<_>>());
    }

    #[test]
    fn validation_covers_its_part_without_overlap() {
        let c = corpus(); // 100 bytes to validate on: 12 windows of 8 + 1
        let batches: Vec<Batch> = c.validation_batches(5, 8, 0).collect();
        assert_eq!(batches.iter().map(|b| b.rows).collect::<Vec<_>>(), [5, 5, 2]);
        let seen: Vec<u32> = batches.into_iter().flat_map(|b| b.targets).collect();
        assert_eq!(seen, c.validation()[1..97].iter().map(|&b| u32::from(b)).collect::<Vec<_>>());
        let some: Vec<Batch> = c.validation_batches(2, 8, 2).collect();
        assert_eq!(some.iter().map(|b| b.rows).collect::<Vec<_>>(), [2, 2]);
        let starts: Vec<u32> = some.iter().flat_map(|b| b.inputs.iter().step_by(8)).copied().collect();
        assert_eq!(starts, [0, 3, 6, 9].map(|i| u32::from(c.validation()[i * 8])));
    }
}
