//! The update rules that Spectron is compared with, each against a plain f64 re-implementation over nalgebra, step by step.
//!
//! The oracle works on one matrix at a time, with the formulas as the papers print them: no batches, no shared code.
//! Letters: W [m, n] = A·Bᵀ, A [m, r], B [n, r]; M momentum, G gradient, η learning rate, λ weight decay.

use nalgebra::DMatrix;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rankgrad::lowrank::{
    AdamW, FactorPair, LoraMuon, MomentumOnly, Muon, MuonScale, Renormalised, Rule, Spectron, SpectronConfig,
    gaussian, start_vector,
};
use rankgrad::tensor::{Cpu, Tensor};

type B = Cpu<f64>;
type M = DMatrix<f64>;
type BoxedRule = Box<dyn Rule<B, FactorPair<B>>>;
type Make = fn(&[FactorPair<B>]) -> BoxedRule;

const BETA: f64 = 0.95;
const DECAY: f64 = 0.3;
const STEPS: u64 = 5;
/// [m, n, r], two of one shape so that batches are met.
const SHAPES: [[usize; 3]; 4] = [[12, 9, 4], [7, 10, 3], [12, 9, 4], [5, 5, 5]];

fn draw(rng: &mut ChaCha8Rng, rows: usize, cols: usize) -> Tensor<B> {
    gaussian(&B::default(), rng, [rows, cols], 0.4) // [rows, cols]
}

fn draw_pairs(rng: &mut ChaCha8Rng) -> Vec<FactorPair<B>> {
    SHAPES.iter().map(|&[m, n, r]| FactorPair::new(draw(rng, m, r), draw(rng, n, r))).collect()
}

fn matrix(x: &Tensor<B>) -> M {
    M::from_row_slice(x.rows(), x.cols(), &x.to_f64())
}

fn tensor(x: &M) -> Tensor<B> {
    Tensor::from_vec(&B::default(), [x.nrows(), x.ncols()], x.transpose().as_slice().to_vec())
}

fn factors(pairs: &[FactorPair<B>]) -> Vec<M> {
    pairs.iter().flat_map(|p| [matrix(&p.a), matrix(&p.b)]).collect()
}

/// Algorithm 2 of the Spectron paper as printed.
fn newton_schulz(m: &M) -> M {
    let mut x = m / m.norm();
    for _ in 0..5 {
        let g = x.transpose() * &x;
        x = &x * 3.4445 - (&x * &g) * 4.7750 + (&x * &g * &g) * 2.0315;
    }
    x
}

/// Algorithm 3 of the Spectron paper as printed.
fn power_iteration(w: &M, u: &mut M, steps: usize) -> f64 {
    let mut v = (w.transpose() * &*u).normalize();
    for _ in 0..steps {
        *u = (w * &v).normalize();
        v = (w.transpose() * &*u).normalize();
    }
    (u.transpose() * w * v)[(0, 0)]
}

/// The rate of pair or matrix `i`: another one for each.
fn rate(i: usize) -> f64 {
    0.02 * (1.0 + i as f64)
}

fn rates(n: usize) -> Vec<f64> {
    (0..n).map(rate).collect()
}

/// Runs `rule` on pairs beside an oracle, which gets per step all factors (A, B, A, B, …), the directions of the momentum
/// and the rates, and returns the updates ΔX, weight decay aside. Every step's factors must agree.
fn compare(
    mut rule: impl Rule<B, FactorPair<B>>,
    nesterov: bool,
    mut oracle: impl FnMut(&[M], &[M], &dyn Fn(usize) -> f64) -> Vec<M>,
) {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut pairs = draw_pairs(&mut rng);
    let mut want = factors(&pairs);
    let mut momentum: Vec<M> = want.iter().map(|x| x * 0.0).collect();
    for t in 1..=STEPS {
        let grads = draw_pairs(&mut rng);
        rule.step(&mut pairs, &grads, &rates(SHAPES.len()), t);
        let grads = factors(&grads);
        for (m, g) in momentum.iter_mut().zip(&grads) {
            *m = &*m * BETA + g * (1.0 - BETA);
        }
        let ahead = |(m, g): (&M, &M)| if nesterov { m * BETA + g * (1.0 - BETA) } else { m.clone() };
        let directions: Vec<M> = momentum.iter().zip(&grads).map(ahead).collect();
        let updates = oracle(&want, &directions, &|i| rate(i / 2));
        for (i, (x, dx)) in want.iter_mut().zip(&updates).enumerate() {
            *x = &*x * (1.0 - rate(i / 2) * DECAY).sqrt() + dx;
        }
        for (x, y) in factors(&pairs).iter().zip(&want) {
            assert!((x - y).norm() < 1e-11 * y.norm(), "step {t}: {x} {y}");
        }
    }
}

#[test]
fn spectron_with_and_without_nesterov() {
    for nesterov in [false, true] {
        let settings = SpectronConfig { weight_decay: DECAY, nesterov, ..Default::default() };
        let rule = Spectron::with(settings, &draw_pairs(&mut ChaCha8Rng::seed_from_u64(1)));
        let mut us = start_vectors();
        compare(rule, nesterov, |x, d, eta| {
            let sigma: Vec<f64> = x.iter().zip(&mut us).map(|(x, u)| power_iteration(x, u, 1)).collect();
            let rho = |i: usize| eta(i) / (sigma[i & !1] + sigma[i | 1] + 1.0);
            d.iter().enumerate().map(|(i, d)| newton_schulz(d) * -rho(i)).collect()
        });
    }
}

fn start_vectors() -> Vec<M> {
    let rows = SHAPES.iter().flat_map(|&[m, n, _]| [m, n]);
    rows.map(|rows| matrix(&start_vector(&B::default(), rows))).collect()
}

#[test]
fn muon_per_factor() {
    for (nesterov, scale) in [(false, MuonScale::One), (true, MuonScale::Aspect)] {
        let mut rule = Muon::for_pairs(&draw_pairs(&mut ChaCha8Rng::seed_from_u64(1)));
        (rule.weight_decay, rule.nesterov, rule.scale) = (DECAY, nesterov, scale);
        compare(rule, nesterov, |_, d, eta| {
            let factor = |d: &M| match scale {
                MuonScale::One => 1.0,
                MuonScale::Aspect => (d.nrows() as f64 / d.ncols() as f64).max(1.0).sqrt(),
            };
            d.iter().enumerate().map(|(i, d)| newton_schulz(d) * -eta(i) * factor(d)).collect()
        });
    }
}

#[test]
fn muon_on_whole_matrices() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let shapes = [[9, 4], [4, 9], [9, 4]]; // wide ones too
    let mut set = || -> Vec<Tensor<B>> { shapes.iter().map(|&[m, n]| draw(&mut rng, m, n)).collect() };
    let mut ws = set();
    let mut rule = Muon::new(&ws);
    (rule.weight_decay, rule.nesterov, rule.scale) = (DECAY, true, MuonScale::Aspect);
    let mut want: Vec<M> = ws.iter().map(matrix).collect();
    let mut momentum: Vec<M> = want.iter().map(|x| x * 0.0).collect();
    for t in 1..=STEPS {
        let grads = set();
        rule.step(&mut ws, &grads, &rates(3), t);
        for (i, g) in grads.iter().map(matrix).enumerate() {
            momentum[i] = &momentum[i] * BETA + &g * (1.0 - BETA);
            let direction = &momentum[i] * BETA + g * (1.0 - BETA);
            let scale = if i == 1 { 1.0 } else { 1.5 }; // √(9/4)
            want[i] = &want[i] * (1.0 - rate(i) * DECAY) - newton_schulz(&direction) * (scale * rate(i));
            assert!((matrix(&ws[i]) - &want[i]).norm() < 1e-11 * want[i].norm(), "step {t}");
        }
    }
}

#[test]
fn renormalisation_only() {
    let mut rule = Renormalised::new(&draw_pairs(&mut ChaCha8Rng::seed_from_u64(1)));
    rule.weight_decay = DECAY;
    let (mut us, mut vs) = (start_vectors(), start_vectors());
    compare(rule, false, |x, d, eta| {
        let sigma: Vec<f64> = x.iter().zip(&mut us).map(|(x, u)| power_iteration(x, u, 3)).collect();
        let norms: Vec<f64> = d.iter().zip(&mut vs).map(|(d, u)| power_iteration(d, u, 3)).collect();
        let updates = d.iter().enumerate().map(|(i, d)| {
            let rho = eta(i) / (sigma[i & !1] + sigma[i | 1] + 1.0);
            // what the estimate is for: the step's spectral norm is ρ, a little more where the estimate is short
            let excess = d.singular_values().max() / norms[i];
            assert!((1.0 - 1e-9..1.5).contains(&excess), "{excess}");
            d * (-rho / norms[i])
        });
        updates.collect()
    });
}

#[test]
fn neither_is_momentum() {
    let mut rule = MomentumOnly::new(&draw_pairs(&mut ChaCha8Rng::seed_from_u64(1)));
    (rule.weight_decay, rule.nesterov) = (DECAY, true);
    compare(rule, true, |_, d, eta| d.iter().enumerate().map(|(i, d)| d * -eta(i)).collect());
}

/// (XᵀX)^{−1/2} from the SVD of X: another way than through the Gram matrix.
fn inverse_root(x: &M) -> M {
    let svd = x.clone().svd(false, true);
    let v_t = svd.v_t.unwrap();
    v_t.transpose() * M::from_diagonal(&svd.singular_values.map(|s| 1.0 / s)) * &v_t
}

#[test]
fn lora_muon() {
    let mut rule = LoraMuon::new(&draw_pairs(&mut ChaCha8Rng::seed_from_u64(1)));
    rule.weight_decay = DECAY;
    compare(rule, false, |x, d, eta| {
        let roots: Vec<M> = x.iter().map(inverse_root).collect();
        let partner = |i: usize| &roots[if i.is_multiple_of(2) { i + 1 } else { i - 1 }];
        let update = |(i, d): (usize, &M)| newton_schulz(&(d * partner(i))) * partner(i) * (-0.5 * eta(i));
        d.iter().enumerate().map(update).collect()
    });
}

/// Three steps from (A, B), under gradients G_W·B and G_Wᵀ·A of a fixed series of G_W; W at the end.
fn trajectory(rule: &mut impl Rule<B, FactorPair<B>>, a: &M, b: &M) -> M {
    let mut pairs = [FactorPair::new(tensor(a), tensor(b))];
    for t in 1..=3 {
        let g = matrix(&draw(&mut ChaCha8Rng::seed_from_u64(10 + t), a.nrows(), b.nrows()));
        let [pair] = &pairs;
        let grad =
            FactorPair::new(tensor(&(&g * matrix(&pair.b))), tensor(&(g.transpose() * matrix(&pair.a))));
        rule.step(&mut pairs, &[grad], &[0.05], t);
    }
    matrix(&pairs[0].to_dense())
}

/// LoRA-Muon moves W alike in every gauge (A·Q, B·Q⁻ᵀ); Muon per factor does so for orthogonal Q only.
#[test]
fn lora_muon_does_not_see_the_gauge() {
    let rng = &mut ChaCha8Rng::seed_from_u64(3);
    let (a, b) = (matrix(&draw(rng, 12, 4)), matrix(&draw(rng, 9, 4)));
    let none = || [FactorPair::new(tensor(&a), tensor(&b))];
    let q = matrix(&draw(rng, 4, 4)).qr().q();
    let skew = &q + M::from_diagonal(&nalgebra::DVector::from_vec(vec![0.0, 0.5, 1.0, 2.0])) * 0.4;
    let (lora, muon) =
        (trajectory(&mut LoraMuon::new(&none()), &a, &b), trajectory(&mut Muon::for_pairs(&none()), &a, &b));
    let moved = (&lora - &a * b.transpose()).norm();
    assert!(moved > 0.05, "{moved}");
    for (gauge, muon_agrees) in [(M::identity(4, 4) * 7.0, false), (q, true), (skew, false)] {
        let (aq, bq) = (&a * &gauge, &b * gauge.clone().try_inverse().unwrap().transpose());
        let turned = trajectory(&mut LoraMuon::new(&none()), &aq, &bq);
        assert!((&turned - &lora).norm() < 1e-8 * moved, "{:e}", (&turned - &lora).norm() / moved);
        let turned = trajectory(&mut Muon::for_pairs(&none()), &aq, &bq);
        assert_eq!((&turned - &muon).norm() < 1e-8 * moved, muon_agrees);
    }
}

/// To first order ‖ΔW‖ ≤ η·1.2024: 1.2024 is Newton–Schulz's overshoot.
#[test]
fn lora_muon_moves_w_by_the_rate() {
    let rng = &mut ChaCha8Rng::seed_from_u64(4);
    let mut pairs = draw_pairs(rng);
    let before: Vec<M> = pairs.iter().map(|p| matrix(&p.to_dense())).collect();
    let mut rule = LoraMuon::new(&pairs);
    let eta = 1e-4;
    rule.step(&mut pairs, &draw_pairs(rng), &[eta; 4], 1);
    for (pair, before) in pairs.iter().zip(&before) {
        let moved = (matrix(&pair.to_dense()) - before).singular_values().max();
        assert!((0.3 * eta..1.21 * eta).contains(&moved), "{moved}");
    }
}

/// A zero-initialised factor: its partner stands still, it moves, nothing is NaN.
#[test]
fn a_zero_factor_is_no_division_by_zero() {
    let rng = &mut ChaCha8Rng::seed_from_u64(5);
    let b = draw(rng, 9, 4);
    let start = || vec![FactorPair::new(Tensor::zeros(&B::default(), [12, 4]), b.clone())];
    let grads = vec![FactorPair::new(draw(rng, 12, 4), b.zeros_like())];
    let rules: [BoxedRule; 5] = [
        Box::new(Spectron::new(&start())),
        Box::new(Muon::for_pairs(&start())),
        Box::new(Renormalised::new(&start())),
        Box::new(MomentumOnly::new(&start())),
        Box::new(LoraMuon::new(&start())),
    ];
    for mut rule in rules {
        let mut pairs = start();
        rule.step(&mut pairs, &grads, &[0.1], 1);
        assert!(pairs[0].a.is_finite() && pairs[0].a.norm() > 0.0);
        assert_eq!(pairs[0].b.to_f64(), b.to_f64());
    }
}

/// ηλ > 1 leaves nothing of W, and no root of a negative number.
#[test]
fn decay_takes_all_of_w_at_most() {
    let before = draw_pairs(&mut ChaCha8Rng::seed_from_u64(8));
    let decay = 10.0;
    let mut renormalised = Renormalised::new(&before);
    renormalised.weight_decay = decay;
    let mut momentum = MomentumOnly::new(&before);
    momentum.weight_decay = decay;
    let mut lora = LoraMuon::new(&before);
    lora.weight_decay = decay;
    let mut muon = Muon::for_pairs(&before);
    muon.weight_decay = decay;
    let spectron = Spectron::with(SpectronConfig { weight_decay: decay, ..Default::default() }, &before);
    let rules: [BoxedRule; 5] =
        [Box::new(renormalised), Box::new(momentum), Box::new(lora), Box::new(muon), Box::new(spectron)];
    for mut rule in rules {
        let mut pairs = before.clone();
        let zeros: Vec<_> = pairs.iter().map(FactorPair::zeros_like).collect();
        let rates = vec![0.12; zeros.len()];
        rule.step(&mut pairs, &zeros, &rates, 1);
        assert!(factors(&pairs).iter().all(|x| x.amax() == 0.0));
    }
    let mut muon = Muon::new([&before[0].a]);
    muon.weight_decay = decay;
    let mut a = [before[0].a.clone()];
    muon.step(&mut a, &[before[0].a.zeros_like()], &[0.12], 1);
    assert_eq!(a[0].norm(), 0.0);
}

/// A rule that is rebuilt from its saved state goes on bit for bit: nothing else is remembered.
#[test]
fn the_state_is_complete() {
    let start = || draw_pairs(&mut ChaCha8Rng::seed_from_u64(6));
    let rules: [Make; 7] = [
        |p| Box::new(Spectron::new(p)),
        |p| {
            let settings = SpectronConfig { certify: true, balance_every: 2, ..Default::default() };
            Box::new(Spectron::with(settings, p))
        },
        |p| Box::new(AdamW::for_pairs(p)),
        |p| Box::new(Muon::for_pairs(p)),
        |p| Box::new(Renormalised::new(p)),
        |p| Box::new(MomentumOnly::new(p)),
        |p| Box::new(LoraMuon::new(p)),
    ];
    for (i, make) in rules.into_iter().enumerate() {
        let rng = &mut ChaCha8Rng::seed_from_u64(7);
        let grads: Vec<_> = (0..6).map(|_| draw_pairs(rng)).collect();
        let mut whole = start();
        let mut rule = make(&whole);
        for (t, grads) in grads.iter().enumerate() {
            rule.step(&mut whole, grads, &[0.02; 4], t as u64 + 1);
        }
        let mut parts = start();
        let mut rule = make(&parts);
        for (t, grads) in grads.iter().enumerate() {
            let mut next = make(&start());
            let (from, to) = (rule.state(), next.state());
            assert_eq!(from.len(), to.len());
            for ((what, i, old), (to_what, to_i, new)) in from.into_iter().zip(to) {
                assert_eq!((what, i), (to_what, to_i));
                *new = old.clone();
            }
            rule = next;
            rule.step(&mut parts, grads, &[0.02; 4], t as u64 + 1);
        }
        for (x, y) in factors(&whole).iter().zip(&factors(&parts)) {
            assert_eq!(x, y, "rule {i}");
        }
    }
}
