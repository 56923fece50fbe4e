//! Tests of the tests: that the strategies of `rankgrad::testing` draw what they promise, that its assertions fail on a planted
//! violation and not at the border, and that shrinking finds small examples.
//!
//! Oracles: nalgebra's certified f64 eigenvalues (see common), products written out with nalgebra matrices.
//! Letters: W [m, n] = A·Bᵀ, r rank, σ singular values, Q a gauge, u unit roundoff.

mod common;

use common::{bits, config, matrix, refusal, rng, singular_values, spectral_norm, tensor};
use nalgebra::DMatrix;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{TestError, TestRunner};
use rankgrad::autograd::Var;
use rankgrad::lowrank::FactorPair;
use rankgrad::tensor::{Cpu, Tensor};
use rankgrad::testing::*;

type B = Cpu<f64>;

/// 2⁻²⁴.
const U32: f64 = 0.5 * f32::EPSILON as f64;

/// `count` values, the same in every run.
fn draw<S: Strategy>(strategy: S, count: usize) -> Vec<S::Value> {
    let mut runner = TestRunner::deterministic();
    (0..count).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect()
}

/// The smallest value that shrinking finds for which `holds` is false.
fn smallest<S: Strategy>(strategy: S, holds: impl Fn(&S::Value) -> bool) -> S::Value {
    let fails = |value| {
        prop_assert!(holds(&value));
        Ok(())
    };
    let mut runner = TestRunner::new_with_rng(config(256), TestRunner::deterministic().new_rng());
    match runner.run(&strategy, fails) {
        Err(TestError::Fail(_, value)) => value,
        other => panic!("the planted bug was not found: {other:?}"),
    }
}

fn contains(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part} in: {message}");
    }
}

// ---- strategies

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn spectra_are_what_they_are_called(
        all in spectrum(9), even in even_spectrum(9), decades in decades_spectrum(9),
        clustered in clustered_spectrum(9), deficient in deficient_spectrum(9),
    ) {
        for sigma in [&all, &even, &decades, &clustered, &deficient] {
            prop_assert_eq!(sigma.len(), 9);
            prop_assert!(sigma.windows(2).all(|s| s[0] >= s[1]) && sigma[0] <= 1.0 && sigma[8] >= 0.0);
        }
        prop_assert!(even[8] >= 0.05);
        prop_assert!(decades[0] == 1.0 && decades[8] >= 0.99e-12);
        let ratio = decades[1] / decades[0];
        prop_assert!(decades.windows(2).all(|s| (s[1] / s[0] / ratio - 1.0).abs() < 1e-12));
        let near = |s: f64| [1.0, 0.3, 1e-3].iter().any(|c| (s / c - 1.0).abs() <= 2.1e-7);
        prop_assert!(clustered.iter().all(|&s| near(s)));
        prop_assert!(deficient[8] == 0.0);
    }

    #[test]
    fn matrices_have_their_spectra(case in matrix_case(), fixed in matrix_with_spectrum(5, 7, vec![2.0, 0.5, 0.5])) {
        for case in [case, fixed] {
            let MatrixCase { m, n, sigma, .. } = &case;
            let (w, w32) = (case.tensor::<f64>(), case.tensor::<f32>());
            prop_assert_eq!((w.rows(), w.cols()), (*m, *n));
            prop_assert_eq!(sigma.len(), *m.min(n));
            // f32 rounds every element by at most u: Weyl
            let rounding = U32 * w.norm() + 1e-13;
            let (found, found32) = (singular_values(&matrix(&w)), singular_values(&matrix(&w32)));
            for ((s, found), found32) in sigma.iter().zip(found).zip(found32) {
                prop_assert!((s - found).abs() <= 1e-13 * sigma[0].max(1.0), "{found}, not {s}");
                prop_assert!((s - found32).abs() <= rounding, "{found32}, not {s}");
            }
        }
    }

    #[test]
    fn matrices_have_their_condition(
        (condition, case) in (0..9i32).prop_flat_map(|d| (Just(10f64.powi(d)), matrix_with_condition(10f64.powi(d)))),
    ) {
        let sigma = singular_values(&matrix(&case.tensor::<f64>()));
        prop_assert!((sigma[0] - 1.0).abs() < 1e-13);
        prop_assert!((sigma[sigma.len() - 1] - 1.0 / condition).abs() < 1e-13);
    }

    #[test]
    fn pairs_have_their_sizes_scale_and_gauge(case in pair_case()) {
        let PairCase { m, n, r, scale, gauge, zero_b, .. } = case;
        let pair = case.pair::<f64>();
        prop_assert_eq!((pair.outputs(), pair.inputs(), pair.rank()), (m, n, r));
        prop_assert_eq!(pair.b.norm() == 0.0, zero_b);
        // the same numbers without scale and gauge; and once more, to the bit
        let plain = PairCase { scale: 1.0, gauge: 1.0, zero_b: false, ..case }.pair::<f64>();
        assert_close(&pair.a, &plain.a.scale(scale * gauge), 1e-15);
        if !zero_b {
            assert_close(&pair.b, &plain.b.scale(scale / gauge), 1e-15);
        }
        prop_assert_eq!(bits(&pair.a), bits(&case.pair::<f64>().a));
        let rounded: Vec<f32> = pair.a.to_vec().into_iter().map(|x| x as f32).collect();
        prop_assert_eq!(case.pair::<f32>().a.to_vec(), rounded);
    }

    #[test]
    fn gauges_leave_w_as_it_is(case in pair_case(), turn in orthogonal_gauge(), skew in invertible_gauge()) {
        let pair = case.pair::<f64>();
        let w = matrix(&pair.a) * matrix(&pair.b).transpose(); // nalgebra's product
        for gauge in [turn, skew] {
            let [q, inverse] = gauge.matrices::<f64>(case.r); // [r, r] each
            let one = matrix(&q) * matrix(&inverse).transpose();
            prop_assert!((one - DMatrix::identity(case.r, case.r)).norm() < 1e-13 * gauge.condition);
            let sigma = singular_values(&matrix(&q));
            if case.r > 1 {
                let condition = sigma[0] / sigma[case.r - 1];
                prop_assert!((condition / gauge.condition - 1.0).abs() < 1e-12 * gauge.condition, "{condition}");
            }
            let turned = gauge.apply(&pair);
            let error = (matrix(&turned.a) * matrix(&turned.b).transpose() - &w).norm();
            prop_assert!(error <= 1e-13 * gauge.condition * pair.a.norm() * pair.b.norm(), "{error}");
            assert_same_w(&pair, &turned);
            let single = case.pair::<f32>();
            assert_same_w(&single, &gauge.apply(&single));
        }
        prop_assert_eq!(turn.condition, 1.0);
        assert_orthonormal(&turn.matrices::<f32>(case.r)[0]);
        assert_orthonormal(&turn.matrices::<f64>(case.r)[1]);
    }
}

/// Every corner that the documentation names comes up within 400 cases.
#[test]
fn corners_are_drawn() {
    let pairs = draw(pair_case(), 400);
    let count = |what: &str, corner: &dyn Fn(&PairCase) -> bool| {
        let found = pairs.iter().filter(|case| corner(case)).count();
        assert!(found >= 5, "{what}: {found} of 400");
    };
    count("tall", &|c| c.m > c.n);
    count("wide", &|c| c.m < c.n);
    count("square", &|c| c.m == c.n);
    count("full rank", &|c| c.r == c.m.min(c.n));
    count("above full rank", &|c| c.r > c.m.min(c.n));
    count("balanced", &|c| c.gauge == 1.0);
    count("A much larger", &|c| c.gauge > 1e3);
    count("B much larger", &|c| c.gauge < 1e-3);
    count("small", &|c| c.scale < 0.05);
    count("large", &|c| c.scale > 5.0);
    count("B = 0", &|c| c.zero_b);
    let spectra = draw(spectrum(6), 400);
    let count = |what: &str, corner: &dyn Fn(&[f64]) -> bool| {
        let found = spectra.iter().filter(|sigma| corner(sigma)).count();
        assert!(found >= 5, "{what}: {found} of 400");
    };
    count("all equal", &|s| s[0] == s[5]);
    count("ill-conditioned", &|s| s[5] > 0.0 && s[5] < 1e-8);
    count("clustered", &|s| s.windows(2).any(|s| s[0] > s[1] && s[0] - s[1] < 1e-6 * s[0]));
    count("rank-deficient", &|s| s[0] > 0.0 && s[5] == 0.0);
    count("zero", &|s| s[0] == 0.0);
    let sizes = draw(size(), 400);
    assert!([1, 2, 11, 15, 16, 17, 18].iter().all(|n| sizes.contains(n)) && sizes.iter().any(|&n| n > 32));
}

// ---- assertions

proptest! {
    #![proptest_config(config(32))]

    /// The border is at the oracle's norm: for whole matrices, and for W·Q·Qᵀ as a pair.
    #[test]
    fn the_spectral_norm_is_bounded_to_nine_digits(case in matrix_case(), exponent in -12..12i32, seed: u64) {
        let w = tensor::<f64>(&(matrix(&case.tensor::<f64>()) * 10f64.powi(exponent))); // [m, n]
        let norm = spectral_norm(&matrix(&w));
        let q = with_spectrum::<f64>(&mut rng(seed), [case.n, case.n], &vec![1.0; case.n]); // [n, n]
        let pair = FactorPair::new(w.matmul(&q), q); // W·Q·Qᵀ
        assert_spectral_norm_le(&w, norm);
        assert_spectral_norm_le(&w, norm * (1.0 + 1e-9));
        assert_spectral_norm_le(&pair, norm * (1.0 + 1e-9));
        if norm > 0.0 {
            refusal(|| assert_spectral_norm_le(&w, norm * (1.0 - 1e-9)));
            refusal(|| assert_spectral_norm_le(&pair, norm * (1.0 - 1e-9)));
        }
        let single = case.tensor::<f32>();
        let norm = spectral_norm(&matrix(&single));
        assert_spectral_norm_le(&single, norm);
        if norm > 0.0 {
            refusal(|| assert_spectral_norm_le(&single, norm * (1.0 - 1e-9)));
        }
    }

    /// Frames pass in both element types; one column that is too long passes or fails as the stated allowance has it.
    #[test]
    fn orthonormality_is_decided_at_its_allowance(m in size(), n in size(), pick: prop::sample::Index, seed: u64) {
        let frame = with_spectrum::<f64>(&mut rng(seed), [m, n], &vec![1.0; m.min(n)]); // [m, n]
        assert_orthonormal(&frame);
        assert_orthonormal(&with_spectrum::<f32>(&mut rng(seed), [m, n], &vec![1.0; m.min(n)]));
        let allowed = 16.0 * m.max(n) as f64 * 0.5 * f64::EPSILON;
        let long = |factor: f64| {
            let mut q = matrix(&frame);
            // the column of a tall frame, the row of a wide one: σ of one direction is as much longer
            let q = if m >= n {
                q.column_mut(pick.index(n)).scale_mut(1.0 + factor * allowed);
                q
            } else {
                q.row_mut(pick.index(m)).scale_mut(1.0 + factor * allowed);
                q
            };
            tensor::<f64>(&q) // [m, n]
        };
        assert_orthonormal(&long(0.25)); // |σ² − 1| is half of what is allowed, the rest is for rounding
        refusal(|| assert_orthonormal(&long(1.0)));
    }

    /// One element of A off by so much that W is off by a fraction or a multiple of what is allowed.
    #[test]
    fn the_same_w_is_decided_at_its_allowance(case in pair_case(), seed: u64) {
        let case = PairCase { zero_b: false, ..case };
        let pair = case.pair::<f64>();
        let (a, b) = (matrix(&pair.a), matrix(&pair.b));
        let direction = matrix(&with_spectrum::<f64>(&mut rng(seed), [case.m, case.r], &[1.0]));
        let unit = &direction / (&direction * b.transpose()).norm(); // of rank 1, so ‖unit·Bᵀ‖₂ = 1
        let allowed = 16.0 * case.r as f64 * 0.5 * f64::EPSILON * a.norm() * b.norm();
        let moved = |factor: f64| FactorPair::new(tensor::<f64>(&(&a + &unit * (factor * allowed))), pair.b.clone());
        // where A is much larger than its part that B sees, its own rounding is a large part of the allowance
        assert_same_w(&pair, &moved(0.25));
        refusal(|| assert_same_w(&pair, &moved(4.0)));
        // other rank, same W: columns of zeros
        let wide = |x: &DMatrix<f64>| tensor::<f64>(&x.clone().resize_horizontally(case.r + 2, 0.0));
        assert_same_w(&pair, &FactorPair::new(wide(&a), wide(&b)));
        assert_same_w(&pair, &case.pair::<f32>());
    }
}

#[test]
fn corners_of_the_assertions() {
    let zero = Tensor::<B>::zeros(&B::default(), [3, 2]); // [3, 2]
    assert_spectral_norm_le(&zero, 0.0);
    refusal(|| assert_spectral_norm_le(&zero, -1e-300));
    refusal(|| assert_spectral_norm_le(&zero, f64::NAN));
    refusal(|| assert_orthonormal(&zero));
    for odd in [f64::NAN, f64::INFINITY] {
        let broken = Tensor::from_vec(&B::default(), [2, 2], vec![1.0, 0.0, odd, 1.0]); // [2, 2]
        refusal(|| assert_spectral_norm_le(&broken, 1e300));
        refusal(|| assert_spectral_norm_le(&FactorPair::new(broken.clone(), broken.clone()), 1e300));
        refusal(|| assert_orthonormal(&broken));
        refusal(|| assert_close(&broken, &broken, 1.0));
        let pair = FactorPair::new(broken.clone(), broken.clone());
        refusal(|| assert_same_w(&pair, &pair));
    }
    let one = Tensor::<B>::full(&B::default(), [2, 3], 1.0); // [2, 3]
    assert_close(&one, &one, 0.0);
    assert_close(&zero, &zero, 0.0);
    assert_close(&one, &one.scale(1.01), 0.01); // relative to the larger: 0.0099
    refusal(|| assert_close(&one, &one.scale(1.01), 0.0098));
    refusal(|| assert_close(&one, &one.reshape([3, 2]), 1.0));
    refusal(|| assert_spectral_norm_le(&one.reshape([6]), 1.0));
}

#[test]
fn messages_say_what_a_person_needs() {
    let w = Tensor::from_vec(&B::default(), [2, 3], vec![3.0, 0.0, 0.0, 0.0, 0.5, 0.0]); // [2, 3]
    let message = refusal(|| assert_spectral_norm_le(&w, 2.0));
    contains(
        &message,
        &["= 3.0", "bound 2.0", "1.000e0", "5.000e-1 of", "[2, 3]", "3.000000e0, 5.000000e-1"],
    );
    let message = refusal(|| assert_orthonormal(&w));
    contains(
        &message,
        &["= 8.000e0", "allowed 5.329e-15", "[2, 3]", "3.000000e0, 5", "q0·q0 = 9.000000e0 (rows)"],
    );
    let case = PairCase { m: 4, n: 3, r: 2, scale: 1.0, gauge: 1.0, zero_b: false, seed: 1 };
    let pair = case.pair::<f64>();
    let message = refusal(|| assert_same_w(&pair, &pair.transpose()));
    contains(&message, &["[4, 3] of rank 2", "[3, 4] of rank 2"]);
    let other = FactorPair::new(pair.a.clone(), pair.b.scale(1.5));
    let message = refusal(|| assert_same_w(&pair, &other));
    let norm = spectral_norm(&matrix(&pair.to_dense()));
    contains(&message, &[&format!("= {:.3e}", 0.5 * norm), "allowed", "[4, 3]", &format!("{norm:.6e}")]);
    let message = refusal(|| assert_close(&w, &w.scale(2.0), 0.1));
    contains(
        &message,
        &["5.000e-1", "allowed 1.000e-1", "[2, 3]", "element 0: 3.000000000e0 and 6.000000000e0"],
    );
}

// ---- functions and gradients, and what shrinking finds

#[test]
fn different_functions_are_told_apart_by_the_smallest_case() {
    assert_same_function(pair_case(), 1e-12, |c| c.pair::<f64>().to_dense(), |c| c.pair::<f64>().to_dense());
    // a product that forgets all columns after the third
    let short = |case: &PairCase| {
        let pair = case.pair::<f64>();
        let keep = case.r.min(3);
        let cut = |x: &Tensor<B>| tensor::<f64>(&matrix(x).columns(0, keep).into_owned()); // [rows, keep]
        FactorPair::new(cut(&pair.a), cut(&pair.b)).to_dense() // [m, n]
    };
    let message = refusal(|| {
        assert_same_function(pair_case(), 1e-12, |c| c.pair::<f64>().to_dense(), short);
    });
    contains(
        &message,
        &["m: 1, n: 1, r: 4, scale: 1.0, gauge: 1.0, zero_b: false, seed: 0", "allowed 1.000e-12"],
    );
    // other shapes, and a panic of the user's own, with what it says
    let zeros = |shape| Tensor::<B>::zeros(&B::default(), shape); // shape
    let message = refusal(|| assert_same_function(size(), 0.0, |&n| zeros([n, 2]), |&n| zeros([2, n])));
    contains(&message, &["the shapes differ: [1, 2] and [2, 1]", "found: 1"]);
    let message = refusal(|| {
        assert_same_function(
            size(),
            0.0,
            |_| zeros([1, 1]),
            |&n| {
                assert!(n <= 16, "not so large");
                zeros([1, 1])
            },
        );
    });
    contains(&message, &["not so large", "found: 17"]);
}

/// x², whose derivative is multiplied by `error`, which ought to be 1, where the last axis is longer than `from`.
fn square(x: Var<'_, B>, error: f64, from: usize) -> Var<'_, B> {
    let input = x.value(); // like x
    let error = if input.cols() > from { error } else { 1.0 };
    let y = Tensor::from_vec(input.device(), input.shape(), input.to_vec().iter().map(|x| x * x).collect()); // like x
    let ix = x.id();
    x.tape().record("square", &[x], y, move |dy, grads| {
        let dx = dy.to_vec().iter().zip(input.to_vec()).map(|(dy, x)| error * 2.0 * x * dy).collect();
        grads.add(ix, Tensor::from_vec(dy.device(), dy.shape(), dx)); // like x
    })
}

#[test]
fn wrong_gradients_are_found_and_shrunk() {
    let shapes = || (size(), size()).prop_map(|(m, n)| vec![[m, n], [1, m]]);
    assert_gradients(shapes(), |_, x| x[1].relu().matmul(square(x[0], 1.0, 0)));
    let message = refusal(|| assert_gradients(shapes(), |_, x| x[1].matmul(square(x[0], 1.001, 2))));
    contains(&message, &["input 0: tape", "error 1.0e-3", "Tensor[1, 3] [1, 1, 1], Tensor[1, 1] [1]"]);
    // smaller than the check can see
    assert_gradients(shapes(), |_, x| x[1].matmul(square(x[0], 1.0 + 1e-7, 0)));
    // all inputs are looked at
    let message = refusal(|| assert_gradients(shapes(), |_, x| square(x[1], 0.0, 0).matmul(x[0])));
    contains(&message, &["input 1: tape 0", "Tensor[1, 1] [1], Tensor[1, 1] [1]"]);
}

#[test]
fn shrinking_ends_at_simple_cases() {
    let case = smallest(pair_case(), |case| case.m + case.n < 12);
    assert!(case.m + case.n == 12 && case.r == 1, "{case:?}");
    assert_eq!((case.scale, case.gauge, case.zero_b, case.seed), (1.0, 1.0, false, 0));
    let case = smallest(pair_case(), |case| case.gauge < 100.0);
    assert_eq!(case, PairCase { m: 1, n: 1, r: 1, scale: 1.0, gauge: case.gauge, zero_b: false, seed: 0 });
    assert!((case.gauge / 100.0 - 1.0).abs() < 1e-12, "{case:?}");
    let case = smallest(pair_case(), |case| case.r <= case.m.min(case.n));
    assert_eq!((case.m, case.n, case.r), (1, 1, 2));
    let case = smallest(matrix_case(), |case| case.m < 3 || case.n < 2);
    assert_eq!(case, MatrixCase { m: 3, n: 2, sigma: vec![1.0; 2], seed: 0 });
    // a zero singular value: one is enough
    let case = smallest(matrix_case(), |case| case.sigma.iter().all(|&s| s > 0.0));
    assert_eq!(case, MatrixCase { m: 1, n: 1, sigma: vec![0.0], seed: 0 });
    let gauge = smallest(invertible_gauge(), |gauge| gauge.condition < 10.0);
    assert!((gauge.condition / 10.0 - 1.0).abs() < 1e-12 && gauge.seed == 0, "{gauge:?}");
}
