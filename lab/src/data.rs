//! The corpus: the text of files as tokens, or files of tokens (shards.rs); the first 90 % are for training, the last 10 % for validation, unless validation has
//! files of its own.
//!
//! Batches are pure functions of their position (seed, step, micro-step), so a resumed run needs no saved state.
//! Not here: how text becomes tokens (tokens.rs). A window is `context` inputs and the same shifted by one as targets.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};
use toml::Table;
use walkdir::WalkDir;

use crate::error::{Error, Result, cannot};
use crate::pack::Pack;
use crate::shards::{Shard, is_shard};
use crate::tokens::{Tokenizer, hex};

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

/// Tokens to train and to validate on.
pub struct Corpus {
    tokens: Ids,
    /// Where the validation part begins.
    split: usize,
    /// Ids are below this.
    vocab: usize,
    /// Bytes of text per token of the validation part, where that is known.
    bytes_per_token: Option<f64>,
    /// What was read: files or crates, bytes, hash. One line.
    pub summary: String,
    /// SHA-256 of all bytes, and of the tokenizer if there is one, in hexadecimal.
    pub sha256: String,
}

/// Token ids, as narrow as the vocabulary allows.
enum Ids {
    One(Vec<u8>),
    Two(Vec<u16>),
    Four(Vec<u32>),
    /// Token files, each with the position of its first token.
    Shards(Vec<(usize, Shard)>),
}

impl Ids {
    fn new(vocab: usize) -> Self {
        match vocab {
            0..=0x100 => Self::One(Vec::new()),
            0x101..=0x1_0000 => Self::Two(Vec::new()),
            _ => Self::Four(Vec::new()),
        }
    }

    fn extend(&mut self, ids: Vec<u32>) {
        match self {
            Self::One(all) => all.extend(ids.into_iter().map(|id| id as u8)),
            Self::Two(all) => all.extend(ids.into_iter().map(|id| id as u16)),
            Self::Four(all) => all.extend(ids),
            Self::Shards(_) => unreachable!("files stay as they are"),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::One(all) => all.len(),
            Self::Two(all) => all.len(),
            Self::Four(all) => all.len(),
            Self::Shards(all) => all.last().map_or(0, |(start, shard)| start + shard.len()),
        }
    }

    fn get(&self, range: Range<usize>) -> Vec<u32> {
        match self {
            Self::One(all) => all[range].iter().map(|&id| u32::from(id)).collect(),
            Self::Two(all) => all[range].iter().map(|&id| u32::from(id)).collect(),
            Self::Four(all) => all[range].to_vec(),
            Self::Shards(all) => {
                let first = all.partition_point(|(start, _)| *start <= range.start) - 1;
                let parts = all[first..].iter().take_while(|(start, _)| *start < range.end);
                parts
                    .flat_map(|(start, shard)| {
                        let from = range.start.max(*start) - start;
                        shard.get(from..(range.end - start).min(shard.len()))
                    })
                    .collect()
            }
        }
    }
}

/// Tokens that are looked at together where all of them are.
const RUN: usize = 1 << 16;

/// Windows of tokens, row-major [rows, context] each.
#[derive(Debug, PartialEq)]
pub struct Batch {
    pub inputs: Vec<u32>,
    pub targets: Vec<u32>,
    pub rows: usize,
}

impl Corpus {
    /// Reads files and, below directories, all that is not hidden; no `paths`: the embedded default. All of `validation`, if
    /// there is any, is for validation, and then all of `paths` for training. Text is divided before it becomes tokens.
    ///
    /// # Errors
    /// A path that is missing or unreadable, an empty file, a directory without files, too few tokens for one window
    /// of `context` in either part, an embedded default that is not on this disk, or text that the tokenizer cannot read.
    pub fn load(
        paths: &[PathBuf],
        validation: &[PathBuf],
        context: usize,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let corpus = match token_files(paths)? {
            Some(files) => Self::of_shards(files, validation, tokenizer)?,
            None => Self::of_text(paths, validation, tokenizer)?,
        };
        for (part, range) in [("train", corpus.train()), ("validate", corpus.validation())] {
            if range.len() <= context {
                return Err(Error::new(format!(
                    "data: {} of {} tokens are there to {part} on, fewer than one window of context + 1 = {}; \
                     give more data with --data or --val-data, or a smaller --context",
                    range.len(),
                    corpus.tokens.len(),
                    context + 1
                )));
            }
        }
        Ok(corpus)
    }

    /// Of token files. Those named val-… are for validation, unless it has paths of its own; without either, the last 10 %.
    fn of_shards(mut files: Vec<PathBuf>, validation: &[PathBuf], tokenizer: &Tokenizer) -> Result<Self> {
        let is_val = |p: &PathBuf| {
            let name = p.file_stem().unwrap_or_default().to_string_lossy();
            name.split(['-', '_', '.']).any(|word| word == "val" || word == "validation")
        };
        let mut val_files: Vec<PathBuf> = files.extract_if(.., |p| is_val(p)).collect();
        if !validation.is_empty() {
            val_files = token_files(validation)?.ok_or_else(|| {
                Error::new(
                    "data: --data has token files (.bin), and --val-data text; give token files for both",
                )
            })?;
        }
        let mut hash = Sha256::new();
        let (mut at, mut largest) = (0usize, 0);
        let mut shards = Vec::new();
        let mut split = None;
        for (i, file) in files.iter().chain(&val_files).enumerate() {
            if i == files.len() {
                split = Some(at);
                hash.update(at.to_le_bytes());
            }
            let shard = Shard::open(file)?;
            hash.update(shard.bytes());
            largest = largest.max(shard.max_id());
            let tokens = shard.len();
            shards.push((at, shard));
            at += tokens;
        }
        let count = shards.len();
        let sha256 = hex(&hash.finalize());
        let pack = files.first().and_then(|file| Pack::beside(file).transpose()).transpose()?;
        if let (Some(pack), Some(own)) = (&pack, tokenizer.sha256())
            && pack.tokenizer_sha256.as_ref() != Some(&own)
        {
            return Err(Error::new(format!(
                "data: the tokens were made with another tokenizer than {}; give the one beside them, or none",
                tokenizer.name()
            )));
        }
        let named = pack.as_ref().map_or(0, |pack| pack.vocabulary);
        let vocab = (largest as usize + 1).max(named).max(tokenizer.vocab());
        let bytes_per_token = pack.filter(|pack| validation.is_empty() && pack.val.tokens > 0);
        let bytes_per_token = bytes_per_token.map(|pack| pack.val.bytes as f64 / pack.val.tokens as f64);
        let summary = format!("{count} token files, {at} tokens, sha256 {}", &sha256[..16]);
        let split = split.unwrap_or((at as u64 * 9 / 10) as usize);
        Ok(Corpus { tokens: Ids::Shards(shards), split, vocab, bytes_per_token, summary, sha256 })
    }

    /// Whether a model with so many token ids can read it.
    ///
    /// # Errors
    /// An id beyond.
    pub fn fits(self, vocab: usize) -> Result<Self> {
        if matches!(self.tokens, Ids::Shards(_)) && self.vocab > vocab {
            return Err(Error::new(format!(
                "data: token ids go up to {}, beyond the model's vocabulary of {vocab}; give --vocab {} or the --tokenizer \
                 that the tokens were made with",
                self.vocab - 1,
                self.vocab
            )));
        }
        Ok(self)
    }

    fn of_text(paths: &[PathBuf], validation: &[PathBuf], tokenizer: &Tokenizer) -> Result<Self> {
        let (mut bytes, mut what) =
            if paths.is_empty() { read_crates(&cargo_sources()?)? } else { read_paths(paths)? };
        let mut split = (bytes.len() as u64 * 9 / 10) as usize;
        let mut hash = Sha256::new();
        if !validation.is_empty() {
            let (own, files) = read_paths(validation)?;
            split = bytes.len();
            what += &format!(", validation on {files}");
            bytes.extend(own);
            hash.update(split.to_le_bytes()); // the same bytes cut elsewhere are another corpus
        }
        hash.update(&bytes);
        if let Some(tokenizer) = tokenizer.sha256() {
            hash.update(tokenizer);
        }
        let sha256 = hex(&hash.finalize());
        let all = bytes.len();
        let (tokens, bytes_per_token) = match tokenizer {
            Tokenizer::Bytes => (Ids::One(bytes), 1.0),
            Tokenizer::Json(_) => {
                if validation.is_empty() {
                    // no character is cut in two: a UTF-8 character has up to 3 bytes after its first, 0b10......
                    split += bytes[split..].iter().take(3).take_while(|&&b| b & 0xc0 == 0x80).count();
                }
                let mut tokens = Ids::new(tokenizer.vocab());
                tokens.extend(tokenizer.encode(&bytes[..split], "data to train on")?);
                let text = bytes.len() - split;
                let validation = tokenizer.encode(&bytes[split..], "data to validate on")?;
                let bytes_per_token = text as f64 / validation.len().max(1) as f64;
                split = tokens.len();
                tokens.extend(validation);
                (tokens, bytes_per_token)
            }
        };
        let mut summary = format!("{what}, {all} bytes, sha256 {}", &sha256[..16]);
        if tokenizer.json().is_some() {
            summary += &format!(", {} tokens, tokenizer {}", tokens.len(), tokenizer.name());
        }
        let (vocab, bytes_per_token) = (tokenizer.vocab(), Some(bytes_per_token));
        Ok(Corpus { tokens, split, vocab, bytes_per_token, summary, sha256 })
    }

    /// Where the tokens to train on are.
    fn train(&self) -> Range<usize> {
        0..self.split
    }

    /// Where the tokens to validate on are.
    fn validation(&self) -> Range<usize> {
        self.split..self.tokens.len()
    }

    /// A validation loss in nats per token as bits per byte of text, so that tokenizers compare.
    /// None: files of tokens do not say what text they are of.
    pub fn bits_per_byte(&self, loss: f64) -> Option<f64> {
        self.bytes_per_token.map(|bytes| loss / std::f64::consts::LN_2 / bytes)
    }

    /// The validation loss, in nats per token, of a model that knows how often each token comes and nothing else: the cross
    /// entropy under the training part's counts, each plus one.
    pub fn frequency_loss(&self) -> f64 {
        // a run at a time: a corpus may be larger than memory
        let runs = |part: Range<usize>| {
            let end = part.end;
            part.step_by(RUN).flat_map(move |at| self.tokens.get(at..end.min(at + RUN)))
        };
        let mut counts = vec![1.0f64; self.vocab];
        runs(self.train()).for_each(|id| counts[id as usize] += 1.0);
        let total: f64 = counts.iter().sum();
        let sum: f64 = runs(self.validation()).map(|id| (total / counts[id as usize]).ln()).sum();
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
        self.windows((0..batch).map(draw), context)
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
            self.windows(rows.map(|i| part.start + i * all / taken * context), context)
        })
    }

    fn windows(&self, starts: impl Iterator<Item = usize>, context: usize) -> Batch {
        let mut batch = Batch { inputs: Vec::new(), targets: Vec::new(), rows: 0 };
        for at in starts {
            let window = self.tokens.get(at..at + context + 1);
            batch.inputs.extend(&window[..context]);
            batch.targets.extend(&window[1..]);
            batch.rows += 1;
        }
        batch
    }
}

fn read_paths(paths: &[PathBuf]) -> Result<(Vec<u8>, String)> {
    let (files, what) = text_files(paths)?;
    Ok((files.into_iter().flat_map(|(_, text)| text).collect(), what))
}

/// The token files among `paths` and, below directories, in order; None: there are none, only text.
///
/// # Errors
/// Both; those of [`files_of`].
fn token_files(paths: &[PathBuf]) -> Result<Option<Vec<PathBuf>>> {
    let mut found = Vec::new();
    let mut other = None;
    for path in paths {
        for file in files_of(path)? {
            // what `data pack` puts beside its files
            let beside = file.file_name().is_some_and(|n| n == "pack.json" || n == "tokenizer.json");
            match is_shard(&file) {
                true => found.push(file),
                false if beside && file != *path => {}
                false => other = Some(file),
            }
        }
    }
    match other {
        _ if found.is_empty() => Ok(None),
        None => Ok(Some(found)),
        Some(text) => Err(Error::new(format!(
            "data: {} is a token file (.bin) and {} is not; give files of one kind",
            found[0].display(),
            text.display()
        ))),
    }
}

/// Files with their contents.
pub type Texts = Vec<(PathBuf, Vec<u8>)>;

/// Files and, below directories, all that is not hidden, with their contents; and how many they are, in words.
///
/// # Errors
/// A path that is missing or unreadable, an empty file, a directory without files.
pub fn text_files(paths: &[PathBuf]) -> Result<(Texts, String)> {
    let mut found = Vec::new();
    for path in paths {
        for file in files_of(path)? {
            let text = fs::read(&file).map_err(cannot("read the data", &file))?;
            // One empty file among many is nothing to stop for; one that was named is.
            if text.is_empty() && file == *path {
                return Err(Error::new(format!("data: {} is empty", file.display())));
            }
            found.push((file, text));
        }
    }
    let count = found.len();
    Ok((found, format!("{count} file{}", if count == 1 { "" } else { "s" })))
}

/// The files that a path names: itself or, of a directory, those below it.
///
/// # Errors
/// A path that is missing or unreadable, a directory without files.
pub fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    if !fs::metadata(path).map_err(cannot("read the data", path))?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    match files_below(path)? {
        files if files.is_empty() => {
            Err(Error::new(format!("data: no files (hidden ones do not count) in {}", path.display())))
        }
        files => Ok(files),
    }
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
    let lock: Table = include_str!(env!("RANKGRAD_LOCK")).parse().expect("cargo writes TOML");
    let packages = lock["package"].as_array().expect("a list of packages");
    let version = |name| {
        // the lock file has them in order of versions, and this project's own is the newest
        let package = packages.iter().rfind(|p| p["name"].as_str() == Some(name)).expect("a locked crate");
        package["version"].as_str().expect("text").to_owned()
    };
    CRATES.iter().map(|name| (*name, version(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1,000 bytes that count up.
    fn corpus() -> Corpus {
        of_bytes((0..1000).map(|i| i as u8).collect(), 900)
    }

    fn of_bytes(bytes: Vec<u8>, split: usize) -> Corpus {
        let (tokens, empty) = (Ids::One(bytes), String::new());
        Corpus {
            tokens,
            split,
            vocab: 256,
            bytes_per_token: Some(1.0),
            summary: empty.clone(),
            sha256: empty,
        }
    }

    fn load(paths: &[PathBuf], validation: &[PathBuf], context: usize) -> Result<Corpus> {
        Corpus::load(paths, validation, context, &Tokenizer::Bytes)
    }

    fn ids(bytes: &[u8]) -> Vec<u32> {
        bytes.iter().map(|&b| u32::from(b)).collect()
    }

    fn error(paths: &[&Path], context: usize) -> String {
        let paths: Vec<PathBuf> = paths.iter().map(|p| p.to_path_buf()).collect();
        load(&paths, &[], context).err().unwrap().to_string()
    }

    #[test]
    fn a_directory_is_read_in_order_without_hidden_files() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/.git")).unwrap();
        for (name, text) in [("b", "3333"), ("a/y", "2222"), ("a/x", "111"), ("a/.git/z", "!!"), (".h", "!!")]
        {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let corpus = load(&[dir.path().to_owned(), dir.path().join("b")], &[], 1).unwrap();
        assert_eq!(corpus.tokens.get(0..15), ids(b"111222233333333"));
        assert_eq!((corpus.train().len(), corpus.validation().len()), (13, 2));
        assert!(corpus.summary.starts_with("4 files, 15 bytes, sha256 "), "{}", corpus.summary);
        assert_eq!(corpus.sha256.len(), 64);
    }

    /// Windows over the seam of two files; files of validation by their name, or the last tenth.
    #[test]
    fn token_files_are_one_run_of_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, ids: Range<u16>| {
            fs::write(dir.path().join(name), ids.flat_map(u16::to_le_bytes).collect::<Vec<u8>>()).unwrap();
        };
        write("train-000000.bin", 1000..1030);
        write("train-000001.bin", 1030..1050);
        let paths = [dir.path().to_owned()];
        let corpus = load(&paths, &[], 3).unwrap();
        assert_eq!((corpus.train(), corpus.validation()), (0..45, 45..50));
        assert_eq!(corpus.tokens.get(28..33), [1028, 1029, 1030, 1031, 1032]);
        assert_eq!(corpus.tokens.get(30..50), (1030..1050).collect::<Vec<u32>>());
        assert_eq!(corpus.tokens.get(0..30), (1000..1030).collect::<Vec<u32>>());
        assert_eq!(corpus.bits_per_byte(1.0), None);
        let error = corpus.fits(256).err().unwrap().to_string();
        assert!(error.contains("up to 1049") && error.contains("--vocab 1050"), "{error}");
        write("val-000000.bin", 5..25);
        let corpus = load(&paths, &[], 3).unwrap().fits(1050).unwrap();
        assert_eq!((corpus.train(), corpus.validation()), (0..50, 50..70));
        assert_eq!(corpus.tokens.get(48..52), [1048, 1049, 5, 6]);
        fs::write(dir.path().join("note"), "text").unwrap();
        assert!(error_of(&paths).contains("give files of one kind"));
    }

    fn error_of(paths: &[PathBuf]) -> String {
        load(paths, &[], 3).err().unwrap().to_string()
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
        assert!(message.contains("1 of 10 tokens are there to validate on"), "{message}");
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
        let corpus = load(&train, &val, 3).unwrap();
        assert_eq!((corpus.train(), corpus.validation()), (0..10, 10..14));
        assert_eq!(corpus.tokens.get(8..12), ids(b"89ab"));
        assert!(corpus.summary.starts_with("1 file, validation on 1 file, 14 bytes"), "{}", corpus.summary);
        assert_ne!(corpus.sha256, load(&both, &[], 1).unwrap().sha256);
        let message = load(&train, &val, 4).err().unwrap().to_string();
        assert!(message.contains("4 of 14 tokens are there to validate on"), "{message}");
        let message = load(&train, &["/no/such".into()], 1).err().unwrap().to_string();
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

    /// The versions that this program itself is built from; others may be there for the sake of its dependencies.
    #[test]
    fn each_default_crate_is_pinned_once() {
        let lock = include_str!(env!("RANKGRAD_LOCK"));
        for (name, version) in pinned() {
            assert!(
                lock.contains(&format!("name = \"{name}\"\nversion = \"{version}\"\n")),
                "{name} {version}"
            );
        }
        let rand = pinned().into_iter().find(|(name, _)| *name == "rand").unwrap().1;
        assert!(rand.starts_with("0.10."), "{rand}"); // rand 0.9 is there too
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
        let c = of_bytes(bytes, 18);
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
        assert_eq!(seen, c.tokens.get(901..997));
        let some: Vec<Batch> = c.validation_batches(2, 8, 2).collect();
        assert_eq!(some.iter().map(|b| b.rows).collect::<Vec<_>>(), [2, 2]);
        let starts: Vec<u32> = some.iter().flat_map(|b| b.inputs.iter().step_by(8)).copied().collect();
        assert_eq!(starts, [0, 3, 6, 9].map(|i| c.tokens.get(900 + i * 8..901 + i * 8)[0]));
    }
}
