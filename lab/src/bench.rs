//! `bench`: the time of a training step and its parts, on random tokens; with `--profile` that of each op, or of each kernel of a GPU;
//! with `--rounds` again and again, when told to.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rankgrad::parallel::Alone;
use rankgrad::tensor::Backend;
use serde::Serialize;

use crate::cli::BenchArgs;
use crate::config::{Config, Method, Overrides, Preset};
use crate::data::Batch;
use crate::device::{self, Device, KernelTime, Watch, on_device};
use crate::error::{Error, Result};
use crate::flops::{Work, op_work, step_flops};
use crate::run::peak_memory_mib;
use crate::trainer::{OpTimes, Step, Trainer};

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
    /// What flops.rs counts: of those products, and of the optimizer.
    product_flops: f64,
    optimizer_flops: f64,
    params: usize,
    /// Of the process, and of the GPU's memory.
    peak_memory_mib: Option<f64>,
    device_memory_mib: Option<f64>,
    /// What CUDA graphs did in all steps so far, those that are not timed too; None without them.
    #[serde(skip_serializing_if = "Option::is_none")]
    graphs: Option<String>,
    /// With a profile of a GPU: in all timed steps together, taken once more.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kernels: Vec<KernelTime>,
}

/// Prints the times.
///
/// # Errors
/// An unusable configuration.
pub fn bench(args: &BenchArgs) -> Result<()> {
    let overrides = Overrides { model: args.model.clone(), ..Overrides::default() };
    let config = overrides.resolve()?;
    if args.profile && args.json && args.on.device == Device::Cpu {
        return Err(Error::new("the profile of a processor is a table: leave out --json or --profile"));
    }
    let opened = device::open(args.on.device, config.precision)?;
    if args.rounds {
        return crate::pool(config.threads)?.install(|| {
            on_device!(opened, |device, compute| in_turn(&device, compute, &config, args.steps))
        });
    }
    let (report, times) = crate::pool(config.threads)?.install(|| {
        on_device!(opened, |device, compute| measure(&device, compute, &config, args.steps, args.profile))
    })?;
    if args.json {
        crate::say!("{}", serde_json::to_string(&report).expect("plain values"));
        return Ok(());
    }
    let passes = match report.device_memory_mib {
        None => format!("forward {:.2} ms, backward {:.2} ms", report.forward_ms, report.backward_ms),
        // a GPU is still at the one when it is asked for the other
        Some(_) => format!("forward and backward {:.2} ms", report.forward_ms + report.backward_ms),
    };
    crate::say!(
        "{passes}, optimizer {:.2} ms; step {:.2} ms ({} tokens, {} threads, medians of {})",
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
    if let Some(peak) = report.device_memory_mib {
        crate::say!("peak memory of the device {peak:.0} MiB");
    }
    if let Some(used) = &report.graphs {
        crate::say!("CUDA graphs: {used}");
    }
    if !times.is_empty() {
        crate::say!("{}", table(&times, &op_work(&config), args.steps));
    }
    if !report.kernels.is_empty() {
        crate::say!("{}", kernel_table(&report));
    }
    Ok(())
}

/// Per step and kernel, the slowest first: calls, milliseconds on the device, its part of all kernels, and the rate of products. What
/// the kernels do not take of a step, the device waited.
fn kernel_table(report: &Report) -> String {
    let steps = report.steps as f64;
    let all: f64 = report.kernels.iter().map(|kernel| kernel.ms / steps).sum();
    let wide =
        report.kernels.iter().map(|kernel| kernel.kernel.chars().count()).max().unwrap_or_default().max(8);
    let mut text = format!("{:wide$}{:>8}{:>12}{:>8}", "kernel", "calls", "ms", "share");
    for KernelTime { kernel, calls, ms, flops } in &report.kernels {
        let rate = if *flops > 0.0 { format!("{:>10.1} TFLOP/s", flops / ms / 1e9) } else { String::new() };
        let (calls, ms) = (*calls as f64 / steps, ms / steps);
        write!(text, "\n{kernel:wide$}{calls:>8.0}{ms:>12.3}{:>7.1}%{rate}", 100.0 * ms / all)
            .expect("a String takes it");
    }
    write!(text, "\n{:wide$}{:>8}{all:>12.3} of {:.3} ms a step", "all", "", report.step_ms)
        .expect("a String takes it");
    text
}

/// Per step and op, the slowest first: mean calls; milliseconds and rate of forward and backward; its part of all ops together.
/// Lanes that run side by side are added up, so the rates are those of one thread.
fn table(times: &OpTimes, work: &BTreeMap<&'static str, Work>, steps: usize) -> String {
    let ms = |time: Duration| 1e3 * time.as_secs_f64() / steps as f64;
    let mut rows: Vec<(&str, usize, [f64; 2])> = times
        .iter()
        .map(|(op, time)| (*op, time.calls / steps, [ms(time.forward), ms(time.backward)]))
        .collect();
    rows.sort_by(|a, b| (b.2[0] + b.2[1]).total_cmp(&(a.2[0] + a.2[1])));
    let all = rows.iter().fold([0.0, 0.0], |[f, b], row| [f + row.2[0], b + row.2[1]]);
    rows.push(("all", rows.iter().map(|row| row.1).sum(), all));
    let mut text = format!(
        "{:16}{:>6}{:>13}{:>15}{:>14}{:>15}{:>8}",
        "op", "calls", "forward, ms", "", "backward, ms", "", "share"
    );
    for (op, calls, ms) in rows {
        let rate = |pass: usize| match work.get(op) {
            Some(Work::Flops(flops)) => format!("{:.1} GFLOP/s", flops[pass] / ms[pass] / 1e6),
            Some(Work::Bytes(bytes)) if bytes[pass] > 0.0 => {
                format!("{:.1} GB/s", bytes[pass] / ms[pass] / 1e6)
            }
            _ => String::new(),
        };
        let share = 100.0 * (ms[0] + ms[1]) / (all[0] + all[1]);
        let [forward, backward] = ms;
        write!(
            text,
            "\n{op:16}{calls:6}{forward:13.3}{:>15}{backward:14.3}{:>15}{share:7.1}%",
            rate(0),
            rate(1)
        )
        .expect("a String takes it");
    }
    text
}

fn measure<B: Watch, C: Backend<Wide = B::Wide>>(
    device: &B,
    compute: C,
    config: &Config,
    steps: usize,
    profile: bool,
) -> Result<(Report, OpTimes)> {
    let mut trainer = Trainer::new(device, Arc::new(Alone), config).computing_on(compute);
    let report = round(device, &mut trainer, config, [UNTIMED, steps], profile)?;
    Ok((report, trainer.op_times.unwrap_or_default()))
}

/// A report for each line of stdin, as a line of JSON; "ready" when the first may come.
fn in_turn<B: Watch, C: Backend<Wide = B::Wide>>(
    device: &B,
    compute: C,
    config: &Config,
    steps: usize,
) -> Result<()> {
    let mut trainer = Trainer::new(device, Arc::new(Alone), config).computing_on(compute);
    crate::say!("ready");
    let mut untimed = UNTIMED;
    for line in std::io::stdin().lines() {
        line.map_err(|e| Error::new(format!("--rounds: cannot read stdin: {e}")))?;
        let report = round(device, &mut trainer, config, [untimed, steps], false)?;
        crate::say!("{}", serde_json::to_string(&report).expect("plain values"));
        untimed = 0;
    }
    Ok(())
}

/// The steps before the first that is timed.
const UNTIMED: usize = 2;

/// The micro-batches of a step, random tokens: others in each step, as in training.
fn batches(config: &Config, step: u64) -> Vec<Batch> {
    let tokens = config.batch * config.context;
    let batch = |micro: u64| {
        let of_all = step.wrapping_mul(config.accumulate as u64).wrapping_add(micro);
        let mut state = config.seed.wrapping_add(of_all); // Knuth's MMIX generator
        let mut token = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32 % config.vocab as u32
        };
        let inputs = (0..tokens).map(|_| token()).collect();
        Batch { inputs, targets: (0..tokens).map(|_| token()).collect(), rows: config.batch }
    };
    (0..config.accumulate as u64).map(batch).collect()
}

fn round<B: Watch>(
    device: &B,
    trainer: &mut Trainer<B>,
    config: &Config,
    [untimed, steps]: [usize; 2],
    profile: bool,
) -> Result<Report> {
    let mut times: Vec<(Step, f64)> = Vec::new();
    for i in 0..untimed + steps {
        if profile && !B::ASYNCHRONOUS && i == untimed {
            trainer.op_times = Some(OpTimes::new());
        }
        let batches = batches(config, trainer.steps());
        let start = Instant::now();
        let step = trainer.step(&batches, 0.01)?; // small steps: random tokens teach nothing
        device.sync();
        if i >= untimed {
            times.push((step, start.elapsed().as_secs_f64()));
        }
    }
    let device_memory_mib = device.peak_bytes().map(|bytes| bytes as f64 / f64::from(1 << 20));
    let mut kernels = Vec::new();
    if profile && B::ASYNCHRONOUS {
        device.watch_kernels();
        for _ in 0..steps {
            trainer.step(&batches(config, trainer.steps()), 0.01)?;
        }
        kernels = device.kernel_times();
    }
    let median = |f: &dyn Fn(&(Step, f64)) -> f64| {
        let mut values: Vec<f64> = times.iter().map(f).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let seconds = median(&|(_, total)| *total);
    let tokens_per_step = config.batch * config.context * config.accumulate;
    let flops = step_flops(config);
    let product_flops = flops.forward + flops.backward + flops.guide_products;
    Ok(Report {
        preset: config.preset,
        method: config.method,
        threads: rayon::current_num_threads(),
        steps,
        tokens_per_step,
        forward_ms: 1e3 * median(&|(s, _)| s.forward.as_secs_f64()),
        backward_ms: 1e3 * median(&|(s, _)| s.backward.as_secs_f64()),
        optimizer_ms: 1e3 * median(&|(s, total)| total - (s.forward + s.backward).as_secs_f64()),
        step_ms: 1e3 * seconds,
        tokens_per_second: tokens_per_step as f64 / seconds,
        gflops: product_flops / seconds / 1e9,
        product_flops,
        optimizer_flops: flops.optimizer,
        params: trainer.params.count(),
        peak_memory_mib: peak_memory_mib(),
        device_memory_mib,
        graphs: device.graph_use(),
        kernels,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rankgrad::tensor::Cpu;

    #[test]
    fn the_profile_counts_each_op_and_its_time_fits_into_the_step() {
        let config = Overrides::default().resolve().unwrap(); // tiny: 12 rows, 2 at a time; 4 layers with 7 pairs each
        let steps = 2;
        let start = Instant::now();
        let (_, times) = crate::pool(1)
            .unwrap()
            .install(|| measure(&Cpu::<f32>::default(), Cpu::default(), &config, steps, true))
            .expect("the default is usable");
        let wall = start.elapsed();
        assert_eq!(times["lowrank_linear"].calls, steps * 6 * 4 * 7);
        assert_eq!(times["attention"].calls, steps * 6 * 4);
        assert_eq!(times["cross_entropy"].calls, steps * 6);
        assert!(times["lowrank_linear"].backward > Duration::ZERO);
        assert_eq!(times["leaf"].backward, Duration::ZERO);
        assert!(times.values().map(|t| t.forward + t.backward).sum::<Duration>() < wall);

        let table = table(&times, &op_work(&config), steps);
        assert!(table.matches(" GFLOP/s").count() == 6 && table.matches(" GB/s").count() >= 10, "{table}");
        let share =
            |line: &str| line.rsplit(' ').next().unwrap().trim_end_matches('%').parse::<f64>().unwrap();
        let shares: Vec<f64> = table.lines().skip(1).map(share).collect();
        let (all, ops) = shares.split_last().unwrap();
        assert!(*all == 100.0 && (ops.iter().sum::<f64>() - 100.0).abs() < 0.1 * ops.len() as f64, "{table}");
        assert!(ops.is_sorted_by(|a, b| a >= b), "{table}");

        let (_, none) = crate::pool(1)
            .unwrap()
            .install(|| measure(&Cpu::<f32>::default(), Cpu::default(), &config, 1, false))
            .unwrap();
        assert!(none.is_empty());
    }
}
