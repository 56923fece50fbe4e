//! `data pack`: text into shuffled token files, for training on more than fits in memory.
//!
//! Two passes. Dealing: documents are read in order and encoded in parallel; each draws a key of 64 random bits, whose leading
//! part chooses one of the bucket files that it is appended to. Writing: bucket by bucket, documents are sorted by key and
//! go, one after the other, to the validation files until those have their part and then to the training files. So the
//! order is that of the keys, a uniform shuffle, whatever the number of buckets, and memory has to hold one bucket, or one batch
//! of whole documents.
//! Each document is preceded by the end token, as in llm.c's and modded-nanogpt's data (nanoGPT's have it behind).
//!
//! Everything happens in DIR.packing, which becomes DIR in the end. An interrupted dealing goes on where it was last saved,
//! an interrupted writing, which only copies, begins anew; the outcome is the same to the byte.
//! A bucket is a sequence of records: key, tokens, bytes of text (u64 each), then the tokens as shards.rs lays them out.
//! Not here: what a token is (`Encoder`), and the files' format (shards.rs).

use std::borrow::Cow;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::cli::PackArgs;
use crate::data::files_of;
use crate::error::{Error, Result, cannot};
use crate::export::must_be_new;
use crate::files::{claim, write_atomically, write_json};
use crate::progress::{Progress, catch_interrupts, interrupted};
use crate::shards::{Format, Writer, ids, put};
use crate::tokens::{END, Tokenizer};

/// Bytes of text that are encoded at a time: a second or two of a slow tokenizer on one core, to be patient with Ctrl-C.
const BATCH: usize = 8 << 20;
/// Bytes of text per bucket, as long as there are no more than `MOST_BUCKETS`.
const BUCKET: u64 = 64 << 20;
/// Files that are open at a time; some systems allow no more than 256.
const MOST_BUCKETS: u64 = 200;
/// Time between savings while dealing.
const SAVE: Duration = Duration::from_secs(30);
/// Bytes in front of a record's tokens.
const RECORD: usize = 3 * 8;

/// What makes tokens of text.
pub struct Encoder<'a> {
    /// Ids below `vocab`. An error names what was wrong with the text, not where it stood.
    pub encode: &'a (dyn Fn(&str) -> Result<Vec<u32>> + Sync),
    /// Number of ids.
    pub vocab: usize,
    /// Precedes each document.
    pub end: u32,
    /// SHA-256 of the tokenizer's text; None: bytes are tokens.
    pub sha256: Option<String>,
    /// That text, which is kept beside the tokens as tokenizer.json.
    pub json: Option<&'a str>,
}

/// What is asked for.
struct Job<'a> {
    sources: Vec<Source>,
    field: String,
    seed: u64,
    encoder: Encoder<'a>,
    format: Format,
    shard_tokens: u64,
    val_fraction: f64,
    out: PathBuf,
    quiet: bool,
    /// `BATCH` and `BUCKET`, but for tests.
    batch: usize,
    bucket: u64,
    /// Asked before each batch and each bucket.
    stop: &'a (dyn Fn() -> bool + Sync),
}

/// A file of documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Source {
    path: PathBuf,
    /// Its length: a file that changes while it is read, or while a pack of it is interrupted, is noticed.
    bytes: u64,
}

/// What a file's name says it is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// One document.
    Text,
    /// One document a line.
    JsonLines,
    /// One document a row.
    Parquet,
}

impl Source {
    fn kind(&self) -> Kind {
        match self.path.extension() {
            Some(e) if e == "jsonl" => Kind::JsonLines,
            Some(e) if e == "parquet" => Kind::Parquet,
            _ => Kind::Text,
        }
    }
}

/// pack.json: what is in a directory of token files.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Pack {
    pub format: Format,
    pub vocabulary: usize,
    pub end_token: u32,
    /// SHA-256 of the tokenizer's file; null: bytes are tokens.
    pub tokenizer_sha256: Option<String>,
    pub seed: u64,
    /// Documents without text, left out.
    pub empty_documents: u64,
    pub train: Part,
    pub val: Part,
}

impl Pack {
    /// The pack.json in the directory of a token file, if there is one.
    ///
    /// # Errors
    /// One that cannot be read.
    pub fn beside(file: &Path) -> Result<Option<Self>> {
        let path = file.with_file_name("pack.json");
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read(&path).map_err(cannot("read", &path))?;
        serde_json::from_slice(&text).map(Some).map_err(cannot("read", &path))
    }
}

/// The files of one kind, NAME-000000.bin and on.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Part {
    pub documents: u64,
    /// End tokens included.
    pub tokens: u64,
    /// Of text, before it was encoded: for bits per byte.
    pub bytes: u64,
    pub shards: u64,
}

/// What the buckets depend on: whoever goes on must ask for the same.
#[derive(Serialize, Deserialize)]
struct Origin {
    sources: Vec<Source>,
    field: String,
    seed: u64,
    tokenizer_sha256: Option<String>,
    vocabulary: usize,
    end_token: u32,
}

/// How far the dealing came.
#[derive(Serialize, Deserialize)]
struct State {
    origin: Origin,
    at: Position,
    documents: u64,
    empty: u64,
    tokens: u64,
    /// Bytes in each bucket.
    buckets: Vec<u64>,
}

/// The first document that is not dealt.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Position {
    source: usize,
    /// Bytes into JSON lines, rows into Parquet, else 0.
    offset: u64,
    /// Lines before.
    line: u64,
}

/// Runs `data pack`.
///
/// # Errors
/// Sources that are missing, unreadable or no documents; an --out that exists; values that do not fit; a full disk.
pub fn pack(args: &PackArgs) -> Result<()> {
    if !(0.0..1.0).contains(&args.val_fraction) {
        return Err(Error::new(format!(
            "--val-fraction is {}: it must be at least 0 and less than 1",
            args.val_fraction
        )));
    }
    if args.shard_tokens > args.format.capacity() {
        return Err(Error::new(format!(
            "--shard-tokens is {}: a file of this format holds {} at most",
            args.shard_tokens,
            args.format.capacity()
        )));
    }
    let tokenizer = Tokenizer::open(args.tokenizer.as_deref())?;
    let encode = |text: &str| tokenizer.encode(text.as_bytes(), "its text");
    let encoder = match (&tokenizer, tokenizer.end()) {
        (Tokenizer::Bytes, _) => bytes_as_tokens(),
        (Tokenizer::Json(_), Some(end)) => Encoder {
            encode: &encode,
            vocab: tokenizer.vocab(),
            end,
            sha256: tokenizer.sha256(),
            json: tokenizer.json(),
        },
        (Tokenizer::Json(_), None) => {
            return Err(Error::new(format!(
                "tokenizer {} has no token that ends a text, such as {END}; documents could not be told apart",
                tokenizer.name()
            )));
        }
    };
    let job = Job {
        sources: sources(&args.data, &args.out)?,
        field: args.field.clone(),
        seed: args.seed,
        encoder,
        format: args.format,
        shard_tokens: args.shard_tokens,
        val_fraction: args.val_fraction,
        out: args.out.clone(),
        quiet: args.quiet,
        batch: BATCH,
        bucket: BUCKET,
        stop: &interrupted,
    };
    catch_interrupts()?;
    let Some(pack) = crate::pool(args.threads)?.install(|| run(&job))? else {
        eprintln!(
            "interrupted. Continue with the same command; to give up, remove {}",
            unfinished(&job.out).display()
        );
        return Ok(());
    };
    for (name, part) in [("train", &pack.train), ("val", &pack.val)] {
        crate::say!(
            "{}: {} tokens of {} documents, {} bytes of text, in {} file{}",
            args.out.join(name).display(),
            part.tokens,
            part.documents,
            part.bytes,
            part.shards,
            if part.shards == 1 { "" } else { "s" }
        );
    }
    Ok(())
}

/// Ids 0 to 255 are the bytes of UTF-8, 256 is the end token.
fn bytes_as_tokens() -> Encoder<'static> {
    let encode = &|text: &str| Ok(text.bytes().map(u32::from).collect());
    Encoder { encode, vocab: 257, end: 256, sha256: None, json: None }
}

/// The files of `paths` in order, and, of a directory, all that are not hidden, depth first, by name.
fn sources(paths: &[PathBuf], out: &Path) -> Result<Vec<Source>> {
    let absolute = |path: &Path| std::path::absolute(path).map_err(cannot("find", path));
    let mut sources = vec![];
    for path in paths {
        let path = absolute(path)?;
        if path.is_dir() && absolute(out)?.starts_with(&path) {
            return Err(Error::new(format!(
                "--out {} is inside {}, and would be read as data; choose another place",
                out.display(),
                path.display()
            )));
        }
        for file in files_of(&path)? {
            let bytes = fs::metadata(&file).map_err(cannot("read the data", &file))?.len();
            let source = Source { path: file, bytes };
            if source.kind() == Kind::Parquet && !cfg!(feature = "parquet") {
                return Err(Error::new(format!(
                    "data: {} is a Parquet file, which this build cannot read; build rankgrad with --features parquet",
                    source.path.display()
                )));
            }
            sources.push(source);
        }
    }
    Ok(sources)
}

/// Where everything is until it is whole.
fn unfinished(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".packing");
    name.into()
}

/// None: stopped.
fn run(job: &Job) -> Result<Option<Pack>> {
    must_be_new(&job.out)?;
    if job.val_fraction > 0.0 && job.sources.len() == 1 && job.sources[0].kind() == Kind::Text {
        return Err(one_document());
    }
    let width = job.format.width(job.encoder.vocab)?;
    let work = unfinished(&job.out);
    fs::create_dir_all(&work).map_err(cannot("make the directory", &work))?;
    let claim = claim(&work, "another rankgrad is packing; wait for it, or choose another --out")?;
    let outcome = both_passes(job, &work, width);
    drop(claim);
    // What no saved state speaks of is of no use; and a finished pack is elsewhere now.
    if matches!(outcome, Ok(Some(_))) || !work.join("state.json").exists() {
        let _ = fs::remove_dir_all(&work);
    }
    outcome
}

fn both_passes(job: &Job, work: &Path, width: usize) -> Result<Option<Pack>> {
    let mut state = begin(job, work)?;
    if !deal(job, work, width, &mut state)? {
        return Ok(None);
    }
    match state.documents {
        0 => {
            let _ = fs::remove_file(work.join("state.json")); // nothing to go on with
            let files = state.origin.sources.len();
            return Err(Error::new(format!("data: no document with text in {files} file(s)")));
        }
        1 if job.val_fraction > 0.0 => return Err(one_document()),
        _ => {}
    }
    let whole = work.join("whole");
    let Some(pack) = write(job, work, &whole, width, &state)? else { return Ok(None) };
    write_json(&whole.join("pack.json"), &pack)?;
    if let Some(tokenizer) = job.encoder.json {
        write_atomically(&whole.join("tokenizer.json"), tokenizer.as_bytes())?;
    }
    fs::rename(&whole, &job.out).map_err(cannot("make the directory", &job.out))?;
    Ok(Some(pack))
}

fn one_document() -> Error {
    Error::new(
        "data: there is only one document, which is not divided; pass --val-fraction 0, and files of its own to validate on",
    )
}

/// The saved state, if there is one and it is of this job.
fn begin(job: &Job, work: &Path) -> Result<State> {
    let path = work.join("state.json");
    if !path.exists() {
        let bytes: u64 = job.sources.iter().map(|s| s.bytes).sum();
        let origin = Origin {
            sources: job.sources.clone(),
            field: job.field.clone(),
            seed: job.seed,
            tokenizer_sha256: job.encoder.sha256.clone(),
            vocabulary: job.encoder.vocab,
            end_token: job.encoder.end,
        };
        let buckets = vec![0; bytes.div_ceil(job.bucket).clamp(1, MOST_BUCKETS) as usize];
        return Ok(State { origin, at: Position::default(), documents: 0, empty: 0, tokens: 0, buckets });
    }
    let text = fs::read(&path).map_err(cannot("read", &path))?;
    let state: State = serde_json::from_slice(&text).map_err(cannot("read", &path))?;
    let there = &state.origin;
    let differs = if there.sources.len() != job.sources.len() {
        Some("other files".into())
    } else if let Some((was, is)) = there.sources.iter().zip(&job.sources).find(|(was, is)| was != is) {
        let path = was.path.display();
        Some(if was.path == is.path { format!("{path} before it changed") } else { format!("{path}") })
    } else if there.field != job.field {
        Some(format!("--field {}", there.field))
    } else if there.seed != job.seed {
        Some(format!("--seed {}", there.seed))
    } else if (&there.tokenizer_sha256, there.vocabulary, there.end_token)
        != (&job.encoder.sha256, job.encoder.vocab, job.encoder.end)
    {
        Some("another tokenizer".into())
    } else {
        None
    };
    match differs {
        Some(what) => Err(Error::new(format!(
            "{} holds an unfinished pack with {what}; ask for the same again, or remove that directory to begin anew",
            work.display()
        ))),
        None => Ok(state),
    }
}

fn bucket_path(work: &Path, bucket: usize) -> PathBuf {
    work.join(format!("bucket-{bucket:03}"))
}

/// The first pass. False: stopped, and saved.
fn deal(job: &Job, work: &Path, width: usize, state: &mut State) -> Result<bool> {
    let mut buckets = vec![];
    for (i, &length) in state.buckets.iter().enumerate() {
        let path = bucket_path(work, i);
        let mut options = OpenOptions::new();
        let mut file =
            options.create(true).truncate(false).write(true).open(&path).map_err(cannot("write", &path))?;
        let is = file.metadata().map_err(cannot("read", &path))?.len();
        if is < length {
            return Err(damaged(&path));
        }
        // What was written after the state was saved comes again.
        let placed = file.set_len(length).and_then(|()| file.seek(SeekFrom::End(0)));
        placed.map_err(cannot("write", &path))?;
        buckets.push(BufWriter::with_capacity(1 << 16, file));
    }
    let mut keys = ChaCha8Rng::seed_from_u64(job.seed);
    keys.set_word_pos(2 * u128::from(state.documents)); // two words a key
    let mut reader = Reader::new(&job.sources, &job.field, state.at);
    let mut meter = Meter::new(job, "reading", job.sources.iter().map(|s| s.bytes).sum(), reader.done());
    let mut saved = Instant::now();
    loop {
        let stop = (job.stop)();
        let batch = if stop { vec![] } else { reader.batch(job.batch)? };
        if batch.is_empty() || saved.elapsed() >= SAVE {
            for (i, bucket) in buckets.iter_mut().enumerate() {
                let synced = bucket.flush().and_then(|()| bucket.get_ref().sync_data());
                synced.map_err(cannot("write", &bucket_path(work, i)))?;
            }
            let json = serde_json::to_vec(&state).expect("plain values");
            write_atomically(&work.join("state.json"), &json)?;
            saved = Instant::now();
        }
        if batch.is_empty() {
            meter.finish();
            return Ok(!stop);
        }
        let records: Vec<_> = batch.par_iter().map(|raw| record(job, raw, width)).collect();
        for record in records {
            let Some(mut record) = record? else {
                state.empty += 1;
                continue;
            };
            let key = keys.next_u64();
            record[..8].copy_from_slice(&key.to_le_bytes());
            // The key's leading part, times the number of buckets: in the order of the keys.
            let i = ((u128::from(key) * buckets.len() as u128) >> 64) as usize;
            buckets[i].write_all(&record).map_err(cannot("write", &bucket_path(work, i)))?;
            state.buckets[i] += record.len() as u64;
            state.documents += 1;
            state.tokens += ((record.len() - RECORD) / width) as u64;
        }
        state.at = reader.at;
        meter.show(reader.done(), format!("{} documents, {} tokens", state.documents, state.tokens));
    }
}

fn damaged(bucket: &Path) -> Error {
    Error::new(format!(
        "{} is not as it was saved; remove the directory that it is in to begin anew",
        bucket.display()
    ))
}

/// A document's record, with 0 for its key. None: it has no text.
fn record(job: &Job, raw: &Raw, width: usize) -> Result<Option<Vec<u8>>> {
    let path = job.sources[raw.source].path.display();
    let place = match raw.line {
        Some(line) => format!("{path}, line {line}"),
        None => path.to_string(),
    };
    let text = match raw.line {
        Some(_) => Cow::Owned(field_of(&raw.bytes, &job.field, &place)?),
        None => Cow::Borrowed(std::str::from_utf8(&raw.bytes).map_err(|e| {
            Error::new(format!(
                "data: {place} is not UTF-8 at byte {}; read are text, JSON lines (.jsonl) and Parquet (.parquet), unpacked",
                e.valid_up_to()
            ))
        })?),
    };
    if text.is_empty() {
        return Ok(None);
    }
    let encoder = &job.encoder;
    let tokens = (encoder.encode)(&text).map_err(|e| Error::new(format!("data: {place}: {e}")))?;
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= encoder.vocab) {
        return Err(Error::new(format!(
            "data: {place}: the tokenizer gives token {id}, and its vocabulary has only {}; use another one",
            encoder.vocab
        )));
    }
    let mut record = Vec::with_capacity(RECORD + (tokens.len() + 1) * width);
    for field in [0, tokens.len() as u64 + 1, text.len() as u64] {
        record.extend(field.to_le_bytes());
    }
    put(encoder.end, width, &mut record);
    tokens.iter().for_each(|&id| put(id, width, &mut record));
    Ok(Some(record))
}

/// The text in a line of JSON.
fn field_of(line: &[u8], field: &str, place: &str) -> Result<String> {
    let mut object: Map<String, Value> = serde_json::from_slice(line).map_err(|e| {
        let cause = e.to_string(); // ends with a position, whose line is always 1
        let cause = cause.split(" at line ").next().expect("at least one part");
        Error::new(format!("data: {place}, column {}: not a JSON object: {cause}", e.column().max(1)))
    })?;
    let what = match object.remove(field) {
        Some(Value::String(text)) => return Ok(text),
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "true or false",
        Some(Value::Number(_)) => "a number",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
        None => {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            return Err(Error::new(format!(
                "data: {place}: no field `{field}`; there are: {}; name the one with the text by --field",
                names.join(", ")
            )));
        }
    };
    Err(Error::new(format!(
        "data: {place}: the field `{field}` is {what}, not text; name the one with the text by --field"
    )))
}

/// The second pass. None: stopped.
fn write(job: &Job, work: &Path, whole: &Path, width: usize, state: &State) -> Result<Option<Pack>> {
    if whole.exists() {
        fs::remove_dir_all(whole).map_err(cannot("remove", whole))?;
    }
    fs::create_dir(whole).map_err(cannot("make the directory", whole))?;
    let [mut train, mut val] = ["train", "val"].map(|name| Split::new(job, whole, width, name));
    let goal = job.val_fraction * state.tokens as f64;
    let mut meter = Meter::new(job, "writing", state.buckets.iter().sum(), 0);
    let mut done = 0;
    for (i, &length) in state.buckets.iter().enumerate() {
        if (job.stop)() {
            meter.finish();
            return Ok(None);
        }
        let path = bucket_path(work, i);
        let bytes = fs::read(&path).map_err(cannot("read", &path))?;
        if bytes.len() as u64 != length {
            return Err(damaged(&path));
        }
        let mut records = records(&bytes, width).ok_or_else(|| damaged(&path))?;
        records.sort_by_key(|record| record.key); // stable: equal keys stay in the order of the sources
        for record in records {
            // Training gets the last document at the latest.
            let last = train.part.documents + val.part.documents + 1 == state.documents;
            let to_val = (val.part.tokens as f64) < goal && !(last && train.part.documents == 0);
            let split = if to_val { &mut val } else { &mut train };
            split.add(&bytes[record.tokens], record.text)?;
        }
        done += length;
        meter.show(done, format!("{} tokens", train.part.tokens + val.part.tokens));
    }
    meter.finish();
    Ok(Some(Pack {
        format: job.format,
        vocabulary: job.encoder.vocab,
        end_token: job.encoder.end,
        tokenizer_sha256: job.encoder.sha256.clone(),
        seed: job.seed,
        empty_documents: state.empty,
        train: train.finish()?,
        val: val.finish()?,
    }))
}

/// A record of a bucket.
struct Record {
    key: u64,
    /// Its tokens' bytes.
    tokens: Range<usize>,
    /// Bytes of text.
    text: u64,
}

/// The records of a bucket. None: they do not fill it.
fn records(bytes: &[u8], width: usize) -> Option<Vec<Record>> {
    let mut records = vec![];
    let mut at = 0;
    while at < bytes.len() {
        let field = |i: usize| {
            let bytes = bytes.get(at + 8 * i..at + 8 * (i + 1))?;
            Some(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
        };
        let (key, tokens, text) = (field(0)?, usize::try_from(field(1)?).ok()?, field(2)?);
        let start = at + RECORD;
        at = start.checked_add(tokens.checked_mul(width)?).filter(|&end| end <= bytes.len())?;
        records.push(Record { key, tokens: start..at, text });
    }
    Some(records)
}

/// The token files of one name, filled one after the other; a document may go on in the next.
struct Split<'a> {
    job: &'a Job<'a>,
    directory: &'a Path,
    width: usize,
    name: &'a str,
    writer: Option<Writer>,
    part: Part,
}

impl<'a> Split<'a> {
    fn new(job: &'a Job, directory: &'a Path, width: usize, name: &'a str) -> Self {
        Split { job, directory, width, name, writer: None, part: Part::default() }
    }

    fn add(&mut self, tokens: &[u8], text: u64) -> Result<()> {
        let mut tokens = ids(tokens, self.width);
        self.part.documents += 1;
        self.part.tokens += tokens.len() as u64;
        self.part.bytes += text;
        while tokens.len() > 0 {
            let mut writer = match self.writer.take() {
                Some(writer) => writer,
                None => {
                    let path = self.directory.join(format!("{}-{:06}.bin", self.name, self.part.shards));
                    self.part.shards += 1;
                    Writer::create(&path, self.job.format, self.job.encoder.vocab)?
                }
            };
            let room = self.job.shard_tokens - writer.len();
            let taken = tokens.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            writer.write(tokens.by_ref().take(taken))?;
            if writer.len() == self.job.shard_tokens {
                writer.finish()?;
            } else {
                self.writer = Some(writer);
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Part> {
        if let Some(writer) = self.writer {
            writer.finish()?;
        }
        Ok(self.part)
    }
}

/// A document as it was read.
struct Raw {
    source: usize,
    /// Of JSON lines; None: the bytes are the text.
    line: Option<u64>,
    bytes: Vec<u8>,
}

/// Documents in order, from a position on.
struct Reader<'a> {
    sources: &'a [Source],
    #[cfg_attr(
        not(feature = "parquet"),
        expect(dead_code, reason = "JSON lines are taken apart in parallel")
    )]
    field: &'a str,
    at: Position,
    /// Bytes of the sources before this one.
    before: u64,
    lines: Option<BufReader<File>>,
    #[cfg(feature = "parquet")]
    rows: Option<parquet_rows::Rows>,
}

impl<'a> Reader<'a> {
    fn new(sources: &'a [Source], field: &'a str, at: Position) -> Self {
        let before = sources[..at.source].iter().map(|s| s.bytes).sum();
        Reader {
            sources,
            field,
            at,
            before,
            lines: None,
            #[cfg(feature = "parquet")]
            rows: None,
        }
    }

    /// Bytes of all sources that are read, for the progress.
    fn done(&self) -> u64 {
        #[cfg(feature = "parquet")]
        if let Some(rows) = &self.rows {
            let bytes = u128::from(self.sources[self.at.source].bytes);
            return self.before + (bytes * u128::from(self.at.offset) / u128::from(rows.count.max(1))) as u64;
        }
        match self.sources.get(self.at.source).map(Source::kind) {
            Some(Kind::JsonLines) => self.before + self.at.offset,
            _ => self.before,
        }
    }

    /// Documents of `bytes` bytes, or of a little more; none at the end.
    fn batch(&mut self, bytes: usize) -> Result<Vec<Raw>> {
        let (mut batch, mut size) = (vec![], 0);
        while size < bytes {
            let Some(raw) = self.next()? else { break };
            size += raw.bytes.len() + 1; // a document without text is one too
            batch.push(raw);
        }
        Ok(batch)
    }

    fn next(&mut self) -> Result<Option<Raw>> {
        while let Some(source) = self.sources.get(self.at.source) {
            let raw = match source.kind() {
                Kind::Text => self.whole(source)?,
                Kind::JsonLines => self.line(source)?,
                #[cfg(feature = "parquet")]
                Kind::Parquet => self.row(source)?,
                #[cfg(not(feature = "parquet"))]
                Kind::Parquet => unreachable!("refused among the sources"),
            };
            if raw.is_some() {
                return Ok(raw);
            }
        }
        Ok(None)
    }

    /// To the beginning of the next source.
    fn advance(&mut self) {
        self.before += self.sources[self.at.source].bytes;
        self.at = Position { source: self.at.source + 1, ..Position::default() };
    }

    fn whole(&mut self, source: &Source) -> Result<Option<Raw>> {
        let bytes = fs::read(&source.path).map_err(cannot("read the data", &source.path))?;
        unchanged(source, bytes.len() as u64)?;
        let raw = Raw { source: self.at.source, line: None, bytes };
        self.advance();
        Ok(Some(raw))
    }

    /// The next line that is not blank. None: there is none.
    fn line(&mut self, source: &Source) -> Result<Option<Raw>> {
        let cannot_read = || cannot("read the data", &source.path);
        let mut lines = match self.lines.take() {
            Some(lines) => lines,
            None => {
                let mut file = File::open(&source.path).map_err(cannot_read())?;
                file.seek(SeekFrom::Start(self.at.offset)).map_err(cannot_read())?;
                BufReader::with_capacity(1 << 20, file)
            }
        };
        loop {
            let mut bytes = vec![];
            let read = lines.read_until(b'\n', &mut bytes).map_err(cannot_read())?;
            if read == 0 {
                unchanged(source, self.at.offset)?;
                self.advance();
                return Ok(None);
            }
            self.at.offset += read as u64;
            self.at.line += 1;
            if !bytes.trim_ascii().is_empty() {
                self.lines = Some(lines);
                return Ok(Some(Raw { source: self.at.source, line: Some(self.at.line), bytes }));
            }
        }
    }

    #[cfg(feature = "parquet")]
    fn row(&mut self, source: &Source) -> Result<Option<Raw>> {
        let mut rows = match self.rows.take() {
            Some(rows) => rows,
            None => parquet_rows::Rows::open(&source.path, self.field, self.at.offset)?,
        };
        let Some(text) = rows.next(&source.path, self.at.offset)? else {
            self.advance();
            return Ok(None);
        };
        self.at.offset += 1;
        self.rows = Some(rows);
        Ok(Some(Raw { source: self.at.source, line: None, bytes: text.into_bytes() }))
    }
}

fn unchanged(source: &Source, read: u64) -> Result<()> {
    if read == source.bytes {
        return Ok(());
    }
    Err(Error::new(format!(
        "data: {} had {} bytes and now has {read}; let nothing change it, and begin anew",
        source.path.display(),
        source.bytes
    )))
}

/// Progress in megabytes.
struct Meter {
    progress: Progress,
    what: &'static str,
    since: Instant,
    from: u64,
}

impl Meter {
    fn new(job: &Job, what: &'static str, total: u64, done: u64) -> Self {
        let progress = Progress::new(total.div_ceil(1_000_000), done / 1_000_000, job.quiet);
        Meter { progress, what, since: Instant::now(), from: done }
    }

    fn show(&mut self, done: u64, message: String) {
        let rate = (done - self.from) as f64 / 1e6 / self.since.elapsed().as_secs_f64();
        let message = format!("MB, {message}, {rate:.1} MB/s");
        self.progress.show(self.what, done / 1_000_000, message);
    }

    fn finish(&self) {
        self.progress.finish();
    }
}

/// One column of text of a Parquet file, row by row.
#[cfg(feature = "parquet")]
mod parquet_rows {
    use std::fs::File;
    use std::path::Path;
    use std::sync::Arc;

    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::reader::RowIter;
    use parquet::record::{Field, Row};
    use parquet::schema::types::Type;

    use crate::error::{Error, Result, cannot};

    pub struct Rows {
        rows: RowIter<'static>,
        pub count: u64,
        field: String,
    }

    impl Rows {
        /// From row `from` on. Rows before it are read and dropped.
        pub fn open(path: &Path, field: &str, from: u64) -> Result<Self> {
            let cannot_read = || cannot("read the data", path);
            let file = File::open(path).map_err(cannot("read the data", path))?;
            let reader = SerializedFileReader::new(file).map_err(cannot_read())?;
            let metadata = reader.metadata().file_metadata();
            let count = metadata.num_rows().max(0) as u64;
            let schema = metadata.schema();
            let Some(column) = schema.get_fields().iter().find(|f| f.name() == field) else {
                let names: Vec<&str> = schema.get_fields().iter().map(|f| f.name()).collect();
                return Err(Error::new(format!(
                    "data: {}: no column `{field}`; there are: {}; name the one with the text by --field",
                    path.display(),
                    names.join(", ")
                )));
            };
            let only = Type::group_type_builder(schema.name()).with_fields(vec![Arc::clone(column)]);
            let only = only.build().map_err(cannot("read the data", path))?;
            let rows = RowIter::from_file_into(Box::new(reader)).project(Some(only));
            let mut rows = rows.map_err(cannot("read the data", path))?;
            for _ in 0..from {
                rows.next();
            }
            Ok(Rows { rows, count, field: field.to_owned() })
        }

        /// The text of row `at`, counted from 0. None: there is no further row.
        pub fn next(&mut self, path: &Path, at: u64) -> Result<Option<String>> {
            let Some(row) = self.rows.next() else {
                return Ok(None);
            };
            let row: Row = row.map_err(cannot("read the data", path))?;
            match row.into_columns().into_iter().next() {
                Some((_, Field::Str(text))) => Ok(Some(text)),
                _ => Err(Error::new(format!(
                    "data: {}, row {}: the column `{}` has no text; name the one with the text by --field",
                    path.display(),
                    at + 1,
                    self.field
                ))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::shards::{Shard, is_shard};

    /// A directory with 40 documents in JSON lines, 3 in files, one of them without text; all texts differ.
    fn data() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let text = |i: usize| format!("{i}: {}é", "ab\\n\"".repeat(i * i % 50));
        let lines: String = (0..40)
            .map(|i| {
                format!(
                    "{}\n{}",
                    serde_json::json!({"id": i, "text": text(i)}),
                    if i % 7 == 0 { "\n" } else { "" }
                )
            })
            .collect();
        fs::create_dir_all(dir.path().join("data/.hidden")).unwrap();
        for (name, text) in [
            ("a.jsonl", lines.trim_end()), // the last line may lack its end
            ("b", ""),
            ("c.txt", text(40).as_str()),
            ("d.rs", text(41).as_str()),
            (".hidden/e", "!"),
        ] {
            fs::write(dir.path().join("data").join(name), text).unwrap();
        }
        dir
    }

    fn never() -> bool {
        false
    }

    fn job<'a>(dir: &Path, out: &str) -> Job<'a> {
        Job {
            sources: sources(&[dir.join("data")], &dir.join(out)).unwrap(),
            field: "text".into(),
            seed: 1,
            encoder: bytes_as_tokens(),
            format: Format::LlmC,
            shard_tokens: 1000,
            val_fraction: 0.1,
            out: dir.join(out),
            quiet: true,
            batch: 300,
            bucket: 2000,
            stop: &never,
        }
    }

    /// Names and bytes of all files.
    fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = fs::read_dir(directory).unwrap().map(|e| e.unwrap().path());
        let mut files: Vec<_> =
            entries.map(|p| (p.file_name().unwrap().into(), fs::read(p).unwrap())).collect();
        files.sort();
        files
    }

    /// The documents in the files of one name, in order.
    fn documents(directory: &Path, name: &str) -> Vec<String> {
        let mut tokens = vec![];
        for (file, _) in files(directory) {
            if is_shard(&file) && file.to_str().unwrap().starts_with(name) {
                let shard = Shard::open(&directory.join(file)).unwrap();
                assert!(shard.max_id() <= 256);
                tokens.extend(shard.get(0..shard.len()));
            }
        }
        assert!(tokens.first().is_none_or(|&id| id == 256));
        let text = |ids: &[u32]| String::from_utf8(ids.iter().map(|&id| id as u8).collect()).unwrap();
        tokens.split(|&id| id == 256).skip(1).map(text).collect()
    }

    #[test]
    fn every_document_is_there_once_whatever_the_seed() {
        let dir = data();
        let mut orders = vec![];
        for seed in 0..4 {
            let out = format!("out{seed}");
            let pack = run(&Job { seed, ..job(dir.path(), &out) }).unwrap().unwrap();
            let out = dir.path().join(out);
            let [train, val] = ["train", "val"].map(|name| documents(&out, name));
            assert_eq!((pack.train.documents, pack.val.documents), (train.len() as u64, val.len() as u64));
            assert_eq!((pack.train.documents + pack.val.documents, pack.empty_documents), (42, 1));
            let bytes = |texts: &[String]| texts.iter().map(|text| text.len() as u64).sum::<u64>();
            assert_eq!((pack.train.bytes, pack.val.bytes), (bytes(&train), bytes(&val)));
            assert_eq!(pack.train.tokens, bytes(&train) + train.len() as u64);
            // at least the tenth that was asked for, by one document of up to 206 tokens at most
            let tenth = (pack.train.tokens + pack.val.tokens) as f64 / 10.0;
            assert!((tenth..tenth + 206.0).contains(&(pack.val.tokens as f64)));
            let written: Pack = serde_json::from_slice(&fs::read(out.join("pack.json")).unwrap()).unwrap();
            assert_eq!(written, pack);
            assert_eq!((pack.vocabulary, pack.end_token, &pack.tokenizer_sha256), (257, 256, &None));
            for i in 0..pack.train.shards {
                let shard = Shard::open(&out.join(format!("train-{i:06}.bin"))).unwrap();
                let left = pack.train.tokens - 1000 * i;
                assert_eq!(shard.len() as u64, left.min(1000));
            }
            let numbers =
                val.iter().chain(&train).map(|text| text.split_once(':').unwrap().0.parse().unwrap());
            let order: Vec<usize> = numbers.collect();
            let mut sorted = order.clone();
            sorted.sort();
            assert_eq!(sorted, (0..42).collect::<Vec<_>>());
            assert!(!orders.contains(&order));
            orders.push(order);
            assert!(!unfinished(&out).exists());
        }
        let text = documents(&dir.path().join("out0"), "").join("");
        assert!(text.contains("17: ab\\n\"ab") && text.contains('é'));
    }

    #[test]
    fn the_outcome_does_not_depend_on_buckets_batches_or_threads() {
        let dir = data();
        run(&job(dir.path(), "one")).unwrap();
        run(&Job { bucket: u64::MAX, batch: usize::MAX, ..job(dir.path(), "two") }).unwrap();
        crate::pool(3)
            .unwrap()
            .install(|| run(&Job { bucket: 1, batch: 1, ..job(dir.path(), "three") }))
            .unwrap();
        let [one, two, three] = ["one", "two", "three"].map(|out| files(&dir.path().join(out)));
        assert!(one.len() > 4 && one == two && one == three);
    }

    /// Stopped once at every moment at which it can be, and later at every third.
    #[test]
    fn interruptions_change_no_byte() {
        let dir = data();
        run(&job(dir.path(), "whole")).unwrap();
        let whole = files(&dir.path().join("whole"));
        let mut moments = 0;
        for first in 0.. {
            let out = format!("parts{first}");
            let mut next = first;
            let mut calls = 0;
            loop {
                let asked = AtomicUsize::new(0);
                let stop = || asked.fetch_add(1, Ordering::Relaxed) == next;
                let outcome = run(&Job { stop: &stop, ..job(dir.path(), &out) }).unwrap();
                calls += 1;
                if outcome.is_some() {
                    break;
                }
                assert!(!dir.path().join(&out).exists());
                next += 3;
                // as if the machine had stopped later than the state was saved
                let work = unfinished(&dir.path().join(&out));
                let mut bucket = OpenOptions::new().append(true).open(bucket_path(&work, first % 3)).unwrap();
                let dealt = fs::read_to_string(work.join("state.json")).unwrap().contains("\"source\":4");
                if !dealt {
                    bucket.write_all(b"more").unwrap();
                }
            }
            assert_eq!(files(&dir.path().join(&out)), whole, "first stopped at {first}");
            assert!(!unfinished(&dir.path().join(&out)).exists());
            moments = first;
            if calls == 1 {
                break; // there is no such moment
            }
        }
        assert!(moments > 15, "{moments}");
    }

    #[test]
    fn only_the_same_pack_goes_on() {
        let dir = data();
        let asked = AtomicUsize::new(0);
        let stop = || asked.fetch_add(1, Ordering::Relaxed) == 3;
        assert!(run(&Job { stop: &stop, ..job(dir.path(), "out") }).unwrap().is_none());
        let refused = |job: Job, says: &str| {
            let error = run(&job).unwrap_err().to_string();
            assert!(
                error.contains("out.packing holds an unfinished pack with ") && error.contains(says),
                "{error}"
            );
        };
        refused(Job { seed: 2, ..job(dir.path(), "out") }, "--seed 1");
        refused(Job { field: "body".into(), ..job(dir.path(), "out") }, "--field text");
        let other = Encoder { sha256: Some("5e".into()), ..bytes_as_tokens() };
        refused(Job { encoder: other, ..job(dir.path(), "out") }, "another tokenizer");
        let fewer = job(dir.path(), "out").sources[1..].to_vec();
        refused(Job { sources: fewer, ..job(dir.path(), "out") }, "other files");
        fs::write(dir.path().join("data/c.txt"), "changed").unwrap();
        refused(job(dir.path(), "out"), "c.txt before it changed");

        let _other = claim(&dir.path().join("out.packing"), "here").unwrap();
        let error = run(&job(dir.path(), "out")).unwrap_err().to_string();
        assert!(error.contains("out.packing is in use"), "{error}");
    }

    /// What `begin` compares does not include what the second pass alone uses.
    #[test]
    fn the_second_pass_may_be_asked_for_otherwise() {
        let dir = data();
        let asked = AtomicUsize::new(0);
        let stop = || asked.fetch_add(1, Ordering::Relaxed) == 3;
        assert!(run(&Job { stop: &stop, ..job(dir.path(), "out") }).unwrap().is_none());
        let otherwise = |out| Job {
            format: Format::Nanogpt,
            val_fraction: 0.0,
            shard_tokens: 77,
            ..job(dir.path(), out)
        };
        let pack = run(&otherwise("out")).unwrap().unwrap();
        assert_eq!(pack.val, Part::default());
        run(&otherwise("new")).unwrap().unwrap();
        assert_eq!(files(&dir.path().join("out")), files(&dir.path().join("new")));
    }

    #[test]
    fn unusable_documents_are_named() {
        for (name, bytes, says) in [
            (
                "a.jsonl",
                &b"{\"text\": \"a\"}\n\n{\"id\": 1, \"body\": \"b\"}\n"[..],
                "a.jsonl, line 3: no field `text`; there are: body, id;",
            ),
            (
                "a.jsonl",
                b"{\"text\": \"a\"}\n{\"text\": 7}",
                "a.jsonl, line 2: the field `text` is a number, not text",
            ),
            ("a.jsonl", b"{\"text\": null}", "a.jsonl, line 1: the field `text` is null"),
            (
                "a.jsonl",
                b"{\"text\": \"a\"}\n{\"text\": \"b",
                "a.jsonl, line 2, column 11: not a JSON object: EOF",
            ),
            ("a.jsonl", b"[1]", "a.jsonl, line 1, column 1: not a JSON object: invalid type"),
            ("a.jsonl", b"{\"text\": \"\xff\"}", "a.jsonl, line 1, column 1"),
            ("a.jsonl", b"{\"text\": \"\"}\n", "no document with text in 1 file"),
            ("a.jsonl", b"{\"text\": \"a\"}\n", "only one document"),
            ("a", b"a", "only one document"),
            ("a.gz", b"ab\xff", "a.gz is not UTF-8 at byte 2"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("data")).unwrap();
            fs::write(dir.path().join("data").join(name), bytes).unwrap();
            if name == "a.gz" {
                fs::write(dir.path().join("data").join("b"), "a second one").unwrap();
            }
            let error = run(&job(dir.path(), "out")).unwrap_err().to_string();
            assert!(error.contains(says), "expected {says:?} in {error}");
            assert!(!dir.path().join("out").exists());
            // the texts are all dealt where only their division is refused: that may be asked for otherwise
            let dealt = unfinished(&dir.path().join("out")).exists();
            assert_eq!(dealt, says.contains("only one") && name != "a", "{says}");
        }
        let dir = data();
        fs::create_dir(dir.path().join("there")).unwrap();
        assert!(run(&job(dir.path(), "there")).unwrap_err().to_string().contains("there exists"));
        let error = sources(&[dir.path().into()], &dir.path().join("x/out")).err().unwrap().to_string();
        assert!(error.contains("is inside"), "{error}");
        let error = sources(&[dir.path().join("none")], Path::new("out")).err().unwrap().to_string();
        assert!(error.starts_with("cannot read the data ") && error.contains("none"), "{error}");
    }

    #[test]
    fn a_tokenizer_has_its_own_vocabulary_and_errors() {
        let dir = data();
        let large = |text: &str| Ok(text.bytes().map(|b| u32::from(b) + 70_000).collect());
        let encoder =
            |vocab| Encoder { encode: &large, vocab, end: 1, sha256: Some("5e".into()), json: None };
        let pack = run(&Job { encoder: encoder(80_000), val_fraction: 0.0, ..job(dir.path(), "wide") })
            .unwrap()
            .unwrap();
        assert_eq!(
            (pack.vocabulary, pack.end_token, pack.tokenizer_sha256.as_deref()),
            (80_000, 1, Some("5e"))
        );
        let shard = Shard::open(&dir.path().join("wide/train-000000.bin")).unwrap();
        assert_eq!((shard.get(0..1).next(), shard.bytes().len()), (Some(1), 4000));
        assert!(shard.max_id() >= 70_000 + u32::from(b'a'));

        let refused = |job: Job| run(&job).unwrap_err().to_string();
        let error =
            refused(Job { encoder: encoder(80_000), format: Format::Nanogpt, ..job(dir.path(), "x") });
        assert!(error.contains("--format nanogpt has ids up to 65535 only"), "{error}");
        let error = refused(Job { encoder: encoder(70_000), ..job(dir.path(), "x") });
        assert!(
            error.contains(
                "a.jsonl, line 1: the tokenizer gives token 70048, and its vocabulary has only 70000"
            ),
            "{error}"
        );
        let fails = |_: &str| Err(Error::new("no such character"));
        let encoder = Encoder { encode: &fails, ..bytes_as_tokens() };
        let error = refused(Job { encoder, ..job(dir.path(), "x") });
        assert!(error.ends_with("a.jsonl, line 1: no such character"), "{error}");
        assert!(!unfinished(&dir.path().join("x")).exists());
    }

    #[cfg(not(feature = "parquet"))]
    #[test]
    fn parquet_needs_its_feature() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.parquet"), "PAR1").unwrap();
        let error = sources(&[dir.path().into()], Path::new("out")).err().unwrap().to_string();
        assert!(
            error.contains("a.parquet is a Parquet file") && error.contains("--features parquet"),
            "{error}"
        );
    }

    #[cfg(feature = "parquet")]
    #[test]
    fn parquet_rows_are_documents() {
        use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
        use parquet::file::properties::WriterProperties;
        use parquet::file::writer::SerializedFileWriter;
        use parquet::schema::parser::parse_message_type;
        let dir = data();
        let schema = "message schema { required int64 id; optional binary text (UTF8); }";
        let schema = std::sync::Arc::new(parse_message_type(schema).unwrap());
        // Two groups of ten rows; a null in the last row of the last, where asked for.
        let write = |name: &str, null: bool| {
            let file = File::create(dir.path().join(name)).unwrap();
            let properties = WriterProperties::builder()
                .set_compression(parquet::basic::Compression::ZSTD(Default::default()))
                .build();
            let mut writer = SerializedFileWriter::new(file, schema.clone(), properties.into()).unwrap();
            for group in 0..2 {
                let mut rows = writer.next_row_group().unwrap();
                let numbers: Vec<i64> = (10 * group..10 * group + 10).collect();
                let mut column = rows.next_column().unwrap().unwrap();
                column.typed::<Int64Type>().write_batch(&numbers, None, None).unwrap();
                column.close().unwrap();
                let there = |i: i64| !(null && i == 19);
                let texts: Vec<ByteArray> = numbers
                    .iter()
                    .filter(|i| there(**i))
                    .map(|i| format!("row {i}").as_str().into())
                    .collect();
                let levels: Vec<i16> = numbers.iter().map(|&i| i16::from(there(i))).collect();
                let mut column = rows.next_column().unwrap().unwrap();
                column.typed::<ByteArrayType>().write_batch(&texts, Some(&levels), None).unwrap();
                column.close().unwrap();
                rows.close().unwrap();
            }
            writer.close().unwrap();
        };
        let from = |name: &str, out: &str| Job {
            sources: sources(&[dir.path().join(name)], &dir.path().join(out)).unwrap(),
            batch: 30,
            ..job(dir.path(), out)
        };
        write("a.parquet", false);
        run(&from("a.parquet", "whole")).unwrap().unwrap();
        let mut texts = documents(&dir.path().join("whole"), "");
        texts.sort();
        let mut rows: Vec<String> = (0..20).map(|i| format!("row {i}")).collect();
        rows.sort();
        assert_eq!(texts, rows);
        let asked = AtomicUsize::new(0);
        let stop = || asked.fetch_add(1, Ordering::Relaxed) == 3;
        assert!(run(&Job { stop: &stop, ..from("a.parquet", "parts") }).unwrap().is_none());
        run(&from("a.parquet", "parts")).unwrap().unwrap();
        assert_eq!(files(&dir.path().join("whole")), files(&dir.path().join("parts")));

        let refused = |job: Job, says: &str| {
            let error = run(&job).unwrap_err().to_string();
            assert!(error.contains(says), "expected {says:?} in {error}");
        };
        refused(
            Job { field: "body".into(), ..from("a.parquet", "x") },
            "a.parquet: no column `body`; there are: id, text;",
        );
        refused(
            Job { field: "id".into(), ..from("a.parquet", "x") },
            "a.parquet, row 1: the column `id` has no text",
        );
        write("b.parquet", true);
        refused(from("b.parquet", "x"), "b.parquet, row 20: the column `text` has no text");
        fs::write(dir.path().join("c.parquet"), "PAR1 and no more").unwrap();
        refused(from("c.parquet", "x"), "c.parquet: ");
    }
}
