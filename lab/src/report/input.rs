//! What a report is about: runs and studies, read from their directories.
//!
//! A study is a directory with study.toml or results.csv; its runs lie in runs/ID. Its results.csv, under any name, will do
//! alone: what it has no records for is not drawn. Anything else must be a run. Read tolerantly: a run that has not ended has
//! no final.json, one without telemetry no spectra, an older one fewer fields.
//! Not here: what is drawn (figures.rs), and how the page says it (page.rs).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::{Config, Overrides};
use crate::error::{Error, Result, cannot};
use crate::run::{Outcome, Record, read_json, read_metrics};

/// Everything a report shows.
#[derive(Default)]
pub struct Input {
    pub runs: Vec<Run>,
    pub studies: Vec<Study>,
    /// What was left out, as sentences.
    pub notes: Vec<String>,
}

/// One run.
pub struct Run {
    /// Unique in the report.
    pub name: String,
    /// Its study's arm, or its name: what has a colour and an entry in the legend.
    pub arm: String,
    /// A run at the best learning rate of its arm; every run outside of a study.
    pub best: bool,
    pub config: Config,
    /// At least one.
    pub records: Vec<Record>,
    pub spectra: Vec<Spectra>,
    /// Absent while the run has not ended.
    pub outcome: Option<Outcome>,
}

/// The telemetry of one step: matrix → quantity → value. A matrix is a pair or, in a dense model, a hidden matrix.
pub struct Spectra {
    pub step: u64,
    /// Tokens and seconds of that record, for the other axes.
    pub tokens: u64,
    pub seconds: f64,
    pub matrices: BTreeMap<String, BTreeMap<String, f64>>,
}

/// A study: its tables, and the outcome of each of its runs.
pub struct Study {
    pub title: String,
    pub tables: Vec<Table>,
    pub trials: Vec<Trial>,
}

/// One table of tables.json.
#[derive(Deserialize)]
pub struct Table {
    pub title: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// A row of results.csv.
pub struct Trial {
    /// The directory in runs/.
    pub run: Option<String>,
    /// As the report calls the arm.
    pub arm: String,
    /// As it calls the arm's method; absent in files without that column, as is the number of parameters.
    pub method: Option<String>,
    pub parameters: Option<f64>,
    pub lr: f64,
    pub adam_lr: Option<f64>,
    pub seed: Option<String>,
    /// At the rate that the study chose for the arm.
    pub at_best: bool,
    /// Nats per token; absent where the run diverged.
    pub val_loss: Option<f64>,
    /// The step, where it diverged.
    pub diverged: Option<String>,
}

impl Input {
    /// Reads every path.
    ///
    /// # Errors
    /// A path that is neither run nor study, a file of one that cannot be used, a run without records.
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut input = Self::default();
        let names = names(paths);
        for (path, name) in paths.iter().zip(names) {
            let prefix = (paths.len() > 1).then_some(name.as_str());
            if path.is_file() && path.extension().is_some_and(|e| e == "csv") {
                let title = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                input.studies.push(Study { title, tables: vec![], trials: trials(path, &[], prefix)? });
                continue;
            }
            if !path.is_dir() {
                let why = if path.exists() { "is a file" } else { "does not exist" };
                return Err(Error::new(format!(
                    "{} {why}: give the directory of a run or a study, or a study's results.csv",
                    path.display()
                )));
            }
            if path.join("study.toml").exists() || path.join("results.csv").exists() {
                input.read_study(path, &name, prefix)?;
            } else if path.join("config.toml").exists() {
                input.runs.push(Run::read(path, name)?.ok_or_else(|| no_records(path))?);
            } else {
                return Err(neither(path));
            }
        }
        if input.runs.is_empty() && input.studies.iter().all(|s| s.trials.is_empty()) {
            let path = &paths[0];
            return Err(Error::new(format!("{} has no run with a record yet: train first", path.display())));
        }
        Ok(input)
    }

    fn read_study(&mut self, path: &Path, name: &str, prefix: Option<&str>) -> Result<()> {
        let mut study = Study {
            title: title(&path.join("study.toml"))?.unwrap_or_else(|| name.to_owned()),
            tables: tables(&path.join("tables.json"))?,
            trials: vec![],
        };
        let mut ids = directories(&path.join("runs"))?;
        if path.join("results.csv").exists() {
            study.trials = trials(&path.join("results.csv"), &ids, prefix)?;
        } else {
            self.notes.push(format!(
                "{name} has no results.csv yet: its arms are not known, each run stands for itself."
            ));
        }
        let mut without = vec![];
        // in the order of results.csv, so that arms stand in the same order everywhere
        let trial = |id: &String| study.trials.iter().position(|t| t.run.as_ref() == Some(id));
        ids.sort_by_key(|id| trial(id).unwrap_or(usize::MAX));
        for id in &ids {
            let full = prefix.map_or(id.clone(), |p| format!("{p}/{id}"));
            let Some(mut run) = Run::read(&path.join("runs").join(id), full)? else {
                without.push(id.as_str());
                continue;
            };
            if let Some(trial) = trial(id) {
                run.arm = study.trials[trial].arm.clone();
                run.best = study.trials[trial].at_best;
            } else if !study.trials.is_empty() {
                run.best = false; // still running, or left over from an earlier plan
            }
            self.runs.push(run);
        }
        if !without.is_empty() {
            self.notes.push(format!("{name}: no records yet of {}.", without.join(", ")));
        }
        self.studies.push(study);
        Ok(())
    }

    /// The arms in the order of their first appearance: their places are their colours.
    pub fn arms(&self) -> Vec<&str> {
        let mut arms: Vec<&str> = vec![];
        let trials = self.studies.iter().flat_map(|s| &s.trials).map(|t| t.arm.as_str());
        for arm in trials.chain(self.runs.iter().map(|r| r.arm.as_str())) {
            if !arms.contains(&arm) {
                arms.push(arm);
            }
        }
        arms
    }
}

impl Run {
    /// None: there are no records.
    fn read(directory: &Path, name: String) -> Result<Option<Self>> {
        let config = Overrides::from_file(&directory.join("config.toml"))?.resolve()?;
        let metrics = directory.join("metrics.jsonl");
        if !metrics.exists() {
            return Ok(None);
        }
        let records = read_metrics(&metrics)?;
        if records.is_empty() {
            return Ok(None);
        }
        let spectra = spectra(&records);
        let outcome = Outcome::read(&directory.join("final.json"))?;
        Ok(Some(Run { arm: name.clone(), name, best: true, config, records, spectra, outcome }))
    }

    /// The last record.
    pub fn last(&self) -> &Record {
        self.records.last().expect("a run here has records")
    }

    /// Validation losses as (step, tokens, seconds, loss, whether on the whole split).
    pub fn validations(&self) -> Vec<(u64, u64, f64, f64, bool)> {
        let sampled = |r: &Record| Some((r.step, r.tokens, r.seconds, r.val_loss?, false));
        let mut all: Vec<_> = self.records.iter().filter_map(sampled).collect();
        if let Some(loss) = self.outcome.as_ref().and_then(|o| o.val_loss) {
            let last = self.last();
            all.push((last.step, last.tokens, last.seconds, loss, true));
        }
        all
    }
}

fn no_records(path: &Path) -> Error {
    Error::new(format!(
        "{} has no records in metrics.jsonl yet: a record is written every --log-every steps; report it then",
        path.display()
    ))
}

fn neither(path: &Path) -> Error {
    let inside = directories(path).unwrap_or_default();
    let run = inside.iter().find(|d| path.join(d).join("config.toml").exists());
    let hint = run
        .map_or(String::new(), |run| format!("; there are runs inside: give {}", path.join(run).display()));
    Error::new(format!(
        "{} is neither a run (it has no config.toml) nor a study (no study.toml, no results.csv){hint}",
        path.display()
    ))
}

/// The last parts of the paths, with as many parts before them as make them differ.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let parts = |path: &PathBuf| -> Vec<String> {
        let whole = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        whole.iter().map(|p| p.to_string_lossy().into_owned()).filter(|p| p != "/").collect()
    };
    let parts: Vec<Vec<String>> = paths.iter().map(parts).collect();
    let longest = parts.iter().map(Vec::len).max().unwrap_or(1);
    let with = |n: usize| -> Vec<String> {
        parts.iter().map(|p| p[p.len().saturating_sub(n)..].join("/")).collect()
    };
    let differ = |names: &Vec<String>| names.iter().collect::<BTreeSet<_>>().len() == names.len();
    let shortest = (1..=longest).map(with).find(differ);
    // the same directory twice
    shortest
        .unwrap_or_else(|| with(1).into_iter().enumerate().map(|(i, n)| format!("{n} ({})", i + 1)).collect())
}

/// The subdirectories' names, sorted; none where there is no directory.
fn directories(path: &Path) -> Result<Vec<String>> {
    if !path.is_dir() {
        return Ok(vec![]);
    }
    let mut names = vec![];
    for entry in fs::read_dir(path).map_err(cannot("list", path))? {
        let entry = entry.map_err(cannot("list", path))?;
        if entry.path().is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// The telemetry of the records that have any, by quantity. What is absent (null: not finite) is left out.
fn spectra(records: &[Record]) -> Vec<Spectra> {
    let one = |record: &Record| {
        let matrices = record.telemetry.numbers();
        let Record { step, tokens, seconds, .. } = *record;
        (!matrices.is_empty()).then_some(Spectra { step, tokens, seconds, matrices })
    };
    records.iter().filter_map(one).collect()
}

/// study.toml's `title` or `name`, where it has one.
fn title(path: &Path) -> Result<Option<String>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(cannot("read", path))?;
    let table: toml::Table = toml::from_str(&text).map_err(cannot("use", path))?;
    let said = ["title", "name"].iter().find_map(|key| table.get(*key)?.as_str());
    Ok(said.map(str::to_owned))
}

fn tables(path: &Path) -> Result<Vec<Table>> {
    let tables: Vec<Table> = read_json(path)?.unwrap_or_default();
    for table in &tables {
        if let Some(row) = table.rows.iter().find(|row| row.len() != table.columns.len()) {
            return Err(Error::new(format!(
                "{}: the table \"{}\" has {} columns and a row of {}",
                path.display(),
                table.title,
                table.columns.len(),
                row.len()
            )));
        }
    }
    Ok(tables)
}

fn trials(path: &Path, ids: &[String], prefix: Option<&str>) -> Result<Vec<Trial>> {
    let mut reader = csv::Reader::from_path(path).map_err(cannot("read", path))?;
    let header = reader.headers().map_err(cannot("use", path))?.clone();
    let column = |name: &str| header.iter().position(|h| h == name);
    let needed = |name: &str| {
        column(name).ok_or_else(|| Error::new(format!("{} has no column `{name}`", path.display())))
    };
    let (arm, lr, at_best) = (needed("arm")?, needed("lr")?, needed("at_best")?);
    let val_loss = needed("val_loss")?;
    let (adam_lr, seed) = (column("adam_lr"), column("seed"));
    let (method, parameters) = (column("method"), column("params"));
    let diverged = header.iter().position(|h| h.starts_with("diverged"));
    let called = |name: &str| prefix.map_or(name.to_owned(), |p| format!("{p}: {name}"));
    let mut trials = vec![];
    for row in reader.records() {
        let row = row.map_err(cannot("use", path))?;
        let number = |at: usize| row[at].trim().parse::<f64>().ok().filter(|x| x.is_finite());
        let text = |at: usize| Some(row[at].trim().to_owned()).filter(|t| !t.is_empty() && t != "false");
        let Some(rate) = number(lr) else {
            let line = row.position().map_or(0, |p| p.line());
            return Err(Error::new(format!(
                "{} line {line}: lr is \"{}\", no number",
                path.display(),
                &row[lr]
            )));
        };
        trials.push(Trial {
            run: row.iter().find(|cell| ids.iter().any(|id| id == cell)).map(str::to_owned),
            arm: called(&row[arm]),
            method: method.and_then(text).map(|m| called(&m)),
            parameters: parameters.and_then(number),
            lr: rate,
            adam_lr: adam_lr.and_then(number),
            seed: seed.and_then(text),
            at_best: &row[at_best] == "true",
            val_loss: number(val_loss),
            diverged: diverged.and_then(text),
        });
    }
    Ok(trials)
}

/// The trials, those together that differ in their seed only.
pub fn settings(trials: &[Trial]) -> Vec<Vec<&Trial>> {
    let mut settings: Vec<Vec<&Trial>> = vec![];
    for trial in trials {
        let same = |s: &&mut Vec<&Trial>| {
            (&s[0].arm, s[0].lr, s[0].adam_lr) == (&trial.arm, trial.lr, trial.adam_lr)
        };
        match settings.iter_mut().find(same) {
            Some(setting) => setting.push(trial),
            None => settings.push(vec![trial]),
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_short_as_they_can_be() {
        let paths = |texts: &[&str]| texts.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(names(&paths(&["x/a", "x/b"])), ["a", "b"]);
        assert_eq!(names(&paths(&["x/a", "y/a"])), ["x/a", "y/a"]);
        assert_eq!(names(&paths(&["x/a", "x/a"])), ["a (1)", "a (2)"]);
    }
}
