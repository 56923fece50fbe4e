//! `bench`: the time of a training step and its parts, on random tokens.

use std::time::Instant;

use rankgrad::tensor::Cpu;
use serde::Serialize;

use crate::cli::BenchArgs;
use crate::config::{Config, Method, Overrides, Preset};
use crate::data::Batch;
use crate::error::Result;
use crate::flops::step_flops;
use crate::run::peak_memory_mib;
use crate::trainer::{Step, Trainer};

/// Medians over the timed steps.
#[derive(Serialize)]
struct Report {
    preset: Preset,
    method: Method,
    threads: usize,
    steps: usize,
    tokens_per_step: usize,
    forward_ms: f64,
    backward_ms: f64,
    optimizer_ms: f64,
    step_ms: f64,
    tokens_per_second: f64,
    /// The model's matrix products, forward and backward, per second of the whole step.
    gflops: f64,
    params: usize,
    peak_memory_mib: Option<f64>,
}

/// Prints the times.
///
/// # Errors
/// An unusable configuration.
pub fn bench(args: &BenchArgs) -> Result<()> {
    let overrides = Overrides { model: args.model.clone(), ..Overrides::default() };
    let config = overrides.resolve()?;
    let report = crate::pool(config.threads)?.install(|| measure(&config, args.steps))?;
    if args.json {
        crate::say!("{}", serde_json::to_string(&report).expect("plain values"));
        return Ok(());
    }
    crate::say!(
        "forward {:.2} ms, backward {:.2} ms, optimizer {:.2} ms; step {:.2} ms ({} tokens, {} threads, medians of {})",
        report.forward_ms,
        report.backward_ms,
        report.optimizer_ms,
        report.step_ms,
        report.tokens_per_step,
        report.threads,
        report.steps
    );
    crate::say!("{:.0} tokens/s, {:.1} GFLOP/s", report.tokens_per_second, report.gflops);
    if let Some(peak) = report.peak_memory_mib {
        crate::say!("{} parameters, peak memory {peak:.0} MiB", report.params);
    }
    Ok(())
}

fn measure(config: &Config, steps: usize) -> Result<Report> {
    let mut trainer = Trainer::new(&Cpu::<f32>::default(), config);
    let tokens = config.batch * config.context;
    let batches: Vec<Batch> = (0..config.accumulate)
        .map(|micro| {
            let mut state = config.seed.wrapping_add(micro as u64); // Knuth's MMIX generator
            let mut token = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as u32 % config.vocab as u32
            };
            let inputs = (0..tokens).map(|_| token()).collect();
            Batch { inputs, targets: (0..tokens).map(|_| token()).collect(), rows: config.batch }
        })
        .collect();
    let mut times: Vec<(Step, f64)> = Vec::new();
    for i in 0..steps + 2 {
        let start = Instant::now();
        let step = trainer.step(&batches, 0.01)?; // small steps: random tokens teach nothing
        if i >= 2 {
            times.push((step, start.elapsed().as_secs_f64()));
        }
    }
    let median = |f: &dyn Fn(&(Step, f64)) -> f64| {
        let mut values: Vec<f64> = times.iter().map(f).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let seconds = median(&|(_, total)| *total);
    let tokens_per_step = tokens * config.accumulate;
    let flops = step_flops(config);
    Ok(Report {
        preset: config.preset,
        method: config.method,
        threads: rayon::current_num_threads(),
        steps,
        tokens_per_step,
        forward_ms: 1e3 * median(&|(s, _)| s.forward.as_secs_f64()),
        backward_ms: 1e3 * median(&|(s, _)| s.backward.as_secs_f64()),
        optimizer_ms: 1e3 * median(&|(s, _)| s.optimizer.as_secs_f64()),
        step_ms: 1e3 * seconds,
        tokens_per_second: tokens_per_step as f64 / seconds,
        gflops: (flops.forward + flops.backward + flops.guide_products) / seconds / 1e9,
        params: trainer.params.count(),
        peak_memory_mib: peak_memory_mib(),
    })
}
