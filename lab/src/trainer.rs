//! One training step, and the state that it moves: parameters, optimizer, and how both go in and out of checkpoints.
//!
//! Several workers may take it together, each with a trainer of its own (rankgrad::parallel); what is said to be of all workers
//! must be called by all of them. Not here: the loop around it (train.rs), where the workers are (workers.rs).

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rankgrad::autograd::{NonFinite, OpTime, Tape, VarId};
use rankgrad::lowrank::{
    Accuracy, AdamW, FactorPair, Leaves, MatrixTelemetry, Optimizer, Params, Rule, ScheduleKind, StepReport,
    Values, clip_global_norm, matrix_telemetry, pair_telemetry,
};
use rankgrad::parallel::{Buckets, Collective, Division, Failed, Link};
use rankgrad::tensor::{Backend, Cpu, Tensor};
use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, HostTensor, Meta};
use crate::config::{self, Config, Schedule};
use crate::data::{Batch, Corpus};
use crate::error::{Error, Result};
use crate::guide;
use crate::methods::{Family, Matrices, PairRule, division, entry, optimizer};
use crate::model::Model;
use crate::run::{MatrixRecord, PairRecord, Telemetry};

/// A model in training.
pub struct Trainer<B: Backend = Cpu<f32>> {
    device: B,
    pub config: Config,
    pub model: Model<B>,
    pub params: Params<B>,
    optimizer: Optimizer<B, PairRule<B>>,
    /// Forward and backward, in the precision that they have.
    lane: Lane<B>,
    /// A sum of losses in that precision.
    losses: Losses<B>,
    together: Together<B>,
    division: Division,
    /// Of a bucket of gradients ([`Buckets`]).
    bucket: usize,
    /// Time by op, summed over steps and lanes; None: it is not taken.
    pub op_times: Option<OpTimes>,
}

/// The worker that a trainer is, and its way to the others.
pub type Together<B> = Arc<dyn Collective<B>>;

/// By name of op.
pub type OpTimes = BTreeMap<&'static str, OpTime>;

/// Why a step was not taken.
#[derive(Debug)]
pub enum Halt {
    /// A loss or gradient is not finite; the same for all workers.
    Diverged(Error),
    /// Another worker has failed.
    Failed(Failed),
}

impl From<Halt> for Error {
    fn from(halt: Halt) -> Self {
        match halt {
            Halt::Diverged(error) => error,
            Halt::Failed(why) => why.into(),
        }
    }
}

impl From<Failed> for Halt {
    fn from(why: Failed) -> Self {
        Self::Failed(why)
    }
}

/// What one step saw, and where its time went.
pub struct Step {
    /// Mean training loss in nats per token, before the update.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    pub forward: Duration,
    /// Until the loss was there. What comes then, sum over the workers, clipping and update, a device may still be at.
    pub backward: Duration,
}

/// On the processor a batch is cut into this many lanes, which threads take whole. The number is fixed, so that the order of the
/// sums is too.
const LANES: usize = 2;

/// Elements of a layer's input, a sequence of T tokens in d dimensions, from which on there is one lane: the products of one sequence are
/// then enough for all threads, and each lane has activations and gradients of its own.
const LONG: usize = 1 << 18;

/// Tokens that go through the model at once, if sequences are not longer: few, so that what one op writes is still in the
/// second-level cache when the next reads it.
const TOKENS: usize = 128;

/// What sequences added, of a lane or of all that a worker has: `loss` and `grads` are sums over their tokens, divided by the tokens
/// of the whole step.
struct Pass<G> {
    loss: f64,
    grads: G,
    forward: Duration,
    backward: Duration,
    op_times: OpTimes,
}

/// Some rows of a batch.
struct Part<'a, B: Backend> {
    batch: &'a Batch,
    rows: Range<usize>,
    /// For how much of the step the whole batch counts.
    share: f64,
    /// Whether the time of each op is asked for.
    timed: bool,
    /// Where gradients go, to be summed over the workers, as soon as they are complete: if these are the last rows of the step.
    buckets: Option<Gradients<'a, B>>,
}

/// On their way between the workers, by leaf.
type Gradients<'a, B> = Buckets<'a, B, VarId>;

/// Gradients so far, as the tape has them; None: nothing yet.
type Sum<B> = Option<Leaves<<B as Backend>::Wide>>;
/// [`lane`] on a device, with the parameters of one step, in the device's precision.
type LaneOf<'a, B> =
    Box<dyn Fn(&Model<B>, Part<B>, Sum<B>) -> std::result::Result<Pass<Sum<B>>, Stop> + Sync + 'a>;
type Lane<B> = Box<dyn for<'a> Fn(&Model<B>, &'a Params<B>) -> LaneOf<'a, B> + Send + Sync>;

/// Why a lane has no gradients.
enum Stop {
    /// A loss is not finite: the first op that was not.
    NotFinite(Option<NonFinite>),
    /// Another worker has failed.
    Failed(Failed),
}

/// Forward and backward over a part of a batch, on top of the gradients `before`.
///
/// On a tape of the device's precision, C; gradients of parameters are in f32 on every tape. bf16 has the exponents of f32, so nothing
/// overflows that would not there, and no loss is scaled.
///
/// # Errors
/// A loss that is not finite; it has gone on to the end all the same, since other workers wait for its gradients. Another worker that has
/// failed.
fn lane<B: Backend, C: Backend<Wide = B::Wide>>(
    leaves: &Leaves<C>,
    model: &Model<B>,
    Part { batch, rows, share, timed, mut buckets }: Part<B>,
    mut sum: Sum<B>,
) -> std::result::Result<Pass<Sum<B>>, Stop> {
    let (device, len) = (leaves.device(), batch.inputs.len() / batch.rows);
    let at_once = if C::ASYNCHRONOUS { batch.rows } else { (TOKENS / len).max(1) };
    let (mut forward, mut backward) = (Duration::ZERO, Duration::ZERO);
    let mut loss = 0.0;
    let mut op_times = OpTimes::new();
    let (mut bad, last) = (None, rows.end);
    for row in rows.clone().step_by(at_once) {
        let start = Instant::now();
        let rows = row..rows.end.min(row + at_once);
        let tokens = rows.start * len..rows.end * len;
        let tape = if timed { Tape::timed(device) } else { Tape::new(device) };
        let w = leaves.on(&tape);
        let (inputs, targets) = (&batch.inputs[tokens.clone()], &batch.targets[tokens]);
        let share = share * rows.len() as f64 / batch.rows as f64;
        let (part, exact) = model.loss(&w, inputs, targets, rows.len(), share); // [1], [1]
        forward += start.elapsed();

        let start = Instant::now();
        let before = sum.take().into_iter().flat_map(|sum| w.pair_up(sum));
        let mut buckets = buckets.take_if(|_| rows.end == last);
        let mut grads = part.backward_with(before, |grads, leaf| {
            if let Some(buckets) = &mut buckets {
                buckets.add(leaf, grads.take(leaf, device));
            }
        });
        let value = share * exact.item(); // not before: a GPU would be waited for
        backward += start.elapsed();
        if let Some(buckets) = buckets {
            buckets.finish(|leaf, sum| grads.put(leaf, sum)).map_err(Stop::Failed)?;
        }
        sum = Some(w.leaf_gradients(grads));
        if !value.is_finite() && bad.is_none() {
            let tape = Tape::keeping(device); // once more, to see all values
            model.loss(&leaves.on(&tape), inputs, targets, rows.len(), share); // [1]
            bad = Some(tape.first_non_finite());
        }
        loss += value;
        add_times(&mut op_times, tape.times());
    }
    bad.map_or(Ok(()), |first| Err(Stop::NotFinite(first)))?;
    Ok(Pass { loss, grads: sum, forward, backward, op_times })
}

fn lane_on<B: Backend, C: Backend<Wide = B::Wide>>(device: C) -> Lane<B> {
    Box::new(move |model, params| {
        let leaves = model.leaves(params).cast(&device);
        Box::new(move |model, part, before| lane(&leaves, model, part, before))
    })
}

fn add_times(sum: &mut OpTimes, times: OpTimes) {
    for (op, time) in times {
        let sum = sum.entry(op).or_default();
        sum.calls += time.calls;
        sum.forward += time.forward;
        sum.backward += time.backward;
    }
}

impl<B: Backend> Trainer<B> {
    /// The initial state of a run.
    pub fn new(device: &B, together: Together<B>, config: &Config) -> Self {
        Self::of(device, together, config, Model::new(device, config))
    }

    fn of(
        device: &B,
        together: Together<B>,
        config: &Config,
        (model, params): (Model<B>, Params<B>),
    ) -> Self {
        let (worker, workers) = (together.link().worker(), together.link().workers());
        let division = division(config, &params, workers);
        let optimizer = optimizer(config, &params, &division, worker);
        let (device, config) = (device.clone(), config.clone());
        let (lane, losses) = (lane_on(device.clone()), losses_on(device.clone()));
        let (bucket, op_times) = (Gradients::<B>::BYTES, None);
        Self { device, config, model, params, optimizer, lane, losses, together, division, bucket, op_times }
    }

    /// With forward, backward and [`Trainer::validate`] on `device`, in its precision. Parameters, gradients from there on, and the
    /// optimizer stay as they are, and so checkpoints.
    pub fn computing_on<C: Backend<Wide = B::Wide>>(self, device: C) -> Self {
        Self { lane: lane_on(device.clone()), losses: losses_on(device), ..self }
    }

    /// The way to the other workers.
    pub fn link(&self) -> &dyn Link {
        self.together.link()
    }

    /// One update from the mean gradient of the micro-batches, with both learning rates times `factor`. Of all workers, each with the
    /// same micro-batches, of which it takes its rows.
    ///
    /// # Errors
    /// A loss or gradient that is not finite: the step's number, and where the first such value came from. Nothing has
    /// been updated then. Another worker that has failed.
    pub fn step(&mut self, micro_batches: &[Batch], factor: f64) -> std::result::Result<Step, Halt> {
        let own = self.gradients(micro_batches);
        let said = match &own {
            Ok((pass, _)) => Ok(pass.loss),
            Err(Halt::Diverged(why)) => Err(why.to_string()),
            Err(Halt::Failed(why)) => return Err(why.clone().into()),
        };
        let loss = self.agreed(said)?;
        let (Pass { mut grads, forward, backward, .. }, summed) = own?;
        if !summed {
            let sums = self.together.all_reduce(grads.tensors().cloned().collect())?.wait()?; // like each
            grads.tensors_mut().zip(sums).for_each(|(gradient, sum)| *gradient = sum);
        }
        let max_norm = if self.config.clip > 0.0 { self.config.clip } else { f64::INFINITY };
        let grad_norm = clip_global_norm(&mut grads, max_norm);
        if !grad_norm.is_finite() {
            let bad = self.params.names().zip(grads.tensors()).find(|(_, g)| !g.is_finite());
            let name = bad.map_or("(overflow in their norm)".into(), |(name, _)| name);
            let what = format!("the gradient of {name} is not finite; the loss was {loss}");
            return Err(Halt::Diverged(self.diverged(&what)));
        }
        let Config { lr, adam_lr, .. } = self.config;
        self.optimizer.step(&mut self.params, &grads, lr * factor, adam_lr * factor);
        self.together.broadcast(self.division.owned(&mut self.params.values))?;
        self.guide();
        Ok(Step { loss, grad_norm, forward, backward })
    }

    /// The sum of the workers' losses, or the first error among them, which all then have.
    fn agreed(&self, mine: std::result::Result<f64, String>) -> std::result::Result<f64, Halt> {
        let said = match mine {
            Ok(loss) => [b"+", &loss.to_le_bytes()[..]].concat(),
            Err(why) => [b"-", why.as_bytes()].concat(),
        };
        let answer = self.link().exchange(said, &mut |said| {
            let error = said.iter().find(|said| said[0] == b'-');
            let losses = said.iter().filter_map(|said| said[1..].try_into().ok().map(f64::from_le_bytes));
            error.cloned().unwrap_or_else(|| [b"+", &losses.sum::<f64>().to_le_bytes()[..]].concat())
        })?;
        match (answer[0], answer[1..].try_into()) {
            (b'+', Ok(loss)) => Ok(f64::from_le_bytes(loss)),
            _ => Err(Halt::Diverged(Error::new(String::from_utf8_lossy(&answer[1..])))),
        }
    }

    /// Loss and gradients of this worker's rows, as parts of the means over all rows of all micro-batches; whether the gradients are summed
    /// over the workers already.
    ///
    /// # Errors
    /// As for [`Trainer::step`].
    fn gradients(&mut self, micro_batches: &[Batch]) -> std::result::Result<(Pass<Values<B>>, bool), Halt> {
        let (mut forward, mut backward) = (Duration::ZERO, Duration::ZERO);
        let mut loss = 0.0;
        let mut sums: Vec<Sum<B>> = Vec::new(); // of each lane
        let on_params = (self.lane)(&self.model, &self.params);
        let share = 1.0 / micro_batches.len() as f64;
        let (worker, workers) = (self.link().worker(), self.link().workers());
        let (mut summed, mut bad) = (false, None);
        for (i, batch) in micro_batches.iter().enumerate() {
            if let Matrices::Guided { skip } = entry::<B>(self.config.method).matrices {
                let guides = self.model.guides.len();
                self.model.guides =
                    guide::training_weights(&self.config, skip, self.steps(), i as u64, guides);
            }
            let start = Instant::now();
            let own = batch.rows * worker / workers..batch.rows * (worker + 1) / workers;
            let long = batch.inputs.len() / batch.rows * self.config.dim >= LONG;
            let lanes = if B::ASYNCHRONOUS || long { 1 } else { own.len().min(LANES) };
            let timed = self.op_times.is_some();
            sums.resize_with(lanes, || None);
            // several lanes are added up first
            summed = workers > 1 && lanes == 1 && i + 1 == micro_batches.len();
            let lane = |(i, before): (usize, Sum<B>)| {
                let rows = own.start + own.len() * i / lanes..own.start + own.len() * (i + 1) / lanes;
                let buckets = summed.then(|| Buckets::new(&self.device, &*self.together, self.bucket));
                on_params(&self.model, Part { batch, rows, share, timed, buckets }, before)
            };
            let before: Vec<_> = std::mem::take(&mut sums).into_iter().enumerate().collect();
            let passes: Vec<_> = match lanes {
                1 => crate::awake::<B, _>(|| before.into_iter().map(lane).collect()),
                _ => before.into_par_iter().map(lane).collect(),
            };
            let (mut first, mut second) = (Duration::ZERO, Duration::ZERO);
            for pass in passes {
                let pass = match pass {
                    Ok(pass) => pass,
                    Err(Stop::Failed(why)) => return Err(why.into()),
                    Err(Stop::NotFinite(first)) => {
                        bad.get_or_insert(first); // on to the last: the other workers wait for its gradients
                        continue;
                    }
                };
                loss += pass.loss;
                first += pass.forward;
                second += pass.backward;
                if let Some(times) = &mut self.op_times {
                    add_times(times, pass.op_times);
                }
                sums.push(pass.grads);
            }
            if bad.is_some() {
                continue;
            }
            // lanes run side by side: the time that went by, in the proportion of what they took
            let wall = start.elapsed();
            let part = wall.mul_f64(first.as_secs_f64() / (first + second).as_secs_f64());
            forward += part;
            backward += wall - part;
        }
        if let Some(first) = bad {
            return Err(Halt::Diverged(self.not_finite("loss", first)));
        }
        let values = |sum: Leaves<B::Wide>| sum.cast(&self.device).values();
        let mut sums = sums.into_iter().flatten().map(values);
        let mut grads = sums.next().expect("a step has at least one batch");
        sums.for_each(|sum| grads.add_scaled(1.0, &sum));
        Ok((Pass { loss, grads, forward, backward, op_times: OpTimes::new() }, summed))
    }

    /// The blocks' matrices, for [`Trainer::telemetry`] after a step. Costs nothing until the step writes to them.
    pub fn matrices(&self) -> Values<B> {
        let Values { pairs, hidden, .. } = &self.params.values;
        Values { pairs: pairs.clone(), hidden: hidden.clone(), dense: Vec::new() }
    }

    /// What the rule reports of each pair's last step. Of all workers.
    ///
    /// # Errors
    /// Another worker that has failed.
    pub fn reports(&self) -> Result<Vec<StepReport>> {
        let own = self.optimizer.pairs.reports().into_iter();
        let own = own.flat_map(|r| [r.sigma_a, r.sigma_b, r.rho, r.shrink]).flat_map(f64::to_le_bytes);
        let all = self.link().exchange(own.collect(), &mut |parts| parts.concat())?; // a worker's pairs are in one run
        let numbers: Vec<f64> = all.as_chunks().0.iter().copied().map(f64::from_le_bytes).collect();
        let report =
            |&[sigma_a, sigma_b, rho, shrink]: &[f64; 4]| StepReport { sigma_a, sigma_b, rho, shrink };
        Ok(numbers.as_chunks().0.iter().map(report).collect())
    }

    /// What the last step, with both learning rates times `factor`, did to the matrices that were `before` it; the `reports` are
    /// the rule's. Guides that it dropped are left out.
    pub fn telemetry(&self, before: &Values<B>, reports: &[StepReport], factor: f64) -> Telemetry {
        let accuracy = accuracy(self.config.telemetry);
        let (lr, decay) = (self.config.lr * factor, self.config.weight_decay);
        let family = Family::of(self.config.method);
        let Values { pairs, hidden, .. } = &self.params.values;
        let Optimizer { pair_scales, hidden_scales, .. } = &self.optimizer;
        let Params { pair_names, hidden_names, .. } = &self.params;
        let pair = |i: usize| {
            let seen = pair_telemetry(Some(&before.pairs[i]), &pairs[i], accuracy);
            let (report, eta) = (reports.get(i), lr * pair_scales[i]);
            let left = || family.left_by_decay(eta, decay);
            let record = PairRecord {
                sigma_a: finite(seen.sigma_a),
                sigma_b: finite(seen.sigma_b),
                gauge_imbalance: finite(seen.gauge_imbalance),
                w: record(seen.w, eta),
                rho: report.map(|report| report.rho),
                shrink: Some(report.map_or_else(left, |report| report.shrink)),
            };
            (pair_names[i].clone(), record)
        };
        let matrix = |i: usize| {
            let seen = matrix_telemetry(Some(&before.hidden[i]), &hidden[i], accuracy);
            (hidden_names[i].clone(), record(seen, lr * hidden_scales[i]))
        };
        Telemetry {
            pairs: (0..pairs.len()).into_par_iter().map(pair).collect(),
            hidden: (0..hidden.len()).into_par_iter().map(matrix).collect(),
        }
    }

    /// Guides and their optimizer state as they stand after the updates so far.
    fn guide(&mut self) {
        let before = self.params.values.hidden.len();
        self.model.guide_at(self.steps(), &self.config, &mut self.params);
        if self.params.values.hidden.len() < before {
            self.optimizer.hidden = Box::new(AdamW::new([]));
            self.optimizer.hidden_scales.clear();
            self.optimizer.own_hidden = 0..0;
        }
    }

    /// Updates done.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps
    }

    fn not_finite(&self, what: &str, op: Option<NonFinite>) -> Error {
        let bad = self.params.names().zip(self.params.values.tensors()).find(|(_, x)| !x.is_finite());
        let origin = match (bad, op) {
            (Some((name, _)), _) => format!("the parameter {name}, since the update before"),
            (None, Some(op)) => op.to_string(),
            (None, None) => "the loss itself".into(),
        };
        self.diverged(&format!("the {what} is not finite; the first such value is in {origin}"))
    }

    fn diverged(&self, what: &str) -> Error {
        Error::new(format!("step {}: {what}", self.steps() + 1))
    }

    /// As [`validate`], of the model as it stands, in the precision of forward and backward. Of all workers: each takes every so many
    /// batches.
    ///
    /// # Errors
    /// Another worker that has failed.
    pub fn validate(&self, corpus: &Corpus, limit: usize) -> Result<f64> {
        self.validate_by(&self.losses, corpus, limit)
    }

    /// As [`Trainer::validate`], in the precision of the parameters.
    ///
    /// # Errors
    /// The same.
    pub fn validate_exactly(&self, corpus: &Corpus, limit: usize) -> Result<f64> {
        self.validate_by(&losses_on(self.device.clone()), corpus, limit)
    }

    fn validate_by(&self, losses: &Losses<B>, corpus: &Corpus, limit: usize) -> Result<f64> {
        let Config { batch, context, .. } = self.config;
        let batches = corpus.validation_batches(batch, context, limit);
        let mut own = batches.skip(self.link().worker()).step_by(self.link().workers());
        let (sum, tokens) = losses(&self.model, &self.params, &mut own);
        let [sum, tokens] = self.link().sums([sum, tokens as f64])?;
        Ok(sum / tokens)
    }
}

/// Mean loss in nats per token over validation batches (`limit` 0: the whole split), and the tokens it is over; in the precision of
/// `device`.
pub fn validate<B: Backend, C: Backend<Wide = B::Wide>>(
    device: C,
    config: &Config,
    model: &Model<B>,
    params: &Params<B>,
    corpus: &Corpus,
    limit: usize,
) -> (f64, u64) {
    let mut batches = corpus.validation_batches(config.batch, config.context, limit);
    let (sum, tokens) = losses_on(device)(model, params, &mut batches);
    (sum / tokens as f64, tokens)
}

/// The sum of the losses of all tokens, and their number.
type Losses<B> =
    Box<dyn Fn(&Model<B>, &Params<B>, &mut dyn Iterator<Item = Batch>) -> (f64, u64) + Send + Sync>;

/// In the precision of `device`.
fn losses_on<B: Backend, C: Backend<Wide = B::Wide>>(device: C) -> Losses<B> {
    Box::new(move |model, params, batches| {
        let (mut sum, mut tokens) = (0.0, 0);
        let leaves = model.leaves(params).cast(&device);
        for b in batches {
            let tape = Tape::new(&device);
            let w = leaves.constants_on(&tape);
            let (_, loss) = model.loss(&w, &b.inputs, &b.targets, b.rows, 1.0); // [1]
            sum += loss.item() * b.inputs.len() as f64;
            tokens += b.inputs.len() as u64;
        }
        (sum, tokens)
    })
}

impl<B: Backend<Elem = f32>> Trainer<B> {
    /// Everything that a continuation needs of the model, bit for bit. `meta.step` is set here; the tokenizer is the caller's. Of all
    /// workers, since each has the optimizer's state of its matrices; the first gets it all, the others None.
    ///
    /// # Errors
    /// Another worker that has failed.
    pub fn checkpoint(&mut self, meta: Meta) -> Result<Option<Checkpoint>> {
        let meta = Meta { step: self.optimizer.steps, ..meta };
        let first = self.link().worker() == 0;
        let state =
            self.optimizer.state().into_iter().filter(|(name, _)| first || !name.starts_with("dense."));
        let state = state.map(|(name, x)| (format!("opt.{name}"), host(x))).collect();
        let mut all = Checkpoint { meta, tokenizer: None, tensors: state };
        if self.link().workers() > 1 {
            let mine = if first { Vec::new() } else { all.to_bytes()? };
            let mut others = Vec::new();
            self.link().exchange(mine, &mut |parts| {
                others = parts;
                Vec::new()
            })?;
            for part in others.iter().skip(1) {
                all.tensors.extend(Checkpoint::from_bytes(part, "")?.tensors);
            }
        }
        if first {
            all.tensors.extend(weights(&self.params));
        }
        Ok(first.then_some(all))
    }
}

impl<B: Backend<Elem = f32>> Trainer<B> {
    /// The initial state of a run that starts from a checkpoint's weights, and from nothing else of it: the optimizer is new.
    /// Guides start as the products of their pairs, as always.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or left over.
    pub fn from_weights(
        device: &B,
        together: Together<B>,
        config: &Config,
        checkpoint: Checkpoint,
    ) -> Result<Self> {
        let (model, mut params) = Model::blank(device, config);
        let guided = matches!(entry::<B>(config.method).matrices, Matrices::Guided { .. });
        let guides = if guided { std::mem::take(&mut params.values.hidden) } else { vec![] };
        let guide_names = if guided { std::mem::take(&mut params.hidden_names) } else { vec![] };
        restore_params(&mut params, checkpoint)?;
        if !guides.is_empty() {
            params.values.hidden = params.values.pairs.iter().map(FactorPair::to_dense).collect(); // [m, n] each
            params.hidden_names = guide_names;
        }
        Ok(Self::of(device, together, config, (model, params)))
    }

    /// The state that a checkpoint of this configuration has; of the optimizer's, this worker's part. How many workers wrote it does
    /// not matter.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or left over.
    pub fn resumed(
        device: &B,
        together: Together<B>,
        config: &Config,
        checkpoint: Checkpoint,
    ) -> Result<Self> {
        let mut trainer = Self::of(device, together, config, Model::blank(device, config));
        trainer.optimizer.steps = checkpoint.meta.step;
        trainer.guide();
        let mut checkpoint = restore_params(&mut trainer.params, checkpoint)?;
        for (name, x) in trainer.optimizer.state() {
            replace(&mut checkpoint, &format!("opt.{name}"), x)?;
        }
        if trainer.link().workers() == 1 {
            checkpoint.all_taken("opt.")?; // else the rest is the others'
        }
        Ok(trainer)
    }
}

fn host<B: Backend<Elem = f32>>(x: &Tensor<B>) -> HostTensor {
    HostTensor { shape: x.shape().dims().to_vec(), values: x.to_vec() }
}

/// A model's parameters as a checkpoint has them.
pub fn weights<B: Backend<Elem = f32>>(params: &Params<B>) -> BTreeMap<String, HostTensor> {
    let named = params.names().zip(params.values.tensors());
    named.map(|(name, x)| (format!("param.{name}"), host(x))).collect()
}

/// The model of a checkpoint, for use without further training.
///
/// # Errors
/// A tensor that is missing, of another shape, or left over.
pub fn load_model<B: Backend<Elem = f32>>(
    device: &B,
    checkpoint: Checkpoint,
) -> Result<(Model<B>, Params<B>)> {
    let config = &checkpoint.meta.config;
    let (mut model, mut params) = Model::blank(device, config);
    model.guide_at(checkpoint.meta.step, config, &mut params);
    restore_params(&mut params, checkpoint)?;
    Ok((model, params))
}

/// Whether self-guided training is still in its first half, whose guides are no part of the final model.
///
/// # Errors
/// It is: a sentence that says so of the checkpoint at `path`.
pub fn without_guides(checkpoint: &Checkpoint, path: &Path) -> Result<()> {
    if checkpoint.tensors.keys().any(|name| name.starts_with("param.") && name.ends_with(".guide")) {
        return Err(Error::new(format!(
            "{} still has the guides of {}, which are no part of the final model; take a checkpoint of its second half",
            path.display(),
            config::name(checkpoint.meta.config.method)
        )));
    }
    Ok(())
}

fn restore_params<B: Backend<Elem = f32>>(
    params: &mut Params<B>,
    mut checkpoint: Checkpoint,
) -> Result<Checkpoint> {
    let names: Vec<String> = params.names().collect();
    for (name, x) in names.iter().zip(params.values.tensors_mut()) {
        replace(&mut checkpoint, &format!("param.{name}"), x)?;
    }
    checkpoint.all_taken("param.")?;
    Ok(checkpoint)
}

fn replace<B: Backend<Elem = f32>>(checkpoint: &mut Checkpoint, name: &str, x: &mut Tensor<B>) -> Result<()> {
    let values = checkpoint.take(name, x.shape().dims())?;
    *x = Tensor::from_vec(x.device(), x.shape(), values); // like x
    Ok(())
}

/// `eta`: the matrix's own learning rate.
fn record(w: MatrixTelemetry, eta: f64) -> MatrixRecord {
    MatrixRecord {
        sigma_w: finite(w.sigma),
        stable_rank: finite(w.stable_rank),
        update: w.update.and_then(finite),
        update_over_eta: w.update.and_then(|update| finite(update / eta)),
        update_over_w: w.update_over_w().and_then(finite),
    }
}

/// JSON has no other numbers.
fn finite(x: f64) -> Option<f64> {
    x.is_finite().then_some(x)
}

fn accuracy(telemetry: config::Telemetry) -> Accuracy {
    match telemetry {
        config::Telemetry::Fast => Accuracy::Fast,
        config::Telemetry::Exact => Accuracy::Exact,
    }
}

/// The factor on the learning rates as a function of the step.
pub fn schedule(config: &Config) -> rankgrad::lowrank::Schedule {
    rankgrad::lowrank::Schedule {
        kind: match config.schedule {
            Schedule::Constant => ScheduleKind::Constant,
            Schedule::Cosine => ScheduleKind::Cosine,
            Schedule::Linear => ScheduleKind::Linear,
            Schedule::Wsd => ScheduleKind::Wsd { decay: 0.2 },
        },
        steps: config.steps as u64,
        warmup: config.warmup as u64,
        end: config.final_lr_fraction,
    }
}

#[cfg(test)]
mod tests {
    //! Ten steps against an independent implementation in PyTorch (benches/reference_steps.py, float64), which wrote
    //! tests/data/reference_steps.json: losses and gradient norms of each step, sums over each parameter at the end.

    use super::*;
    use crate::config::{LrScale, Method, Overrides};
    use rankgrad::gpu::{Cuda, Simulator};
    use rankgrad::parallel::{Alone, ThroughHost, threads};
    use rankgrad::tensor::{Bf16, Element};
    use serde_json::Value;

    const REFERENCE: &str = include_str!("../../tests/data/reference_steps.json");

    /// White noise in [-1, 1) from the position i and a stream p, the same in the script.
    fn noise(i: usize, p: usize) -> f64 {
        let mut h =
            (i as u32).wrapping_mul(2_654_435_761).wrapping_add((p as u32 + 1).wrapping_mul(2_246_822_519));
        h ^= h >> 15;
        h = h.wrapping_mul(3_266_489_917);
        h ^= h >> 13;
        2.0 * f64::from(h >> 8) / f64::from(1 << 24) - 1.0
    }

    fn config(method: Method, reference: &Value) -> Config {
        let number = |key: &str| reference["model"][key].as_u64().unwrap() as usize;
        let rate = |key: &str| reference["methods"][crate::config::name(method)][key].as_f64().unwrap();
        let defaults = Overrides::default().resolve().unwrap();
        Config {
            method,
            vocab: number("vocab"),
            dim: number("dim"),
            layers: number("layers"),
            heads: number("heads"),
            kv_heads: number("kv_heads"),
            ffn: number("ffn"),
            context: number("context"),
            batch: number("batch"),
            rank_ratio: 0.25,
            lr: rate("lr"),
            adam_lr: rate("adam_lr"),
            weight_decay: 0.1,
            nesterov: false,
            ..defaults
        }
    }

    /// The script counts tensors in the order of the model, this library keeps one list per kind.
    fn names(config: &Config) -> Vec<String> {
        let linear = |name: String| match config.factored() {
            true => vec![format!("{name}.A"), format!("{name}.B")],
            false => vec![name],
        };
        let mut names = vec!["embedding".to_owned()];
        for i in 0..config.layers {
            names.push(format!("blocks.{i}.attention_norm"));
            names.extend(["q", "k", "v", "o"].into_iter().flat_map(|n| linear(format!("blocks.{i}.{n}"))));
            names.push(format!("blocks.{i}.ffn_norm"));
            names.extend(["gate", "up", "down"].into_iter().flat_map(|n| linear(format!("blocks.{i}.{n}"))));
        }
        names.extend(["norm".to_owned(), "head".to_owned()]);
        names
    }

    fn start<B: Backend>(device: &B, config: &Config) -> Trainer<B> {
        start_with(device, Arc::new(Alone), config)
    }

    fn start_with<B: Backend>(device: &B, together: Together<B>, config: &Config) -> Trainer<B> {
        let mut trainer = Trainer::new(device, together, config);
        let order = names(config);
        let own: Vec<String> = trainer.params.names().collect();
        for (name, x) in own.iter().zip(trainer.params.values.tensors_mut()) {
            let p = order.iter().position(|n| n == name).unwrap();
            let value = |i: usize| match name {
                n if n.ends_with("norm") => 1.0 + 0.1 * noise(i, p),
                n if n == "embedding" => 0.5 * noise(i, p),
                n if n == "head" => 0.2 * noise(i, p),
                _ if config.factored() => 0.35 * noise(i, p),
                _ => 0.15 * noise(i, p),
            };
            *x = Tensor::from_fn(device, x.shape(), |i| B::Elem::of(value(i)));
        }
        trainer
    }

    fn batch(config: &Config, step: usize) -> Batch {
        let Config { vocab, context, batch, .. } = *config;
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for b in 0..batch {
            let mut tokens: Vec<u32> = Vec::new();
            for t in 0..=context {
                let drawn = ((noise(b * (context + 1) + t, 1000 + step) + 1.0) * 0.5 * vocab as f64) as u32;
                let token = if t % 2 == 0 { drawn } else { (tokens[t - 1] * 3 + 7) % vocab as u32 };
                tokens.push(token);
            }
            inputs.extend(&tokens[..context]);
            targets.extend(&tokens[1..]);
        }
        Batch { inputs, targets, rows: batch }
    }

    /// The largest relative deviation of losses and gradient norms, and of the final parameters' sums of squares.
    fn deviation<B: Backend>(device: &B, method: Method) -> f64 {
        let reference: Value = serde_json::from_str(REFERENCE).unwrap();
        let config = config(method, &reference);
        deviations(start(device, &config), &reference).into_iter().fold(0.0, f64::max)
    }

    /// The largest relative deviation of each of the three.
    fn deviations<B: Backend>(mut trainer: Trainer<B>, reference: &Value) -> [f64; 3] {
        let config = trainer.config.clone();
        let want = &reference["methods"][crate::config::name(config.method)];
        let mut worst = [0.0f64; 3];
        let mut compare = |kind: usize, got: f64, want: &Value, what: &str| {
            let want = want.as_f64().unwrap();
            let error = (got - want).abs() / want.abs();
            assert!(error < 0.1, "{what}: {got}, PyTorch {want}");
            worst[kind] = worst[kind].max(error);
        };
        for step in 0..10 {
            let outcome = trainer.step(&[batch(&config, step)], 1.0).unwrap();
            compare(0, outcome.loss, &want["losses"][step], &format!("loss of step {step}"));
            compare(
                1,
                outcome.grad_norm,
                &want["grad_norms"][step],
                &format!("gradient norm of step {step}"),
            );
        }
        let order = names(&config);
        assert_eq!(want["parameters"].as_array().unwrap().len(), order.len());
        for (name, x) in trainer.params.names().zip(trainer.params.values.tensors()) {
            let p = order.iter().position(|n| *n == name).unwrap();
            let squares = x.to_f64().iter().map(|x| x * x).sum();
            compare(2, squares, &want["parameters"][p]["sum_of_squares"], &name);
        }
        worst
    }

    /// Of the first step, which moves a factor by the same with and without decay: so the two results differ by what decay took.
    #[test]
    fn telemetry_says_what_decay_leaves_of_w() {
        let reference: Value = serde_json::from_str(REFERENCE).unwrap();
        let device = Cpu::<f64>::default();
        for &method in <Method as clap::ValueEnum>::value_variants() {
            let base = Config { method, lr_scale: LrScale::Shape, ..config(Method::Spectron, &reference) };
            if !base.factored() || Family::of(method) == Family::Certified {
                continue; // a certified step is smaller where decay takes a part of η: tests/guarantee.rs
            }
            let run = |weight_decay: f64| {
                let mut trainer =
                    Trainer::new(&device, Arc::new(Alone), &Config { weight_decay, ..base.clone() });
                let before = trainer.matrices();
                trainer.step(&[batch(&base, 0)], 0.5).unwrap();
                let telemetry = trainer.telemetry(&before, &trainer.reports().unwrap(), 0.5);
                (trainer.params, before, telemetry)
            };
            let ((with, before, telemetry), (without, _, none)) = (run(3.0), run(0.0));
            for (i, name) in with.pair_names.iter().enumerate() {
                // c where x⁺ with decay = x⁺ without + (c − 1)·x
                let left = |of: fn(&FactorPair<Cpu<f64>>) -> &Tensor<Cpu<f64>>| {
                    let [x, y, z] =
                        [&before, &with.values, &without.values].map(|v| of(&v.pairs[i]).to_f64());
                    let taken: f64 = x.iter().zip(y.iter().zip(&z)).map(|(x, (y, z))| x * (y - z)).sum();
                    1.0 + taken / x.iter().map(|x| x * x).sum::<f64>()
                };
                let (want, got) = (left(|p| &p.a) * left(|p| &p.b), telemetry.pairs[name].shrink.unwrap());
                assert!(want < 0.999 && (got - want).abs() < 1e-12, "{method:?} {name}: {got}, not {want}");
                assert_eq!(none.pairs[name].shrink, Some(1.0));
            }
        }
    }

    #[test]
    fn lanes_give_the_same_bits_under_any_number_of_threads() {
        let reference: Value = serde_json::from_str(REFERENCE).unwrap();
        // an odd number of rows, more than one run of them in a lane
        let config = Config { batch: 5, context: 64, ..config(Method::Spectron, &reference) };
        let run = |threads: usize| {
            crate::pool(threads).unwrap().install(|| {
                let mut trainer = start(&Cpu::<f32>::default(), &config);
                let mut bits = Vec::new();
                for step in 0..2 {
                    let outcome =
                        trainer.step(&[batch(&config, step), batch(&config, step + 7)], 1.0).unwrap();
                    bits.extend([outcome.loss.to_bits(), outcome.grad_norm.to_bits()]);
                }
                for x in trainer.params.values.tensors() {
                    bits.extend(x.to_vec().iter().map(|x| x.to_bits() as u64));
                }
                bits
            })
        };
        let one = run(1);
        for threads in [2, 3, 8] {
            assert!(run(threads) == one, "{threads} threads give other bits than one");
        }
    }

    #[test]
    fn ten_steps_agree_with_pytorch() {
        for method in [Method::Spectron, Method::Adamw, Method::DenseAdamw, Method::DenseMuon] {
            let (single, double) =
                (deviation(&Cpu::<f32>::default(), method), deviation(&Cpu::<f64>::default(), method));
            println!("{}: f32 {single:.1e}, f64 {double:.1e}", crate::config::name(method));
            assert!(single < 1e-5, "{method:?} in f32: {single:e}");
            // the reference is printed with 17 digits; what remains is rounding, grown over ten steps
            assert!(double < 1e-11, "{method:?} in f64: {double:e}");
        }
    }

    /// The GPU backend: on the GPU whose number is in RANKGRAD_TEST_GPU, else on its simulator; None, and a line that says so,
    /// without a C++ compiler.
    fn gpu() -> Option<Cuda<f32>> {
        #[cfg(feature = "cuda")]
        if let Ok(ordinal) = std::env::var("RANKGRAD_TEST_GPU") {
            return Some(Cuda::open(ordinal.parse().expect("a number")).unwrap());
        }
        match Simulator::new() {
            Err(why)
                if why.starts_with("no C++ compiler")
                    && std::env::var_os("RANKGRAD_REQUIRE_CXX").is_none() =>
            {
                println!("skipped: {why}");
                None
            }
            opened => Some(Cuda::on(std::sync::Arc::new(opened.unwrap()))),
        }
    }

    #[test]
    fn ten_steps_on_the_gpu_agree_with_pytorch() {
        let Some(gpu) = gpu() else { return };
        for method in [Method::Spectron, Method::DenseAdamw] {
            let error = deviation(&gpu, method);
            println!("{}: {error:.1e}", crate::config::name(method));
            assert!(error < 1e-5, "{method:?}: {error:e}");
        }
    }

    /// Each rounding errs by up to u = 2⁻⁸, in either direction, and what is compared are sums over many of them: all three stay
    /// below u, the loss, a mean over all tokens that is itself not rounded, below u/4. But they are not those of f32.
    #[test]
    fn ten_steps_in_bf16_agree_with_pytorch() {
        let Some(gpu) = gpu() else { return };
        let reference: Value = serde_json::from_str(REFERENCE).unwrap();
        for method in [Method::Spectron, Method::Adamw, Method::DenseAdamw, Method::DenseMuon] {
            let trainer = start(&gpu, &config(method, &reference)).computing_on(gpu.with_elements::<Bf16>());
            let [loss, norm, squares] = deviations(trainer, &reference);
            println!("{}: {loss:.1e}, {norm:.1e}, {squares:.1e}", crate::config::name(method));
            let u = Bf16::UNIT_ROUNDOFF;
            assert!(loss < u / 4.0 && norm < u && squares < u, "{method:?}: {loss:e}, {norm:e}, {squares:e}");
            assert!(loss > 1e-5, "{method:?}: {loss:e}");
        }
    }

    #[test]
    fn a_run_in_bf16_goes_on_from_its_checkpoint_to_the_same_bits() {
        let Some(gpu) = gpu() else { return };
        let reference: Value = serde_json::from_str(REFERENCE).unwrap();
        let config = config(Method::Spectron, &reference);
        let meta = || Meta::of_model(config.clone());
        let mut whole = start(&gpu, &config).computing_on(gpu.with_elements::<Bf16>());
        whole.step(&[batch(&config, 0), batch(&config, 1)], 1.0).unwrap();
        let saved = whole.checkpoint(meta()).unwrap().unwrap();
        let parts = Trainer::resumed(&gpu, Arc::new(Alone), &config, saved).unwrap();
        let mut parts = parts.computing_on(gpu.with_elements::<Bf16>());
        let [one, other] = [&mut whole, &mut parts].map(|t| t.step(&[batch(&config, 2)], 1.0).unwrap().loss);
        assert_eq!(one.to_bits(), other.to_bits());
        let [one, other] = [whole, parts].map(|mut t| t.checkpoint(meta()).unwrap().unwrap().tensors);
        assert!(one == other);
    }

    #[test]
    fn a_checkpoint_moves_between_processor_and_gpu() {
        let Some(gpu) = gpu() else { return };
        let reference: Value = serde_json::from_str(REFERENCE).unwrap();
        let config = config(Method::Spectron, &reference);
        let meta = || Meta::of_model(config.clone());
        let mut on_cpu = start(&Cpu::<f32>::default(), &config);
        on_cpu.step(&[batch(&config, 0)], 1.0).unwrap();
        let saved = on_cpu.checkpoint(meta()).unwrap().unwrap();
        let mut on_gpu = Trainer::resumed(&gpu, Arc::new(Alone), &config, saved.clone()).unwrap();
        let again = on_gpu.checkpoint(meta()).unwrap().unwrap();
        assert!(again.tensors == saved.tensors && again.meta.step == 1);
        let [cpu, gpu] = [on_cpu.step(&[batch(&config, 1)], 1.0), on_gpu.step(&[batch(&config, 1)], 1.0)]
            .map(|outcome| outcome.unwrap().loss);
        assert!((cpu - gpu).abs() < 1e-5, "{cpu} and {gpu}");
        let saved = on_gpu.checkpoint(meta()).unwrap().unwrap();
        let back = Trainer::resumed(&Cpu::<f32>::default(), Arc::new(Alone), &config, saved).unwrap();
        assert_eq!(back.steps(), 2);
    }

    type OnCpu = Trainer<Cpu<f32>>;

    /// What each of so many workers, threads of this process, makes of its trainer.
    fn each<T: Send>(
        workers: usize,
        trainer: impl Fn(Together<Cpu<f32>>) -> OnCpu + Sync,
        work: impl Fn(&mut OnCpu) -> T + Sync,
    ) -> Vec<T> {
        std::thread::scope(|scope| {
            let (trainer, work) = (&trainer, &work);
            let spawn = |link| scope.spawn(move || work(&mut trainer(Arc::new(ThroughHost(link)))));
            let running: Vec<_> = threads(workers).into_iter().map(spawn).collect();
            running.into_iter().map(|worker| worker.join().unwrap()).collect()
        })
    }

    /// Losses and gradient norms of some steps, two micro-batches each, and the parameters after them.
    fn course(trainer: &mut OnCpu, steps: Range<usize>) -> (Vec<f64>, Vec<Vec<f32>>) {
        let config = trainer.config.clone();
        let step = |t: usize| {
            let outcome = trainer.step(&[batch(&config, t), batch(&config, t + 50)], 1.0).unwrap();
            [outcome.loss, outcome.grad_norm]
        };
        let numbers = steps.flat_map(step).collect();
        (numbers, trainer.params.values.tensors().map(Tensor::to_vec).collect())
    }

    /// The largest relative deviation of numbers from those of one worker.
    fn apart(got: &[f64], want: &[f64]) -> f64 {
        assert_eq!(got.len(), want.len());
        got.iter().zip(want).map(|(x, y)| (x - y).abs() / y.abs()).fold(0.0, f64::max)
    }

    fn divided(method: Method) -> Config {
        let reference: Value = serde_json::from_str(REFERENCE).unwrap();
        let rates_of = match method {
            Method::SpectronCertified => Method::Spectron,
            Method::SelfGuided | Method::SelfGuidedCheap => Method::Adamw,
            other => other,
        };
        // clipped, so that the scale of the gradients, to which Spectron and AdamW are blind, shows in the update too
        Config { method, batch: 4, clip: 0.1, ..config(rates_of, &reference) }
    }

    #[test]
    fn one_worker_takes_the_plain_path_to_the_bit() {
        for method in [Method::Spectron, Method::DenseMuon] {
            let config = divided(method);
            let plain = course(&mut start(&Cpu::default(), &config), 0..4);
            let one = each(1, |it| start_with(&Cpu::default(), it, &config), |it| course(it, 0..4));
            assert!(one == [plain], "{method:?}");
        }
    }

    /// Only the order of sums differs, by some roundings of 6e-8 in each gradient. Ten steps of Spectron or Muon pass that on without
    /// growth (7e-8 in losses and norms was seen, for AdamW too); but AdamW divides by roots of second moments near 0, and has what f32 has there against
    /// PyTorch's f64, below 1e-5. Rows taken twice or left out, a mean of means that is none, gradients that are not summed and matrices
    /// that are not handed out deviate by more than 1e-3.
    #[test]
    fn several_workers_take_the_steps_of_one() {
        for method in [Method::Spectron, Method::DenseMuon, Method::SelfGuided, Method::Adamw] {
            let config = Config { steps: 10, ..divided(method) }; // guides are there for half of them
            let new = |it: Together<Cpu<f32>>| Trainer::new(&Cpu::default(), it, &config);
            let (want, _) = course(&mut new(Arc::new(Alone)), 0..10);
            let tolerance = if matches!(method, Method::Spectron | Method::DenseMuon) { 1e-6 } else { 1e-5 };
            for workers in [2, 4] {
                let all = each(workers, new, |it| course(it, 0..10));
                let error = apart(&all[0].0, &want);
                println!("{method:?} by {workers}: {error:.1e}");
                assert!(error < tolerance, "{method:?} by {workers}: {error:e}");
                assert!(all.iter().all(|one| *one == all[0]), "{method:?}: all have the same bits");
            }
        }
    }

    /// Four workers have a row and so a lane each: gradients are summed as they come, in buckets of one tensor, of some, or all at the end,
    /// to the same bits. (Two workers have two lanes, whose sum is summed.)
    #[test]
    fn buckets_change_no_bit() {
        // guides are left out of some micro-batches, also of a step's last
        for method in [Method::Spectron, Method::SelfGuidedCheap] {
            let config = divided(method);
            let by = |bucket: usize| {
                let new = |it| OnCpu { bucket, ..Trainer::new(&Cpu::default(), it, &config) };
                each(4, new, |it| course(it, 0..4)).remove(0)
            };
            let at_the_end = by(usize::MAX);
            assert!([1, 1 << 12].map(by) == [at_the_end.clone(), at_the_end], "{method:?}");
        }
    }

    #[test]
    fn each_worker_moves_its_part_and_a_checkpoint_has_all() {
        for method in [Method::Spectron, Method::SpectronCertified, Method::DenseMuon] {
            let config = divided(method);
            let new = |it| start_with(&Cpu::default(), it, &config);
            let meta = || Meta::of_model(config.clone());
            let saved_by = |workers| {
                each(workers, new, |trainer| {
                    course(trainer, 0..3);
                    let state: Vec<String> =
                        trainer.optimizer.state().into_iter().map(|(name, _)| name).collect();
                    (state, trainer.reports().unwrap(), trainer.checkpoint(meta()).unwrap())
                })
            };
            let (one, two) = (saved_by(1), saved_by(2));
            let own = |names: &[String]| names.iter().filter(|name| !name.starts_with("opt.dense")).count();
            assert!(two.iter().all(|(names, ..)| (0..own(&one[0].0)).contains(&own(names))));
            assert!(two[1].2.is_none(), "the first has it");
            let (alone, saved) = (one[0].2.as_ref().unwrap(), two[0].2.as_ref().unwrap());
            let shapes = |saved: &Checkpoint| -> Vec<(String, Vec<usize>)> {
                saved.tensors.iter().map(|(name, x)| (name.clone(), x.shape.clone())).collect()
            };
            assert_eq!(shapes(saved), shapes(alone));
            // what the rule reports, in the order of the pairs. Certificates are renewed in an order that depends on the division
            assert_eq!(two[0].1.len(), one[0].1.len());
            if method == Method::Spectron {
                let rho =
                    |reports: &[StepReport]| reports.iter().map(|report| report.rho).collect::<Vec<_>>();
                assert!(apart(&rho(&two[0].1), &rho(&one[0].1)) < 1e-5 && two[0].1 == two[1].1);
            }
            // to the bit with as many workers, to rounding with others
            let resume = |it| Trainer::resumed(&Cpu::default(), it, &config, saved.clone()).unwrap();
            let on = |workers| each(workers, resume, |trainer| course(trainer, 3..6)).remove(0);
            let whole = each(2, new, |trainer| {
                course(trainer, 0..3);
                course(trainer, 3..6)
            });
            assert!(on(2) == whole[0], "{method:?}: goes on to the bit");
            let tolerance = if method == Method::SpectronCertified { 1e-3 } else { 1e-5 }; // as above
            for workers in [1, 4] {
                let error = apart(&on(workers).0, &whole[0].0);
                assert!(error < tolerance, "{method:?} on {workers}: {error:e}");
            }
        }
    }

    #[test]
    fn a_loss_that_is_not_finite_for_one_worker_ends_all_with_its_words() {
        let config = divided(Method::Spectron);
        let ends = each(
            3,
            |it| {
                let last = it.link().worker() == 2;
                let mut trainer = start_with(&Cpu::default(), it, &Config { batch: 3, ..config.clone() });
                if last {
                    let gain = trainer.params.values.dense.last_mut().unwrap();
                    *gain = gain.scale(f64::NAN); // like it
                }
                trainer
            },
            |trainer| match trainer.step(&[batch(&trainer.config, 0)], 1.0) {
                Err(Halt::Diverged(why)) => why.to_string(),
                _ => panic!("it went on"),
            },
        );
        assert!(
            ends[0].starts_with("step 1: the loss is not finite; the first such value is in the parameter")
        );
        assert!(ends.iter().all(|end| *end == ends[0]), "{ends:?}");
    }

    /// Who has no loss in a step's first micro-batch has gradients of the last all the same, since others wait for them.
    #[test]
    fn a_loss_that_is_not_finite_early_in_a_step_keeps_nobody_waiting() {
        let config = divided(Method::Spectron);
        let below_five = |step| {
            let Batch { inputs, targets, rows } = batch(&config, step);
            Batch { inputs: inputs.into_iter().map(|token| token % 5).collect(), targets, rows }
        };
        let ends = each(
            4,
            |it| start_with(&Cpu::default(), it, &config),
            |trainer| {
                let mut batches = [below_five(0), below_five(1)];
                if trainer.link().worker() == 2 {
                    batches[0].inputs[2 * config.context] = 5; // the token without a vector, in the third row
                    let at = trainer.params.dense_names.iter().position(|name| name == "embedding").unwrap();
                    let embed = &mut trainer.params.values.dense[at];
                    let mut values = embed.to_vec();
                    values[5 * config.dim] = f32::NAN;
                    *embed = Tensor::from_vec(&Cpu::default(), embed.shape(), values); // [vocab, dim]
                }
                match trainer.step(&batches, 1.0) {
                    Err(Halt::Diverged(why)) => why.to_string(),
                    _ => panic!("it went on"),
                }
            },
        );
        assert!(
            ends[0].starts_with("step 1: the loss is not finite; the first such value is in the parameter")
        );
        assert!(ends.iter().all(|end| *end == ends[0]), "{ends:?}");
    }

    #[test]
    fn validation_is_divided_too() {
        let config = divided(Method::Spectron);
        let corpus = small_corpus(&config);
        let loss = |workers| {
            let new = |it| start_with(&Cpu::default(), it, &config);
            each(workers, new, |trainer| trainer.validate(&corpus, 5).unwrap())
        };
        let one = loss(1);
        assert_eq!(one, [validate_alone(&config, &corpus)]);
        for workers in [2, 7] {
            let many = loss(workers); // seven: two of them have nothing to do
            assert!(many.iter().all(|x| *x == many[0]) && apart(&many[..1], &one) < 1e-12, "{many:?}");
        }
    }

    /// In bf16 where the training is, and then off by what its steps' losses are (above).
    #[test]
    fn validation_of_training_in_bf16_is_in_bf16() {
        let Some(gpu) = gpu() else { return };
        let reference: Value = serde_json::from_str(REFERENCE).unwrap();
        let config = config(Method::Spectron, &reference);
        let corpus = small_corpus(&config);
        let exact = validate_alone(&config, &corpus);
        let trainer = start(&gpu, &config).computing_on(gpu.with_elements::<Bf16>());
        let off = |loss: Result<f64>| (loss.unwrap() / exact - 1.0).abs();
        let (half, single) = (off(trainer.validate(&corpus, 5)), off(trainer.validate_exactly(&corpus, 5)));
        println!("bf16 {half:.1e}, f32 {single:.1e}");
        assert!(single < 1e-6 && half > 1e-6 && half < Bf16::UNIT_ROUNDOFF / 4.0, "{half:e}, {single:e}");
    }

    fn small_corpus(config: &Config) -> Corpus {
        let text = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(text.path(), (0..4000u32).map(|i| (i * i % 31) as u8).collect::<Vec<u8>>()).unwrap();
        let tokenizer = crate::tokens::Tokenizer::Bytes;
        Corpus::load(&[text.path().to_owned()], &[], config.context, &tokenizer).unwrap()
    }

    fn validate_alone(config: &Config, corpus: &Corpus) -> f64 {
        let trainer = start(&Cpu::<f32>::default(), config);
        validate(Cpu::<f32>::default(), config, &trainer.model, &trainer.params, corpus, 5).0
    }
}
