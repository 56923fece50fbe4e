//! Spectron: momentum, orthogonalisation, spectral renormalisation, for factor pairs (arXiv 2602.12429, Algorithm 1).
//!
//! Letters: W = A·Bᵀ, A [m, r], B [n, r]; M momentum, O orthogonalised momentum, σ spectral norm, η learning rate,
//! ρ radius: how far a factor moves, in spectral norm.

use super::momentum::{each_shape, factors, factors_mut, momentum};
use super::optimizer::{Rule, State, same_count};
use super::{
    FactorPair, NewtonSchulz, newton_schulz, power_iteration, spectral_norm_upper_bound, start_vector,
};
use crate::tensor::{Backend, Scalar, Tensor};

/// The paper's ρ = η / (σ_A + σ_B + 1): moving both factors by at most ρ moves W by at most η.
///
/// ΔW = ΔA·Bᵀ + A·ΔBᵀ + ΔA·ΔBᵀ, so ‖ΔW‖ ≤ ρ(σ_A + σ_B) + ρ² ≤ ρ(σ_A + σ_B + 1) = η if ρ ≤ 1 and both O have norm at
/// most 1. Newton–Schulz overshoots that by up to 1.2024 and power iteration estimates σ from below, so as it stands the
/// bound is one on the order of η, not a guarantee: see [`SpectronConfig::certify`].
pub fn update_radius(eta: f64, sigma_a: f64, sigma_b: f64) -> f64 {
    eta / (sigma_a + sigma_b + 1.0)
}

/// The largest ρ with ρ(σ_A + σ_B) + ρ² ≤ η: with s = σ_A + σ_B, ρ = (√(s² + 4η) − s)/2, written so that nothing cancels.
///
/// Never smaller than the paper's radius where that is at most 1; 1.5 times it for s = 2 and small η.
pub fn exact_radius(eta: f64, sigma_a: f64, sigma_b: f64) -> f64 {
    let s = sigma_a + sigma_b;
    let denominator = s + (s * s + 4.0 * eta).sqrt();
    if denominator == 0.0 { 0.0 } else { 2.0 * eta / denominator }
}

/// Which radius a step takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Radius {
    /// [`update_radius`].
    Paper,
    /// [`exact_radius`].
    Exact,
}

/// The settings of [`Spectron`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SpectronConfig {
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
    pub radius: Radius,
    /// Makes ‖W⁺ − W‖₂ ≤ η(1 + 1e-5) hold for every step, weight decay and the rounding of the stored factors included:
    ///
    /// - ‖O‖ ≤ 1, by dividing by [`NewtonSchulz::norm_bound`];
    /// - σ_A and σ_B from above, by [`spectral_norm_upper_bound`], carried from step to step by σ(A⁺) ≤ σ(A) + ‖ΔA‖ and
    ///   refreshed every 8 steps;
    /// - ρ ≤ 1 where the paper's radius needs it;
    /// - weight decay d = ηλ moves W by at most d·σ_A·σ_B: that comes out of η, and d is lowered where it would take more
    ///   than half;
    /// - a factor stored in the element type (unit roundoff u) cannot be moved exactly: 4u(‖A‖_F + ρ√r) comes out of ρ, and
    ///   a factor whose ρ is less than that stays where it is.
    pub certify: bool,
}

impl Default for SpectronConfig {
    /// The paper's.
    fn default() -> Self {
        Self {
            beta: 0.95,
            nesterov: false,
            weight_decay: 0.0,
            newton_schulz: NewtonSchulz::default(),
            power_steps: 1,
            radius: Radius::Paper,
            certify: false,
        }
    }
}

/// Steps between fresh certificates. In between, a bound grows by at most ρ per step: at ρ = 0.01·σ, 8 % in 8 steps.
const REFRESH: u64 = 8;

/// Rounding inside Newton–Schulz can lift ‖O‖ above the bound of exact arithmetic: by about 1e-6 in f32, and this is ten
/// times that.
const NEWTON_SCHULZ_ROUNDING: f64 = 1e-5;

/// What the last step did to one pair.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Spectral norms before the step: estimates from below, or, certified, bounds from above.
    pub sigma_a: f64,
    pub sigma_b: f64,
    /// The radius.
    pub rho: f64,
    /// The factor on W by weight decay, 1 − ηλ (or nearer to 1: see [`SpectronConfig::certify`]).
    pub shrink: f64,
}

/// The optimizer of factor pairs.
pub struct Spectron<B: Backend> {
    config: SpectronConfig,
    momentum: Vec<FactorPair<B>>,
    /// Left vectors of the power iteration: A's [m, 1] and B's [n, 1] of each pair, in turn.
    u: Vec<Tensor<B>>,
    /// Certified bounds of σ [1], A's and B's of each pair in turn. None but with `certify`.
    bounds: Vec<Tensor<B>>,
    reports: Vec<StepReport>,
}

impl<B: Backend> Spectron<B> {
    /// The paper's settings, for the given pairs.
    pub fn new(pairs: &[FactorPair<B>]) -> Self {
        Self::with(SpectronConfig::default(), pairs)
    }

    /// Other settings.
    ///
    /// # Panics
    /// If β is not in [0, 1) or λ is negative; with `certify`, also if the coefficients of Newton–Schulz diverge: no
    /// bound could be kept then.
    #[track_caller]
    pub fn with(config: SpectronConfig, pairs: &[FactorPair<B>]) -> Self {
        let SpectronConfig { beta, weight_decay, newton_schulz, certify, .. } = config;
        assert!((0.0..1.0).contains(&beta), "spectron: β = {beta} is not in [0, 1)");
        assert!(weight_decay >= 0.0, "spectron: weight decay {weight_decay} is negative");
        let bound = newton_schulz.norm_bound();
        assert!(
            !certify || bound <= 100.0,
            "spectron: certify, but {newton_schulz:?} can reach a norm of {bound:e}"
        );
        let start = |x: &Tensor<B>| start_vector(x.device(), x.rows()); // [rows, 1]
        let zero = |x: &Tensor<B>| Tensor::zeros(x.device(), [1]); // [1]
        Self {
            config,
            momentum: pairs.iter().map(FactorPair::zeros_like).collect(),
            u: pairs.iter().flat_map(|p| [start(&p.a), start(&p.b)]).collect(),
            bounds: pairs.iter().filter(|_| certify).flat_map(|p| [zero(&p.a), zero(&p.b)]).collect(),
            reports: vec![StepReport::default(); pairs.len()],
        }
    }

    /// The settings.
    pub fn config(&self) -> &SpectronConfig {
        &self.config
    }
}

impl<B: Backend> Rule<B, FactorPair<B>> for Spectron<B> {
    fn step(&mut self, pairs: &mut [FactorPair<B>], grads: &[FactorPair<B>], eta: &[f64], t: u64) {
        let SpectronConfig { beta, nesterov, newton_schulz: how, power_steps, certify, .. } = self.config;
        same_count("spectron", pairs.len(), grads.len(), self.momentum.len());
        let directions = momentum(factors_mut(&mut self.momentum), factors(grads), beta, nesterov);
        let directions: Vec<_> = directions.iter().collect();
        let orthogonal = each_shape(&directions, |batch| newton_schulz(batch, how));
        let sigma = if certify {
            self.refresh_bounds(pairs, t);
            self.bounds.iter().map(Tensor::item).collect()
        } else {
            power_iteration(&factors(pairs), &mut self.u, power_steps)
        };
        for (i, pair) in pairs.iter_mut().enumerate() {
            let (sigma_a, sigma_b) = (sigma[2 * i], sigma[2 * i + 1]);
            let (o_a, o_b) = (&orthogonal[2 * i], &orthogonal[2 * i + 1]);
            let (rho, shrink) = self.plan(eta[i], sigma_a, sigma_b);
            self.reports[i] = StepReport { sigma_a, sigma_b, rho, shrink };
            // √ on each factor: W itself shrinks by 1 − ηλ, as a dense matrix would
            let shrink = shrink.sqrt();
            if certify {
                self.move_within(&mut pair.a, o_a, rho, shrink, 2 * i);
                self.move_within(&mut pair.b, o_b, rho, shrink, 2 * i + 1);
            } else {
                pair.a.axpby(-rho, o_a, shrink);
                pair.b.axpby(-rho, o_b, shrink);
            }
        }
    }

    fn state(&mut self) -> State<'_, B> {
        let momentum = self.momentum.iter_mut().flat_map(|p| [&mut p.a, &mut p.b]);
        let momentum = momentum.enumerate().map(|(i, x)| (format!("momentum.{i}"), x));
        let u = self.u.iter_mut().enumerate().map(|(i, x)| (format!("u.{i}"), x));
        let bounds = self.bounds.iter_mut().enumerate().map(|(i, x)| (format!("bound.{i}"), x));
        momentum.chain(u).chain(bounds).collect()
    }

    fn reports(&self) -> &[StepReport] {
        &self.reports
    }
}

impl<B: Backend> Spectron<B> {
    /// The radius of a step, and the factor on W by weight decay.
    fn plan(&self, eta: f64, sigma_a: f64, sigma_b: f64) -> (f64, f64) {
        let SpectronConfig { weight_decay, radius, certify, .. } = self.config;
        let mut decay = (eta * weight_decay).min(1.0);
        let mut left = eta;
        if certify {
            // decay moves W by decay·σ(W) ≤ decay·σ_A·σ_B
            decay = decay.min(0.5 * eta / (sigma_a * sigma_b));
            left = eta - decay * sigma_a * sigma_b;
        }
        let rho = match radius {
            Radius::Paper if certify => update_radius(left, sigma_a, sigma_b).min(1.0),
            Radius::Paper => update_radius(left, sigma_a, sigma_b),
            Radius::Exact => exact_radius(left, sigma_a, sigma_b),
        };
        (rho, 1.0 - decay)
    }

    /// Moves a factor against O by at most `rho` in spectral norm, the rounding of the stored result included, and carries
    /// its bound along.
    fn move_within(&mut self, x: &mut Tensor<B>, o: &Tensor<B>, rho: f64, shrink: f64, factor: usize) {
        let unit_roundoff = 0.5 * epsilon::<B>();
        let rounding = 4.0 * unit_roundoff * (x.norm() + rho * (x.cols() as f64).sqrt());
        let reach = rho - rounding;
        if reach > 0.0 {
            let bound = self.config.newton_schulz.norm_bound() * (1.0 + NEWTON_SCHULZ_ROUNDING);
            x.axpby(-reach / bound, o, shrink);
            self.set_bound(factor, self.bounds[factor].item() * shrink + rho);
        }
    }

    /// Certifies anew the bounds whose turn it is: all at the first step, then one in [`REFRESH`] per step.
    fn refresh_bounds(&mut self, pairs: &[FactorPair<B>], t: u64) {
        for (i, x) in factors(pairs).into_iter().enumerate() {
            if t == 1 || (t + i as u64).is_multiple_of(REFRESH) {
                self.set_bound(i, spectral_norm_upper_bound(x));
            }
        }
    }

    /// Stores a bound, rounded up.
    fn set_bound(&mut self, factor: usize, bound: f64) {
        let device = self.bounds[factor].device().clone();
        let up = B::Elem::of(bound * (1.0 + 2.0 * epsilon::<B>()));
        self.bounds[factor] = Tensor::from_vec(&device, [1], vec![up]); // [1]
    }
}

/// The distance from 1 to the next number of the element type.
fn epsilon<B: Backend>() -> f64 {
    <B::Elem as num_traits::Float>::epsilon().f64()
}
