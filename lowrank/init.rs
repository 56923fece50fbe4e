//! Initial values, from a seeded generator. All arithmetic is f64 addition, multiplication, division and square root in a
//! fixed order, so the same seed gives the same factors on every machine.
//!
//! Letters: W [m, n] = A·Bᵀ, r rank, σ singular values; std the standard deviation of an ordinary dense initialisation.

use super::FactorPair;
use crate::tensor::{Backend, Element, Tensor};
use rand::Rng;
use rand_distr::{ChiSquared, Distribution, StandardNormal};

/// How the factors of a pair start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum PairInit {
    /// As the truncated SVD of a dense matrix with independent N(0, std²) entries, √Σ in each factor (Khodak et al. 2021,
    /// arXiv 2105.01029; Spectron's choice).
    Spectral,
    /// All r singular values equal, with the Frobenius norm of that dense matrix, √(m·n)·std.
    Orthogonal,
    /// A = 0 and B as for `Spectral`: the layer starts as zero (for output projections).
    Zero,
}

/// The factors of an m×n matrix of rank `r`.
///
/// `Spectral` draws from the distribution of the truncated SVD without forming W: the singular vectors of a Gaussian matrix
/// are uniformly distributed orthonormal frames, independent of its singular values ([`haar`], [`spectral_values`]).
///
/// # Panics
/// If `r` is not between 1 and min(m, n).
#[track_caller]
pub fn pair<B: Backend>(
    device: &B,
    rng: &mut impl Rng,
    [m, n]: [usize; 2],
    r: usize,
    std: f64,
    init: PairInit,
) -> FactorPair<B> {
    assert!((1..=m.min(n)).contains(&r), "init: rank {r} of [{m}, {n}] is not between 1 and {}", m.min(n));
    let sigma = match init {
        PairInit::Orthogonal => vec![(m as f64 * n as f64 / r as f64).sqrt(); r],
        PairInit::Spectral | PairInit::Zero => spectral_values(rng, m, n, r),
    };
    let mut factor = |rows: usize, zero: bool| {
        let frame = haar(rng, rows, r); // r columns of length rows
        let value = |i: usize| frame[i % r][i / r] * (std * sigma[i % r]).sqrt();
        Tensor::from_fn(device, [rows, r], |i| B::Elem::of(if zero { 0.0 } else { value(i) }))
    };
    let a = factor(m, init == PairInit::Zero); // [m, r]
    let b = factor(n, false); // [n, r]
    FactorPair::new(a, b)
}

/// A tensor of independent N(0, std²) entries.
pub fn gaussian<B: Backend>(
    device: &B,
    rng: &mut impl Rng,
    shape: impl Into<crate::tensor::Shape>,
    std: f64,
) -> Tensor<B> {
    Tensor::from_fn(device, shape, |_| {
        let z: f64 = StandardNormal.sample(rng);
        B::Elem::of(std * z)
    })
}

/// r orthonormal columns of length m, uniformly distributed (Haar): a Gaussian matrix after Gram–Schmidt (modified, which
/// keeps f64 columns orthogonal to well below f32 rounding here).
pub fn haar(rng: &mut impl Rng, m: usize, r: usize) -> Vec<Vec<f64>> {
    let mut columns: Vec<Vec<f64>> = Vec::with_capacity(r);
    for _ in 0..r {
        let mut x: Vec<f64> = (0..m).map(|_| StandardNormal.sample(rng)).collect();
        for q in &columns {
            let along = dot(q, &x);
            x.iter_mut().zip(q).for_each(|(x, q)| *x -= along * q);
        }
        let norm = dot(&x, &x).sqrt();
        x.iter_mut().for_each(|x| *x /= norm);
        columns.push(x);
    }
    columns
}

/// A dot product in eight lanes, so that it vectorises, added in a fixed order.
#[inline(always)] // into the SIMD of its callers; no rounding depends on that
pub(super) fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    for (x, y) in x.chunks(8).zip(y.chunks(8)) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += x * y;
        }
    }
    lanes.iter().sum()
}

/// The r largest singular values, descending, of a random m×n matrix with independent N(0, 1) entries.
///
/// Householder's bidiagonalisation of such a matrix (m ≥ n) leaves independent χ_m, χ_{m−1}, … on the diagonal and
/// χ_{n−1}, χ_{n−2}, … above it (Silverstein 1985; Dumitriu & Edelman 2002): so the bidiagonal matrix is drawn directly, and
/// its singular values are found by bisection. They are the positive eigenvalues of the symmetric tridiagonal matrix with
/// zero diagonal whose off-diagonal holds the two bands in turn (Golub & Kahan 1965), and the negative terms of its Sturm
/// sequence at x count the eigenvalues below x.
pub fn spectral_values(rng: &mut impl Rng, m: usize, n: usize, r: usize) -> Vec<f64> {
    let (m, n) = (m.max(n), m.min(n));
    let mut squares = Vec::with_capacity(2 * n - 1); // squared off-diagonal
    for i in 0..n {
        let mut chi2 = |k: usize| ChiSquared::new(k as f64).expect("k > 0").sample(rng);
        squares.push(chi2(m - i));
        if i + 1 < n {
            squares.push(chi2(n - 1 - i));
        }
    }
    // Gershgorin: no eigenvalue exceeds the largest row sum
    let bands: Vec<f64> = squares.iter().map(|s| s.sqrt()).collect();
    let top = bands.windows(2).map(|w| w[0] + w[1]).fold(bands[0], f64::max);
    let (mut low, mut high) = (vec![0.0; r], vec![top; r]);
    for _ in 0..50 {
        let mid: Vec<f64> = low.iter().zip(&high).map(|(l, h)| 0.5 * (l + h)).collect();
        let mut q: Vec<f64> = mid.iter().map(|x| -x).collect();
        let mut below = vec![1.0; r]; // q₁ = −x is negative
        for square in &squares {
            for ((q, below), x) in q.iter_mut().zip(&mut below).zip(&mid) {
                *q = -x - square / *q;
                *below += if *q < 0.0 { 1.0 } else { 0.0 };
            }
        }
        for k in 0..r {
            // of 2n eigenvalues, σ_1 ≥ … ≥ σ_{k+1} are the k + 1 largest
            let above = 2.0 * n as f64 - below[k];
            if above > k as f64 {
                low[k] = mid[k];
            } else {
                high[k] = mid[k];
            }
        }
    }
    high
}

#[cfg(test)]
mod tests {
    use super::*;
    use nalgebra::DMatrix;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    /// Means over 200 draws of the singular values, drawn directly and through a library's SVD of Gaussian matrices.
    #[test]
    fn spectral_values_have_the_distribution_of_an_svd() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (m, n, r, draws) = (24, 10, 10, 400);
        let (mut direct, mut svd) = (vec![0.0; r], vec![0.0; r]);
        for _ in 0..draws {
            for (sum, s) in direct.iter_mut().zip(spectral_values(&mut rng, m, n, r)) {
                *sum += s / draws as f64;
            }
            let w = DMatrix::<f64>::from_fn(m, n, |_, _| StandardNormal.sample(&mut rng));
            for (sum, s) in svd.iter_mut().zip(w.singular_values().iter()) {
                *sum += s / draws as f64;
            }
        }
        // a singular value has a standard deviation of about 0.6, the difference of two means of 400 one of 0.04
        for (a, b) in direct.iter().zip(&svd) {
            assert!((a - b).abs() < 0.17, "{direct:.2?}\n{svd:.2?}");
        }
    }

    #[test]
    fn frames_are_orthonormal() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for (m, r) in [(50, 12), (20, 20), (7, 1)] {
            let q = haar(&mut rng, m, r);
            for i in 0..r {
                for j in 0..r {
                    let want = if i == j { 1.0 } else { 0.0 };
                    assert!((dot(&q[i], &q[j]) - want).abs() < 1e-11);
                }
            }
        }
    }
}
