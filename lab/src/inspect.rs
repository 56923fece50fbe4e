//! `eval` and `inspect`: what a checkpoint is worth, and what its matrices look like.

use std::path::{Path, PathBuf};

use rankgrad::lowrank::{Accuracy, FactorPair, MatrixTelemetry, Params, matrix_telemetry, pair_telemetry};
use rankgrad::tensor::{Cpu, Tensor};
use serde::Serialize;

use crate::checkpoint::{self, Checkpoint, Meta};
use crate::cli::{EvalArgs, InspectArgs};
use crate::config::{Config, Precision, name};
use crate::data::Corpus;
use crate::device::{self, on_device};
use crate::error::{Error, Result};
use crate::run::{MatrixRecord, Record, Telemetry, read_metrics};
use crate::tokens::Tokenizer;
use crate::trainer::{load_model, validate};

#[derive(Serialize)]
struct Evaluation {
    /// Nats per token.
    val_loss: f64,
    val_bits_per_byte: Option<f64>,
    tokens: u64,
}

/// Prints the validation loss of a checkpoint.
///
/// # Errors
/// A checkpoint or data that cannot be used.
pub fn eval(args: &EvalArgs) -> Result<()> {
    let checkpoint = Checkpoint::load_weights(&checkpoint::find(&args.checkpoint)?)?;
    let config = checkpoint.meta.config.clone();
    let corpus =
        corpus(&config, &checkpoint.tokenizer_or(args.tokenizer.as_deref())?, &args.data, &args.val_data)?;
    let (val_loss, tokens) = crate::pool(args.threads)?.install(|| {
        let precision = if args.bf16 { Precision::Bf16 } else { Precision::F32 };
        on_device!(device::open(args.on.device, precision)?, |device, compute| {
            let (model, params) = load_model(&device, checkpoint)?;
            Ok::<_, Error>(validate(compute, &config, &model, &params, &corpus, args.batches))
        })
    })?;
    let evaluation = Evaluation { val_loss, val_bits_per_byte: corpus.bits_per_byte(val_loss), tokens };
    if args.json {
        crate::say!("{}", serde_json::to_string(&evaluation).expect("plain values"));
    } else {
        crate::say!("data: {}", corpus.summary);
        let bits = bits(evaluation.val_bits_per_byte);
        crate::say!("validation loss {val_loss:.4} nats per token{bits}, over {tokens} tokens");
    }
    Ok(())
}

/// ", X bits per byte", or nothing where that is not known.
pub fn bits(per_byte: Option<f64>) -> String {
    per_byte.map_or(String::new(), |bits| format!(", {bits:.4} bits per byte"))
}

/// The data of a run's configuration, or what flags name instead.
///
/// # Errors
/// Those of [`Corpus::load`].
pub fn corpus(
    config: &Config,
    tokenizer: &Tokenizer,
    data: &[PathBuf],
    val_data: &[PathBuf],
) -> Result<Corpus> {
    let (mut of_run, mut val_of_run) = (&config.data[..], &config.val_data[..]);
    if !data.is_empty() {
        (of_run, val_of_run) = (data, &[]);
    }
    if !val_data.is_empty() {
        val_of_run = val_data;
    }
    Corpus::load(of_run, val_of_run, config.context, tokenizer)?.fits(config.vocab)
}

/// One factor pair: its spectra, and what the last step with telemetry did to it.
#[derive(Serialize)]
struct PairReport {
    name: String,
    outputs: usize,
    inputs: usize,
    rank: usize,
    /// Spectral norms.
    sigma_a: f64,
    sigma_b: f64,
    /// ‖AᵀA − BᵀB‖_F.
    gauge_imbalance: f64,
    /// σ(W), ‖W‖_F² / σ(W)²: how many directions carry W; ‖ΔW‖₂.
    #[serde(flatten)]
    w: MatrixRecord,
    rho: Option<f64>,
    shrink: Option<f64>,
}

/// One matrix that is kept whole.
#[derive(Serialize)]
struct MatrixReport {
    name: String,
    outputs: usize,
    inputs: usize,
    #[serde(flatten)]
    w: MatrixRecord,
}

#[derive(Serialize)]
struct Report<'a> {
    step: u64,
    tokens: u64,
    parameters: usize,
    config: &'a Config,
    /// The step that the updates are of: the newest with telemetry, up to `step`.
    telemetry_step: Option<u64>,
    pairs: Vec<PairReport>,
    hidden: Vec<MatrixReport>,
}

/// The W of now, with the update of `then`.
fn matrix_record(now: MatrixTelemetry, then: Option<&MatrixRecord>) -> MatrixRecord {
    MatrixRecord {
        sigma_w: Some(now.sigma),
        stable_rank: Some(now.stable_rank),
        update: then.and_then(|w| w.update),
        update_over_eta: then.and_then(|w| w.update_over_eta),
        update_over_w: then.and_then(|w| w.update_over_w),
    }
}

/// The newest record with telemetry among those of the checkpoint's run, up to its step.
fn newest_telemetry(checkpoint: &Path, step: u64) -> Result<Option<Record>> {
    let metrics = checkpoint.with_file_name("metrics.jsonl");
    let records = if metrics.exists() { read_metrics(&metrics)? } else { Vec::new() };
    let told = |r: &Record| r.step <= step && r.telemetry != Telemetry::default();
    Ok(records.into_iter().rev().find(told))
}

fn report<'a>(meta: &'a Meta, params: &Params<Cpu<f32>>, last: Option<&Record>) -> Report<'a> {
    let pair = |(name, pair): (&String, &FactorPair<Cpu<f32>>)| {
        let seen = pair_telemetry(None, pair, Accuracy::Exact);
        let then = last.and_then(|r| r.telemetry.pairs.get(name));
        PairReport {
            name: name.clone(),
            outputs: pair.outputs(),
            inputs: pair.inputs(),
            rank: pair.rank(),
            sigma_a: seen.sigma_a,
            sigma_b: seen.sigma_b,
            gauge_imbalance: seen.gauge_imbalance,
            w: matrix_record(seen.w, then.map(|pair| &pair.w)),
            rho: then.and_then(|pair| pair.rho),
            shrink: then.and_then(|pair| pair.shrink),
        }
    };
    // decompositions of whole matrices would take minutes
    let matrix = |(name, w): (&String, &Tensor<Cpu<f32>>)| {
        let then = last.and_then(|r| r.telemetry.hidden.get(name));
        let w_now = matrix_telemetry(None, w, Accuracy::Fast);
        MatrixReport {
            name: name.clone(),
            outputs: w.rows(),
            inputs: w.cols(),
            w: matrix_record(w_now, then),
        }
    };
    Report {
        step: meta.step,
        tokens: meta.tokens,
        parameters: params.count(),
        config: &meta.config,
        telemetry_step: last.map(|r| r.step),
        pairs: params.pair_names.iter().zip(&params.values.pairs).map(pair).collect(),
        hidden: params.hidden_names.iter().zip(&params.values.hidden).map(matrix).collect(),
    }
}

/// Prints shape, rank and spectra of a checkpoint's matrices, and how far the last step with telemetry moved them.
///
/// # Errors
/// A checkpoint that cannot be used; a damaged metrics.jsonl beside it.
pub fn inspect(args: &InspectArgs) -> Result<()> {
    let path = checkpoint::find(&args.checkpoint)?;
    let checkpoint = Checkpoint::load_weights(&path)?;
    let meta = checkpoint.meta.clone();
    let (_, params) = load_model(&Cpu::default(), checkpoint)?;
    let last = newest_telemetry(&path, meta.step)?;
    let report = report(&meta, &params, last.as_ref());
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
    if let Some(step) = report.telemetry_step {
        crate::say!("ΔW, ρ and shrink are those of step {step}");
    }
    if !report.pairs.is_empty() {
        crate::say!(
            "{:<20} {:>11} {:>5} {:>8} {:>8} {:>8} {:>11} {:>12} {:>10} {:>10} {:>10} {:>9}",
            "pair",
            "shape",
            "rank",
            "σ(A)",
            "σ(B)",
            "σ(W)",
            "stable rank",
            "‖AᵀA − BᵀB‖",
            "ρ",
            "‖ΔW‖/‖W‖",
            "‖ΔW‖/η",
            "shrink"
        );
    }
    for p in &report.pairs {
        crate::say!(
            "{:<20} {:>11} {:>5} {:>8.4} {:>8.4} {:>8} {:>11} {:>12.4} {:>10} {:>10} {:>10} {:>9}",
            p.name,
            format!("{}×{}", p.outputs, p.inputs),
            p.rank,
            p.sigma_a,
            p.sigma_b,
            cell(p.w.sigma_w, 4),
            cell(p.w.stable_rank, 2),
            p.gauge_imbalance,
            cell(p.rho, 6),
            cell(p.w.update_over_w, 6),
            cell(p.w.update_over_eta, 4),
            cell(p.shrink, 6)
        );
    }
    if !report.hidden.is_empty() {
        crate::say!(
            "{:<26} {:>11} {:>10} {:>11} {:>10} {:>10}",
            "matrix",
            "shape",
            "σ(W), est.",
            "stable rank",
            "‖ΔW‖/‖W‖",
            "‖ΔW‖/η"
        );
    }
    for m in &report.hidden {
        crate::say!(
            "{:<26} {:>11} {:>10} {:>11} {:>10} {:>10}",
            m.name,
            format!("{}×{}", m.outputs, m.inputs),
            cell(m.w.sigma_w, 4),
            cell(m.w.stable_rank, 2),
            cell(m.w.update_over_w, 6),
            cell(m.w.update_over_eta, 4)
        );
    }
    Ok(())
}

/// So many decimals, or a dash.
fn cell(x: Option<f64>, decimals: usize) -> String {
    x.map_or("–".into(), |x| format!("{x:.decimals$}"))
}
