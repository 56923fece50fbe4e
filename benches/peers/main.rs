//! The model of the preset `small` written once and run by three libraries: candle, burn (Flex) and rankgrad.
//!
//!     cargo build --release && RAYON_NUM_THREADS=2 target/release/peers candle|burn|rankgrad [--dense] [--steps 5]
//!
//! Each step is forward, backward and the library's own AdamW, over the whole batch at once, from the same weights and tokens;
//! prints the first loss, which must agree, and the median times as JSON. Each library uses its idiomatic CPU ops that have a
//! gradient. Not rankgrad's trainer, which takes a sequence at a time in two lanes: that is `rankgrad bench --preset small
//! --method adamw` (or dense-adamw).
//! Letters: N tokens of the batch, T context, d width, f ffn width, h head size, r rank; W [m, n] = A·Bᵀ, A [m, r], B [n, r].

extern crate burn_core as burn;

mod burn_peer;
mod candle_peer;
mod rankgrad_peer;

use std::time::Instant;

pub const BATCH: usize = 8;
pub const CONTEXT: usize = 256;
pub const VOCAB: usize = 256;
pub const DIM: usize = 384;
pub const LAYERS: usize = 6;
pub const HEADS: usize = 6;
pub const HEAD: usize = DIM / HEADS;
pub const FFN: usize = 1024;
pub const EPS: f64 = 1e-5;
pub const LR: f64 = 1e-4;

/// What the model needs of a library.
pub trait Peer {
    type T: Clone;
    type Loss;
    /// Rows `ids` of the table → [N, d].
    fn embedding(&self, table: &Self::T, ids: &[u32]) -> Self::T;
    fn rms_norm(&self, x: &Self::T, gain: &Self::T) -> Self::T;
    /// x·B.
    fn mul(&self, x: &Self::T, b: &Self::T) -> Self::T;
    /// x·Aᵀ.
    fn mul_t(&self, x: &Self::T, a: &Self::T) -> Self::T;
    fn add(&self, x: &Self::T, y: &Self::T) -> Self::T;
    /// silu(gate) ∘ up.
    fn swiglu(&self, gate: &Self::T, up: &Self::T) -> Self::T;
    /// Causal attention of rotated queries and keys, [N, d] each → [N, d].
    fn attention(&self, q: &Self::T, k: &Self::T, v: &Self::T) -> Self::T;
    fn cross_entropy(&self, logits: &Self::T, targets: &[u32]) -> Self::Loss;
}

/// A shape ([d] or [m, n]) and its values.
pub type Weight = (Vec<usize>, Vec<f32>);

/// Embedding; per block gain, q, k, v, o, gain, gate, up, down (A and B, or W, each); gain, head.
fn weights(dense: bool) -> Vec<Weight> {
    let mut state = 1u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0 // in [-1, 1)
    };
    let mut all = Vec::new();
    let mut matrix = |all: &mut Vec<Weight>, m: usize, n: usize, scale: f32| {
        all.push((vec![m, n], (0..m * n).map(|_| scale * uniform()).collect()));
    };
    let gain = |all: &mut Vec<Weight>| all.push((vec![DIM], vec![1.0; DIM]));
    matrix(&mut all, VOCAB, DIM, 0.5);
    for _ in 0..LAYERS {
        let mut layer = |all: &mut Vec<Weight>, m: usize, n: usize| {
            if dense {
                matrix(all, m, n, 0.05);
            } else {
                let r = m.min(n) / 4;
                matrix(all, m, r, 0.1);
                matrix(all, n, r, 0.1);
            }
        };
        gain(&mut all);
        (0..4).for_each(|_| layer(&mut all, DIM, DIM));
        gain(&mut all);
        (0..2).for_each(|_| layer(&mut all, FFN, DIM));
        layer(&mut all, DIM, FFN);
    }
    gain(&mut all);
    matrix(&mut all, VOCAB, DIM, 0.1);
    all
}

/// Mean cross-entropy of the batch.
pub fn loss<P: Peer>(p: &P, weights: &[P::T], dense: bool, inputs: &[u32], targets: &[u32]) -> P::Loss {
    let w = &mut weights.iter();
    let mut x = p.embedding(w.next().unwrap(), inputs); // [N, d]
    let linear = |x: &P::T, w: &mut std::slice::Iter<P::T>| {
        let a = w.next().unwrap();
        if dense { p.mul_t(x, a) } else { p.mul_t(&p.mul(x, w.next().unwrap()), a) } // [N, m]
    };
    for _ in 0..LAYERS {
        let h = p.rms_norm(&x, w.next().unwrap()); // [N, d]
        let [q, k, v] = [(); 3].map(|()| linear(&h, w)); // [N, d] each
        x = p.add(&x, &linear(&p.attention(&q, &k, &v), w)); // [N, d]
        let h = p.rms_norm(&x, w.next().unwrap()); // [N, d]
        let [gate, up] = [(); 2].map(|()| linear(&h, w)); // [N, f] each
        x = p.add(&x, &linear(&p.swiglu(&gate, &up), w)); // [N, d]
    }
    let x = p.rms_norm(&x, w.next().unwrap()); // [N, d]
    p.cross_entropy(&p.mul_t(&x, w.next().unwrap()), targets)
}

/// Cosines and sines [T, h/2] of the rotary angles, base 10,000.
pub fn angles() -> [Vec<f32>; 2] {
    let angle = |i: usize| {
        let (t, j) = (i / (HEAD / 2), i % (HEAD / 2));
        t as f64 * 10_000f64.powf(-(j as f64) / (HEAD / 2) as f64)
    };
    let all = 0..CONTEXT * HEAD / 2;
    [all.clone().map(|i| angle(i).cos() as f32).collect(), all.map(|i| angle(i).sin() as f32).collect()]
}

/// One step's loss, and the milliseconds of forward, backward and AdamW.
pub type Times = (f64, [f64; 3]);

/// Milliseconds since `start`, which is set to now.
pub fn lap(start: &mut Instant) -> f64 {
    let ms = 1e3 * start.elapsed().as_secs_f64();
    *start = Instant::now();
    ms
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let dense = args.iter().any(|a| a == "--dense");
    let steps =
        args.iter().position(|a| a == "--steps").map_or(5, |i| args[i + 1].parse().expect("--steps N"));
    let weights = weights(dense);
    let tokens: Vec<u32> =
        (0..=BATCH * CONTEXT).map(|i| (i * i * 31 + i * 7) as u32 % VOCAB as u32).collect();
    let (inputs, targets) = (tokens[1..].to_vec(), tokens[..BATCH * CONTEXT].to_vec());
    let library = args.first().map_or("", String::as_str);
    let runs = match library {
        "candle" => candle_peer::run(weights, dense, inputs, targets, steps + 1),
        "burn" => burn_peer::run(weights, dense, inputs, targets, steps + 1),
        "rankgrad" => rankgrad_peer::run(weights, dense, inputs, targets, steps + 1),
        _ => panic!("which library? candle, burn or rankgrad"),
    };
    let median = |i: usize| {
        let mut times: Vec<f64> = runs[1..].iter().map(|(_, ms)| ms[i]).collect(); // the first is not timed
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    println!(
        "{{\"library\": \"{library}\", \"dense\": {dense}, \"loss\": {:.6}, \"forward_ms\": {:.1}, \"backward_ms\": {:.1}, \
         \"adamw_ms\": {:.1}}}",
        runs[0].0,
        median(0),
        median(1),
        median(2)
    );
}
