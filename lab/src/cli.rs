//! The command line: subcommands, flags and their help texts.
//!
//! Not here: what the commands do (main.rs names the function of each), and the values of a run with their checks
//! (config.rs, whose options are flattened in here).

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{ModelOptions, Overrides, Preset};
use crate::device::{Device, Devices};
use crate::error::{Error, Result, cannot};
use crate::generate::Sampling;
use crate::model::Weights;
use crate::shards::Format;
use crate::study::{Kind, StudyOptions};
use crate::tokens::Tokenizer;

/// Train, evaluate, sample and inspect native low-rank language models.
///
/// Every matrix of a block is a factor pair W = A Bᵀ, trained by Spectron; the same model with AdamW or with dense
/// matrices is one --method away.
#[derive(Parser, Debug)]
#[command(
    name = "rankgrad",
    version,
    after_help = "Start with: rankgrad train\nHelp of one command: rankgrad train --help"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Train a model; without flags: the tiny preset on Rust sources that are already on this disk
    Train(Box<TrainArgs>), // boxed: several times the size of the others
    /// Validation loss of a checkpoint
    Eval(EvalArgs),
    /// Continue prompts with text sampled from a checkpoint
    Generate(Box<GenerateArgs>),
    /// Rank and spectra of a checkpoint's factor pairs
    ///
    /// Per pair: shape, rank, σ(A), σ(B), σ(W), stable rank, and the gauge imbalance ‖AᵀA − BᵀB‖; ρ, ‖ΔW‖/‖W‖, ‖ΔW‖/η and
    /// the shrink by weight decay of the newest step with telemetry. Matrices kept whole: σ(W) (an estimate), stable rank.
    Inspect(InspectArgs),
    /// Write a checkpoint's model in the layout of Hugging Face's Llama
    Export(ExportArgs),
    /// Read a Llama-style Hugging Face model, and make factor pairs of its matrices
    ///
    /// Prints, per matrix: shape, rank, relative error of the pair, the part of Σ σ² that was dropped, parameters before and after.
    Import(ImportArgs),
    /// Cut the factor pairs of a checkpoint to a smaller rank, or make pairs of its whole matrices
    ///
    /// By the singular values of W, with the smallest possible error; prints the table of `import`.
    Rank(RankArgs),
    /// Multiply the factor pairs of a checkpoint out
    Merge(MergeArgs),
    /// Time forward, backward and optimizer on random tokens
    Bench(BenchArgs),
    /// Compare training methods fairly: many runs, learning rates and seeds, tables
    Study(Box<StudyArgs>),
    /// One HTML page, readable without a network, that compares runs and studies
    ///
    /// Loss curves, learning rate, gradient norm and, where a run recorded them, spectra per layer, all of which can be
    /// zoomed and chosen from; a row per run; a study's tables and its final losses against the learning rate.
    Report(ReportArgs),
    /// List runs: method, sizes, losses, speed, and how far each has come
    Runs(RunsArgs),
    /// Make a tokenizer of one's own
    #[command(subcommand)]
    Tokenizer(TokenizerCommand),
    /// Make token files of text
    #[command(subcommand)]
    Data(DataCommand),
    /// List what there is to compute on, or say why there is no GPU
    Devices,
}

/// The flag of the commands that compute.
#[derive(Args, Clone, Copy, Debug)]
pub struct DeviceOption {
    /// Where to compute: cpu, cuda, cuda:N (see `rankgrad devices`), or auto, a GPU if there is one. GPUs: see docs/gpu.md
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Device,
}

const CHECKPOINT: &str = "A run's directory (its newest checkpoint) or one .safetensors file of it";

fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// Flags of `train`.
#[derive(Args, Debug)]
#[command(allow_negative_numbers = true)] // for the check of the value to answer
#[command(after_help = "Examples:
  rankgrad train
  rankgrad train --data shakespeare.txt --method dense-adamw --lr 1e-3 --out runs/dense
  rankgrad train --config runs/dense/config.toml --seed 2
  rankgrad train --resume runs/dense
  rankgrad train --from imported --data shakespeare.txt --lr 0.01
  rankgrad train --devices cuda:0,cuda:1 --batch 64
  torchrun --no-python --nproc-per-node 8 --nnodes 2 ... rankgrad train --device cuda --batch 256

Flags win over --config, which wins over the preset. Ctrl-C saves a checkpoint and ends the run.

Several devices, or several processes that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe as torchrun sets \
them, train one model: the same run as on one device but for rounding. Each process reads the data and, with --resume or --from, \
the checkpoint; the first writes. See docs/gpu.md.")]
pub struct TrainArgs {
    /// TOML file of `key = value` lines: the flags here with _ for -, such as rank_ratio = 0.5
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Continue the run in this directory from its newest checkpoint, bit for bit
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// Start a new run from the weights of this checkpoint: a run's directory, a .safetensors file, or what `import`, `rank` or
    /// `merge` wrote. The model's shape comes from there
    #[arg(long, value_name = "CHECKPOINT", conflicts_with = "resume")]
    pub from: Option<PathBuf>,
    /// Save a checkpoint and end after this step; the schedule still runs over --steps, for --resume to go on with
    #[arg(long, value_name = "STEP", value_parser = at_least_one())]
    pub stop_after: Option<usize>,
    /// Show no progress and no sample
    #[arg(long)]
    pub quiet: bool,
    /// Write the records into event files for TensorBoard too (tensorboard --logdir DIR); a run that has some goes on with them
    #[arg(long)]
    pub tensorboard: bool,
    #[command(flatten)]
    pub on: DeviceOption,
    /// Train on several devices at once, each with its part of every batch: cuda:0,cuda:1 or 0,1; or cpu,cpu to try it on a
    /// processor, whose threads are shared out. --batch must divide among them
    #[arg(long, value_name = "DEVICE,DEVICE", conflicts_with = "device")]
    pub devices: Option<Devices>,
    #[command(flatten)]
    pub overrides: Overrides,
}

/// Flags of `eval`.
#[derive(Args, Debug)]
#[command(after_help = "Example: rankgrad eval runs/spectron-tiny-001 --data shakespeare.txt --json")]
pub struct EvalArgs {
    #[arg(help = CHECKPOINT)]
    pub checkpoint: PathBuf,
    /// Files or directories of text, of which the last 10 % are evaluated, or of token files (val-*.bin) [default: the data of the run]
    #[arg(long, num_args = 1.., value_name = "FILE_OR_DIR")]
    pub data: Vec<PathBuf>,
    /// Files or directories, evaluated whole
    #[arg(long, num_args = 1.., value_name = "FILE_OR_DIR")]
    pub val_data: Vec<PathBuf>,
    /// A tokenizer.json, for a model that was trained on token files without one; every other checkpoint has its own
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Number of batches, spread evenly over the split; 0 = the whole split
    #[arg(long, default_value_t = 0)]
    pub batches: usize,
    /// Worker threads; 0 = all cores
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Print one JSON object: val_loss (nats per token), val_bits_per_byte, tokens
    #[arg(long)]
    pub json: bool,
    /// Compute in bf16, on a GPU: faster, to about three digits of the loss
    #[arg(long)]
    pub bf16: bool,
    #[command(flatten)]
    pub on: DeviceOption,
}

/// Flags of `generate`.
#[derive(Args, Debug)]
#[command(allow_negative_numbers = true)] // as above
#[command(after_help = "\
Text appears as it is sampled. Several prompts are continued side by side, each as it would be by itself, and shown one after \
the other.

The model looks back on at most as many tokens as its context. A longer text is seen through a window that moves by half a \
context whenever it is full: each token is predicted from between half a context and a whole one.

Examples:
  rankgrad generate runs/spectron-tiny-001 --prompt 'fn main() {' --top-k 40
  rankgrad generate runs/spectron-tiny-001 --prompt 'fn ' --prompt 'struct ' --top-p 0.9 --stop '\\n\\n'
  rankgrad generate runs/spectron-tiny-001 --interactive --repetition-penalty 1.2
  rankgrad generate --bench --preset mid")]
pub struct GenerateArgs {
    #[arg(help = CHECKPOINT, required_unless_present = "bench")]
    pub checkpoint: Option<PathBuf>,
    /// Text to continue, UTF-8 and not empty; may be given several times [default: a line break]
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["interactive", "bench"])]
    pub prompt: Vec<OsString>,
    /// A file of prompts, one a line; empty lines are skipped
    #[arg(long, value_name = "FILE", conflicts_with_all = ["interactive", "bench"])]
    pub prompts: Option<PathBuf>,
    /// A tokenizer.json, for a model that was trained on token files without one; every other checkpoint has its own
    #[arg(long, value_name = "FILE", conflicts_with = "bench")]
    pub tokenizer: Option<PathBuf>,
    /// Continue each line of standard input, after all that was said before; an empty line ends it
    #[arg(long, conflicts_with_all = ["json", "bench"])]
    pub interactive: bool,
    /// Tokens (bytes) to add, at most
    #[arg(long, default_value_t = 300)]
    pub tokens: usize,
    /// Divides the logits: 0 = always the likeliest token, 1 = the model's own distribution
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Sample among this many likeliest tokens only [default: all]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample among the fewest likeliest tokens whose probabilities add up to P, in (0, 1]
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f64,
    /// Divides the logits, if positive, of tokens that the model looks back on, and multiplies negative ones; 1 = none
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// End the text before this string; \n is a line break, \t a tab, \\ a backslash. May be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Seed of the sampling: the same seed gives the same text
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Multiply with the products of all factor pairs [default: with whatever of a pair has fewer numbers]
    #[arg(long, conflicts_with = "factored")]
    pub merged: bool,
    /// Multiply with the factors of all pairs
    #[arg(long)]
    pub factored: bool,
    /// Worker threads; 0 = all cores
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Print one JSON object per prompt, once all are done: prompt, text, tokens, stopped; with --bench one for all
    #[arg(long)]
    pub json: bool,
    /// Print tokens per second and memory, factored and merged, instead of text
    #[arg(long)]
    pub bench: bool,
    /// With --bench: an untrained model of these sizes in place of a checkpoint [default: tiny]
    #[arg(long, requires = "bench", conflicts_with = "checkpoint")]
    pub preset: Option<Preset>,
    /// With --bench and without a checkpoint: as in `train`
    #[arg(long, requires = "bench", conflicts_with = "checkpoint")]
    pub rank_ratio: Option<f64>,
    #[command(flatten)]
    pub on: DeviceOption,
}

impl GenerateArgs {
    /// How to sample.
    ///
    /// # Errors
    /// A value that nothing can be sampled with, or an empty stop string.
    pub fn sampling(&self) -> Result<Sampling<'static>> {
        let fail = |message: String| Err(Error::new(message));
        if self.tokens == 0 {
            return fail("--tokens is 0: it must be at least 1".into());
        }
        let Self { temperature, top_p, repetition_penalty, .. } = *self;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return fail(format!("--temperature is {temperature}: it must be finite and not negative"));
        }
        if self.top_k == Some(0) {
            return fail("--top-k is 0: it must be at least 1, or left out for all tokens".into());
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return fail(format!(
                "--top-p is {top_p}: it must be above 0 and at most 1, which is all tokens"
            ));
        }
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            return fail(format!(
                "--repetition-penalty is {repetition_penalty}: it must be finite and positive; 1 is none, 1.2 is usual"
            ));
        }
        let stop = self.stop.iter().map(|text| unescaped(text)).collect::<Result<Vec<String>>>()?;
        let (tokens, top_k, seed) = (self.tokens, self.top_k, self.seed);
        let tokenizer = &Tokenizer::Bytes; // until the checkpoint's is known
        Ok(Sampling { tokens, temperature, top_k, top_p, repetition_penalty, stop, seed, tokenizer })
    }

    /// The prompts, at least one.
    ///
    /// # Errors
    /// An empty or non-UTF-8 prompt; a file that cannot be read or has none.
    pub fn prompts(&self) -> Result<Vec<String>> {
        let fail = |message: String| Err(Error::new(message));
        let mut prompts = Vec::new();
        for prompt in &self.prompt {
            match prompt.to_str() {
                Some("") => return fail("--prompt is empty: give at least one character to continue".into()),
                Some(prompt) => prompts.push(prompt.to_owned()),
                None => return fail(format!("--prompt is not UTF-8: {}", prompt.to_string_lossy())),
            }
        }
        if let Some(path) = &self.prompts {
            let text = std::fs::read_to_string(path).map_err(cannot("read prompts from", path))?;
            let before = prompts.len();
            prompts.extend(text.lines().filter(|line| !line.is_empty()).map(str::to_owned));
            if prompts.len() == before {
                return fail(format!("{} has no prompt: write one a line", path.display()));
            }
        }
        if prompts.is_empty() {
            prompts.push("\n".into());
        }
        Ok(prompts)
    }

    /// What --merged and --factored say.
    pub fn weights(&self) -> Weights {
        match (self.merged, self.factored) {
            (true, _) => Weights::Merged,
            (_, true) => Weights::Factored,
            _ => Weights::Fewer,
        }
    }
}

/// The text of `--stop`.
fn unescaped(text: &str) -> Result<String> {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        let meant = match (c, if c == '\\' { chars.next() } else { None }) {
            ('\\', Some('n')) => '\n',
            ('\\', Some('t')) => '\t',
            ('\\', Some('\\')) => '\\',
            ('\\', _) => {
                let rule = "after a backslash comes n, t or another backslash";
                return Err(Error::new(format!("--stop {text}: {rule}")));
            }
            (c, _) => c,
        };
        out.push(meant);
    }
    if out.is_empty() { Err(Error::new("--stop is empty: every text ends before that")) } else { Ok(out) }
}

/// Flags of `inspect`.
#[derive(Args, Debug)]
#[command(after_help = "Example: rankgrad inspect runs/spectron-tiny-001")]
pub struct InspectArgs {
    #[arg(help = CHECKPOINT)]
    pub checkpoint: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What a list of runs is ordered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// The paths
    Name,
    /// The newest validation loss, best first; in nats per token
    Loss,
    /// The last change, newest last
    Time,
}

/// Flags of `runs`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  rankgrad runs
  rankgrad runs studies/methods --by loss

A loss with ~ is that of some batches, during training; those without are of the whole validation split, at the end.")]
pub struct RunsArgs {
    /// Directories: runs, or what has runs anywhere inside, such as studies
    #[arg(default_value = "runs", value_name = "DIR")]
    pub directories: Vec<PathBuf>,
    /// The order of the rows
    #[arg(long, default_value = "name")]
    pub by: Order,
    /// Print one JSON object a run
    #[arg(long)]
    pub json: bool,
}

/// The layout of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// config.json, model.safetensors, tokenizer.json: what transformers' LlamaForCausalLM and AutoTokenizer load
    HfLlama,
}

/// Flags of `export`.
#[derive(Args, Debug)]
#[command(after_help = "Example: rankgrad export runs/spectron-tiny-001 model --to hf-llama")]
pub struct ExportArgs {
    #[arg(help = CHECKPOINT)]
    pub checkpoint: PathBuf,
    /// The directory to write; it must not exist
    pub directory: PathBuf,
    /// What to write
    #[arg(long, default_value = "hf-llama")]
    pub to: Layout,
    /// Keep factor pairs as NAME.A and NAME.B instead of their product; a README beside them says how to load them
    #[arg(long)]
    pub factorized: bool,
}

/// What there is to do with tokenizers.
#[derive(Subcommand, Debug)]
pub enum TokenizerCommand {
    /// Train a byte-level BPE on text and write its tokenizer.json
    Train(TokenizerArgs),
}

/// Flags of `tokenizer train`.
#[derive(Args, Debug)]
#[command(after_help = "Example: rankgrad tokenizer train --data wiki.txt --vocab 4096 --out wiki.json")]
pub struct TokenizerArgs {
    /// Files or directories of UTF-8 text
    #[arg(long, num_args = 1.., required = true, value_name = "FILE_OR_DIR")]
    pub data: Vec<PathBuf>,
    /// Number of tokens, at least 257: every byte, <|endoftext|>, and the commonest sequences of bytes
    #[arg(long, default_value_t = 4096)]
    pub vocab: usize,
    /// The file to write; it must not exist
    #[arg(long, default_value = "tokenizer.json", value_name = "FILE")]
    pub out: PathBuf,
}

/// Flags of `import`.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("how").required(true).args(["rank_ratio", "energy", "dense"]))]
#[command(allow_negative_numbers = true)] // for the check of the value to answer
#[command(after_help = "Examples:
  rankgrad import model imported --rank-ratio 0.25
  rankgrad import model imported --energy 0.99
  rankgrad import model whole --dense")]
pub struct ImportArgs {
    /// A directory with config.json and model.safetensors or model.safetensors.index.json, or one of the latter two
    pub model: PathBuf,
    /// The directory to write; it must not exist
    pub out: PathBuf,
    /// Rank of each pair as a part of min(inputs, outputs), in (0, 1]
    #[arg(long, value_name = "R")]
    pub rank_ratio: Option<f64>,
    /// Give each matrix the smallest rank that keeps this part of its Σ σ², in (0, 1]
    #[arg(long, value_name = "E")]
    pub energy: Option<f64>,
    /// Keep matrices whole
    #[arg(long)]
    pub dense: bool,
    /// Tokens per sequence of the imported model [default: its max_position_embeddings, but at most 2048]
    #[arg(long, value_parser = at_least_one())]
    pub context: Option<usize>,
}

/// Data to compare models on.
#[derive(Args, Debug)]
pub struct DataOptions {
    /// Files or directories: print the validation losses before and after on their last 10 %
    #[arg(long, num_args = 1.., value_name = "FILE_OR_DIR")]
    pub data: Vec<PathBuf>,
    /// Files or directories, evaluated whole
    #[arg(long, num_args = 1.., value_name = "FILE_OR_DIR")]
    pub val_data: Vec<PathBuf>,
}

/// Flags of `rank`.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("how").required(true).args(["to_ratio", "energy"]))]
#[command(allow_negative_numbers = true)] // as above
#[command(
    after_help = "Example: rankgrad rank runs/spectron-tiny-001 smaller --to-ratio 0.125 --data shakespeare.txt"
)]
pub struct RankArgs {
    #[arg(help = CHECKPOINT)]
    pub checkpoint: PathBuf,
    /// The directory to write; it must not exist
    pub out: PathBuf,
    /// Rank of each pair as a part of min(inputs, outputs), in (0, 1]
    #[arg(long, value_name = "R")]
    pub to_ratio: Option<f64>,
    /// Give each matrix the smallest rank that keeps this part of its Σ σ², in (0, 1]
    #[arg(long, value_name = "E")]
    pub energy: Option<f64>,
    #[command(flatten)]
    pub data: DataOptions,
}

/// Flags of `merge`.
#[derive(Args, Debug)]
#[command(after_help = "Example: rankgrad merge runs/spectron-tiny-001 whole")]
pub struct MergeArgs {
    #[arg(help = CHECKPOINT)]
    pub checkpoint: PathBuf,
    /// The directory to write; it must not exist
    pub out: PathBuf,
    #[command(flatten)]
    pub data: DataOptions,
}

/// Flags of `bench`.
#[derive(Args, Debug)]
#[command(after_help = "Example: rankgrad bench --preset small --method spectron --threads 2 --json")]
pub struct BenchArgs {
    /// Timed optimizer steps, after two untimed ones; medians are reported
    #[arg(long, default_value_t = 20, value_parser = at_least_one())]
    pub steps: usize,
    /// Print one JSON object: forward_ms, backward_ms, optimizer_ms, tokens_per_second, ...
    #[arg(long)]
    pub json: bool,
    /// Also print where the time goes: of forward and backward, by op; on a GPU that of the whole step, by kernel
    #[arg(long)]
    pub profile: bool,
    /// Print "ready", then take the timed steps and print the JSON object for each line that comes on stdin, until it ends: to be
    /// measured in turn with another program. The untimed steps are before the first
    #[arg(long, conflicts_with_all = ["json", "profile"])]
    pub rounds: bool,
    #[command(flatten)]
    pub on: DeviceOption,
    #[command(flatten)]
    pub model: ModelOptions,
}

/// Flags of `study`.
#[derive(Args, Debug)]
#[command(allow_negative_numbers = true)] // as above
#[command(after_help = "\
A study is a list of arms, each a configuration. The runs of an arm: every learning rate of --grid at the first seed; while \
the best rate is the smallest or largest one, one more on that side; then the other seeds at the best rate. Options of \
`train` (--data, --preset, --dim, --steps, --schedule, ...) hold for every arm. Rates are rounded to four digits.

The directory gets study.toml (these settings), runs/ID/ (config.toml, metrics.jsonl, final.json or diverged.json, as `train` \
writes them and with the same results to the bit), after each run results.csv, table.md and tables.json, and in the end report.html. Checkpoints \
are removed when a run is over. Ctrl-C saves one of each running run; the same command, or --resume DIR, goes on.

In the tables: \"interior: NO\" says that the best rate is still the last of its grid after all --extensions; ± is the sample \
standard deviation over seeds. A loss spike: recorded training losses (each --log-every steps) that exceed the exponentially \
weighted mean of the preceding ones by more than max(0.5 nats, 6 of their standard deviations); weights fall by 0.9 a record, \
the first ten are never one, spikes do not enter the mean, consecutive ones count once. A rate survives (stability) if every \
seed keeps half of what the best rate learns beyond byte frequencies: its final loss is at most halfway from the best rate's to \
that of a model that only knows how often each byte comes.

Limits of `long`, checked in its table and never enforced: no divergence, no spike; the mean training loss of the last tenth of \
the run at most 0.1 nats above that of the best tenth; σ_W, σ_A and σ_B at most 4 times those of the second tenth (each the \
largest over all matrices); σ_A/σ_B and σ_B/σ_A of every pair at most 4; under spectron, ‖ΔW‖ at most η.

Examples:
  rankgrad study methods --data shakespeare.txt --seeds 1,2,3 --out studies/tokens
  rankgrad study methods --budget params --methods spectron,adamw,dense-adamw,dense-muon --grid 0.5,1,2
  rankgrad study methods --budget flops --sizes 96,128,160 --steps 2000
  rankgrad study ablation --steps 1000
  rankgrad study rank --ratios 0.125,0.25,0.4,1 --methods spectron,adamw
  rankgrad study stability --methods spectron,adamw --multiples 1,3,10,30
  rankgrad study long --steps 100000 --log-every 10
  rankgrad study recipe --methods spectron,dense-muon
  rankgrad study --resume studies/tokens --jobs 8")]
// a study has its own ways to say these
#[command(mut_args(|arg| match arg.get_id().as_str() {
    "method" | "lr" | "adam_lr" | "seed" => arg.hide(true),
    "out" => arg.help("Directory of the study, new or of the same study [default: studies/KIND-NUMBER]"),
    "threads" => arg.help("Worker threads of each run; 0 = all cores. The result does not depend on it [default: 1]"),
    "keep" => arg.help("Newest checkpoints kept of a run [default: 1]"),
    _ => arg,
}))]
pub struct StudyArgs {
    /// What is compared
    pub kind: Option<Kind>,
    #[command(flatten)]
    pub options: StudyOptions,
    /// Continue the study in this directory; nothing that is finished is run again
    #[arg(long, value_name = "DIR", help_heading = "Study")]
    pub resume: Option<PathBuf>,
    #[command(flatten)]
    pub on: DeviceOption,
    /// Run on several GPUs, a run on each: cuda:0,cuda:1 or 0,1
    #[arg(long, value_name = "DEVICE,DEVICE", conflicts_with = "device", help_heading = "Study")]
    pub devices: Option<Devices>,
    /// Runs at a time [default: one on each GPU; on the processor cores / --threads, and --threads is 1]
    #[arg(long, value_name = "N", value_parser = at_least_one(), help_heading = "Study")]
    pub jobs: Option<usize>,
    /// Keep the newest --keep checkpoints of runs that are over
    #[arg(long, help_heading = "Study")]
    pub keep_checkpoints: bool,
    /// Show no progress
    #[arg(long, help_heading = "Study")]
    pub quiet: bool,
    /// TOML file of options of `train`, as `train --config` reads it; flags win over it
    #[arg(long, value_name = "FILE", help_heading = "Study")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub overrides: Overrides,
}

/// Flags of `report`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  rankgrad report runs/spectron-tiny-001 runs/adamw-tiny-001
  rankgrad report studies/methods --out methods.html --svg pictures
  rankgrad report docs/studies/stability.csv")]
pub struct ReportArgs {
    /// Directories of runs and of studies; a study's results.csv, under any name, does alone
    #[arg(required = true, value_name = "RUN_OR_STUDY")]
    pub paths: Vec<PathBuf>,
    /// The page, replaced if it exists
    // Not by default into a run's directory: a training that still runs there may be writing files of its own.
    #[arg(long, value_name = "FILE.html", default_value = "report.html")]
    pub out: PathBuf,
    /// Also write the curves as SVG pictures into this directory
    #[arg(long, value_name = "DIR")]
    pub svg: Option<PathBuf>,
}

/// The commands of `data`.
#[derive(Subcommand, Debug)]
pub enum DataCommand {
    /// Shuffled token files of text, JSON lines or Parquet, for training on more than fits in memory
    Pack(PackArgs),
}

/// Flags of `data pack`.
#[derive(Args, Debug)]
#[command(allow_negative_numbers = true)] // as above
#[command(after_help = "\
A document is a line of a .jsonl file, a row of a .parquet file (in a build with --features parquet), or any other file as a \
whole, which must be UTF-8. Each is preceded by the end token. The same data and --seed give the same files. Documents that \
come first in the shuffled order go to the validation files, val-000000.bin and on, until those have their part of the tokens; the \
rest to train-000000.bin and on. pack.json says what is in them.

Until all is done, the work is in DIR.packing, which needs about twice the space of the tokens. Ctrl-C saves; the same command \
goes on.

Examples:
  rankgrad data pack --data articles.jsonl --tokenizer wiki.json --out tokens
  rankgrad data pack --data books/ --out tokens --val-fraction 0.05 --shard-tokens 10000000 --format nanogpt")]
pub struct PackArgs {
    /// Files, and directories, whose files count unless they are hidden
    #[arg(long, num_args = 1.., required = true, value_name = "FILE_OR_DIR")]
    pub data: Vec<PathBuf>,
    /// The directory to write; it must not exist
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// A tokenizer.json with an end token; a copy is kept beside the tokens [default: bytes are tokens, 256 is the end token]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// How tokens lie in the files: llm.c's way, also modded-nanogpt's, or nanoGPT's
    #[arg(long, default_value = "llm-c")]
    pub format: Format,
    /// Field of JSON lines, or column of Parquet, that has the text
    #[arg(long, default_value = "text")]
    pub field: String,
    /// Seed of the order of the documents
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Tokens per file; the last one of each kind has what is left
    #[arg(long, value_name = "N", default_value_t = 100_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub shard_tokens: u64,
    /// Part of the tokens to validate on, in [0, 1), at whole documents
    #[arg(long, value_name = "F", default_value_t = 0.01)]
    pub val_fraction: f64,
    /// Worker threads; 0 = all cores. The result does not depend on it
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Show no progress
    #[arg(long)]
    pub quiet: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::config::Method;

    fn parse(line: &str) -> std::result::Result<Command, String> {
        let words = std::iter::once("rankgrad").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|c| c.command).map_err(|e| e.to_string())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_reach_the_configuration() {
        let line = "train --method adamw --data a b --kv-heads 2 --tie --zero-init-output=false --lr 1e-3";
        let Ok(Command::Train(args)) = parse(line) else { panic!() };
        let config = args.overrides.over_file(args.config.as_deref()).unwrap().resolve().unwrap();
        assert_eq!((config.method, config.kv_heads, config.lr), (Method::Adamw, 2, 1e-3));
        assert_eq!((config.tie, config.zero_init_output, config.data.len()), (true, false, 2));
    }

    #[test]
    fn flags_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "lr = 1.0\nbatch = 3").unwrap();
        let Ok(Command::Train(args)) = parse(&format!("train --lr 0.5 --config {}", path.display())) else {
            panic!()
        };
        let config = args.overrides.over_file(args.config.as_deref()).unwrap().resolve().unwrap();
        assert_eq!((config.lr, config.batch), (0.5, 3));
    }

    #[test]
    fn slips_are_answered_with_the_nearest() {
        for (line, says) in [
            ("trian", "'train'"),
            ("train --stepz 3", "'--steps'"),
            ("train --method adam", "'adamw'"),
            ("train --preset smal", "'small'"),
            ("train --schedule cosin", "'cosine'"),
            ("train --steps -1", "invalid value '-1' for '--steps"),
            ("bench --steps 0", "0 is not in 1.."),
            ("eval", "<CHECKPOINT>"),
            ("import a b", "--rank-ratio"),
            ("import a b --energy 0.9 --dense", "cannot be used with"),
            ("rank a b", "--to-ratio"),
            ("rank a b --to-ratio 0.5 --energy 0.9", "cannot be used with"),
            ("train --from a --resume b", "cannot be used with"),
            ("train --device cpu --devices cpu,cpu", "cannot be used with"),
            ("train --devices cuda:0,cpu", "do not train together"),
            ("train --devices 0,1,cuda:0", "cuda:0 is there twice"),
            ("train --devices cuda,0", "cuda:0 is there twice"),
            ("train --devices cpu,auto", "`auto` is none of cpu, cuda, cuda:N and N"),
            ("train --devices cpu,", "`` is none of cpu"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn unusable_prompts_and_sampling_values_are_refused() {
        let args = |flags: &[&str]| {
            let words = ["rankgrad", "generate", "c"].iter().chain(flags);
            match Cli::try_parse_from(words).map(|c| c.command) {
                Ok(Command::Generate(args)) => args,
                other => panic!("{other:?}"),
            }
        };
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &[u8]| {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name).to_str().unwrap().to_owned()
        };
        let lines = file("lines", b"one\r\n\ntwo");
        let given = args(&["--prompt", "a", "--prompts", &lines, "--prompt", "b"]);
        assert_eq!(given.prompts().unwrap(), ["a", "b", "one", "two"]);
        assert_eq!(args(&[]).prompts().unwrap(), ["\n"]);
        let stop = args(&["--stop", "a\\nb\\\\n", "--stop", "é"]).sampling().unwrap().stop;
        assert_eq!(stop, ["a\nb\\n", "é"]);
        for (flags, says) in [
            (["--tokens", "0"], "--tokens is 0"),
            (["--temperature", "NaN"], "--temperature is NaN"),
            (["--temperature", "-1"], "--temperature is -1"),
            (["--top-k", "0"], "--top-k is 0"),
            (["--top-p", "0"], "--top-p is 0: it must be above 0"),
            (["--top-p", "1.5"], "--top-p is 1.5"),
            (["--top-p", "nan"], "--top-p is NaN"),
            (["--repetition-penalty", "0"], "--repetition-penalty is 0"),
            (["--repetition-penalty", "inf"], "--repetition-penalty is inf"),
            (["--stop", ""], "--stop is empty"),
            (["--stop", "\\x"], "--stop \\x: after a backslash"),
            (["--prompt", ""], "--prompt is empty"),
            (["--prompts", "/no/such"], "cannot read prompts from /no/such"),
            (["--prompts", &file("empty", b"\n\n")], "has no prompt"),
            (["--prompts", &file("bytes", b"a\xff")], "UTF-8"),
        ] {
            let args = args(&flags);
            let error = args.sampling().map(|_| ()).and_then(|()| args.prompts().map(|_| ())).unwrap_err();
            assert!(error.to_string().contains(says), "{flags:?}: {error}");
        }
        for (line, says) in [
            ("generate", "<CHECKPOINT>"),
            ("generate c --preset mid", "cannot be used with"),
            ("generate c --bench --preset mid", "cannot be used with"),
            ("generate c --merged --factored", "cannot be used with"),
            ("generate c --interactive --prompt a", "cannot be used with"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
        #[cfg(unix)]
        {
            use std::os::unix::ffi::OsStringExt;
            let mut args = args(&[]);
            args.prompt = vec![OsString::from_vec(vec![b'a', 0xff])];
            assert!(args.prompts().unwrap_err().to_string().contains("not UTF-8: a\u{fffd}"));
        }
    }
}
