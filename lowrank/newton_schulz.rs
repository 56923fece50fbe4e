//! Newton–Schulz orthogonalisation: a matrix towards the nearest one with orthonormal columns (or rows), by products alone.
//!
//! Not an exact polar factor: with the usual coefficients the singular values land near 1, not at 1. A pure function over a
//! batch of same-shaped matrices, so that a device can run it as one batch.
//! Letters: M input, X iterate, G Gram matrix of X over its shorter side, U·Σ·Vᵀ the SVD of M.

use crate::tensor::{Accum, Backend, Mat, Tensor};

/// Coefficients (a, b, c) and number of steps of the iteration X ← aX + bXG + cXG².
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NewtonSchulz {
    pub coefficients: [f64; 3],
    pub steps: usize,
}

impl Default for NewtonSchulz {
    /// Five steps with (3.4445, −4.7750, 2.0315): Jordan et al. 2024 (Muon), used by Spectron's Algorithm 2. They trade an
    /// exact limit for speed near zero: 3.4445 per step there.
    fn default() -> Self {
        Self { coefficients: [3.4445, -4.7750, 2.0315], steps: 5 }
    }
}

impl NewtonSchulz {
    /// What one step does to a singular value: p(x) = ax + bx³ + cx⁵.
    pub fn map(&self, x: f64) -> f64 {
        let [a, b, c] = self.coefficients;
        x * (a + x * x * (b + x * x * c))
    }
}

/// ≈ U·Vᵀ of each M in a batch of one shape [p, q]; 0 for M = 0 (and for momenta that have not started).
///
/// M is first divided by ‖M‖_F, which is at least its largest singular value, so that all start in [0, 1]. The singular
/// vectors never change; each singular value follows [`NewtonSchulz::map`]. With the default, five steps bring
/// σ/‖M‖_F ≥ 1.5e-3 into [0.68, 1.2024], and no σ can exceed 1.2024 (the map's maximum on [0, 1] is 1.20237, and it sends
/// [0, 1.2024] into itself).
///
/// # Panics
/// If the matrices are not of one shape.
#[track_caller]
pub fn newton_schulz<B: Backend>(batch: &[&Tensor<B>], how: NewtonSchulz) -> Vec<Tensor<B>> {
    let Some(first) = batch.first() else { return Vec::new() };
    let shape = first.shape();
    let (p, q) = shape.matrix("newton_schulz");
    let [a, b, c] = how.coefficients;
    let tall = p >= q;
    let r = p.min(q);
    let device = first.device();
    let scratch = |shape: [usize; 2]| -> Vec<Tensor<B>> {
        batch.iter().map(|_| Tensor::scratch(device, shape)).collect()
    };

    let mut xs: Vec<_> = batch.iter().map(|m| unit_norm(m)).collect(); // [p, q] each
    let (mut gs, mut squares) = (scratch([r, r]), scratch([r, r])); // [r, r] each
    for _ in 0..how.steps {
        // G = XᵀX, over the shorter side
        let (left, right): (Vec<_>, Vec<_>) =
            xs.iter().map(|x| if tall { (x.t(), x.into()) } else { (x.into(), x.t()) }).unzip();
        products(&left, &right, &mut gs, Accum::Replace); // [r, r]
        let g: Vec<Mat<B>> = gs.iter().map(Mat::from).collect();
        products(&g, &g, &mut squares, Accum::Replace); // [r, r]
        for (g, square) in gs.iter_mut().zip(&squares) {
            g.axpby(c, square, b); // bG + cG²
        }
        let mut next: Vec<_> = xs.iter().map(|x| x.scale(a)).collect(); // [p, q]
        let x: Vec<Mat<B>> = xs.iter().map(Mat::from).collect();
        let g: Vec<Mat<B>> = gs.iter().map(Mat::from).collect();
        if tall {
            products(&x, &g, &mut next, Accum::Add); // [p, q]
        } else {
            products(&g, &x, &mut next, Accum::Add); // [p, q]
        }
        xs = next;
    }
    xs
}

fn products<B: Backend>(a: &[Mat<B>], b: &[Mat<B>], c: &mut [Tensor<B>], accum: Accum) {
    B::gemm(a, b, &mut c.iter_mut().collect::<Vec<_>>(), accum);
}

/// M / ‖M‖_F, or 0. In two factors where 1/‖M‖ itself would overflow the element type.
pub(crate) fn unit_norm<B: Backend>(m: &Tensor<B>) -> Tensor<B> {
    let norm = m.norm();
    if norm == 0.0 {
        return m.zeros_like(); // [p, q]
    }
    if norm > 1e-30 {
        return m.scale(1.0 / norm); // [p, q]
    }
    let grown = m.scale(1e30); // [p, q]
    grown.scale(1.0 / grown.norm()) // [p, q]
}
