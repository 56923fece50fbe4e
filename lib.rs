//! rankgrad: a tape-based autodiff tensor library in which a low-rank factor pair, W = A·Bᵀ, is a first-class parameter, and
//! in which Spectron (arXiv 2602.12429), an optimizer for such pairs, is built in.
//!
//! [`tour`] shows what there is, in programs that run.
//!
//! Reading order: [`tensor`] (shapes, the [`tensor::Backend`] trait, the CPU), [`autograd`] (the tape, then the ops: forward
//! with its backward below it), [`lowrank`] (pairs, Newton–Schulz, power iteration, Spectron); [`parallel`] is for several
//! workers. The README has a shorter path, with line counts, and examples/ one idea per file.
//!
//! ```
//! use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
//! use rankgrad::{autograd::Tape, lowrank::*, tensor::Cpu};
//!
//! let cpu = Cpu::<f32>::default();
//! let rng = &mut ChaCha8Rng::seed_from_u64(1);
//! let x = gaussian(&cpu, rng, [64, 24], 1.0); // [N, n]
//! let target = x.matmul(gaussian(&cpu, rng, [32, 24], 0.2).t()); // [N, m]
//!
//! let mut params = Params::default();
//! let layer = params.pair("layer", init_pair(&cpu, rng, [32, 24], 8, 0.2, PairInit::Spectral)); // [m, r], [n, r]
//! let mut optimizer = Optimizer::spectron(&params);
//! let mut losses = Vec::new();
//! for _ in 0..100 {
//!     let tape = Tape::new(&cpu);
//!     let w = params.on(&tape);
//!     let error = tape.constant(&x).lowrank_linear(w[layer].a, w[layer].b) - tape.constant(&target); // [N, m]
//!     let loss = (error * error).mean(); // [1]
//!     losses.push(loss.value().item());
//!     let grads = w.gradients(loss.backward());
//!     optimizer.step(&mut params, &grads, 0.1, 1e-3); // η of the pairs, AdamW's rate for the rest
//! }
//! assert!(losses[99] < 0.5 * losses[0]);
//! ```

pub mod autograd;
#[cfg(any(feature = "cuda", feature = "simulator"))]
pub mod gpu;
pub mod lowrank;
pub mod parallel;
pub mod tensor;
#[cfg(feature = "proptest")]
pub mod testing;
pub mod tour;
