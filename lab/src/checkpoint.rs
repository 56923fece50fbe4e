//! Checkpoints: one safetensors file each, named f32 tensors and, as JSON in its metadata, everything else.
//!
//! Weights are named `param.…`, optimizer state `opt.…`; the data position and the schedule position are the step.
//! Not here: the model. Whoever restores one takes each tensor by name and shape, so a mismatch is found by name.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::data::Corpus;
use crate::error::{Error, Result, cannot};
use crate::files::{mapped, write_atomically};
use crate::tokens::Tokenizer;

/// Raised whenever older files can no longer be read.
const FORMAT: u32 = 1;

// The file format is little-endian, and the values are written as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"));

/// The key in the safetensors metadata that makes a file ours, and that of its tokenizer.
const KEY: &str = "rankgrad";
const TOKENIZER_KEY: &str = "tokenizer.json";

/// All of a checkpoint that is not a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Steps done.
    pub step: u64,
    pub config: Config,
    /// SHA-256 of the corpus, in hexadecimal: a run is continued on the same bytes only. Empty where no run wrote the file.
    pub corpus_sha256: String,
    /// Training tokens seen.
    pub tokens: u64,
    /// Training time in seconds, over all parts of a resumed run.
    pub seconds: f64,
    /// Smallest validation loss so far, in nats per token.
    pub best_val_loss: Option<f64>,
    /// Scalar optimizer state, by name; finite values only.
    pub scalars: BTreeMap<String, f64>,
}

impl Meta {
    /// At the start of a run.
    pub fn new(config: &Config, corpus: &Corpus) -> Self {
        Meta { corpus_sha256: corpus.sha256.clone(), ..Self::of_model(config.clone()) }
    }

    /// Of a model that no run of this program left as it is, such as an imported one.
    pub fn of_model(config: Config) -> Self {
        Meta {
            step: 0,
            config,
            corpus_sha256: String::new(),
            tokens: 0,
            seconds: 0.0,
            best_val_loss: None,
            scalars: BTreeMap::new(),
        }
    }

    /// Whether a run wrote this checkpoint, so that there is one to continue.
    pub fn trained_here(&self) -> bool {
        !self.corpus_sha256.is_empty()
    }
}

/// Shape and row-major values.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// One training state on the host, exact to the bit.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    pub meta: Meta,
    /// The text of the run's tokenizer.json; None: bytes are tokens.
    pub tokenizer: Option<String>,
    pub tensors: BTreeMap<String, HostTensor>,
}

impl Checkpoint {
    /// Writes `step-NNNNNNNN.safetensors` into `directory`, then removes older checkpoints beyond the newest `keep`
    /// (0: none).
    ///
    /// # Errors
    /// Unwritable directory or full disk: earlier checkpoints are then untouched.
    pub fn save(&self, directory: &Path, keep: usize) -> Result<PathBuf> {
        let path = directory.join(format!("step-{:08}.safetensors", self.meta.step));
        write_atomically(&path, &self.to_bytes()?)?;
        let older =
            list(directory)?.into_iter().filter(|(step, _)| *step < self.meta.step).map(|(_, path)| path);
        let older: Vec<PathBuf> = older.collect();
        if keep > 0 {
            for path in &older[..older.len().saturating_sub(keep - 1)] {
                fs::remove_file(path).map_err(cannot("remove the old checkpoint", path))?;
            }
        }
        Ok(path)
    }

    /// The whole file.
    ///
    /// # Errors
    /// A configuration or a tensor that cannot be encoded.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let unwritable = |e: &dyn std::fmt::Display| Error::new(format!("cannot encode the checkpoint: {e}"));
        let meta = serde_json::to_string(&(FORMAT, &self.meta)).map_err(|e| unwritable(&e))?;
        let views = self.tensors.iter().map(|(name, t)| {
            let bytes = bytemuck::cast_slice(&t.values);
            Ok((name, TensorView::new(Dtype::F32, t.shape.clone(), bytes).map_err(|e| unwritable(&e))?))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let tokenizer = self.tokenizer.clone().map(|text| (TOKENIZER_KEY.to_owned(), text));
        let metadata = HashMap::from_iter([(KEY.to_owned(), meta)].into_iter().chain(tokenizer));
        safetensors::serialize(views, Some(metadata)).map_err(|e| unwritable(&e))
    }

    /// Reads a checkpoint file.
    ///
    /// # Errors
    /// Unreadable, truncated or foreign files, and those of another format version.
    pub fn load(path: &Path) -> Result<Self> {
        Self::load_some(path, "")
    }

    /// [`Checkpoint::load`] without the optimizer's state, which is not read from the disk.
    ///
    /// # Errors
    /// As there.
    pub fn load_weights(path: &Path) -> Result<Self> {
        Self::load_some(path, "param.")
    }

    fn load_some(path: &Path, prefix: &str) -> Result<Self> {
        let bytes = mapped("read the checkpoint", path)?;
        Self::from_bytes(&bytes, prefix)
            .map_err(|e| Error::new(format!("checkpoint {}: {e}", path.display())))
    }

    /// Of a whole file, with the tensors whose names begin with `prefix`.
    ///
    /// # Errors
    /// As [`Checkpoint::load`], but for reading.
    pub fn from_bytes(bytes: &[u8], prefix: &str) -> Result<Self> {
        let damaged = |e: &dyn std::fmt::Display| {
            Error::new(format!(
                "truncated, damaged or not a safetensors file ({e}); use an earlier checkpoint"
            ))
        };
        let file = SafeTensors::deserialize(bytes).map_err(|e| damaged(&e))?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(&e))?;
        let foreign = || Error::new("a safetensors file, but not one that rankgrad wrote");
        let metadata = header.metadata().clone().unwrap_or_default();
        let meta = metadata.get(KEY).ok_or_else(foreign)?;
        let (format, meta): (u32, serde_json::Value) = serde_json::from_str(meta).map_err(|_| foreign())?;
        if format != FORMAT {
            return Err(Error::new(format!(
                "format {format}, this program reads format {FORMAT}; use the program version that wrote it"
            )));
        }
        let meta = serde_json::from_value(meta)
            .map_err(|e| Error::new(format!("its record does not suit this version of the program: {e}")))?;
        let tensor = |(name, view): (&str, TensorView)| {
            if view.dtype() != Dtype::F32 {
                return Err(damaged(&format!("`{name}` is {:?}, not F32", view.dtype())));
            }
            let values = bytemuck::pod_collect_to_vec(view.data());
            Ok((name.to_owned(), HostTensor { shape: view.shape().to_vec(), values }))
        };
        let tokenizer = metadata.get(TOKENIZER_KEY).cloned();
        let wanted: Vec<(&str, TensorView)> =
            file.iter().filter(|(name, _)| name.starts_with(prefix)).collect();
        let tensors = wanted.into_par_iter().map(tensor).collect::<Result<_>>()?;
        Ok(Checkpoint { meta, tokenizer, tensors })
    }

    /// The tokenizer that the model was trained with.
    ///
    /// # Errors
    /// One that this program cannot read.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.tokenizer {
            Some(text) => Tokenizer::from_json(text.clone(), "of the checkpoint"),
            None => Ok(Tokenizer::Bytes),
        }
    }

    /// That tokenizer, or for a model that has none, such as one trained on token files, the one in a file.
    ///
    /// # Errors
    /// As [`Checkpoint::tokenizer`]; a file that is another tokenizer than the checkpoint's, or has more tokens than the model.
    pub fn tokenizer_or(&self, file: Option<&Path>) -> Result<Tokenizer> {
        let Some(path) = file else { return self.tokenizer() };
        let given = Tokenizer::open(Some(path))?;
        if self.tokenizer.is_some() && self.tokenizer.as_deref() != given.json() {
            return Err(Error::new(format!(
                "tokenizer {} is not the one that the checkpoint was trained with; leave --tokenizer out: the checkpoint has its own",
                path.display()
            )));
        }
        let vocab = self.meta.config.vocab;
        if given.vocab() > vocab {
            return Err(Error::new(format!(
                "tokenizer {} does not match the checkpoint: it has {} tokens, the model {vocab}; give the one that it was trained with",
                path.display(),
                given.vocab()
            )));
        }
        Ok(given)
    }

    /// Moves out the values of a tensor that must have this shape.
    ///
    /// # Errors
    /// No such tensor, or another shape.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match self.tensors.remove(name) {
            Some(found) if found.shape == shape => Ok(found.values),
            Some(found) => Err(Error::new(format!(
                "the checkpoint does not fit the model: `{name}` has shape {:?}, expected {shape:?}",
                found.shape
            ))),
            None => Err(Error::new(format!(
                "the checkpoint does not fit the model: it has no `{name}` {shape:?}"
            ))),
        }
    }

    /// After the last `take`: nothing whose name starts with `prefix` may be left over.
    ///
    /// # Errors
    /// A tensor that nobody took.
    pub fn all_taken(&self, prefix: &str) -> Result<()> {
        match self.tensors.iter().find(|(name, _)| name.starts_with(prefix)) {
            Some((name, t)) => Err(Error::new(format!(
                "the checkpoint does not fit the model: its `{name}` {:?} belongs nowhere",
                t.shape
            ))),
            None => Ok(()),
        }
    }
}

/// The file itself, or the newest checkpoint of a run's directory.
///
/// # Errors
/// A path that is missing, or a directory without checkpoints.
pub fn find(path: &Path) -> Result<PathBuf> {
    if !fs::metadata(path).map_err(cannot("find the checkpoint", path))?.is_dir() {
        return Ok(path.to_owned());
    }
    match list(path)?.pop() {
        Some((_, newest)) => Ok(newest),
        None => Err(Error::new(format!("no checkpoint (step-NNNNNNNN.safetensors) in {}", path.display()))),
    }
}

/// Step and path of each checkpoint in a directory, oldest first.
///
/// # Errors
/// A directory that cannot be read.
pub fn list(directory: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(cannot("read", directory))? {
        let path = entry.map_err(cannot("read", directory))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let step = name.strip_prefix("step-").and_then(|n| n.strip_suffix(".safetensors"));
        if let Some(Ok(step)) = step.map(str::parse) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;

    fn checkpoint(step: u64) -> Checkpoint {
        let odd = [0.1, -0.0, f32::MIN_POSITIVE / 8.0, f32::NEG_INFINITY, 1.0 + f32::EPSILON, 3.0];
        Checkpoint {
            meta: Meta {
                step,
                config: Overrides::default().resolve().unwrap(),
                corpus_sha256: "ab".into(),
                tokens: u64::MAX,
                seconds: 0.1 + 0.2,
                best_val_loss: None,
                scalars: BTreeMap::from([("opt.t".into(), 1.0 / 3.0)]),
            },
            tokenizer: (step % 2 == 1).then(|| "{\"a\": \"ü\"}".into()),
            tensors: BTreeMap::from([
                ("param.a".into(), HostTensor { shape: vec![2, 3], values: odd.to_vec() }),
                ("opt.m".into(), HostTensor { shape: vec![0], values: vec![] }),
            ]),
        }
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_checkpoint_returns_exactly() {
        let dir = tempfile::tempdir().unwrap();
        let path = checkpoint(7).save(dir.path(), 3).unwrap();
        assert!(path.ends_with("step-00000007.safetensors"));
        let loaded = Checkpoint::load(&path).unwrap();
        assert_eq!(loaded, checkpoint(7));
        let bits =
            |c: &Checkpoint| c.tensors["param.a"].values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&loaded), bits(&checkpoint(7)));
        let weights = Checkpoint::load_weights(&path).unwrap();
        assert_eq!(weights.tensors.keys().collect::<Vec<_>>(), ["param.a"]);
        assert_eq!((bits(&weights), weights.meta), (bits(&checkpoint(7)), checkpoint(7).meta));
    }

    #[test]
    fn the_newest_are_kept_and_other_files_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("step-1.safetensors.mine"), "").unwrap();
        for step in [1, 2, 30, 4] {
            checkpoint(step).save(dir.path(), 2).unwrap();
        }
        // 30 is of another course of the run: not older than 4, so not for saving 4 to remove.
        let expected =
            ["step-00000002.safetensors", "step-00000004.safetensors", "step-00000030.safetensors"];
        assert_eq!(names(dir.path())[..3], expected);
        assert_eq!(names(dir.path()).len(), 4);
        assert!(find(dir.path()).unwrap().ends_with("step-00000030.safetensors"));
        checkpoint(31).save(dir.path(), 0).unwrap();
        assert_eq!(names(dir.path()).len(), 5);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_loses_no_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        checkpoint(1).save(dir.path(), 1).unwrap();
        std::os::unix::fs::symlink("/dev/full", dir.path().join(".writing")).unwrap();
        assert!(checkpoint(2).save(dir.path(), 1).is_err());
        assert_eq!(names(dir.path()), ["step-00000001.safetensors"]);
        assert_eq!(Checkpoint::load(&find(dir.path()).unwrap()).unwrap(), checkpoint(1));
    }

    #[test]
    fn bad_files_are_told_apart() {
        let error = |bytes: &[u8]| Checkpoint::from_bytes(bytes, "").unwrap_err().to_string();
        let good = checkpoint(1).to_bytes().unwrap();
        for length in [0, 4, 100, good.len() - 1] {
            assert!(error(&good[..length]).contains("truncated"), "{length}");
        }
        assert!(error(b"this is a text, not a checkpoint").contains("not a safetensors file"));
        let foreign = |metadata| safetensors::serialize(Vec::<(&str, TensorView)>::new(), metadata).unwrap();
        assert!(error(&foreign(None)).contains("not one that rankgrad wrote"));
        let newer = HashMap::from([(KEY.to_owned(), "[2, {}]".to_owned())]);
        assert!(error(&foreign(Some(newer))).contains("format 2, this program reads format 1"));
        let missing = Checkpoint::load(Path::new("/no/such")).unwrap_err().to_string();
        assert!(missing.starts_with("cannot read the checkpoint /no/such: "), "{missing}");
        let dir = tempfile::tempdir().unwrap();
        assert!(find(dir.path()).unwrap_err().to_string().starts_with("no checkpoint (step-"));
    }

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let mut c = checkpoint(1);
        let error = c.clone().take("param.a", &[3, 2]).unwrap_err().to_string();
        assert!(error.contains("`param.a` has shape [2, 3], expected [3, 2]"), "{error}");
        assert!(c.take("param.b", &[1]).unwrap_err().to_string().contains("it has no `param.b` [1]"));
        assert!(c.all_taken("param.").unwrap_err().to_string().contains("`param.a` [2, 3] belongs nowhere"));
        assert_eq!(c.take("param.a", &[2, 3]).unwrap().len(), 6);
        c.all_taken("param.").unwrap();
    }
}
