//! One training step, spelled out: forward, backward, clipping, and Spectron's update of a factor pair piece by piece. Then
//! the same step by `Optimizer`, and a check that both give the same weights to the bit.
//!
//! The model is one low-rank layer and a dense head that classify N points. Not here: the op's derivative (lowrank_linear in
//! autograd/ops/linear.rs), the algorithms (newton_schulz.rs, spectral.rs, spectron.rs in lowrank/).
//! Letters: W [m, n] = A·Bᵀ, A [m, r], B [n, r]; v classes; η learning rate of the pair; M momentum, O orthogonalised M.
//!
//! ```text
//! $ cargo run --release --example 04_training_step
//! loss 1.0761, gradient norm 0.5485, clipped to 0.1000
//! sigma_A 1.2220, sigma_B 1.2911, radius 0.01423
//! the optimizer gives the same bits: true
//! spectral norm of the change of W: 0.0282 (eta is 0.05)
//! loss after the step 1.0365
//! ```

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rankgrad::{autograd::Tape, lowrank::*, tensor::Cpu};

type B = Cpu<f32>;

fn main() {
    let (points, n, m, r, v) = (20, 16, 32, 4, 3);
    let (eta, adam_lr, beta) = (0.05, 0.01, 0.95);
    let cpu = B::default();
    let rng = &mut ChaCha8Rng::seed_from_u64(1);

    // Parameters live in one arena; `pair` and `head` are Copy handles into it.
    let mut params = Params::default();
    let pair = params.pair("layer", init_pair(&cpu, rng, [m, n], r, 0.2, PairInit::Spectral)); // [m, r], [n, r]
    let head = params.dense("head", gaussian(&cpu, rng, [v, m], 0.2)); // [v, m]
    let x = gaussian(&cpu, rng, [points, n], 1.0); // [N, n]
    let labels: Vec<u32> = (0..points as u32).map(|i| i % v as u32).collect();

    // 1. Forward: every op appends its value and its backward to the tape.
    let forward = |params: &Params<B>| {
        let tape = Tape::new(&cpu);
        let w = params.on(&tape);
        let h = tape.constant(&x).lowrank_linear(w[pair].a, w[pair].b); // [N, m]
        let loss = h.silu().linear(w[head]).cross_entropy(&labels); // [1]
        // 2. Backward: the tape is popped; gradients come back in the layout of the parameters.
        (loss.value().item(), w.gradients(loss.backward()))
    };
    let (loss, mut grads) = forward(&params);

    // 3. Clip all gradients together.
    let norm = clip_global_norm(&mut grads, 0.1);
    println!("loss {loss:.4}, gradient norm {norm:.4}, clipped to {:.4}", grads.norm());

    // 4. The update of the pair by hand, Algorithm 1 of arXiv 2602.12429. Momentum starts at zero.
    let mut by_hand = params.clone();
    let FactorPair { a, b } = &mut by_hand.values.pairs[0];
    let FactorPair { a: ga, b: gb } = &grads.pairs[0];
    let (ma, mb) = (ga.scale(1.0 - beta), gb.scale(1.0 - beta)); // M ← β·0 + (1−β)∇: [m, r], [n, r]
    let oa = &newton_schulz(&[&ma], NewtonSchulz::default())[0]; // [m, r]
    let ob = &newton_schulz(&[&mb], NewtonSchulz::default())[0]; // [n, r]
    let mut u = [start_vector(&cpu, m), start_vector(&cpu, n)]; // [m, 1], [n, 1]: kept from step to step
    let sigma_a = power_iteration(&[&*a], &mut u[..1], 1)[0];
    let sigma_b = power_iteration(&[&*b], &mut u[1..], 1)[0];
    let rho = update_radius(eta, sigma_a, sigma_b); // η / (σ_A + σ_B + 1)
    println!("sigma_A {sigma_a:.4}, sigma_B {sigma_b:.4}, radius {rho:.5}");
    a.axpby(-rho, oa, 1.0); // A ← A − ρ·O_A
    b.axpby(-rho, ob, 1.0); // B ← B − ρ·O_B

    // The head is dense: AdamW, its first update.
    let mut adamw = AdamW::new(&params.values.dense);
    adamw.step(&mut by_hand.values.dense, &grads.dense, &[adam_lr], 1);

    // 5. The same by the optimizer, which routes by type: pairs to Spectron, dense tensors to AdamW.
    let before = params.values.pairs[0].to_dense(); // [m, n]
    let mut optimizer = Optimizer::spectron(&params);
    optimizer.step(&mut params, &grads, eta, adam_lr);
    let same = params.values.tensors().zip(by_hand.values.tensors()).all(|(x, y)| x.to_vec() == y.to_vec());
    println!("the optimizer gives the same bits: {same}");
    assert!(same);

    // What Spectron is for: the step of W itself is of the order of η, however the factors are scaled.
    let (change, _) = FactorPair::from_dense(&params.values.pairs[0].to_dense().sub(&before), m.min(n));
    println!("spectral norm of the change of W: {:.4} (eta is {eta})", change.singular_values()[0]);
    println!("loss after the step {:.4}", forward(&params).0);
}
