//! Telemetry against nalgebra's eigenvalues of W and ΔW, formed in f64, and against matrices of known spectra.
//!
//! Letters: W [m, n] = A·Bᵀ, r rank; σ singular values; ΔW the change of W.

mod common;

use common::{PairCase, config, gaussian, matrix, orthonormal, pair_case, rng, singular_values, tensor};
use nalgebra::{DMatrix, DVector};
use proptest::prelude::*;
use rankgrad::lowrank::{
    Accuracy, FactorPair, MatrixTelemetry, Optimizer, Params, Values, matrix_telemetry, pair_telemetry,
};
use rankgrad::tensor::{Backend, Cpu, Scalar};

/// The factors in f64.
fn factors<B: Backend>(pair: &FactorPair<B>) -> [DMatrix<f64>; 2] {
    [matrix(&pair.a), matrix(&pair.b)]
}

/// ‖X‖_F²/σ².
fn stable_rank(sigma: &[f64]) -> f64 {
    sigma.iter().map(|s| (s / sigma[0]).powi(2)).sum()
}

/// Checks everything but `Accuracy::Fast` on large matrices. `step`: the size of the change, relative.
fn check<T: Scalar>(case: &PairCase, step: f64, accuracy: Accuracy) -> Result<(), TestCaseError> {
    let before = case.pair::<T>();
    let mut after = before.clone();
    let moved = PairCase { seed: case.seed ^ 1, ..*case }.pair::<T>();
    after.a.axpby(step, &moved.a, 1.0);
    after.b.axpby(step, &moved.b, 1.0);
    let seen = pair_telemetry(Some(&before), &after, accuracy);

    let ([a0, b0], [a, b]) = (factors(&before), factors(&after));
    let w = &a * b.transpose(); // [m, n]
    // ΔA·B'ᵀ + A·ΔBᵀ: W − W' itself would cancel
    let dw = (&a - &a0) * b0.transpose() + &a * (&b - &b0).transpose(); // [m, n]
    let values = [&a, &b, &w, &dw].map(singular_values);
    let [sigma_a, sigma_b, sigma_w, update] = [0, 1, 2, 3].map(|i| values[i][0]);
    // two Krylov spaces of 24 steps hold every direction of these matrices; what is left is rounding, of T in ΔA and ΔB,
    // relative to the operands
    let rounding = 1e-12;
    let of_change = 4.0 * T::epsilon().f64() * ((&a - &a0).norm() * b0.norm() + a.norm() * (&b - &b0).norm());
    let near = |got: f64, want: f64, allowed: f64| (got - want).abs() <= allowed;
    let sizes = a.norm() * b.norm();
    prop_assert!(near(seen.sigma_a, sigma_a, rounding * sigma_a), "σ(A) {} {sigma_a}", seen.sigma_a);
    prop_assert!(near(seen.sigma_b, sigma_b, rounding * sigma_b), "σ(B) {} {sigma_b}", seen.sigma_b);
    prop_assert!(near(seen.w.sigma, sigma_w, rounding * sizes), "σ(W) {} {sigma_w}", seen.w.sigma);
    let own = seen.w.update.unwrap();
    prop_assert!(near(own, update, of_change + rounding * sizes * step), "‖ΔW‖ {own} {update}");
    let imbalance = (a.transpose() * &a - b.transpose() * &b).norm();
    let squares = a.norm_squared() + b.norm_squared();
    prop_assert!(near(seen.gauge_imbalance, imbalance, rounding * squares), "{}", seen.gauge_imbalance);
    if sigma_w > 1e-6 * sizes {
        let rank = stable_rank(&values[2]);
        prop_assert!(near(seen.w.stable_rank, rank, 1e-6 * rank), "{} {rank}", seen.w.stable_rank);
        let relative = update / sigma_w;
        let own = seen.w.update_over_w().unwrap();
        prop_assert!(near(own, relative, 1e-6 * relative + of_change / sigma_w), "{own} {relative}");
    }

    // the same without the step, and for the whole matrices
    let still = pair_telemetry(None, &after, accuracy);
    prop_assert_eq!((still.w.update, still.w.update_over_w()), (None, None));
    prop_assert_eq!((still.sigma_a, still.w.sigma), (seen.sigma_a, seen.w.sigma));
    let whole = matrix_telemetry(Some(&before.a), &after.a, accuracy);
    let da = singular_values(&(&a - &a0))[0];
    prop_assert_eq!(whole.sigma, seen.sigma_a);
    let allowed = 4.0 * T::epsilon().f64() * (&a - &a0).norm() + rounding * da;
    prop_assert!(near(whole.update.unwrap(), da, allowed), "{:?} {da}", whole.update);
    prop_assert!(near(whole.stable_rank, stable_rank(&values[0]), 1e-9 * whole.stable_rank));
    Ok(())
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn every_number_is_that_of_the_matrices(case in pair_case(), step in -4.0..0.0f64) {
        let step = 10f64.powf(step);
        for accuracy in [Accuracy::Fast, Accuracy::Exact] {
            check::<f64>(&case, step, accuracy)?;
            check::<f32>(&case, step, accuracy)?;
        }
    }
}

/// `Accuracy::Fast` on spectra that hide the largest value among others: never above it, and as near as its documentation says.
#[test]
fn estimates_are_from_below_and_near() {
    let (m, n, k) = (384, 256, 192);
    let spectra: [(&str, f64, Vec<f64>); 8] = [
        ("orthogonalised", 0.01, (0..k).map(|i| 1.2 - 0.52 * i as f64 / k as f64).collect()),
        ("all within 5 %", 0.01, (0..k).map(|i| 1.0 - 0.05 * i as f64 / k as f64).collect()),
        ("one 1 % above the others", 0.01, (0..k).map(|i| if i == 0 { 1.01 } else { 1.0 }).collect()),
        (
            "one 1 % above a slope",
            0.01,
            (0..k).map(|i| if i == 0 { 1.01 } else { 1.0 - 0.3 * i as f64 / k as f64 }).collect(),
        ),
        ("some, close", 0.01, (0..k).map(|i| (1.0 - 0.01 * i as f64).max(0.9)).collect()),
        ("one in ten", 1e-12, (0..k).map(|i| 0.1f64.powi(i)).collect()),
        ("falling", 1e-6, (0..k).map(|i| 1.0 / (1.0 + i as f64)).collect()),
        ("equal", 1e-12, vec![1.0; k as usize]),
    ];
    for (name, allowed, sigma) in &spectra {
        let mut worst = 0.0f64;
        for seed in 0..3 {
            let mut rng = rng(seed);
            let (u, v) = (orthonormal(&mut rng, m, k as usize), orthonormal(&mut rng, n, k as usize));
            let turn = orthonormal(&mut rng, k as usize, k as usize);
            let u = u * DMatrix::from_diagonal(&DVector::from_column_slice(sigma));
            // W whole, and as a pair in a gauge far from balanced
            let whole = tensor::<f64>(&(&u * v.transpose())); // [m, n]
            let pair = FactorPair::new(tensor::<f64>(&(u * &turn * 1e3)), tensor(&(v * turn * 1e-3)));
            for seen in [
                matrix_telemetry(None, &whole, Accuracy::Fast).sigma,
                pair_telemetry(None, &pair, Accuracy::Fast).w.sigma,
            ] {
                assert!(seen <= sigma[0] * (1.0 + 1e-12), "{name}: {seen} above {}", sigma[0]);
                worst = worst.max(1.0 - seen / sigma[0]);
            }
        }
        println!("{name}: at most {worst:.1e} below");
        assert!(worst <= *allowed, "{name}: {worst:e} below");
    }
}

#[test]
fn nothing_and_not_a_number() {
    let mut rng = rng(1);
    let a = gaussian(&mut rng, 5, 2);
    let pair = |b: f64| FactorPair::<Cpu<f32>>::new(tensor(&a), tensor(&DMatrix::from_element(4, 2, b)));
    for accuracy in [Accuracy::Fast, Accuracy::Exact] {
        let zero = pair_telemetry(Some(&pair(0.0)), &pair(0.0), accuracy);
        assert_eq!(zero.w, MatrixTelemetry { sigma: 0.0, stable_rank: 0.0, update: Some(0.0) });
        assert!(zero.w.update_over_w().unwrap().is_nan());
        // from W = 0 to W: the change is all of it
        let first = pair_telemetry(Some(&pair(0.0)), &pair(0.1), accuracy).w;
        assert!((first.update_over_w().unwrap() - 1.0).abs() < 1e-12, "{first:?}");
        assert!((first.stable_rank - 1.0).abs() < 1e-12, "{first:?}"); // all columns are the same
        let bad = pair_telemetry(Some(&pair(0.1)), &pair(f64::NAN), accuracy);
        assert!(bad.w.sigma.is_nan() && bad.w.stable_rank.is_nan() && bad.w.update.unwrap().is_nan());
        assert!(!bad.sigma_a.is_nan() && bad.sigma_b.is_nan() && bad.gauge_imbalance.is_nan());
        let huge = pair_telemetry(None, &pair(f64::INFINITY), accuracy);
        assert!(huge.sigma_b.is_nan() && huge.w.sigma.is_nan());
    }
    // f32 at the ends of its range
    for scale in [1e-38, 1e38] {
        let (a, b) = (&a * scale, DMatrix::from_element(4, 2, scale));
        let pair = FactorPair::<Cpu<f32>>::new(tensor(&a), tensor(&b));
        let [fast, exact] = [Accuracy::Fast, Accuracy::Exact].map(|how| pair_telemetry(None, &pair, how));
        assert!((fast.w.sigma / exact.w.sigma - 1.0).abs() < 1e-12, "{fast:?} {exact:?}");
        assert!((fast.w.stable_rank - 1.0).abs() < 1e-12 && fast.sigma_a > 0.0, "{fast:?}");
    }
}

/// A step of Spectron as its own report has it: σ before the step, and a ‖ΔW‖ near ρ(σ_A + σ_B).
#[test]
fn a_step_of_spectron_agrees_with_its_report() {
    let mut rng = rng(3);
    let mut params = Params::default();
    params.pair(
        "w",
        FactorPair::<Cpu<f64>>::new(tensor(&gaussian(&mut rng, 30, 6)), tensor(&gaussian(&mut rng, 20, 6))),
    );
    let mut optimizer = Optimizer::spectron(&params);
    for _ in 0..20 {
        let before = params.values.pairs[0].clone();
        let ga = tensor(&gaussian(&mut rng, 30, 6)); // [m, r]
        let gb = tensor(&gaussian(&mut rng, 20, 6)); // [n, r]
        let grads = Values { pairs: vec![FactorPair::new(ga, gb)], ..Values::default() };
        optimizer.step(&mut params, &grads, 0.1, 0.0);
        let seen = pair_telemetry(Some(&before), &params.values.pairs[0], Accuracy::Exact);
        let then = pair_telemetry(None, &before, Accuracy::Exact);
        let report = rankgrad::lowrank::Rule::reports(&optimizer.pairs)[0];
        assert!(report.sigma_a <= then.sigma_a * (1.0 + 1e-12) && report.sigma_a > 0.7 * then.sigma_a);
        let most = 1.2024 * report.rho * (then.sigma_a + then.sigma_b) + (1.2024 * report.rho).powi(2);
        let update = seen.w.update.unwrap();
        assert!(update <= most && update > 0.1 * most, "{update} of {most}");
    }
}

#[test]
#[should_panic(expected = "sub: [5, 2] and [4, 2]")]
fn another_shape_is_refused() {
    let pair = |m| FactorPair::<Cpu<f32>>::new(tensor(&DMatrix::zeros(m, 2)), tensor(&DMatrix::zeros(3, 2)));
    pair_telemetry(Some(&pair(4)), &pair(5), Accuracy::Fast);
}
