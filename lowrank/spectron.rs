//! Spectron: momentum, orthogonalisation, spectral renormalisation, for factor pairs (arXiv 2602.12429, Algorithm 1).
//!
//! Letters: W = A·Bᵀ, A [m, r], B [n, r]; M momentum, O orthogonalised momentum, σ spectral norm, η learning rate,
//! ρ radius: how far a factor moves, in spectral norm.

use super::optimizer::{Rule, State, same_count};
use super::{FactorPair, NewtonSchulz, newton_schulz, power_iteration, start_vector};
use crate::tensor::{Backend, Tensor};

/// The paper's ρ = η / (σ_A + σ_B + 1): moving both factors by at most ρ moves W by at most η.
///
/// ΔW = ΔA·Bᵀ + A·ΔBᵀ + ΔA·ΔBᵀ, so ‖ΔW‖ ≤ ρ(σ_A + σ_B) + ρ² ≤ ρ(σ_A + σ_B + 1) = η if ρ ≤ 1 and both O have norm at
/// most 1. Newton–Schulz overshoots that by up to 1.2024 and power iteration estimates σ from below, so the bound is one on
/// the order of η, not a guarantee.
pub fn update_radius(eta: f64, sigma_a: f64, sigma_b: f64) -> f64 {
    eta / (sigma_a + sigma_b + 1.0)
}

/// What the last step did to one pair.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Estimated spectral norms before the step.
    pub sigma_a: f64,
    pub sigma_b: f64,
    /// The radius.
    pub rho: f64,
    /// The factor on W by weight decay, 1 − ηλ.
    pub shrink: f64,
}

/// The optimizer of factor pairs.
pub struct Spectron<B: Backend> {
    /// β of the momentum M ← βM + (1−β)∇. The paper's 0.95.
    pub beta: f64,
    /// λ: W ← (1 − ηλ)W before the update.
    pub weight_decay: f64,
    /// Algorithm 2.
    pub newton_schulz: NewtonSchulz,
    /// Steps of Algorithm 3 per update. The paper's 1.
    pub power_steps: usize,
    momentum: Vec<FactorPair<B>>,
    /// Left vectors of the power iteration: A's [m, 1] and B's [n, 1] of each pair, in turn.
    u: Vec<Tensor<B>>,
    reports: Vec<StepReport>,
}

impl<B: Backend> Spectron<B> {
    /// The paper's settings, for the given pairs.
    pub fn new(pairs: &[FactorPair<B>]) -> Self {
        let start = |x: &Tensor<B>| start_vector(x.device(), x.rows()); // [rows, 1]
        Self {
            beta: 0.95,
            weight_decay: 0.0,
            newton_schulz: NewtonSchulz::default(),
            power_steps: 1,
            momentum: pairs.iter().map(FactorPair::zeros_like).collect(),
            u: pairs.iter().flat_map(|p| [start(&p.a), start(&p.b)]).collect(),
            reports: vec![StepReport::default(); pairs.len()],
        }
    }

    /// σ, ρ and shrink of each pair in the last step.
    pub fn reports(&self) -> &[StepReport] {
        &self.reports
    }
}

impl<B: Backend> Rule<B, FactorPair<B>> for Spectron<B> {
    fn step(&mut self, pairs: &mut [FactorPair<B>], grads: &[FactorPair<B>], eta: f64, _t: u64) {
        same_count("spectron", pairs.len(), grads.len(), self.momentum.len());
        for (m, g) in self.momentum.iter_mut().zip(grads) {
            m.a.axpby(1.0 - self.beta, &g.a, self.beta);
            m.b.axpby(1.0 - self.beta, &g.b, self.beta);
        }
        let orthogonal =
            each_shape(&factors(&self.momentum), |batch| newton_schulz(batch, self.newton_schulz));
        let sigma = power_iteration(&factors(pairs), &mut self.u, self.power_steps);

        let shrink = 1.0 - eta * self.weight_decay;
        for (i, pair) in pairs.iter_mut().enumerate() {
            let (sigma_a, sigma_b) = (sigma[2 * i], sigma[2 * i + 1]);
            let rho = update_radius(eta, sigma_a, sigma_b);
            // √ on each factor: W itself shrinks by 1 − ηλ, as a dense matrix would
            pair.a.axpby(-rho, &orthogonal[2 * i], shrink.sqrt());
            pair.b.axpby(-rho, &orthogonal[2 * i + 1], shrink.sqrt());
            self.reports[i] = StepReport { sigma_a, sigma_b, rho, shrink };
        }
    }

    fn state(&mut self) -> State<'_, B> {
        let momentum = self.momentum.iter_mut().flat_map(|p| [&mut p.a, &mut p.b]);
        let momentum = momentum.enumerate().map(|(i, x)| (format!("momentum.{i}"), x));
        momentum.chain(self.u.iter_mut().enumerate().map(|(i, x)| (format!("u.{i}"), x))).collect()
    }
}

/// A and B of each pair, in turn.
fn factors<B: Backend>(pairs: &[FactorPair<B>]) -> Vec<&Tensor<B>> {
    pairs.iter().flat_map(|p| [&p.a, &p.b]).collect()
}

/// Applies `f` to batches of one shape each; the results come back in the order of `items`.
fn each_shape<B: Backend>(
    items: &[&Tensor<B>],
    f: impl Fn(&[&Tensor<B>]) -> Vec<Tensor<B>>,
) -> Vec<Tensor<B>> {
    let mut results: Vec<Option<Tensor<B>>> = items.iter().map(|_| None).collect();
    while let Some(first) = results.iter().position(Option::is_none) {
        let shape = items[first].shape();
        let members: Vec<usize> = (first..items.len()).filter(|&i| items[i].shape() == shape).collect();
        let batch: Vec<_> = members.iter().map(|&i| items[i]).collect();
        for (i, y) in members.into_iter().zip(f(&batch)) {
            results[i] = Some(y);
        }
    }
    results.into_iter().flatten().collect()
}
