//! The runs of a study, several at a time, in this process: each in its own directory and thread pool, on its own device or part of
//! one, and on one shared corpus.
//!
//! A worker asks the arms for the next run that is wanted, runs it, reads its outcome back and has the tables rewritten. A
//! run that diverges is an outcome; any other error, and Ctrl-C, makes all running ones save a checkpoint and end.
//! Peak memory in a run's final.json is that of the whole process.
//! Not here: which runs are wanted (search.rs), how one is trained (train.rs).

use std::collections::HashMap;
use std::fs;
use std::io::IsTerminal;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rankgrad::parallel::Alone;

use crate::checkpoint::{self, Checkpoint};
use crate::config::Config;
use crate::data::Corpus;
use crate::device::{Opened, failure, on_device};
use crate::error::{Error, Result, cannot};
use crate::progress::{Progress, interrupt, interrupted};
use crate::run::Run;
use crate::study::outcome::{Outcome, same_config};
use crate::study::plan::Plan;
use crate::study::search::{State, Trial};
use crate::tokens::Tokenizer;
use crate::train::{End, Loop, Start, same_corpus};

/// Time between updates of the bar, and between plain lines.
const TICK: Duration = Duration::from_millis(200);
const PLAIN: Duration = Duration::from_secs(60);

/// A study in its directory.
pub struct Study<'a> {
    pub directory: &'a Path,
    pub plan: &'a Plan,
    pub corpus: &'a Corpus,
    pub tokenizer: &'a Tokenizer,
    /// What each of the runs at a time computes on, and its threads.
    pub devices: Vec<Opened>,
    pub threads: usize,
    pub keep_checkpoints: bool,
    pub quiet: bool,
    /// Called with all outcomes, before the first run and after each.
    pub report: &'a (dyn Fn(&Outcomes) -> Result<()> + Sync),
}

/// By the id of the run.
pub type Outcomes = HashMap<String, Outcome>;

/// What the workers share.
struct Shared {
    outcomes: Outcomes,
    running: Vec<Running>,
    /// Steps trained by the runs that have ended since the program started.
    trained: u64,
    error: Option<Error>,
}

struct Running {
    id: String,
    /// Steps that an earlier part of the run did, and those done since.
    before: u64,
    trained: Arc<AtomicU64>,
}

impl Plan {
    /// Where each arm stands.
    pub fn states(&self, outcomes: &Outcomes) -> Vec<State> {
        let loss = |t: &Trial| outcomes.get(&t.id).map(Outcome::loss);
        self.arms.iter().map(|arm| arm.state(&loss)).collect()
    }
}

impl Study<'_> {
    /// Runs what is still to be run. Returns whether the study is complete: Ctrl-C ends it early.
    ///
    /// # Errors
    /// Files that cannot be read or written; runs with other settings in the directory.
    pub fn run(&self) -> Result<bool> {
        let shared = Shared { outcomes: self.read()?, running: vec![], trained: 0, error: None };
        (self.report)(&shared.outcomes)?;
        let (shared, changed) = (Mutex::new(shared), Condvar::new());
        let mut display = Display::new(self.quiet);
        let bar = display.bar.clone();
        thread::scope(|scope| {
            let (shared, changed, bar) = (&shared, &changed, &bar);
            let spawn = |device| scope.spawn(move || self.work(device, shared, changed, bar));
            let workers: Vec<_> = self.devices.iter().map(spawn).collect();
            while !workers.iter().all(|w| w.is_finished()) {
                display.show(&shared.lock().expect("workers do not panic"), self.plan);
                thread::sleep(TICK);
            }
        });
        display.bar.finish_and_clear();
        match shared.into_inner().expect("workers do not panic").error {
            Some(error) => Err(error),
            None => Ok(!interrupted()),
        }
    }

    fn run_directory(&self, trial: &Trial) -> PathBuf {
        self.directory.join("runs").join(&trial.id)
    }

    /// The outcomes on disk of all runs that are known to be needed; each may make more known.
    fn read(&self) -> Result<Outcomes> {
        let mut outcomes = Outcomes::new();
        loop {
            let before = outcomes.len();
            for trial in self.plan.states(&outcomes).into_iter().flat_map(|state| state.trials) {
                let directory = self.run_directory(&trial);
                if !outcomes.contains_key(&trial.id)
                    && let Some(outcome) = Outcome::read(&directory)?
                {
                    same_config(&directory, &trial.config)?;
                    outcomes.insert(trial.id, outcome);
                }
            }
            if outcomes.len() == before {
                return Ok(outcomes);
            }
        }
    }

    /// One run after the other, until nothing more is wanted.
    fn work(&self, device: &Opened, shared: &Mutex<Shared>, changed: &Condvar, bar: &ProgressBar) {
        let mut now = shared.lock().expect("workers do not panic");
        loop {
            if now.error.is_some() || interrupted() {
                return;
            }
            let Some(trial) = now.next(self.plan) else {
                if now.running.is_empty() {
                    return changed.notify_all();
                }
                // what another worker is at may make more runs wanted; Ctrl-C wakes nobody
                now = changed.wait_timeout(now, TICK).expect("workers do not panic").0;
                continue;
            };
            let trained = Arc::new(AtomicU64::new(0));
            let before = checkpoint::list(&self.run_directory(&trial)).ok().and_then(|mut all| all.pop());
            let before = before.map_or(0, |(step, _)| step);
            now.running.push(Running { id: trial.id.clone(), before, trained: trained.clone() });
            drop(now);

            let outcome = catch_unwind(AssertUnwindSafe(|| self.run_one(device, &trial, &trained)));
            let outcome = outcome.unwrap_or_else(|payload| {
                let why = failure(&*payload).unwrap_or("it panicked; the message is above".into());
                Err(Error::new(format!("run {}: {why}", trial.id)))
            });

            now = shared.lock().expect("workers do not panic");
            now.running.retain(|r| r.id != trial.id);
            now.trained += trained.load(Ordering::Relaxed);
            let reported = outcome.and_then(|outcome| {
                let Some(outcome) = outcome else { return Ok(()) }; // interrupted
                if !self.quiet {
                    bar.suspend(|| eprintln!("{}", line(&trial, &outcome)));
                }
                now.outcomes.insert(trial.id.clone(), outcome);
                (self.report)(&now.outcomes)
            });
            if let Err(error) = reported {
                now.error.get_or_insert(error);
                interrupt();
            }
            changed.notify_all();
        }
    }

    /// Trains to the end, from the newest checkpoint if there is one. None: Ctrl-C came first.
    fn run_one(&self, device: &Opened, trial: &Trial, trained: &Arc<AtomicU64>) -> Result<Option<Outcome>> {
        let directory = self.run_directory(trial);
        let config = Config { out: Some(directory.clone()), threads: self.threads, ..trial.config.clone() };
        let newest = if directory.exists() { checkpoint::list(&directory)?.pop() } else { None };
        let (run, start) = match newest {
            Some((step, path)) => {
                same_config(&directory, &trial.config)?;
                let saved = Checkpoint::load(&path)?;
                same_corpus(&saved.meta, self.corpus)?;
                (Run::resume(&directory, step)?, Start::Resume(Box::new(saved)))
            }
            None => {
                if directory.exists() {
                    // stopped before its first checkpoint: nothing to lose
                    fs::remove_dir_all(&directory).map_err(cannot("remove", &directory))?;
                }
                (Run::create(&config)?, Start::New)
            }
        };
        let end = crate::pool(self.threads)?.install(|| {
            let mut progress = Progress::counting(trained.clone());
            let data = (self.corpus, self.tokenizer);
            on_device!(device.clone(), |device, compute| {
                let run = Loop::new(&device, Arc::new(Alone), &config, data, Some(run), start)?;
                run.computing_on(compute).run(None, &mut progress)
            })
        })?;
        if let End::Stopped(_) = end {
            return Ok(None);
        }
        if !self.keep_checkpoints {
            for (_, path) in checkpoint::list(&directory)? {
                fs::remove_file(&path).map_err(cannot("remove the checkpoint", &path))?;
            }
        }
        Outcome::read(&directory)
    }
}

impl Shared {
    /// The first run that is wanted and that nobody is at.
    fn next(&self, plan: &Plan) -> Option<Trial> {
        let taken =
            |t: &Trial| self.outcomes.contains_key(&t.id) || self.running.iter().any(|r| r.id == t.id);
        plan.states(&self.outcomes).into_iter().flat_map(|state| state.trials).find(|t| !taken(t))
    }
}

fn line(trial: &Trial, outcome: &Outcome) -> String {
    match &outcome.end {
        Ok(summary) => {
            format!("{}: validation loss {:.4}, {:.1} s", trial.id, summary.val_loss, summary.seconds)
        }
        Err(diverged) => format!("{}: diverged, {}", trial.id, diverged.reason),
    }
}

/// The progress of the whole study: a bar on a terminal, a plain line now and then elsewhere.
struct Display {
    bar: ProgressBar,
    started: Instant,
    /// None: no plain lines.
    last_line: Option<Instant>,
}

impl Display {
    fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target =
            if terminal && !quiet { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        bar.set_style(ProgressStyle::with_template("{bar:24} {msg}").expect("a valid template"));
        let started = Instant::now();
        Display { bar, started, last_line: (!terminal && !quiet).then_some(started) }
    }

    fn show(&mut self, shared: &Shared, plan: &Plan) {
        let states = plan.states(&shared.outcomes);
        let (mut runs, mut over, mut steps, mut position) = (0, 0, 0, 0);
        for (arm, state) in plan.arms.iter().zip(&states) {
            let all = state.trials.len() + state.expected;
            let done = state.trials.iter().filter(|t| shared.outcomes.contains_key(&t.id)).count();
            (runs, over) = (runs + all, over + done);
            steps += (all * arm.config.steps) as u64;
            position += (done * arm.config.steps) as u64;
        }
        let mut trained = shared.trained;
        for running in &shared.running {
            let now = running.trained.load(Ordering::Relaxed);
            trained += now;
            position += running.before + now;
        }
        let speed = trained as f64 / self.started.elapsed().as_secs_f64();
        let left = if trained == 0 { "?".into() } else { minutes((steps - position) as f64 / speed) };
        let message = format!("{over}/{runs} runs, {speed:.0} steps/s, {left} left");
        self.bar.set_length(steps);
        self.bar.set_position(position);
        if self.last_line.is_some_and(|at| at.elapsed() >= PLAIN) {
            self.last_line = Some(Instant::now());
            eprintln!("{message}");
        }
        self.bar.set_message(message);
    }
}

fn minutes(seconds: f64) -> String {
    let minutes = (seconds / 60.0).ceil() as u64;
    if minutes < 60 { format!("{minutes} min") } else { format!("{} h {} min", minutes / 60, minutes % 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_left_are_rounded_up() {
        assert_eq!(
            (minutes(3.0), minutes(3600.0), minutes(9001.0)),
            ("1 min".into(), "1 h 0 min".into(), "2 h 31 min".into())
        );
    }
}
