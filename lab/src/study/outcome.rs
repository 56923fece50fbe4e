//! What one run of a study came to, read back from its directory: final.json or diverged.json, and metrics.jsonl.
//!
//! The files are the only memory of a study. Not here: tables over many runs (tables.rs).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::config::{Config, Overrides, table};
use crate::error::{Error, Result, cannot};
use crate::run::{Diverged, Record, Summary, read_json, read_metrics};

/// A run that is over.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub end: std::result::Result<Summary, Diverged>,
    /// Smallest validation loss, in nats per token, of those during training and the final one.
    pub best_val_loss: Option<f64>,
    pub spikes: usize,
    /// The largest ‖ΔW‖/‖W‖ of the run, where it was measured.
    pub max_update_over_w: Option<f64>,
    /// Of training; of a run that diverged, up to its last record.
    pub seconds: f64,
}

impl Outcome {
    /// What is in the directory of a run; None if it is not over.
    ///
    /// # Errors
    /// Files that are no records of this program.
    pub fn read(directory: &Path) -> Result<Option<Outcome>> {
        let finished: Option<Summary> = read_json(&directory.join("final.json"))?;
        let end = match (finished, Diverged::read(directory)?) {
            (Some(summary), _) => Ok(summary),
            (None, Some(diverged)) => Err(diverged),
            (None, None) => return Ok(None),
        };
        let metrics = directory.join("metrics.jsonl");
        let records = read_metrics(&metrics)?;
        let validated =
            records.iter().filter_map(|r| r.val_loss).chain(end.as_ref().ok().map(|s| s.val_loss));
        Ok(Some(Outcome {
            best_val_loss: validated.reduce(f64::min),
            spikes: spikes(records.iter().filter_map(|r: &Record| r.loss)),
            max_update_over_w: telemetry(&metrics)?
                .iter()
                .flat_map(|line| line.matrices("update_over_w"))
                .reduce(f64::max),
            seconds: end.as_ref().map_or(records.last().map_or(0.0, |r| r.seconds), |s| s.seconds),
            end,
        }))
    }

    /// What rates are compared by: the final validation loss in nats per token, infinity for a run that diverged.
    pub fn loss(&self) -> f64 {
        self.end.as_ref().map_or(f64::INFINITY, |summary| summary.val_loss)
    }
}

/// A line of metrics.jsonl with norms of the blocks' matrices: matrix → quantity → value; null: not finite.
#[derive(Deserialize)]
pub struct Line {
    pub step: u64,
    #[serde(default)]
    pairs: BTreeMap<String, BTreeMap<String, Option<f64>>>,
    /// Those that are kept whole.
    #[serde(default)]
    hidden: BTreeMap<String, BTreeMap<String, Option<f64>>>,
}

impl Line {
    /// The quantities of each matrix.
    pub fn norms(&self) -> impl Iterator<Item = &BTreeMap<String, Option<f64>>> {
        self.pairs.values().chain(self.hidden.values())
    }

    /// One quantity of all matrices that have it.
    pub fn matrices(&self, key: &str) -> impl Iterator<Item = f64> {
        self.norms().filter_map(move |norms| norms.get(key).copied().flatten())
    }
}

/// The lines of a metrics.jsonl of a run that is over, those with norms.
///
/// # Errors
/// A file that cannot be read, a line of another form.
pub fn telemetry(metrics: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(metrics).map_err(cannot("read", metrics))?;
    let with_norms = text.lines().filter(|line| line.contains("\"pairs\"") || line.contains("\"hidden\""));
    with_norms.map(|line| serde_json::from_str(line).map_err(cannot("read", metrics))).collect()
}

/// The configuration recorded in a run's directory must be the one that the study asks for now.
///
/// # Errors
/// Another value, by its key: the program's defaults have changed since, or the directory is of something else.
pub fn same_config(directory: &Path, asked: &Config) -> Result<()> {
    let recorded = table(&Overrides::from_file(&directory.join("config.toml"))?.resolve()?)?;
    for (key, value) in table(asked)? {
        if key != "threads" && recorded.get(&key) != Some(&value) {
            return Err(Error::new(format!(
                "{} was run with `{key}` = {}, the study asks for {value}; move that directory away to run it anew",
                directory.display(),
                recorded.get(&key).map_or("nothing".into(), ToString::to_string)
            )));
        }
    }
    Ok(())
}

/// Weight of the newest loss in the moving mean and variance: a memory of about ten records.
const NEWEST: f64 = 0.1;

/// Records before the first that can be a spike.
const SETTLED: usize = 10;

/// Loss spikes in a sequence of training losses, in nats per token.
///
/// A loss is high if it exceeds the exponentially weighted mean m of the losses before it that were not high (each 0.9
/// times the weight of the next) by more than max(0.5, 6·s), s their standard deviation, weighted likewise. The first ten
/// losses are never high. A spike is a longest sequence of consecutive high losses.
pub fn spikes(losses: impl Iterator<Item = f64>) -> usize {
    let (mut mean, mut variance, mut seen) = (0.0, 0.0, 0);
    let (mut count, mut within) = (0, false);
    for loss in losses {
        let off: f64 = loss - mean;
        let high = seen >= SETTLED && off > f64::max(0.5, 6.0 * f64::sqrt(variance));
        if high {
            count += usize::from(!within);
        } else if seen == 0 {
            (mean, seen) = (loss, 1);
        } else {
            // West 1979, "Updating mean and variance estimates", with weights that fall
            variance = (1.0 - NEWEST) * (variance + NEWEST * off * off);
            mean += NEWEST * off;
            seen += 1;
        }
        within = high;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loss that falls from 5.5 towards 1.5 with noise of ±0.1, and what is added at some places.
    fn course(bumps: &[(usize, f64)]) -> usize {
        let noise = |i: usize| 0.1 * (i as f64 * 1.7).sin();
        let mut losses: Vec<f64> =
            (0..300).map(|i| 1.5 + 4.0 * (-(i as f64) / 30.0).exp() + noise(i)).collect();
        bumps.iter().for_each(|&(at, by)| losses[at] += by);
        spikes(losses.into_iter())
    }

    #[test]
    fn spikes_are_counted_once_each() {
        assert_eq!(course(&[]), 0);
        assert_eq!(course(&[(200, 2.0)]), 1);
        assert_eq!(course(&[(200, 2.0), (201, 3.0), (202, 1.0)]), 1);
        assert_eq!(course(&[(200, 2.0), (202, 2.0), (250, 1.0)]), 3);
        // downwards, too early, too small (six standard deviations of this noise are 0.42, so 0.5 nats decide)
        assert_eq!(course(&[(200, -2.0)]), 0);
        assert_eq!(course(&[(9, 5.0)]), 0);
        assert_eq!(course(&[(200, 0.35)]), 0);
        assert_eq!(spikes(std::iter::empty()), 0);
    }

    /// By hand: ten losses of 2 leave m = 2, s = 0, so the threshold is 0.5. Alternating 1 and 3 have s near 1: then 4 nats are no spike.
    #[test]
    fn both_thresholds_hold() {
        let after = |start: Vec<f64>, x: f64| spikes(start.into_iter().chain([x]));
        assert_eq!(after(vec![2.0; 10], 2.5), 0);
        assert_eq!(after(vec![2.0; 10], 2.5001), 1);
        assert_eq!(after(vec![2.0; 9], 100.0), 0);
        let rough: Vec<f64> = (0..100).map(|i| if i % 2 == 0 { 1.0 } else { 3.0 }).collect();
        assert_eq!(after(rough.clone(), 6.0), 0);
        assert_eq!(after(rough, 9.0), 1);
    }

    #[test]
    fn a_rise_that_stays_is_one_spike() {
        let losses = [vec![2.0; 50], vec![5.0; 50]].concat();
        assert_eq!(spikes(losses.into_iter()), 1);
    }
}
