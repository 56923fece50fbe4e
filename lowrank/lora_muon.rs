//! LoRA-Muon (arXiv 2606.12921): Muon's step for W = A·Bᵀ taken in the factors, the same for all factors of one W.
//!
//! Letters: W [m, n], A [m, r], B [n, r]; M momentum, S Gram matrix of a factor [r, r], η learning rate, λ weight decay.

use super::momentum::{each_shape, factors, factors_mut, left_by_decay, momentum, named};
use super::optimizer::{Rule, State};
use super::{FactorPair, Orthogonaliser};
use crate::tensor::{Backend, Element, Mat, Tensor, products};
use nalgebra::{DMatrix, SymmetricEigen};
use rayon::prelude::*;

/// ΔA = −(η/2)·msign(M_A·S_B^{−1/2})·S_B^{−1/2}, S_B = BᵀB, and the mirror image for B; msign(X) = U·Vᵀ of X's SVD, by
/// Newton–Schulz.
///
/// ‖ΔA·Bᵀ‖ ≤ (η/2)·‖msign‖·‖S_B^{−1/2}Bᵀ‖ = (η/2)·‖msign‖, so to first order ‖ΔW‖ ≤ η, times Newton–Schulz's overshoot.
/// The second-order part ΔA·ΔBᵀ ≤ (η/2)²/(σ_min(A)·σ_min(B)) has no bound of its own: near A = 0 or B = 0 the steps grow.
///
/// With (A·Q, B·Q⁻ᵀ) for (A, B), Q invertible, momenta and steps turn with the factors and W moves as before: for a root
/// R·Rᵀ = S_B⁻¹, msign(M_A·R)·Rᵀ does not depend on which root is taken.
pub struct LoraMuon<B: Backend> {
    /// β of the momentum M ← βM + (1−β)∇.
    pub beta: f64,
    /// Follows βM + (1−β)∇ instead of M.
    pub nesterov: bool,
    /// λ: each factor shrinks by √(1 − ηλ), W by 1 − ηλ.
    pub weight_decay: f64,
    /// How msign is evaluated.
    pub orthogonaliser: Orthogonaliser,
    momentum: Vec<FactorPair<B>>,
}

impl<B: Backend> LoraMuon<B> {
    /// β 0.95, no Nesterov, no decay.
    pub fn new(pairs: &[FactorPair<B>]) -> Self {
        Self {
            beta: 0.95,
            nesterov: false,
            weight_decay: 0.0,
            orthogonaliser: Orthogonaliser::default(),
            momentum: pairs.iter().map(FactorPair::zeros_like).collect(),
        }
    }
}

/// Eigenvalues of S below this part of the largest count as this: the Gram matrix is formed in the element type, whose
/// rounding (1e-7 of the largest, in f32) drowns smaller ones. The floor is relative, so it keeps the invariances under
/// (λA, B/λ) and under orthogonal Q.
const FLOOR: f64 = 1e-6;

/// S^{−1/2} for S = XᵀX [r, r], decomposed in f64; 0 for X = 0, whose partner then stands still.
fn inverse_root<B: Backend>(x: &Tensor<B>) -> Tensor<B> {
    let gram = x.t().matmul(x); // [r, r]
    let r = gram.rows();
    let eigen = SymmetricEigen::new(DMatrix::from_row_slice(r, r, &gram.to_f64()));
    let top = eigen.eigenvalues.max();
    let root = |s: f64| if top > 0.0 { 1.0 / s.max(FLOOR * top).sqrt() } else { 0.0 };
    let scaled = &eigen.eigenvectors * DMatrix::from_diagonal(&eigen.eigenvalues.map(root)); // [r, r]
    let root = scaled * eigen.eigenvectors.transpose(); // [r, r]
    Tensor::from_fn(x.device(), [r, r], |i| B::Elem::of(root[(i / r, i % r)])) // [r, r]
}

impl<B: Backend> Rule<B, FactorPair<B>> for LoraMuon<B> {
    fn step(&mut self, pairs: &mut [FactorPair<B>], grads: &[FactorPair<B>], eta: &[f64], _t: u64) {
        let directions = momentum(factors_mut(&mut self.momentum), factors(grads), self.beta, self.nesterov);
        // in the order A, B, A, B, …: the partner of factor i is factor i ^ 1
        let roots: Vec<_> = factors(pairs).par_iter().map(|x| inverse_root(x)).collect(); // [r, r]
        let whitened =
            products(directions.iter().enumerate().map(|(i, m)| (m.into(), Mat::from(&roots[i ^ 1])))); // [rows, r] each
        let signs =
            each_shape(&whitened.iter().collect::<Vec<_>>(), |batch| self.orthogonaliser.apply(batch));
        let steps = products(signs.iter().enumerate().map(|(i, o)| (o.into(), Mat::from(&roots[i ^ 1])))); // [rows, r] each
        let moves = factors_mut(pairs).into_iter().zip(&steps).enumerate().map(|(i, (x, step))| {
            let eta = eta[i / 2];
            (-0.5 * eta, step, left_by_decay(eta, self.weight_decay).sqrt(), x)
        });
        B::axpby(moves.collect());
    }

    fn state(&mut self) -> State<'_, B> {
        named("momentum", factors_mut(&mut self.momentum))
    }
}
