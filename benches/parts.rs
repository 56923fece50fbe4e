//! Times two parts of a training step alone, for benches/compare.py, which sets them against the whole step and PyTorch's parts.
//!
//!     cargo bench --bench parts -- optimizer --preset mid --threads 2
//!     cargo bench --bench parts -- products --preset small --threads 2 [--rows 256]
//!     cargo bench --bench parts -- svd --outputs 1024 --inputs 4096 --threads 2
//!
//! `optimizer`: one Spectron step on the factor pairs of all blocks, from gradients that are there already; no clipping, no
//! AdamW for the rest. `products`: every matrix product of forward and backward but attention's, on operands of their own
//! as in the step, and nothing between them; `--rows` at a time in two lanes, as the trainer works, or else the whole batch at once.
//! `svd`, for benches/svd.py: a factor pair of half the full rank made of a matrix, once.
//! Prints one JSON object. Not a training step: `rankgrad bench` times that. Sizes and names are those of benches/torch_bench.py.
//! Letters: N rows of x (tokens), n inputs, m outputs, r rank; A [m, r], B [n, r].

use std::time::Instant;

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rankgrad::lowrank::{FactorPair, Rule, Spectron, gaussian};
use rankgrad::tensor::{Accum, Backend, Cpu, Mat, Tensor};
use rayon::prelude::*;

type B = Cpu<f32>;
type T = Tensor<B>;

const RATIO: f64 = 0.25;
const SECONDS: f64 = 3.0;

struct Preset {
    batch: usize,
    vocab: usize,
    dim: usize,
    layers: usize,
    ffn: usize,
    context: usize,
}

impl Preset {
    fn named(name: &str) -> Self {
        let [batch, vocab, dim, layers, ffn, context] = match name {
            "tiny" => [12, 256, 128, 4, 352, 64],
            "small" => [8, 256, 384, 6, 1024, 256],
            "mid" => [2, 4096, 768, 12, 2048, 512],
            _ => panic!("no preset {name}: there are tiny, small, mid"),
        };
        Self { batch, vocab, dim, layers, ffn, context }
    }

    /// The outputs of a block's matrices, grouped by the input they share: q, k, v; o; gate, up; down.
    fn block(&self) -> [(usize, Vec<usize>); 4] {
        let (d, f) = (self.dim, self.ffn);
        [(d, vec![d; 3]), (d, vec![d]), (d, vec![f; 2]), (f, vec![d])]
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| args.iter().position(|a| a == name).map(|i| args[i + 1].as_str());
    let preset = flag("--preset").unwrap_or("small");
    let number = |name: &str| {
        flag(name).map(|n| n.parse::<usize>().unwrap_or_else(|_| panic!("{name} {n}: no number")))
    };
    let threads = number("--threads").unwrap_or(2);
    let sizes = Preset::named(preset);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
    let what = args.first().map_or("", String::as_str);
    let fields = pool.install(|| match what {
        "optimizer" => optimizer(&sizes),
        "products" => products(&sizes, number("--rows")),
        "svd" => svd([number("--outputs").unwrap_or(1024), number("--inputs").unwrap_or(4096)]),
        _ => panic!("parts {what}: say `optimizer`, `products` or `svd`"),
    });
    println!("{{\"part\": \"{what}\", \"preset\": \"{preset}\", \"threads\": {threads}, {fields}}}");
}

/// The median time of `f` in ms, and how often it ran.
fn median_ms(mut f: impl FnMut()) -> (f64, usize) {
    (0..3).for_each(|_| f());
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || start.elapsed().as_secs_f64() < SECONDS {
        let start = Instant::now();
        f();
        times.push(1e3 * start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times.len())
}

fn svd([m, n]: [usize; 2]) -> String {
    let w = gaussian(&Cpu::default(), &mut ChaCha8Rng::seed_from_u64(1), [m, n], 1.0); // [m, n]
    let start = Instant::now();
    let (_, error) = FactorPair::<B>::from_dense(&w, m.min(n) / 2);
    let seconds = start.elapsed().as_secs_f64();
    format!(
        "\"outputs\": {m}, \"inputs\": {n}, \"seconds\": {seconds:.3}, \"relative_error\": {:.9}",
        error / w.norm()
    )
}

fn optimizer(p: &Preset) -> String {
    let rng = &mut ChaCha8Rng::seed_from_u64(1);
    let mut draw = |rows, r| gaussian(&Cpu::default(), rng, [rows, r], 0.05); // [rows, r]
    let mut pairs: Vec<FactorPair<B>> = Vec::new();
    let mut grads = Vec::new();
    for (n, outputs) in (0..p.layers).flat_map(|_| p.block()) {
        for m in outputs {
            let r = (RATIO * n.min(m) as f64) as usize;
            pairs.push(FactorPair::new(draw(m, r), draw(n, r)));
            grads.push(FactorPair::new(draw(m, r), draw(n, r)));
        }
    }
    let mut rule = Spectron::new(&pairs);
    let lr = vec![1e-3; pairs.len()];
    let mut t = 0;
    let (ms, steps) = median_ms(|| {
        t += 1;
        rule.step(&mut pairs, &grads, &lr, t);
    });
    format!("\"pairs\": {}, \"steps\": {steps}, \"step_ms\": {ms}", pairs.len())
}

/// What one lane reads and writes in the products of one layer x·B·Aᵀ, or of the head, x·Wᵀ.
struct Layer {
    /// B and A, or W alone; and their gradients.
    weights: Vec<T>,
    grads: Vec<T>,
    h: T,
    dh: T,
    y: T,
    dy: T,
}

/// Layers that share their input.
struct Group {
    x: T,
    dx: T,
    layers: Vec<Layer>,
}

fn product<'a>(a: impl Into<Mat<'a, B>>, b: impl Into<Mat<'a, B>>, c: &mut T, accum: Accum) {
    B::gemm(&[a.into()], &[b.into()], &mut [c], accum);
}

impl Group {
    fn forward(&mut self) {
        let x = &self.x;
        for Layer { weights, h, y, .. } in &mut self.layers {
            match &weights[..] {
                [b, a] => {
                    product(x, b, h, Accum::Replace); // [N, r]
                    product(&*h, a.t(), y, Accum::Replace); // [N, m]
                }
                _ => product(x, weights[0].t(), y, Accum::Replace), // [N, m]
            }
        }
    }

    /// Gradients of weights are added to, as those of all but the first sequence are; dx by all but the first layer.
    fn backward(&mut self) {
        let (x, dx) = (&self.x, &mut self.dx);
        for (i, Layer { weights, grads, h, dh, dy, .. }) in self.layers.iter_mut().enumerate() {
            let accum = if i == 0 { Accum::Replace } else { Accum::Add };
            match &weights[..] {
                [b, a] => {
                    product(&*dy, a, dh, Accum::Replace); // [N, r]
                    product(dy.t(), &*h, &mut grads[1], Accum::Add); // dA [m, r]
                    product(x.t(), &*dh, &mut grads[0], Accum::Add); // dB [n, r]
                    product(&*dh, b.t(), dx, accum); // [N, n]
                }
                _ => {
                    product(&*dy, &weights[0], dx, accum); // [N, n]
                    product(dy.t(), x, &mut grads[0], Accum::Add); // dW [m, n]
                }
            }
        }
    }
}

fn products(p: &Preset, rows: Option<usize>) -> String {
    let tokens = p.batch * p.context;
    let (rows, lanes) = rows.map_or((tokens, 1), |rows| (rows, 2));
    assert!(
        tokens.is_multiple_of(rows * lanes),
        "--rows {rows}: not a part of {tokens} tokens in {lanes} lanes"
    );
    let rng = &mut ChaCha8Rng::seed_from_u64(1);
    let mut draw = |rows, cols| gaussian(&Cpu::default(), rng, [rows, cols], 0.05); // [rows, cols]
    let mut flops = 0;
    let mut group = |n: usize, outputs: Vec<usize>, factored: bool| {
        let layers = outputs.into_iter().map(|m| {
            let r = if factored { (RATIO * n.min(m) as f64) as usize } else { 1 };
            let shapes = if factored { vec![[n, r], [m, r]] } else { vec![[m, n]] };
            let weights: Vec<T> = shapes.iter().map(|&[rows, cols]| draw(rows, cols)).collect();
            flops += 3 * 2 * rows * weights.iter().map(T::len).sum::<usize>();
            let grads = weights.iter().map(T::zeros_like).collect();
            Layer { weights, grads, h: draw(rows, r), dh: draw(rows, r), y: draw(rows, m), dy: draw(rows, m) }
        });
        let layers = layers.collect();
        Group { x: draw(rows, n), dx: draw(rows, n), layers }
    };
    let mut model = || -> Vec<Group> {
        let blocks = (0..p.layers).flat_map(|_| p.block());
        let mut groups: Vec<Group> = blocks.map(|(n, outputs)| group(n, outputs, true)).collect();
        groups.push(group(p.dim, vec![p.vocab], false));
        groups
    };
    let mut work: Vec<Vec<Group>> = (0..lanes).map(|_| model()).collect();
    let pieces = tokens / rows / lanes;
    let (ms, runs) = median_ms(|| {
        work.par_iter_mut().for_each(|groups| {
            for _ in 0..pieces {
                groups.iter_mut().for_each(Group::forward);
                groups.iter_mut().rev().for_each(Group::backward);
            }
        });
    });
    let flops = (flops * pieces) as f64;
    format!(
        "\"rows\": {rows}, \"lanes\": {lanes}, \"runs\": {runs}, \"flops\": {flops}, \"products_ms\": {ms}, \"gflops\": {}",
        flops / ms / 1e6
    )
}
