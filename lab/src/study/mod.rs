//! `study`: fair, resumable comparisons between training methods.
//!
//! A study is a list of arms (plan.rs); the runs of an arm follow from what its finished runs came to (search.rs), are run
//! side by side (execute.rs), read back from their directories (outcome.rs) and summed up (tables.rs, long.rs; report.rs).
//! Here: the directory of a study, and its settings, study.toml, which a continuation must not contradict.

mod execute;
mod long;
mod outcome;
mod plan;
mod search;
mod tables;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::cli::StudyArgs;
use crate::config::{
    Config, ModelOptions, Overrides, ShapeOptions, TrainingOptions, absolute, merge, name, table,
};
use crate::data::Corpus;
use crate::device::{Devices, open_each};
use crate::error::{Error, Result, cannot};
use crate::files::{claim, write_atomically};
use crate::progress::catch_interrupts;
use crate::report::write_page;
use crate::study::execute::Study;
use crate::study::plan::Plan;

pub use plan::{Kind, StudyOptions};

/// study.toml: what decides the results. Options that were not given are absent.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    kind: Kind,
    /// Of the bytes of the data.
    data_sha256: String,
    study: StudyOptions,
    model: ModelOptions,
    training: TrainingOptions,
    #[serde(default)]
    shape: ShapeOptions,
}

/// Runs a study, or what is left of one.
///
/// # Errors
/// Bad options or data, another study's directory, files that cannot be written.
pub fn study(args: &StudyArgs) -> Result<()> {
    let mut asked = args.overrides.over_file(args.config.as_deref())?;
    let threads = asked.model.threads.take().unwrap_or(1); // changes no result, so it is no setting
    let out = asked.training.out.take();
    let training = &mut asked.training;
    for data in [&mut training.data, &mut training.val_data] {
        *data = data.take().map(absolute).transpose()?;
    }
    let recorded = match &args.resume {
        Some(_) if out.is_some() => {
            return Err(Error::new("--out cannot go with --resume: the study stays in its directory"));
        }
        Some(directory) => Some(Settings::read(directory)?),
        None => None,
    };
    let (kind, options, base) = match (&recorded, args.kind) {
        (None, None) => {
            return Err(Error::new("name the KIND of study, or --resume DIR; see rankgrad study --help"));
        }
        (None, Some(kind)) => (kind, args.options.clone(), asked),
        (Some(recorded), kind) => {
            if let Some(kind) = kind.filter(|&kind| kind != recorded.kind) {
                return Err(Error::new(format!(
                    "this is a study of {}, not of {}: leave the kind out, it is recorded",
                    name(recorded.kind),
                    name(kind)
                )));
            }
            let Settings { model, training, shape, .. } = recorded;
            let base = Overrides { model: model.clone(), training: training.clone(), shape: shape.clone() };
            (recorded.kind, merge(&recorded.study, &args.options)?, asked.over(&base)?)
        }
    };
    let (base, tokenizer) = base.with_tokenizer()?;
    let plan = Plan::new(kind, &options, &base)?;
    let Config { data, val_data, context, vocab, .. } = &plan.arms[0].config;
    let corpus = Corpus::load(data, val_data, *context, &tokenizer)?.fits(*vocab)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let on_cpu = cores.checked_div(threads).unwrap_or(1).max(1); // 0 threads: all cores for one run
    let devices = args.devices.as_ref().map_or(vec![args.on.device], |Devices(devices)| devices.clone());
    let devices = open_each(&devices, plan.arms[0].config.precision, args.jobs, on_cpu)?;
    let settings = Settings {
        kind,
        data_sha256: corpus.sha256.clone(),
        study: options,
        model: base.model,
        training: base.training,
        shape: base.shape,
    };
    let directory = match args.resume.clone().or(out) {
        Some(directory) if directory.join("study.toml").exists() => {
            Settings::read(&directory)?.agree(&settings, &directory)?;
            directory
        }
        out => settings.begin(out)?,
    };
    let _claim = claim(&directory, "another rankgrad is at work on this study; wait for it, or stop it")?;
    catch_interrupts()?;
    if !args.quiet {
        eprintln!("data: {}", corpus.summary);
        let (arms, jobs) = (plan.arms.len(), devices.len());
        eprintln!("study: {} ({arms} arms, {jobs} runs at a time)", directory.display());
        plan.notes.iter().for_each(|note| eprintln!("{note}"));
    }
    let frequencies = corpus.frequency_loss();
    let shown = Mutex::new(String::new());
    let report = |outcomes: &execute::Outcomes| {
        *shown.lock().expect("nobody panics with it") =
            tables::write(&directory, &plan, frequencies, outcomes)?;
        Ok(())
    };
    let complete = Study {
        directory: &directory,
        plan: &plan,
        corpus: &corpus,
        tokenizer: &tokenizer,
        devices,
        threads,
        keep_checkpoints: args.keep_checkpoints,
        quiet: args.quiet,
        report: &report,
    }
    .run()?;
    if complete {
        write_page(std::slice::from_ref(&directory), &directory.join("report.html"))?;
        crate::say!("{}", shown.into_inner().expect("nobody panics with it"));
        crate::say!(
            "{}: study.toml, results.csv, table.md, tables.json, report.html, runs",
            directory.display()
        );
    } else {
        eprintln!("interrupted. Continue with: rankgrad study --resume {}", directory.display());
    }
    Ok(())
}

impl Settings {
    fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("study.toml");
        let text = fs::read_to_string(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::new(format!(
                "{} holds no study (there is no study.toml); begin one with --out",
                directory.display()
            )),
            _ => cannot("read the study", &path)(error),
        })?;
        toml::from_str(&text).map_err(cannot("read the study", &path))
    }

    /// These, recorded in `directory`, must be those that are asked for now.
    fn agree(&self, asked: &Settings, directory: &Path) -> Result<()> {
        let (recorded, asked) = (flat(self)?, flat(asked)?);
        let value =
            |table: &toml::Table, key: &str| table.get(key).map_or("not given".into(), ToString::to_string);
        // another kind explains most of what else differs
        let mut keys = std::iter::once("kind").chain(recorded.keys().chain(asked.keys()).map(String::as_str));
        match keys.find(|&key| recorded.get(key) != asked.get(key)) {
            None => Ok(()),
            Some(key) => Err(Error::new(format!(
                "{} holds a study with other settings: `{key}` is {} there, {} now; give the same, or another --out",
                directory.display(),
                value(&recorded, key),
                value(&asked, key)
            ))),
        }
    }

    /// Makes the directory of a new study, by default the next free studies/KIND-NUMBER, and records the settings in it.
    fn begin(&self, out: Option<PathBuf>) -> Result<PathBuf> {
        let kind = name(self.kind);
        let free = |number: usize| Path::new("studies").join(format!("{kind}-{number:03}"));
        let directory =
            out.unwrap_or_else(|| (1..).map(free).find(|d| !d.exists()).expect("numbers do not end"));
        fs::create_dir_all(&directory).map_err(cannot("make the directory", &directory))?;
        if directory.join("runs").exists() || directory.join("config.toml").exists() {
            return Err(Error::new(format!(
                "{} holds runs, but no study.toml; choose another --out",
                directory.display()
            )));
        }
        let toml = toml::to_string(self).map_err(cannot("record the study", &directory))?;
        write_atomically(&directory.join("study.toml"), toml.as_bytes())?;
        Ok(directory)
    }
}

/// All settings in one table: no two have the same name.
fn flat(settings: &Settings) -> Result<toml::Table> {
    let mut flat = table(settings)?;
    for part in ["study", "model", "training"] {
        if let Some(toml::Value::Table(inner)) = flat.remove(part) {
            flat.extend(inner);
        }
    }
    Ok(flat)
}
