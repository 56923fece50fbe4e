//! Fits a planted low-rank matrix, with Spectron and with AdamW on the same factors from the same starts.
//!
//! W* [m, n] has rank 8 and singular values from 4 down to 0.5; the model is a factor pair of rank 8, 300 steps, learning rate
//! falling linearly to 0. Twice: from W* itself (exact gradients), and from 32 new noisy observations y = x·W*ᵀ + noise per
//! step. Reported is ‖W − W*‖²_F / ‖W*‖²_F. Fairness: each method gets the learning rate that is best for it on one grid of
//! powers of two, by the median of three starts, and is then judged by the median of five other starts.
//!
//! What it shows: with exact gradients AdamW's steps shrink as it arrives and it ends at rounding error; Spectron's steps
//! have a length that only the schedule shrinks. With noise both end near the same error. It says nothing about language
//! models, where the gradients are noisier and the factors many.
//!
//! ```text
//! $ cargo run --release --example 03_planted_matrix
//! from exact gradients (1e-9: that or less)
//!   learning rate   Spectron   AdamW
//!   2^-9            1e0        6e-2
//!   2^-8            9e-1       1e-3
//!   2^-7            8e-1       2e-7
//!   2^-6            5e-1       1e-9
//!   2^-5            1e-1       1e-9
//!   2^-4            8e-6       1e-9
//!   2^-3            1e-6       1e-9
//!   2^-2            4e-6       1e-9
//!   2^-1            1e-5       1e-9
//!   2^0             6e-5       9e-3
//!   2^1             2e-4       1e-1
//!   other starts    1.0e-6     1.0e-9
//! from noisy data
//!   learning rate   Spectron   AdamW
//!   2^-9            1e0        1e-1
//!   2^-8            9e-1       3e-2
//!   2^-7            8e-1       3e-3
//!   2^-6            5e-1       3e-3
//!   2^-5            1e-1       4e-3
//!   2^-4            2e-3       6e-3
//!   2^-3            3e-3       8e-3
//!   2^-2            5e-3       1e-2
//!   2^-1            9e-3       8e-3
//!   2^0             1e-2       6e-2
//!   2^1             2e-2       3e-1
//!   other starts    2.3e-3     2.5e-3
//! ```

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rankgrad::{
    autograd::Tape,
    lowrank::{
        AdamW, FactorPair, PairInit, Rule, Schedule, ScheduleKind, Spectron, gaussian, haar, init_pair,
    },
    tensor::{Cpu, Tensor},
};

type B = Cpu<f32>;
/// Makes the optimizer of some pairs.
type Make = fn(&[FactorPair<B>]) -> Box<dyn Rule<B, FactorPair<B>>>;

const M: usize = 64;
const N: usize = 48;
const R: usize = 8;
const STEPS: u64 = 300;

/// W* = U·Σ·Vᵀ with random orthonormal U and V, √Σ in each factor.
fn planted(cpu: &B) -> FactorPair<B> {
    let rng = &mut ChaCha8Rng::seed_from_u64(0);
    let sigma = |j: usize| 4.0 * f64::powf(0.5 / 4.0, j as f64 / (R - 1) as f64);
    let mut factor = |rows: usize| {
        let frame = haar(rng, rows, R); // R columns of length rows
        Tensor::from_fn(cpu, [rows, R], |i| (frame[i % R][i / R] * sigma(i % R).sqrt()) as f32)
    };
    FactorPair::new(factor(M), factor(N)) // [m, r], [n, r]
}

/// The relative error after training from the start that `seed` draws.
fn fit(noisy: bool, method: Make, lr: f64, seed: u64) -> f64 {
    let cpu = B::default();
    let rng = &mut ChaCha8Rng::seed_from_u64(seed + 1);
    let target = planted(&cpu).to_dense(); // [m, n]
    let mut pairs = [init_pair(&cpu, rng, [M, N], R, 0.02, PairInit::Spectral)]; // [m, r], [n, r]
    let mut rule = method(&pairs);
    let schedule = Schedule { kind: ScheduleKind::Linear, steps: STEPS, warmup: 0, end: 0.0 };
    let identity = Tensor::identity(&cpu, N); // [n, n]
    for step in 0..STEPS {
        let x = if noisy { gaussian(&cpu, rng, [32, N], 1.0) } else { identity.clone() }; // [rows, n]
        let mut y = x.matmul(target.t()); // [rows, m]
        if noisy {
            y = y.add(&gaussian(&cpu, rng, [32, M], 0.5)); // [rows, m]; the signal's deviation is 0.8
        }
        let tape = Tape::new(&cpu);
        let (a, b) = (tape.leaf(&pairs[0].a), tape.leaf(&pairs[0].b)); // [m, r], [n, r]
        let error = tape.constant(&x).lowrank_linear(a, b) - tape.constant(&y); // [rows, m]
        let mut grads = (error * error).mean().backward();
        let gradient = FactorPair::new(grads.take(a.id(), &cpu), grads.take(b.id(), &cpu)); // [m, r], [n, r]
        rule.step(&mut pairs, &[gradient], &[lr * schedule.factor(step)], step + 1);
    }
    let error = pairs[0].to_dense().sub(&target); // [m, n]
    (error.norm() / target.norm()).powi(2).max(1e-9) // below, rounding decides, and not the same everywhere
}

fn median(noisy: bool, method: Make, lr: f64, seeds: std::ops::Range<u64>) -> f64 {
    let mut errors: Vec<f64> = seeds.map(|seed| fit(noisy, method, lr, seed)).collect();
    errors.sort_by(f64::total_cmp);
    errors[errors.len() / 2]
}

fn main() {
    let methods: [Make; 2] = [|p| Box::new(Spectron::new(p)), |p| Box::new(AdamW::for_pairs(p))];
    for (noisy, title) in [(false, "from exact gradients (1e-9: that or less)"), (true, "from noisy data")] {
        println!("{title}\n  learning rate   Spectron   AdamW");
        let mut best = [(f64::INFINITY, 0.0); 2]; // error, learning rate
        for power in -9..=1 {
            let lr = f64::powi(2.0, power);
            let errors = methods.map(|method| median(noisy, method, lr, 0..3));
            println!("  2^{power:<13} {:<10.0e} {:.0e}", errors[0], errors[1]);
            for (best, error) in best.iter_mut().zip(errors).filter(|(best, error)| *error < best.0) {
                *best = (error, lr);
            }
        }
        let judged = [0, 1].map(|i| median(noisy, methods[i], best[i].1, 3..8));
        println!("  other starts    {:<10.1e} {:.1e}", judged[0], judged[1]);
    }
}
