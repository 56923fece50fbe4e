//! An update rule of your own, with a bug that drawn factor pairs find and shrink to the smallest pair that shows it.
//!
//! The rule promises ‖ΔW‖₂ ≤ η: it moves both factors by ρ against their gradients, brought to spectral norm 1. It sets
//! ρ = η/(σ_A + σ_B), which forgets that both factors move at once: ΔW = ΔA·Bᵀ + A·ΔBᵀ + ΔA·ΔBᵀ, and the last term adds up
//! to ρ². The paper's + 1 in the denominator pays for it as long as ρ ≤ 1. In large models, where σ_A + σ_B is large and η
//! small, no loss curve would show the difference. Rule and property are the twenty lines from `descend` to `check`. In a test file
//! the property is the body of `proptest!`; here its runner is called by hand, so that its findings can be printed.
//! Letters: W [m, n] = A·Bᵀ, A [m, r], B [n, r], G the gradient in W, σ spectral norms, η learning rate, ρ radius.
//!
//! ```text
//! $ cargo run --release --example 06_find_a_bug
//! ρ = η/(σ_A + σ_B): assert_spectral_norm_le: ‖W‖₂ = 0.11403757286351446 is above the bound 0.1 by 1.404e-2, 1.404e-1 of the bound
//!   W [1, 1] of rank 2, singular values 1.140376e-1
//!   at η = 0.1, PairCase { m: 1, n: 1, r: 1, scale: 1.0, gauge: 1.0, zero_b: false, seed: 0 }
//! ρ = η/(σ_A + σ_B + 1): 500 pairs, ‖ΔW‖₂ ≤ η for all
//! ```

use proptest::{prelude::*, test_runner::*};
use rankgrad::{
    lowrank::{FactorPair, spectral_norm_upper_bound as sigma},
    tensor::{Cpu, Tensor},
    testing::{PairCase, assert_spectral_norm_le, pair_case},
};

type B = Cpu<f64>;
type Radius = fn(eta: f64, sigma_a: f64, sigma_b: f64) -> f64;

/// −ρ·G/σ(G), added to a factor.
fn descend(x: &Tensor<B>, grad: &Tensor<B>, rho: f64) -> Tensor<B> {
    let mut next = x.clone(); // like x
    let norm = sigma(grad);
    if norm > 0.0 {
        next.axpby(-rho / norm, grad, 1.0);
    }
    next
}

/// One step of the rule on a loss whose gradient in W is `g` [m, n].
fn step(pair: &FactorPair<B>, g: &Tensor<B>, eta: f64, radius: Radius) -> FactorPair<B> {
    let (grad_a, grad_b) = (g.matmul(&pair.b), g.t().matmul(&pair.a)); // [m, r], [n, r]
    let rho = radius(eta, sigma(&pair.a), sigma(&pair.b));
    FactorPair::new(descend(&pair.a, &grad_a, rho), descend(&pair.b, &grad_b, rho)) // [m, r], [n, r]
}

/// The property: a step moves W by at most η. Under G and −G, so that a smaller pair does not pass by the luck of a sign.
fn check(case: PairCase, eta: f64, radius: Radius) {
    let pair = case.pair(); // [m, r], [n, r]
    let g = PairCase { seed: case.seed + 1, zero_b: false, ..case }.pair().to_dense(); // [m, n]
    for g in [g.scale(-1.0), g] {
        assert_spectral_norm_le(&step(&pair, &g, eta, radius).change_since(&pair), eta);
    }
}

fn main() {
    std::panic::set_hook(Box::new(|_| {})); // the runner catches the assertions that fail; no need to see each
    let rules: [(&str, Radius); 2] = [
        ("ρ = η/(σ_A + σ_B)", |eta, a, b| eta / (a + b)),
        ("ρ = η/(σ_A + σ_B + 1)", |eta, a, b| eta / (a + b + 1.0)),
    ];
    for (name, radius) in rules {
        let config = Config {
            cases: 500,
            rng_seed: RngSeed::Fixed(1),
            failure_persistence: None,
            ..Config::default()
        };
        let inputs = (pair_case(), (1..=10u8).prop_map(|tenths| f64::from(tenths) / 10.0)); // case, η
        let property = |(case, eta)| {
            check(case, eta, radius);
            Ok(())
        };
        match TestRunner::new(config).run(&inputs, property) {
            Ok(()) => println!("{name}: 500 pairs, ‖ΔW‖₂ ≤ η for all"),
            Err(TestError::Fail(reason, (case, eta))) => {
                println!("{name}: {reason}\n  at η = {eta}, {case:?}")
            }
            Err(other) => println!("{name}: {other}"),
        }
    }
}
