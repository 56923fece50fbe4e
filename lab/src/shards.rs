//! Token files, `.bin`: what nanoGPT and llm.c (and with it modded-nanogpt) train on, mapped into memory to read, written whole.
//!
//! Two formats, both little-endian. nanoGPT's (its data/*/prepare.py) is u16 ids and nothing else. llm.c's (its
//! dev/data/data_common.py) has a header of 256 i32 in front: magic, version, number of tokens, zeros; magic 20240520 with
//! version 1 is followed by u16 ids, magic 20240801 with version 7 by u32 ids, for vocabularies beyond 65,536 such as Llama 3's.
//! Width: bytes per token, 2 or 4. Not here: which files there are (pack.rs writes them), and windows over them.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, cannot};
use crate::files::mapped;

/// Bytes of llm.c's header.
const HEADER: usize = 256 * 4;
/// llm.c's token files: magic, version, width.
const KINDS: [(i32, i32, usize); 2] = [(20240520, 1, 2), (20240801, 7, 4)];
/// llm.c's multiple-choice questions, which have the same ending.
const QUESTIONS: i32 = 20240522;

/// How tokens lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// a header, then ids of two bytes, or of four if the vocabulary is larger than 65536
    LlmC,
    /// ids of two bytes and nothing else
    Nanogpt,
}

impl Format {
    /// Tokens that one file can hold.
    pub fn capacity(self) -> u64 {
        match self {
            Format::LlmC => i32::MAX as u64, // the header's count
            Format::Nanogpt => u64::MAX,
        }
    }

    /// Bytes per token for ids below `vocab`.
    ///
    /// # Errors
    /// A vocabulary that the format has no room for.
    pub fn width(self, vocab: usize) -> Result<usize> {
        match self {
            _ if vocab <= 1 << 16 => Ok(2),
            Format::LlmC => Ok(4),
            Format::Nanogpt => Err(Error::new(format!(
                "--format nanogpt has ids up to 65535 only, and the vocabulary has {vocab}; use --format llm-c"
            ))),
        }
    }
}

/// The ids in `bytes`, whole tokens of `width` bytes each.
pub fn ids(bytes: &[u8], width: usize) -> impl ExactSizeIterator<Item = u32> + '_ {
    bytes.chunks_exact(width).map(|token| match *token {
        [a, b] => u32::from(u16::from_le_bytes([a, b])),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
        _ => unreachable!("a token has two bytes or four"),
    })
}

/// Appends an id in `width` bytes; with 2 of them it must be below 65536.
pub fn put(id: u32, width: usize, to: &mut Vec<u8>) {
    to.extend_from_slice(&id.to_le_bytes()[..width]);
}

/// Whether a path is that of a token file, by its ending.
pub fn is_shard(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "bin")
}

/// A token file, mapped into memory.
pub struct Shard {
    map: Mmap,
    /// Where the tokens begin.
    start: usize,
    width: usize,
}

impl Shard {
    /// Opens either format, told apart by the first four bytes: as nanoGPT's, llm.c's magics would be tokens 55432 or 55713
    /// in front of 308, beyond the vocabularies of GPT-2 and of bytes.
    ///
    /// # Errors
    /// A file that cannot be read, has no tokens, a part of one, another number of them than its header says, or a version
    /// that is unknown here.
    pub fn open(path: &Path) -> Result<Self> {
        let map = mapped("read the tokens", path)?;
        let refuse = |what: String| Err(Error::new(format!("tokens: {} {what}", path.display())));
        let field = |i: usize| {
            let bytes = map.get(4 * i..4 * i + 4)?;
            Some(i32::from_le_bytes(bytes.try_into().expect("four bytes")))
        };
        let (magic, version, tokens) = (field(0), field(1), field(2));
        if magic == Some(QUESTIONS) {
            return refuse(
                "is one of llm.c's evaluation files (magic 20240522), not of tokens to train on".into(),
            );
        }
        let kind = KINDS.into_iter().find(|kind| magic == Some(kind.0));
        let Some((magic, known, width)) = kind else {
            if map.is_empty() {
                return refuse("is empty; write it again".into());
            }
            if map.len() % 2 != 0 {
                return refuse(format!(
                    "has {} bytes, an odd number, and llm.c's header is not in front: it is no file of two-byte tokens, or it \
                     was cut off; write it again",
                    map.len()
                ));
            }
            return Ok(Shard { map, start: 0, width: 2 });
        };
        let (Some(version), Some(tokens), true) = (version, tokens, map.len() >= HEADER) else {
            return refuse(format!(
                "has {} bytes, fewer than llm.c's header of {HEADER}: it was cut off; write it again",
                map.len()
            ));
        };
        if version != known {
            return refuse(format!(
                "has version {version} of llm.c's format with magic {magic}, and only version {known} is known here; \
                 write it again, by rankgrad data pack for example"
            ));
        }
        let expected = HEADER as i64 + i64::from(tokens) * width as i64;
        if map.len() as i64 != expected {
            return refuse(format!(
                "has {} bytes, but its header says {tokens} tokens of {width} bytes behind {HEADER}, together {expected}: it \
                 was cut off or changed; write it again",
                map.len()
            ));
        }
        if tokens == 0 {
            return refuse("has a header and no tokens; write it again".into());
        }
        Ok(Shard { map, start: HEADER, width })
    }

    /// The tokens as they lie in the file, without a header: equal ones of one width have equal bytes in both formats.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.start..]
    }

    /// Number of tokens, at least 1.
    pub fn len(&self) -> usize {
        self.bytes().len() / self.width
    }

    /// The tokens at these positions.
    ///
    /// # Panics
    /// When the range goes beyond [`Shard::len`].
    #[track_caller]
    pub fn get(&self, range: Range<usize>) -> impl ExactSizeIterator<Item = u32> + '_ {
        ids(&self.bytes()[range.start * self.width..range.end * self.width], self.width)
    }

    /// The largest id, found by reading the whole file.
    pub fn max_id(&self) -> u32 {
        // Loops over arrays of known length become SIMD, `ids` does not.
        let of_two = || self.bytes().as_chunks::<2>().0.iter().map(|&token| u16::from_le_bytes(token)).max();
        let of_four = || self.bytes().as_chunks::<4>().0.iter().map(|&token| u32::from_le_bytes(token)).max();
        let max = if self.width == 2 { of_two().map(u32::from) } else { of_four() };
        max.expect("at least one token")
    }
}

/// Writes a token file under another, hidden name, and renames it once it is whole and on the disk. Dropped before, it leaves
/// nothing.
pub struct Writer {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    /// What is not in the file yet.
    buffer: Vec<u8>,
    header: Option<(i32, i32)>,
    width: usize,
    tokens: u64,
    capacity: u64,
}

/// Bytes that are written at a time.
const PORTION: usize = 1 << 18;

impl Writer {
    /// Begins a file for ids below `vocab`; an existing one is replaced in the end.
    ///
    /// # Errors
    /// A vocabulary that the format has no room for; a directory that is missing or not writable.
    pub fn create(path: &Path, format: Format, vocab: usize) -> Result<Self> {
        let width = format.width(vocab)?;
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().expect("a file has a name"));
        name.push(".writing");
        let temporary = path.with_file_name(name);
        let file = File::create(&temporary).map_err(cannot("write", &temporary))?;
        let (header, buffer) = match format {
            Format::Nanogpt => (None, vec![]),
            Format::LlmC => {
                let kind = KINDS.into_iter().find(|kind| kind.2 == width);
                let (magic, version, _) = kind.expect("a kind for each width");
                (Some((magic, version)), vec![0; HEADER])
            }
        };
        let capacity = format.capacity();
        Ok(Writer { path: path.to_owned(), temporary, file, buffer, header, width, tokens: 0, capacity })
    }

    /// Tokens so far.
    pub fn len(&self) -> u64 {
        self.tokens
    }

    /// Appends tokens.
    ///
    /// # Errors
    /// An id that needs more bytes than the file's tokens have, more tokens than the format can count, a full disk.
    pub fn write(&mut self, tokens: impl Iterator<Item = u32>) -> Result<()> {
        for id in tokens {
            if self.width == 2 && id > u32::from(u16::MAX) {
                return Err(Error::new(format!(
                    "cannot write {}: token {id} is beyond the 65535 of two-byte tokens; give the vocabulary's size, and \
                     take --format llm-c",
                    self.path.display()
                )));
            }
            if self.tokens == self.capacity {
                return Err(Error::new(format!(
                    "cannot write {}: the format counts no more than {} tokens; use a smaller --shard-tokens",
                    self.path.display(),
                    self.capacity
                )));
            }
            put(id, self.width, &mut self.buffer);
            self.tokens += 1;
            if self.buffer.len() >= PORTION {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.file.write_all(&self.buffer).map_err(cannot("write", &self.path))?;
        self.buffer.clear();
        Ok(())
    }

    /// Makes the file appear, and returns its number of tokens.
    ///
    /// # Errors
    /// No tokens at all, a full disk.
    pub fn finish(mut self) -> Result<u64> {
        if self.tokens == 0 {
            return Err(Error::new(format!("cannot write {}: it would have no tokens", self.path.display())));
        }
        self.flush()?;
        if let Some((magic, version)) = self.header {
            let count = i32::try_from(self.tokens).expect("no more than the capacity");
            let front = [magic, version, count].map(i32::to_le_bytes).concat();
            let placed = self.file.seek(SeekFrom::Start(0)).and_then(|_| self.file.write_all(&front));
            placed.map_err(cannot("write", &self.path))?;
        }
        let appeared = self.file.sync_all().and_then(|()| fs::rename(&self.temporary, &self.path));
        appeared.map_err(cannot("write", &self.path))?;
        Ok(self.tokens)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.temporary); // after `finish` there is none
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    /// llm.c's layout by hand.
    fn llm_c(header: [i32; 3], tokens: &[u8]) -> Vec<u8> {
        let mut bytes: Vec<u8> = header.iter().flat_map(|x| x.to_le_bytes()).collect();
        bytes.resize(1024, 0);
        bytes.extend(tokens);
        bytes
    }

    fn written(format: Format, vocab: usize, tokens: &[u32]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        let mut writer = Writer::create(&path, format, vocab).unwrap();
        for part in tokens.chunks(2) {
            writer.write(part.iter().copied()).unwrap();
        }
        assert!(!path.exists());
        assert_eq!(writer.finish().unwrap(), tokens.len() as u64);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::read(path).unwrap()
    }

    #[test]
    fn both_formats_are_read_and_written_to_the_byte() {
        let two = [1, 0, 0, 1, 0xff, 0xff, 7, 0];
        let four = [1, 0, 0, 0, 0, 1, 0, 0, 0x50, 0xf5, 1, 0];
        for (format, vocab, bytes, tokens) in [
            (Format::Nanogpt, 65536, two.to_vec(), vec![1, 256, 65535, 7]),
            (Format::LlmC, 65536, llm_c([20240520, 1, 4], &two), vec![1, 256, 65535, 7]),
            (Format::LlmC, 128_256, llm_c([20240801, 7, 3], &four), vec![1, 256, 128_336]),
        ] {
            let (_dir, path) = file(&bytes);
            let shard = Shard::open(&path).unwrap();
            assert_eq!(shard.len(), tokens.len());
            assert_eq!(shard.get(0..shard.len()).collect::<Vec<_>>(), tokens);
            assert_eq!(shard.get(1..3).collect::<Vec<_>>(), tokens[1..3]);
            assert_eq!(shard.get(2..2).len(), 0);
            assert_eq!(shard.max_id(), *tokens.iter().max().unwrap());
            assert_eq!(shard.bytes(), if vocab == 65536 { &two[..] } else { &four[..] });
            assert_eq!(written(format, vocab, &tokens), bytes);
        }
        assert!(is_shard(Path::new("a/train-000000.bin")) && !is_shard(Path::new("a/bin")));
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        for (bytes, says) in [
            (vec![], "is empty"),
            (vec![1, 0, 2], "has 3 bytes, an odd number"),
            (20240520i32.to_le_bytes().to_vec(), "has 4 bytes, fewer than llm.c's header of 1024"),
            (llm_c([20240520, 1, 2], &[0; 4])[..1000].to_vec(), "has 1000 bytes, fewer"),
            (llm_c([20240520, 2, 2], &[0; 4]), "has version 2 of llm.c's format with magic 20240520"),
            (llm_c([20240801, 1, 2], &[0; 8]), "only version 7 is known"),
            (llm_c([20240520, 1, 3], &[0; 4]), "1028 bytes, but its header says 3 tokens of 2 bytes"),
            (llm_c([20240520, 1, 1], &[0; 4]), "together 1026"),
            (llm_c([20240520, 1, -1], &[0; 4]), "says -1 tokens"),
            (llm_c([20240801, 7, 2], &[0; 7]), "together 1032"),
            (llm_c([20240520, 1, 0], &[]), "no tokens"),
            (llm_c([20240522, 1, 1], &[0; 4]), "evaluation files"),
        ] {
            let (_dir, path) = file(&bytes);
            let error = Shard::open(&path).err().unwrap().to_string();
            assert!(error.starts_with(&format!("tokens: {} ", path.display())), "{error}");
            assert!(error.contains(says), "expected {says:?} in {error}");
        }
        let error = Shard::open(Path::new("/no/such.bin")).err().unwrap().to_string();
        assert!(error.starts_with("cannot read the tokens /no/such.bin: "), "{error}");
    }

    #[test]
    fn an_unfinished_file_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        let mut writer = Writer::create(&path, Format::LlmC, 65536).unwrap();
        writer.write([1, 2, 3].into_iter().cycle().take(PORTION)).unwrap();
        let error = writer.write([1, 65536].into_iter()).unwrap_err().to_string();
        assert!(error.contains("token 65536 is beyond the 65535"), "{error}");
        drop(writer);
        let error = Writer::create(&path, Format::LlmC, 9).unwrap().finish().unwrap_err().to_string();
        assert!(error.contains("would have no tokens"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let error = Writer::create(&path, Format::Nanogpt, 65537).err().unwrap().to_string();
        assert!(error.contains("the vocabulary has 65537; use --format llm-c"), "{error}");
        assert!(Writer::create(Path::new("/no/such/a.bin"), Format::LlmC, 9).is_err());
    }

    #[test]
    fn a_shard_counts_no_further_than_its_header() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&dir.path().join("a.bin"), Format::LlmC, 9).unwrap();
        writer.capacity = 3; // in place of 2^31 − 1
        let error = writer.write([1; 4].into_iter()).unwrap_err().to_string();
        assert!(error.contains("no more than 3 tokens; use a smaller --shard-tokens"), "{error}");
    }
}
