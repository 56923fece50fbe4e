//! Spectron: momentum, orthogonalisation, spectral renormalisation, for factor pairs (arXiv 2602.12429, Algorithm 1).
//!
//! Letters: W = A·Bᵀ, A [m, r], B [n, r]; M momentum, O orthogonalised momentum, σ spectral norm, η learning rate,
//! ρ radius: how far a factor moves, in spectral norm.

use super::momentum::{each_shape, factors, factors_mut, momentum};
use super::optimizer::{Rule, State};
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
    /// Orthogonalises βM + (1−β)∇ instead of M. Not the paper's.
    pub nesterov: bool,
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
            nesterov: false,
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
    fn step(&mut self, pairs: &mut [FactorPair<B>], grads: &[FactorPair<B>], eta: &[f64], _t: u64) {
        let directions = momentum(factors_mut(&mut self.momentum), factors(grads), self.beta, self.nesterov);
        let directions: Vec<_> = directions.iter().collect();
        let orthogonal = each_shape(&directions, |batch| newton_schulz(batch, self.newton_schulz));
        let sigma = power_iteration(&factors(pairs), &mut self.u, self.power_steps);

        for (i, pair) in pairs.iter_mut().enumerate() {
            let (sigma_a, sigma_b) = (sigma[2 * i], sigma[2 * i + 1]);
            let rho = update_radius(eta[i], sigma_a, sigma_b);
            let shrink = 1.0 - eta[i] * self.weight_decay;
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
