//! The directory of a run: config.toml, metrics.jsonl, checkpoints, final.json or diverged.json, loss.svg, and event files if
//! asked for.
//!
//! A directory holds one run; what is in it is only ever added to, or replaced whole. metrics.jsonl is one JSON
//! object a line, in the order of the steps and without repeats, also after a resume.
//! Not here: the training loop that produces these records.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Checkpoint};
use crate::config::{Config, Method, name};
use crate::error::{Error, Result, cannot};
use crate::files::{Claim, claim, write_atomically, write_json};
use crate::tensorboard::{self, Events};

/// One line of metrics.jsonl. Losses are in nats per token; a loss that is not finite is written as null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Steps done.
    pub step: u64,
    /// Training loss of the step's batch.
    pub loss: Option<f64>,
    /// Validation loss after the step, where one was computed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub val_loss: Option<f64>,
    /// Learning rate of the blocks' matrices in this step.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: Option<f64>,
    /// Training tokens seen.
    pub tokens: u64,
    /// Training time in seconds, over all parts of a resumed run.
    pub seconds: f64,
    pub tokens_per_second: f64,
    /// Every --telemetry-every steps.
    #[serde(flatten)]
    pub telemetry: Telemetry,
}

/// The blocks' matrices after a step and what the step did to them, by name. Spectral norms are estimates from below unless
/// the run is `--telemetry exact`; what is not finite is null.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Telemetry {
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub pairs: BTreeMap<String, PairRecord>,
    /// Those that are kept whole, the guides of self-guided training among them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub hidden: BTreeMap<String, MatrixRecord>,
}

impl Telemetry {
    /// Matrix → quantity, as it is called here → value. What is absent (null: not finite) is left out.
    pub fn numbers(&self) -> BTreeMap<String, BTreeMap<String, f64>> {
        fn numbers<T: Serialize>((name, matrix): (&String, &T)) -> (String, BTreeMap<String, f64>) {
            let value = serde_json::to_value(matrix).expect("plain values");
            let fields = value.as_object().into_iter().flatten();
            (name.clone(), fields.filter_map(|(key, value)| Some((key.clone(), value.as_f64()?))).collect())
        }
        self.pairs.iter().map(numbers).chain(self.hidden.iter().map(numbers)).collect()
    }
}

/// A factor pair: what `pair_telemetry` sees, and what the rule reports where it does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairRecord {
    pub sigma_a: Option<f64>,
    pub sigma_b: Option<f64>,
    pub gauge_imbalance: Option<f64>,
    #[serde(flatten)]
    pub w: MatrixRecord,
    /// The radius of the step.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rho: Option<f64>,
    /// The factor on W by weight decay.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub shrink: Option<f64>,
}

/// A matrix W.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatrixRecord {
    pub sigma_w: Option<f64>,
    pub stable_rank: Option<f64>,
    /// ‖ΔW‖₂.
    pub update: Option<f64>,
    /// ‖ΔW‖₂ over the matrix's own learning rate in this step.
    pub update_over_eta: Option<f64>,
    /// ‖ΔW‖₂/‖W‖₂, W after the step.
    pub update_over_w: Option<f64>,
}

/// final.json: the outcome of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// Nats per token.
    pub val_loss: f64,
    /// Null where files of tokens do not say what text they are of.
    pub val_bits_per_byte: Option<f64>,
    /// Trained numbers.
    pub params: usize,
    pub tokens: u64,
    pub seconds: f64,
    pub tokens_per_second: f64,
    /// Absent where the system does not tell.
    pub peak_memory_mib: Option<f64>,
    pub steps: usize,
    /// FLOPs of the whole training, as flops.rs counts them.
    pub train_flops: f64,
    /// The largest over all matrices and all steps with telemetry, ‖ΔW‖₂/‖W‖₂ and ‖ΔW‖₂ over the learning rate; null without.
    pub max_update_over_w: Option<f64>,
    pub max_update_over_eta: Option<f64>,
    pub method: Method,
    pub seed: u64,
}

/// What final.json says, read tolerantly: one of an older version has fewer fields. Units as in [`Summary`].
#[derive(Default, Deserialize)]
pub struct Outcome {
    pub val_loss: Option<f64>,
    pub val_bits_per_byte: Option<f64>,
    pub params: Option<u64>,
    pub train_flops: Option<f64>,
}

impl Outcome {
    /// None where there is no such file: the run has not ended.
    ///
    /// # Errors
    /// A file that cannot be read or is not JSON.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        read_json(path)
    }
}

/// diverged.json: where a loss or gradient was not finite.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Diverged {
    pub step: u64,
    pub reason: String,
}

impl Diverged {
    fn path(directory: &Path) -> PathBuf {
        directory.join("diverged.json")
    }

    /// None: it did not diverge, or not yet.
    ///
    /// # Errors
    /// A file that cannot be read or is no record of this program.
    pub fn read(directory: &Path) -> Result<Option<Self>> {
        read_json(&Self::path(directory))
    }
}

/// The value of a JSON file, if there is one.
///
/// # Errors
/// A file that cannot be read or says something else.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = fs::read(path).map_err(cannot("read", path))?;
    serde_json::from_slice(&bytes).map(Some).map_err(cannot("use", path))
}

/// An open run directory.
pub struct Run {
    pub directory: PathBuf,
    metrics: File,
    /// The same records for TensorBoard.
    events: Option<Events>,
    _claim: Claim,
}

fn claim_run(directory: &Path) -> Result<Claim> {
    claim(directory, "another rankgrad is training there; wait for it, or stop it")
}

impl Run {
    /// Makes the directory (`config.out`, or the next free `runs/METHOD-PRESET-NUMBER`) and records the configuration.
    ///
    /// # Errors
    /// A directory that holds a run already, cannot be written, or that another process writes to.
    pub fn create(config: &Config) -> Result<Self> {
        let directory = match &config.out {
            Some(out) => {
                fs::create_dir_all(out).map_err(cannot("make the output directory", out))?;
                out.clone()
            }
            None => next_free(Path::new("runs"), config)?,
        };
        let claim = claim_run(&directory)?;
        let theirs =
            ["config.toml", "metrics.jsonl", "final.json"].iter().find(|f| directory.join(f).exists());
        if theirs.is_some() || !checkpoint::list(&directory)?.is_empty() {
            return Err(Error::new(format!(
                "{0} already holds a run; choose another --out, or continue that run with --resume {0}",
                directory.display()
            )));
        }
        write_atomically(&directory.join("config.toml"), config.to_toml()?.as_bytes())?;
        Self::open(directory, claim)
    }

    /// Opens the directory for going on after `step`: later records, and a last line that was cut off, are dropped
    /// from metrics.jsonl, and where it diverged is forgotten.
    ///
    /// # Errors
    /// A directory that cannot be read or written, or that another process writes to; a line before the last that is no record.
    pub fn resume(directory: &Path, step: u64) -> Result<Self> {
        let claim = claim_run(directory)?;
        let path = directory.join("metrics.jsonl");
        let mut kept = Vec::new();
        if path.exists() {
            kept = read_metrics(&path)?;
            kept.retain(|record| record.step <= step);
            let lines: String = kept.iter().map(line).collect();
            write_atomically(&path, lines.as_bytes())?;
        }
        let diverged = Diverged::path(directory);
        if diverged.exists() {
            fs::remove_file(&diverged).map_err(cannot("remove", &diverged))?;
        }
        let mut run = Self::open(directory.to_owned(), claim)?;
        if tensorboard::exist(directory)? {
            run.events = Some(Events::open(directory, &kept)?);
        }
        Ok(run)
    }

    /// Writes event files for TensorBoard too; with those of before, if there are none yet.
    ///
    /// # Errors
    /// A directory that cannot be read or written.
    pub fn with_tensorboard(mut self) -> Result<Self> {
        if self.events.is_none() {
            let records = read_metrics(&self.directory.join("metrics.jsonl"))?;
            self.events = Some(Events::open(&self.directory, &records)?);
        }
        Ok(self)
    }

    fn open(directory: PathBuf, claim: Claim) -> Result<Self> {
        let path = directory.join("metrics.jsonl");
        let metrics =
            OpenOptions::new().create(true).append(true).open(&path).map_err(cannot("write", &path))?;
        Ok(Run { directory, metrics, events: None, _claim: claim })
    }

    /// Appends one line to metrics.jsonl.
    ///
    /// # Errors
    /// A full disk and the like.
    pub fn log(&mut self, record: &Record) -> Result<()> {
        // One write per line: a crash cuts off the last line at most.
        self.metrics
            .write_all(line(record).as_bytes())
            .map_err(cannot("write", &self.directory.join("metrics.jsonl")))?;
        self.events.as_mut().map_or(Ok(()), |events| events.log(record))
    }

    /// Saves a checkpoint; the records up to it reach the disk first.
    ///
    /// # Errors
    /// Those of [`Checkpoint::save`].
    pub fn save(&self, checkpoint: &Checkpoint) -> Result<PathBuf> {
        self.metrics.sync_all().map_err(cannot("write", &self.directory.join("metrics.jsonl")))?;
        checkpoint.save(&self.directory, checkpoint.meta.config.keep)
    }

    /// The largest ‖ΔW‖₂/‖W‖₂, and ‖ΔW‖₂ over the learning rate, of all matrices in all records so far.
    ///
    /// # Errors
    /// Those of [`read_metrics`].
    pub fn largest_updates(&self) -> Result<[Option<f64>; 2]> {
        let records = read_metrics(&self.directory.join("metrics.jsonl"))?;
        let matrices = || {
            let pairs = records.iter().flat_map(|r| r.telemetry.pairs.values().map(|pair| &pair.w));
            pairs.chain(records.iter().flat_map(|r| r.telemetry.hidden.values()))
        };
        let over_w = matrices().filter_map(|w| w.update_over_w).reduce(f64::max);
        Ok([over_w, matrices().filter_map(|w| w.update_over_eta).reduce(f64::max)])
    }

    /// Writes final.json.
    ///
    /// # Errors
    /// A full disk and the like.
    pub fn finish(&mut self, summary: &Summary) -> Result<()> {
        if let Some(events) = &mut self.events {
            let bits = ("final/validation_bits_per_byte".to_owned(), summary.val_bits_per_byte);
            let scalars = [("final/validation_loss".to_owned(), Some(summary.val_loss)), bits];
            events.scalars(summary.steps as u64, &scalars)?;
        }
        write_json(&self.directory.join("final.json"), summary)
    }

    /// Writes diverged.json.
    ///
    /// # Errors
    /// A full disk and the like.
    pub fn diverged(&self, diverged: &Diverged) -> Result<()> {
        write_json(&Diverged::path(&self.directory), diverged)
    }
}

fn line(record: &Record) -> String {
    serde_json::to_string(record).expect("plain values") + "\n"
}

/// The records of a metrics.jsonl, less a last line that was cut off.
///
/// # Errors
/// An unreadable file; a line before the last that is no record.
pub fn read_metrics(path: &Path) -> Result<Vec<Record>> {
    // Bytes: a line may have been cut off within a character, or hold anything after a power failure.
    let bytes = fs::read(path).map_err(cannot("read", path))?;
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1);
    let parse = |(i, line): (usize, &[u8])| {
        serde_json::from_slice(line).map_err(|e| {
            Error::new(format!("{} line {} is no record ({e}); remove that line", path.display(), i + 1))
        })
    };
    bytes[..whole].split_inclusive(|&b| b == b'\n').enumerate().map(parse).collect()
}

/// `create_dir` decides who gets a number when two runs start at once.
fn next_free(parent: &Path, config: &Config) -> Result<PathBuf> {
    fs::create_dir_all(parent).map_err(cannot("make the output directory", parent))?;
    for number in 1.. {
        let directory = parent.join(format!("{}-{}-{number:03}", name(config.method), name(config.preset)));
        match fs::create_dir(&directory) {
            Ok(()) => return Ok(directory),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(cannot("make the output directory", &directory)(e)),
        }
    }
    unreachable!("numbers do not end")
}

/// Largest resident memory of this process so far, in MiB, where the system tells (Linux).
pub fn peak_memory_mib() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;

    fn config(out: Option<PathBuf>) -> Config {
        Config { out, ..Overrides::default().resolve().unwrap() }
    }

    fn record(step: u64) -> Record {
        let loss = Some(1.0 / step as f64);
        let (tokens, seconds) = (step * 768, 0.1 * step as f64);
        let val_loss = step.is_multiple_of(2).then_some(2.5);
        let (some, none) = (Some(0.1 * step as f64), None);
        let w = MatrixRecord {
            sigma_w: some,
            stable_rank: some,
            update: some,
            update_over_eta: none,
            update_over_w: none,
        };
        let pair =
            PairRecord { sigma_a: some, sigma_b: none, gauge_imbalance: some, w, rho: none, shrink: some };
        let mut telemetry = Telemetry::default();
        if step == 2 {
            telemetry.pairs.insert("blocks.0.q".into(), pair);
            telemetry.hidden.insert("blocks.0.q.guide".into(), w);
        }
        Record {
            step,
            loss,
            val_loss,
            lr: 0.1,
            grad_norm: Some(0.3),
            tokens,
            seconds,
            tokens_per_second: 7680.0,
            telemetry,
        }
    }

    fn refusal(out: PathBuf) -> String {
        Run::create(&config(Some(out))).err().unwrap().to_string()
    }

    #[test]
    fn a_directory_holds_one_run() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/b");
        let run = Run::create(&config(Some(out.clone()))).unwrap();
        let recorded = Overrides::from_file(&out.join("config.toml")).unwrap().resolve().unwrap();
        assert_eq!(recorded, config(None));
        drop(run);
        assert!(refusal(out.clone()).contains(&format!(
            "holds a run; choose another --out, or continue that run with --resume {}",
            out.display()
        )));
        fs::remove_file(out.join("config.toml")).unwrap();
        fs::remove_file(out.join("metrics.jsonl")).unwrap();
        fs::write(out.join("step-00000001.safetensors"), "").unwrap();
        assert!(refusal(out).contains("holds a run"));
    }

    #[test]
    #[cfg(unix)]
    fn two_processes_do_not_write_to_one_directory() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::create(&config(Some(dir.path().to_owned()))).unwrap();
        let in_use = format!("{} is in use: another rankgrad is training there", dir.path().display());
        let error = Run::resume(dir.path(), 0).err().unwrap().to_string();
        assert!(error.starts_with(&in_use) && refusal(dir.path().to_owned()).starts_with(&in_use), "{error}");
        drop(run);
        Run::resume(dir.path(), 0).unwrap();
    }

    #[test]
    fn an_impossible_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(refusal(file.join("out")).starts_with("cannot make the output directory "));
        assert!(refusal("/proc/rankgrad".into()).contains("/proc/rankgrad"));
    }

    #[test]
    fn runs_are_numbered() {
        let dir = tempfile::tempdir().unwrap();
        assert!(next_free(dir.path(), &config(None)).unwrap().ends_with("spectron-tiny-001"));
        assert!(next_free(dir.path(), &config(None)).unwrap().ends_with("spectron-tiny-002"));
    }

    #[test]
    fn a_resumed_run_has_each_record_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut run = Run::create(&config(Some(dir.path().to_owned()))).unwrap();
        (1..=4).for_each(|step| run.log(&record(step)).unwrap());
        run.metrics.write_all(&b"{\"step\": 5, \"lo\xc3"[..]).unwrap();
        run.diverged(&Diverged { step: 5, reason: "the loss is not finite".into() }).unwrap();
        drop(run);
        assert_eq!(Diverged::read(dir.path()).unwrap().map(|d| d.step), Some(5));
        let mut run = Run::resume(dir.path(), 2).unwrap();
        assert!(Diverged::read(dir.path()).unwrap().is_none());
        run.log(&record(3)).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), [record(1), record(2), record(3)]);
        fs::write(&path, "{}\n").unwrap();
        let error = read_metrics(&path).unwrap_err().to_string();
        assert!(
            error.contains("line 1 is no record (missing field `step`") && error.contains("remove"),
            "{error}"
        );
    }

    #[test]
    fn a_loss_that_is_not_finite_is_null() {
        let text = line(&Record { loss: Some(f64::NAN), ..record(1) });
        assert!(text.contains("\"loss\":null"), "{text}");
        assert!(!text.contains("pairs") && !text.contains("hidden"), "{text}");
    }

    #[test]
    fn the_outcome_is_written_as_json() {
        let dir = tempfile::tempdir().unwrap();
        let mut run = Run::create(&config(Some(dir.path().to_owned()))).unwrap();
        let summary = Summary {
            val_loss: 1.7,
            val_bits_per_byte: Some(2.45),
            params: 10,
            tokens: 768,
            seconds: 1.5,
            tokens_per_second: 512.0,
            peak_memory_mib: peak_memory_mib(),
            steps: 1,
            train_flops: 1e9,
            max_update_over_w: None,
            max_update_over_eta: Some(0.9),
            method: Method::DenseAdamw,
            seed: 1,
        };
        run.finish(&summary).unwrap();
        let json: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.path().join("final.json")).unwrap()).unwrap();
        assert_eq!((json["method"].as_str(), json["val_loss"].as_f64()), (Some("dense-adamw"), Some(1.7)));
        #[cfg(target_os = "linux")]
        assert!(json["peak_memory_mib"].as_f64().unwrap() > 1.0);
    }
}
