//! The arms of Spectron's ablation that leave the orthogonalisation out: "renormalisation only" and "neither".
//!
//! Baselines to measure against, not optimizers to choose. The paper does not print how it normalises a momentum that is not
//! orthogonalised; what is done here is stated at each type. (Orthogonalisation only is muon.rs.)
//! Letters: W = A·Bᵀ, M momentum, σ spectral norm, η learning rate, ρ radius, r rank.

use super::momentum::{factors, factors_mut, left_by_decay, momentum, named};
use super::optimizer::{Rule, State};
use super::{FactorPair, power_iteration, start_vector, update_radius};
use crate::tensor::{Backend, Tensor};

/// Spectron with M/σ(M) where Algorithm 1 has the orthogonalised momentum: A ← A − ρ·M_A/σ(M_A), ρ = η/(σ_A + σ_B + 1).
///
/// So ‖ΔA‖, ‖ΔB‖ ≤ ρ and ‖ΔW‖ ≤ η as in Spectron, but one direction takes the whole radius. σ(M) is estimated by power
/// iteration, from below, so the bound holds up to the error of the estimate: up to 1.3 under unrelated random gradients
/// (tests/methods.rs), less where M turns slowly, and never more than √r, since σ(M) ≥ ‖M‖_F/√r is used too.
pub struct Renormalised<B: Backend> {
    /// β of the momentum M ← βM + (1−β)∇.
    pub beta: f64,
    /// Follows βM + (1−β)∇ instead of M.
    pub nesterov: bool,
    /// λ: W ← (1 − ηλ)W before the update.
    pub weight_decay: f64,
    /// Steps of power iteration per update, for the momenta and for the factors. 3: momenta turn faster than weights.
    pub power_steps: usize,
    momentum: Vec<FactorPair<B>>,
    /// Left vectors of the power iteration, of the factors and of their momenta: [rows, 1] each.
    u: Vec<Tensor<B>>,
    u_momentum: Vec<Tensor<B>>,
}

impl<B: Backend> Renormalised<B> {
    /// Spectron's β, no decay.
    pub fn new(pairs: &[FactorPair<B>]) -> Self {
        let start = |x: &Tensor<B>| start_vector(x.device(), x.rows()); // [rows, 1]
        let u: Vec<_> = pairs.iter().flat_map(|p| [start(&p.a), start(&p.b)]).collect();
        Self {
            beta: 0.95,
            nesterov: false,
            weight_decay: 0.0,
            power_steps: 3,
            momentum: pairs.iter().map(FactorPair::zeros_like).collect(),
            u_momentum: u.clone(),
            u,
        }
    }
}

impl<B: Backend> Rule<B, FactorPair<B>> for Renormalised<B> {
    fn step(&mut self, pairs: &mut [FactorPair<B>], grads: &[FactorPair<B>], eta: &[f64], _t: u64) {
        let directions = momentum(factors_mut(&mut self.momentum), factors(grads), self.beta, self.nesterov);
        // ‖M‖_F = 1 first, so that a tiny M does not underflow in the iteration
        let directions = B::normalised(&directions.iter().zip(&directions).collect::<Vec<_>>()); // [rows, r] each
        let all: Vec<_> = directions.iter().collect();
        let norms = B::read(&power_iteration(&all, &mut self.u_momentum, self.power_steps));
        let sigma = B::read(&power_iteration(&factors(pairs), &mut self.u, self.power_steps));
        let moves = factors_mut(pairs).into_iter().enumerate().map(|(i, x)| {
            let pair = i / 2;
            let rho = update_radius(eta[pair], sigma[2 * pair], sigma[2 * pair + 1]);
            let norm = norms[i].max(1.0 / (x.rows().min(x.cols()) as f64).sqrt());
            let shrink = left_by_decay(eta[pair], self.weight_decay);
            (-rho / norm, &directions[i], shrink.sqrt(), x)
        });
        B::axpby(moves.collect());
    }

    fn state(&mut self) -> State<'_, B> {
        let mut state = named("momentum", factors_mut(&mut self.momentum));
        state.extend(named("u", &mut self.u));
        state.extend(named("u_momentum", &mut self.u_momentum));
        state
    }
}

/// Momentum alone, A ← A − η·M_A: Spectron without orthogonalisation and without renormalisation, the ablation's "neither".
///
/// The step is as large as the gradient, so η is on another scale than everywhere else and does not carry over between
/// sizes. AdamW on the factors is a different baseline (adamw.rs): it has a normalisation of its own.
pub struct MomentumOnly<B: Backend> {
    /// β of the momentum M ← βM + (1−β)∇.
    pub beta: f64,
    /// Follows βM + (1−β)∇ instead of M.
    pub nesterov: bool,
    /// λ: W ← (1 − ηλ)W before the update.
    pub weight_decay: f64,
    momentum: Vec<FactorPair<B>>,
}

impl<B: Backend> MomentumOnly<B> {
    /// Spectron's β, no decay.
    pub fn new(pairs: &[FactorPair<B>]) -> Self {
        let momentum = pairs.iter().map(FactorPair::zeros_like).collect();
        Self { beta: 0.95, nesterov: false, weight_decay: 0.0, momentum }
    }
}

impl<B: Backend> Rule<B, FactorPair<B>> for MomentumOnly<B> {
    fn step(&mut self, pairs: &mut [FactorPair<B>], grads: &[FactorPair<B>], eta: &[f64], _t: u64) {
        let directions = momentum(factors_mut(&mut self.momentum), factors(grads), self.beta, self.nesterov);
        let moves = factors_mut(pairs).into_iter().zip(&directions).enumerate().map(|(i, (x, m))| {
            let eta = eta[i / 2];
            (-eta, m, left_by_decay(eta, self.weight_decay).sqrt(), x)
        });
        B::axpby(moves.collect());
    }

    fn state(&mut self) -> State<'_, B> {
        named("momentum", factors_mut(&mut self.momentum))
    }
}
