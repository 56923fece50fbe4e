//! Times the kernels of a training step one by one: `cargo bench --bench kernels [-- FILTER]`, `RAYON_NUM_THREADS=1` for one core.
//!
//! Operands are the same in every iteration, so they are in the caches as far as they fit: these are the kernels' own speeds,
//! not their share of a step, which `rankgrad bench --profile` shows. Rows are those that the trainer takes at a time.
//! Throughput "elem/s" is FLOPs per second for products, attention, Newton–Schulz and certificates, elements of the first
//! operand per second for the rest.
//! Letters: N rows of x, n inputs, m outputs, r rank, A [m, r], B [n, r], d width, f ffn width, V vocabulary.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rankgrad::lowrank::{
    Accuracy, FactorPair, NewtonSchulz, Orthogonaliser, Space, gaussian, newton_schulz, pair_telemetry,
    spectral_norm_upper_bound, upper_bound_flops,
};
use rankgrad::tensor::{Accum, Attention, Backend, Cpu, Mat, Shape, Tensor};

type B = Cpu<f32>;

/// Preset, rows at a time, sequences in them, d, heads, f, V.
const PRESETS: [(&str, usize, usize, usize, usize, usize, usize); 3] = [
    ("tiny", 128, 2, 128, 4, 352, 256),
    ("small", 256, 1, 384, 6, 1024, 256),
    ("mid", 512, 1, 768, 12, 2048, 4096),
];

fn draw(shape: impl Into<Shape>) -> Tensor<B> {
    let shape = shape.into();
    let rng = &mut ChaCha8Rng::seed_from_u64(shape.len() as u64);
    gaussian(&Cpu::default(), rng, shape, 0.1) // shape
}

fn bench<R>(c: &mut Criterion, group: &str, name: &str, elements: usize, mut f: impl FnMut() -> R) {
    let mut group = c.benchmark_group(group);
    group.throughput(Throughput::Elements(elements as u64));
    group.bench_function(name, |b| b.iter(|| black_box(f())));
    group.finish();
}

/// The six products of y = x·B·Aᵀ, forward and backward, for a square layer and one into the feed-forward part.
fn gemm(c: &mut Criterion) {
    for (preset, rows, _, d, _, f, _) in PRESETS {
        for (n, m) in [(d, d), (d, f)] {
            let r = n.min(m) / 4;
            let (x, h, y) = (draw([rows, n]), draw([rows, r]), draw([rows, m])); // also dx, dh, dy
            let (a, b) = (draw([m, r]), draw([n, r]));
            let mut product = |what: &str, p: Mat<B>, q: Mat<B>, accum| {
                let ((rows, k), (_, cols)) = (p.sizes(), q.sizes());
                let mut out = draw([rows, cols]); // [rows, cols]
                bench(c, "gemm", &format!("{preset} {n}→{m} {what}"), 2 * rows * k * cols, || {
                    B::gemm(&[p], &[q], &mut [&mut out], accum);
                });
            };
            product("h = x·B", (&x).into(), (&b).into(), Accum::Replace);
            product("y = h·Aᵀ", (&h).into(), a.t(), Accum::Replace);
            product("dh = dy·A", (&y).into(), (&a).into(), Accum::Replace);
            product("dA += dyᵀ·h", y.t(), (&h).into(), Accum::Add);
            product("dB += xᵀ·dh", x.t(), (&h).into(), Accum::Add);
            product("dx += dh·Bᵀ", (&h).into(), b.t(), Accum::Add);
        }
    }
}

fn attention(c: &mut Criterion) {
    for (preset, rows, batch, d, heads, _, _) in PRESETS {
        let [q, k, v, dout] = [(); 4].map(|()| draw([rows, d])); // [N, d] each
        let how = Attention { batch, heads, kv_heads: heads, causal: true };
        // q·kᵀ and p·v over the (T + 1)/2 keys that a query sees; backward four such products and q·kᵀ again
        let product = 2 * rows * d * (rows / batch + 1) / 2;
        bench(c, "attention", &format!("{preset} forward"), 2 * product, || B::attention(&q, &k, &v, how));
        let (o, lse) = B::attention(&q, &k, &v, how); // [N, d], [batch, heads, T]
        bench(c, "attention", &format!("{preset} backward"), 5 * product, || {
            B::attention_grad([&q, &k, &v], &o, &lse, &dout, how)
        });
    }
}

fn rows(c: &mut Criterion) {
    for (preset, rows, _, d, _, f, v) in PRESETS {
        let (x, g, dy) = (draw([rows, d]), draw([d]), draw([rows, d]));
        bench(c, "rms_norm", &format!("{preset} forward"), x.len(), || B::rms_norm(&x, &g, 1e-5));
        let (_, inv_rms) = B::rms_norm(&x, &g, 1e-5); // [N, d], [N]
        bench(c, "rms_norm", &format!("{preset} backward"), x.len(), || {
            B::rms_norm_grad(&x, &g, &inv_rms, &dy, None)
        });

        let (gate, up, df) = (draw([rows, f]), draw([rows, f]), draw([rows, f]));
        bench(c, "swiglu", &format!("{preset} forward"), gate.len(), || B::swiglu(&gate, &up));
        bench(c, "swiglu", &format!("{preset} backward"), gate.len(), || B::swiglu_grad(&gate, &up, &df));

        let logits = draw([rows, v]);
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % v) as u32).collect();
        bench(c, "softmax", &format!("{preset} forward"), logits.len(), || B::softmax(&logits));
        let p = B::softmax(&logits); // [N, V]
        bench(c, "softmax", &format!("{preset} backward"), logits.len(), || B::softmax_grad(&p, &logits));
        bench(c, "cross_entropy", &format!("{preset} loss and gradient"), logits.len(), || {
            B::cross_entropy(&logits, &targets, 1.0)
        });
    }
}

/// One factor each of a square layer and of one into the feed-forward part.
fn factors(c: &mut Criterion) {
    for (preset, _, _, d, _, f, _) in PRESETS {
        for p in [d, f] {
            let m = draw([p, d / 4]); // [p, r]
            for (name, space) in [("plain", Space::Plain), ("Gram", Space::Gram)] {
                let how = NewtonSchulz { space, ..NewtonSchulz::default() };
                let flops = Orthogonaliser::NewtonSchulz(how).flops(p, d / 4) as usize;
                let name = format!("{preset} {p}×{} {name}", d / 4);
                bench(c, "newton_schulz", &name, flops, || newton_schulz(&[&m], how));
            }
            let flops = upper_bound_flops(p, d / 4) as usize;
            bench(c, "certificate", &format!("{preset} {p}×{}", d / 4), flops, || {
                spectral_norm_upper_bound(&m)
            });
            let pair = FactorPair::new(draw([p, d / 4]), draw([d, d / 4])); // [p, r], [d, r]
            let before = FactorPair::new(pair.a.scale(0.9), pair.b.clone()); // [p, r], [d, r]
            bench(c, "telemetry", &format!("{preset} {p}×{d}"), pair.costs().parameters, || {
                pair_telemetry(Some(&before), &pair, Accuracy::Fast)
            });
        }
    }
}

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600));
    targets = gemm, attention, rows, factors
}
criterion_main!(kernels);
