//! `generate --bench`: how fast prompts are read and tokens are added, with the factor pairs and with their products.
//!
//! Tokens are made up and weights may be those of an untrained model: neither changes how long anything takes.

use std::time::Instant;

use rankgrad::lowrank::Params;
use rankgrad::tensor::Backend;
use serde::Serialize;

use super::sequence::{Sequence, advance};
use crate::model::{Model, Weights};
use crate::run::peak_memory_mib;

/// Sequences that are continued together in the last column.
const BATCH: usize = 4;

/// One way to keep the weights.
#[derive(Serialize)]
struct Row {
    weights: &'static str,
    /// All of them, and what a token's logits are computed from.
    weights_mib: f64,
    read_mib: f64,
    /// Of one sequence, prompt and tokens.
    cache_mib: f64,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    /// Of all sequences together.
    batch_decode_tokens_per_second: f64,
    /// `read_mib` per token, one sequence, in units of 10⁹ bytes per second.
    gigabytes_per_second: f64,
}

#[derive(Serialize)]
struct Report {
    threads: usize,
    prompt_tokens: usize,
    decoded_tokens: usize,
    batch: usize,
    peak_memory_mib: Option<f64>,
    rows: Vec<Row>,
}

/// Times the model with each kind of weights, or with `only` one; prints a table or JSON.
pub fn bench<B: Backend<Elem = f32>>(
    model: &Model<B>,
    params: &Params<B>,
    only: Weights,
    tokens: usize,
    json: bool,
) {
    let prompt_tokens = (model.context() / 2).max(1);
    let decoded_tokens = tokens.min(model.context() - prompt_tokens).max(1);
    let kinds = match only {
        _ if params.values.pairs.is_empty() => &[("whole", Weights::Fewer)][..],
        Weights::Fewer => {
            &[("factored", Weights::Factored), ("merged", Weights::Merged), ("fewer", Weights::Fewer)]
        }
        Weights::Factored => &[("factored", Weights::Factored)],
        Weights::Merged => &[("merged", Weights::Merged)],
    };
    let mut rows: Vec<Row> = Vec::new();
    for &(weights, kind) in kinds {
        let (model, params) = model.for_decoding(params, kind);
        let mib = |elements: usize| (elements * size_of::<f32>()) as f64 / (1 << 20) as f64;
        let (all, read) = (mib(params.count()), mib(model.elements_read(&params)));
        if rows.iter().any(|row| row.weights_mib == all) {
            continue; // the choice by size is one of the two
        }
        let start = || {
            let prompt = (0..prompt_tokens as u32).map(|i| i * 37 % 256).collect();
            Sequence::new(&model, &params, prompt, 1)
        };
        let seconds = |f: &mut dyn FnMut()| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        };
        let prefill = median((0..3).map(|_| {
            let mut s = start();
            seconds(&mut || drop(advance(&model, &params, &mut [&mut s])))
        }));
        let mut cache_mib = 0.0;
        let mut decode = |batch: usize| {
            let mut all: Vec<Sequence<B>> = (0..batch).map(|_| start()).collect();
            let mut all: Vec<&mut Sequence<B>> = all.iter_mut().collect();
            advance(&model, &params, &mut all);
            let time = median((0..decoded_tokens).map(|i| {
                all.iter_mut().for_each(|s| s.tokens.push(i as u32 % 256));
                seconds(&mut || drop(advance(&model, &params, &mut all)))
            }));
            cache_mib = all[0].cache_bytes() as f64 / (1 << 20) as f64;
            batch as f64 / time
        };
        let (one, batch) = (decode(1), decode(BATCH));
        rows.push(Row {
            weights,
            weights_mib: all,
            read_mib: read,
            cache_mib,
            prefill_tokens_per_second: prompt_tokens as f64 / prefill,
            decode_tokens_per_second: one,
            batch_decode_tokens_per_second: batch,
            gigabytes_per_second: one * read * (1 << 20) as f64 / 1e9,
        });
    }
    let threads = rayon::current_num_threads();
    let peak_memory_mib = peak_memory_mib();
    let report = Report { threads, prompt_tokens, decoded_tokens, batch: BATCH, peak_memory_mib, rows };
    if json {
        crate::say!("{}", serde_json::to_string(&report).expect("plain values"));
        return;
    }
    crate::say!(
        "{prompt_tokens} tokens of prompt, {decoded_tokens} more (medians), {threads} threads; MiB, tokens/s\n\
         {:10}{:>10}{:>12}{:>10}{:>10}{:>10}{:>12}{:>8}",
        "weights",
        "in all",
        "per token",
        "cache",
        "prefill",
        "decode",
        format!("decode × {BATCH}"),
        "GB/s"
    );
    for row in &report.rows {
        crate::say!(
            "{:10}{:10.1}{:12.1}{:10.1}{:10.0}{:10.1}{:12.1}{:8.1}",
            row.weights,
            row.weights_mib,
            row.read_mib,
            row.cache_mib,
            row.prefill_tokens_per_second,
            row.decode_tokens_per_second,
            row.batch_decode_tokens_per_second,
            row.gigabytes_per_second
        );
    }
    if let Some(peak) = report.peak_memory_mib {
        crate::say!("peak memory {peak:.0} MiB, of all rows");
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
