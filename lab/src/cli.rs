//! The command line: subcommands, flags and their help texts.
//!
//! Not here: what the commands do (main.rs names the function of each), and the values of a run with their checks
//! (config.rs, whose options are flattened in here).

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};

use crate::config::{ModelOptions, Overrides};
use crate::error::{Error, Result};

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
    /// Continue a prompt with text sampled from a checkpoint
    Generate(GenerateArgs),
    /// Rank and spectra of a checkpoint's factor pairs
    ///
    /// Per pair: shape, rank, σ(A), σ(B), σ(W), stable rank, and the gauge imbalance ‖AᵀA − BᵀB‖.
    Inspect(InspectArgs),
    /// Time forward, backward and optimizer on random tokens
    Bench(BenchArgs),
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

Flags win over --config, which wins over the preset. Ctrl-C saves a checkpoint and ends the run.")]
pub struct TrainArgs {
    /// TOML file of `key = value` lines: the flags here with _ for -, such as rank_ratio = 0.5
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Continue the run in this directory from its newest checkpoint, bit for bit
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// Save a checkpoint and end after this step; the schedule still runs over --steps, for --resume to go on with
    #[arg(long, value_name = "STEP", value_parser = at_least_one())]
    pub stop_after: Option<usize>,
    /// Show no progress and no sample
    #[arg(long)]
    pub quiet: bool,
    #[command(flatten)]
    pub overrides: Overrides,
}

impl TrainArgs {
    /// The flags over those of the --config file, if there is one.
    ///
    /// # Errors
    /// Those of [`Overrides::from_file`].
    pub fn asked(&self) -> Result<Overrides> {
        match &self.config {
            Some(path) => self.overrides.over(&Overrides::from_file(path)?),
            None => Ok(self.overrides.clone()),
        }
    }
}

/// Flags of `eval`.
#[derive(Args, Debug)]
#[command(after_help = "Example: rankgrad eval runs/spectron-tiny-001 --data shakespeare.txt --json")]
pub struct EvalArgs {
    #[arg(help = CHECKPOINT)]
    pub checkpoint: PathBuf,
    /// Files or directories, of whose bytes the last 10 % are evaluated [default: the data of the run]
    #[arg(long, num_args = 1.., value_name = "FILE_OR_DIR")]
    pub data: Vec<PathBuf>,
    /// Number of batches, spread evenly over the split; 0 = the whole split
    #[arg(long, default_value_t = 0)]
    pub batches: usize,
    /// Worker threads; 0 = all cores
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Print one JSON object: val_loss (nats per token), val_bits_per_byte, tokens
    #[arg(long)]
    pub json: bool,
}

/// Flags of `generate`.
#[derive(Args, Debug)]
#[command(allow_negative_numbers = true)] // as above
#[command(after_help = "Example: rankgrad generate runs/spectron-tiny-001 --prompt 'fn main() {' --top-k 40")]
pub struct GenerateArgs {
    #[arg(help = CHECKPOINT)]
    pub checkpoint: PathBuf,
    /// Text to continue, UTF-8 and not empty
    #[arg(long, default_value = "\n")]
    pub prompt: OsString,
    /// Tokens (bytes) to add
    #[arg(long, default_value_t = 300)]
    pub tokens: usize,
    /// Divides the logits: 0 = always the likeliest token, 1 = the model's own distribution
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Sample among this many likeliest tokens only [default: all]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Seed of the sampling: the same seed gives the same text
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

impl GenerateArgs {
    /// The prompt, once all values are known to be usable.
    ///
    /// # Errors
    /// An empty or non-UTF-8 prompt, no tokens, a negative or non-finite temperature, a top-k of 0.
    pub fn checked_prompt(&self) -> Result<&str> {
        let fail = |message: String| Err(Error::new(message));
        if self.tokens == 0 {
            return fail("--tokens is 0: it must be at least 1".into());
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return fail(format!(
                "--temperature is {}: it must be finite and not negative",
                self.temperature
            ));
        }
        if self.top_k == Some(0) {
            return fail("--top-k is 0: it must be at least 1, or left out for all tokens".into());
        }
        match self.prompt.to_str() {
            Some("") => fail("--prompt is empty: give at least one character to continue".into()),
            Some(prompt) => Ok(prompt),
            None => fail(format!("--prompt is not UTF-8: {}", self.prompt.to_string_lossy())),
        }
    }
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
    /// Also print where forward and backward spend their time, by op
    #[arg(long, conflicts_with = "json")]
    pub profile: bool,
    #[command(flatten)]
    pub model: ModelOptions,
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
        let config = args.asked().unwrap().resolve().unwrap();
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
        let config = args.asked().unwrap().resolve().unwrap();
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
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn unusable_prompts_and_sampling_values_are_refused() {
        let args = |prompt: &str| GenerateArgs {
            checkpoint: "c".into(),
            prompt: prompt.into(),
            tokens: 1,
            temperature: 1.0,
            top_k: None,
            seed: 0,
        };
        let refused = |args: GenerateArgs| args.checked_prompt().unwrap_err().to_string();
        assert_eq!(args("a").checked_prompt().unwrap(), "a");
        assert!(refused(args("")).contains("--prompt is empty"));
        assert!(refused(GenerateArgs { tokens: 0, ..args("a") }).contains("--tokens is 0"));
        assert!(
            refused(GenerateArgs { temperature: f64::NAN, ..args("a") }).contains("--temperature is NaN")
        );
        assert!(refused(GenerateArgs { top_k: Some(0), ..args("a") }).contains("--top-k is 0"));
        #[cfg(unix)]
        {
            use std::os::unix::ffi::OsStringExt;
            let prompt = OsString::from_vec(vec![b'a', 0xff]);
            assert!(refused(GenerateArgs { prompt, ..args("") }).contains("not UTF-8: a\u{fffd}"));
        }
    }
}
