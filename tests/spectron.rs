//! Newton–Schulz, power iteration, Spectron's step, factor pairs, initialisation and AdamW as properties.
//!
//! Oracles: nalgebra's symmetric eigenvalues in f64 (see common), the scalar map of Newton–Schulz, and Algorithm 1 written out with nalgebra matrices.
//! Letters: W [m, n] = A·Bᵀ, r rank; σ singular values; M momentum, O orthogonalised momentum; η, ρ, β, λ as in spectron.rs.

mod common;

use common::{
    PairCase, bits, config, gaussian, matrix, on_spectrum, orthonormal, pair_case, rng, singular_values,
    spectral_norm, spectrum, tensor, with_spectrum,
};
use nalgebra::{DMatrix, DVector};
use proptest::prelude::*;
use rankgrad::lowrank::{
    self, AdamW, FactorPair, NewtonSchulz, Optimizer, Orthogonaliser, POLAR_EXPRESS, PairInit, Params, Rule,
    Space, Spectron, SpectronConfig, clip_global_norm, init_pair, newton_schulz, power_iteration,
    rank_for_energy, start_vector,
};
use rankgrad::tensor::{Cpu, Scalar, Tensor};

/// What rounding can do to Newton–Schulz, in unit roundoffs: five steps amplify a small singular value, and with it a rounding
/// of the input relative to ‖M‖, by 3.4445⁵ = 485; ten roundings are allowed for (2.9e-4 in f32).
const NEWTON_SCHULZ: f64 = 10.0 * 485.0;
/// The same for factors after six steps of Spectron, relative to ‖factor‖ + η: O counts with its weight ρ < η. Seen: 23.
const ALGORITHM_1: f64 = 485.0;
/// Other rounding-only comparisons, in unit roundoffs relative to the size of the operands: sums of at most 50 terms.
const ROUNDING: f64 = 100.0;
/// What the oracle itself is good to (see common).
const ORACLE: f64 = 1e-13;
/// The largest value that p takes on [0, 1.2024] (at 0.5545), to 5 digits.
const OVERSHOOT: f64 = 1.20237;

fn unit<T: Scalar>() -> f64 {
    T::epsilon().f64() / 2.0
}

/// The singular values of M after the iteration: p applied `steps` times to σ/‖M‖_F.
fn mapped(how: NewtonSchulz, x: f64) -> f64 {
    let [a, b, c] = how.coefficients;
    (0..how.steps).fold(x, |x, _| a * x + b * x.powi(3) + c * x.powi(5))
}

fn check_newton_schulz<T: Scalar>(m: &DMatrix<f64>, scale: f64, how: NewtonSchulz) -> f64 {
    let other = match how.space {
        Space::Plain => Space::Gram,
        Space::Gram | Space::Bf16 => Space::Plain,
    };
    let spaces = [how, NewtonSchulz { space: other, ..how }];
    let errors = spaces.map(|how| {
        let apply = |x: &Tensor<Cpu<T>>| newton_schulz(&[x], how).remove(0);
        check_orthogonaliser::<T>(m, scale, apply, |x| mapped(how, x))
    });
    errors[0].max(errors[1])
}

/// Checks an orthogonaliser on M·scale in `T` against the map of the singular values; returns the error in multiples of the
/// unit roundoff.
fn check_orthogonaliser<T: Scalar>(
    m: &DMatrix<f64>,
    scale: f64,
    apply: impl Fn(&Tensor<Cpu<T>>) -> Tensor<Cpu<T>>,
    map: impl Fn(f64) -> f64,
) -> f64 {
    let input = tensor::<T>(&(m * scale)); // [p, q]
    let exact = matrix(&input); // what T holds of it
    let output = matrix(&apply(&input));
    assert!(output.iter().all(|x| x.is_finite()), "{exact} → {output}");
    let biggest = exact.amax();
    if biggest == 0.0 {
        assert_eq!(output.amax(), 0.0, "0 stays 0");
        return 0.0;
    }
    let exact = exact / biggest; // the oracle sees no underflow
    let norm = exact.norm();
    let want = on_spectrum(&exact, |s| map(s / norm));
    // the same singular vectors, each value mapped; and once more by the values alone
    let error = (&output - &want).norm();
    let mut values: Vec<f64> = singular_values(&exact).iter().map(|s| map(s / norm).abs()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    for (got, want) in singular_values(&output).iter().zip(&values) {
        // the steepest map multiplies the oracle's 1e-14 by 3e4
        assert!((got - want).abs() <= error + 1e-9, "a singular value is {got}, not {want}");
    }
    error / unit::<T>()
}

fn small_size() -> impl Strategy<Value = usize> {
    prop_oneof![2 => Just(1usize), 4 => 2..12usize, 2 => 15..34usize]
}

/// A matrix with a drawn spectrum: tall, wide or square.
fn spectral_matrix() -> impl Strategy<Value = DMatrix<f64>> {
    (small_size(), small_size(), any::<u64>()).prop_flat_map(|(m, n, seed)| {
        spectrum(m.min(n)).prop_map(move |sigma| with_spectrum(&mut rng(seed), m, n, &sigma))
    })
}

#[test]
fn the_oracle_finds_known_spectra() {
    for (m, n, sigma) in
        [(7, 4, vec![3.0, 1.0, 1.0, 1e-9]), (4, 9, vec![2.0, 2.0, 0.0, 0.0]), (5, 5, vec![1.0; 5])]
    {
        let found = singular_values(&with_spectrum(&mut rng(1), m, n, &sigma));
        for (a, b) in found.iter().zip(&sigma) {
            assert!((a - b).abs() < 1e-14, "{found:?}");
        }
        let x = with_spectrum(&mut rng(1), m, n, &sigma);
        assert!((on_spectrum(&x, |s| s) - &x).norm() < 1e-14);
        assert!((on_spectrum(&x, |s| s.powi(3)) - &x * x.transpose() * &x).norm() < 1e-13);
    }
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn newton_schulz_maps_singular_values_and_keeps_singular_vectors(
        m in spectral_matrix(),
        exponent in prop_oneof![Just(0), Just(-20), Just(-44), -12..12i32],
    ) {
        let how = NewtonSchulz::default();
        let scale = 10f64.powi(exponent);
        for error in [check_newton_schulz::<f64>(&m, scale, how), check_newton_schulz::<f32>(&m, scale, how)] {
            prop_assert!(error < NEWTON_SCHULZ, "{error} unit roundoffs");
        }
        // f64 reaches further down, to its own subnormal numbers, and up
        for scale in [1e-300, 1e-315, 1e150] {
            let error = check_newton_schulz::<f64>(&m, scale, how);
            prop_assert!(error < NEWTON_SCHULZ, "{error} unit roundoffs at {scale}");
        }
        let error = check_newton_schulz::<f32>(&m, 1e37, how);
        prop_assert!(error < NEWTON_SCHULZ, "{error} unit roundoffs");
    }

    #[test]
    fn newton_schulz_with_other_coefficients(m in spectral_matrix(), steps in 0..9usize) {
        // the convergent quintic (Higham 2008, eq. 8.20) and the cubic; neither amplifies more than (15/8)⁸ = 153
        for coefficients in [[15.0 / 8.0, -10.0 / 8.0, 3.0 / 8.0], [1.5, -0.5, 0.0]] {
            let how = NewtonSchulz { coefficients, steps, space: Space::Gram };
            prop_assert!(check_newton_schulz::<f64>(&m, 1.0, how) < NEWTON_SCHULZ);
            prop_assert!(check_newton_schulz::<f32>(&m, 1.0, how) < NEWTON_SCHULZ);
        }
    }

    #[test]
    fn polar_express_maps_singular_values(m in spectral_matrix(), steps in 0..10usize, exponent in -12..12i32) {
        for space in [Space::Plain, Space::Gram] {
            let how = Orthogonaliser::PolarExpress { steps, space };
            let coefficients = how.coefficients();
            let map = |x| coefficients.iter().fold(x, |x: f64, [a, b, c]| a * x + b * x.powi(3) + c * x.powi(5));
            let scale = 10f64.powi(exponent);
            let error = check_orthogonaliser::<f64>(&m, scale, |x| how.apply(&[x]).remove(0), map) * unit::<f64>();
            // the oracle's own 1e-14 is 90 unit roundoffs in f64, amplified alike
            prop_assert!(error <= 10.0 * how.rounding(unit::<f64>(), 1) + ORACLE, "{error:e} in f64");
            let error = check_orthogonaliser::<f32>(&m, scale, |x| how.apply(&[x]).remove(0), map) * unit::<f32>();
            prop_assert!(error <= how.rounding(unit::<f32>(), 1) + ORACLE, "{error:e} in f32");
        }
    }

    /// U·Vᵀ changes with M by ‖ΔM‖/σ_min at most: here σ_min ≥ 1e-6 σ_max.
    #[test]
    fn the_polar_factor_is_exact(m in small_size(), n in small_size(), decades in 0.0..6.0f64, exponent in -20..20i32, seed: u64) {
        let k = m.min(n);
        let sigma: Vec<f64> = (0..k).map(|i| 10f64.powf(-decades * i as f64 / k.max(2) as f64)).collect();
        let mut rng = rng(seed);
        let (u, v) = (orthonormal(&mut rng, m, k), orthonormal(&mut rng, n, k));
        let w = &u * DMatrix::from_diagonal(&DVector::from_vec(sigma)) * v.transpose();
        let input = tensor::<f64>(&(w * 10f64.powi(exponent))); // [m, n]
        let got = matrix(&Orthogonaliser::PolarFactor.apply(&[&input])[0]);
        let error = (&got - u * v.transpose()).norm();
        prop_assert!(error < ROUNDING * (k as f64).sqrt() * 10f64.powf(decades) * unit::<f64>(), "{error:e}");
        let excess = spectral_norm(&got) - 1.0;
        prop_assert!(excess <= Orthogonaliser::PolarFactor.rounding(unit::<f64>(), k), "{excess:e}");
    }

    #[test]
    fn no_output_exceeds_its_bound(m in spectral_matrix(), steps in 0..8usize) {
        let space = Space::Gram;
        let jordan = NewtonSchulz::default();
        let convergent = NewtonSchulz { coefficients: [15.0 / 8.0, -10.0 / 8.0, 3.0 / 8.0], ..jordan };
        let all = [
            Orthogonaliser::NewtonSchulz(NewtonSchulz { steps, ..jordan }),
            Orthogonaliser::NewtonSchulz(NewtonSchulz { steps, ..convergent }),
            Orthogonaliser::PolarExpress { steps, space },
            Orthogonaliser::PolarFactor,
        ];
        let r = m.nrows().min(m.ncols());
        for how in all {
            let norm = spectral_norm(&matrix(&how.apply(&[&tensor::<f64>(&m)])[0]));
            prop_assert!(norm <= how.norm_bound() * (1.0 + how.rounding(unit::<f64>(), r)) + ORACLE, "{how:?}: {norm}");
            let norm = spectral_norm(&matrix(&how.apply(&[&tensor::<f32>(&m)])[0]));
            prop_assert!(norm <= how.norm_bound() * (1.0 + how.rounding(unit::<f32>(), r)), "{how:?} in f32: {norm}");
        }
    }

    #[test]
    fn newton_schulz_never_exceeds_its_overshoot(m in spectral_matrix(), steps in 1..12usize) {
        let how = NewtonSchulz { steps, ..NewtonSchulz::default() };
        let in_f64 = spectral_norm(&matrix(&newton_schulz(&[&tensor::<f64>(&m)], how)[0]));
        let in_f32 = spectral_norm(&matrix(&newton_schulz(&[&tensor::<f32>(&m)], how)[0]));
        prop_assert!(in_f64 <= OVERSHOOT + 1e-5, "{in_f64}"); // OVERSHOOT has five digits
        prop_assert!(in_f32 <= 1.2024 * (1.0 + 1e-5), "{in_f32}");
    }

    #[test]
    fn newton_schulz_of_a_batch_equals_singles(m in small_size(), n in small_size(), seed: u64) {
        let mut rng = rng(seed);
        let mut batch: Vec<Tensor<Cpu<f32>>> = (0..3).map(|_| tensor(&gaussian(&mut rng, m, n))).collect();
        batch[1] = batch[1].zeros_like(); // a zero in the middle disturbs nobody
        let how = NewtonSchulz::default();
        let together = newton_schulz(&batch.iter().collect::<Vec<_>>(), how);
        for (x, y) in batch.iter().zip(&together) {
            prop_assert_eq!(bits(&newton_schulz(&[x], how)[0]), bits(y));
        }
    }

    #[test]
    fn power_iteration_estimates_from_below_and_converges(m in spectral_matrix(), exponent in -15..15i32) {
        let m = m * 10f64.powi(exponent);
        let sigma = spectral_norm(&m);
        let (w, w32) = (tensor::<f64>(&m), tensor::<f32>(&m));
        let mut u = [start_vector(w.device(), w.rows())]; // [p, 1]
        let mut u32 = [start_vector(w32.device(), w.rows())]; // [p, 1]
        let mut last = 0.0;
        for _ in 0..30 {
            // one step per call, from where the last one stopped
            let estimate = power_iteration(&[&w], &mut u, 1)[0];
            prop_assert!(estimate <= sigma * (1.0 + 1e-13), "{estimate} above {sigma}");
            prop_assert!(estimate >= last * (1.0 - 1e-13), "{estimate} after {last}");
            last = estimate;
            let estimate = power_iteration(&[&w32], &mut u32, 1)[0];
            prop_assert!(estimate <= sigma * (1.0 + ROUNDING * unit::<f32>()), "{estimate} above {sigma} in f32");
        }
        // 30 steps bring every start that is not orthogonal to the top to within ln(1/|cos|²)/60 of it at worst
        prop_assert!(last >= 0.7 * sigma, "{last} of {sigma}");
        let mut fresh = [start_vector(w.device(), w.rows())]; // [p, 1]
        let at_once = power_iteration(&[&w], &mut fresh, 30)[0];
        prop_assert!((at_once - last).abs() <= 1e-13 * sigma, "30 calls give {last}, 30 steps {at_once}");
        let norm = u[0].norm();
        prop_assert!(sigma == 0.0 || (norm - 1.0).abs() < 1e-14, "u has norm {norm}");
    }
}

/// The published property of each of Polar Express's steps, by the equioscillation theorem: over [l', u] the error of p/scale
/// alternates, equally large, at l', at the maximum and the minimum between, and at u. l' = max(l, cushion·u).
#[test]
fn polar_express_equioscillates() {
    let (mut l, mut u) = (1e-3, 1.0);
    for [a, b, c] in POLAR_EXPRESS {
        let p = |x: f64| a * x + b * x.powi(3) + c * x.powi(5);
        assert!((p(l) + p(u) - 2.0).abs() < 1e-9, "not centred");
        let root = (9.0 * b * b - 20.0 * a * c).sqrt();
        let [top, bottom] = [-root, root].map(|root| ((-3.0 * b + root) / (10.0 * c)).sqrt());
        let values = [p(f64::max(l, 0.02407327424182761 * u)), p(top), p(bottom), p(u)];
        let scale = 0.5 * (values[0] + values[1]);
        let errors = values.map(|y| y / scale - 1.0);
        let largest = errors[3];
        for (error, sign) in errors.iter().zip([-1.0, 1.0, -1.0, 1.0]) {
            assert!((error - sign * largest).abs() < 1e-9, "{errors:?}");
        }
        (l, u) = (p(l), 2.0 - p(l));
    }
    // what the steps have made of [1e-3, 1], and how many it takes
    let error = |steps| {
        let how = Orthogonaliser::PolarExpress { steps, space: Space::Gram };
        (1..=1000).map(|i| (how.map(i as f64 * 1e-3) - 1.0).abs()).fold(0.0, f64::max)
    };
    assert!(
        (0.1..0.4).contains(&error(5)) && error(6) < 0.05 && error(8) < 1e-9,
        "{} {} {}",
        error(5),
        error(6),
        error(8)
    );
}

/// At a layer's shape, over singular values that f32's Gram matrix cannot hold: the r×r iteration is as accurate as promised.
#[test]
fn gram_space_at_a_layers_shape() {
    let (p, r) = (384, 96);
    let mut rng = rng(8);
    let (u, v) = (orthonormal(&mut rng, p, r), orthonormal(&mut rng, r, r));
    for decades in [0.0, 2.0, 4.0, 8.0] {
        let sigma: Vec<f64> = (0..r).map(|i| 10f64.powf(-decades * i as f64 / (r - 1) as f64)).collect();
        let norm = sigma.iter().map(|s| s * s).sum::<f64>().sqrt();
        let put = |f: &dyn Fn(f64) -> f64| {
            let values = sigma.iter().map(|&s| f(s)).collect();
            &u * DMatrix::from_diagonal(&DVector::from_vec(values)) * v.transpose()
        };
        let m = put(&|s| s);
        for how in [NewtonSchulz::default(), NewtonSchulz { space: Space::Plain, ..Default::default() }] {
            let want = put(&|s| mapped(how, s / norm));
            let got = matrix(&newton_schulz(&[&tensor::<f32>(&m)], how)[0]);
            let error = (got - want).norm() / unit::<f32>();
            println!("condition 1e{decades}, {:?}: {error:.0} unit roundoffs", how.space);
            assert!(error < NEWTON_SCHULZ, "{error}");
        }
    }
}

#[test]
fn newton_schulz_map_is_the_polynomial() {
    let how = NewtonSchulz::default();
    assert!((how.map(0.5545) - OVERSHOOT).abs() < 1e-5);
    assert!((0..=12_024).all(|i| how.map(i as f64 * 1e-4) <= OVERSHOOT + 1e-5));
    // five steps bring [1.51e-3, 1] into [0.68, 1.2024]
    for i in 151..=100_000 {
        let y = mapped(how, i as f64 * 1e-5);
        assert!((0.68..=1.2024).contains(&y), "{y} from {i}e-5");
    }
    assert!(newton_schulz::<Cpu<f32>>(&[], how).is_empty());
}

#[test]
fn a_warm_start_follows_a_moving_matrix() {
    let mut rng = rng(5);
    let mut m = with_spectrum(&mut rng, 40, 12, &[1.0, 0.8, 0.5, 0.2]);
    let mut u = [start_vector(&Cpu::<f64>::default(), 40)]; // [40, 1]
    power_iteration(&[&tensor::<f64>(&m)], &mut u, 50);
    for _ in 0..50 {
        m += gaussian(&mut rng, 40, 12) * 1e-3;
        let w = tensor::<f64>(&m);
        let sigma = spectral_norm(&m);
        let warm = power_iteration(&[&w], &mut u, 1)[0];
        assert!(warm > 0.999 * sigma && warm <= sigma * (1.0 + 1e-13), "{warm} of {sigma}");
    }
}

fn power_iteration_of_nothing_and_little<T: Scalar>() {
    let cpu = Cpu::<T>::default();
    let start = start_vector(&cpu, 6); // [6, 1]
    let mut u = [start.clone()];
    assert_eq!(power_iteration(&[&Tensor::zeros(&cpu, [6, 3])], &mut u, 3), [0.0]);
    assert_eq!(bits(&u[0]), bits(&start), "u waits for a matrix that is not zero");
    // below the smallest normal number, where 1/σ overflows
    let tiny = T::min_positive_value().f64() / 1024.0;
    let w = tensor::<T>(&(DMatrix::from_element(6, 3, 1.0) * tiny)); // [6, 3]
    let sigma = power_iteration(&[&w], &mut u, 3)[0];
    assert!((sigma / (tiny * 18f64.sqrt()) - 1.0).abs() < 0.01, "{sigma} of a subnormal matrix");
}

#[test]
fn power_iteration_at_zero_and_at_subnormals() {
    power_iteration_of_nothing_and_little::<f32>();
    power_iteration_of_nothing_and_little::<f64>();
}

// ---- Algorithm 1, written out

struct Factor {
    x: DMatrix<f64>,
    momentum: DMatrix<f64>,
    u: DVector<f64>,
}

impl Factor {
    fn new(x: DMatrix<f64>) -> Self {
        let u = start_vector(&Cpu::<f64>::default(), x.nrows()).to_vec();
        Self { momentum: &x * 0.0, x, u: DVector::from_vec(u) }
    }

    /// M ← βM + (1−β)G; O through five naive iterations; σ, u through one power iteration.
    fn direction_and_sigma(&mut self, g: &DMatrix<f64>, beta: f64) -> (DMatrix<f64>, f64) {
        self.momentum = &self.momentum * beta + g * (1.0 - beta);
        let mut o = self.momentum.clone();
        if o.norm() > 0.0 {
            o /= o.norm();
            for _ in 0..5 {
                let gram = o.transpose() * &o;
                o = &o * 3.4445 - &o * &gram * 4.7750 + &o * &gram * &gram * 2.0315;
            }
        }
        let mut sigma = 0.0;
        let v = self.x.transpose() * &self.u;
        if v.norm() > 0.0 {
            self.u = (&self.x * v.normalize()).normalize();
            let v = (self.x.transpose() * &self.u).normalize();
            sigma = (self.u.transpose() * &self.x * v)[0];
        }
        (o, sigma)
    }
}

struct Algorithm1(Vec<[Factor; 2]>);

impl Algorithm1 {
    fn new<T: Scalar>(pairs: &[FactorPair<Cpu<T>>]) -> Self {
        Self(pairs.iter().map(|p| [Factor::new(matrix(&p.a)), Factor::new(matrix(&p.b))]).collect())
    }

    fn step(&mut self, grads: &[[DMatrix<f64>; 2]], eta: f64, beta: f64, decay: f64) {
        for ([a, b], [ga, gb]) in self.0.iter_mut().zip(grads) {
            let (oa, sigma_a) = a.direction_and_sigma(ga, beta);
            let (ob, sigma_b) = b.direction_and_sigma(gb, beta);
            let rho = eta / (sigma_a + sigma_b + 1.0);
            let shrink = (1.0 - eta * decay).sqrt();
            a.x = &a.x * shrink - oa * rho;
            b.x = &b.x * shrink - ob * rho;
        }
    }
}

fn pairs_of<T: Scalar>(grads: &[[DMatrix<f64>; 2]]) -> Vec<FactorPair<Cpu<T>>> {
    grads.iter().map(|[a, b]| FactorPair::new(tensor(a), tensor(b))).collect()
}

fn draw_grads<T: Scalar>(
    pairs: &[FactorPair<Cpu<T>>],
    rng: &mut rand_chacha::ChaCha8Rng,
) -> Vec<[DMatrix<f64>; 2]> {
    // f32 holds them exactly, so that both precisions see the same gradients
    let mut exact = |m, n| gaussian(rng, m, n).map(|x| f64::from(x as f32));
    pairs.iter().map(|p| [exact(p.outputs(), p.rank()), exact(p.inputs(), p.rank())]).collect()
}

/// Runs `steps` of Spectron in `T` and of Algorithm 1 in f64; the largest distance of a factor, in unit roundoffs relative to
/// the factor and the step.
fn distance_from_algorithm_1<T: Scalar>(pairs: Vec<FactorPair<Cpu<T>>>, seed: u64, decay: f64) -> f64 {
    let (eta, beta) = (0.1, 0.8);
    let mut pairs = pairs;
    let mut naive = Algorithm1::new(&pairs);
    let settings = SpectronConfig { beta, weight_decay: decay, ..Default::default() };
    let mut spectron = Spectron::with(settings, &pairs);
    let mut rng = rng(seed);
    let mut worst = 0.0f64;
    for t in 1..=6 {
        let grads = draw_grads(&pairs, &mut rng);
        spectron.step(&mut pairs, &pairs_of(&grads), &vec![eta; grads.len()], t);
        naive.step(&grads, eta, beta, decay);
        for (pair, want) in pairs.iter().zip(&naive.0) {
            for (got, want) in [&pair.a, &pair.b].into_iter().zip(want) {
                let error = (matrix(got) - &want.x).norm() / (want.x.norm() + eta);
                worst = worst.max(error / unit::<T>());
            }
        }
    }
    // what a checkpoint keeps: the momenta are averages (β and 1 − β), which O does not show
    let (all, state) = (naive.0.iter().flatten(), spectron.state());
    let momenta = &state[..2 * naive.0.len()];
    for (want, (what, i, momentum)) in all.zip(momenta) {
        let error = (matrix(momentum) - &want.momentum).norm() / (want.momentum.len() as f64).sqrt(); // gradients are N(0, 1)
        assert!(error < ROUNDING * unit::<T>(), "{what}.{i}: {error}");
    }
    worst
}

proptest! {
    #![proptest_config(config(64))]

    /// Several pairs at once, some of one shape (they run as a batch), with any gauge and with B = 0.
    #[test]
    fn spectron_is_algorithm_1(cases in prop::collection::vec(pair_case(), 1..5), twin: bool, decay in 0.0..2.0f64, seed: u64) {
        let mut cases = cases;
        if twin {
            cases.push(PairCase { seed: seed ^ 1, zero_b: false, ..cases[0] });
        }
        let pairs = |_: ()| cases.iter().map(PairCase::pair::<f64>).collect();
        let error = distance_from_algorithm_1::<f64>(pairs(()), seed, decay);
        prop_assert!(error < ALGORITHM_1, "{error} unit roundoffs in f64");
        let error = distance_from_algorithm_1::<f32>(cases.iter().map(PairCase::pair::<f32>).collect(), seed, decay);
        prop_assert!(error < ALGORITHM_1, "{error} unit roundoffs in f32");
    }

    /// The paper's bound, with its conditions repaired: ρ ≤ 1 and ‖O‖ ≤ 1.2024 give ‖ΔW‖ ≤ 1.2024²·ρ(s + 1) with s the true
    /// σ_A + σ_B.
    #[test]
    fn a_step_moves_w_by_no_more_than_the_honest_bound(case in pair_case(), eta in 1e-3..1.0f64, power_steps in 1..20usize) {
        let mut pairs = [case.pair::<f64>()];
        let before = pairs[0].clone();
        let grads = pairs_of(&draw_grads(&pairs, &mut rng(case.seed)));
        let settings = SpectronConfig { power_steps, ..Default::default() };
        let mut spectron = Spectron::with(settings, &pairs);
        spectron.step(&mut pairs, &grads, &vec![eta; grads.len()], 1);

        let report = spectron.reports()[0];
        let moved = |x: &Tensor<Cpu<f64>>, y: &Tensor<Cpu<f64>>| spectral_norm(&(matrix(x) - matrix(y)));
        let (sigma_a, sigma_b) = (spectral_norm(&matrix(&before.a)), spectral_norm(&matrix(&before.b)));
        let (oa, ob) = (moved(&pairs[0].a, &before.a) / report.rho, moved(&pairs[0].b, &before.b) / report.rho);
        let change = moved(&pairs[0].to_dense(), &before.to_dense());
        // ΔA is read off as a difference, whose rounding is relative to A
        let slack = 1.0 + 1e-12;
        let fuzz = 1e-13 * (1.0 + sigma_a) * (1.0 + sigma_b) * (1.0 + sigma_a + sigma_b);
        let rho = report.rho;
        let overshoot = OVERSHOOT + 1e-5;
        let fuzz_o = 1e-13 * (1.0 + sigma_a + sigma_b) / rho;
        prop_assert!(oa <= overshoot + fuzz_o && ob <= overshoot + fuzz_o, "‖O_A‖ = {oa}, ‖O_B‖ = {ob}");
        prop_assert!(report.sigma_a <= sigma_a * slack && report.sigma_b <= sigma_b * slack);
        prop_assert!((rho - eta / (report.sigma_a + report.sigma_b + 1.0)).abs() <= 1e-15 * rho);
        prop_assert!(rho <= 1.0);
        let honest = overshoot.powi(2) * rho * (sigma_a + sigma_b + 1.0);
        prop_assert!(change <= honest * slack + fuzz, "‖ΔW‖ = {change}, η = {eta}, honest bound {honest}");
        if power_steps >= 10 {
            // 0.7 of each σ is known by then: the bound is η to within 1.2024²/0.7
            prop_assert!(change <= eta * overshoot.powi(2) / 0.7 + fuzz, "‖ΔW‖ = {change}, η = {eta}");
        }
    }

    /// W shrinks by exactly 1 − ηλ where neither gradient nor momentum moves it, whatever the gauge.
    #[test]
    fn weight_decay_shrinks_the_composed_w(case in pair_case(), eta in 1e-3..0.5f64, decay in 0.0..1.9f64) {
        let mut pairs = [case.pair::<f64>()];
        let before = matrix(&pairs[0].to_dense());
        let zeros = [pairs[0].zeros_like()];
        let settings = SpectronConfig { weight_decay: decay, ..Default::default() };
        let mut spectron = Spectron::with(settings, &pairs);
        for t in 1..=3 {
            spectron.step(&mut pairs, &zeros, &vec![eta; zeros.len()], t);
            prop_assert_eq!(spectron.reports()[0].shrink, 1.0 - eta * decay);
        }
        let want = &before * (1.0 - eta * decay).powi(3);
        let size = pairs[0].a.norm() * pairs[0].b.norm();
        prop_assert!((matrix(&pairs[0].to_dense()) - want).norm() <= ROUNDING * unit::<f64>() * size);
    }

    /// (A·Q, B·Q) with Q orthogonal is the same W, and a step moves it in the same way.
    #[test]
    fn an_orthogonal_gauge_changes_nothing(case in pair_case(), seed: u64) {
        let pair = case.pair::<f64>();
        let mut rng = rng(seed);
        let q = orthonormal(&mut rng, case.r, case.r);
        let turned = FactorPair::new(tensor(&(matrix(&pair.a) * &q)), tensor(&(matrix(&pair.b) * &q)));
        let dw = gaussian(&mut rng, case.m, case.n);
        let plain = update_of_w(pair.clone(), &dw);
        let other = update_of_w(turned, &dw);
        // the amplification of Newton–Schulz, on factors of any size
        let size = (1.0 + pair.a.norm()) * (1.0 + pair.b.norm());
        let error = (plain - other).norm() / size;
        prop_assert!(error <= NEWTON_SCHULZ * unit::<f64>(), "{error}");
    }
}

/// ΔW of one Spectron step at η = 0.1 on a loss whose gradient in W is `dw`.
fn update_of_w(pair: FactorPair<Cpu<f64>>, dw: &DMatrix<f64>) -> DMatrix<f64> {
    let grad = FactorPair::new(tensor(&(dw * matrix(&pair.b))), tensor(&(dw.transpose() * matrix(&pair.a))));
    let before = matrix(&pair.to_dense());
    let mut pairs = [pair];
    Spectron::new(&pairs).step(&mut pairs, &[grad], &[0.1], 1);
    matrix(&pairs[0].to_dense()) - before
}

#[test]
fn a_skewed_gauge_changes_the_update_of_the_same_w() {
    let case = PairCase { m: 12, n: 9, r: 4, scale: 0.3, gauge: 1.0, zero_b: false, seed: 3 };
    let dw = gaussian(&mut rng(4), 12, 9);
    let pair = case.pair::<f64>();
    let plain = update_of_w(pair.clone(), &dw);
    let skewed = FactorPair::new(pair.a.scale(8.0), pair.b.scale(1.0 / 8.0));
    assert!((matrix(&skewed.to_dense()) - matrix(&pair.to_dense())).norm() < 1e-14);
    let other = update_of_w(skewed.clone(), &dw);
    assert!((&plain - other).norm() > 0.1 * plain.norm(), "it should not be invariant");
    // balancing chooses one gauge of the family, up to an orthogonal one
    let [one, two] = [pair, skewed].map(|p| update_of_w(p.balance(), &dw));
    assert!((&one - two).norm() < 1e-11 * one.norm(), "balanced, it is");
}

/// `steps` steps under gradients of fixed losses in W; W before and after each.
fn path_of_w(pair: FactorPair<Cpu<f64>>, settings: SpectronConfig, steps: u64) -> Vec<DMatrix<f64>> {
    let (m, n) = (pair.outputs(), pair.inputs());
    let mut pairs = [pair];
    let mut spectron = Spectron::with(settings, &pairs);
    let mut path = vec![matrix(&pairs[0].to_dense())];
    for t in 1..=steps {
        let dw = gaussian(&mut rng(100 + t), m, n);
        let [pair] = &pairs;
        let grad =
            FactorPair::new(tensor(&(&dw * matrix(&pair.b))), tensor(&(dw.transpose() * matrix(&pair.a))));
        spectron.step(&mut pairs, &[grad], &[0.1], t);
        path.push(matrix(&pairs[0].to_dense()));
    }
    path
}

proptest! {
    #![proptest_config(config(64))]

    /// Balanced before every step, the path of W is one for all gauges: that of the balanced pair. Rounding is amplified by
    /// Newton–Schulz in each step, and by the skew of the gauge.
    #[test]
    fn balancing_every_step_makes_the_gauge_irrelevant(
        m in 4..16usize, n in 4..16usize, r in 1..5usize, gauge in -2.0..2.0f64, certify: bool, nesterov: bool, seed: u64,
    ) {
        let case = PairCase { m, n, r, scale: 0.5, gauge: 1.0, zero_b: false, seed };
        let pair = case.pair::<f64>().balance();
        let mut rng = rng(seed ^ 7);
        let stretch: Vec<f64> = (0..r).map(|i| 10f64.powf(gauge * i as f64 / r as f64)).collect();
        let s = orthonormal(&mut rng, r, r) * DMatrix::from_diagonal(&DVector::from_vec(stretch)) * orthonormal(&mut rng, r, r);
        let inverse = s.clone().try_inverse().unwrap().transpose();
        let skewed = FactorPair::new(tensor(&(matrix(&pair.a) * s)), tensor(&(matrix(&pair.b) * inverse)));
        let settings = SpectronConfig { balance_every: 1, certify, nesterov, ..Default::default() };
        let (one, two) = (path_of_w(pair.clone(), settings, 5), path_of_w(skewed, settings, 5));
        for (x, y) in one.iter().zip(&two) {
            prop_assert!((x - y).norm() < 1e-7 * x.norm(), "{:e}", (x - y).norm() / x.norm());
        }
        // the first step is that of the balanced pair without balancing
        let plain = path_of_w(pair, SpectronConfig { balance_every: 0, ..settings }, 1);
        prop_assert!((&plain[1] - &one[1]).norm() < 1e-7 * plain[1].norm());
    }
}

#[test]
fn balancing_moves_nothing_else_and_skips_what_it_cannot_do() {
    let case = PairCase { m: 12, n: 9, r: 4, scale: 0.3, gauge: 30.0, zero_b: false, seed: 3 };
    let settings = SpectronConfig { balance_every: 2, ..Default::default() };
    let step = |settings, pair: &FactorPair<Cpu<f64>>, eta| {
        let mut pairs = [pair.clone()];
        let mut spectron = Spectron::with(settings, &pairs);
        for t in 1..=2 {
            let grads = pairs_of(&draw_grads(&pairs, &mut rng(9 + t)));
            spectron.step(&mut pairs, &grads, &[eta], t);
        }
        let [pair] = pairs;
        pair
    };
    // η = 0: the second step balances and does nothing else
    let pair = case.pair::<f64>();
    let after = step(settings, &pair, 0.0);
    assert!(pair.gauge_imbalance() > 1.0 && after.gauge_imbalance() < 1e-13);
    assert!(after.change_since(&pair).spectral_norm() < 1e-13);
    // B = 0, and B of rank 1: as without balancing, to the bit
    let zero_b = PairCase { zero_b: true, ..case }.pair::<f64>();
    let column = gaussian(&mut rng(1), 9, 1);
    let flat = FactorPair::new(pair.a.clone(), tensor(&(&column * DMatrix::from_element(1, 4, 1.0))));
    for pair in [zero_b, flat] {
        let (with, without) =
            (step(settings, &pair, 0.0), step(SpectronConfig { balance_every: 0, ..settings }, &pair, 0.0));
        assert_eq!((bits(&with.a), bits(&with.b)), (bits(&without.a), bits(&without.b)));
    }
}

// ---- factor pairs as data

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn from_dense_drops_the_smallest_singular_values(m in small_size(), n in small_size(), cut in 0.0..1.0f64, seed: u64, sigma in spectrum(34)) {
        let k = m.min(n);
        let r = 1 + ((k - 1) as f64 * cut) as usize;
        let mut rng = rng(seed);
        let w = with_spectrum(&mut rng, m, n, &sigma);
        let (pair, error) = FactorPair::from_dense(&tensor::<f64>(&w), r);
        prop_assert_eq!((pair.outputs(), pair.inputs(), pair.rank()), (m, n, r));
        let dropped = sigma[r..k.max(r)].iter().map(|s| s * s).sum::<f64>().sqrt();
        prop_assert!((error - dropped).abs() < 1e-13, "{error}, not {dropped}");
        let left = matrix(&pair.to_dense()) - &w;
        prop_assert!((left.norm() - dropped).abs() < 1e-12);
        // also best in the spectral norm: what is left has norm σ_{r+1}
        let next = if r < k { sigma[r] } else { 0.0 };
        prop_assert!((spectral_norm(&left) - next).abs() < 1e-12);
        prop_assert!(pair.gauge_imbalance() < 1e-13);
        // no other rank-r matrix is nearer: neither random ones nor neighbours of this one
        for _ in 0..5 {
            let (da, db) = (gaussian(&mut rng, m, r) * 1e-3, gaussian(&mut rng, n, r) * 1e-3);
            let other = (matrix(&pair.a) + da) * (matrix(&pair.b) + db).transpose();
            prop_assert!((other - &w).norm() >= dropped - 1e-12);
        }
        for (found, want) in pair.singular_values().iter().zip(&sigma) {
            prop_assert!((found - want).abs() < 1e-13);
        }
    }

    #[test]
    fn truncation_has_the_error_of_the_dropped_singular_values(case in pair_case(), cut in 0.0..1.0f64) {
        let pair = case.pair::<f64>();
        let w = matrix(&pair.to_dense());
        let sigma = singular_values(&w);
        let full = case.r.min(case.m).min(case.n);
        let r = 1 + ((full - 1) as f64 * cut) as usize;
        let (small, error) = pair.truncate(r);
        prop_assert_eq!((small.outputs(), small.inputs(), small.rank()), (case.m, case.n, r));
        let rounding = ROUNDING * unit::<f64>() * pair.a.norm() * pair.b.norm(); // the product ≥ ‖W‖
        let dropped = sigma[r..].iter().map(|s| s * s).sum::<f64>().sqrt();
        prop_assert!((error - dropped).abs() <= rounding, "{error}, not {dropped}");
        let left = (matrix(&small.to_dense()) - &w).norm();
        prop_assert!((left - dropped).abs() <= rounding, "{left}, not {dropped}");
        prop_assert!(small.gauge_imbalance() <= rounding);
        let (by_energy, values) = pair.truncate_by(|sigma| rank_for_energy(sigma, 0.9));
        let kept: f64 = values[..by_energy.rank()].iter().map(|s| s * s).sum();
        let total: f64 = values.iter().map(|s| s * s).sum();
        prop_assert!(kept >= 0.9 * total * (1.0 - 1e-14));
        let fewer = kept - values[by_energy.rank() - 1].powi(2);
        prop_assert!(by_energy.rank() == 1 || fewer < 0.9 * total * (1.0 + 1e-14));
    }

    #[test]
    fn balancing_keeps_w_and_equalises_the_grams(case in pair_case()) {
        let pair = case.pair::<f64>();
        let balanced = pair.balance();
        prop_assert_eq!(balanced.a.shape(), pair.a.shape());
        prop_assert_eq!(balanced.b.shape(), pair.b.shape());
        let size = pair.a.norm() * pair.b.norm(); // ≥ ‖W‖
        let rounding = ROUNDING * unit::<f64>() * size;
        prop_assert!((matrix(&balanced.to_dense()) - matrix(&pair.to_dense())).norm() <= rounding);
        prop_assert!(balanced.gauge_imbalance() <= rounding, "{}", balanced.gauge_imbalance());
        let gram = matrix(&balanced.a.t().matmul(&balanced.a)); // [r, r]
        let sigma = singular_values(&matrix(&pair.to_dense()));
        for i in 0..case.r {
            for j in 0..case.r {
                let want = if i == j { sigma.get(i).copied().unwrap_or(0.0) } else { 0.0 };
                prop_assert!((gram[(i, j)] - want).abs() <= rounding);
            }
        }
        // in f32 the factors are rounded: 1e-7 of their size, whatever the gauge was
        let case32 = case.pair::<f32>();
        let w32 = matrix(&case32.a) * matrix(&case32.b).transpose();
        let b32 = case32.balance();
        let w_after = matrix(&b32.a) * matrix(&b32.b).transpose();
        prop_assert!((w_after - w32).norm() <= 4.0 * unit::<f32>() * b32.a.norm() * b32.b.norm() + rounding);
        let reported = pair.singular_values();
        prop_assert_eq!(reported.len(), case.r.min(case.m).min(case.n));
        for (found, want) in reported.iter().zip(&sigma) {
            prop_assert!((found - want).abs() <= rounding);
        }
    }

    #[test]
    fn a_transposed_pair_is_the_transposed_matrix(case in pair_case()) {
        let pair = case.pair::<f64>();
        // the sums over r may run in another order: each is off by at most r roundings of the sum of magnitudes, ‖A‖·‖B‖ at most
        let apart = matrix(&pair.transpose().to_dense()) - matrix(&pair.to_dense()).transpose();
        prop_assert!(apart.amax() <= 2.0 * case.r as f64 * f64::EPSILON * pair.a.norm() * pair.b.norm());
        let (m, n, r) = (case.m, case.n, case.r);
        let costs = pair.costs();
        prop_assert_eq!(costs.parameters, pair.a.len() + pair.b.len());
        prop_assert_eq!(costs.dense_parameters, pair.to_dense().len());
        prop_assert_eq!(costs.flops_per_row, 2 * (n * r + r * m));
        prop_assert_eq!(costs.dense_flops_per_row, 2 * n * m);
        prop_assert_eq!(costs.merge_flops, 2 * m * r * n);
    }
}

/// σ² = 16, 4, 1, 1, of 22: 16/22 = 0.727, 20/22 = 0.909, 21/22 = 0.955.
#[test]
fn the_rank_for_an_energy_by_hand() {
    let sigma = [4.0, 2.0, 1.0, 1.0];
    for (energy, rank) in [(0.1, 1), (0.72, 1), (0.73, 2), (0.9, 2), (0.92, 3), (0.96, 4), (1.0, 4)] {
        assert_eq!(rank_for_energy(&sigma, energy), rank, "{energy}");
    }
    assert_eq!(rank_for_energy(&[1.0, 1e-9, 0.0], 1.0), 2); // a zero carries nothing
    assert_eq!(rank_for_energy(&[0.0, 0.0], 0.5), 1);
}

/// Beyond the sizes of the property tests, where the decomposition is another one (lowrank/eigen.rs).
#[test]
fn large_matrices_are_cut_as_small_ones_are() {
    let (m, n, r) = (150, 210, 40);
    let sigma: Vec<f64> = (0..m).map(|i| 0.96f64.powi(i as i32)).collect();
    let w = with_spectrum(&mut rng(5), m, n, &sigma);
    let dropped = sigma[r..].iter().map(|s| s * s).sum::<f64>().sqrt();
    for w in [w.clone(), w.transpose()] {
        let (pair, error) = FactorPair::from_dense(&tensor::<f64>(&w), r);
        assert!((error - dropped).abs() < 1e-12 && pair.gauge_imbalance() < 1e-12);
        assert!(((matrix(&pair.to_dense()) - &w).norm() - dropped).abs() < 1e-12);
        let (whole, _) = FactorPair::from_dense(&tensor::<f64>(&(&w * 1e-3)), m);
        assert!((matrix(&whole.to_dense()) - &w * 1e-3).norm() < 1e-15);
        assert!(((matrix(&whole.truncate(r).0.to_dense()) * 1e3 - &w).norm() - dropped).abs() < 1e-12);
    }
    let not_finite = tensor::<f64>(&DMatrix::from_element(140, 140, f64::NAN));
    assert!(!FactorPair::from_dense(&not_finite, 3).0.a.is_finite());
}

// ---- initialisation

fn init<T: Scalar>(seed: u64, size: [usize; 2], r: usize, how: PairInit) -> FactorPair<Cpu<T>> {
    init_pair(&Cpu::default(), &mut rng(seed), size, r, 0.02, how)
}

#[test]
fn initial_pairs_have_the_promised_spectra() {
    for [m, n] in [[60usize, 24], [24, 60], [30, 30], [5, 1]] {
        for r in [1, m.min(n).div_ceil(4), m.min(n)] {
            let spectral = init::<f64>(1, [m, n], r, PairInit::Spectral);
            assert!(spectral.gauge_imbalance() < 1e-14, "√Σ in each factor");
            let gram = matrix(&spectral.a.t().matmul(&spectral.a)); // [r, r]
            assert!(
                (0..r * r).all(|i| i % (r + 1) == 0 || gram[i].abs() < 1e-14),
                "columns are singular vectors"
            );
            // no dense N(0, std²) matrix exceeds std·(√m + √n + 6) in practice (Davidson & Szarek 2001)
            assert!(spectral.singular_values()[0] < 0.02 * ((m as f64).sqrt() + (n as f64).sqrt() + 6.0));

            let orthogonal = init::<f64>(1, [m, n], r, PairInit::Orthogonal);
            let want = 0.02 * ((m * n) as f64 / r as f64).sqrt();
            assert!(orthogonal.singular_values().iter().all(|s| (s - want).abs() < 1e-13), "all equal");
            let norm = matrix(&orthogonal.to_dense()).norm();
            assert!((norm - 0.02 * ((m * n) as f64).sqrt()).abs() < 1e-13, "‖W‖_F of the dense one");

            let zero = init::<f64>(1, [m, n], r, PairInit::Zero);
            assert!(zero.a.norm() == 0.0 && zero.b.norm() > 0.0);
        }
    }
    // at full rank, ‖W‖_F² is a sum of m·n squares of N(0, std²): 3 % around its mean here, 5 standard deviations
    let full = init::<f64>(2, [300, 200], 200, PairInit::Spectral);
    let relative = matrix(&full.to_dense()).norm() / (0.02 * 60_000f64.sqrt());
    assert!((relative - 1.0).abs() < 0.015, "{relative}");
}

#[test]
fn initial_values_are_pinned() {
    for how in [PairInit::Spectral, PairInit::Orthogonal, PairInit::Zero] {
        let [one, two] = [(); 2].map(|()| init::<f32>(11, [20, 12], 3, how));
        assert_eq!((bits(&one.a), bits(&one.b)), (bits(&two.a), bits(&two.b)));
        let other = init::<f32>(12, [20, 12], 3, how);
        assert_ne!(bits(&one.b), bits(&other.b));
    }
    // a change here changes every published training figure
    let pair = init::<f32>(11, [20, 12], 3, PairInit::Spectral);
    assert_eq!(pair.a.to_vec()[..3], PINNED_A);
    assert_eq!(pair.b.to_vec()[33..], PINNED_B);
    assert_eq!(gaussian_row(), PINNED_GAUSSIAN);
    assert_eq!(start_vector(&Cpu::<f32>::default(), 3).to_vec(), PINNED_START);
}

fn gaussian_row() -> Vec<f32> {
    lowrank::gaussian(&Cpu::<f32>::default(), &mut rng(11), [3], 0.02).to_vec()
}

const PINNED_A: [f32; 3] = [-0.032462943, 0.011435487, -0.06301434];
const PINNED_B: [f32; 3] = [-0.05608583, 0.0076732435, 0.01102331];
const PINNED_GAUSSIAN: [f32; 3] = [-0.014506143, -0.029482791, -0.00810697];
const PINNED_START: [f32; 3] = [-0.29857862, -0.1305008, -0.8292017];

// ---- AdamW, clipping, routing, state

/// A model with every kind of parameter, drawn from a seed.
fn model(seed: u64) -> Params<Cpu<f32>> {
    let mut rng = rng(seed);
    let mut params = Params::default();
    let mut draw = |m, n| tensor::<f32>(&gaussian(&mut rng, m, n));
    params.pair("q", FactorPair::new(draw(6, 2), draw(5, 2)));
    params.pair("k", FactorPair::new(draw(6, 2), draw(5, 2)));
    params.hidden("whole", draw(4, 3));
    params.dense("embedding", draw(7, 3));
    params.dense("gain", draw(1, 3).reshape([3]));
    params
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn adamw_is_its_formula(m in 1..20usize, n in 1..20usize, seed: u64, decay in 0.0..0.5f64, vector: bool) {
        let mut rng = rng(seed);
        let start = gaussian(&mut rng, m, n);
        let (lr, beta1, beta2, eps) = (0.03, 0.8, 0.95, 1e-6);
        let shape: &[usize] = if vector { &[m * n] } else { &[m, n] };
        let mut w = [tensor::<f64>(&start).reshape(shape)];
        let mut w32 = [tensor::<f32>(&start).reshape(shape)];
        let (mut rule, mut rule32) = (AdamW::new(&w), AdamW::new(&w32));
        (rule.beta1, rule.beta2, rule.eps, rule.weight_decay) = (beta1, beta2, eps, decay);
        (rule32.beta1, rule32.beta2, rule32.eps, rule32.weight_decay) = (beta1, beta2, eps, decay);
        // row-major, as the tensor
        let mut naive: Vec<[f64; 3]> = tensor::<f64>(&start).to_vec().into_iter().map(|w| [w, 0.0, 0.0]).collect();
        let decay = if vector { 0.0 } else { decay };
        for t in 1..=5u64 {
            let g = tensor::<f64>(&gaussian(&mut rng, m, n)).reshape(shape); // shape
            rule.step(&mut w, std::slice::from_ref(&g), &[lr], t);
            let g32 = Tensor::from_fn(w32[0].device(), shape, |i| g.buffer()[i] as f32); // shape
            rule32.step(&mut w32, &[g32], &[lr], t);
            for ([w, m, v], g) in naive.iter_mut().zip(g.to_vec()) {
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                let (m_hat, v_hat) = (*m / (1.0 - beta1.powf(t as f64)), *v / (1.0 - beta2.powf(t as f64)));
                *w = *w - lr * decay * *w - lr * m_hat / (v_hat.sqrt() + eps);
            }
        }
        for ((got, got32), [want, ..]) in w[0].to_vec().iter().zip(w32[0].to_vec()).zip(&naive) {
            prop_assert!((got - want).abs() < 1e-14 * (1.0 + want.abs()) * 10.0, "{got}, not {want}");
            // m can cancel to 1/1000 of the gradients: then the update, at most lr·5, has 4 digits fewer
            prop_assert!((f64::from(got32) - want).abs() < 1e-5 * (1.0 + want.abs()), "{got32}, not {want}");
        }
    }

    #[test]
    fn clipping_scales_all_gradients_together(seed: u64, limit in 0.01..100.0f64) {
        let mut grads = model(seed).values;
        let before: Vec<Vec<f64>> = grads.tensors().map(Tensor::to_f64).collect();
        let norm = before.iter().flatten().map(|x| x * x).sum::<f64>().sqrt();
        let reported = clip_global_norm(&mut grads, limit);
        prop_assert!((reported / norm - 1.0).abs() < 1e-12);
        let factor = (limit / norm).min(1.0);
        for (x, before) in grads.tensors().zip(&before) {
            for (x, before) in x.to_f64().iter().zip(before) {
                prop_assert!((x - before * factor).abs() <= 2.0 * f64::from(f32::EPSILON) * before.abs());
                prop_assert!(norm > limit || x == before, "what is short enough is not touched");
            }
        }
    }
}

#[test]
fn each_kind_of_parameter_goes_to_its_rule() {
    let mut params = model(1);
    let before = params.clone();
    let grads = model(2).values;
    let mut optimizer = Optimizer::spectron(&params);
    optimizer.step(&mut params, &grads, 0.1, 0.0);
    let same = |x: &Tensor<Cpu<f32>>, y: &Tensor<Cpu<f32>>| bits(x) == bits(y);
    assert_eq!(optimizer.steps, 1);
    for (dense, old) in params.values.dense.iter().zip(&before.values.dense) {
        assert!(same(dense, old), "adam_lr = 0 moves no dense tensor");
    }
    // hidden matrices: the first AdamW step moves every element by lr
    for (x, old) in params.values.hidden[0].to_f64().iter().zip(before.values.hidden[0].to_f64()) {
        assert!(((x - old).abs() - 0.1).abs() < 1e-5);
    }
    let mut alone = before.values.pairs.clone();
    Spectron::new(&alone).step(&mut alone, &grads.pairs, &vec![0.1; grads.pairs.len()], 1);
    for (x, y) in params.values.pairs.iter().zip(&alone) {
        assert!(same(&x.a, &y.a) && same(&x.b, &y.b), "pairs move as Spectron alone moves them");
    }
    // and with the pairs' rule exchanged, by AdamW with the pairs' rate
    let mut params = before.clone();
    let mut optimizer = Optimizer::new(AdamW::for_pairs(&params.values.pairs), &params);
    optimizer.step(&mut params, &grads, 0.0, 0.01);
    assert!(
        params
            .values
            .pairs
            .iter()
            .zip(&before.values.pairs)
            .all(|(x, y)| same(&x.a, &y.a) && same(&x.b, &y.b))
    );
    assert!(params.values.dense.iter().zip(&before.values.dense).all(|(x, y)| !same(x, y)));
}

#[test]
fn saved_state_continues_bit_identically() {
    let names = |optimizer: &mut Optimizer<Cpu<f32>>| -> Vec<String> {
        optimizer.state().into_iter().map(|(name, _)| name).collect()
    };
    let mut params = model(1);
    let mut optimizer = Optimizer::spectron(&params);
    let stable: Vec<String> = [
        ("pairs.momentum.", 4),
        ("pairs.u.", 4),
        ("hidden.m.0", 0),
        ("hidden.v.0", 0),
        ("dense.m.0", 0),
        ("dense.v.0", 0),
        ("dense.m.1", 0),
        ("dense.v.1", 0),
    ]
    .iter()
    .flat_map(|&(name, count)| {
        (0..count.max(1)).map(move |i| if count > 0 { format!("{name}{i}") } else { name.to_string() })
    })
    .collect();
    assert_eq!(names(&mut optimizer), stable, "checkpoints are read by these names");

    let step = |optimizer: &mut Optimizer<Cpu<f32>>, params: &mut Params<Cpu<f32>>, t: u64| {
        optimizer.step(params, &model(100 + t).values, 0.05, 0.01);
    };
    (0..5).for_each(|t| step(&mut optimizer, &mut params, t));
    let saved: Vec<Tensor<Cpu<f32>>> = optimizer.state().into_iter().map(|(_, x)| x.clone()).collect();
    let (mut resumed, steps) = (params.clone(), optimizer.steps);
    (5..10).for_each(|t| step(&mut optimizer, &mut params, t));

    let mut fresh = Optimizer::spectron(&resumed);
    fresh.state().into_iter().zip(saved).for_each(|((_, x), saved)| *x = saved);
    fresh.steps = steps;
    (5..10).for_each(|t| step(&mut fresh, &mut resumed, t));
    for (x, y) in params.values.tensors().zip(resumed.values.tensors()) {
        assert_eq!(bits(x), bits(y));
    }
}
