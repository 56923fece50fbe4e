//! The spectral norm (largest singular value) of a matrix, estimated by power iteration.
//!
//! An estimate from below, always; bounds from above, with proof, are in certificate.rs. Letters: W [p, q]; u [p, 1], v [q, 1] unit vectors; σ the largest singular value.

use crate::tensor::{Backend, Element, Mat, Tensor, items_per_task, product_shape, products};
use rayon::prelude::*;

/// Power iteration on a batch, Algorithm 3 of the Spectron paper (arXiv 2602.12429): v ← Wᵀu/‖Wᵀu‖, then `steps` times
/// u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖; σ ≈ uᵀWv, which is ‖Wᵀu‖ as v stands. The vectors `u` are kept between calls: a matrix
/// that moves little needs one step per call. For W·v = 0 u stays, and for Wᵀu = 0 the estimate is 0. The estimates stay where they
/// were computed until [`Backend::read`]; on a processor they are a vector.
///
/// # Panics
/// If a u does not have as many elements as its W has rows.
#[track_caller]
pub fn power_iteration<B: Backend>(ws: &[&Tensor<B>], us: &mut [Tensor<B>], steps: usize) -> B::Norms {
    assert!(ws.len() == us.len(), "power_iteration: {} matrices, {} vectors", ws.len(), us.len());
    for (w, u) in ws.iter().zip(&*us) {
        product_shape("power_iteration", w.t(), u.into());
    }
    let some = |(ws, us): (&[&Tensor<B>], &mut [Tensor<B>])| -> Vec<Tensor<B>> {
        let back = |us: &[Tensor<B>]| products(ws.iter().zip(us).map(|(w, u)| (w.t(), u.into()))); // [q, 1] each
        for _ in 0..steps {
            let vs = back(us); // [q, 1] each
            let vs = B::normalised(&vs.iter().zip(&vs).collect::<Vec<_>>()); // [q, 1] each
            let next = products(ws.iter().zip(&vs).map(|(&w, v)| (Mat::from(w), v.into()))); // [p, 1] each
            let next = B::normalised(&next.iter().zip(&*us).collect::<Vec<_>>()); // [p, 1] each
            us.clone_from_slice(&next);
        }
        if steps > 0 { back(us) } else { back(&B::normalised(&us.iter().zip(&*us).collect::<Vec<_>>())) } // [q, 1] each
    };
    let bytes = ws.first().map_or(0, |w| w.len() * size_of::<B::Elem>());
    let each = items_per_task::<B>(bytes);
    let vs: Vec<_> = ws.par_chunks(each).zip(us.par_chunks_mut(each)).flat_map_iter(some).collect(); // [q, 1] each
    B::norms(&vs.iter().collect::<Vec<_>>())
}

/// An estimate of σ(W): `steps` of power iteration from [`start_vector`]. From below up to rounding, since it is uᵀWv for unit
/// vectors u and v, and σ(W) is the largest such number.
///
/// # Panics
/// If W is not a matrix.
#[track_caller]
pub fn spectral_norm_estimate<B: Backend>(w: &Tensor<B>, steps: usize) -> f64 {
    let (p, _) = w.shape().matrix("spectral_norm_estimate");
    B::read(&power_iteration(&[w], &mut [start_vector(w.device(), p)], steps))[0]
}

/// A fixed vector [p, 1] to start power iteration from: white noise in (−1, 1), the same on every machine. It is not
/// orthogonal to any vector that a model would come up with.
pub fn start_vector<B: Backend>(device: &B, p: usize) -> Tensor<B> {
    Tensor::from_fn(device, [p, 1], |i| B::Elem::of(noise(i as u32, 0))) // [p, 1]
}

/// A hash of (i, stream) in [−1, 1): an integer mix by multiplication and shifts, easy to repeat in any language.
pub(crate) fn noise(i: u32, stream: u32) -> f64 {
    let seed = stream.wrapping_add(1).wrapping_mul(2_246_822_519);
    let mut h = i.wrapping_mul(2_654_435_761).wrapping_add(seed);
    h ^= h >> 15;
    h = h.wrapping_mul(3_266_489_917);
    h ^= h >> 13;
    (h >> 8) as f64 / (1 << 23) as f64 - 1.0
}
