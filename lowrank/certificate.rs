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
/// length of its sums: c allows for that too. Costs one Gram and one factorisation of r³/3 FLOPs.
///
/// # Panics
/// If W is not a matrix.
#[track_caller]
pub fn certify_spectral_norm<B: Backend>(w: &Tensor<B>, theta: f64) -> bool {
    w.shape().matrix("certify_spectral_norm");
    Gram::new(w).is_below(theta)
}

/// A proven upper bound of σ(W), nearly always within 0.5 % of it; infinite if W is not finite.
///
/// Lanczos's iteration on the Gram matrix guesses σ, and a guess a little higher is certified as in [`certify_spectral_norm`]:
/// by 0.3 %, and by what the last four steps still found. Where that fails (many singular values close to the
/// largest), the bound is min(‖W‖_F, √‖G‖_∞, √‖G‖_F): σ² is G's largest eigenvalue, which no norm of G is below, and one of the
/// σ_i² that add up to ‖W‖_F². It needs no factorisation and is within r^¼ of σ, since ‖G‖_F² = Σσ_i⁴ ≤ r·σ⁴. Cost:
/// [`upper_bound_flops`].
///
/// # Panics
/// If W is not a matrix.
#[track_caller]
pub fn spectral_norm_upper_bound<B: Backend>(w: &Tensor<B>) -> f64 {
    w.shape().matrix("spectral_norm_upper_bound");
    let gram = Gram::new(w);
    let [largest, recent] = gram.largest_eigenvalue();
    let theta = (1.006 * largest + recent).sqrt();
    let easy = gram.easy_bound();
    if theta < easy && gram.is_below(theta) { theta } else { easy }
}

/// FLOPs of [`spectral_norm_upper_bound`] for a W [p, q], in f64, r = min(p, q): scaling and ‖W‖_F 3pq, the Gram matrix 2pqr,
/// k = min(r, 24) steps of Lanczos 2r² each, made orthogonal to all before in 4k²r, and Cholesky's r³/3.
pub fn upper_bound_flops(p: usize, q: usize) -> f64 {
    let (pq, r) = ((p * q) as f64, p.min(q) as f64);
    let k = r.min(LANCZOS as f64);
    3.0 * pq + 2.0 * pq * r + 2.0 * k * r * r + 4.0 * k * k * r + r.powi(3) / 3.0
}

/// Steps of Lanczos's iteration at most.
const LANCZOS: usize = 24;

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
        if !(theta >= 0.0 && square.is_finite() && self.squares.is_finite()) {
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

    /// The largest eigenvalue of WᵀW, from below up to rounding, by Lanczos's iteration; and how much of it the last four
    /// steps found, 0 if the iteration has run to its end. Every vector is made orthogonal to all before it, twice, which is
    /// enough (Golub & Van Loan 2013, section 10.3): once leaves a residue that grows.
    fn largest_eigenvalue(&self) -> [f64; 2] {
        let r = self.r;
        let mut v: Vec<f64> = (0..r).map(|i| noise(i as u32, 0)).collect();
        let mut basis: Vec<Vec<f64>> = Vec::new();
        // the tridiagonal matrix: α on the diagonal, β beside it
        let (mut alphas, mut betas) = (Vec::new(), Vec::new());
        let mut exact = true;
        for k in 0..r {
            let norm = dot(&v, &v).sqrt();
            if k > 0 {
                // an invariant space: what it lacks, the start lacks
                if norm <= 1e-13 * alphas[0] {
                    break;
                }
                if k == LANCZOS {
                    exact = false;
                    break;
                }
                betas.push(norm);
            }
            basis.push(v.iter().map(|v| v / norm).collect());
            let newest = &basis[k];
            v = (0..r).map(|i| dot(&self.g[i * r..][..r], newest)).collect();
            alphas.push(dot(&v, newest));
            for old in basis.iter().chain(&basis) {
                let along = dot(&v, old);
                v.iter_mut().zip(old).for_each(|(v, old)| *v -= along * old);
            }
        }
        let largest = largest_of_tridiagonal(&alphas, &betas);
        let before = if exact {
            largest
        } else {
            largest_of_tridiagonal(&alphas[..LANCZOS - 4], &betas[..LANCZOS - 5])
        };
        [largest, largest - before].map(|x| x * self.scale * self.scale)
    }

    /// min(‖W‖_F, √‖G‖_∞, √‖G‖_F): proven.
    fn easy_bound(&self) -> f64 {
        let row_sum = |row: &[f64]| row.iter().map(|g| g.abs()).sum::<f64>();
        let infinity = self.g.chunks(self.r).map(row_sum).fold(0.0, f64::max) * (1.0 + 2.0 * gamma(self.r));
        let frobenius = dot(&self.g, &self.g).sqrt() * (1.0 + 2.0 * gamma(self.r * self.r));
        let square = self.squares.min(infinity.min(frobenius) + self.error);
        let bound = square.sqrt() * self.scale * (1.0 + 4.0 * EPS);
        if bound.is_nan() { f64::INFINITY } else { bound }
    }
}

/// The largest eigenvalue of the symmetric tridiagonal matrix with diagonal `a` and `b` beside it, by bisection: all are below
/// x exactly if the LDLᵀ factorisation of T − xI has negative pivots only (Golub & Van Loan 2013, section 8.4).
pub(super) fn largest_of_tridiagonal(a: &[f64], b: &[f64]) -> f64 {
    let beside = |i: usize| if (1..=b.len()).contains(&i) { b[i - 1] } else { 0.0 };
    let all_below = |x: f64| {
        let mut pivot = -1.0;
        (0..a.len()).all(|i| {
            pivot = a[i] - x - beside(i).powi(2) / pivot;
            pivot < 0.0
        })
    };
    let mut low = a.iter().copied().fold(0.0, f64::max);
    // Gershgorin
    let mut high = (0..a.len()).map(|i| a[i] + beside(i) + beside(i + 1)).fold(low, f64::max);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        *(if all_below(middle) { &mut high } else { &mut low }) = middle;
    }
    low
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

#[cfg(test)]
mod tests {
    use super::*;
    use nalgebra::DMatrix;

    /// What is left where Cholesky's algorithm fails is a bound too, within r^¼ (plus what its allowances add).
    #[test]
    fn the_bound_without_a_factorisation_is_one() {
        for (p, q, scale) in [(9, 4, 1.0), (30, 30, 1e30), (5, 40, 1e-30), (1, 1, 3.0), (60, 20, 1.0)] {
            let values: Vec<f64> = (0..p * q).map(|i| scale * noise(i as u32, 3)).collect();
            let w = Tensor::from_vec(&Cpu::<f64>::default(), [p, q], values.clone()); // [p, q]
            let sigma = scale * DMatrix::from_row_slice(p, q, &values).unscale(scale).singular_values().max();
            let ratio = Gram::new(&w).easy_bound() / sigma;
            let most = (p.min(q) as f64).powf(0.25);
            assert!((1.0 - 1e-12..most * (1.0 + 1e-9)).contains(&ratio), "[{p}, {q}]: {ratio}, {most}");
        }
    }
}
