//! Upper bounds of the spectral norm σ(W), the largest singular value, by proof.
//!
//! The proofs hold in floating point: every rounding on the way is allowed for. They run in f64 on the host, on the Gram
//! matrix of the shorter side. Estimates from below are in spectral.rs.
//! Letters: W [p, q]; r = min(p, q); G the r×r Gram matrix; ε = 2⁻⁵³ the unit roundoff of f64; γ_k = kε/(1 − kε)
//! (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1).

use super::spectral::noise;
use crate::tensor::{Backend, Cpu, Mat, Tensor};

/// Whether σ(W) ≤ θ is proven; `false` means unknown.
///
/// σ(W) ≤ θ ⇔ H = θ²I − WᵀW ⪰ 0. If Cholesky's algorithm in floating point runs to its end on H − cI with
/// c ≥ γ_{r+1}/(1 − γ_{r+1})·tr H, then H is positive semidefinite (Rump 2006, "Verification of positive definiteness",
/// BIT 46, theorem 2.3). The computed Gram matrix differs from WᵀW by at most γ_k‖W‖_F² in spectral norm, k being the
/// length of its sums: c allows for that too. Costs one Gram and one factorisation of r³/3 multiply-adds.
///
/// # Panics
/// If W is not a matrix.
#[track_caller]
pub fn certify_spectral_norm<B: Backend>(w: &Tensor<B>, theta: f64) -> bool {
    w.shape().matrix("certify_spectral_norm");
    Gram::new(w).is_below(theta)
}

/// A proven upper bound of σ(W), nearly always within 0.3 % of it; infinite if W is not finite.
///
/// Power iteration on the Gram matrix guesses σ, and the guess times 1.003 is certified as in [`certify_spectral_norm`].
/// Where that fails (many singular values close to the largest), the bound is min(‖W‖_F, √‖G‖_∞), which needs no
/// factorisation. Costs one Gram, one factorisation and at most 300 products of G with a vector.
///
/// # Panics
/// If W is not a matrix.
#[track_caller]
pub fn spectral_norm_upper_bound<B: Backend>(w: &Tensor<B>) -> f64 {
    w.shape().matrix("spectral_norm_upper_bound");
    let gram = Gram::new(w);
    let theta = 1.003 * gram.largest_eigenvalue().sqrt();
    if gram.is_below(theta) { theta } else { gram.easy_bound() }
}

/// The Gram matrix of the shorter side of a W, in f64, scaled so that nothing in it over- or underflows.
struct Gram {
    r: usize,
    /// Row-major r×r, of W/scale.
    g: Vec<f64>,
    /// A power of two near the largest |element| of W (1 for W = 0), so that scaling rounds nothing.
    scale: f64,
    /// Bounds ‖computed G − exact G‖₂, and ‖W‖_F²; both of W/scale.
    error: f64,
    squares: f64,
}

/// Unit roundoff of f64.
const EPS: f64 = f64::EPSILON / 2.0;

/// γ_k.
fn gamma(k: usize) -> f64 {
    let ke = k as f64 * EPS;
    ke / (1.0 - ke)
}

impl Gram {
    fn new<B: Backend>(w: &Tensor<B>) -> Self {
        let (p, q) = (w.rows(), w.cols());
        let values = w.to_f64();
        let max = values.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
        let scale = if max > 0.0 && max.is_finite() { max.log2().floor().exp2() } else { 1.0 };
        let w = Tensor::from_vec(&Cpu::default(), [p, q], values.iter().map(|x| x / scale).collect()); // [p, q]
        let (k, r) = (p.max(q), p.min(q));
        let short: Mat<Cpu<f64>> = if p >= q { w.t() } else { (&w).into() };
        let g = short.matmul(short.t()); // [r, r]
        // a sum of k squares in any order, and one more rounding for this very line
        let squares = w.norm().powi(2) * (1.0 + 2.0 * gamma(k * r + 4));
        Self { r, g: g.to_vec(), scale, error: 2.0 * gamma(k + 1) * squares, squares }
    }

    /// Whether θ²I − WᵀW ⪰ 0 is proven.
    fn is_below(&self, theta: f64) -> bool {
        let r = self.r;
        let square = (theta / self.scale).powi(2) * (1.0 - 4.0 * EPS);
        if !(square.is_finite() && self.squares.is_finite()) {
            return false;
        }
        // tr H ≤ r·θ²; twice the allowance pays for the roundings of this line and of the diagonal below
        let c = 2.0 * (gamma(r + 1) / (1.0 - gamma(r + 1)) * r as f64 * square + self.error);
        // Cholesky by rows, L in place of the lower triangle of H − cI
        let mut l: Vec<f64> = self.g.iter().map(|g| -g).collect();
        for i in 0..r {
            l[i * r + i] += square - c;
            for j in 0..=i {
                let (above, row) = l.split_at_mut(i * r);
                let row = &mut row[..r];
                let pivot = if j < i { &above[j * r..][..j + 1] } else { &[] };
                let known = if j < i { dot(&row[..j], &pivot[..j]) } else { dot(&row[..i], &row[..i]) };
                let rest = row[j] - known;
                if j < i {
                    row[j] = rest / pivot[j];
                } else if rest > 0.0 {
                    row[i] = rest.sqrt();
                } else {
                    return false;
                }
            }
        }
        true
    }

    /// The largest eigenvalue of WᵀW, from below, by power iteration until it grows by less than 1 part in 10⁹ (a
    /// coarser limit stops early where the second eigenvalue is close).
    fn largest_eigenvalue(&self) -> f64 {
        let r = self.r;
        let mut v: Vec<f64> = (0..r).map(|i| noise(i as u32, 0)).collect();
        let mut lambda = 0.0;
        for _ in 0..300 {
            let norm = dot(&v, &v).sqrt();
            let unit: Vec<f64> = v.iter().map(|v| v / norm).collect();
            v = (0..r).map(|i| dot(&self.g[i * r..][..r], &unit)).collect();
            let next = dot(&v, &unit);
            let grew = next > lambda * (1.0 + 1e-9); // false for NaN
            lambda = lambda.max(next);
            if !grew {
                break;
            }
        }
        lambda * self.scale * self.scale
    }

    /// min(‖W‖_F, √‖G‖_∞): proven, within √r of σ at worst.
    fn easy_bound(&self) -> f64 {
        let row_sum = |row: &[f64]| row.iter().map(|g| g.abs()).sum::<f64>();
        let largest = self.g.chunks(self.r).map(row_sum).fold(0.0, f64::max);
        let infinity = largest * (1.0 + 2.0 * gamma(self.r)) + self.error;
        let bound = self.squares.min(infinity).sqrt() * self.scale * (1.0 + 4.0 * EPS);
        if bound.is_nan() { f64::INFINITY } else { bound }
    }
}

/// A dot product in eight lanes, so that it vectorises.
fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let (xs, ys) = (x.chunks_exact(8), y.chunks_exact(8));
    let rest: f64 = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in xs.zip(ys) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f64>() + rest
}
