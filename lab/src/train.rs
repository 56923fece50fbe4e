//! `train`: the loop around the step. Progress, validation, records, checkpoints, Ctrl-C, resume, starts from other weights.
//!
//! Every worker of a training runs the loop; the first alone shows, records and saves. A study (study/) drives the same loop, many
//! runs at a time. Not here: the step itself (trainer.rs), where the workers are (workers.rs).

use std::path::PathBuf;
use std::time::Instant;

use rankgrad::parallel::{Failed, Link};
use rankgrad::tensor::Backend;

use crate::checkpoint::{self, Checkpoint, Meta};
use crate::cli::TrainArgs;
use crate::config::{Config, name};
use crate::data::Corpus;
use crate::device::{self, Join, on_device};
use crate::error::{Error, Result};
use crate::flops::step_flops;
use crate::generate::{Sampling, sample};
use crate::inspect::bits;
use crate::plot::{self, Curve};
use crate::progress::{Progress, catch_interrupts, interrupted};
use crate::run::{Diverged, Outcome, Record, Run, Summary, peak_memory_mib, read_metrics};
use crate::tokens::Tokenizer;
use crate::trainer::{Halt, Together, Trainer, schedule, without_guides};
use crate::workers::{self, Worker};

/// Trains a new model, from drawn weights or a checkpoint's, or continues a run.
///
/// # Errors
/// Bad configuration or data, a directory that cannot be used, a run that diverges.
pub fn train(args: &TrainArgs) -> Result<()> {
    let asked = args.overrides.over_file(args.config.as_deref())?;
    let (config, tokenizer, start) = match (&args.resume, &args.from) {
        (None, None) => {
            let (asked, tokenizer) = asked.with_tokenizer()?;
            (asked.resolve()?, tokenizer, Start::New)
        }
        (Some(directory), _) => {
            let saved = Checkpoint::load(&checkpoint::find(directory)?)?;
            if !saved.meta.trained_here() {
                return Err(Error::new(format!(
                    "{0} holds a model, not a run to continue; start one from its weights with --from {0}",
                    directory.display()
                )));
            }
            (saved.meta.config.resumed_with(&asked)?, saved.tokenizer()?, Start::Resume(Box::new(saved)))
        }
        (None, Some(path)) => {
            let weights = Checkpoint::load_weights(&checkpoint::find(path)?)?;
            without_guides(&weights, path)?;
            let (asked, mut tokenizer) = asked.with_tokenizer()?;
            if asked.training.tokenizer.is_none() {
                tokenizer = weights.tokenizer()?;
            }
            (weights.meta.config.begun_with(&asked)?, tokenizer, Start::From(Box::new(weights)))
        }
    };
    let unused = args.overrides.without_effect(config.method);
    if !args.quiet && !unused.is_empty() {
        eprintln!("without effect under {}: {}", name(config.method), unused.join(", "));
    }
    let places = workers::places(args, &config)?;
    let corpus =
        Corpus::load(&config.data, &config.val_data, config.context, &tokenizer)?.fits(config.vocab)?;
    if let Start::Resume(saved) = &start {
        same_corpus(&saved.meta, &corpus)?;
        let directory = args.resume.as_deref().expect("what was resumed");
        let over = saved.meta.step >= config.steps as u64;
        if over && Outcome::read(&directory.join("final.json"))?.is_some() {
            crate::say!(
                "{0} is finished, {1} of {1} steps; to train on from its weights: rankgrad train --from {0}",
                directory.display(),
                config.steps
            );
            return Ok(());
        }
    }
    catch_interrupts()?;
    let work = |worker: &Worker, start| {
        let opened = device::open(worker.device, config.precision)?;
        crate::pool(worker.threads)?.install(|| {
            on_device!(opened, |device, compute| {
                let together = device.join(worker.link.clone())?;
                train_on(&device, compute, together, args, &config, (&corpus, &tokenizer), start)
            })
        })
    };
    workers::run(&places, start, work)
}

/// The run, begun or gone on with, to its end or to where it is stopped; by one of its workers. Forward and backward are computed on
/// `compute`.
fn train_on<B: Backend<Elem = f32>, C: Backend<Wide = B::Wide>>(
    device: &B,
    compute: C,
    together: Together<B>,
    args: &TrainArgs,
    config: &Config,
    (corpus, tokenizer): (&Corpus, &Tokenizer),
    start: Start,
) -> Result<()> {
    of_one_mind(together.link(), args, config, corpus, &start)?;
    let first = together.link().worker() == 0;
    let run = match (&start, &args.resume) {
        _ if !first => None,
        (Start::Resume(saved), Some(directory)) => Some(Run::resume(directory, saved.meta.step)?),
        _ => Some(Run::create(config)?),
    };
    let run = if args.tensorboard { run.map(Run::with_tensorboard).transpose()? } else { run };
    let training = Loop::new(device, together, config, (corpus, tokenizer), run, start)?;
    let mut training = training.computing_on(compute);
    let quiet = args.quiet || !first;
    let mut progress = Progress::new(config.steps as u64, training.trainer.steps(), quiet);
    progress.note(&format!("data: {}", corpus.summary));
    let params = training.trainer.params.count();
    let directory = training.run.as_ref().map(|run| run.directory.display().to_string()).unwrap_or_default();
    progress.note(&format!("run: {directory} ({params} parameters)"));
    match training.run(args.stop_after, &mut progress)? {
        End::Finished(summary) if first => training.show(&summary, args.quiet),
        End::Diverged(Diverged { reason, .. }) => Err(Error::new(format!(
            "{reason}. The last checkpoint is kept; try a smaller --lr or --adam-lr, or a smaller --clip"
        ))),
        End::Stopped(Some(checkpoint)) => {
            let why = if interrupted() { "interrupted" } else { "stopped as asked" };
            eprintln!(
                "{why} after step {} of {}; saved {}. Continue with: rankgrad train --resume {directory}",
                training.trainer.steps(),
                config.steps,
                checkpoint.display(),
            );
            Ok(())
        }
        End::Finished(_) | End::Stopped(None) => Ok(()), // the first says it
    }
}

/// Workers in several processes may have been started differently, and then would wait for each other, or train nonsense.
///
/// # Errors
/// One that has other options, other data or another checkpoint than the first.
fn of_one_mind(
    link: &dyn Link,
    args: &TrainArgs,
    config: &Config,
    corpus: &Corpus,
    start: &Start,
) -> Result<()> {
    // where things are, and how many threads there are, is each machine's own business
    let config = Config { threads: 0, data: vec![], val_data: vec![], tokenizer: None, ..config.clone() };
    let step = match start {
        Start::New => None,
        Start::From(saved) | Start::Resume(saved) => Some(saved.meta.step),
    };
    let mine = format!("{}\n{}\n{step:?}\n{:?}", config.to_toml()?, corpus.sha256, args.stop_after);
    let other = link.exchange(mine.into_bytes(), &mut |said| {
        let other = said.iter().position(|mine| *mine != said[0]);
        other.map_or(String::new(), |worker| worker.to_string()).into_bytes()
    })?;
    match String::from_utf8_lossy(&other) {
        none if none.is_empty() => Ok(()),
        worker => Err(Error::new(format!(
            "worker {worker} has other options, other data or another checkpoint than worker 0; start all alike"
        ))),
    }
}

/// The corpus must be the one that the run began with.
///
/// # Errors
/// Other bytes.
pub fn same_corpus(meta: &Meta, corpus: &Corpus) -> Result<()> {
    if meta.corpus_sha256 == corpus.sha256 {
        return Ok(());
    }
    Err(Error::new(format!(
        "the data differs from the run's: {} now, sha256 {} then; give the same bytes with --data",
        corpus.summary,
        &meta.corpus_sha256[..16]
    )))
}

/// Where a run begins.
#[derive(Clone)]
pub enum Start {
    /// With drawn weights.
    New,
    /// With the weights of a checkpoint, and everything else new.
    From(Box<Checkpoint>),
    /// Where it stopped.
    Resume(Box<Checkpoint>),
}

/// How far a run came.
pub enum End {
    /// All steps are done and final.json is written.
    Finished(Summary),
    /// Ctrl-C, or the step to stop after; the checkpoint that continues it, which the first worker has written.
    Stopped(Option<PathBuf>),
    /// A loss or gradient was not finite, and diverged.json is written.
    Diverged(Diverged),
}

/// A run in its directory, and the state that it moves.
pub struct Loop<'a, B: Backend> {
    config: &'a Config,
    corpus: &'a Corpus,
    tokenizer: &'a Tokenizer,
    /// None: another worker has it.
    run: Option<Run>,
    trainer: Trainer<B>,
    /// Tokens, seconds and best loss so far.
    meta: Meta,
}

impl<'a, B: Backend<Elem = f32>> Loop<'a, B> {
    /// The run at its start.
    ///
    /// # Errors
    /// A checkpoint that does not fit the configuration.
    pub fn new(
        device: &B,
        together: Together<B>,
        config: &'a Config,
        (corpus, tokenizer): (&'a Corpus, &'a Tokenizer),
        run: Option<Run>,
        start: Start,
    ) -> Result<Self> {
        let mut meta = Meta::new(config, corpus);
        let trainer = match start {
            Start::New => Trainer::new(device, together, config),
            Start::From(weights) => Trainer::from_weights(device, together, config, *weights)?,
            Start::Resume(saved) => {
                meta = Meta { config: config.clone(), ..saved.meta.clone() };
                Trainer::resumed(device, together, config, *saved)?
            }
        };
        Ok(Loop { config, corpus, tokenizer, run, trainer, meta })
    }

    /// With forward and backward there, in that precision.
    pub fn computing_on<C: Backend<Wide = B::Wide>>(self, device: C) -> Self {
        Self { trainer: self.trainer.computing_on(device), ..self }
    }

    /// Whether some worker was interrupted, so that all stop at one step.
    fn interrupted(&self) -> std::result::Result<bool, Failed> {
        let [count] = self.trainer.link().sums([f64::from(u8::from(interrupted()))])?;
        Ok(count > 0.0)
    }

    /// Trains to the end, to the step `stop_after`, or to Ctrl-C.
    ///
    /// # Errors
    /// A file that cannot be written; another worker that has failed. A run that diverges is an [`End`].
    pub fn run(&mut self, stop_after: Option<usize>, progress: &mut Progress) -> Result<End> {
        let config = self.config;
        let steps = config.steps as u64;
        let last = stop_after.map_or(steps, |stop| steps.min(stop as u64));
        let schedule = schedule(config);
        let tokens_per_step = (config.batch * config.context * config.accumulate) as u64;
        let mut speed = 0.0;
        if self.trainer.steps() == 0 {
            self.save()?; // so that a run that dies early can be resumed too
        }
        while self.trainer.steps() < last && !self.interrupted()? {
            let step = self.trainer.steps();
            let done = step + 1;
            let due = |every: usize| every > 0 && done.is_multiple_of(every as u64);
            let seen = due(config.telemetry_every);
            let before = (seen && self.run.is_some()).then(|| self.trainer.matrices());
            let start = Instant::now();
            let factor = schedule.factor(step);
            let micro = |i: usize| {
                self.corpus.training_batch(config.batch, config.context, config.seed, step, i as u64)
            };
            let batches: Vec<_> = (0..config.accumulate).map(micro).collect();
            let outcome = match self.trainer.step(&batches, factor) {
                Ok(outcome) => outcome,
                Err(Halt::Failed(why)) => return Err(why.into()),
                Err(Halt::Diverged(why)) => {
                    return self.diverged(done, why.to_string());
                }
            };
            let seconds = start.elapsed().as_secs_f64();
            self.meta.tokens += tokens_per_step;
            self.meta.seconds += seconds;
            // a moving average over about 20 steps, so that the display does not flicker
            let now = tokens_per_step as f64 / seconds;
            speed = if speed == 0.0 { now } else { 0.95 * speed + 0.05 * now };

            progress.step(done, outcome.loss, config.lr * factor, speed);
            let mut val_loss = None;
            if due(config.eval_every) && done < steps {
                let loss = self.trainer.validate(self.corpus, config.eval_batches)?;
                let training = outcome.loss;
                progress
                    .note(&format!("step {done}: training loss {training:.4}, validation loss {loss:.4}"));
                val_loss = Some(loss);
            }
            let reports = if seen { self.trainer.reports()? } else { Vec::new() };
            let telemetry = before.map(|before| self.trainer.telemetry(&before, &reports, factor));
            let recorded =
                due(config.log_every) || telemetry.is_some() || val_loss.is_some() || done == steps;
            if let (true, Some(run)) = (recorded, &mut self.run) {
                run.log(&Record {
                    step: done,
                    loss: Some(outcome.loss),
                    val_loss,
                    lr: config.lr * factor,
                    grad_norm: Some(outcome.grad_norm),
                    tokens: self.meta.tokens,
                    seconds: self.meta.seconds,
                    tokens_per_second: speed,
                    telemetry: telemetry.unwrap_or_default(),
                })?;
            }
            self.note_best(val_loss);
            if due(config.checkpoint_every) && done < last {
                self.save()?;
            }
        }
        progress.finish();
        let path = self.save()?;
        if self.trainer.steps() < steps {
            return Ok(End::Stopped(path));
        }
        self.finish()
    }

    fn diverged(&self, step: u64, reason: String) -> Result<End> {
        let diverged = Diverged { step, reason };
        self.run.as_ref().map_or(Ok(()), |run| run.diverged(&diverged))?;
        Ok(End::Diverged(diverged))
    }

    fn note_best(&mut self, val_loss: Option<f64>) {
        if let Some(loss) = val_loss.filter(|loss| loss.is_finite()) {
            self.meta.best_val_loss = Some(self.meta.best_val_loss.map_or(loss, |best| best.min(loss)));
        }
    }

    fn save(&mut self) -> Result<Option<PathBuf>> {
        let checkpoint = self.trainer.checkpoint(self.meta.clone())?;
        let tokenizer = self.tokenizer.json().map(str::to_owned);
        match (checkpoint, &self.run) {
            (Some(checkpoint), Some(run)) => {
                Some(run.save(&Checkpoint { tokenizer, ..checkpoint })).transpose()
            }
            _ => Ok(None),
        }
    }

    /// Validates on the whole split, in f32, so that it can be compared with whatever else was trained, and writes final.json.
    fn finish(&mut self) -> Result<End> {
        let config = self.config;
        let val_loss = self.trainer.validate_exactly(self.corpus, 0)?;
        if !val_loss.is_finite() {
            let step = config.steps as u64;
            let reason = format!("step {step}: after its update the validation loss is not finite");
            return self.diverged(step, reason);
        }
        let largest = self.run.as_ref().map(Run::largest_updates).transpose()?;
        let [max_update_over_w, max_update_over_eta] = largest.unwrap_or_default();
        let summary = Summary {
            val_loss,
            val_bits_per_byte: self.corpus.bits_per_byte(val_loss),
            params: self.trainer.params.count(),
            tokens: self.meta.tokens,
            seconds: self.meta.seconds,
            tokens_per_second: self.meta.tokens as f64 / self.meta.seconds,
            peak_memory_mib: peak_memory_mib(),
            steps: config.steps,
            train_flops: step_flops(config).total() * config.steps as f64,
            max_update_over_w,
            max_update_over_eta,
            method: config.method,
            seed: config.seed,
        };
        self.note_best(Some(val_loss));
        self.run.as_mut().map_or(Ok(()), |run| run.finish(&summary))?;
        Ok(End::Finished(summary))
    }

    /// Draws the losses, prints the outcome, and unless `quiet` a sample.
    fn show(&self, summary: &Summary, quiet: bool) -> Result<()> {
        let config = self.config;
        let Some(Run { directory, .. }) = &self.run else { return Ok(()) };
        let records = read_metrics(&directory.join("metrics.jsonl"))?;
        let mut curve = Curve::new(directory.display().to_string(), &records);
        curve.validation.push((config.steps as f64, summary.val_loss));
        plot::losses(&directory.join("loss.svg"), &[curve])?;
        crate::say!(
            "validation loss {:.4} nats per token{}; {} tokens in {:.1} s, {:.0} tokens/s",
            summary.val_loss,
            bits(summary.val_bits_per_byte),
            summary.tokens,
            summary.seconds,
            summary.tokens_per_second
        );
        crate::say!("{}: config.toml, metrics.jsonl, final.json, loss.svg, checkpoints", directory.display());
        if !quiet {
            let sampling = Sampling { seed: config.seed, tokenizer: self.tokenizer, ..Sampling::default() };
            let text = sample(&self.trainer.model, &self.trainer.params, "\n", &sampling)?;
            crate::say!("--- a sample ---{text}");
        }
        Ok(())
    }
}
