//! One optimizer for a whole model: each kind of parameter goes to its own rule, by type.

use super::{AdamW, FactorPair, Params, Spectron, Values};
use crate::tensor::{Backend, Tensor};
use std::ops::Range;

/// The tensors that a rule must save to continue bit-identically: what each is, for which of the parameters' tensors, counted from 0.
pub type State<'a, B> = Vec<(&'static str, usize, &'a mut Tensor<B>)>;

/// An update rule for parameters of type `P` (factor pairs or tensors). It keeps its own momenta.
pub trait Rule<B: Backend, P>: Send {
    /// Moves each of `params` against its gradient with its learning rate; `t` counts the updates from 1.
    ///
    /// # Panics
    /// If parameters, gradients and momenta are not of one number.
    #[track_caller]
    fn step(&mut self, params: &mut [P], grads: &[P], lr: &[f64], t: u64);
    /// Everything that must be saved.
    fn state(&mut self) -> State<'_, B>;
    /// What the last step did to each parameter, where the rule bounds its steps. Others have nothing to report. Waits for a device.
    fn reports(&self) -> Vec<StepReport> {
        Vec::new()
    }
}

/// What the last step did to one pair.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Spectral norms before the step: estimates from below, or, certified, bounds from above.
    pub sigma_a: f64,
    pub sigma_b: f64,
    /// The radius.
    pub rho: f64,
    /// The factor on W by weight decay, 1 − ηλ (or nearer to 1 where `certify` lowers it).
    pub shrink: f64,
}

/// The rules of a model, one per kind of parameter.
pub struct Optimizer<B: Backend, R = Spectron<B>> {
    /// For the factor pairs.
    pub pairs: R,
    /// For hidden matrices that are kept whole.
    pub hidden: Box<dyn Rule<B, Tensor<B>>>,
    /// For everything else.
    pub dense: AdamW<B>,
    /// Factors on the learning rate of each pair and of each hidden matrix, such as [`shape_scale`].
    pub pair_scales: Vec<f64>,
    pub hidden_scales: Vec<f64>,
    /// The pairs and the hidden matrices that `pairs` and `hidden` were made for, and move: all, or this worker's
    /// ([`Division`](crate::parallel::Division)).
    pub own_pairs: Range<usize>,
    pub own_hidden: Range<usize>,
    /// Updates so far.
    pub steps: u64,
}

/// √(max(m, n) / width) for an m×n matrix in a model of this width: a rate that is right for square matrices, carried over to
/// the wider ones of the feed-forward part. An entry of an orthogonalised m×n matrix has the size 1/√max(m, n) at full rank, so
/// the factor gives all matrices steps of one size per entry (Liu et al. 2025, arXiv 2502.16982, scale by √max(m, n) too).
pub fn shape_scale(m: usize, n: usize, width: usize) -> f64 {
    (m.max(n) as f64 / width as f64).sqrt()
}

impl<B: Backend> Optimizer<B, Spectron<B>> {
    /// Spectron for the pairs and AdamW for the rest, at their default settings.
    pub fn spectron(params: &Params<B>) -> Self {
        Self::new(Spectron::new(&params.values.pairs), params)
    }
}

impl<B: Backend, R: Rule<B, FactorPair<B>>> Optimizer<B, R> {
    /// `pairs` for the factor pairs and AdamW at its default settings for the rest.
    pub fn new(pairs: R, params: &Params<B>) -> Self {
        Self {
            pairs,
            hidden: Box::new(AdamW::new(&params.values.hidden)),
            dense: AdamW::new(&params.values.dense),
            pair_scales: vec![1.0; params.values.pairs.len()],
            hidden_scales: vec![1.0; params.values.hidden.len()],
            own_pairs: 0..params.values.pairs.len(),
            own_hidden: 0..params.values.hidden.len(),
            steps: 0,
        }
    }

    /// One update: `lr` (η), scaled, for pairs and hidden matrices, `adam_lr` for everything else.
    ///
    /// # Panics
    /// If a parameter was added after the optimizer was made.
    #[track_caller]
    pub fn step(&mut self, params: &mut Params<B>, grads: &Values<B>, lr: f64, adam_lr: f64) {
        self.steps += 1;
        let Values { pairs, hidden, dense } = &mut params.values;
        same_count("optimizer", pairs.len(), grads.pairs.len(), self.pair_scales.len());
        same_count("optimizer", hidden.len(), grads.hidden.len(), self.hidden_scales.len());
        let scaled = |scales: &[f64]| -> Vec<f64> { scales.iter().map(|scale| lr * scale).collect() };
        let own = self.own_pairs.clone();
        let rates = scaled(&self.pair_scales[own.clone()]);
        self.pairs.step(&mut pairs[own.clone()], &grads.pairs[own], &rates, self.steps);
        let own = self.own_hidden.clone();
        let rates = scaled(&self.hidden_scales[own.clone()]);
        self.hidden.step(&mut hidden[own.clone()], &grads.hidden[own], &rates, self.steps);
        self.dense.step(dense, &grads.dense, &vec![adam_lr; grads.dense.len()], self.steps);
    }

    /// The state of all rules by name, `pairs.WHAT.I`, `hidden.WHAT.I` and `dense.WHAT.I`: I counts the tensors of all parameters of
    /// the kind, also where this optimizer has a part of them.
    pub fn state(&mut self) -> Vec<(String, &mut Tensor<B>)> {
        let parts = [
            ("pairs", 2 * self.own_pairs.start, self.pairs.state()),
            ("hidden", self.own_hidden.start, self.hidden.state()),
            ("dense", 0, Rule::<B, Tensor<B>>::state(&mut self.dense)),
        ];
        let named = parts.into_iter().flat_map(|(part, first, state)| {
            state.into_iter().map(move |(what, i, x)| (format!("{part}.{what}.{}", first + i), x))
        });
        named.collect()
    }
}

impl<B: Backend, P, R: Rule<B, P> + ?Sized> Rule<B, P> for Box<R> {
    fn step(&mut self, params: &mut [P], grads: &[P], lr: &[f64], t: u64) {
        (**self).step(params, grads, lr, t);
    }
    fn state(&mut self) -> State<'_, B> {
        (**self).state()
    }
    fn reports(&self) -> Vec<StepReport> {
        (**self).reports()
    }
}

/// A parameter without a momentum would never be trained, and nothing would show it.
#[track_caller]
pub(super) fn same_count(rule: &str, params: usize, grads: usize, momenta: usize) {
    assert!(
        params == grads && grads == momenta,
        "{rule}: {params} parameters, {grads} gradients, momenta for {momenta}; make the optimizer after the last parameter"
    );
}

/// Scales all gradients together so that their norm is at most `max_norm`; returns the norm before.
pub fn clip_global_norm<B: Backend>(grads: &mut Values<B>, max_norm: f64) -> f64 {
    let norm = grads.norm();
    if norm > max_norm {
        grads.scale(max_norm / norm);
    }
    norm
}
