//! A tour of the library, in programs that run as tests. Nothing is defined here.
//!
//! # Tensors
//!
//! A [`Tensor`](crate::tensor::Tensor) is a shape and a contiguous, row-major buffer on a device; a clone shares the buffer. Arrays of
//! the crate ndarray become tensors and back without a copy where their layout allows.
//!
//! ```
//! use ndarray::{ArrayD, array};
//! use rankgrad::tensor::{Cpu, Tensor};
//!
//! let x = Tensor::from(array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]); // [3, 2], on Cpu<f64>
//! let gram = x.t().matmul(&x); // [2, 2]; the transpose is a flag of the product
//! assert_eq!(gram.to_vec(), [35.0, 44.0, 44.0, 56.0]);
//! let back: ArrayD<f64> = gram.into();
//! assert_eq!(back[[0, 1]], 44.0);
//!
//! let cpu = Cpu::<f32>::default();
//! let zeros = Tensor::zeros(&cpu, [2, 3]); // [2, 3]
//! assert_eq!(zeros.shape().to_string(), "[2, 3]");
//! ```
//!
//! # Derivatives
//!
//! Operations on a [`Var`](crate::autograd::Var) are appended to a [`Tape`](crate::autograd::Tape); `backward` consumes it, last
//! operation first.
//!
//! ```
//! use rankgrad::{autograd::Tape, tensor::{Cpu, Tensor}};
//!
//! let cpu = Cpu::<f64>::default();
//! let tape = Tape::new(&cpu);
//! let x = tape.leaf(&Tensor::from_vec(&cpu, [2], vec![1.0, 2.0])); // [2]
//! let y = (x * x * x).sum(); // [1]
//! assert_eq!(y.backward().get(x).unwrap().to_vec(), [3.0, 12.0]);
//! ```
//!
//! An operation of your own is a value together with its backward, given to [`Tape::record`](crate::autograd::Tape::record);
//! [`gradcheck`](crate::autograd::gradcheck()) compares a gradient with differences of the values:
//!
//! ```
//! use rankgrad::{autograd::{Var, gradcheck}, tensor::{Cpu, Tensor}};
//!
//! /// x·M with a matrix M [n, k] that is not trained.
//! fn times<'t>(x: Var<'t, Cpu<f64>>, m: &Tensor<Cpu<f64>>) -> Var<'t, Cpu<f64>> {
//!     let y = x.value().matmul(m); // [N, k]
//!     let (id, m) = (x.id(), m.clone());
//!     x.tape().record("times", &[x], y, move |dy, grads| {
//!         grads.add(id, dy.matmul(m.t())); // [N, n]
//!     })
//! }
//!
//! let cpu = Cpu::default();
//! let values = |shape| Tensor::from_fn(&cpu, shape, |i| (i * i % 7) as f64 - 3.0);
//! let (x, m) = (values([2, 3]), values([3, 4])); // [N, n], [n, k]
//! assert!(gradcheck(&[x], 1, |_, x| times(x[0], &m))[0].error < 1e-6);
//! ```
//!
//! # Factor pairs
//!
//! A [`FactorPair`](crate::lowrank::FactorPair) is W = A·Bᵀ, A [m, r], B [n, r]. It is drawn as the truncated SVD of a dense
//! initialisation would be, or made of a matrix; it multiplies by way of its rank, and knows its spectrum without forming W.
//!
//! ```
//! use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
//! use rankgrad::{lowrank::*, tensor::{Cpu, Tensor}};
//!
//! let cpu = Cpu::<f64>::default();
//! let rng = &mut ChaCha8Rng::seed_from_u64(1);
//! let pair = init_pair(&cpu, rng, [40, 30], 6, 0.02, PairInit::Spectral); // [m, r], [n, r]
//! assert_eq!((pair.outputs(), pair.inputs(), pair.rank()), (40, 30, 6));
//!
//! // the best pair of rank 4, and what it loses: √Σ dropped σ²
//! let sigma = pair.singular_values();
//! let (cut, error) = pair.truncate(4);
//! assert!((error - (sigma[4].powi(2) + sigma[5].powi(2)).sqrt()).abs() < 1e-12);
//! assert_eq!(cut.rank(), 4);
//!
//! // (λA, B/λ) is the same W in another gauge; `balance` brings AᵀA = BᵀB
//! let scaled = FactorPair::new(pair.a.scale(10.0), pair.b.scale(0.1)); // [m, r], [n, r]
//! assert!(scaled.gauge_imbalance() > 100.0 * scaled.balance().gauge_imbalance());
//! ```
//!
//! # Training
//!
//! Parameters live in one arena, [`Params`](crate::lowrank::Params), that hands out `Copy` handles. Their kind decides who moves
//! them: pairs go to Spectron, or to another [`Rule`](crate::lowrank::Rule), hidden matrices that are kept whole to a rule of
//! theirs, all else to AdamW. The example at the [top of this documentation](crate) is a whole training run.
//!
//! ```
//! use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
//! use rankgrad::{autograd::Tape, lowrank::*, tensor::Cpu};
//!
//! let cpu = Cpu::<f32>::default();
//! let rng = &mut ChaCha8Rng::seed_from_u64(1);
//! let mut params = Params::default();
//! let layer = params.pair("layer", init_pair(&cpu, rng, [32, 16], 4, 0.2, PairInit::Spectral)); // [m, r], [n, r]
//! let head = params.dense("head", gaussian(&cpu, rng, [3, 32], 0.2)); // [v, m]
//!
//! // every step is proven to change W by at most η in spectral norm
//! let certified = SpectronConfig { certify: true, ..SpectronConfig::default() };
//! let pairs = Spectron::with(certified, &params.values.pairs);
//! let mut optimizer = Optimizer::new(pairs, &params);
//! let schedule = Schedule { kind: ScheduleKind::Cosine, steps: 50, warmup: 5, end: 0.1 };
//!
//! let x = gaussian(&cpu, rng, [24, 16], 1.0); // [N, n]
//! let labels: Vec<u32> = (0..24).map(|i| i % 3).collect();
//! let eta = 0.1;
//! for step in 0..schedule.steps {
//!     let before = params.values.pairs[0].clone();
//!     let tape = Tape::new(&cpu);
//!     let w = params.on(&tape);
//!     let h = tape.constant(&x).lowrank_linear(w[layer].a, w[layer].b).silu(); // [N, m]
//!     let loss = h.linear(w[head]).cross_entropy(&labels); // [1]
//!     let mut grads = w.gradients(loss.backward());
//!     clip_global_norm(&mut grads, 1.0);
//!     let lr = eta * schedule.factor(step);
//!     optimizer.step(&mut params, &grads, lr, 1e-2);
//!     let moved = params.values.pairs[0].change_since(&before).spectral_norm();
//!     assert!(moved <= lr * (1.0 + 1e-5));
//! }
//! ```
//!
//! The pieces are functions of their own: [`newton_schulz`](crate::lowrank::newton_schulz()) and the other
//! [`Orthogonaliser`](crate::lowrank::Orthogonaliser)s, [`power_iteration`](crate::lowrank::power_iteration) (σ from below),
//! [`spectral_norm_upper_bound`](crate::lowrank::spectral_norm_upper_bound) and
//! [`certify_spectral_norm`](crate::lowrank::certify_spectral_norm) (σ from above),
//! [`update_radius`](crate::lowrank::update_radius), [`exact_radius`](crate::lowrank::exact_radius), and
//! [`pair_telemetry`](crate::lowrank::pair_telemetry), what a step did to a pair.
//!
//! # Features
//!
//! None is on by default.
//!
//! | feature | what it adds |
//! |---|---|
//! | `serde` | `Serialize` and `Deserialize` for what configures: [`SpectronConfig`](crate::lowrank::SpectronConfig), `Orthogonaliser`, `NewtonSchulz`, `Radius`, `MuonScale`, `PairInit`, [`Schedule`](crate::lowrank::Schedule) |
//! | `proptest` | the module `testing`: strategies and assertions for property tests of low-rank mathematics |
//! | `cuda` | the module `gpu`: the same tape on an NVIDIA GPU, libraries found at run time |
//! | `simulator` | the kernels of `gpu` on the processor, through a C++ compiler: test equipment |
//!
//! # Versions
//!
//! Versions follow [Semantic Versioning](https://semver.org): while they begin with 0, the middle number rises with every change that
//! can break a caller. The oldest Rust is the `rust-version` of Cargo.toml, 1.89; a newer one is asked for in a new middle number only.
