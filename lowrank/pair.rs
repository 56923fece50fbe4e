//! A matrix kept as two factors, W = A·Bᵀ, and what can be done with it as data. Training it is spectron.rs's business.
//!
//! Letters: W [m, n], A [m, r], B [n, r]; m outputs, n inputs, r rank. Decompositions run in f64, on nalgebra matrices.

use super::svd::svd;
use crate::tensor::{Backend, Element, Tensor, side_by_side};
use nalgebra::{DMatrix, DVector};

/// A factor pair: the m×n matrix W = A·Bᵀ of rank at most r. Its gradient, and its momentum, are factor pairs too.
///
/// The factors are not unique: (A·Q, B·Q⁻ᵀ) is the same W for every invertible Q (the gauge).
#[derive(Clone, Debug)]
pub struct FactorPair<B: Backend> {
    /// A [m, r].
    pub a: Tensor<B>,
    /// B [n, r].
    pub b: Tensor<B>,
}

impl<B: Backend> FactorPair<B> {
    /// The pair of A [m, r] and B [n, r].
    ///
    /// # Panics
    /// If the ranks differ.
    #[track_caller]
    pub fn new(a: Tensor<B>, b: Tensor<B>) -> Self {
        let (sa, sb) = (a.shape(), b.shape());
        let (&[_, r], &[_, s]) = (sa.dims(), sb.dims()) else {
            panic!("FactorPair: A {sa} and B {sb} must be matrices")
        };
        assert!(r == s, "FactorPair: A {sa} and B {sb} are of different rank, {r} and {s}");
        Self { a, b }
    }

    /// Zeros of the same shapes.
    pub fn zeros_like(&self) -> Self {
        Self { a: self.a.zeros_like(), b: self.b.zeros_like() }
    }

    /// Rows of W: the layer's outputs m.
    pub fn outputs(&self) -> usize {
        self.a.rows()
    }

    /// Columns of W: the layer's inputs n.
    pub fn inputs(&self) -> usize {
        self.b.rows()
    }

    /// Columns of the factors, r: the largest rank that W can have.
    pub fn rank(&self) -> usize {
        self.a.cols()
    }

    /// W = A·Bᵀ [m, n].
    pub fn to_dense(&self) -> Tensor<B> {
        self.a.matmul(self.b.t()) // [m, n]
    }

    /// Wᵀ = B·Aᵀ, without a copy.
    pub fn transpose(&self) -> Self {
        Self { a: self.b.clone(), b: self.a.clone() }
    }

    /// W − W', the change since `before`, as a pair of rank 2r: ΔA·B'ᵀ + A·ΔBᵀ = [ΔA, A]·[B', ΔB]ᵀ. Neither matrix is
    /// formed, and nothing cancels, however small the change (after a jump of the gauge, A and B themselves are far from A', B').
    ///
    /// # Panics
    /// If the shapes differ.
    #[track_caller]
    pub fn change_since(&self, before: &Self) -> Self {
        let (da, db) = (self.a.sub(&before.a), self.b.sub(&before.b)); // [m, r], [n, r]
        Self::new(da, before.b.clone()).beside(&Self::new(self.a.clone(), db)) // [m, 2r], [n, 2r]
    }

    /// The sum of two matrices W, as the pair of their factors side by side.
    pub(super) fn beside(&self, other: &Self) -> Self {
        let mut both = side_by_side(&[&[&self.a, &other.a], &[&self.b, &other.b]]); // [m, r + s], [n, r + s]
        let b = both.remove(1);
        Self { a: both.remove(0), b }
    }

    /// σ(W), the spectral norm, from an f64 decomposition of the factors.
    pub fn spectral_norm(&self) -> f64 {
        self.singular_values()[0]
    }

    /// Parameters and FLOPs, factored and dense.
    pub fn costs(&self) -> Costs {
        let (m, n, r) = (self.outputs(), self.inputs(), self.rank());
        Costs {
            parameters: r * (m + n),
            dense_parameters: m * n,
            flops_per_row: 2 * r * (m + n),
            dense_flops_per_row: 2 * m * n,
            merge_flops: 2 * m * n * r,
        }
    }

    /// The best approximation of `w` [m, n] by rank `r` (Eckart & Young 1936), √Σ in each factor, and its error in the
    /// Frobenius norm, √Σ dropped σ². The factors come out balanced.
    ///
    /// # Panics
    /// If `w` is not a matrix or `r` is not between 1 and min(m, n).
    #[track_caller]
    pub fn from_dense(w: &Tensor<B>, r: usize) -> (Self, f64) {
        let (pair, sigma) = Self::from_dense_by(w, |_| r);
        (pair, norm_from(&sigma, r))
    }

    /// As [`FactorPair::from_dense`], with the rank that `rank` chooses when it sees the singular values of `w`, largest first;
    /// and those. The error is the norm of the singular values from the rank on.
    ///
    /// # Panics
    /// If `w` is not a matrix or the rank is not between 1 and min(m, n).
    #[track_caller]
    pub fn from_dense_by(w: &Tensor<B>, rank: impl FnOnce(&[f64]) -> usize) -> (Self, Vec<f64>) {
        w.shape().matrix("from_dense");
        Self::cut("from_dense", w.device(), svd(&to_nalgebra(w)), rank)
    }

    /// The best approximation of W by rank `r` ≤ this pair's, balanced, and its error in the Frobenius norm, √Σ dropped σ².
    ///
    /// # Panics
    /// If `r` is not between 1 and min(m, n, this pair's rank).
    #[track_caller]
    pub fn truncate(&self, r: usize) -> (Self, f64) {
        let (pair, sigma) = self.truncate_by(|_| r);
        (pair, norm_from(&sigma, r))
    }

    /// As [`FactorPair::truncate`], with the rank that `rank` chooses when it sees the singular values of W, largest first; and
    /// those.
    ///
    /// # Panics
    /// If the rank is not between 1 and min(m, n, this pair's rank).
    #[track_caller]
    pub fn truncate_by(&self, rank: impl FnOnce(&[f64]) -> usize) -> (Self, Vec<f64>) {
        Self::cut("truncate", self.a.device(), self.decompose(), rank)
    }

    /// The first columns of U·√Σ and V·√Σ.
    #[track_caller]
    fn cut(op: &str, device: &B, (u, sigma, v): Svd, rank: impl FnOnce(&[f64]) -> usize) -> (Self, Vec<f64>) {
        let (r, most) = (rank(&sigma), sigma.len());
        let [m, n] = [u.nrows(), v.nrows()];
        assert!((1..=most).contains(&r), "{op}: rank {r} of [{m}, {n}] is not between 1 and {most}");
        let scaled = |x: DMatrix<f64>| DMatrix::from_fn(x.nrows(), r, |i, j| x[(i, j)] * sigma[j].sqrt());
        let pair = Self::new(from_nalgebra(device, &scaled(u)), from_nalgebra(device, &scaled(v))); // [m, r], [n, r]
        (pair, sigma)
    }

    /// The same W with AᵀA = BᵀB (= Σ), so that both factors have W's singular values' square roots.
    ///
    /// From A = Q_A·R_A, B = Q_B·R_B and the SVD R_A·R_Bᵀ = U·Σ·Vᵀ: A ← Q_A·U·√Σ, B ← Q_B·V·√Σ. If r > min(m, n) the
    /// surplus columns become zero.
    pub fn balance(&self) -> Self {
        let (u, sigma, v) = self.decompose();
        let root = DMatrix::from_diagonal(&DVector::from_vec(sigma).map(f64::sqrt));
        let r = self.rank();
        let widen = |x: DMatrix<f64>| x.resize_horizontally(r, 0.0);
        let (a, b) = (widen(u * &root), widen(v * root));
        let device = self.a.device();
        Self::new(from_nalgebra(device, &a), from_nalgebra(device, &b)) // [m, r], [n, r]
    }

    /// The SVD of W, by that of a core [r, r] between two QR decompositions.
    fn decompose(&self) -> Svd {
        let qr = |x: &Tensor<B>| to_nalgebra(x).qr().unpack();
        let ((qa, ra), (qb, rb)) = (qr(&self.a), qr(&self.b));
        let (u, sigma, v) = svd(&(ra * rb.transpose()));
        (qa * u, sigma, qb * v)
    }

    /// ‖AᵀA − BᵀB‖_F: zero if the pair is balanced. Unlike W, it changes with the gauge.
    pub fn gauge_imbalance(&self) -> f64 {
        let gram = |x: &Tensor<B>| x.t().matmul(x); // [r, r]
        gram(&self.a).sub(&gram(&self.b)).norm()
    }

    /// The singular values of W, largest first, r of them at most, from the r×r core of two QR decompositions.
    pub fn singular_values(&self) -> Vec<f64> {
        let r = |x: &Tensor<B>| to_nalgebra(x).qr().r();
        svd(&(r(&self.a) * r(&self.b).transpose())).1
    }
}

/// U, σ, V of W = U·diag(σ)·Vᵀ.
type Svd = (DMatrix<f64>, Vec<f64>, DMatrix<f64>);

/// √Σ σ² from the index r on.
fn norm_from(sigma: &[f64], r: usize) -> f64 {
    sigma.iter().skip(r).map(|s| s * s).sum::<f64>().sqrt()
}

/// The smallest rank that keeps at least the part `energy`, in (0, 1], of Σ σ²; `sigma` descending. At least 1.
pub fn rank_for_energy(sigma: &[f64], energy: f64) -> usize {
    // what is dropped is summed from the smallest on, so that the largest do not swallow it
    let total: f64 = sigma.iter().rev().map(|s| s * s).sum();
    let mut dropped = 0.0;
    let droppable = sigma.iter().rev().take_while(|s| {
        dropped += **s * **s;
        dropped <= (1.0 - energy) * total
    });
    (sigma.len() - droppable.count()).max(1)
}

/// A matrix as a tensor.
pub(super) fn from_nalgebra<B: Backend>(device: &B, x: &DMatrix<f64>) -> Tensor<B> {
    let (rows, cols) = x.shape();
    Tensor::from_fn(device, [rows, cols], |i| B::Elem::of(x[(i / cols, i % cols)])) // [rows, cols]
}

/// A matrix as nalgebra's, in f64.
pub(super) fn to_nalgebra<B: Backend>(x: &Tensor<B>) -> DMatrix<f64> {
    DMatrix::from_row_slice(x.rows(), x.cols(), &x.to_f64())
}

/// What a factor pair costs against the dense matrix. FLOPs count a multiply-add as two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// r·(m + n).
    pub parameters: usize,
    /// m·n.
    pub dense_parameters: usize,
    /// 2·r·(m + n): one row through (x·B)·Aᵀ.
    pub flops_per_row: usize,
    /// 2·m·n: one row through x·Wᵀ.
    pub dense_flops_per_row: usize,
    /// 2·m·n·r: forming W once.
    pub merge_flops: usize,
}
