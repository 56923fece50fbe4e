//! Spectron: momentum, orthogonalisation, spectral renormalisation, for factor pairs (arXiv 2602.12429, Algorithm 1).
//!
//! Letters: W = A·Bᵀ, A [m, r], B [n, r]; M momentum, O orthogonalised momentum, σ spectral norm, η learning rate,
//! ρ radius: how far a factor moves, in spectral norm. What `certify` adds is in certified.rs.

use super::certified::Certified;
use super::gauge::balance_all;
use super::momentum::{each_shape, factors, factors_mut, left_by_decay, momentum, named};
use super::optimizer::{Rule, State, same_count};
use super::{FactorPair, Orthogonaliser, Radius, StepReport, power_iteration, start_vector};
use crate::tensor::{Backend, Tensor};

/// The settings of [`Spectron`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct SpectronConfig {
    /// β of the momentum M ← βM + (1−β)∇. The paper's 0.95.
    pub beta: f64,
    /// Orthogonalises βM + (1−β)∇ instead of M. Not the paper's.
    pub nesterov: bool,
    /// λ: W ← (1 − ηλ)W before the update; with `certify` less, where that would take more than half of η.
    pub weight_decay: f64,
    /// The paper's Algorithm 2, or another.
    pub orthogonaliser: Orthogonaliser,
    /// Steps of Algorithm 3 per update. The paper's 1.
    pub power_steps: usize,
    pub radius: Radius,
    /// Makes ‖W⁺ − W‖₂ ≤ η(1 + 1e-5) hold for every step, weight decay, balancing and the rounding of the stored factors
    /// included: σ from above by [`super::spectral_norm_upper_bound`], O divided by [`Orthogonaliser::norm_bound`], ρ ≤ 1. Proven, but
    /// for what rounding may add to O: [`Orthogonaliser::rounding`]. The pairs must be moved by nothing else; gradients must be finite.
    pub certify: bool,
    /// Balances each pair before every so many steps (AᵀA = BᵀB, W as before to rounding) and carries its momenta over into
    /// the new gauge; 0: never. A pair whose W is of rank below r to within rounding, such as B = 0, is left as it is, and with
    /// `certify` also one where rounding would move W by more than η/2; what it does move W by comes out of η.
    pub balance_every: u64,
}

impl Default for SpectronConfig {
    /// The paper's.
    fn default() -> Self {
        Self {
            beta: 0.95,
            nesterov: false,
            weight_decay: 0.0,
            orthogonaliser: Orthogonaliser::default(),
            power_steps: 1,
            radius: Radius::Paper,
            certify: false,
            balance_every: 0,
        }
    }
}

/// The optimizer of factor pairs.
///
/// A step depends on the gauge: (λA, B/λ) is the same W, and moves otherwise (orthogonal changes, (A·Q, B·Q), do not matter).
/// [`SpectronConfig::balance_every`] keeps to one.
pub struct Spectron<B: Backend> {
    config: SpectronConfig,
    momentum: Vec<FactorPair<B>>,
    /// Left vectors of the power iteration: A's [m, 1] and B's [n, 1] of each pair, in turn.
    u: Vec<Tensor<B>>,
    certified: Option<Certified<B>>,
    /// Of the last step, with `certify`; without it, σ of all factors, where it was computed, and η of each pair.
    reports: Vec<StepReport>,
    estimated: Option<(B::Norms, Vec<f64>)>,
}

impl<B: Backend> Spectron<B> {
    /// The paper's settings, for the given pairs.
    pub fn new(pairs: &[FactorPair<B>]) -> Self {
        Self::with(SpectronConfig::default(), pairs)
    }

    /// Other settings.
    ///
    /// # Panics
    /// If β is not in [0, 1) or λ is negative; with `certify`, also if no bound could be kept: the orthogonaliser diverges, or
    /// amplifies rounding to more than 10 %.
    #[track_caller]
    pub fn with(config: SpectronConfig, pairs: &[FactorPair<B>]) -> Self {
        let SpectronConfig { beta, weight_decay, certify, .. } = config;
        assert!((0.0..1.0).contains(&beta), "spectron: β = {beta} is not in [0, 1)");
        assert!(weight_decay >= 0.0, "spectron: weight decay {weight_decay} is negative");
        let start = |x: &&Tensor<B>| start_vector(x.device(), x.rows()); // [rows, 1]
        Self {
            config,
            momentum: pairs.iter().map(FactorPair::zeros_like).collect(),
            u: factors(pairs).iter().map(start).collect(),
            certified: certify.then(|| Certified::new(config, pairs)),
            reports: vec![StepReport::default(); pairs.len()],
            estimated: None,
        }
    }

    /// The settings.
    pub fn config(&self) -> &SpectronConfig {
        &self.config
    }
}

impl<B: Backend> Rule<B, FactorPair<B>> for Spectron<B> {
    fn step(&mut self, pairs: &mut [FactorPair<B>], grads: &[FactorPair<B>], eta: &[f64], t: u64) {
        let SpectronConfig { beta, nesterov, orthogonaliser, power_steps, radius, weight_decay, .. } =
            self.config;
        same_count("spectron", pairs.len(), grads.len(), self.momentum.len());
        let balance = self.config.balance_every > 0 && t.is_multiple_of(self.config.balance_every);
        let (mut grads, mut moved) = (grads.to_vec(), vec![0.0; pairs.len()]);
        if balance {
            let limit = self.certified.as_ref().map(|_| eta);
            moved = balance_all(pairs, [&mut self.momentum, &mut grads], limit);
        }
        let directions = momentum(factors_mut(&mut self.momentum), factors(&grads), beta, nesterov);
        let orthogonalise =
            || each_shape(&directions.iter().collect::<Vec<_>>(), |batch| orthogonaliser.apply(batch));
        let Some(certified) = &mut self.certified else {
            // the paper's step; no device is waited for
            let sigma = power_iteration(&factors(pairs), &mut self.u, power_steps);
            let orthogonal = orthogonalise();
            // √ on each factor: W itself shrinks by 1 − ηλ, as a dense matrix would
            let shrink = |eta| left_by_decay(eta, weight_decay).sqrt();
            let moves = factors_mut(pairs).into_iter().zip(&orthogonal).enumerate();
            let moves = moves.map(|(k, (x, o))| (eta[k / 2], o, shrink(eta[k / 2]), x));
            B::renormalised_step(&sigma, radius, moves.collect());
            self.estimated = Some((sigma, eta.to_vec()));
            return;
        };
        let sigma = certified.upper_bounds(pairs, t, balance);
        let orthogonal = orthogonalise();
        for (i, report) in self.reports.iter_mut().enumerate() {
            let (sigma_a, sigma_b) = (sigma[2 * i], sigma[2 * i + 1]);
            let (rho, shrink) = certified.plan(eta[i], moved[i], sigma_a, sigma_b);
            *report = StepReport { sigma_a, sigma_b, rho, shrink };
        }
        let moves = factors_mut(pairs).into_iter().zip(&orthogonal).enumerate().filter_map(|(k, (x, o))| {
            let StepReport { rho, shrink, .. } = self.reports[k / 2];
            let reach = certified.reach(k, x, rho, shrink.sqrt())?;
            Some((-reach, o, shrink.sqrt(), x))
        });
        B::axpby(moves.collect());
        certified.begin(pairs, t + 1);
    }

    fn state(&mut self) -> State<'_, B> {
        let mut state = named("momentum", factors_mut(&mut self.momentum));
        state.extend(named("u", &mut self.u));
        state.extend(named("bound", self.certified.iter_mut().flat_map(Certified::state)));
        state
    }

    fn reports(&self) -> Vec<StepReport> {
        let Some((sigma, eta)) = &self.estimated else { return self.reports.clone() };
        let report = |(&[sigma_a, sigma_b], &eta): (&[f64; 2], &f64)| {
            let rho = self.config.radius.of(eta, sigma_a, sigma_b);
            StepReport { sigma_a, sigma_b, rho, shrink: left_by_decay(eta, self.config.weight_decay) }
        };
        B::read(sigma).as_chunks().0.iter().zip(eta).map(report).collect()
    }
}
