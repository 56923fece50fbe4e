//! One training step, and the state that it moves: parameters, optimizer, and how both go in and out of checkpoints.
//!
//! Not here: the loop around it (train.rs).

use std::time::{Duration, Instant};

use rankgrad::autograd::Tape;
use rankgrad::lowrank::{
    AdamW, FactorPair, Optimizer, Params, Rule, ScheduleKind, Spectron, Values, clip_global_norm,
};
use rankgrad::tensor::{Cpu, Tensor};

use crate::checkpoint::{Checkpoint, HostTensor, Meta};
use crate::config::{Config, Method, Schedule};
use crate::data::{Batch, Corpus};
use crate::error::{Error, Result};
use crate::model::Model;

type B = Cpu<f32>;
type PairRule = Box<dyn Rule<B, FactorPair<B>>>;

/// A model in training.
pub struct Trainer {
    pub config: Config,
    pub model: Model<B>,
    pub params: Params<B>,
    optimizer: Optimizer<B, PairRule>,
}

/// What one step saw, and where its time went.
pub struct Step {
    /// Mean training loss in nats per token, before the update.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    pub forward: Duration,
    pub backward: Duration,
    /// Clipping and update.
    pub optimizer: Duration,
}

impl Trainer {
    /// The initial state of a run.
    pub fn new(config: &Config) -> Self {
        let (model, params) = Model::new(&B::default(), config);
        let optimizer = optimizer(config, &params);
        Self { config: config.clone(), model, params, optimizer }
    }

    /// One update from the mean gradient of the micro-batches, with both learning rates times `factor`.
    ///
    /// # Errors
    /// A loss or gradient that is not finite: the step's number, and where the first such value came from. Nothing has
    /// been updated then.
    pub fn step(&mut self, micro_batches: &[Batch], factor: f64) -> Result<Step> {
        let (mut forward, mut backward) = (Duration::ZERO, Duration::ZERO);
        let mut loss = 0.0;
        let mut sum: Option<Values<B>> = None;
        let share = 1.0 / micro_batches.len() as f64;
        for batch in micro_batches {
            let start = Instant::now();
            let tape = Tape::new(&B::default());
            let w = self.params.on(&tape);
            let batch_loss = self.model.loss(&w, &batch.inputs, &batch.targets, batch.rows);
            let value = batch_loss.value().item();
            forward += start.elapsed();
            if !value.is_finite() {
                return Err(self.not_finite("loss", &tape));
            }
            loss += share * value;

            let start = Instant::now();
            let grads = w.gradients(batch_loss.backward());
            match &mut sum {
                Some(sum) => sum.add_scaled(1.0, &grads),
                None => sum = Some(grads),
            }
            backward += start.elapsed();
        }
        let mut grads = sum.ok_or_else(|| Error::new("a step needs at least one batch"))?;
        let start = Instant::now();
        if micro_batches.len() > 1 {
            grads.scale(share);
        }
        let max_norm = if self.config.clip > 0.0 { self.config.clip } else { f64::INFINITY };
        let grad_norm = clip_global_norm(&mut grads, max_norm);
        if !grad_norm.is_finite() {
            let bad = self.params.names().zip(grads.tensors()).find(|(_, g)| !g.is_finite());
            let name = bad.map_or("(overflow in their norm)".into(), |(name, _)| name);
            return Err(self.diverged(&format!("the gradient of {name} is not finite; the loss was {loss}")));
        }
        let Config { lr, adam_lr, .. } = self.config;
        self.optimizer.step(&mut self.params, &grads, lr * factor, adam_lr * factor);
        Ok(Step { loss, grad_norm, forward, backward, optimizer: start.elapsed() })
    }

    /// Updates done.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps
    }

    fn not_finite(&self, what: &str, tape: &Tape<B>) -> Error {
        let bad = self.params.names().zip(self.params.values.tensors()).find(|(_, x)| !x.is_finite());
        let origin = match (bad, tape.first_non_finite()) {
            (Some((name, _)), _) => format!("the parameter {name}, since the update before"),
            (None, Some(op)) => op.to_string(),
            (None, None) => "the loss itself".into(),
        };
        self.diverged(&format!("the {what} is not finite; the first such value is in {origin}"))
    }

    fn diverged(&self, what: &str) -> Error {
        Error::new(format!(
            "step {}: {what}. The last checkpoint is kept; try a smaller --lr or --adam-lr, or a smaller --clip",
            self.steps() + 1
        ))
    }

    /// Mean loss in nats per token over validation batches (`limit` 0: the whole split), and the tokens it is over.
    pub fn validate(&self, corpus: &Corpus, limit: usize) -> (f64, u64) {
        let Config { batch, context, .. } = self.config;
        let (mut sum, mut tokens) = (0.0, 0);
        for b in corpus.validation_batches(batch, context, limit) {
            let tape = Tape::new(&B::default());
            let w = self.params.constants_on(&tape);
            let loss = self.model.loss(&w, &b.inputs, &b.targets, b.rows).value().item();
            sum += loss * b.inputs.len() as f64;
            tokens += b.inputs.len() as u64;
        }
        (sum / tokens as f64, tokens)
    }

    /// Everything that a continuation needs, bit for bit. `meta.step` is set here.
    pub fn checkpoint(&mut self, meta: Meta) -> Checkpoint {
        let host = |x: &Tensor<B>| HostTensor { shape: x.shape().dims().to_vec(), values: x.to_vec() };
        let params = self.params.names().zip(self.params.values.tensors());
        let mut tensors: std::collections::BTreeMap<_, _> =
            params.map(|(name, x)| (format!("param.{name}"), host(x))).collect();
        let meta = Meta { step: self.optimizer.steps, ..meta };
        let state = self.optimizer.state();
        tensors.extend(state.into_iter().map(|(name, x)| (format!("opt.{name}"), host(x))));
        Checkpoint { meta, tensors }
    }

    /// Takes over the state of a checkpoint.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or left over.
    pub fn restore(&mut self, checkpoint: Checkpoint) -> Result<()> {
        let mut checkpoint = restore_params(&mut self.params, checkpoint)?;
        for (name, x) in self.optimizer.state() {
            replace(&mut checkpoint, &format!("opt.{name}"), x)?;
        }
        checkpoint.all_taken("opt.")?;
        self.optimizer.steps = checkpoint.meta.step;
        Ok(())
    }
}

/// The model of a checkpoint, for use without further training.
///
/// # Errors
/// A tensor that is missing, of another shape, or left over.
pub fn load_model(checkpoint: Checkpoint) -> Result<(Model<B>, Params<B>)> {
    let (model, mut params) = Model::new(&B::default(), &checkpoint.meta.config);
    restore_params(&mut params, checkpoint)?;
    Ok((model, params))
}

fn restore_params(params: &mut Params<B>, mut checkpoint: Checkpoint) -> Result<Checkpoint> {
    let names: Vec<String> = params.names().collect();
    for (name, x) in names.iter().zip(params.values.tensors_mut()) {
        replace(&mut checkpoint, &format!("param.{name}"), x)?;
    }
    checkpoint.all_taken("param.")?;
    Ok(checkpoint)
}

fn replace(checkpoint: &mut Checkpoint, name: &str, x: &mut Tensor<B>) -> Result<()> {
    let values = checkpoint.take(name, x.shape().dims())?;
    *x = Tensor::from_vec(x.device(), x.shape(), values); // like x
    Ok(())
}

fn optimizer(config: &Config, params: &Params<B>) -> Optimizer<B, PairRule> {
    let Config { weight_decay, beta1, beta2, momentum, .. } = *config;
    let values = &params.values;
    let adamw = |mut adamw: AdamW<B>| {
        (adamw.beta1, adamw.beta2, adamw.weight_decay) = (beta1, beta2, weight_decay);
        adamw
    };
    let pairs: PairRule = match config.method {
        Method::Spectron | Method::DenseAdamw => {
            let mut spectron = Spectron::new(&values.pairs);
            (spectron.beta, spectron.weight_decay) = (momentum, weight_decay);
            Box::new(spectron)
        }
        Method::Adamw => Box::new(adamw(AdamW::for_pairs(&values.pairs))),
    };
    Optimizer {
        pairs,
        hidden: Box::new(adamw(AdamW::new(&values.hidden))),
        dense: adamw(AdamW::new(&values.dense)),
        steps: 0,
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
