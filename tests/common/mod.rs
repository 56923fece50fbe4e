//! What the test files share: the strategies of `rankgrad::testing`, and the way to nalgebra, whose f64 eigenvalues are the oracle.
//!
//! Nothing here computes what the library computes. `PROPTEST_CASES` enlarges every property test.
//! Letters: W [m, n] = A·Bᵀ, r rank, σ singular values.
#![allow(dead_code, unused_imports)] // each test file compiles its own copy and uses a part of it

use nalgebra::{DMatrix, DVector};
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rankgrad::gpu::{Cuda, Simulator};
use rankgrad::tensor::{Backend, Cpu, Scalar, Tensor};
pub use rankgrad::testing::{PairCase, pair_case, size, spectrum};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::{Arc, LazyLock, Once, OnceLock};

/// `cases` cases, few enough for every commit, unless the environment asks for another number.
pub fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|s| s.parse().ok());
    ProptestConfig { cases: asked.unwrap_or(cases), failure_persistence: None, ..ProptestConfig::default() }
}

pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// The GPU backend: on the GPU whose number is in RANKGRAD_TEST_GPU, else on its simulator. None, and a line that says so, where
/// there is no C++ compiler.
pub fn gpu() -> Option<Cuda<f32>> {
    #[cfg(feature = "cuda")]
    if let Ok(ordinal) = std::env::var("RANKGRAD_TEST_GPU") {
        static REAL: OnceLock<Cuda<f32>> = OnceLock::new();
        let open = || Cuda::open(ordinal.parse().expect("a number")).unwrap_or_else(|why| panic!("{why}"));
        return Some(REAL.get_or_init(open).clone());
    }
    static OPEN: LazyLock<Result<Cuda<f32>, String>> =
        LazyLock::new(|| Simulator::new().map(|simulator| Cuda::on(Arc::new(simulator))));
    skip_without_compiler(OPEN.clone())
}

/// What was compiled; None where there is no compiler, which is no failure unless RANKGRAD_REQUIRE_CXX is set.
pub fn skip_without_compiler<T>(opened: Result<T, String>) -> Option<T> {
    match opened {
        Ok(opened) => Some(opened),
        Err(why)
            if why.starts_with("no C++ compiler") && std::env::var_os("RANKGRAD_REQUIRE_CXX").is_none() =>
        {
            println!("skipped: {why}");
            None
        }
        Err(why) => panic!("{why}"),
    }
}

/// Independent N(0, 1) entries.
pub fn gaussian(rng: &mut ChaCha8Rng, m: usize, n: usize) -> DMatrix<f64> {
    DMatrix::from_fn(m, n, |_, _| StandardNormal.sample(rng))
}

/// k ≤ m random orthonormal columns of length m.
pub fn orthonormal(rng: &mut ChaCha8Rng, m: usize, k: usize) -> DMatrix<f64> {
    with_spectrum(rng, m, k, &vec![1.0; k])
}

/// A random m×n matrix with exactly the singular values `sigma` (and zeros), to f64 rounding.
pub fn with_spectrum(rng: &mut ChaCha8Rng, m: usize, n: usize, sigma: &[f64]) -> DMatrix<f64> {
    matrix(&rankgrad::testing::with_spectrum::<f64>(rng, [m, n], sigma))
}

/// The matrix on the CPU, rounded to `T`.
pub fn tensor<T: Scalar>(x: &DMatrix<f64>) -> Tensor<Cpu<T>> {
    let (rows, cols) = x.shape();
    Tensor::from_fn(&Cpu::default(), [rows, cols], |i| T::of(x[(i / cols, i % cols)])) // [rows, cols]
}

pub fn matrix<B: Backend>(x: &Tensor<B>) -> DMatrix<f64> {
    DMatrix::from_row_slice(x.rows(), x.cols(), &x.to_f64())
}

/// The eigenvalues ±σ and eigenvectors of J = [0 X; Xᵀ 0], by nalgebra. Its SVD is not the oracle: where singular values are
/// equal, zero or decades apart, U·Σ·Vᵀ is often not X (dimforge/nalgebra, issue 1172). Certified: Q·Λ·Qᵀ is J and Q is
/// orthogonal, to rounding, so the eigenvalues are right to rounding (Weyl). Where nalgebra fails that (NaN from some J that
/// hold little but zeros), it gets J in a random orthogonal basis.
fn jordan_wielandt(x: &DMatrix<f64>) -> (DVector<f64>, DMatrix<f64>) {
    let (m, n) = x.shape();
    let (mut rng, size) = (rng(0), m + n);
    let mut both = DMatrix::zeros(size, size);
    both.view_mut((0, m), (m, n)).copy_from(x);
    both.view_mut((m, 0), (n, m)).copy_from(&x.transpose());
    let mut basis = DMatrix::identity(size, size);
    for _ in 0..10 {
        let eigen = (basis.transpose() * &both * &basis).symmetric_eigen();
        let q = &basis * eigen.eigenvectors;
        let off = (&q * DMatrix::from_diagonal(&eigen.eigenvalues) * q.transpose() - &both).norm();
        let skew = (q.transpose() * &q - DMatrix::identity(size, size)).norm();
        let rounding = 1e-14 * (size as f64).sqrt();
        if off <= rounding * both.norm() && skew <= rounding {
            return (eigen.eigenvalues, q);
        }
        basis = orthonormal(&mut rng, size, size);
    }
    panic!("no certified eigenvalues of {x}")
}

/// Largest first, min(m, n) of them.
pub fn singular_values(x: &DMatrix<f64>) -> Vec<f64> {
    let mut sigma: Vec<f64> = jordan_wielandt(x).0.iter().copied().collect();
    sigma.sort_by(|a, b| b.total_cmp(a));
    sigma.truncate(x.nrows().min(x.ncols()));
    sigma
}

/// U·diag(f(σ))·Vᵀ for an odd function f: the upper right block of f([0 X; Xᵀ 0]).
pub fn on_spectrum(x: &DMatrix<f64>, f: impl Fn(f64) -> f64) -> DMatrix<f64> {
    let (m, n) = x.shape();
    let (lambda, q) = jordan_wielandt(x);
    (&q * DMatrix::from_diagonal(&lambda.map(f)) * q.transpose()).view((0, m), (m, n)).into_owned()
}

pub fn spectral_norm(x: &DMatrix<f64>) -> f64 {
    singular_values(x)[0]
}

/// Every bit of a tensor.
pub fn bits<B: Backend>(x: &Tensor<B>) -> Vec<u64> {
    x.to_f64().into_iter().map(f64::to_bits).collect() // widening f32 keeps its bits apart
}

thread_local! {
    /// Message, file and line of this thread's last panic.
    static LAST: RefCell<Option<(String, String, u32)>> = const { RefCell::new(None) };
}

/// Runs `f`, which must panic in this file within the five lines from the caller's, and returns the message.
#[track_caller]
pub fn refusal<R>(f: impl FnOnce() -> R) -> String {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let at = info.location().expect("the standard library always knows");
            let payload = info.payload();
            let text = payload
                .downcast_ref::<&str>()
                .copied()
                .or(payload.downcast_ref::<String>().map(String::as_str));
            let message = text.unwrap_or_default().to_string();
            LAST.set(Some((message, at.file().to_string(), at.line())));
            before(info);
        }));
    });
    let here = Location::caller();
    assert!(catch_unwind(AssertUnwindSafe(f)).is_err(), "{here}: nothing was refused");
    let (message, file, line) = LAST.take().expect("the hook ran");
    assert!(file == here.file(), "{here}: the panic points at {file}:{line}: {message}");
    assert!(
        (here.line()..here.line() + 5).contains(&line),
        "{here}: the panic points at line {line}: {message}"
    );
    message
}
