//! `runs`: run directories in a table.
//!
//! A run that cannot be read is a line of its own and hides no other. Not here: curves and settings side by side (report/).

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use walkdir::WalkDir;

use crate::cli::{Order, RunsArgs};
use crate::config::{Method, Overrides, Preset, name};
use crate::error::{Error, Result, cannot};
use crate::flops::parameters;
use crate::run::{Diverged, Outcome, read_metrics};

/// A run, as far as it has come.
#[derive(Serialize)]
struct Row {
    run: PathBuf,
    method: Method,
    preset: Preset,
    /// Trained numbers.
    params: usize,
    seed: u64,
    /// Learning rate of the blocks' matrices, at its peak.
    lr: f64,
    /// Steps recorded, and those planned.
    step: u64,
    steps: usize,
    /// Whether final.json is there.
    finished: bool,
    /// The step at which it diverged.
    diverged_step: Option<u64>,
    /// Nats per token; of the whole split if finished, else the newest of some batches.
    val_loss: Option<f64>,
    val_bits_per_byte: Option<f64>,
    tokens: u64,
    seconds: f64,
    tokens_per_second: Option<f64>,
    /// Seconds since the run last wrote a record.
    idle_seconds: Option<u64>,
}

/// Prints a table of the runs in the given directories.
///
/// # Errors
/// A directory that cannot be listed, or none with a run.
pub fn runs(args: &RunsArgs) -> Result<()> {
    let mut rows = Vec::new();
    let mut unusable = Vec::new();
    for directory in &args.directories {
        for run in find(directory)? {
            match read(run) {
                Ok(row) => rows.push(row),
                Err(error) => unusable.push(error),
            }
        }
    }
    if rows.is_empty() && unusable.is_empty() {
        let all: Vec<_> = args.directories.iter().map(|d| d.display().to_string()).collect();
        return Err(Error::new(format!("no run in {}: `rankgrad train` makes one", all.join(", "))));
    }
    match args.by {
        Order::Name => {} // as found
        Order::Loss => rows.sort_by(|a, b| by_loss(a.val_loss, b.val_loss)),
        Order::Time => rows.sort_by_key(|row| std::cmp::Reverse(row.idle_seconds)),
    }
    if args.json {
        rows.iter().for_each(|row| crate::say!("{}", serde_json::to_string(row).expect("plain values")));
    } else if !rows.is_empty() {
        print(&rows);
    }
    unusable.iter().for_each(|error| eprintln!("left out: {error}"));
    Ok(())
}

/// Smallest first, none last.
fn by_loss(a: Option<f64>, b: Option<f64>) -> Ordering {
    a.unwrap_or(f64::INFINITY).total_cmp(&b.unwrap_or(f64::INFINITY))
}

/// The runs below a directory, itself included, in the order of their paths.
fn find(directory: &Path) -> Result<Vec<PathBuf>> {
    let is_run = |path: &Path| path.join("config.toml").exists() && path.join("metrics.jsonl").exists();
    let mut runs = Vec::new();
    if directory == Path::new("runs") && !directory.exists() {
        return Ok(runs); // the default: nothing was trained here yet
    }
    let mut walk = WalkDir::new(directory).sort_by_file_name().into_iter();
    while let Some(entry) = walk.next() {
        let entry = entry.map_err(cannot("list", directory))?;
        if entry.file_type().is_dir() && is_run(entry.path()) {
            walk.skip_current_dir();
            runs.push(entry.into_path());
        }
    }
    Ok(runs)
}

fn read(run: PathBuf) -> Result<Row> {
    let config = Overrides::from_file(&run.join("config.toml"))?.resolve()?;
    let metrics = run.join("metrics.jsonl");
    let records = read_metrics(&metrics)?;
    let outcome = Outcome::read(&run.join("final.json"))?;
    let (finished, outcome) = (outcome.is_some(), outcome.unwrap_or_default());
    let last = records.last();
    let changed = fs::metadata(&metrics).and_then(|m| m.modified());
    let idle = changed.ok().and_then(|then| SystemTime::now().duration_since(then).ok());
    Ok(Row {
        method: config.method,
        preset: config.preset,
        params: parameters(&config),
        seed: config.seed,
        lr: config.lr,
        step: last.map_or(0, |r| r.step),
        steps: config.steps,
        finished,
        diverged_step: Diverged::read(&run)?.map(|d| d.step),
        val_loss: outcome.val_loss.or_else(|| records.iter().rev().find_map(|r| r.val_loss)),
        val_bits_per_byte: outcome.val_bits_per_byte,
        tokens: last.map_or(0, |r| r.tokens),
        seconds: last.map_or(0.0, |r| r.seconds),
        tokens_per_second: last.map(|r| r.tokens as f64 / r.seconds),
        idle_seconds: idle.map(|d| d.as_secs()),
        run,
    })
}

fn print(rows: &[Row]) {
    let dash = || "–".to_owned();
    let cells = |row: &Row| {
        let about = if row.finished { "" } else { "~" };
        let state = match row.diverged_step {
            _ if row.finished => "finished".into(),
            Some(step) => format!("diverged at step {step}"),
            None => format!("step {} of {}", row.step, row.steps),
        };
        [
            row.run.display().to_string(),
            name(row.method),
            name(row.preset),
            row.params.to_string(),
            row.seed.to_string(),
            row.lr.to_string(),
            row.tokens.to_string(),
            row.val_loss.map_or_else(dash, |loss| format!("{about}{loss:.4}")),
            row.val_bits_per_byte.map_or_else(dash, |bits| format!("{bits:.4}")),
            row.tokens_per_second.map_or_else(dash, |speed| format!("{speed:.0}")),
            span(row.seconds as u64),
            state,
            row.idle_seconds.map_or_else(dash, |seconds| format!("{} ago", span(seconds))),
        ]
    };
    let heads = [
        "run",
        "method",
        "preset",
        "parameters",
        "seed",
        "lr",
        "tokens",
        "val. loss",
        "bits/byte",
        "tokens/s",
        "time",
        "state",
        "last record",
    ];
    let table: Vec<[String; 13]> =
        std::iter::once(heads.map(str::to_owned)).chain(rows.iter().map(cells)).collect();
    let width = |column: usize| table.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 13] = std::array::from_fn(width);
    for row in &table {
        let cell = |(i, text): (usize, &String)| match i {
            3..=10 => format!("{text:>0$}", widths[i]), // numbers
            _ => format!("{text:<0$}", widths[i]),
        };
        let line: Vec<String> = row.iter().enumerate().map(cell).collect();
        crate::say!("{}", line.join("  ").trim_end());
    }
}

/// Seconds in the two largest units.
fn span(seconds: u64) -> String {
    match seconds {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{} min {} s", s / 60, s % 60),
        s @ 3600..86_400 => format!("{} h {} min", s / 3600, s / 60 % 60),
        s => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_two_units() {
        let all = [0, 59, 60, 3599, 3600, 90_061].map(span);
        assert_eq!(all, ["0 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "1 d 1 h"]);
    }

    #[test]
    fn runs_without_a_loss_come_last() {
        let mut losses = [None, Some(2.0), Some(1.0)];
        losses.sort_by(|a, b| by_loss(*a, *b));
        assert_eq!(losses, [Some(1.0), Some(2.0), None]);
    }
}
