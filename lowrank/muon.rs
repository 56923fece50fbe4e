//! Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, orthogonalised. For whole hidden matrices, and for
//! the factors of pairs, where it is Spectron without the renormalisation ("orthogonalisation only").
//!
//! Not for embeddings, heads or vectors: those go to AdamW. Letters: M momentum, O orthogonalised momentum, η learning rate.

use super::momentum::{each_shape, factors, factors_mut, left_by_decay, momentum, named};
use super::optimizer::{Rule, State};
use super::{FactorPair, Orthogonaliser};
use crate::tensor::{Backend, Tensor};

/// A factor on the update of a matrix, by its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum MuonScale {
    /// 1: ‖ΔX‖ ≈ η for every shape.
    One,
    /// √max(1, rows/cols), as in Jordan's implementation (muon.py of github.com/KellerJordan/Muon): the update then has
    /// about the same size per output whatever the number of inputs.
    Aspect,
}

impl MuonScale {
    /// The factor for a matrix [rows, cols].
    pub fn factor(self, rows: usize, cols: usize) -> f64 {
        match self {
            Self::One => 1.0,
            Self::Aspect => (rows as f64 / cols as f64).max(1.0).sqrt(),
        }
    }
}

/// M ← βM + (1−β)∇, X ← (1 − ηλ)X − η·scale·O. For factors, W = A·Bᵀ is what shrinks by 1 − ηλ.
pub struct Muon<B: Backend> {
    /// β. 0.95, as Jordan's, but of an average (1−β)∇ as in Spectron: O does not depend on the difference.
    pub beta: f64,
    /// Orthogonalises βM + (1−β)∇ instead of M. Jordan's default; off here, so that methods differ in one thing.
    pub nesterov: bool,
    /// λ: decoupled decay, as in AdamW.
    pub weight_decay: f64,
    pub orthogonaliser: Orthogonaliser,
    pub scale: MuonScale,
    momentum: Vec<Tensor<B>>,
}

impl<B: Backend> Muon<B> {
    /// β 0.95, no Nesterov, no decay, scale [`MuonScale::One`]; for whole matrices.
    pub fn new<'a>(matrices: impl IntoIterator<Item = &'a Tensor<B>>) -> Self
    where
        B: 'a,
    {
        Self {
            beta: 0.95,
            nesterov: false,
            weight_decay: 0.0,
            orthogonaliser: Orthogonaliser::default(),
            scale: MuonScale::One,
            momentum: matrices.into_iter().map(Tensor::zeros_like).collect(),
        }
    }

    /// The same for the factors of `pairs`, as if they were unrelated matrices.
    pub fn for_pairs(pairs: &[FactorPair<B>]) -> Self {
        Self::new(pairs.iter().flat_map(|p| [&p.a, &p.b]))
    }

    /// `rate(i)`: η and the shrinkage of matrix i.
    fn update(
        &mut self,
        matrices: Vec<&mut Tensor<B>>,
        grads: Vec<&Tensor<B>>,
        rate: impl Fn(usize) -> (f64, f64),
    ) {
        let directions = momentum(&mut self.momentum, grads, self.beta, self.nesterov);
        let directions: Vec<_> = directions.iter().collect();
        let orthogonal = each_shape(&directions, |batch| self.orthogonaliser.apply(batch));
        let moves = matrices.into_iter().zip(&orthogonal).enumerate().map(|(i, (x, o))| {
            let (eta, shrink) = rate(i);
            (-eta * self.scale.factor(x.rows(), x.cols()), o, shrink, x)
        });
        B::axpby(moves.collect());
    }

    fn saved(&mut self) -> State<'_, B> {
        named("momentum", &mut self.momentum)
    }
}

impl<B: Backend> Rule<B, Tensor<B>> for Muon<B> {
    fn step(&mut self, matrices: &mut [Tensor<B>], grads: &[Tensor<B>], lr: &[f64], _t: u64) {
        let decay = self.weight_decay;
        let rate = |i: usize| (lr[i], left_by_decay(lr[i], decay));
        self.update(matrices.iter_mut().collect(), grads.iter().collect(), rate);
    }
    fn state(&mut self) -> State<'_, B> {
        self.saved()
    }
}

impl<B: Backend> Rule<B, FactorPair<B>> for Muon<B> {
    fn step(&mut self, pairs: &mut [FactorPair<B>], grads: &[FactorPair<B>], lr: &[f64], _t: u64) {
        let decay = self.weight_decay;
        let rate = |i: usize| (lr[i / 2], left_by_decay(lr[i / 2], decay).sqrt());
        self.update(factors_mut(pairs), factors(grads), rate);
    }
    fn state(&mut self) -> State<'_, B> {
        self.saved()
    }
}
