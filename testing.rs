//! Property tests of low-rank mathematics, for your own update rules and ops as for the library's: strategies that draw
//! factor pairs, matrices, spectra and gauges, and assertions that print what a person needs. Behind the feature `proptest`.
//!
//! A strategy draws a *case*: a few numbers and a seed, from which tensors are built, always the same ones. So a failure is
//! one line that can be pasted into an ordinary test, one case serves f32 and f64, and shrinking goes to small sizes, scale
//! 1, gauge 1 and equal singular values (not as far where it depends on the seed whether a property fails: test G and −G,
//! not one of them). The assertions panic at the caller's line, in `proptest!` and in plain tests. Not
//! in `lowrank`, since functions and gradients are checked here too; not a second implementation of anything there.
//! Letters: W [m, n] = A·Bᵀ, r rank, σ singular values, u unit roundoff of the element type (2⁻²⁴ for f32, 2⁻⁵³ for f64).
//!
//! ```
//! use proptest::prelude::*;
//! use rankgrad::{lowrank::{FactorPair, Rule, Spectron, SpectronConfig}, testing::*};
//!
//! proptest! {
//!     fn a_step_stays_within_eta(case in pair_case(), gradient in pair_case(), eta in 1e-3..1.0f64) {
//!         let mut pairs = [case.pair::<f32>()]; // [m, r], [n, r]
//!         let before = pairs[0].clone();
//!         let gradient = PairCase { m: case.m, n: case.n, r: case.r, ..gradient }.pair();
//!         let mut rule = Spectron::with(SpectronConfig { certify: true, ..Default::default() }, &pairs);
//!         rule.step(&mut pairs, &[gradient], &[eta], 1);
//!         assert_spectral_norm_le(&pairs[0].change_since(&before), eta * (1.0 + 1e-5));
//!     }
//! }
//! a_step_stays_within_eta(); // in a test file: #[test] above it instead
//! ```

use crate::autograd::{self, Tape, Var};
use crate::lowrank::{FactorPair, gaussian};
use crate::tensor::{Backend, Cpu, Element, Scalar, Shape, Tensor};
use nalgebra::DMatrix;
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestCaseError, TestError, TestRunner};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use std::fmt;
use std::ops::RangeInclusive;

// ---- numbers

/// Sizes 1, small, around a SIMD width of 16, and beyond the attention block of 32.
pub fn size() -> impl Strategy<Value = usize> {
    prop_oneof![2 => Just(1usize), 4 => 2..12usize, 2 => 15..19usize, 1 => 31..50usize]
}

/// Powers of ten in quarters of a decade, which shrink to exactly 1.
fn quarter_decades(quarters: RangeInclusive<i32>) -> impl Strategy<Value = f64> {
    quarters.prop_map(|q| 10f64.powf(f64::from(q) / 4.0))
}

/// Of a generator. 16 bits: it prints short and shrinks in few steps, and other numbers are drawn beside it.
fn seed() -> impl Strategy<Value = u64> {
    any::<u16>().prop_map(u64::from)
}

// ---- spectra

/// How singular values lie; what numbers they are is decided by how many there are.
#[derive(Clone, Copy, Debug)]
enum Spread {
    Equal,
    /// Uniform in [1 − width, 1].
    Even {
        width: f64,
        seed: u64,
    },
    Decades {
        decades: f64,
    },
    Clustered {
        seed: u64,
    },
    /// `zeros` of 8 parts of them, rounded up.
    Deficient {
        zeros: usize,
        seed: u64,
    },
}

impl Spread {
    fn values(self, k: usize) -> Vec<f64> {
        let uniform = |width: f64, seed: u64| -> Vec<f64> {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            (0..k).map(|_| 1.0 - width * rng.random::<f64>()).collect()
        };
        let mut sigma: Vec<f64> = match self {
            Self::Equal => vec![1.0; k],
            Self::Even { width, seed } => uniform(width, seed),
            Self::Decades { decades } => geometric(k, decades),
            Self::Clustered { seed } => {
                let clusters = uniform(1.0, seed).into_iter().zip(uniform(2e-7, seed ^ 1));
                clusters.map(|(x, off)| [1.0, 0.3, 1e-3][(3.0 * x) as usize % 3] * off).collect()
            }
            Self::Deficient { zeros, seed } => {
                let rank = k - (k * zeros).div_ceil(8);
                uniform(0.95, seed)
                    .into_iter()
                    .enumerate()
                    .map(|(i, s)| if i < rank { s } else { 0.0 })
                    .collect()
            }
        };
        sigma.sort_by(|a, b| b.total_cmp(a));
        sigma
    }
}

/// From 1 down to 10^−decades in equal ratios.
fn geometric(k: usize, decades: f64) -> Vec<f64> {
    (0..k).map(|i| 10f64.powf(-decades * i as f64 / (k.max(2) - 1) as f64)).collect()
}

fn even() -> impl Strategy<Value = Spread> {
    (0..=19u8, seed()).prop_map(|(width, seed)| Spread::Even { width: f64::from(width) / 20.0, seed })
}

fn decades() -> impl Strategy<Value = Spread> {
    (0..=48u8).prop_map(|quarters| Spread::Decades { decades: f64::from(quarters) / 4.0 })
}

fn clustered() -> impl Strategy<Value = Spread> {
    seed().prop_map(|seed| Spread::Clustered { seed })
}

fn deficient() -> impl Strategy<Value = Spread> {
    (1..=8usize, seed()).prop_map(|(zeros, seed)| Spread::Deficient { zeros, seed })
}

fn spread() -> impl Strategy<Value = Spread> {
    prop_oneof![Just(Spread::Equal), even(), decades(), clustered(), deficient()]
}

/// `k` singular values, largest first and 1 at most: all equal, or from one of the four strategies below. Shrinks to ones.
pub fn spectrum(k: usize) -> impl Strategy<Value = Vec<f64>> {
    spread().prop_map(move |spread| spread.values(k))
}

/// `k` singular values, largest first, spread evenly over [0.05, 1] or a part of it. Shrinks to ones.
pub fn even_spectrum(k: usize) -> impl Strategy<Value = Vec<f64>> {
    even().prop_map(move |spread| spread.values(k))
}

/// `k` singular values from 1 down in equal ratios, over up to 12 decades. Shrinks to ones.
pub fn decades_spectrum(k: usize) -> impl Strategy<Value = Vec<f64>> {
    decades().prop_map(move |spread| spread.values(k))
}

/// `k` singular values, largest first, each within 2e-7 (relative) below 1, 0.3 or 1e-3: where decompositions and power
/// iteration have it hardest.
pub fn clustered_spectrum(k: usize) -> impl Strategy<Value = Vec<f64>> {
    clustered().prop_map(move |spread| spread.values(k))
}

/// `k` singular values, largest first, of which at least one is zero, at most all. Shrinks towards one.
pub fn deficient_spectrum(k: usize) -> impl Strategy<Value = Vec<f64>> {
    deficient().prop_map(move |spread| spread.values(k))
}

// ---- matrices

/// A random matrix [m, n] with the singular values `sigma`, the rest zero; surplus ones are ignored. Singular vectors are
/// uniformly distributed. Exact to f64 rounding, then rounded to `T`.
pub fn with_spectrum<T: Scalar>(rng: &mut impl Rng, [m, n]: [usize; 2], sigma: &[f64]) -> Tensor<Cpu<T>> {
    let k = m.min(n).min(sigma.len());
    let mut frame = |rows| DMatrix::<f64>::from_fn(rows, k, |_, _| StandardNormal.sample(rng)).qr().q();
    let (u, v) = (frame(m), frame(n));
    let w = DMatrix::from_fn(m, k, |i, j| u[(i, j)] * sigma[j]) * v.transpose();
    Tensor::from_fn(&Cpu::default(), [m, n], |i| T::of(w[(i / n, i % n)])) // [m, n]
}

/// A drawn matrix [m, n], given by its singular values.
#[derive(Clone, Debug, PartialEq)]
pub struct MatrixCase {
    /// Rows.
    pub m: usize,
    /// Columns.
    pub n: usize,
    /// The singular values, min(m, n) of them.
    pub sigma: Vec<f64>,
    /// Of the singular vectors.
    pub seed: u64,
}

impl MatrixCase {
    /// The matrix [m, n], as by [`with_spectrum`].
    pub fn tensor<T: Scalar>(&self) -> Tensor<Cpu<T>> {
        with_spectrum(&mut ChaCha8Rng::seed_from_u64(self.seed), [self.m, self.n], &self.sigma) // [m, n]
    }
}

/// Tall, wide and square matrices of every [`size`] with every [`spectrum`]. Shrinks to [1, 1] and to ones.
pub fn matrix_case() -> impl Strategy<Value = MatrixCase> {
    (size(), size(), spread(), seed()).prop_map(|(m, n, spread, seed)| {
        let sigma = spread.values(m.min(n));
        MatrixCase { m, n, sigma, seed }
    })
}

/// Matrices [m, n] with exactly these singular values, the rest zero, and drawn singular vectors.
pub fn matrix_with_spectrum(m: usize, n: usize, mut sigma: Vec<f64>) -> impl Strategy<Value = MatrixCase> {
    sigma.resize(m.min(n), 0.0);
    seed().prop_map(move |seed| MatrixCase { m, n, sigma: sigma.clone(), seed })
}

/// Matrices of 2 to 20 rows and columns with σ₁ = 1 and σ_min = 1/`condition`, in equal ratios. Shrinks to [2, 2].
///
/// # Panics
/// If the condition is not a number of at least 1.
#[track_caller]
pub fn matrix_with_condition(condition: f64) -> impl Strategy<Value = MatrixCase> {
    assert!((1.0..f64::INFINITY).contains(&condition), "matrix_with_condition: {condition} is no condition");
    (2..=20usize, 2..=20usize, seed()).prop_map(move |(m, n, seed)| {
        let sigma = geometric(m.min(n), condition.log10());
        MatrixCase { m, n, sigma, seed }
    })
}

// ---- factor pairs and their gauges

/// A drawn factor pair: Gaussian factors of standard deviation `scale`, then A·gauge and B/gauge.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairCase {
    /// Rows of W.
    pub m: usize,
    /// Columns of W.
    pub n: usize,
    /// Columns of the factors; may be above min(m, n).
    pub r: usize,
    /// Standard deviation of the factors in the gauge 1.
    pub scale: f64,
    /// A is as much larger, and B smaller.
    pub gauge: f64,
    /// B = 0, as some initialisations have it.
    pub zero_b: bool,
    /// Of the entries.
    pub seed: u64,
}

impl PairCase {
    /// A [m, r] and B [n, r], drawn in f64 and rounded to `T`.
    pub fn pair<T: Scalar>(&self) -> FactorPair<Cpu<T>> {
        let Self { m, n, r, scale, gauge, zero_b, seed } = *self;
        let (cpu, rng) = (Cpu::<f64>::default(), &mut ChaCha8Rng::seed_from_u64(seed));
        let a = gaussian(&cpu, rng, [m, r], scale * gauge); // [m, r]
        let b = gaussian(&cpu, rng, [n, r], scale / gauge); // [n, r]
        FactorPair::new(round(&a), round(&if zero_b { b.zeros_like() } else { b }))
    }
}

/// Tall, wide and square pairs up to 19×19, r up to 8 or min(m, n), so sometimes above it; scales from 0.01 to 10; half of
/// them balanced (gauge 1), half skewed by up to 1e±4; one in eight with B = 0. Shrinks to the balanced 1×1 pair of scale 1.
pub fn pair_case() -> impl Strategy<Value = PairCase> {
    let rank = prop_oneof![3 => (1..9usize).prop_map(Some), 1 => Just(None)];
    let gauge = prop_oneof![Just(1.0), quarter_decades(-16..=16)];
    let zero_b = prop::bool::weighted(0.125);
    // shrunk from left to right: the seed before the scale, which may have to suit it
    (1..20usize, 1..20usize, rank, seed(), quarter_decades(-8..=4), gauge, zero_b).prop_map(
        |(m, n, rank, seed, scale, gauge, zero_b)| {
            let r = rank.unwrap_or(m.min(n));
            PairCase { m, n, r, scale, gauge, zero_b, seed }
        },
    )
}

/// A drawn change of gauge, (A, B) → (A·Q, B·Q⁻ᵀ) with Q [r, r] for whatever r, which leaves W as it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GaugeCase {
    /// σ_max/σ_min of Q; their product is 1. At 1, Q is orthogonal.
    pub condition: f64,
    /// Of Q's singular vectors.
    pub seed: u64,
}

impl GaugeCase {
    /// Q and Q⁻ᵀ [r, r], each from its singular values: nothing is inverted.
    pub fn matrices<T: Scalar>(&self, r: usize) -> [Tensor<Cpu<T>>; 2] {
        let root = self.condition.sqrt();
        let sigma = geometric(r, self.condition.log10()).into_iter().map(|s| s * root);
        let inverse = sigma.clone().map(|s| 1.0 / s).collect();
        let of = |sigma| MatrixCase { m: r, n: r, sigma, seed: self.seed }.tensor(); // [r, r]
        [of(sigma.collect()), of(inverse)]
    }

    /// The same W in the other gauge, A·Q [m, r] and B·Q⁻ᵀ [n, r], formed in f64 and rounded once.
    pub fn apply<T: Scalar>(&self, pair: &FactorPair<Cpu<T>>) -> FactorPair<Cpu<T>> {
        let [q, inverse] = self.matrices::<f64>(pair.rank()); // [r, r] each
        let turned = |x: &Tensor<Cpu<T>>, q: &Tensor<Cpu<f64>>| round(&round::<f64, _>(x).matmul(q));
        FactorPair::new(turned(&pair.a, &q), turned(&pair.b, &inverse))
    }
}

/// Orthogonal Q.
pub fn orthogonal_gauge() -> impl Strategy<Value = GaugeCase> {
    seed().prop_map(|seed| GaugeCase { condition: 1.0, seed })
}

/// Invertible Q of condition up to 1000. Shrinks to orthogonal ones.
pub fn invertible_gauge() -> impl Strategy<Value = GaugeCase> {
    (quarter_decades(0..=12), seed()).prop_map(|(condition, seed)| GaugeCase { condition, seed })
}

/// The same elements in `T`, on the CPU.
fn round<T: Scalar, B: Backend>(x: &Tensor<B>) -> Tensor<Cpu<T>> {
    Tensor::from_vec(&Cpu::default(), x.shape(), x.to_f64().into_iter().map(T::of).collect()) // like x
}

// ---- assertions

/// A matrix, kept whole or as factors, whose singular values an assertion can ask for.
pub trait Spectral {
    /// Singular values, largest first, by an f64 decomposition of what is stored; NaN if that is not finite.
    #[track_caller]
    fn sigma(&self) -> Vec<f64>;
    /// The sizes, for messages.
    fn sizes(&self) -> String;
}

impl<B: Backend> Spectral for Tensor<B> {
    fn sigma(&self) -> Vec<f64> {
        let (m, n) = self.shape().matrix("singular values");
        if !self.is_finite() {
            return vec![f64::NAN; m.min(n)];
        }
        let cpu = Cpu::<f64>::default();
        let one = Tensor::from_fn(&cpu, [n, n], |i| if i / n == i % n { 1.0 } else { 0.0 }); // [n, n]
        FactorPair::new(round(self), one).singular_values() // W = W·Iᵀ
    }
    fn sizes(&self) -> String {
        self.shape().to_string()
    }
}

impl<B: Backend> Spectral for FactorPair<B> {
    fn sigma(&self) -> Vec<f64> {
        if self.a.is_finite() && self.b.is_finite() { self.singular_values() } else { vec![f64::NAN] }
    }
    fn sizes(&self) -> String {
        format!("[{}, {}] of rank {}", self.outputs(), self.inputs(), self.rank())
    }
}

/// The first eight, for messages.
fn list(sigma: &[f64]) -> String {
    let shown: Vec<String> = sigma.iter().take(8).map(|s| format!("{s:.6e}")).collect();
    format!("singular values {}{}", shown.join(", "), if sigma.len() > 8 { ", …" } else { "" })
}

/// Asserts ‖W‖₂ ≤ `bound`, W being a matrix or a factor pair such as [`FactorPair::change_since`].
///
/// Decided by an f64 decomposition of W as it is stored, for whose rounding 1e-12 of the bound is allowed. What rounding did
/// to W before, in its own element type, belongs into the bound.
///
/// # Panics
/// If the norm is larger, or W not finite, with both numbers, the excess, the sizes and the singular values.
#[track_caller]
pub fn assert_spectral_norm_le(w: &impl Spectral, bound: f64) {
    let sigma = w.sigma();
    let norm = sigma[0];
    assert!(
        norm <= bound * (1.0 + 1e-12),
        "assert_spectral_norm_le: ‖W‖₂ = {norm:?} is above the bound {bound:?} by {:.3e}, {:.3e} of the bound\n  W {}, {}",
        norm - bound,
        norm / bound - 1.0,
        w.sizes(),
        list(&sigma)
    );
}

/// Asserts that the columns of Q (its rows if it is wide) are orthonormal: ‖QᵀQ − I‖₂ = max |σ² − 1| ≤ 16·max(m, n)·u, u
/// being the unit roundoff of Q's element type. Householder's QR, rounded, stays well within that.
///
/// # Panics
/// If they are not, with the error, what is allowed, the sizes, the singular values and the worst two columns.
#[track_caller]
pub fn assert_orthonormal<B: Backend>(q: &Tensor<B>) {
    let (m, n) = q.shape().matrix("assert_orthonormal");
    let sigma = q.sigma();
    let allowed = 16.0 * m.max(n) as f64 * B::Elem::UNIT_ROUNDOFF;
    let error = sigma.iter().map(|s| (s * s - 1.0).abs()).fold(0.0, |a, b| if a >= b { a } else { b }); // NaN stays
    if error <= allowed {
        return;
    }
    let q64 = round::<f64, _>(q); // [m, n]
    let gram = if m >= n { q64.t().matmul(&q64) } else { q64.matmul(q64.t()) }; // [k, k]
    let k = gram.cols();
    let off = |i: &usize| (gram.buffer()[*i] - if i / k == i % k { 1.0 } else { 0.0 }).abs();
    let worst = (0..k * k).max_by(|i, j| off(i).total_cmp(&off(j))).unwrap_or(0);
    panic!(
        "assert_orthonormal: ‖QᵀQ − I‖₂ = {error:.3e}, allowed {allowed:.3e}\n  Q {}, {}\n  worst: q{}·q{} = {:.6e}{}",
        q.shape(),
        list(&sigma),
        worst / k,
        worst % k,
        gram.buffer()[worst],
        if m < n { " (rows)" } else { "" }
    );
}

/// Asserts that two factor pairs are the same W, whatever their gauges and ranks:
/// ‖W₁ − W₂‖₂ ≤ 16·r·u·max ‖A‖_F‖B‖_F, with the larger r and the coarser unit roundoff u.
///
/// An entry of W is a sum of r products; rounding each factor once, and each sum in any order, changes W by less than
/// (r + 2)·u·‖A‖_F‖B‖_F. A badly skewed gauge does not matter: the product of the norms is the same.
///
/// # Panics
/// If they are not, with the distance, what is allowed, the sizes and the singular values of both.
#[track_caller]
pub fn assert_same_w<B: Backend, C: Backend>(one: &FactorPair<B>, two: &FactorPair<C>) {
    let same_sizes = one.outputs() == two.outputs() && one.inputs() == two.inputs();
    assert!(same_sizes, "assert_same_w: W₁ is {}, W₂ is {}", one.sizes(), two.sizes());
    let dense = |a: Tensor<Cpu<f64>>, b: Tensor<Cpu<f64>>| (a.norm() * b.norm(), a.matmul(b.t())); // [m, n]
    let (size_one, w_one) = dense(round(&one.a), round(&one.b));
    let (size_two, w_two) = dense(round(&two.a), round(&two.b));
    let distance = w_one.sub(&w_two).sigma()[0];
    let rank = one.rank().max(two.rank()) as f64;
    let allowed = 16.0 * rank * B::Elem::UNIT_ROUNDOFF.max(C::Elem::UNIT_ROUNDOFF) * size_one.max(size_two);
    assert!(
        distance <= allowed,
        "assert_same_w: ‖W₁ − W₂‖₂ = {distance:.3e}, allowed {allowed:.3e}\n  W₁ {}, {}\n  W₂ {}, {}",
        one.sizes(),
        list(&w_one.sigma()),
        two.sizes(),
        list(&w_two.sigma())
    );
}

/// What is wrong if ‖x − y‖_F > tolerance·max(‖x‖_F, ‖y‖_F), or if the shapes differ.
fn compare<B: Backend, C: Backend>(x: &Tensor<B>, y: &Tensor<C>, tolerance: f64) -> Result<(), String> {
    if x.shape() != y.shape() {
        return Err(format!("the shapes differ: {} and {}", x.shape(), y.shape()));
    }
    let (x, y) = (round::<f64, _>(x), round::<f64, _>(y)); // like x
    let (distance, size) = (x.sub(&y).norm(), x.norm().max(y.norm()));
    if distance <= tolerance * size {
        return Ok(());
    }
    let off = |i: &usize| (x.buffer()[*i] - y.buffer()[*i]).abs();
    let worst = (0..x.len()).max_by(|i, j| off(i).total_cmp(&off(j))).unwrap_or(0);
    Err(format!(
        "relative distance {:.3e} (Frobenius), allowed {tolerance:.3e}; shape {}, norms {:.6e} and {:.6e}; worst element {worst}: {:.9e} and {:.9e}",
        distance / size,
        x.shape(),
        x.norm(),
        y.norm(),
        x.buffer()[worst],
        y.buffer()[worst]
    ))
}

/// Asserts ‖x − y‖_F ≤ `tolerance`·max(‖x‖_F, ‖y‖_F). The element types may differ.
///
/// # Panics
/// If it is more, or the shapes differ, with the distance, the shapes, the norms and the worst element.
#[track_caller]
pub fn assert_close<B: Backend, C: Backend>(x: &Tensor<B>, y: &Tensor<C>, tolerance: f64) {
    if let Err(message) = compare(x, y, tolerance) {
        panic!("assert_close: {message}");
    }
}

/// Asserts that two functions have the same output, as by [`assert_close`], on drawn inputs: 256 of them or
/// `PROPTEST_CASES`, the same ones in each run unless `PROPTEST_RNG_SEED` asks for others.
///
/// ```
/// use rankgrad::testing::{assert_same_function, pair_case};
/// // both ways through a pair: W·1 and A·(Bᵀ·1)
/// let ones = |n| rankgrad::tensor::Tensor::full(&Default::default(), [n, 1], 1.0); // [n, 1]
/// assert_same_function(
///     pair_case(),
///     1e-10,
///     |case| case.pair::<f64>().transpose().transpose().to_dense().matmul(&ones(case.n)), // [m, 1]
///     |case| {
///         let pair = case.pair::<f64>();
///         pair.a.matmul(&pair.b.t().matmul(&ones(case.n))) // [m, 1]
///     },
/// );
/// ```
///
/// # Panics
/// If they differ, with the smallest input found.
#[track_caller]
pub fn assert_same_function<S: Strategy, B: Backend, C: Backend>(
    inputs: S,
    tolerance: f64,
    f: impl Fn(&S::Value) -> Tensor<B>,
    g: impl Fn(&S::Value) -> Tensor<C>,
) {
    if let Some((message, input)) = smallest_failure(&inputs, |x| compare(&f(x), &g(x), tolerance)) {
        panic!("assert_same_function: {message}\n  smallest input found: {input:?}");
    }
}

/// Drawn inputs of a gradient check.
#[derive(Clone, Debug)]
struct Inputs {
    shapes: Vec<Shape>,
    /// 2: N(0, 1) entries, moved away from zero by 0.2; 1: those to one decimal place; 0: ones.
    detail: u8,
    scale: f64,
    seed: u64,
}

impl Inputs {
    fn tensors(&self) -> Vec<Tensor<Cpu<f64>>> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut entry = |_| {
            let z: f64 = StandardNormal.sample(&mut rng);
            let z = z + 0.2 * z.signum();
            self.scale * [1.0, (10.0 * z).round() / 10.0, z][usize::from(self.detail)]
        };
        self.shapes.iter().map(|&shape| Tensor::from_fn(&Cpu::default(), shape, &mut entry)).collect()
    }
}

/// Asserts that the tape's gradient of `f` agrees to 1e-6 with finite differences, as by [`autograd::gradcheck`], for drawn
/// inputs of drawn shapes; 256 draws or `PROPTEST_CASES`, the same in each run unless `PROPTEST_RNG_SEED` asks for others.
///
/// Entries are about N(0, 1), times a scale between 0.1 and 3, and at least 0.2 of that scale away from zero, where relu and
/// |x| have their kink; a kink in the middle of `f` can be met, and shows as a wrong gradient. Shrinks to small shapes,
/// scale 1, and entries of one decimal place, or ones.
///
/// ```
/// use proptest::prelude::*;
/// use rankgrad::testing::{assert_gradients, size};
/// let shapes = (size(), size(), 1..9usize).prop_map(|(m, n, r)| vec![[5, n], [m, r], [n, r]]);
/// assert_gradients(shapes, |_, x| x[0].relu().lowrank_linear(x[1], x[2]));
/// ```
///
/// # Panics
/// If a gradient disagrees, with the failing [`autograd::GradCheck`] and the smallest inputs found.
#[track_caller]
pub fn assert_gradients<S: Into<Shape> + fmt::Debug>(
    shapes: impl Strategy<Value = Vec<S>>,
    f: impl for<'t> Fn(&'t Tape<Cpu<f64>>, &[Var<'t, Cpu<f64>>]) -> Var<'t, Cpu<f64>>,
) {
    let drawn = (shapes, prop_oneof![1 => 0..=1u8, 9 => Just(2)], quarter_decades(-4..=2), seed());
    let inputs = drawn.prop_map(|(shapes, detail, scale, seed)| {
        let shapes = shapes.into_iter().map(Into::into).collect();
        Inputs { shapes, detail, scale, seed }
    });
    let failure = smallest_failure(&inputs, |inputs| {
        let checks = autograd::gradcheck(&inputs.tensors(), inputs.seed, &f);
        checks
            .iter()
            .find(|check| check.error.is_nan() || check.error >= 1e-6)
            .map_or(Ok(()), |check| Err(check.to_string()))
    });
    if let Some((message, inputs)) = failure {
        panic!("assert_gradients: {message}, allowed 1e-6\n  smallest inputs found: {:?}", inputs.tensors());
    }
}

/// The smallest input found for which `test` fails, and how.
#[track_caller]
fn smallest_failure<S: Strategy>(
    inputs: &S,
    test: impl Fn(&S::Value) -> Result<(), String>,
) -> Option<(String, S::Value)> {
    let mut config =
        ProptestConfig { failure_persistence: None, max_shrink_iters: 4096, ..Default::default() };
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(0);
    }
    match TestRunner::new(config).run(inputs, |input| test(&input).map_err(TestCaseError::fail)) {
        Ok(()) => None,
        Err(TestError::Fail(reason, input)) => Some((reason.message().to_string(), input)),
        Err(TestError::Abort(reason)) => panic!("no inputs could be drawn: {reason}"),
    }
}
