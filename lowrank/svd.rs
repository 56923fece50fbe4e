//! The singular value decomposition, in f64. Needed where factor pairs are cut, balanced or looked at, not for training.

use super::eigen::svd_wide;
use super::init::dot;
use crate::tensor::{Cpu, Tensor};
use nalgebra::DMatrix;

/// The short side from which eigen.rs takes over. Jacobi keeps the last digits, and is the faster one to about here.
const LARGE: usize = 128;

/// X = U·diag(σ)·Vᵀ, σ descending; min(m, n) columns, where a zero σ leaves a zero column in V or in U.
///
/// One-sided Jacobi (Hestenes 1958) on the triangle of a QR decomposition, where it converges fast (Drmač & Veselić 2008):
/// columns are turned in pairs until all are orthogonal. nalgebra 0.34 has an SVD too, but where singular values are equal,
/// zero or decades apart, its U·Σ·Vᵀ is often not X, by up to a tenth (dimforge/nalgebra, issue 1172). From a short side of 128 on
/// the route of eigen.rs, whose vectors are orthogonal to about 1e-14 instead of 1e-15.
pub(super) fn svd(x: &DMatrix<f64>) -> (DMatrix<f64>, Vec<f64>, DMatrix<f64>) {
    if x.nrows() < x.ncols() {
        let (v, sigma, u) = svd(&x.transpose());
        return (u, sigma, v);
    }
    let scale = x.amax();
    if scale == 0.0 {
        let n = x.ncols();
        return (DMatrix::zeros(x.nrows(), n), vec![0.0; n], DMatrix::zeros(n, n));
    }
    if x.ncols() >= LARGE && x.iter().all(|x| x.is_finite()) {
        return large(&(x / scale), scale);
    }
    let (q, r) = (x / scale).qr().unpack(); // [m, n], [n, n]
    let n = r.ncols();
    // Rᵀ·Z = Y with orthogonal columns: then R = Z·Yᵀ, U = Q·Z and V·Σ = Y
    let columns =
        |x: DMatrix<f64>| -> Vec<Vec<f64>> { x.column_iter().map(|c| c.iter().copied().collect()).collect() };
    let (mut y, mut z) = (columns(r.transpose()), columns(DMatrix::identity(n, n)));
    let tolerance = n as f64 * f64::EPSILON;
    let mut turned = true;
    for _ in 0..60 {
        // 6 to 10 sweeps are usual
        if !std::mem::take(&mut turned) {
            break;
        }
        for j in 1..n {
            for i in 0..j {
                let (a, b, c) = (dot(&y[i], &y[i]), dot(&y[j], &y[j]), dot(&y[i], &y[j]));
                if c.abs() > tolerance * (a * b).sqrt() {
                    turned = true;
                    let zeta = (b - a) / (2.0 * c);
                    let tangent = 1f64.copysign(zeta) / (zeta.abs() + zeta.hypot(1.0));
                    for columns in [&mut y, &mut z] {
                        turn(columns, i, j, tangent);
                    }
                }
            }
        }
    }
    let sigma: Vec<f64> = y.iter().map(|y| dot(y, y).sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| sigma[j].total_cmp(&sigma[i]));
    let v =
        DMatrix::from_fn(
            n,
            n,
            |i, j| if sigma[order[j]] > 0.0 { y[order[j]][i] / sigma[order[j]] } else { 0.0 },
        );
    let z = DMatrix::from_fn(n, n, |i, j| z[order[j]][i]);
    (q * z, order.iter().map(|&j| sigma[j] * scale).collect(), v)
}

/// The same by eigen.rs, of a tall X whose singular values are to be multiplied by `scale`.
fn large(x: &DMatrix<f64>, scale: f64) -> (DMatrix<f64>, Vec<f64>, DMatrix<f64>) {
    let (m, n) = x.shape();
    let wide = Tensor::from_vec(&Cpu::default(), [n, m], x.as_slice().to_vec()); // Xᵀ [n, m]: a column of X is a row of it
    let (v, sigma, ut) = svd_wide(wide); // [n, n], [n, m]
    let u = DMatrix::from_column_slice(m, n, ut.buffer());
    (u, sigma.into_iter().map(|s| s * scale).collect(), DMatrix::from_row_slice(n, n, v.buffer()))
}

/// Turns columns i < j in their plane by the angle whose tangent is given.
fn turn(columns: &mut [Vec<f64>], i: usize, j: usize, tangent: f64) {
    let cos = 1.0 / tangent.hypot(1.0);
    let sin = cos * tangent;
    let (left, right) = columns.split_at_mut(j);
    for (x, y) in left[i].iter_mut().zip(&mut right[0]) {
        (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
    }
}
