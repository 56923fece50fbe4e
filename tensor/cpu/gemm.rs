//! Batches of matrix products, cut into one piece per thread.
//!
//! Each element of C is one sum over k in a fixed order, whichever rows or columns of C a call computes; so the cut cannot
//! change a result. tests/threads.rs holds that to the bit.
//! Letters: C (m×n) = A (m×k) · B (k×n).

use super::{Accum, Cpu, Mat, Product, Scalar, Tensor};
use rayon::prelude::*;

/// Below this many multiply-adds, which take one thread about 30 µs, a second one is left alone: it takes about 5 µs to wake,
/// and copies B for itself.
const WORTH_SHARING: usize = 1 << 21;

/// A matrix in memory: first element, row stride, column stride.
#[derive(Clone, Copy)]
struct Raw<P> {
    first: P,
    row: isize,
    col: isize,
}

/// One product, or the piece of one, ready to run.
struct Task<T> {
    sizes: [usize; 3],
    a: Raw<*const T>,
    b: Raw<*const T>,
    c: Raw<*mut T>,
    /// As in [`Product`].
    lower: Option<usize>,
}
// SAFETY: `gemm` makes tasks that write disjoint parts of C and only read A and B, which outlive them
unsafe impl<T: Send> Send for Task<T> {}
unsafe impl<T: Sync> Sync for Task<T> {}

impl<T: Scalar> Task<T> {
    fn run(&self, accum: Accum) {
        let Self { sizes, a, b, c, lower } = *self;
        // SAFETY: `gemm` derived pointers, sizes and strides from live tensors of matching shapes
        unsafe {
            T::gemm(Product {
                sizes,
                a: (a.first, a.row, a.col),
                b: (b.first, b.row, b.col),
                accum,
                c: (c.first, c.row),
                lower,
            });
        }
    }
}

fn raw<T: Scalar>(mat: &Mat<Cpu<T>>) -> Raw<*const T> {
    // the slice refuses a buffer shorter than its shape, which a user could hand over
    let first = mat.tensor.buffer()[..mat.tensor.len()].as_ptr();
    let stride = mat.tensor.cols() as isize;
    let (row, col) = if mat.transposed { (1, stride) } else { (stride, 1) };
    Raw { first, row, col }
}

/// `symmetric`: so are the products, and only what is on and below their diagonals will be read.
pub(super) fn gemm<T: Scalar>(
    a: &[Mat<Cpu<T>>],
    b: &[Mat<Cpu<T>>],
    c: &mut [&mut Tensor<Cpu<T>>],
    accum: Accum,
    symmetric: bool,
) {
    assert!(a.len() == c.len() && b.len() == c.len(), "gemm: batch sizes differ");
    let Some(first) = a.first() else { return };
    let ((m, k), n) = (first.sizes(), b[0].sizes().1);
    if m * n == 0 {
        return;
    }
    let threads = rayon::current_num_threads();
    let shared = threads > 1 && c.len() * m * k * n >= WORTH_SHARING;
    let pieces = if shared { threads.div_ceil(c.len()) } else { 1 };

    let mut tasks = Vec::with_capacity(c.len() * pieces);
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        assert!(
            a.sizes() == (m, k) && b.sizes() == (k, n) && (c.rows(), c.cols()) == (m, n),
            "gemm: {} · {} → {}: every product of a batch has one shape",
            a,
            b,
            c.shape()
        );
        let (a, b) = (raw(a), raw(b));
        let c = Raw { first: c.buffer_mut()[..m * n].as_mut_ptr(), row: n as isize, col: 1 };
        // the longer side of C is cut, in multiples of the microkernel's 16
        let by_rows = m >= n;
        let long = if by_rows { m } else { n };
        let step = long.div_ceil(pieces).next_multiple_of(16);
        for start in (0..long).step_by(step) {
            let size = step.min(long - start);
            let at = start as isize;
            // SAFETY: start < m (or n), so the moved pointers stay inside their matrices
            tasks.push(unsafe {
                if by_rows {
                    let a = Raw { first: a.first.offset(at * a.row), ..a };
                    let c = Raw { first: c.first.offset(at * c.row), ..c };
                    Task { sizes: [size, k, n], a, b, c, lower: symmetric.then_some(start) }
                } else {
                    let b = Raw { first: b.first.offset(at * b.col), ..b };
                    let c = Raw { first: c.first.offset(at * c.col), ..c };
                    Task { sizes: [m, k, size], a, b, c, lower: None }
                }
            });
        }
    }
    if shared {
        tasks.par_iter().for_each(|task| task.run(accum));
    } else {
        tasks.iter().for_each(|task| task.run(accum));
    }
}

pub(super) fn gemm_symmetric<T: Scalar>(a: &[Mat<Cpu<T>>], b: &[Mat<Cpu<T>>], c: &mut [&mut Tensor<Cpu<T>>]) {
    gemm(a, b, c, Accum::Replace, true);
    for c in c {
        mirror(c.cols(), c.buffer_mut());
    }
}

/// Copies what is below the diagonal of a matrix of `n` columns over what is above it, in blocks whose rows and columns both
/// stay in the first-level cache.
fn mirror<T: Scalar>(n: usize, c: &mut [T]) {
    const BLOCK: usize = 16;
    for i0 in (0..n).step_by(BLOCK) {
        for j0 in (0..=i0).step_by(BLOCK) {
            for i in i0..n.min(i0 + BLOCK) {
                for j in j0..i.min(j0 + BLOCK) {
                    c[j * n + i] = c[i * n + j];
                }
            }
        }
    }
}
