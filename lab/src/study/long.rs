//! The tables of a long run: what drifts over its steps, window by window, and whether it stayed within the limits below.
//!
//! A missed limit is a line in a table, not an error. Not here: how norms are measured; they are those of metrics.jsonl
//! (`--telemetry-every`), the largest over the blocks' matrices and the window.

use std::path::Path;

use crate::error::Result;
use crate::methods::Family;
use crate::run::read_metrics;
use crate::study::execute::Outcomes;
use crate::study::outcome::{spikes, telemetry};
use crate::study::tables::{Arms, Table, finished};

/// Parts of equal length into which a run is cut.
const WINDOWS: usize = 10;

/// The mean training loss of the last window may lie above that of the best window by so many nats per token.
const LOSS_RISE: f64 = 0.1;

/// σ_W, σ_A and σ_B of the last window may be so many times those of the second (the first has the warm-up).
const GROWTH: f64 = 4.0;

/// σ_A/σ_B or σ_B/σ_A of one pair: a gauge drift (λA, B/λ) by λ changes it by λ².
const GAUGE_RATIO: f64 = 4.0;

/// Largest values over matrices and lines; None: not measured.
#[derive(Clone, Copy, Default)]
struct Window {
    /// The last step of the window.
    end: usize,
    /// Mean training loss.
    loss: f64,
    spikes: usize,
    sigma_w: Option<f64>,
    sigma_a: Option<f64>,
    sigma_b: Option<f64>,
    gauge_imbalance: Option<f64>,
    gauge_ratio: Option<f64>,
    update_over_w: Option<f64>,
    update_over_eta: Option<f64>,
}

/// The windows, and the limits, of each run that is over.
///
/// # Errors
/// A metrics.jsonl that cannot be read.
pub fn tables(title: &str, runs: &Path, arms: Arms, outcomes: &Outcomes) -> Result<[Table; 2]> {
    let mut drift = Table::new(
        format!("{title}: drift over the run"),
        [
            "run",
            "steps",
            "training loss",
            "spikes",
            "σ_W",
            "σ_A",
            "σ_B",
            "‖AᵀA − BᵀB‖",
            "σ_A/σ_B or σ_B/σ_A",
            "‖ΔW‖/‖W‖",
            "‖ΔW‖/η",
        ],
    );
    let mut limits = Table::new(format!("{title}: limits"), ["run", "what", "value", "limit", "held"]);
    for (trial, outcome) in arms.iter().flat_map(|(_, state)| finished(state, outcomes)) {
        let windows = windows(&runs.join(&trial.id), trial.config.steps)?;
        for w in &windows {
            let norms = [
                w.sigma_w,
                w.sigma_a,
                w.sigma_b,
                w.gauge_imbalance,
                w.gauge_ratio,
                w.update_over_w,
                w.update_over_eta,
            ];
            let mut row = vec![
                trial.id.clone(),
                format!("to {}", w.end),
                format!("{:.4}", w.loss),
                w.spikes.to_string(),
            ];
            row.extend(norms.map(|x| x.map_or("–".into(), |x| format!("{x:.4}"))));
            drift.rows.push(row);
        }
        let diverged = outcome.end.is_err();
        let mut limit = |what: &str, value: Option<f64>, limit: f64| {
            let held = value.map_or("not measured", |value| if value <= limit { "yes" } else { "NO" });
            let value = value.map_or("–".into(), |value| format!("{value:.4}"));
            limits.rows.push(vec![trial.id.clone(), what.into(), value, limit.to_string(), held.into()]);
        };
        limit("diverged", Some(f64::from(u8::from(diverged))), 0.0);
        limit("loss spikes", Some(outcome.spikes as f64), 0.0);
        let lowest = windows.iter().map(|w| w.loss).fold(f64::INFINITY, f64::min);
        limit(
            "rise of the loss from the best window to the last",
            windows.last().map(|w| w.loss - lowest),
            LOSS_RISE,
        );
        let growth = |of: fn(&Window) -> Option<f64>| Some(of(windows.last()?)? / of(windows.get(1)?)?);
        limit("growth of σ_W from the second window to the last", growth(|w| w.sigma_w), GROWTH);
        limit("growth of σ_A from the second window to the last", growth(|w| w.sigma_a), GROWTH);
        limit("growth of σ_B from the second window to the last", growth(|w| w.sigma_b), GROWTH);
        let ratio = windows.iter().filter_map(|w| w.gauge_ratio).reduce(f64::max);
        limit("largest σ_A/σ_B or σ_B/σ_A of a pair", ratio, GAUGE_RATIO);
        if Family::of(trial.config.method).is_spectron() {
            let update = windows.iter().filter_map(|w| w.update_over_eta).reduce(f64::max);
            limit("largest ‖ΔW‖/η", update, 1.0); // what its radius is for
        }
    }
    Ok([drift, limits])
}

/// The windows of a run of `steps` that have records.
fn windows(run: &Path, steps: usize) -> Result<Vec<Window>> {
    let path = run.join("metrics.jsonl");
    let records = read_metrics(&path)?;
    let lines = telemetry(&path)?;
    let window_of = |step: u64| (step as usize - 1) * WINDOWS / steps;
    let mut windows = vec![];
    for i in 0..WINDOWS {
        let upto = |last: usize| {
            let before = records.iter().filter(move |r| window_of(r.step) < last);
            spikes(before.filter_map(|r| r.loss))
        };
        let losses: Vec<f64> =
            records.iter().filter(|r| window_of(r.step) == i).filter_map(|r| r.loss).collect();
        if losses.is_empty() {
            continue; // the run diverged before, or records are further apart than windows are long
        }
        let mut window = Window {
            end: (i + 1) * steps / WINDOWS,
            loss: losses.iter().sum::<f64>() / losses.len() as f64,
            // those that begin in it: the mean that a spike exceeds is one over all of the run
            spikes: upto(i + 1) - upto(i),
            ..Window::default()
        };
        for line in lines.iter().filter(|line| window_of(line.step) == i) {
            for norms in line.norms() {
                let norm = |key: &str| norms.get(key).copied().flatten();
                let (a, b) = (norm("sigma_a"), norm("sigma_b"));
                raise(&mut window.sigma_w, norm("sigma_w"));
                raise(&mut window.sigma_a, a);
                raise(&mut window.sigma_b, b);
                raise(&mut window.gauge_imbalance, norm("gauge_imbalance"));
                raise(&mut window.gauge_ratio, a.zip(b).map(|(a, b)| f64::max(a / b, b / a)));
                raise(&mut window.update_over_w, norm("update_over_w"));
                raise(&mut window.update_over_eta, norm("update_over_eta"));
            }
        }
        windows.push(window);
    }
    Ok(windows)
}

fn raise(largest: &mut Option<f64>, x: Option<f64>) {
    *largest = [*largest, x].into_iter().flatten().reduce(f64::max);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 steps with a record each: loss 2, but 4 at step 55; norms at every tenth step, of two pairs, one of them small.
    #[test]
    fn windows_have_means_and_maxima() {
        let dir = tempfile::tempdir().unwrap();
        let line = |step: usize| {
            let loss = if step == 55 { 4.0 } else { 2.0 };
            let pair = |size: f64| {
                format!(
                    "{{\"sigma_a\":{size},\"sigma_b\":{},\"sigma_w\":{size},\"update_over_w\":null}}",
                    2.0 * size
                )
            };
            let norms = format!(",\"pairs\":{{\"a\":{},\"b\":{}}}", pair(0.1), pair(step as f64));
            format!(
                "{{\"step\":{step},\"loss\":{loss},\"lr\":0.1,\"grad_norm\":1.0,\"tokens\":{step},\"seconds\":1.0,\
                 \"tokens_per_second\":1.0{}}}\n",
                if step.is_multiple_of(10) { norms } else { String::new() }
            )
        };
        let text: String = (1..=100).map(line).collect();
        std::fs::write(dir.path().join("metrics.jsonl"), text).unwrap();
        let windows = windows(dir.path(), 100).unwrap();
        assert_eq!(windows.len(), 10);
        assert_eq!((windows[4].loss, windows[5].loss), (2.0, 2.2));
        assert_eq!(windows.iter().map(|w| w.spikes).collect::<Vec<_>>(), [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
        let last = windows[9];
        assert_eq!((last.sigma_w, last.sigma_a, last.sigma_b), (Some(100.0), Some(100.0), Some(200.0)));
        assert_eq!((last.gauge_ratio, last.gauge_imbalance, last.update_over_w), (Some(2.0), None, None));
    }
}
