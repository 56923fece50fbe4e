//! Balancing pairs in training: into the gauge with AᵀA = BᵀB, gradients and momenta with them.
//!
//! Spectron's step depends on the gauge: (λA, B/λ) is the same W and moves otherwise. `SpectronConfig::balance_every` chooses
//! one gauge of the family. Letters: W = A·Bᵀ, A [m, r], B [n, r]; S [r, r] the change of gauge, A' = A·S, B' = B·S⁻ᵀ.

use super::FactorPair;
use super::pair::{from_nalgebra, to_nalgebra};
use super::svd::svd;
use crate::tensor::{Backend, Element, Tensor};
use nalgebra::{DMatrix, DVector};

/// A balanced pair and the way to it.
pub(super) struct Balanced<B: Backend> {
    pub pair: FactorPair<B>,
    /// S⁻ᵀ and S, [r, r] each: what gradients and momenta of A and of B are multiplied by.
    dual: [Tensor<B>; 2],
}

impl<B: Backend> Balanced<B> {
    /// From A = Q_A·R_A, B = Q_B·R_B and the SVD R_A·R_Bᵀ = U·Σ·Vᵀ: A' = Q_A·U·√Σ = A·S with S = R_Bᵀ·V·Σ^{−1/2}, and
    /// B' = Q_B·V·√Σ = B·S⁻ᵀ with S⁻ᵀ = R_Aᵀ·U·Σ^{−1/2}.
    ///
    /// `None` where there is no such S in the element type: W not finite, or of a rank below r to within rounding (such as
    /// B = 0), σ_r ≤ max(m, n)·ε·σ_1.
    pub fn new(pair: &FactorPair<B>) -> Option<Self> {
        let (m, n, r) = (pair.outputs(), pair.inputs(), pair.rank());
        if r > m.min(n) || !(pair.a.is_finite() && pair.b.is_finite()) {
            return None;
        }
        let qr = |x: &Tensor<B>| to_nalgebra(x).qr().unpack();
        let ((qa, ra), (qb, rb)) = (qr(&pair.a), qr(&pair.b));
        let (u, sigma, v) = svd(&(&ra * rb.transpose()));
        if sigma[r - 1] <= m.max(n) as f64 * 2.0 * B::Elem::UNIT_ROUNDOFF * sigma[0] {
            return None;
        }
        let root = DVector::from_vec(sigma).map(f64::sqrt);
        let (up, down) = (DMatrix::from_diagonal(&root), DMatrix::from_diagonal(&root.map(|s| 1.0 / s)));
        let tensor = |x: DMatrix<f64>| from_nalgebra(pair.a.device(), &x);
        let dual = [tensor(ra.transpose() * &u * &down), tensor(rb.transpose() * &v * down)]; // [r, r] each
        Some(Self { pair: FactorPair::new(tensor(qa * u * &up), tensor(qb * v * up)), dual })
    }

    /// A gradient or momentum of the old factors as one of the new: with A = A'·S⁻¹, ∂/∂A' = (∂/∂A)·S⁻ᵀ.
    pub fn carry(&self, gradient: &FactorPair<B>) -> FactorPair<B> {
        let [for_a, for_b] = &self.dual;
        FactorPair::new(gradient.a.matmul(for_a), gradient.b.matmul(for_b)) // [m, r], [n, r]
    }

    /// ‖W' − W‖₂, what rounding the new factors has done to W; from above, with 100·r roundings of f64 allowed for.
    pub fn moved(&self, before: &FactorPair<B>) -> f64 {
        let size = |p: &FactorPair<B>| p.a.norm() * p.b.norm();
        let rounding = 100.0 * before.rank() as f64 * f64::EPSILON;
        // W' − W = [A', A]·[B', −B]ᵀ
        let minus = FactorPair::new(before.a.clone(), before.b.scale(-1.0)); // [m, r], [n, r]
        self.pair.beside(&minus).spectral_norm() + rounding * (size(&self.pair) + size(before))
    }
}

/// Balances the pairs that can be, and carries what `with` holds of each; returns by how much each W moved.
///
/// With a `limit` (η per pair) a pair is left alone where W would move by more than half of it; without one, nothing is measured.
pub(super) fn balance_all<B: Backend>(
    pairs: &mut [FactorPair<B>],
    with: [&mut [FactorPair<B>]; 2],
    limit: Option<&[f64]>,
) -> Vec<f64> {
    let mut moved = vec![0.0; pairs.len()];
    let [first, second] = with;
    for (i, pair) in pairs.iter_mut().enumerate() {
        let Some(balanced) = Balanced::new(pair) else { continue };
        let change = limit.map_or(0.0, |_| balanced.moved(pair));
        if limit.is_some_and(|eta| change > 0.5 * eta[i]) {
            continue;
        }
        let carried = [balanced.carry(&first[i]), balanced.carry(&second[i])];
        if !carried.iter().all(|p| p.a.is_finite() && p.b.is_finite()) {
            continue; // a skew of many decades: they would overflow
        }
        [first[i], second[i]] = carried;
        (*pair, moved[i]) = (balanced.pair, change);
    }
    moved
}
