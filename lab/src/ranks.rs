//! `rank` and `merge`: a checkpoint's model with other ranks, or none; and what they share with `import`: cutting matrices, the
//! table of it, and writing a model as a checkpoint of step 0.
//!
//! Not here: training what comes out (`train --from`). Letters: W [m, n] = A·Bᵀ, r rank, σ singular values.

use std::collections::BTreeMap;
use std::path::Path;

use rankgrad::lowrank::{FactorPair, Params, rank_for_energy};
use rankgrad::tensor::{Cpu, Tensor};
use rayon::prelude::*;

use crate::checkpoint::{self, Checkpoint, Meta};
use crate::cli::{DataOptions, MergeArgs, RankArgs};
use crate::config::{Config, Method, name};
use crate::data::Corpus;
use crate::error::{Error, Result};
use crate::export::{must_be_new, write_directory};
use crate::inspect::corpus;
use crate::tokens::Tokenizer;
use crate::trainer::{load_model, validate, weights, without_guides};

type B = Cpu<f32>;

/// What decides the ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cut {
    /// This part of min(m, n), rounded down.
    Ratio(f64),
    /// The smallest rank that keeps this part of Σ σ².
    Energy(f64),
}

impl Cut {
    /// From two flags, of which one is given.
    ///
    /// # Errors
    /// A value that is not in (0, 1].
    pub fn of(ratio: (&str, Option<f64>), energy: Option<f64>) -> Result<Self> {
        let (flag, value, cut) = match (ratio, energy) {
            ((_, _), Some(energy)) => ("--energy", energy, Self::Energy(energy)),
            ((flag, ratio), None) => {
                let ratio = ratio.ok_or_else(|| Error::new(format!("give {flag} or --energy")))?;
                (flag, ratio, Self::Ratio(ratio))
            }
        };
        match value > 0.0 && value <= 1.0 {
            true => Ok(cut),
            false => Err(Error::new(format!("{flag} is {value}: it must be in (0, 1]"))),
        }
    }
}

/// A row of the table.
pub struct Row {
    name: String,
    shape: [usize; 2],
    rank: usize,
    /// ‖W − A·Bᵀ‖_F/‖W‖_F, measured on the factors as they are written.
    error: f64,
    /// Σ dropped σ²/Σ σ².
    dropped: f64,
    /// Parameters before and after.
    before: usize,
    after: usize,
}

/// The configuration of the outcome: its ranks, and a method for pairs.
fn configured(config: &Config, cut: Cut, ranks: BTreeMap<String, usize>) -> Result<Config> {
    let method = if config.factored() { config.method } else { Method::Spectron };
    // a ratio of 1 beside an energy: every matrix has its own rank then
    let (rank_ratio, ranks) = match cut {
        Cut::Ratio(ratio) => (ratio, BTreeMap::new()),
        Cut::Energy(_) => (1.0, ranks),
    };
    let config = Config { method, rank_ratio, ranks, ..config.clone() };
    config.check()?;
    Ok(config)
}

/// Turns every whole matrix of a model into a pair and cuts every pair, all in parallel; the configuration that goes with it, and a
/// row each.
///
/// # Errors
/// A rank that is zero or above what a matrix has; a matrix that is not finite.
pub fn factorise(config: &Config, params: Params<B>, cut: Cut) -> Result<(Config, Params<B>, Vec<Row>)> {
    let by_ratio = configured(config, cut, BTreeMap::new())?;
    let rank = |name: &str, shape: [usize; 2], sigma: &[f64]| match cut {
        Cut::Ratio(_) => by_ratio.rank(name, shape),
        Cut::Energy(energy) => rank_for_energy(sigma, energy),
    };
    let row = |name: &str, w: &Tensor<B>, (pair, sigma): (FactorPair<B>, Vec<f64>), before: usize| {
        let squares = |sigma: &[f64]| sigma.iter().rev().map(|s| s * s).sum::<f64>();
        // a matrix of zeros is itself again
        let part = |x: f64, of: f64| if of > 0.0 { x / of } else { 0.0 };
        let row = Row {
            name: name.to_owned(),
            shape: [w.rows(), w.cols()],
            rank: pair.rank(),
            error: part(pair.to_dense().sub(w).norm(), w.norm()),
            dropped: part(squares(&sigma[pair.rank()..]), squares(&sigma)),
            before,
            after: pair.costs().parameters,
        };
        (pair, row)
    };
    let finite = |name: &str, x: &Tensor<B>| match x.is_finite() {
        true => Ok(()),
        false => Err(Error::new(format!("`{name}` has an element that is not finite"))),
    };
    let Params { values, pair_names, hidden_names, dense_names } = params;
    let cut_pair = |(name, pair): (&String, &FactorPair<B>)| {
        finite(name, &pair.a)?;
        finite(name, &pair.b)?;
        let shape = [pair.outputs(), pair.inputs()];
        let wanted = by_ratio.rank(name, shape);
        if matches!(cut, Cut::Ratio(_)) && wanted > pair.rank() {
            return Err(Error::new(format!(
                "`{name}` {shape:?} has rank {}; a rank of {wanted} would be above it: choose a smaller --to-ratio",
                pair.rank()
            )));
        }
        let small = pair.truncate_by(|sigma| rank(name, shape, sigma));
        Ok(row(name, &pair.to_dense(), small, pair.costs().parameters))
    };
    let cut_whole = |(name, w): (&String, &Tensor<B>)| {
        finite(name, w)?;
        let shape = [w.rows(), w.cols()];
        Ok(row(name, w, FactorPair::from_dense_by(w, |sigma| rank(name, shape, sigma)), w.len()))
    };
    let pairs: Vec<Result<_>> = pair_names.par_iter().zip(&values.pairs).map(cut_pair).collect();
    let whole: Vec<Result<_>> = hidden_names.par_iter().zip(&values.hidden).map(cut_whole).collect();
    let (mut outcome, mut rows) = (Params::default(), vec![]);
    for cut in pairs.into_iter().chain(whole) {
        let (pair, row) = cut?;
        outcome.pair(row.name.clone(), pair);
        rows.push(row);
    }
    outcome.values.dense = values.dense;
    outcome.dense_names = dense_names;
    let ranks = rows.iter().map(|row| (row.name.clone(), row.rank)).collect();
    Ok((configured(config, cut, ranks)?, outcome, rows))
}

/// Prints the rows, and the parameters of the whole model.
pub fn print(rows: &[Row], before: usize, after: usize) {
    let [a, b] = ["‖W − ABᵀ‖/‖W‖", "dropped energy"];
    crate::say!(
        "{:<20} {:>13} {:>6} {a:>15} {b:>15} {:>12} {:>12}",
        "matrix",
        "shape",
        "rank",
        "parameters",
        "afterwards"
    );
    for row in rows {
        crate::say!(
            "{:<20} {:>13} {:>6} {:>15.3e} {:>15.3e} {:>12} {:>12}",
            row.name,
            format!("{}×{}", row.shape[0], row.shape[1]),
            row.rank,
            row.error,
            row.dropped,
            row.before,
            row.after
        );
    }
    crate::say!("{:<72} {before:>12} {after:>12}", "whole model");
}

/// Writes a model as a directory with one checkpoint of step 0.
///
/// # Errors
/// A directory that exists, a full disk.
pub fn write_model(out: &Path, config: &Config, params: &Params<B>, tokenizer: &Tokenizer) -> Result<()> {
    let tensors = weights(params);
    let meta = Meta::of_model(config.clone());
    let checkpoint = Checkpoint { meta, tokenizer: tokenizer.json().map(str::to_owned), tensors };
    write_directory(out, &[("step-00000000.safetensors", checkpoint.to_bytes()?)])
}

/// The checkpoint of a finished model; `out` must not exist.
fn open(path: &Path, out: &Path) -> Result<Checkpoint> {
    must_be_new(out)?; // before any work is done
    let checkpoint = Checkpoint::load_weights(&checkpoint::find(path)?)?;
    without_guides(&checkpoint, path)?;
    Ok(checkpoint)
}

/// The data to compare two models on, where some is named: read before anything is written.
fn named(data: &DataOptions, config: &Config, tokenizer: &Tokenizer) -> Result<Option<Corpus>> {
    let none = data.data.is_empty() && data.val_data.is_empty();
    (!none).then(|| corpus(config, tokenizer, &data.data, &data.val_data)).transpose()
}

/// Prints the validation losses of two models where data is named.
fn compare(corpus: Option<Corpus>, models: [(&Config, &Params<B>); 2]) {
    let Some(corpus) = corpus else { return };
    let [before, after] = models.map(|(config, params)| {
        let (model, _) = crate::model::Model::blank(&B::default(), config);
        validate(B::default(), config, &model, params, &corpus, 0).0
    });
    crate::say!("data: {}", corpus.summary);
    crate::say!("validation loss {before:.4} nats per token before, {after:.4} after");
}

/// Cuts the pairs of a checkpoint, or makes pairs of its whole matrices.
///
/// # Errors
/// A checkpoint or data that cannot be used, a rank above a pair's, a directory that exists.
pub fn rank(args: &RankArgs) -> Result<()> {
    let cut = Cut::of(("--to-ratio", args.to_ratio), args.energy)?;
    let source = open(&args.checkpoint, &args.out)?;
    let tokenizer = source.tokenizer()?;
    let config = source.meta.config.clone();
    crate::pool(0)?.install(|| {
        let corpus = named(&args.data, &config, &tokenizer)?;
        let (_, params) = load_model(&B::default(), source)?;
        let (small, outcome, rows) = factorise(&config, params.clone(), cut)?;
        write_model(&args.out, &small, &outcome, &tokenizer)?;
        print(&rows, params.count(), outcome.count());
        compare(corpus, [(&config, &params), (&small, &outcome)]);
        crate::say!("{}: {}, step 0", args.out.display(), name(small.method));
        Ok(())
    })
}

/// Multiplies the pairs of a checkpoint out.
///
/// # Errors
/// A checkpoint without pairs, or that or data that cannot be used; a directory that exists.
pub fn merge(args: &MergeArgs) -> Result<()> {
    let source = open(&args.checkpoint, &args.out)?;
    let tokenizer = source.tokenizer()?;
    let config = source.meta.config.clone();
    if !config.factored() {
        return Err(Error::new(format!(
            "{}: a model of {} has no factor pairs to merge",
            args.checkpoint.display(),
            name(config.method)
        )));
    }
    let whole = Config { method: Method::DenseMuon, ranks: BTreeMap::new(), ..config.clone() };
    crate::pool(0)?.install(|| {
        let corpus = named(&args.data, &config, &tokenizer)?;
        let (_, params) = load_model(&B::default(), source)?;
        let mut merged = Params::default();
        for (name, pair) in params.pair_names.iter().zip(&params.values.pairs) {
            merged.hidden(name.clone(), pair.to_dense()); // [m, n]
        }
        merged.values.dense = params.values.dense.clone();
        merged.dense_names = params.dense_names.clone();
        write_model(&args.out, &whole, &merged, &tokenizer)?;
        let (before, after) = (params.count(), merged.count());
        compare(corpus, [(&config, &params), (&whole, &merged)]);
        let method = name(whole.method);
        crate::say!("{}: {method}, step 0, {before} parameters before, {after} after", args.out.display());
        Ok(())
    })
}
