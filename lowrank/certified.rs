//! What makes a Spectron step certified: ‖W⁺ − W‖₂ ≤ η(1 + 1e-5), weight decay and the rounding of the factors included.
//!
//! Three things the paper's bound takes for granted are provided: ‖O‖ ≤ 1, σ from above, ρ ≤ 1. The bounds of σ themselves are
//! proven in certificate.rs. ‖O‖ ≤ 1 is proven in exact arithmetic, with an allowance for rounding that is argued and tested
//! (`Orthogonaliser::rounding`). 1e-5 is what is granted to what no line here counts, such as roundings in f64. Letters: as in spectron.rs; u the unit roundoff of the element type, r the rank.

use super::momentum::factors;
use super::{FactorPair, Radius, SpectronConfig, spectral_norm_upper_bound};
use crate::tensor::{Backend, Cpu, Element, Tensor};
use rayon::prelude::*;
use std::thread::{self, JoinHandle};

/// Steps between fresh certificates of one factor. In between, a bound grows by at most ρ per step: at ρ = 0.01·σ, 8 % in 8.
pub const CERTIFICATE_EVERY: u64 = 8;

/// The bounds of all factors, and how a step keeps within them.
pub(super) struct Certified<B: Backend> {
    config: SpectronConfig,
    /// ≥ σ [1], of A and of B of each pair in turn, as they were last saved or loaded; infinite until certified.
    bounds: Vec<Tensor<B>>,
    /// Those of now; empty where they are in `bounds`.
    known: Vec<f64>,
    /// What a step will ask for, with its number; proven on the host while a device is at what comes before that step.
    ahead: Option<(u64, JoinHandle<Proven>)>,
}

/// Bounds of some factors, with their numbers.
type Proven = Vec<(usize, f64)>;

fn prove<B: Backend>(factors: &[(usize, Tensor<B>)]) -> Proven {
    factors.par_iter().map(|(i, x)| (*i, spectral_norm_upper_bound(x))).collect()
}

impl<B: Backend> Certified<B> {
    /// # Panics
    /// If no useful bound of ‖O‖ can be kept: the polynomials diverge, or amplify rounding to more than 10 %.
    #[track_caller]
    pub fn new(config: SpectronConfig, pairs: &[FactorPair<B>]) -> Self {
        let (how, bound) = (config.orthogonaliser, config.orthogonaliser.norm_bound());
        assert!(bound <= 100.0, "spectron: certify, but {how:?} can reach a norm of {bound:e}");
        let rounding = how.rounding(B::Elem::UNIT_ROUNDOFF, 1);
        assert!(rounding <= 0.1, "spectron: certify, but rounding can move {how:?} by {rounding:e}");
        let unknown = |x: &&Tensor<B>| Tensor::full(x.device(), [1], f64::INFINITY); // [1]
        let bounds = factors(pairs).iter().map(unknown).collect();
        Self { config, bounds, known: Vec::new(), ahead: None }
    }

    /// The bounds, to be saved or loaded.
    pub fn state(&mut self) -> &mut [Tensor<B>] {
        for (bound, known) in self.bounds.iter_mut().zip(std::mem::take(&mut self.known)) {
            *bound = Tensor::from_vec(bound.device(), [1], vec![B::Elem::of(known)]); // [1]
        }
        self.ahead = None; // the factors may be others soon
        &mut self.bounds
    }

    /// Upper bounds of σ of all factors, some of them certified anew: those that have none yet, all where `all` says so, else
    /// one in [`CERTIFICATE_EVERY`].
    pub fn upper_bounds(&mut self, pairs: &[FactorPair<B>], t: u64, all: bool) -> Vec<f64> {
        if self.known.is_empty() {
            self.known = self.bounds.iter().map(Tensor::item).collect();
        }
        let ahead = self.ahead.take().filter(|(step, _)| *step == t && !all);
        let ahead = ahead.map(|(_, proof)| proof.join().expect("a proof does not panic"));
        for (i, bound) in ahead.unwrap_or_else(|| prove(&self.due(pairs, t, all))) {
            self.set_bound(i, bound);
        }
        self.known.clone()
    }

    /// Has what step `t` will ask for proven meanwhile, if the backend is one for which a host has to wait: the factors are now what they
    /// will be then. On threads of rayon's own, since the caller's may all be waiting then.
    pub fn begin(&mut self, pairs: &[FactorPair<B>], t: u64) {
        if !B::ASYNCHRONOUS {
            return;
        }
        let due = self.due(pairs, t, false).into_iter();
        let host: Vec<_> = due.map(|(i, x)| (i, [x.rows(), x.cols()], x.to_vec())).collect();
        let proof = move || {
            let wide = |(i, shape, x): (usize, [usize; 2], Vec<B::Elem>)| {
                (i, Tensor::from_vec(&Cpu::default(), shape, x.into_iter().map(Element::f64).collect())) // shape
            };
            prove::<Cpu<f64>>(&host.into_iter().map(wide).collect::<Vec<_>>())
        };
        self.ahead = Some((t, thread::spawn(proof)));
    }

    /// The factors that step `t` has certified anew.
    fn due(&self, pairs: &[FactorPair<B>], t: u64, all: bool) -> Vec<(usize, Tensor<B>)> {
        let due =
            |i: usize| all || !self.known[i].is_finite() || (t + i as u64).is_multiple_of(CERTIFICATE_EVERY);
        let factors = factors(pairs).into_iter().enumerate();
        factors.filter(|(i, _)| due(*i)).map(|(i, x)| (i, x.clone())).collect() // like each
    }

    /// The radius and the factor on W by weight decay, if W may move by `eta` of which `spent` is gone.
    ///
    /// Decay d moves W by d·σ(W) ≤ d·σ_A·σ_B: that comes out of η too, and d is lowered where it would take more than half. A
    /// pair without bounds (a factor is not finite, or too large for its type's σ) stays as it is.
    pub fn plan(&self, eta: f64, spent: f64, sigma_a: f64, sigma_b: f64) -> (f64, f64) {
        if !(sigma_a.is_finite() && sigma_b.is_finite()) {
            return (0.0, 1.0);
        }
        let left = eta - spent;
        let decay = (eta * self.config.weight_decay).min(1.0).min(0.5 * left / (sigma_a * sigma_b));
        let left = left - decay * sigma_a * sigma_b;
        let rho = self.config.radius.of(left, sigma_a, sigma_b);
        let needs_rho_below_1 = self.config.radius == Radius::Paper;
        (if needs_rho_below_1 { rho.min(1.0) } else { rho }, 1.0 - decay)
    }

    /// How many times O factor `i` may move by, so that it moves by at most `rho` in spectral norm; carries its bound along:
    /// σ(A⁺) ≤ σ(A) + ‖ΔA‖.
    ///
    /// The stored result cannot be exact: 4u(‖A‖_F + ρ√r) pays for its rounding, ‖A‖_F ≤ √r·σ(A). A factor whose ρ is less than
    /// that stays where it is: None.
    pub fn reach(&mut self, i: usize, x: &Tensor<B>, rho: f64, shrink: f64) -> Option<f64> {
        let (u, r, bound) = (B::Elem::UNIT_ROUNDOFF, x.rows().min(x.cols()), self.known[i]);
        let reach = rho - 4.0 * u * (r as f64).sqrt() * (bound + rho);
        (reach > 0.0).then(|| {
            self.set_bound(i, bound * shrink + rho);
            let how = self.config.orthogonaliser;
            reach / (how.norm_bound() * (1.0 + how.rounding(u, r)))
        })
    }

    /// Stores a bound, rounded up to what can be saved.
    fn set_bound(&mut self, i: usize, bound: f64) {
        self.known[i] = B::Elem::of(bound * (1.0 + 4.0 * B::Elem::UNIT_ROUNDOFF)).f64();
    }
}
