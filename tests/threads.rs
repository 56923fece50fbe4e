//! Results do not depend on the number of threads, to the bit: products, attention, row kernels, sums, a short training run.
//!
//! Not about speed. Each computation runs in pools of 1, 2, 3 and 8 threads (more than there are cores is a fair test).

mod common;

use common::{bits, rng};
use rand_distr::{Distribution, StandardNormal};
use rankgrad::autograd::{Rope, Tape};
use rankgrad::lowrank::{
    NewtonSchulz, Optimizer, PairInit, Params, clip_global_norm, gaussian, init_pair, newton_schulz,
};
use rankgrad::tensor::{Accum, Attention, Backend, Cpu, Mat, Scalar, Tensor};

fn draw<T: Scalar>(seed: u64, shape: &[usize]) -> Tensor<Cpu<T>> {
    let mut rng = rng(seed);
    let mut normal = || -> f64 { StandardNormal.sample(&mut rng) };
    Tensor::from_fn(&Cpu::default(), shape, |_| T::of(normal())) // shape
}

/// `f` gives the same bits under every number of threads.
fn same_under_all_pools(what: &str, f: impl Fn() -> Vec<Vec<u64>> + Sync) {
    let under = |threads: usize| {
        let pool =
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be started");
        pool.install(&f)
    };
    let one = under(1);
    assert!(one.iter().all(|x| !x.is_empty()), "{what} returned nothing to compare");
    for threads in [2, 3, 8] {
        assert!(under(threads) == one, "{what}: {threads} threads give other bits than one");
    }
}

/// m·k·n at which a product is shared out is 2^21; both sides of it, ragged edges, k beyond one cache block (256).
const PRODUCTS: [[usize; 3]; 14] = [
    [1, 1, 1],
    [63, 64, 65],
    [127, 128, 129],
    [128, 128, 128],
    [129, 128, 128],
    [400, 1_800, 3],
    [3, 1_800, 400],
    [1, 25_000, 97],
    [97, 25_000, 1],
    [400, 50, 130],
    [129, 1_100, 33],
    [33, 513, 131],
    [257, 64, 300],
    [16, 2_049, 17],
];

fn products<T: Scalar>(name: &str) {
    for [m, k, n] in PRODUCTS {
        for variant in 0..8 {
            let (ta, tb, add) = (variant & 1 == 1, variant & 2 == 2, variant & 4 == 4);
            let a = draw::<T>(1, &if ta { [k, m] } else { [m, k] });
            let b = draw::<T>(2, &if tb { [n, k] } else { [k, n] });
            let start = draw::<T>(3, &[m, n]);
            same_under_all_pools(&format!("{name} {m}×{k}×{n} {ta} {tb} {add}"), || {
                let mut c = start.clone(); // [m, n]
                let accum = if add { Accum::Add } else { Accum::Replace };
                let (a, b) = (Mat::from(&a).t_if(ta), Mat::from(&b).t_if(tb));
                Cpu::<T>::gemm(&[a], &[b], &mut [&mut c], accum);
                vec![bits(&c)]
            });
        }
    }
}

#[test]
fn products_f32() {
    products::<f32>("f32");
}

#[test]
fn products_f64() {
    products::<f64>("f64");
}

#[test]
fn a_batch_equals_its_products_one_by_one() {
    let shapes = [[100, 40], [33, 700], [600, 37], [16, 16]];
    for shape in shapes {
        let batch: Vec<_> = (0..5).map(|i| draw::<f32>(i, &shape)).collect();
        let singles: Vec<_> = batch
            .iter()
            .flat_map(|m| newton_schulz(&[m], NewtonSchulz::default()))
            .map(|o| bits(&o))
            .collect();
        same_under_all_pools(&format!("newton_schulz {shape:?}"), || {
            let all: Vec<_> = batch.iter().collect();
            let together: Vec<_> = newton_schulz(&all, NewtonSchulz::default()).iter().map(bits).collect();
            assert!(together == singles, "a batch gives other bits than its members");
            together
        });
    }
}

#[test]
fn ops_forward_and_backward() {
    // several tasks of 16,384 elements each, ragged
    let (n, d) = (211, 331);
    let x = draw::<f32>(1, &[n, d]);
    let y = draw::<f32>(2, &[n, d]);
    let (g, b) = (draw::<f32>(3, &[d]), draw::<f32>(4, &[d]));
    let ids: Vec<u32> = (0..n).map(|i| (i * i % n) as u32).collect();
    same_under_all_pools("ops", || {
        let tape = Tape::new(&Cpu::default());
        let [x, y, g, b] = [&x, &y, &g, &b].map(|x| tape.leaf(x));
        let normed = x.rms_norm(g, 1e-5).swiglu(y.layer_norm(g, b, 1e-5)).add_bias(b); // [n, d]
        let mixed = normed.tanh() + x.softmax() * y.silu() - y.exp().scale(0.1); // [n, d]
        let rows = mixed.embedding(&ids).matmul_nt(y); // [n, n]
        let loss = mixed.cross_entropy(&ids) + rows.mean() + rows.sum().scale(1e-3);
        let mut values =
            vec![bits(&loss.value()), bits(&mixed.value()), vec![mixed.value().norm().to_bits()]];
        let grads = loss.backward();
        values.extend([x, y, g, b].map(|x| bits(grads.get(x).expect("reached"))));
        values
    });
}

#[test]
fn attention_forward_and_backward() {
    for (causal, kv_heads, tq, tk) in [(true, 4, 70, 70), (true, 2, 33, 97), (false, 1, 97, 40)] {
        let (batch, heads, h) = (3, 4, 18);
        let q = draw::<f32>(1, &[batch * tq, heads * h]);
        let k = draw::<f32>(2, &[batch * tk, kv_heads * h]);
        let v = draw::<f32>(3, &[batch * tk, kv_heads * h]);
        let rope = Rope::new(&Cpu::default(), 128, h, 10_000.0);
        same_under_all_pools(&format!("attention {causal} {kv_heads} {tq} {tk}"), || {
            let tape = Tape::new(&Cpu::default());
            let [q, k, v] = [&q, &k, &v].map(|x| tape.leaf(x));
            let how = Attention { batch, heads, kv_heads, causal };
            let o = q.rope(&rope, tq, 0).attention(k.rope(&rope, tk, 0), v, how); // like q
            let value = bits(&o.value());
            let grads = (o * o).sum().backward();
            let mut all = [q, k, v].map(|x| bits(grads.get(x).expect("reached"))).to_vec();
            all.push(value);
            all
        });
    }
}

#[test]
fn a_training_run() {
    // 96 tokens through two low-rank layers of width 200: the products are large enough to be shared out
    let (vocabulary, d, tokens) = (50, 200, 96);
    same_under_all_pools("training", || {
        let cpu = Cpu::<f32>::default();
        let mut rng = rng(7);
        let mut params = Params::default();
        let layers = [0, 1].map(|i| {
            params.pair(format!("layer{i}"), init_pair(&cpu, &mut rng, [d, d], 50, 0.05, PairInit::Spectral))
        });
        let table = params.dense("table", gaussian(&cpu, &mut rng, [vocabulary, d], 1.0)); // [v, d]
        let head = params.dense("head", gaussian(&cpu, &mut rng, [vocabulary, d], 0.05)); // [v, d]
        let gain = params.dense("gain", Tensor::full(&cpu, [d], 1.0)); // [d]
        let mut optimizer = Optimizer::spectron(&params);
        let mut losses = Vec::new();
        for step in 0..5u32 {
            let ids: Vec<u32> = (0..tokens).map(|i| (i * i + step) % vocabulary as u32).collect();
            let targets: Vec<u32> = ids.iter().map(|id| (id * 3 + 1) % vocabulary as u32).collect();
            let tape = Tape::new(&cpu);
            let w = params.on(&tape);
            let mut x = w[table].embedding(&ids); // [tokens, d]
            for layer in layers {
                x = x + x.rms_norm(w[gain], 1e-5).lowrank_linear(w[layer].a, w[layer].b).silu(); // [tokens, d]
            }
            let loss = x.linear(w[head]).cross_entropy(&targets);
            losses.push(loss.value().item());
            let mut grads = w.gradients(loss.backward());
            clip_global_norm(&mut grads, 1.0);
            optimizer.step(&mut params, &grads, 0.05, 0.01);
        }
        assert!(losses[4] < 0.9 * losses[0], "it does not train: {losses:?}");
        params.values.tensors().map(bits).chain([losses.iter().map(|x| x.to_bits()).collect()]).collect()
    });
}
