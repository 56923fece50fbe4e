//! `eval` and `inspect`: what a checkpoint is worth, and what its factor pairs look like.

use rankgrad::lowrank::FactorPair;
use rankgrad::tensor::{Cpu, Tensor};
use serde::Serialize;

use crate::checkpoint::{self, Checkpoint};
use crate::cli::{EvalArgs, InspectArgs};
use crate::config::{Config, name};
use crate::data::Corpus;
use crate::error::{Error, Result};
use crate::trainer::{Trainer, load_model};

#[derive(Serialize)]
struct Evaluation {
    /// Nats per token.
    val_loss: f64,
    val_bits_per_byte: f64,
    tokens: u64,
}

/// Prints the validation loss of a checkpoint.
///
/// # Errors
/// A checkpoint or data that cannot be used.
pub fn eval(args: &EvalArgs) -> Result<()> {
    let checkpoint = Checkpoint::load(&checkpoint::find(&args.checkpoint)?)?;
    let mut config = checkpoint.meta.config.clone();
    if !args.data.is_empty() {
        config.data = args.data.clone();
    }
    let corpus = Corpus::load(&config.data, config.context)?;
    let (val_loss, tokens) = crate::pool(args.threads)?.install(|| {
        let mut trainer = Trainer::new(&Cpu::default(), &config);
        trainer.restore(checkpoint)?;
        Ok::<_, Error>(trainer.validate(&corpus, args.batches))
    })?;
    let evaluation = Evaluation { val_loss, val_bits_per_byte: val_loss / std::f64::consts::LN_2, tokens };
    if args.json {
        crate::say!("{}", serde_json::to_string(&evaluation).expect("plain values"));
    } else {
        crate::say!("data: {}", corpus.summary);
        let bits = evaluation.val_bits_per_byte;
        crate::say!(
            "validation loss {val_loss:.4} nats per token, {bits:.4} bits per byte, over {tokens} tokens"
        );
    }
    Ok(())
}

/// The spectrum of one factor pair.
#[derive(Serialize)]
struct PairReport {
    name: String,
    outputs: usize,
    inputs: usize,
    rank: usize,
    /// Spectral norms.
    sigma_a: f64,
    sigma_b: f64,
    sigma_w: f64,
    /// ‖W‖_F² / σ(W)²: how many directions carry W.
    stable_rank: f64,
    /// ‖AᵀA − BᵀB‖_F.
    gauge_imbalance: f64,
}

#[derive(Serialize)]
struct Report<'a> {
    step: u64,
    tokens: u64,
    parameters: usize,
    config: &'a Config,
    pairs: Vec<PairReport>,
}

impl PairReport {
    fn new(name: &str, pair: &FactorPair<Cpu<f32>>) -> Self {
        let sigma = pair.singular_values();
        let sigma_w = sigma[0];
        let square: f64 = sigma.iter().map(|s| s * s).sum();
        Self {
            name: name.into(),
            outputs: pair.outputs(),
            inputs: pair.inputs(),
            rank: pair.rank(),
            sigma_a: spectral_norm(&pair.a),
            sigma_b: spectral_norm(&pair.b),
            sigma_w,
            stable_rank: if sigma_w > 0.0 { square / (sigma_w * sigma_w) } else { 0.0 },
            gauge_imbalance: pair.gauge_imbalance(),
        }
    }
}

/// σ(X) exactly, as the square root of σ(X·Xᵀ): a factor is a pair with itself.
fn spectral_norm(x: &Tensor<Cpu<f32>>) -> f64 {
    FactorPair::new(x.clone(), x.clone()).singular_values()[0].sqrt()
}

/// Prints shape, rank and spectra of a checkpoint's factor pairs.
///
/// # Errors
/// A checkpoint that cannot be used.
pub fn inspect(args: &InspectArgs) -> Result<()> {
    let path = checkpoint::find(&args.checkpoint)?;
    let checkpoint = Checkpoint::load(&path)?;
    let meta = checkpoint.meta.clone();
    let (_, params) = load_model(checkpoint)?;
    let pairs = params.pair_names.iter().zip(&params.values.pairs);
    let report = Report {
        step: meta.step,
        tokens: meta.tokens,
        parameters: params.count(),
        config: &meta.config,
        pairs: pairs.map(|(name, pair)| PairReport::new(name, pair)).collect(),
    };
    if args.json {
        crate::say!("{}", serde_json::to_string(&report).expect("plain values"));
        return Ok(());
    }
    crate::say!(
        "{}: {} after {} steps, {} tokens, {} parameters",
        path.display(),
        name(meta.config.method),
        report.step,
        report.tokens,
        report.parameters
    );
    if report.pairs.is_empty() {
        crate::say!("its matrices are dense: there are no factor pairs");
        return Ok(());
    }
    crate::say!(
        "{:<20} {:>11} {:>5} {:>8} {:>8} {:>8} {:>11} {:>12}",
        "pair",
        "shape",
        "rank",
        "σ(A)",
        "σ(B)",
        "σ(W)",
        "stable rank",
        "‖AᵀA − BᵀB‖"
    );
    for p in &report.pairs {
        crate::say!(
            "{:<20} {:>11} {:>5} {:>8.4} {:>8.4} {:>8.4} {:>11.2} {:>12.4}",
            p.name,
            format!("{}×{}", p.outputs, p.inputs),
            p.rank,
            p.sigma_a,
            p.sigma_b,
            p.sigma_w,
            p.stable_rank,
            p.gauge_imbalance
        );
    }
    Ok(())
}
