//! Every value of a training run, and where it comes from: preset < TOML file < flags.
//!
//! `Overrides` is what a file or the command line may say (all optional; the doc comments are the `--help` texts).
//! `Config` is the outcome, every value concrete and checked; the run directory and each checkpoint record it.
//! Not here: what the values do. d = dim, η = learning rate of the factor pairs, β = a decay of a moving average.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use rankgrad::tensor::Cpu;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::Table;

use crate::error::{Error, Result, cannot};
use crate::methods::{Entry, Family, Matrices, entry};
use crate::model::matrices;
use crate::tokens::Tokenizer;

/// Sizes of the model, and of the batches that go with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// 4 layers, d 128, 4 heads, ffn 352, context 64, batch 12
    Tiny,
    /// 6 layers, d 384, 6 heads, ffn 1024, context 256, batch 8
    Small,
    /// 12 layers, d 768, 12 heads, ffn 2048, context 512, batch 2, vocabulary 4096
    Mid,
}

/// What the weights of the blocks are, and what trains them. All else is dense and trained by AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// factor pairs, trained by Spectron
    Spectron,
    /// factor pairs, trained by Spectron with the largest radius that its bound allows
    SpectronExact,
    /// factor pairs, trained by Spectron with every step proven to keep to ‖ΔW‖ ≤ η
    SpectronCertified,
    /// the same with the largest radius that its bound allows
    SpectronExactCertified,
    /// factor pairs, each factor trained by AdamW
    Adamw,
    /// factor pairs, each factor trained by Muon (Spectron without renormalisation)
    MuonFactors,
    /// factor pairs, trained by Spectron without orthogonalisation
    Renormalised,
    /// factor pairs, trained by momentum: Spectron without either
    MomentumFactors,
    /// factor pairs, trained by LoRA-Muon: Muon's step for W, taken in the factors
    LoraMuon,
    /// factor pairs with dense guides in the first half, all trained by AdamW
    SelfGuided,
    /// the same, skipping a guide with probability 1 − α
    SelfGuidedCheap,
    /// dense matrices, trained by AdamW
    DenseAdamw,
    /// dense matrices, trained by Muon
    DenseMuon,
}

/// A factor on the learning rate of each of the blocks' matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LrScale {
    /// one rate for all
    Uniform,
    /// √(max(outputs, inputs) / d)
    Shape,
}

/// The shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// stays at its peak
    Constant,
    /// half a cosine down to the final fraction
    Cosine,
    /// a straight line down to the final fraction
    Linear,
    /// warm-up, stable, decay: the peak, then a straight line at the end
    Wsd,
}

/// How telemetry finds spectral norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Telemetry {
    /// estimates from below, usually within 0.1 %
    Fast,
    /// decompositions, to rounding: slow
    Exact,
}

/// How a factor pair starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Init {
    /// truncated SVD of an ordinary dense initialisation, √Σ into each factor
    Spectral,
    /// factors with orthonormal columns, scaled
    Orthogonal,
}

/// What a training step computes in. Weights, their gradients' sum and the rest of the optimizer are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// single precision
    #[default]
    F32,
    /// forward and backward in bfloat16, on GPUs
    Bf16,
    /// Newton–Schulz too, as is usual for Muon
    Bf16NewtonSchulz,
}

/// The name of an enum's value as flags and files spell it.
pub fn name<E: ValueEnum>(value: E) -> String {
    value.to_possible_value().expect("no value is skipped").get_name().to_owned()
}

/// What `train` and `bench` both take. Absent values come from the preset, the method or a fixed default.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Model")]
pub struct ModelOptions {
    /// Sizes to start from [default: tiny]
    #[arg(long)]
    pub preset: Option<Preset>,
    /// Weights of the blocks and their optimizer [default: spectron]
    #[arg(long)]
    pub method: Option<Method>,
    /// Sequences per micro-batch [default: by preset]
    #[arg(long)]
    pub batch: Option<usize>,
    /// Tokens per sequence [default: by preset]
    #[arg(long)]
    pub context: Option<usize>,
    /// Width d of the residual stream [default: by preset]
    #[arg(long)]
    pub dim: Option<usize>,
    /// Number of blocks [default: by preset]
    #[arg(long)]
    pub layers: Option<usize>,
    /// Query heads; must divide --dim [default: by preset]
    #[arg(long)]
    pub heads: Option<usize>,
    /// Key/value heads; must divide --heads [default: as --heads]
    #[arg(long)]
    pub kv_heads: Option<usize>,
    /// Hidden width of the feed-forward part [default: by preset]
    #[arg(long)]
    pub ffn: Option<usize>,
    /// Number of token ids, at least the 256 bytes [default: by preset]
    #[arg(long)]
    pub vocab: Option<usize>,
    /// Share one matrix between embedding and head
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub tie: Option<bool>,
    /// Rank of a factor pair as a part of min(inputs, outputs), in (0, 1] [default: 0.25]
    #[arg(long)]
    pub rank_ratio: Option<f64>,
    /// How factor pairs start [default: spectral]
    #[arg(long)]
    pub init: Option<Init>,
    /// Standard deviation of dense initialisations [default: 0.02]
    #[arg(long)]
    pub init_std: Option<f64>,
    /// Start the matrices that write to the residual stream (attention output, ffn down) at zero
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub zero_init_output: Option<bool>,
    /// Micro-batches whose gradients are averaged into one step [default: 1]
    #[arg(long, help_heading = "Training")]
    pub accumulate: Option<usize>,
    /// What forward and backward compute in, and Newton–Schulz; weights, gradients' sums and the rest of the optimizer stay f32
    /// [default: f32]
    #[arg(long, help_heading = "Training")]
    pub precision: Option<Precision>,
    /// Seed of the initialisation and of the data order [default: 1]
    #[arg(long, help_heading = "Training")]
    pub seed: Option<u64>,
    /// Worker threads; 0 = all cores. The result does not depend on it [default: 0]
    #[arg(long, help_heading = "Training")]
    pub threads: Option<usize>,
}

/// What only `train` takes.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Training")]
pub struct TrainingOptions {
    /// Files or directories of text: first 90 % training, last 10 % validation. Or token files, as of `rankgrad data pack`: val-*.bin
    /// are validated on [default: the Rust sources of crates that this program is built from]
    #[arg(long, num_args = 1.., value_name = "FILE_OR_DIR")]
    pub data: Option<Vec<PathBuf>>,
    /// Files or directories to validate on; all of --data is then to train on [default: the last 10 % of --data]
    #[arg(long, num_args = 1.., value_name = "FILE_OR_DIR")]
    pub val_data: Option<Vec<PathBuf>>,
    /// A tokenizer.json, such as Hugging Face's or one of `rankgrad tokenizer train`; every checkpoint keeps a copy. --vocab is then
    /// the tokenizer's [default: bytes are tokens]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Optimizer steps [default: 2000]
    #[arg(long)]
    pub steps: Option<usize>,
    /// Peak learning rate: η of the factor pairs, or that of the blocks' dense matrices
    /// [default: by method; the run's config.toml has it]
    #[arg(long)]
    pub lr: Option<f64>,
    /// Peak learning rate of everything else [default: by method]
    #[arg(long)]
    pub adam_lr: Option<f64>,
    /// Factor on --lr by the shape of a matrix [default: uniform]
    #[arg(long)]
    pub lr_scale: Option<LrScale>,
    /// Learning rate after the warm-up [default: cosine]
    #[arg(long)]
    pub schedule: Option<Schedule>,
    /// Steps of linear warm-up [default: 5 % of --steps]
    #[arg(long)]
    pub warmup: Option<usize>,
    /// Where the schedule ends, as a part of the peak, in [0, 1] [default: 0.1]
    #[arg(long)]
    pub final_lr_fraction: Option<f64>,
    /// Decoupled weight decay, of W itself where W is a factor pair [default: 0]
    #[arg(long)]
    pub weight_decay: Option<f64>,
    /// Largest global gradient norm; 0 = no clipping [default: 1]
    #[arg(long)]
    pub clip: Option<f64>,
    /// Momentum β of every method but AdamW's, in [0, 1) [default: 0.95]
    #[arg(long)]
    pub momentum: Option<f64>,
    /// Nesterov's look-ahead on that momentum; AdamW has none [default: true]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub nesterov: Option<bool>,
    /// Spectron's: balance every pair (AᵀA = BᵀB, W unchanged) before every so many steps; 0 = never [default: 0]
    #[arg(long, value_name = "STEPS")]
    pub balance_every: Option<usize>,
    /// AdamW's decay of the gradient's mean, in [0, 1) [default: 0.9]
    #[arg(long)]
    pub beta1: Option<f64>,
    /// AdamW's decay of the gradient's square, in [0, 1) [default: 0.99]
    #[arg(long)]
    pub beta2: Option<f64>,
    /// Directory of the run, new or without a run in it [default: runs/METHOD-PRESET-NUMBER]
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub out: Option<PathBuf>,
    /// Steps between validations; 0 = only at the end [default: 250]
    #[arg(long, help_heading = "Output")]
    pub eval_every: Option<usize>,
    /// Batches per validation during training; 0 = the whole validation split [default: 50]
    #[arg(long, help_heading = "Output")]
    pub eval_batches: Option<usize>,
    /// Steps between the records of metrics.jsonl [default: 10]
    #[arg(long, help_heading = "Output")]
    pub log_every: Option<usize>,
    /// Steps between the records that have norms of the blocks' matrices and of their change; 0 = never [default: 100]
    #[arg(long, help_heading = "Output")]
    pub telemetry_every: Option<usize>,
    /// How those norms are found [default: fast]
    #[arg(long, help_heading = "Output")]
    pub telemetry: Option<Telemetry>,
    /// Steps between checkpoints; 0 = only at the end [default: 500]
    #[arg(long, help_heading = "Output")]
    pub checkpoint_every: Option<usize>,
    /// Newest checkpoints kept; 0 = all [default: 3]
    #[arg(long, help_heading = "Output")]
    pub keep: Option<usize>,
}

/// What no flag says: properties of a model that came from elsewhere (`import`, `rank`). A recorded configuration has those that
/// are not the default.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ShapeOptions {
    pub rope_base: Option<f64>,
    pub norm_eps: Option<f64>,
    pub ranks: Option<BTreeMap<String, usize>>,
}

/// The keys of `ShapeOptions`.
const SHAPE: [&str; 3] = ["rope_base", "norm_eps", "ranks"];

/// The values that a file or the command line gives.
#[derive(Args, Clone, Debug, Default)]
pub struct Overrides {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub training: TrainingOptions,
    #[arg(skip)]
    pub shape: ShapeOptions,
}

/// Every value of a run, concrete and checked. The field docs are those of `ModelOptions` and `TrainingOptions`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub preset: Preset,
    pub method: Method,
    pub batch: usize,
    pub context: usize,
    pub dim: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub ffn: usize,
    pub vocab: usize,
    pub tie: bool,
    pub rank_ratio: f64,
    pub init: Init,
    pub init_std: f64,
    pub zero_init_output: bool,
    pub accumulate: usize,
    #[serde(default)]
    pub precision: Precision,
    pub seed: u64,
    pub threads: usize,
    /// Absolute paths; empty: the embedded default.
    pub data: Vec<PathBuf>,
    /// Absolute paths; empty: the last 10 % of `data`.
    pub val_data: Vec<PathBuf>,
    /// Absolute; None: bytes are tokens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tokenizer: Option<PathBuf>,
    pub steps: usize,
    pub lr: f64,
    pub adam_lr: f64,
    pub lr_scale: LrScale,
    pub schedule: Schedule,
    pub warmup: usize,
    pub final_lr_fraction: f64,
    pub weight_decay: f64,
    pub clip: f64,
    pub momentum: f64,
    pub nesterov: bool,
    pub balance_every: usize,
    pub beta1: f64,
    pub beta2: f64,
    /// None: a new directory under `runs/`. Not recorded, so that a run's config.toml can start another run.
    #[serde(skip_serializing, default)]
    pub out: Option<PathBuf>,
    pub eval_every: usize,
    pub eval_batches: usize,
    pub log_every: usize,
    pub telemetry_every: usize,
    pub telemetry: Telemetry,
    pub checkpoint_every: usize,
    pub keep: usize,
    /// Base of the rotary positions' angles.
    #[serde(default = "rope_base", skip_serializing_if = "is_rope_base")]
    pub rope_base: f64,
    /// Added to the mean square in RMSNorm.
    #[serde(default = "norm_eps", skip_serializing_if = "is_norm_eps")]
    pub norm_eps: f64,
    /// Ranks of pairs by their name, such as `blocks.0.q`; `rank_ratio` is for the others.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ranks: BTreeMap<String, usize>,
}

fn rope_base() -> f64 {
    10_000.0
}

fn is_rope_base(x: &f64) -> bool {
    *x == rope_base()
}

fn norm_eps() -> f64 {
    1e-5
}

fn is_norm_eps(x: &f64) -> bool {
    *x == norm_eps()
}

/// What `--from` takes from the checkpoint, beside the keys of `ShapeOptions`: flags may only repeat it.
const FROM_CHECKPOINT: [&str; 9] =
    ["preset", "dim", "layers", "heads", "kv_heads", "ffn", "vocab", "tie", "rank_ratio"];

/// What `--resume` lets change, because the weights at a given step do not depend on it. `data` may have moved:
/// whoever resumes compares the corpus' hash.
const FREE_ON_RESUME: [&str; 10] = [
    "threads",
    "data",
    "val_data",
    "eval_every",
    "eval_batches",
    "log_every",
    "telemetry_every",
    "telemetry",
    "checkpoint_every",
    "keep",
];

/// The paths, whatever the current directory will be.
///
/// # Errors
/// An empty path, or no current directory.
pub fn absolute(paths: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    paths.iter().map(|p| std::path::absolute(p).map_err(cannot("find the data", p))).collect()
}

/// Whether the blocks' matrices are factor pairs.
fn factored(method: Method) -> bool {
    !matches!(entry::<Cpu<f32>>(method).matrices, Matrices::Dense(_))
}

impl Overrides {
    /// The flags given here that do nothing under this method.
    pub fn without_effect(&self, method: Method) -> Vec<&'static str> {
        let (model, training) = (&self.model, &self.training);
        let (dense, family) = (!factored(method), Family::of(method));
        let (adamw, spectron) = (family == Family::AdamW, family.is_spectron());
        let unused = [
            (model.rank_ratio.is_some() && dense, "--rank-ratio"),
            (model.init.is_some() && dense, "--init"),
            (training.momentum.is_some() && adamw, "--momentum"),
            (training.nesterov.is_some() && adamw, "--nesterov"),
            (training.balance_every.is_some() && !spectron, "--balance-every"),
        ];
        unused.into_iter().filter(|(unused, _)| *unused).map(|(_, flag)| flag).collect()
    }

    /// Reads a TOML file of `key = value` lines; the keys are the long flags with `_` for `-`.
    ///
    /// # Errors
    /// An unreadable file, a syntax error or wrong type (with its line), an unknown key or name (with the nearest one).
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(cannot("read the configuration", path))?;
        Self::from_toml(&text).map_err(|e| Error::new(format!("configuration {}: {e}", path.display())))
    }

    /// Reads the text of such a file.
    ///
    /// # Errors
    /// As [`Overrides::from_file`], but for reading.
    pub fn from_toml(text: &str) -> Result<Self> {
        let toml_error = |e: toml::de::Error| Error::new(e.to_string());
        let table: Table = toml::from_str(text).map_err(toml_error)?;
        let known = Self::augment_args(clap::Command::new(""));
        let known: Vec<&str> = known.get_arguments().map(|a| a.get_id().as_str()).collect();
        if let Some(key) = table.keys().find(|k| !known.contains(&k.as_str()) && !SHAPE.contains(&k.as_str()))
        {
            return Err(Error::new(format!("unknown key `{key}`{}", suggestion(key, &known))));
        }
        check_name::<Preset>(&table, "preset")?;
        check_name::<Method>(&table, "method")?;
        check_name::<Schedule>(&table, "schedule")?;
        check_name::<Init>(&table, "init")?;
        check_name::<Precision>(&table, "precision")?;
        check_name::<LrScale>(&table, "lr_scale")?;
        check_name::<Telemetry>(&table, "telemetry")?;
        Ok(Overrides {
            model: toml::from_str(text).map_err(toml_error)?,
            training: toml::from_str(text).map_err(toml_error)?,
            shape: toml::from_str(text).map_err(toml_error)?,
        })
    }

    /// These values over those of the file, if there is one.
    ///
    /// # Errors
    /// Those of [`Overrides::from_file`].
    pub fn over_file(&self, path: Option<&Path>) -> Result<Self> {
        match path {
            Some(path) => self.over(&Self::from_file(path)?),
            None => Ok(self.clone()),
        }
    }

    /// These values, and those of `base` where there are none here.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn over(&self, base: &Overrides) -> Result<Self> {
        Ok(Overrides {
            model: merge(&base.model, &self.model)?,
            training: merge(&base.training, &self.training)?,
            shape: merge(&base.shape, &self.shape)?,
        })
    }

    /// The tokenizer that was asked for, and these values with its vocabulary, unless another is given.
    ///
    /// # Errors
    /// A tokenizer that cannot be read; a vocabulary that is too small for it.
    pub fn with_tokenizer(mut self) -> Result<(Self, Tokenizer)> {
        let tokenizer = Tokenizer::open(self.training.tokenizer.as_deref())?;
        if tokenizer.json().is_some() {
            let vocab = *self.model.vocab.get_or_insert(tokenizer.vocab().max(256));
            if vocab < tokenizer.vocab() {
                return Err(Error::new(format!(
                    "vocab is {vocab}, fewer than the tokens of {}; leave it out, or give more",
                    tokenizer.name()
                )));
            }
        }
        Ok((self, tokenizer))
    }

    /// Fills in preset and defaults, and checks the outcome.
    ///
    /// # Errors
    /// A value that is out of range or does not fit another, with what would fit.
    pub fn resolve(self) -> Result<Config> {
        let Overrides { model: m, training: t, shape: s } = self;
        let preset = m.preset.unwrap_or(Preset::Tiny);
        let (layers, dim, heads, ffn, context, batch, vocab) = match preset {
            Preset::Tiny => (4, 128, 4, 352, 64, 12, 256),
            Preset::Small => (6, 384, 6, 1024, 256, 8, 256),
            Preset::Mid => (12, 768, 12, 2048, 512, 2, 4096),
        };
        let method = m.method.unwrap_or(Method::Spectron);
        let Entry { lr, adam_lr, .. } = entry::<Cpu<f32>>(method);
        let heads = m.heads.unwrap_or(heads);
        let steps = t.steps.unwrap_or(2000);
        let config = Config {
            preset,
            method,
            batch: m.batch.unwrap_or(batch),
            context: m.context.unwrap_or(context),
            dim: m.dim.unwrap_or(dim),
            layers: m.layers.unwrap_or(layers),
            heads,
            kv_heads: m.kv_heads.unwrap_or(heads),
            ffn: m.ffn.unwrap_or(ffn),
            vocab: m.vocab.unwrap_or(vocab),
            tie: m.tie.unwrap_or(false),
            rank_ratio: m.rank_ratio.unwrap_or(0.25),
            init: m.init.unwrap_or(Init::Spectral),
            init_std: m.init_std.unwrap_or(0.02),
            zero_init_output: m.zero_init_output.unwrap_or(false),
            accumulate: m.accumulate.unwrap_or(1),
            precision: m.precision.unwrap_or_default(),
            seed: m.seed.unwrap_or(1),
            threads: m.threads.unwrap_or(0),
            data: absolute(t.data.unwrap_or_default())?,
            val_data: absolute(t.val_data.unwrap_or_default())?,
            tokenizer: absolute(t.tokenizer.into_iter().collect())?.pop(),
            steps,
            lr: t.lr.unwrap_or(lr),
            adam_lr: t.adam_lr.unwrap_or(adam_lr),
            lr_scale: t.lr_scale.unwrap_or(LrScale::Uniform),
            schedule: t.schedule.unwrap_or(Schedule::Cosine),
            warmup: t.warmup.unwrap_or(steps / 20),
            final_lr_fraction: t.final_lr_fraction.unwrap_or(0.1),
            weight_decay: t.weight_decay.unwrap_or(0.0),
            clip: t.clip.unwrap_or(1.0),
            momentum: t.momentum.unwrap_or(0.95),
            nesterov: t.nesterov.unwrap_or(true),
            balance_every: t.balance_every.unwrap_or(0),
            beta1: t.beta1.unwrap_or(0.9),
            beta2: t.beta2.unwrap_or(0.99),
            out: t.out,
            eval_every: t.eval_every.unwrap_or(250),
            eval_batches: t.eval_batches.unwrap_or(50),
            log_every: t.log_every.unwrap_or(10),
            telemetry_every: t.telemetry_every.unwrap_or(100),
            telemetry: t.telemetry.unwrap_or(Telemetry::Fast),
            checkpoint_every: t.checkpoint_every.unwrap_or(500),
            keep: t.keep.unwrap_or(3),
            rope_base: s.rope_base.unwrap_or_else(rope_base),
            norm_eps: s.norm_eps.unwrap_or_else(norm_eps),
            ranks: s.ranks.unwrap_or_default(),
        };
        config.check()?;
        Ok(config)
    }
}

impl Config {
    /// The configuration as TOML, readable again by `--config`.
    ///
    /// # Errors
    /// A data path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::new(format!("cannot record the configuration: {e}")))
    }

    /// This configuration with the values of `asked` that a resumed run may change.
    ///
    /// # Errors
    /// A value that differs from the recorded one and would make the continuation another run.
    pub fn resumed_with(&self, asked: &Overrides) -> Result<Config> {
        if asked.training.out.is_some() {
            return Err(Error::new("`out` cannot go with --resume: the run stays in its directory"));
        }
        let recorded = table(self)?;
        let config = asked.over(&Overrides::from_toml(&self.to_toml()?)?)?.resolve()?;
        for (key, value) in table(&config)? {
            if value != recorded[&key] && !FREE_ON_RESUME.contains(&key.as_str()) {
                return Err(Error::new(format!(
                    "--resume continues a run with its own values: `{key}` is {} there, {value} was asked for; \
                     leave it out, or start a new run (from its weights: --from)",
                    recorded[&key]
                )));
            }
        }
        Ok(config)
    }

    /// The configuration of a new run that starts from the weights of a checkpoint with this one: its shape, the rest as `asked`.
    /// Context and method are the checkpoint's too where nothing else is asked for.
    ///
    /// # Errors
    /// A value that contradicts the shape; a method for pairs where the checkpoint has whole matrices, or the other way round.
    pub fn begun_with(&self, asked: &Overrides) -> Result<Config> {
        let mut recorded = table(self)?;
        recorded.retain(|key, _| FROM_CHECKPOINT.contains(&key) || SHAPE.contains(&key) || key == "context");
        let base = Overrides::from_toml(&recorded.to_string())?;
        let mut asked = asked.over(&base)?;
        let method = *asked.model.method.get_or_insert(self.method);
        let config = asked.resolve()?;
        let (ours, now) = (table(self)?, table(&config)?);
        for key in FROM_CHECKPOINT.iter().chain(&SHAPE) {
            if ours.get(*key) != now.get(*key) {
                let show =
                    |table: &Table| table.get(*key).map_or("the default".into(), toml::Value::to_string);
                return Err(Error::new(format!(
                    "--from starts from a model whose `{key}` is {}, {} was asked for; leave it out",
                    show(&ours),
                    show(&now)
                )));
            }
        }
        let (asked, there) = (name(method), name(self.method));
        match (config.factored(), self.factored()) {
            (true, false) => Err(Error::new(format!(
                "--from: the checkpoint's matrices are whole ({there}), --method {asked} trains factor pairs; \
                 make pairs of them first with `rankgrad rank`, or take a dense method"
            ))),
            (false, true) => Err(Error::new(format!(
                "--from: the checkpoint's matrices are factor pairs ({there}), --method {asked} trains whole ones; \
                 multiply them out first with `rankgrad merge`, or take a method for pairs"
            ))),
            _ => Ok(config),
        }
    }

    /// Whether the blocks' matrices are factor pairs.
    pub fn factored(&self) -> bool {
        factored(self.method)
    }

    /// Rank of the factors of the m×n matrix of this name.
    pub fn rank(&self, name: &str, [m, n]: [usize; 2]) -> usize {
        let by_ratio = || (self.rank_ratio * m.min(n) as f64).floor() as usize;
        self.ranks.get(name).copied().unwrap_or_else(by_ratio)
    }

    /// Whether a model can be made of these values.
    ///
    /// # Errors
    /// A value that is out of range or does not fit another, with what would fit.
    pub fn check(&self) -> Result<()> {
        let fail = |message: String| Err(Error::new(message));
        let certified = Family::of(self.method) == Family::Certified;
        if certified && self.precision == Precision::Bf16NewtonSchulz {
            return fail(format!(
                "{} keeps its bound with Newton–Schulz in f32: take precision bf16",
                name(self.method)
            ));
        }
        for (key, value) in [
            ("steps", self.steps),
            ("batch", self.batch),
            ("context", self.context),
            ("dim", self.dim),
            ("layers", self.layers),
            ("heads", self.heads),
            ("kv-heads", self.kv_heads),
            ("ffn", self.ffn),
            ("accumulate", self.accumulate),
            ("log-every", self.log_every),
        ] {
            if value == 0 {
                return fail(format!("{key} is 0: it must be at least 1"));
            }
        }
        for (key, value) in [
            ("lr", self.lr),
            ("adam-lr", self.adam_lr),
            ("weight-decay", self.weight_decay),
            ("clip", self.clip),
            ("init-std", self.init_std),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return fail(format!("{key} is {value}: it must be finite and not negative"));
            }
        }
        for (key, value) in [("momentum", self.momentum), ("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return fail(format!("{key} is {value}: it must be in [0, 1)"));
            }
        }
        if !(0.0..=1.0).contains(&self.final_lr_fraction) {
            return fail(format!("final-lr-fraction is {}: it must be in [0, 1]", self.final_lr_fraction));
        }
        if !(self.rank_ratio > 0.0 && self.rank_ratio <= 1.0) {
            return fail(format!("rank-ratio is {}: it must be in (0, 1]; 0.25 is usual", self.rank_ratio));
        }
        let Config { dim, heads, kv_heads, .. } = *self;
        if dim % heads != 0 {
            return fail(format!(
                "heads is {heads}, which does not divide dim = {dim}; {}",
                divisors(dim, heads)
            ));
        }
        if heads % kv_heads != 0 {
            let fits = divisors(heads, kv_heads);
            return fail(format!("kv-heads is {kv_heads}, which does not divide heads = {heads}; {fits}"));
        }
        let head = dim / heads;
        if head % 2 != 0 {
            return fail(format!(
                "dim = {dim} over heads = {heads} makes heads of odd size {head}, but rotary positions turn pairs of \
                 coordinates; use a dim that is a multiple of {}",
                2 * heads
            ));
        }
        let narrowest = dim.min(self.ffn).min(kv_heads * head);
        if self.factored() && (self.rank_ratio * narrowest as f64) < 1.0 {
            return fail(format!(
                "rank-ratio = {} of the narrowest matrix ({narrowest}) is a rank of 0; use at least {}",
                self.rank_ratio,
                1.0 / narrowest as f64
            ));
        }
        for (name, rank) in &self.ranks {
            let Some((_, [m, n])) = matrices(self).into_iter().find(|(known, _)| known == name) else {
                return fail(format!("ranks: the model has no matrix `{name}`"));
            };
            let full = m.min(n);
            if !(1..=full).contains(rank) {
                return fail(format!("ranks: that of `{name}` [{m}, {n}] is {rank}: it must be 1 to {full}"));
            }
        }
        for (key, value) in [("rope_base", self.rope_base), ("norm_eps", self.norm_eps)] {
            if !(value.is_finite() && value > 0.0) {
                return fail(format!("{key} is {value}: it must be finite and positive"));
            }
        }
        if self.vocab < 256 {
            return fail(format!(
                "vocab is {}: it must be at least 256, for every byte to be a token",
                self.vocab
            ));
        }
        if self.warmup > self.steps {
            return fail(format!("warmup = {} is longer than steps = {}", self.warmup, self.steps));
        }
        if i64::try_from(self.seed).is_err() {
            return fail(format!("seed is {}: TOML holds at most {}", self.seed, i64::MAX));
        }
        Ok(())
    }
}

/// "nearest that fit: 3, 4" around `wanted`.
fn divisors(of: usize, wanted: usize) -> String {
    let below = (1..wanted.min(of + 1)).rev().find(|d| of.is_multiple_of(*d));
    let above = (wanted + 1..=of).find(|d| of.is_multiple_of(*d));
    let fits: Vec<String> = below.into_iter().chain(above).map(|d| d.to_string()).collect();
    format!("nearest that do: {}", fits.join(", "))
}

/// "; did you mean `steps`?", or the whole list where nothing is near.
fn suggestion(word: &str, known: &[&str]) -> String {
    let near = |k: &&&str| strsim::damerau_levenshtein(word, k);
    match known.iter().min_by_key(near).filter(|k| near(k) <= 1 + k.len() / 4) {
        Some(nearest) => format!("; did you mean `{nearest}`?"),
        None => format!("; there are: {}", known.join(", ")),
    }
}

fn check_name<E: ValueEnum>(table: &Table, key: &str) -> Result<()> {
    match table.get(key).and_then(|v| v.as_str()) {
        Some(word) if E::from_str(word, false).is_err() => {
            let names: Vec<String> = E::value_variants().iter().map(|v| name(v.clone())).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            Err(Error::new(format!("unknown {key} \"{word}\"{}", suggestion(word, &names))))
        }
        _ => Ok(()),
    }
}

/// Options as keys and values; absent ones are absent.
pub fn table<T: Serialize>(options: &T) -> Result<Table> {
    Table::try_from(options).map_err(|e| Error::new(format!("configuration: {e}")))
}

/// The values of `top`, and those of `base` where there are none.
pub fn merge<T: Serialize + DeserializeOwned>(base: &T, top: &T) -> Result<T> {
    let mut both = table(base)?; // absent options are absent keys
    both.extend(table(top)?);
    both.try_into().map_err(|e| Error::new(format!("configuration: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(toml: &str) -> Result<Config> {
        Overrides::from_toml(toml)?.resolve()
    }

    #[test]
    fn defaults_follow_preset_method_and_steps() {
        let c = resolve("").unwrap();
        assert_eq!(
            (c.layers, c.dim, c.heads, c.kv_heads, c.ffn, c.context, c.batch),
            (4, 128, 4, 4, 352, 64, 12)
        );
        assert_eq!((c.lr, c.adam_lr, c.steps, c.warmup), (0.025, 4e-3, 2000, 100));
        let c = resolve("preset = \"small\"\nmethod = \"dense-adamw\"\nheads = 8\nsteps = 300").unwrap();
        assert_eq!((c.layers, c.heads, c.kv_heads, c.lr, c.warmup), (6, 8, 8, 1e-3, 15));
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = Overrides::from_toml("lr = 1\nbatch = 3\ntie = true").unwrap();
        let flags = Overrides::from_toml("lr = 0.5\ntie = false").unwrap();
        let c = flags.over(&file).unwrap().resolve().unwrap();
        assert_eq!((c.lr, c.batch, c.tie), (0.5, 3, false));
    }

    #[test]
    fn the_recorded_configuration_starts_the_same_run() {
        let c = resolve("preset = \"mid\"\nlr = 0.1\ndata = [\"x\"]\nkv_heads = 3\nseed = 7\nout = \"o\"")
            .unwrap();
        assert_eq!(resolve(&c.to_toml().unwrap()).unwrap(), Config { out: None, ..c });
    }

    #[test]
    fn bad_values_are_explained() {
        for (toml, says) in [
            ("rank_ratio = 0", "rank-ratio is 0: it must be in (0, 1]"),
            ("rank_ratio = 1.5", "rank-ratio is 1.5"),
            ("rank_ratio = nan", "rank-ratio is NaN"),
            ("rank_ratio = 0.001", "a rank of 0; use at least 0.0078125"),
            ("heads = 5", "heads is 5, which does not divide dim = 128; nearest that do: 4, 8"),
            ("kv_heads = 3", "kv-heads is 3, which does not divide heads = 4; nearest that do: 2, 4"),
            ("heads = 200", "does not divide dim = 128; nearest that do: 128"),
            ("heads = 128", "odd size 1"),
            ("steps = 0", "steps is 0: it must be at least 1"),
            ("batch = 0", "batch is 0"),
            ("context = 0", "context is 0"),
            ("lr = -1", "lr is -1: it must be finite and not negative"),
            ("adam_lr = inf", "adam-lr is inf"),
            ("warmup = 2001", "warmup = 2001 is longer than steps = 2000"),
            ("beta2 = 1.0", "beta2 is 1: it must be in [0, 1)"),
            ("vocab = 100", "at least 256"),
            ("norm_eps = 0", "norm_eps is 0: it must be finite and positive"),
            ("[ranks]\n\"blocks.4.q\" = 3", "the model has no matrix `blocks.4.q`"),
            ("[ranks]\n\"blocks.3.down\" = 129", "`blocks.3.down` [128, 352] is 129: it must be 1 to 128"),
            ("[ranks]\n\"blocks.0.q\" = 0", "is 0: it must be 1 to 128"),
            ("stepz = 3", "unknown key `stepz`; did you mean `steps`?"),
            ("rank-ratio = 0.5", "did you mean `rank_ratio`?"),
            ("quux = 3", "unknown key `quux`; there are: preset, method"),
            ("method = \"spektron\"", "unknown method \"spektron\"; did you mean `spectron`?"),
            ("telemetry = \"exakt\"", "unknown telemetry \"exakt\"; did you mean `exact`?"),
            ("preset = \"huge\"", "unknown preset \"huge\"; there are: tiny, small, mid"),
            ("\nsteps = \"many\"", "line 2"),
            ("precision = \"bf61\"", "unknown precision \"bf61\"; did you mean `bf16`?"),
            ("steps = -1", "line 1"),
            ("steps", "line 1"),
        ] {
            let error = resolve(toml).unwrap_err().to_string();
            assert!(error.contains(says), "{toml}: {error}");
        }
        let error = Overrides::from_file(Path::new("/no/such.toml")).unwrap_err().to_string();
        assert!(error.contains("/no/such.toml"), "{error}");
    }

    #[test]
    fn a_resumed_run_keeps_its_values() {
        let recorded = resolve("steps = 200\nwarmup = 3").unwrap();
        let ask = |toml| recorded.resumed_with(&Overrides::from_toml(toml).unwrap());
        assert_eq!(ask("").unwrap(), recorded);
        assert_eq!(ask("steps = 200\nthreads = 2").unwrap(), Config { threads: 2, ..recorded.clone() });
        let looked_at = Config { telemetry_every: 7, telemetry: Telemetry::Exact, ..recorded.clone() };
        assert_eq!(ask("telemetry_every = 7\ntelemetry = \"exact\"").unwrap(), looked_at);
        let error = ask("lr = 0.5").unwrap_err().to_string();
        assert!(error.contains("`lr` is 0.025 there, 0.5 was asked for"), "{error}");
        assert!(
            ask("out = \"elsewhere\"").unwrap_err().to_string().contains("`out` cannot go with --resume")
        );
    }

    #[test]
    fn a_run_from_a_checkpoint_has_its_shape() {
        let recorded = resolve(
            "dim = 64\ncontext = 32\nlr = 0.5\nsteps = 7\nmethod = \"muon-factors\"\nrope_base = 5e5\n\
             [ranks]\n\"blocks.0.q\" = 5",
        )
        .unwrap();
        let ask = |toml| recorded.begun_with(&Overrides::from_toml(toml).unwrap());
        let c = ask("").unwrap();
        assert_eq!((c.dim, c.context, c.rope_base, c.ranks["blocks.0.q"]), (64, 32, 5e5, 5));
        assert_eq!((c.method, c.lr, c.steps), (Method::MuonFactors, 0.01, 2000)); // defaults, not the values there
        let c = ask("dim = 64\ncontext = 16\nmethod = \"adamw\"\nseed = 5").unwrap();
        assert_eq!((c.context, c.method, c.seed), (16, Method::Adamw, 5));
        for (toml, says) in [
            ("dim = 128", "`dim` is 64, 128 was asked for"),
            ("tie = true", "`tie` is false, true"),
            ("preset = \"small\"", "`preset` is \"tiny\", \"small\""),
            ("rank_ratio = 0.5", "`rank_ratio` is 0.25, 0.5"),
            ("rope_base = 1e4", "`rope_base` is 500000.0, the default"),
            ("method = \"dense-muon\"", "rankgrad merge"),
        ] {
            let error = ask(toml).unwrap_err().to_string();
            assert!(error.contains(says), "{toml}: {error}");
        }
        let dense = resolve("method = \"dense-adamw\"").unwrap();
        let error = dense.begun_with(&Overrides::from_toml("method = \"spectron\"").unwrap()).unwrap_err();
        assert!(error.to_string().contains("rankgrad rank"), "{error}");
        assert_eq!(dense.begun_with(&Overrides::default()).unwrap().method, Method::DenseAdamw);
    }

    #[test]
    fn file_flags_and_record_have_the_same_keys() {
        let absent = ["out", "tokenizer"]; // not recorded at all; not recorded where there is none
        let flags = Overrides::augment_args(clap::Command::new(""));
        let flags: Vec<&str> =
            flags.get_arguments().map(|a| a.get_id().as_str()).filter(|k| !absent.contains(k)).collect();
        // what is recorded only where it is not the default has no flag, and is read from files
        let with_shape = resolve("rope_base = 5e5\nnorm_eps = 1e-6\n[ranks]\n\"blocks.0.q\" = 5").unwrap();
        let recorded = |c: &Config| table(c).unwrap().keys().cloned().collect::<Vec<String>>();
        let mut record = recorded(&resolve("").unwrap());
        let beyond: Vec<String> =
            recorded(&with_shape).into_iter().filter(|key| !record.contains(key)).collect();
        assert_eq!(beyond.len(), SHAPE.len());
        assert!(SHAPE.iter().all(|key| beyond.iter().any(|b| b == key) && !flags.contains(key)));
        assert_eq!(resolve(&with_shape.to_toml().unwrap()).unwrap(), with_shape);
        record.sort();
        let mut flags: Vec<String> = flags.into_iter().map(str::to_owned).collect();
        flags.sort();
        assert_eq!(flags, record);
    }
}
