//! What a step did to a matrix, and what it looks like afterwards, in a few numbers to log. Nothing here changes anything.
//!
//! Not here: bounds with proof (certificate.rs), and what a rule itself says about its step ([`Rule::reports`]).
//! Letters: W [m, n], for a pair A·Bᵀ with A [m, r], B [n, r]; ΔW the change of W; σ the spectral norm; u [m], v [n] unit
//! vectors. All in f64 on the host, but for ΔA and ΔB, which are rounded to the elements' type: where a step balanced the pair, ‖ΔW‖ is known to
//! two roundings of ‖A‖·‖B‖ only.
//!
//! [`Rule::reports`]: super::Rule::reports

use super::FactorPair;
use super::certificate::largest_of_tridiagonal;
use super::pair::to_nalgebra;
use super::spectral::noise;
use super::svd::svd;
use crate::tensor::{Backend, Tensor};
use nalgebra::{DMatrix, DVector};

/// How the spectral norms are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accuracy {
    /// Estimates from below, by 24 steps of the bidiagonalisation of Golub & Kahan (1965), through the factors: neither W
    /// nor ΔW is formed. Within 1 % of σ where hundreds of singular values lie close below it, far nearer otherwise (1e-6
    /// for σ_i ∝ 1/i; rounding where W has rank 24 or less).
    Fast,
    /// Decompositions, to rounding. Slow.
    Exact,
}

/// A matrix W, and how far a step moved it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatrixTelemetry {
    /// σ(W) = ‖W‖₂.
    pub sigma: f64,
    /// ‖W‖_F²/σ(W)²: how many directions carry W, at least 1; 0 for W = 0. With [`Accuracy::Fast`] an estimate from above.
    pub stable_rank: f64,
    /// ‖ΔW‖₂. None if nothing was given to compare with.
    pub update: Option<f64>,
}

/// A factor pair, and how far a step moved its W. All norms are of the state after the step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairTelemetry {
    /// σ(A), σ(B).
    pub sigma_a: f64,
    pub sigma_b: f64,
    /// ‖AᵀA − BᵀB‖_F, as [`FactorPair::gauge_imbalance`], in f64.
    pub gauge_imbalance: f64,
    /// W = A·Bᵀ.
    pub w: MatrixTelemetry,
}

impl MatrixTelemetry {
    fn new(sigma: f64, frobenius: f64, update: Option<f64>) -> Self {
        // below 1 only by rounding
        let stable_rank = if sigma > 0.0 { (frobenius / sigma).powi(2).max(1.0) } else { sigma };
        Self { sigma, stable_rank, update }
    }

    /// ‖ΔW‖₂/‖W‖₂, W after the step; not finite for W = 0.
    pub fn update_over_w(&self) -> Option<f64> {
        self.update.map(|update| update / self.sigma)
    }
}

/// The telemetry of a pair after a step, and of the step if `before` is the pair before it. NaN where a factor is not finite.
///
/// # Panics
/// If the shapes of `before` and `after` differ.
#[track_caller]
pub fn pair_telemetry<B: Backend>(
    before: Option<&FactorPair<B>>,
    after: &FactorPair<B>,
    accuracy: Accuracy,
) -> PairTelemetry {
    let (a, b) = (to_nalgebra(&after.a), to_nalgebra(&after.b)); // [m, r], [n, r]
    let (gram_a, gram_b) = (a.transpose() * &a, b.transpose() * &b); // [r, r]
    // ‖A·Bᵀ‖_F² = tr(AᵀA·BᵀB)
    let frobenius = gram_a.dot(&gram_b).max(0.0).sqrt();
    let mut update = None;
    if let Some(before) = before {
        let change = after.change_since(before); // a pair of rank 2r
        update = Some(product_norm(&to_nalgebra(&change.a), &to_nalgebra(&change.b), accuracy));
    }
    PairTelemetry {
        sigma_a: matrix_norm(&a, accuracy),
        sigma_b: matrix_norm(&b, accuracy),
        gauge_imbalance: (gram_a - gram_b).norm(),
        w: MatrixTelemetry::new(product_norm(&a, &b, accuracy), frobenius, update),
    }
}

/// As [`pair_telemetry`], for a matrix that is kept whole.
///
/// # Panics
/// If `after` is not a matrix or `before` is of another shape.
#[track_caller]
pub fn matrix_telemetry<B: Backend>(
    before: Option<&Tensor<B>>,
    after: &Tensor<B>,
    accuracy: Accuracy,
) -> MatrixTelemetry {
    after.shape().matrix("matrix_telemetry");
    let w = to_nalgebra(after); // [m, n]
    let mut update = None;
    if let Some(before) = before {
        update = Some(matrix_norm(&to_nalgebra(&after.sub(before)), accuracy));
    }
    MatrixTelemetry::new(matrix_norm(&w, accuracy), w.norm(), update)
}

/// σ(X) of X [p, q].
fn matrix_norm(x: &DMatrix<f64>, accuracy: Accuracy) -> f64 {
    match accuracy {
        Accuracy::Fast => golub_kahan(x.ncols(), |v| x * v, |u| x.tr_mul(u)),
        Accuracy::Exact => exact(x),
    }
}

/// σ(A·Bᵀ) of A [p, k], B [q, k].
fn product_norm(a: &DMatrix<f64>, b: &DMatrix<f64>, accuracy: Accuracy) -> f64 {
    match accuracy {
        Accuracy::Fast => golub_kahan(b.nrows(), |v| a * b.tr_mul(v), |u| b * a.tr_mul(u)),
        Accuracy::Exact => exact(&(a.clone().qr().r() * b.clone().qr().r().transpose())),
    }
}

/// The largest singular value, NaN if X is not finite.
fn exact(x: &DMatrix<f64>) -> f64 {
    if x.iter().all(|x| x.is_finite()) { svd(x).1[0] } else { f64::NAN }
}

/// σ(X) from below: that of U_kᵀ·X·V_k, U and V bases of the Krylov spaces of a fixed start, in which X is bidiagonal:
/// X·v_k = α_k·u_k + β_{k−1}·u_{k−1}, Xᵀ·u_k = α_k·v_k + β_k·v_{k+1} (Golub & Kahan 1965, "Calculating the singular values
/// and pseudo-inverse of a matrix", section 4). The bases lose their orthogonality as k grows; the largest singular value
/// does not suffer by that (Paige 1980). The same products as in k steps of power iteration find far more.
fn golub_kahan(
    columns: usize,
    forward: impl Fn(&DVector<f64>) -> DVector<f64>,
    backward: impl Fn(&DVector<f64>) -> DVector<f64>,
) -> f64 {
    const STEPS: usize = 24;
    let (mut alphas, mut betas) = (Vec::new(), Vec::new());
    let mut v = DVector::from_fn(columns, |i, _| noise(i as u32, 0)).normalize(); // [n]
    let mut u = forward(&v); // [m]
    loop {
        let alpha = u.norm();
        if !alpha.is_finite() {
            return f64::NAN;
        }
        alphas.push(alpha);
        if alpha == 0.0 || alphas.len() == STEPS {
            break;
        }
        u /= alpha;
        let next = backward(&u) - &v * alpha; // [n]
        let beta = next.norm();
        if beta == 0.0 {
            break;
        }
        betas.push(beta);
        v = next / beta; // [n]
        u = forward(&v) - u * beta; // [m]
    }
    // σ² is the largest eigenvalue of the bidiagonal's XᵀX, which is tridiagonal; scaled, so that no square overflows
    let scale = alphas.iter().chain(&betas).copied().fold(0.0, f64::max);
    if scale == 0.0 {
        return 0.0;
    }
    let above = |k: usize| if k > 0 { betas[k - 1] / scale } else { 0.0 };
    let diagonal: Vec<f64> =
        (0..alphas.len()).map(|k| (alphas[k] / scale).powi(2) + above(k).powi(2)).collect();
    let beside: Vec<f64> = (0..betas.len()).map(|k| alphas[k] / scale * (betas[k] / scale)).collect();
    largest_of_tridiagonal(&diagonal, &beside).sqrt() * scale
}
