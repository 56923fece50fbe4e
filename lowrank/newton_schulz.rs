//! Newton–Schulz orthogonalisation: a matrix towards the nearest one with orthonormal columns (or rows), by products alone.
//!
//! Not an exact polar factor: with the usual coefficients the singular values land near 1, not at 1 (orthogonaliser.rs has
//! the alternatives). A pure function over a batch of same-shaped matrices, so that a device can run it as one batch.
//! What the polynomials do to a singular value, and which steps share a Gram matrix, is in quintic.rs.
//! Letters: M [p, q] input, X iterate, G Gram matrix of X over its shorter side r, P polynomial in G, U·Σ·Vᵀ the SVD of M.

use super::Orthogonaliser;
use super::quintic::{bounds, groups, odd_quintic};
use crate::tensor::{Accum, Backend, Mat, Tensor, items_per_task, same_shape};
use rayon::prelude::*;

/// Coefficients (a, b, c) and number of steps of the iteration X ← aX + bXG + cXG².
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct NewtonSchulz {
    pub coefficients: [f64; 3],
    pub steps: usize,
    /// Where the iteration runs. The result is the same but for rounding.
    pub space: Space,
}

/// Where steps X ← X·(aI + bG + cG²) are evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Space {
    /// On X [p, q], as printed: G = XᵀX anew in every step.
    Plain,
    /// On r×r matrices where that takes fewer FLOPs (for the default steps, from p = 1.5·r on): see [`newton_schulz`].
    Gram,
    /// As `Plain`, on a GPU in bf16 with sums in f32: within 3 % (Frobenius norm) of the result in f32, and many times as fast.
    Bf16,
}

impl Default for NewtonSchulz {
    /// Five steps with (3.4445, −4.7750, 2.0315): Jordan et al. 2024 (Muon), used by Spectron's Algorithm 2. They trade an
    /// exact limit for speed near zero: 3.4445 per step there.
    fn default() -> Self {
        Self { coefficients: [3.4445, -4.7750, 2.0315], steps: 5, space: Space::Gram }
    }
}

impl NewtonSchulz {
    /// What one step does to a singular value: p(x) = ax + bx³ + cx⁵.
    pub fn map(&self, x: f64) -> f64 {
        odd_quintic(self.coefficients, x)
    }

    /// A proven bound of every singular value that the steps can produce from [0, 1], in exact arithmetic; infinite if the
    /// coefficients diverge. With the default: 1.20237, at the first step, and no more from there on.
    pub fn norm_bound(&self) -> f64 {
        bounds(&self.schedule()).0
    }

    pub(super) fn schedule(&self) -> Vec<[f64; 3]> {
        vec![self.coefficients; self.steps]
    }
}

/// ≈ U·Vᵀ of each M in a batch of one shape [p, q]; 0 for M = 0 (and for momenta that have not started).
///
/// M is first divided by ‖M‖_F, which is at least its largest singular value, so that all start in [0, 1]. The singular
/// vectors never change; each singular value follows [`NewtonSchulz::map`]. With the default, five steps bring
/// σ/‖M‖_F ≥ 1.51e-3 into [0.68, 1.2024], and no σ can exceed 1.2024 (the map's maximum on [0, 1] is 1.20237, and it sends
/// [0, 1.2024] into itself).
///
/// In Gram space (Amsel et al. 2025, arXiv 2505.16932, section on rectangular matrices): X_k = X₀·P_k, where P_k and G_k are
/// polynomials in G₀ = X₀ᵀX₀, so all of them commute, and with Q = aI + bG + cG² a step is P ← P·Q, G ← Q·G·Q. Only G₀ and
/// the product X₀·P at the end cost p·r². Rounding errors of G grow by a² per step where singular values are small, so X is
/// formed and G computed anew before they have grown 200 times: for the default steps once, after the second.
///
/// # Panics
/// If the matrices are not of one shape.
#[track_caller]
pub fn newton_schulz<B: Backend>(batch: &[&Tensor<B>], how: NewtonSchulz) -> Vec<Tensor<B>> {
    Orthogonaliser::NewtonSchulz(how).apply(batch) // [p, q] each
}

/// Newton–Schulz with coefficients that may differ from step to step.
#[track_caller]
pub(super) fn iterate<B: Backend>(
    batch: &[&Tensor<B>],
    schedule: &[[f64; 3]],
    space: Space,
) -> Vec<Tensor<B>> {
    let Some(first) = batch.first() else { return Vec::new() };
    let (p, q) = first.shape().matrix("newton_schulz");
    for m in batch {
        same_shape("newton_schulz", first, m);
    }
    let groups = groups(schedule, space, p, q);
    let r = p.min(q);
    let bytes = (2 * p * q + 5 * r * r) * size_of::<B::Elem>();
    batch
        .par_chunks(items_per_task::<B>(bytes))
        .flat_map_iter(|batch| iterate_groups(batch, &groups))
        .collect()
}

fn iterate_groups<B: Backend>(batch: &[&Tensor<B>], groups: &[&[[f64; 3]]]) -> Vec<Tensor<B>> {
    let (p, q) = (batch[0].rows(), batch[0].cols());
    let tall = p >= q;
    let r = p.min(q);
    let device = batch[0].device();
    let scratch = |shape: [usize; 2]| -> Vec<Tensor<B>> {
        batch.iter().map(|_| Tensor::scratch(device, shape)).collect()
    };
    let identity = Tensor::identity(device, r); // [r, r]

    let mut xs = B::normalised(&batch.iter().map(|&m| (m, m)).collect::<Vec<_>>()); // [p, q] each
    let mut next = scratch([p, q]); // [p, q] each
    let [mut gs, mut qs, mut ps, mut spare] = [(); 4].map(|()| scratch([r, r])); // [r, r] each
    for group in groups {
        // G = XᵀX, over the shorter side
        let (left, right): (Vec<Mat<B>>, Vec<Mat<B>>) =
            xs.iter().map(|x| if tall { (x.t(), x.into()) } else { (x.into(), x.t()) }).unzip();
        B::gemm_symmetric(&left, &right, &mut gs.iter_mut().collect::<Vec<_>>()); // [r, r]
        for (k, &[a, b, c]) in group.iter().enumerate() {
            let q_k = if k == 0 { &mut ps } else { &mut qs }; // P begins as Q
            symmetric_products(&gs, &gs, q_k); // [r, r]
            let plus_g = q_k.iter_mut().zip(&gs).map(|(q, g)| (b, g, c, q));
            B::axpby(plus_g.collect());
            let plus_i = q_k.iter_mut().map(|q| (a, &identity, 1.0, q));
            B::axpby(plus_i.collect()); // Q = aI + bG + cG²
            if k > 0 {
                symmetric_products(&ps, &qs, &mut spare); // [r, r]
                std::mem::swap(&mut ps, &mut spare); // P ← P·Q
            }
            if k + 1 < group.len() {
                let q_k = if k == 0 { &ps } else { &qs };
                symmetric_products(&gs, q_k, &mut spare); // [r, r]
                symmetric_products(&spare, q_k, &mut gs); // G ← G·Q·Q
            }
        }
        if tall {
            products(&xs, &ps, &mut next); // [p, q]
        } else {
            products(&ps, &xs, &mut next); // [p, q]
        }
        std::mem::swap(&mut xs, &mut next);
    }
    xs
}

/// Of polynomials in one symmetric matrix, which commute: symmetric again.
fn symmetric_products<B: Backend>(a: &[Tensor<B>], b: &[Tensor<B>], c: &mut [Tensor<B>]) {
    let a: Vec<Mat<B>> = a.iter().map(Mat::from).collect();
    let b: Vec<Mat<B>> = b.iter().map(Mat::from).collect();
    B::gemm_symmetric(&a, &b, &mut c.iter_mut().collect::<Vec<_>>());
}

fn products<B: Backend>(a: &[Tensor<B>], b: &[Tensor<B>], c: &mut [Tensor<B>]) {
    let a: Vec<Mat<B>> = a.iter().map(Mat::from).collect();
    let b: Vec<Mat<B>> = b.iter().map(Mat::from).collect();
    B::gemm(&a, &b, &mut c.iter_mut().collect::<Vec<_>>(), Accum::Replace);
}
