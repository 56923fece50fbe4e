//! AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), for tensors and, as the naive baseline, for the factors of pairs.

use super::FactorPair;
use super::optimizer::{Rule, State, same_count};
use crate::tensor::{AdamWStep, AdamWUpdate, Backend, Tensor};

/// Adam with decoupled weight decay. Decay is left out for vectors (gains, biases).
pub struct AdamW<B: Backend> {
    pub beta1: f64,
    pub beta2: f64,
    /// Added to √v̂, outside the root.
    pub eps: f64,
    /// λ: matrices shrink by 1 − lr·λ per step.
    pub weight_decay: f64,
    /// First and second moments of each tensor.
    moments: Vec<[Tensor<B>; 2]>,
}

impl<B: Backend> AdamW<B> {
    /// Betas 0.9 and 0.99, eps 1e-8, no decay; zero moments for `tensors`.
    pub fn new<'a>(tensors: impl IntoIterator<Item = &'a Tensor<B>>) -> Self
    where
        B: 'a,
    {
        let moments = tensors.into_iter().map(|x| [x.zeros_like(), x.zeros_like()]).collect();
        Self { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, moments }
    }

    /// For the factors of `pairs` as if they were unrelated matrices.
    pub fn for_pairs(pairs: &[FactorPair<B>]) -> Self {
        Self::new(pairs.iter().flat_map(|p| [&p.a, &p.b]))
    }

    /// Update number `t`, counted from 1; `lr(i)` is the rate of tensor i.
    fn update<'a>(
        &mut self,
        tensors: impl Iterator<Item = (&'a mut Tensor<B>, &'a Tensor<B>)>,
        lr: impl Fn(usize) -> f64,
        t: u64,
    ) where
        B: 'a,
    {
        let Self { beta1, beta2, eps, weight_decay, .. } = *self;
        let bias = |beta: f64| 1.0 - beta.powi(t as i32);
        let step = AdamWStep { beta1, beta2, eps, bias1: bias(beta1), bias2: bias(beta2) };
        let mut updates = Vec::new();
        for (i, ((w, g), moments)) in tensors.zip(&mut self.moments).enumerate() {
            let decay = if w.shape().dims().len() > 1 { weight_decay } else { 0.0 };
            updates.push(AdamWUpdate { w, g, moments, lr: lr(i), decay });
        }
        B::adamw(step, updates);
    }

    fn moments(&mut self) -> State<'_, B> {
        let mut state = Vec::new();
        for (i, [m, v]) in self.moments.iter_mut().enumerate() {
            state.push(("m", i, m));
            state.push(("v", i, v));
        }
        state
    }
}

impl<B: Backend> Rule<B, Tensor<B>> for AdamW<B> {
    fn step(&mut self, tensors: &mut [Tensor<B>], grads: &[Tensor<B>], lr: &[f64], t: u64) {
        same_count("adamw", tensors.len(), grads.len(), self.moments.len());
        self.update(tensors.iter_mut().zip(grads), |i| lr[i], t);
    }
    fn state(&mut self) -> State<'_, B> {
        self.moments()
    }
}

impl<B: Backend> Rule<B, FactorPair<B>> for AdamW<B> {
    fn step(&mut self, pairs: &mut [FactorPair<B>], grads: &[FactorPair<B>], lr: &[f64], t: u64) {
        same_count("adamw", 2 * pairs.len(), 2 * grads.len(), self.moments.len());
        let factors = pairs.iter_mut().flat_map(|p| [&mut p.a, &mut p.b]);
        self.update(factors.zip(grads.iter().flat_map(|g| [&g.a, &g.b])), |i| lr[i / 2], t);
    }
    fn state(&mut self) -> State<'_, B> {
        self.moments()
    }
}
