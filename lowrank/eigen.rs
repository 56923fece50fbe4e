//! The singular value decomposition of large matrices, by way of the eigenvectors of X·Xᵀ: products, and one eigenproblem of the
//! short side. Small matrices: svd.rs.
//!
//! Eigenvectors: Householder's tridiagonal form, then QR steps with Wilkinson's shift (Golub & Van Loan 2013, 8.3). The form is
//! made in one pass over the matrix per column, and the eigenvectors a few rows at a time, each in the second-level cache from the
//! first reflector to the last rotation; both in parallel, with results that do not depend on the number of threads.
//! Letters: X [k, n], k ≤ n; G = X·Xᵀ [k, k] = Q·Λ·Qᵀ; T tridiagonal, with diagonal d and off-diagonal e.

use super::init::dot;
use crate::tensor::{Cpu, Tensor, simd};
use rayon::prelude::*;

type Matrix = Tensor<Cpu<f64>>;

/// One round keeps the singular values within this of its largest. X·Xᵀ has the squares, and so no digits left of a singular value
/// below √ε of the largest; of those kept 1e-2·σ₁ and above it has all but the last two to four.
const KEPT: f64 = 1e-2;

/// Rows of Q that are made at once: of 1000 columns they take 128 KiB.
const ROWS: usize = 16;

/// Elements per task in the passes over G.
const GRAIN: usize = 16 * 1024;

/// X = U·diag(σ)·Vᵀ of a finite X [k, n], k ≤ n, whose elements are about 1 at most: U [k, k], σ descending, Vᵀ [k, n]. A σ of zero
/// leaves a row of zeros in Vᵀ.
///
/// U is orthonormal and U·diag(σ)·Vᵀ is X to within rounding, at any spectrum: diag(σ)·Vᵀ is Uᵀ·X. How well U was chosen shows in
/// Vᵀ, whose rows are orthogonal to about ε/[`KEPT`].
pub(super) fn svd_wide(x: Matrix) -> (Matrix, Vec<f64>, Matrix) {
    let (k, n) = (x.rows(), x.cols());
    let (mut u, mut sigma, mut v) = (Vec::new(), Vec::new(), Vec::new()); // u: Uᵀ, a row a vector
    let mut basis: Option<Matrix> = None; // Q of the rounds so far, whose columns span what is left: [k, l]
    let mut rest = x; // [l, n]
    loop {
        let l = rest.rows();
        let q = eigenvectors(&rest.matmul(rest.t())); // [l, l]
        let c = q.t().matmul(&rest); // [l, n]
        let q = basis.map_or(q.clone(), |basis| basis.matmul(&q)); // [k, l]
        let (mut c, qt) = (c.to_vec(), transposed(&q)); // rows are directions
        let norms: Vec<f64> = c.chunks(n).map(|c| dot(c, c).sqrt()).collect();
        let top = norms.iter().copied().fold(0.0, f64::max);
        let first = sigma.first().copied().unwrap_or(top);
        let mut keep = norms.iter().take_while(|s| **s >= KEPT * top).count().max(1);
        if top <= f64::EPSILON * first {
            keep = l; // rounding is all that is left
        }
        sigma.extend(&norms[..keep]);
        u.extend(&qt[..keep * k]);
        c.chunks_mut(n).zip(&norms[..keep]).for_each(|(c, s)| {
            c.iter_mut().for_each(|c| *c = if *s > 0.0 { *c / s } else { 0.0 });
        });
        let kept = c.drain(..keep * n).collect::<Vec<f64>>();
        v.extend(&kept);
        if keep == l {
            break;
        }
        let cpu = Cpu::default();
        let kept = Tensor::from_vec(&cpu, [keep, n], kept); // [keep, n]
        rest = Tensor::from_vec(&cpu, [l - keep, n], c); // [l − keep, n]
        // what rounding left in the small directions of the large ones
        rest = rest.sub(&rest.matmul(kept.t()).matmul(&kept)); // [l − keep, n]
        let left = Tensor::from_vec(&cpu, [l - keep, k], qt[keep * k..].to_vec()); // [l − keep, k]
        basis = Some(Tensor::from_vec(&cpu, [k, l - keep], transposed(&left))); // [k, l − keep]
    }
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|&i, &j| sigma[j].total_cmp(&sigma[i]));
    let v = order.iter().flat_map(|&i| &v[i * n..][..n]).copied().collect();
    let u = Tensor::from_fn(&Cpu::default(), [k, k], |i| u[order[i % k] * k + i / k]); // [k, k]
    let sigma = order.iter().map(|&i| sigma[i]).collect();
    (u, sigma, Tensor::from_vec(&Cpu::default(), [k, n], v)) // [k, n]
}

fn transposed(x: &Matrix) -> Vec<f64> {
    let (rows, cols, x) = (x.rows(), x.cols(), x.buffer());
    (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
}

/// Eigenvectors of a symmetric matrix in the columns of Q [k, k], the largest eigenvalue's first.
fn eigenvectors(g: &Matrix) -> Matrix {
    let n = g.rows();
    let form = Tridiagonal::of(g);
    let (eigenvalues, turns) = diagonalise(form.d.clone(), form.e.clone());
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| eigenvalues[j].total_cmp(&eigenvalues[i]));
    let mut q = Tensor::scratch(&Cpu::default(), [n, n]); // [k, k]
    q.buffer_mut().par_chunks_mut(ROWS * n).enumerate().for_each(|(chunk, out)| {
        let mut rows = vec![[0.0; ROWS]; n]; // of Q, starting as those of the identity: [column][row]
        for row in 0..out.len() / n {
            rows[chunk * ROWS + row][row] = 1.0;
        }
        simd(
            #[inline(always)]
            || {
                form.reflect(&mut rows);
                turn(&turns, &mut rows);
            },
        );
        for (row, out) in out.chunks_mut(n).enumerate() {
            out.iter_mut().zip(&order).for_each(|(out, &j)| *out = rows[j][row]);
        }
    });
    q
}

/// G = H·T·Hᵀ, H = H_0·H_1·…, H_j = I − τ_j·v_j·v_jᵀ with a v_j that is zero up to and including j.
struct Tridiagonal {
    /// Row j holds v_j, right of the diagonal.
    g: Vec<f64>,
    tau: Vec<f64>,
    d: Vec<f64>,
    e: Vec<f64>,
}

impl Tridiagonal {
    /// H_j·G·H_j is G − v·wᵀ − w·vᵀ with p = τ·G·v, w = p − ½τ(pᵀv)·v. The pass that subtracts one step's v and w multiplies each
    /// row with the next step's v, for which only row j must have been brought up to date before.
    fn of(g: &Matrix) -> Self {
        let n = g.rows();
        let mut g = g.to_vec();
        let (mut tau, mut d, mut e) = (vec![0.0; n], vec![0.0; n], vec![0.0; n.saturating_sub(1)]);
        let (mut v, mut w) = (vec![0.0; n], vec![0.0; n]); // of the step before, from column j on
        for j in 0..n {
            let (above, below) = g.split_at_mut((j + 1) * n);
            let row = &mut above[j * n + j..];
            subtract(row, v[0], &w, w[0], &v);
            d[j] = row[0];
            if j + 1 == n {
                break;
            }
            (tau[j], e[j]) = householder(&mut row[1..]);
            let next = &row[1..];
            let (old_v, old_w) = (&v[1..], &w[1..]);
            let mut p = vec![0.0; n - j - 1];
            let rows = (GRAIN / next.len()).max(1);
            let chunks = below.par_chunks_mut(rows * n).zip(p.par_chunks_mut(rows)).enumerate();
            chunks.for_each(|(chunk, (g, p))| {
                let (old_v_rows, old_w_rows) = (&old_v[chunk * rows..], &old_w[chunk * rows..]);
                simd(
                    #[inline(always)]
                    || {
                        for (i, (g, p)) in g.chunks_mut(n).zip(p).enumerate() {
                            let g = &mut g[j + 1..];
                            subtract(g, old_v_rows[i], old_w, old_w_rows[i], old_v);
                            *p = tau[j] * dot(g, next);
                        }
                    },
                );
            });
            let half = 0.5 * tau[j] * dot(&p, next);
            p.iter_mut().zip(next).for_each(|(p, v)| *p -= half * v);
            (v, w) = (next.to_vec(), p);
        }
        Self { g, tau, d, e }
    }

    /// Rows ← rows·H.
    #[inline(always)]
    fn reflect(&self, rows: &mut [[f64; ROWS]]) {
        let n = self.tau.len();
        for (j, &tau) in self.tau.iter().enumerate().filter(|(_, tau)| **tau != 0.0) {
            let v = &self.g[j * n..][j + 1..n];
            let mut along = [0.0; ROWS];
            for (row, v) in rows[j + 1..].iter().zip(v) {
                for (along, x) in along.iter_mut().zip(row) {
                    *along += x * v;
                }
            }
            along.iter_mut().for_each(|x| *x *= tau);
            for (row, v) in rows[j + 1..].iter_mut().zip(v) {
                for (x, along) in row.iter_mut().zip(&along) {
                    *x -= along * v;
                }
            }
        }
    }
}

/// x ← x − a·y − b·z.
#[inline(always)]
fn subtract(x: &mut [f64], a: f64, y: &[f64], b: f64, z: &[f64]) {
    for ((x, y), z) in x.iter_mut().zip(y).zip(z) {
        *x -= a * y + b * z;
    }
}

/// Turns x into a v with (I − τ·v·vᵀ)·x = (α, 0, 0, …); returns τ and α.
fn householder(x: &mut [f64]) -> (f64, f64) {
    let (first, square) = (x[0], dot(&x[1..], &x[1..]));
    if square == 0.0 {
        x[1..].fill(0.0); // squares that underflow beside elements of about 1
        return (0.0, first);
    }
    let norm = (first * first + square).sqrt();
    let alpha = if first > 0.0 { -norm } else { norm }; // the sign with which x_0 − α does not cancel
    x[0] = first - alpha;
    (2.0 / (x[0] * x[0] + square), alpha)
}

/// Plane rotations [cos, sin] of the columns (`first`, `first` + 1), (`first` + 1, `first` + 2), …
struct Sweep {
    first: usize,
    rotations: Vec<[f64; 2]>,
}

/// The eigenvalues of T, and the rotations whose product has its eigenvectors in its columns.
fn diagonalise(mut d: Vec<f64>, mut e: Vec<f64>) -> (Vec<f64>, Vec<Sweep>) {
    let size = d.iter().chain(&e).fold(0.0, |max: f64, x| max.max(x.abs()));
    let zero = f64::EPSILON * size;
    let mut sweeps = Vec::new();
    let mut high = d.len() - 1;
    // about 1.5 sweeps an eigenvalue are usual; e that were left over would count as zero
    for _ in 0..30 * d.len() {
        while high > 0 && e[high - 1].abs() <= zero {
            high -= 1;
        }
        if high == 0 {
            break;
        }
        let first = (0..high - 1).rev().find(|&i| e[i].abs() <= zero).map_or(0, |i| i + 1);
        // the eigenvalue of the last 2×2 block that is nearer to its last element
        let (half, b) = (0.5 * (d[high - 1] - d[high]), e[high - 1]);
        let shift = d[high] - b * b / (half + half.hypot(b).copysign(half));
        let mut rotations = Vec::with_capacity(high - first);
        let (mut x, mut z) = (d[first] - shift, e[first]);
        for i in first..high {
            let r = x.hypot(z);
            let (c, s) = if r > 0.0 { (x / r, -z / r) } else { (1.0, 0.0) };
            if i > first {
                e[i - 1] = r;
            }
            // [c −s; s c]·[d_i e_i; e_i d_{i+1}]·[c s; −s c]
            let (upper, lower) = (
                [c * d[i] - s * e[i], c * e[i] - s * d[i + 1]],
                [s * d[i] + c * e[i], s * e[i] + c * d[i + 1]],
            );
            d[i] = c * upper[0] - s * upper[1];
            e[i] = s * upper[0] + c * upper[1];
            d[i + 1] = s * lower[0] + c * lower[1];
            if i + 1 < high {
                (x, z) = (e[i], -s * e[i + 1]); // z: an element beside the three diagonals, for the next to remove
                e[i + 1] *= c;
            }
            rotations.push([c, s]);
        }
        sweeps.push(Sweep { first, rotations });
    }
    (d, sweeps)
}

/// Rows ← rows·(rotations in turn): columns x, y become c·x − s·y, s·x + c·y.
#[inline(always)]
fn turn(sweeps: &[Sweep], rows: &mut [[f64; ROWS]]) {
    for Sweep { first, rotations } in sweeps {
        let mut x = rows[*first]; // stays in registers from one rotation to the next
        let columns = &mut rows[*first..=first + rotations.len()];
        for (i, [c, s]) in rotations.iter().enumerate() {
            let y = columns[i + 1];
            for row in 0..ROWS {
                columns[i][row] = c * x[row] - s * y[row];
                x[row] = s * x[row] + c * y[row];
            }
        }
        columns[rotations.len()] = x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::with_spectrum;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    /// X from singular vectors and values that are known, against what comes out. 1e-12 is 100·ε, by KEPT, times about √k roundings.
    fn check(k: usize, n: usize, sigma: &[f64]) {
        let x = with_spectrum::<f64>(&mut ChaCha8Rng::seed_from_u64(7), [k, n], sigma); // [k, n]
        let (u, found, v) = svd_wide(x.clone());
        let what = format!("{k}×{n}, σ {:?}…", &sigma[..k.min(4)]);
        let identity = |x: &Matrix, size: usize| {
            let off = |(i, x): (usize, f64)| (x - if i % (size + 1) == 0 { 1.0 } else { 0.0 }).abs();
            x.to_vec().into_iter().enumerate().map(off).fold(0.0, f64::max)
        };
        assert!(identity(&u.t().matmul(&u), k) < 1e-13, "{what}: U");
        let scaled = |power: f64| {
            Tensor::from_fn(&Cpu::default(), [k, n], |i| found[i / n].powf(power) * v.buffer()[i]) // [k, n]
        };
        assert!(u.matmul(&scaled(1.0)).sub(&x).norm() < 1e-12, "{what}: product");
        for (i, (found, want)) in found.iter().zip(sigma).enumerate() {
            assert!((found - want).abs() < 1e-12, "{what}: σ_{i} {found:e} {want:e}");
        }
        assert!(found.is_sorted_by(|a, b| a >= b), "{what}: order");
        // √Σ·Vᵀ is a factor of a pair: its columns' products are those of Σ
        let b = scaled(0.5); // [k, n]
        let gram = b.matmul(b.t()).to_vec(); // [k, k]
        for (i, x) in gram.iter().enumerate() {
            let want = if i % (k + 1) == 0 { found[i / k] } else { 0.0 };
            assert!((x - want).abs() < 1e-12, "{what}: V {} {}: {x:e} {want:e}", i / k, i % k);
        }
    }

    #[test]
    fn known_decompositions_are_found() {
        for (k, n) in [(1, 1), (1, 9), (2, 2), (3, 40), (17, 17), (64, 80), (97, 130)] {
            let spread =
                |f: &dyn Fn(f64) -> f64| (0..k).map(|i| f(i as f64 / k as f64)).collect::<Vec<f64>>();
            check(k, n, &spread(&|t| 1.0 - 0.9 * t));
            check(k, n, &spread(&|t| 10f64.powf(-14.0 * t))); // decades
            check(k, n, &spread(&|t| 10f64.powf(-(3.0 * t).floor() * 4.0))); // few, and equal ones
            check(k, n, &spread(&|_| 1.0));
            check(k, n, &spread(&|t| if t < 0.5 { 1.0 - 1e-9 * t } else { 0.0 })); // clustered, singular
            check(k, n, &spread(&|t| if t == 0.0 { 1.0 } else { 1e-3 * (1.0 - t) })); // one far above the rest
        }
    }

    #[test]
    fn zeros_and_diagonals_are_decomposed() {
        let zero = Tensor::zeros(&Cpu::default(), [3, 4]); // [k, n]
        let (u, sigma, v) = svd_wide(zero);
        assert_eq!((sigma, v.norm()), (vec![0.0; 3], 0.0));
        assert!((u.norm() - 3f64.sqrt()).abs() < 1e-15);
        let diagonal = [0.5, 1.0, 0.25];
        let x = Tensor::from_fn(&Cpu::default(), [3, 3], |i| if i % 4 == 0 { diagonal[i / 4] } else { 0.0 }); // [k, n]
        assert_eq!(svd_wide(x).1, [1.0, 0.5, 0.25]);
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let sigma: Vec<f64> = (0..150).map(|i| 0.95f64.powi(i)).collect();
        let x = with_spectrum::<f64>(&mut ChaCha8Rng::seed_from_u64(3), [150, 200], &sigma); // [k, n]
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (u, sigma, v) = pool.install(|| svd_wide(x.clone()));
            (u.to_vec(), sigma, v.to_vec())
        };
        let one = run(1);
        assert!(run(2) == one && run(5) == one);
    }
}
