//! The op table: one row per op, and what a row buys. Adding an op to autograd/ops/ means adding a row here.
//!
//! A row is a name, input shapes in drawn sizes, and an expression that runs on every backend; fused ops add a naive formula
//! in plain f64 loops. Bought: a gradient check in f64, agreement of f32 with f64, equality with the formula, gradients that
//! do not depend on which inputs are constants. The guards at the end test the tests.
//! Letters: n rows, d columns; m×k·k×n products; r rank; tq, tk query and key lengths; h head size; v vocabulary.

mod common;

use common::{config, gpu, rng, size};
use ndarray::ArrayD;
use proptest::prelude::*;
use rand_distr::{Distribution, StandardNormal};
use rankgrad::autograd::{Rope, Tape, Var, concat, gradcheck};
use rankgrad::gpu::Cuda;
use rankgrad::lowrank::{FactorPair, Pair, Params, Values};
use rankgrad::tensor::{Attention, Backend, Bf16, Cpu, Element, Tensor};
use std::collections::BTreeSet;

/// A gradient is right if it agrees with the five-point difference to this, relative (about 1e-10 is usual).
const GRADIENT: f64 = 1e-6;
/// f64 against a naive formula in f64: they differ in the order of sums, 1e-16 per term.
const NAIVE: f64 = 1e-13;

/// How far f32, and bf16, may be from f64, in multiples of what rounding the inputs to that type would change (see [`agreement`]).
///
/// f32: a short chain of roundings per element: 4. Sums of K terms add about √K/2 roundings, K at most 16,421/16 in each of 16
/// lanes: 16. Sums over rows have one lane and K = 5,000 (and the norms cube a rounded 1/rms before that): 32.
/// bf16: whatever is computed, f32 holds it until it is rounded for the first time, and one rounding is at most one yardstick: 1.
/// What reads back something rounded rounds twice: 2 (a mean its sum, a norm of a sum that too, lowrank_linear x·B, attention's gradient o; that of cross_entropy
/// is rounded before it is multiplied by dy; linear_cross_entropy's logits, theirs and its own). Softmax's gradient reads back y, which rounded does not sum to 1: as in f32.
/// `cancels`: the gradient can be a small difference of terms as large as dy (1 − tanh², p − 1, dy − mean), so dy's own
/// rounding is allowed for too.
const TOLERANCES: &[(&str, f64, f64, bool)] = &[
    ("add", 4.0, 1.0, false),
    ("sub", 4.0, 1.0, false),
    ("mul", 4.0, 1.0, false),
    ("scale", 4.0, 1.0, false),
    ("exp", 4.0, 1.0, false),
    ("log", 4.0, 1.0, false),
    ("tanh", 4.0, 1.0, true),
    ("relu", 4.0, 1.0, false),
    ("silu", 4.0, 1.0, true),
    ("swiglu", 4.0, 1.0, true),
    ("reshape", 4.0, 1.0, false),
    ("slice", 4.0, 1.0, false),
    ("concat", 4.0, 1.0, false),
    ("rope", 4.0, 1.0, false),
    ("embedding", 16.0, 1.0, false),
    ("sum", 16.0, 1.0, false),
    ("mean", 16.0, 2.0, false),
    ("add_bias", 32.0, 1.0, false),
    ("matmul", 16.0, 1.0, false),
    ("matmul_nt", 16.0, 1.0, false),
    ("matmul_tn", 16.0, 1.0, false),
    ("matmul_tt", 16.0, 1.0, false),
    ("linear", 16.0, 1.0, false),
    ("lowrank_linear", 16.0, 2.0, false),
    ("lowrank_linears", 16.0, 3.0, false),
    ("softmax", 16.0, 16.0, false),
    ("rms_norm", 32.0, 1.0, true),
    ("add_rms_norm", 32.0, 2.0, true),
    ("layer_norm", 32.0, 1.0, true),
    ("attention", 16.0, 2.0, true),
    ("cross_entropy", 16.0, 2.0, true),
    ("linear_cross_entropy", 16.0, 3.0, true),
];

/// The drawn sizes; every row picks those that it needs.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    n: usize,
    d: usize,
    m: usize,
    k: usize,
    r: usize,
    v: usize,
    batch: usize,
    kv_heads: usize,
    group: usize,
    half: usize,
    tq: usize,
    /// tk − tq.
    past: usize,
    seed: u64,
}

impl Sizes {
    fn h(&self) -> usize {
        2 * self.half
    }
    fn heads(&self) -> usize {
        self.kv_heads * self.group
    }
    fn tk(&self) -> usize {
        self.tq + self.past
    }
    fn how(&self, causal: bool) -> Attention {
        Attention { batch: self.batch, heads: self.heads(), kv_heads: self.kv_heads, causal }
    }
    /// `count` token ids below v, with repetitions.
    fn ids(&self, count: usize) -> Vec<u32> {
        (0..count).map(|i| ((i * i * 7 + i + self.seed as usize % 97) % self.v) as u32).collect()
    }
}

fn sizes() -> impl Strategy<Value = Sizes> {
    let matrix = (size(), size(), size(), size(), 1..9usize, size());
    let heads = (1..4usize, 1..3usize, 1..4usize, 1..6usize, size(), 0..40usize);
    (matrix, heads, any::<u64>()).prop_map(
        |((n, d, m, k, r, v), (batch, kv_heads, group, half, tq, past), seed)| Sizes {
            n,
            d,
            m,
            k,
            r,
            v,
            batch,
            kv_heads,
            group,
            half,
            tq,
            past: past.saturating_sub(20),
            seed,
        },
    )
}

/// Rows longer than one task of 16,384 elements, many short rows across several tasks, and products that are shared out.
fn large_sizes() -> [Sizes; 2] {
    let long = Sizes {
        n: 3,
        d: 16_421,
        m: 67,
        k: 80,
        r: 21,
        v: 16_421,
        batch: 2,
        kv_heads: 2,
        group: 2,
        half: 9,
        tq: 97,
        past: 37,
        seed: 1,
    };
    [long, Sizes { n: 2_500, d: 7, m: 33, k: 9, v: 5, seed: 2, ..long }]
}

type Expression<B> = for<'t> fn(&[Var<'t, B>], &Sizes) -> Var<'t, B>;
type Naive = fn(&[ArrayD<f64>], &Sizes) -> Vec<f64>;

/// Where inputs are drawn from.
#[derive(Clone, Copy)]
enum Domain {
    /// N(0, 1).
    Normal,
    /// [0.2, ∞): for log.
    Positive,
    /// |x| ≥ 0.2: no difference step reaches the kink of relu.
    OffZero,
}

struct Row {
    name: &'static str,
    inputs: fn(&Sizes) -> Vec<Vec<usize>>,
    domain: Domain,
    /// The expression, once for each backend.
    in_f64: Expression<Cpu<f64>>,
    in_f32: Expression<Cpu<f32>>,
    on_gpu: Expression<Cuda<f32>>,
    on_gpu_in_bf16: Expression<Cuda<Bf16>>,
    naive: Option<Naive>,
}

/// `row!(name, |sizes, inputs| [shape of each input] => expression)`; each backend is one line here.
macro_rules! row {
    ($name:literal, |$z:ident, $x:ident| [$($shape:expr),*] => $f:expr) => {{
        fn expression<'t, B: Backend>($x: &[Var<'t, B>], $z: &Sizes) -> Var<'t, B> {
            let _ = $z; // most expressions need no size
            $f
        }
        Row {
            name: $name,
            inputs: |$z| vec![$($shape.to_vec()),*],
            domain: Domain::Normal,
            in_f64: expression::<Cpu<f64>>,
            in_f32: expression::<Cpu<f32>>,
            on_gpu: expression::<Cuda<f32>>,
            on_gpu_in_bf16: expression::<Cuda<Bf16>>,
            naive: None,
        }
    }};
}

impl Row {
    fn drawn(self, domain: Domain) -> Self {
        Self { domain, ..self }
    }
    fn naive(self, naive: Naive) -> Self {
        Self { naive: Some(naive), ..self }
    }
}

fn table() -> Vec<Row> {
    vec![
        row!("add", |z, x| [[z.n, z.d], [z.n, z.d]] => x[0] + x[1]),
        row!("sub", |z, x| [[z.n, z.d], [z.n, z.d]] => x[0] - x[1]),
        row!("mul", |z, x| [[z.n, z.d], [z.n, z.d]] => x[0] * x[1]),
        row!("scale", |z, x| [[z.n, z.d]] => x[0].scale(-1.7)),
        row!("sum", |z, x| [[z.n, z.d]] => x[0].sum()).naive(naive_sum),
        row!("mean", |z, x| [[z.n, z.d]] => x[0].mean()),
        row!("exp", |z, x| [[z.n, z.d]] => x[0].exp()).naive(|x, _| x[0].mapv(f64::exp).into_iter().collect()),
        row!("log", |z, x| [[z.n, z.d]] => x[0].log()).drawn(Domain::Positive)
            .naive(|x, _| x[0].mapv(f64::ln).into_iter().collect()),
        row!("tanh", |z, x| [[z.n, z.d]] => x[0].tanh()).naive(|x, _| x[0].mapv(f64::tanh).into_iter().collect()),
        row!("relu", |z, x| [[z.n, z.d]] => x[0].relu()).drawn(Domain::OffZero)
            .naive(|x, _| x[0].mapv(|x| if x > 0.0 { x } else { 0.0 }).into_iter().collect()),
        row!("silu", |z, x| [[z.n, z.d]] => x[0].silu()).naive(|x, _| x[0].mapv(silu).into_iter().collect()),
        row!("swiglu", |z, x| [[z.n, z.d], [z.n, z.d]] => x[0].swiglu(x[1]))
            .naive(|x, _| x[0].iter().zip(&x[1]).map(|(&a, b)| silu(a) * b).collect()),
        row!("reshape", |z, x| [[z.n, z.m, z.r]] => x[0].reshape([z.m, z.n * z.r])),
        row!("slice", |z, x| [[z.batch, z.n, z.d]] => x[0].slice(z.d / 3..z.d - z.d / 4)).naive(naive_slice),
        row!("concat", |z, x| [[z.n, z.d], [z.n, z.r], [z.n, 1]] => concat(x)).naive(naive_concat),
        row!("matmul", |z, x| [[z.m, z.k], [z.k, z.r]] => x[0].matmul(x[1])).naive(|x, z| naive_matmul(x, z.k, 1, 0)),
        row!("matmul_nt", |z, x| [[z.m, z.k], [z.r, z.k]] => x[0].matmul_nt(x[1])).naive(|x, z| naive_matmul(x, z.k, 1, 1)),
        row!("matmul_tn", |z, x| [[z.k, z.m], [z.k, z.r]] => x[0].matmul_tn(x[1])).naive(|x, z| naive_matmul(x, z.k, 0, 0)),
        row!("matmul_tt", |z, x| [[z.k, z.m], [z.r, z.k]] => x[0].matmul_tt(x[1])).naive(|x, z| naive_matmul(x, z.k, 0, 1)),
        row!("linear", |z, x| [[z.batch, z.tq, z.k], [z.m, z.k]] => x[0].linear(x[1])).naive(naive_linear),
        row!("lowrank_linear", |z, x| [[z.batch, z.tq, z.k], [z.m, z.r], [z.k, z.r]] => x[0].lowrank_linear(x[1], x[2]))
            .naive(naive_lowrank_linear),
        row!("lowrank_linears", |z, x| [[z.batch, z.tq, z.k], [z.m, z.r], [z.m, z.r], [z.m, 1], [z.k, 2 * z.r + 1]] => {
            let [y, z, v] = x[0].lowrank_linears([x[1], x[2], x[3]], x[4]);
            y + z * v
        })
            .naive(|x, z| {
                let y = |i: usize, first: usize, r: usize| {
                    let b = ArrayD::from_shape_fn(vec![z.k, r], |at| x[4][[at[0], first + at[1]]]);
                    naive_lowrank_linear(&[x[0].clone(), x[i].clone(), b], &Sizes { r, ..*z })
                };
                y(1, 0, z.r).iter().zip(y(2, z.r, z.r)).zip(y(3, 2 * z.r, 1)).map(|((y, z), v)| y + z * v).collect()
            }),
        row!("add_bias", |z, x| [[z.batch, z.n, z.d], [z.d]] => x[0].add_bias(x[1])).naive(naive_add_bias),
        row!("softmax", |z, x| [[z.batch, z.n, z.d]] => x[0].softmax()).naive(naive_softmax),
        row!("rms_norm", |z, x| [[z.batch, z.n, z.d], [z.d]] => x[0].rms_norm(x[1], 1e-5)).drawn(Domain::OffZero)
            .naive(|x, _| naive_rms_norm(&x[0], &x[1], 1e-5).concat()),
        row!("add_rms_norm", |z, x| [[z.batch, z.n, z.d], [z.batch, z.n, z.d], [z.d]] => {
            let (sum, y) = x[0].add_rms_norm(x[1], x[2], 1e-1);
            concat(&[sum, y])
        }).naive(|x, _| {
            let sum = &x[0] + &x[1];
            let both = rows(&sum).into_iter().zip(naive_rms_norm(&sum, &x[2], 1e-1));
            both.flat_map(|(sum, y)| [sum, y].concat()).collect()
        }),
        row!("layer_norm", |z, x| [[z.batch, z.n, z.d], [z.d], [z.d]] => x[0].layer_norm(x[1], x[2], 1e-1))
            .naive(naive_layer_norm),
        row!("embedding", |z, x| [[z.v, z.r]] => x[0].embedding(&z.ids(z.n))).naive(naive_embedding),
        row!("cross_entropy", |z, x| [[z.n, z.v]] => x[0].cross_entropy(&z.ids(z.n))).naive(naive_cross_entropy),
        row!("linear_cross_entropy", |z, x| [[z.n, z.k], [z.v, z.k]] => {
            // fewer rows at a time than there are
            x[0].linear_cross_entropy_wide(x[1], &z.ids(z.n), 1.0, Some((z.n - 1).clamp(1, 3))).0
        }).naive(|x, z| {
            let logits = ArrayD::from_shape_vec(vec![z.n, z.v], naive_matmul(x, z.k, 1, 1)).expect("n·v of them");
            naive_cross_entropy(&[logits], z)
        }),
        row!("rope", |z, x| [[z.batch * z.tq, z.heads() * z.h()]] => {
            let rope = Rope::new(&x[0].tape().device().wide(), z.tk() + 1, z.h(), 10_000.0);
            x[0].rope(&rope, z.tq, z.past)
        }).naive(naive_rope),
        row!("attention", |z, x| [[z.batch * z.tq, z.heads() * z.h()], [z.batch * z.tk(), z.kv_heads * z.h()],
            [z.batch * z.tk(), z.kv_heads * z.h()]] => x[0].attention(x[1], x[2], z.how(true)))
            .naive(|x, z| naive_attention(x, z, true)),
        row!("attention", |z, x| [[z.batch * z.tq, z.heads() * z.h()], [z.batch * z.tk(), z.kv_heads * z.h()],
            [z.batch * z.tk(), z.kv_heads * z.h()]] => x[0].attention(x[1], x[2], z.how(false)))
            .naive(|x, z| naive_attention(x, z, false)),
        row!("attention", |z, x| [[z.batch * z.tk(), z.heads() * z.h()], [z.batch * z.tq, z.kv_heads * z.h()],
            [z.batch * z.tq, z.kv_heads * z.h()]] => x[0].attention(x[1], x[2], z.how(false))) // more queries than keys
            .naive(|x, z| naive_attention(x, z, false)),
    ]
}

// ---- naive formulas

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn naive_sum(x: &[ArrayD<f64>], _: &Sizes) -> Vec<f64> {
    vec![x[0].iter().sum()]
}

/// The rows of the last axis.
fn rows(x: &ArrayD<f64>) -> Vec<Vec<f64>> {
    x.rows().into_iter().map(|row| row.to_vec()).collect()
}

fn naive_slice(x: &[ArrayD<f64>], z: &Sizes) -> Vec<f64> {
    rows(&x[0]).iter().flat_map(|row| row[z.d / 3..z.d - z.d / 4].to_vec()).collect()
}

fn naive_concat(x: &[ArrayD<f64>], z: &Sizes) -> Vec<f64> {
    let parts: Vec<_> = x.iter().map(rows).collect();
    (0..z.n).flat_map(|i| parts.iter().flat_map(move |part| part[i].clone())).collect()
}

/// C_ij = Σ_l A·B; `ka` and `kb` are the axes of A and B that are summed over.
fn naive_matmul(x: &[ArrayD<f64>], k: usize, ka: usize, kb: usize) -> Vec<f64> {
    let (m, n) = (x[0].shape()[1 - ka], x[1].shape()[1 - kb]);
    let a = |i: usize, l: usize| if ka == 1 { x[0][[i, l]] } else { x[0][[l, i]] };
    let b = |l: usize, j: usize| if kb == 0 { x[1][[l, j]] } else { x[1][[j, l]] };
    (0..m * n).map(|ij| (0..k).map(|l| a(ij / n, l) * b(l, ij % n)).sum()).collect()
}

fn naive_linear(x: &[ArrayD<f64>], z: &Sizes) -> Vec<f64> {
    let w = &x[1];
    let layer =
        |x: Vec<f64>| (0..z.m).map(move |o| (0..z.k).map(|i| x[i] * w[[o, i]]).sum()).collect::<Vec<f64>>();
    rows(&x[0]).into_iter().flat_map(layer).collect()
}

/// Through W = A·Bᵀ, which the op never forms.
fn naive_lowrank_linear(x: &[ArrayD<f64>], z: &Sizes) -> Vec<f64> {
    let w =
        ArrayD::from_shape_fn(vec![z.m, z.k], |o| (0..z.r).map(|l| x[1][[o[0], l]] * x[2][[o[1], l]]).sum());
    naive_linear(&[x[0].clone(), w], z)
}

fn naive_add_bias(x: &[ArrayD<f64>], z: &Sizes) -> Vec<f64> {
    x[0].iter().enumerate().map(|(i, a)| a + x[1][[i % z.d]]).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let total: f64 = x.iter().map(|x| x.exp()).sum();
    x.iter().map(|x| x.exp() / total).collect()
}

fn naive_softmax(x: &[ArrayD<f64>], _: &Sizes) -> Vec<f64> {
    rows(&x[0]).iter().flat_map(|row| softmax(row)).collect()
}

/// Row by row.
fn naive_rms_norm(x: &ArrayD<f64>, g: &ArrayD<f64>, eps: f64) -> Vec<Vec<f64>> {
    let normed = |x: Vec<f64>| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(g).map(|(x, g)| g * x / (mean + eps).sqrt()).collect()
    };
    rows(x).into_iter().map(normed).collect()
}

fn naive_layer_norm(x: &[ArrayD<f64>], z: &Sizes) -> Vec<f64> {
    let normed = |x: Vec<f64>| {
        let mean = x.iter().sum::<f64>() / z.d as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / z.d as f64;
        x.into_iter().map(move |x| (x - mean) / (variance + 1e-1).sqrt()).collect::<Vec<_>>()
    };
    let normed = rows(&x[0]).into_iter().flat_map(normed);
    normed.enumerate().map(|(i, y)| y * x[1][[i % z.d]] + x[2][[i % z.d]]).collect()
}

fn naive_embedding(x: &[ArrayD<f64>], z: &Sizes) -> Vec<f64> {
    let table = rows(&x[0]);
    z.ids(z.n).into_iter().flat_map(|id| table[id as usize].clone()).collect()
}

fn naive_cross_entropy(x: &[ArrayD<f64>], z: &Sizes) -> Vec<f64> {
    let losses =
        rows(&x[0]).into_iter().zip(z.ids(z.n)).map(|(row, target)| -softmax(&row)[target as usize].ln());
    vec![losses.sum::<f64>() / z.n as f64]
}

/// Each pair (i, i + h/2) as a complex number, multiplied by e^{iθ}, θ = position·10000^(−2i/h).
fn naive_rope(x: &[ArrayD<f64>], z: &Sizes) -> Vec<f64> {
    let (h, d) = (z.h(), z.heads() * z.h());
    let at = |token: usize, col: usize| {
        let pair = col % h % z.half;
        let theta = (token % z.tq + z.past) as f64 / 10_000f64.powf(pair as f64 / z.half as f64);
        let first = col - col % h + pair;
        let (a, b) = (x[0][[token, first]], x[0][[token, first + z.half]]);
        if col % h < z.half { a * theta.cos() - b * theta.sin() } else { b * theta.cos() + a * theta.sin() }
    };
    (0..z.batch * z.tq * d).map(|i| at(i / d, i % d)).collect()
}

fn naive_attention(x: &[ArrayD<f64>], z: &Sizes, causal: bool) -> Vec<f64> {
    let [q, k, v] = x else { unreachable!("three inputs") };
    let (h, tq, tk) = (z.h(), q.shape()[0] / z.batch, k.shape()[0] / z.batch);
    let mut out = Vec::new();
    for token in 0..z.batch * tq {
        let (sequence, i) = (token / tq, token % tq);
        let keys = if causal { i + 1 + tk - tq } else { tk };
        for head in 0..z.heads() {
            let (qc, kc) = (head * h, head / z.group * h);
            let score = |key: usize| -> f64 {
                (0..h).map(|c| q[[token, qc + c]] * k[[sequence * tk + key, kc + c]]).sum::<f64>()
                    / (h as f64).sqrt()
            };
            let p = softmax(&(0..keys).map(score).collect::<Vec<_>>());
            out.extend(
                (0..h).map(|c| (0..keys).map(|key| p[key] * v[[sequence * tk + key, kc + c]]).sum::<f64>()),
            );
        }
    }
    out
}

// ---- what a row buys

/// Values on the host, the same for every backend.
#[derive(Clone)]
struct Host {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Host {
    fn on<B: Backend>(&self, device: &B) -> Tensor<B> {
        Tensor::from_fn(device, &self.shape[..], |i| B::Elem::of(self.values[i])) // shape
    }
}

impl Row {
    /// Inputs that f32 holds exactly.
    fn draw(&self, z: &Sizes) -> Vec<Host> {
        self.draw_in::<f32>(z)
    }

    /// Inputs that E holds exactly.
    fn draw_in<E: Element>(&self, z: &Sizes) -> Vec<Host> {
        let mut rng = rng(z.seed);
        let domain = self.domain;
        let mut one = || {
            let x: f64 = StandardNormal.sample(&mut rng);
            let x = match domain {
                Domain::Normal => x,
                Domain::Positive => 0.2 + x.abs(),
                Domain::OffZero => x + 0.2f64.copysign(x),
            };
            E::of(x).f64()
        };
        let input =
            |shape: Vec<usize>| Host { values: (0..shape.iter().product()).map(|_| one()).collect(), shape };
        (self.inputs)(z).into_iter().map(input).collect()
    }
}

/// Value and gradients of Σ weight ∘ f(inputs), as f64.
fn evaluate<B: Backend>(
    f: Expression<B>,
    device: &B,
    inputs: &[Host],
    weight: &[f64],
    z: &Sizes,
) -> [Vec<Vec<f64>>; 2] {
    let tape = Tape::new(device);
    let x: Vec<_> = inputs.iter().map(|x| tape.leaf(&x.on(device))).collect();
    let y = f(&x, z);
    let w = Tensor::from_fn(device, y.shape(), |i| B::Elem::of(weight[i])); // like y
    let value = y.value().to_f64();
    let mut grads = (y * tape.constant(&w)).sum().backward();
    [vec![value], x.iter().map(|x| grads.take(x.id(), device).to_f64()).collect()]
}

fn output_len(row: &Row, inputs: &[Host], z: &Sizes) -> usize {
    let tape = Tape::new(&Cpu::default());
    let x: Vec<_> = inputs.iter().map(|x| tape.constant(&x.on(tape.device()))).collect();
    (row.in_f64)(&x, z).shape().len()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn distance(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len());
    norm(&x.iter().zip(y).map(|(x, y)| x - y).collect::<Vec<_>>())
}

/// The largest distance between `f` on `device` and f64, over the value and each gradient, in multiples of a yardstick:
/// unit·‖reference‖, plus the change of the f64 reference when each input and dy moves by ± one unit (four draws, root mean
/// square; no arithmetic in that precision can promise less), plus unit·‖dy‖ for gradients that cancel, plus one unit for a
/// cross-entropy: it is the logarithm of a sum, 1 + e⁻²⁰ for a sure and right prediction, and the sum is known to a unit.
fn agreement<B: Backend>(row: &Row, f: Expression<B>, device: &B, z: &Sizes) -> f64 {
    let (cpu, unit) = (Cpu::<f64>::default(), B::Elem::UNIT_ROUNDOFF);
    let inputs = row.draw_in::<B::Elem>(z);
    let mut rng = rng(z.seed ^ 1);
    let mut normal = || -> f64 { StandardNormal.sample(&mut rng) };
    let weight: Vec<f64> = (0..output_len(row, &inputs, z)).map(|_| B::Elem::of(normal()).f64()).collect();
    let reference = evaluate(row.in_f64, &cpu, &inputs, &weight, z);
    let moved: Vec<_> = (0..4)
        .map(|_| {
            let mut jitter = |x: &f64| x * (1.0 + unit.copysign(normal()));
            let moved: Vec<Host> = inputs
                .iter()
                .map(|x| Host { shape: x.shape.clone(), values: x.values.iter().map(&mut jitter).collect() })
                .collect();
            let weight: Vec<f64> = weight.iter().map(&mut jitter).collect();
            evaluate(row.in_f64, &cpu, &moved, &weight, z)
        })
        .collect();
    let (.., cancels) = tolerance(row.name);
    let other = evaluate(f, device, &inputs, &weight, z);
    let mut worst = 0.0f64;
    for (kind, outputs) in reference.iter().enumerate() {
        for (i, reference) in outputs.iter().enumerate() {
            let spread = moved.iter().map(|m| distance(&m[kind][i], reference).powi(2)).sum::<f64>() / 4.0;
            let floor = match kind {
                1 if cancels => unit * norm(&weight),
                0 if row.name.ends_with("cross_entropy") => unit,
                _ => 0.0,
            };
            let yard = unit * norm(reference) + spread.sqrt() + floor;
            let error = distance(&other[kind][i], reference);
            if error > 0.0 || error.is_nan() {
                worst = if error.is_nan() { f64::INFINITY } else { worst.max(error / yard) };
            }
        }
    }
    worst
}

fn tolerance(name: &str) -> (&'static str, f64, f64, bool) {
    *TOLERANCES.iter().find(|t| t.0 == name).unwrap_or_else(|| panic!("{name} has no line in TOLERANCES"))
}

fn check_gradient(row: &Row, z: &Sizes) -> f64 {
    let inputs: Vec<_> = row.draw(z).iter().map(|x| x.on(&Cpu::default())).collect();
    let mut worst = 0.0f64;
    // another seed than the inputs: else the weights of the output would equal them
    for check in gradcheck(&inputs, z.seed ^ 2, |_, x| (row.in_f64)(x, z)) {
        assert!(check.error < GRADIENT, "{}: {check}\n{z:?}", row.name);
        worst = worst.max(check.error);
    }
    worst
}

fn check_f32(row: &Row, z: &Sizes) -> f64 {
    let (_, allowed, ..) = tolerance(row.name);
    within_tolerance(row, row.in_f32, &Cpu::default(), allowed, z)
}

fn check_gpu(row: &Row, z: &Sizes) -> f64 {
    let (_, allowed, ..) = tolerance(row.name);
    within_tolerance(row, row.on_gpu, &gpu().expect("the test has asked for it"), allowed, z)
}

fn check_gpu_in_bf16(row: &Row, z: &Sizes) -> f64 {
    let device = gpu().expect("the test has asked for it").with_elements();
    let (_, _, allowed, _) = tolerance(row.name);
    within_tolerance(row, row.on_gpu_in_bf16, &device, allowed, z)
}

fn within_tolerance<B: Backend>(row: &Row, f: Expression<B>, device: &B, allowed: f64, z: &Sizes) -> f64 {
    let (worst, name) = (agreement(row, f, device, z), row.name);
    assert!(worst <= allowed, "{name}: {worst:.1} yardsticks from f64, {allowed} are allowed\n{z:?}");
    worst
}

fn check_naive(row: &Row, z: &Sizes) -> f64 {
    let Some(naive) = row.naive else { return 0.0 };
    let inputs = row.draw(z);
    let arrays: Vec<_> = inputs
        .iter()
        .map(|x| {
            ArrayD::from_shape_vec(x.shape.clone(), x.values.clone()).expect("as many values as the shape")
        })
        .collect();
    let want = naive(&arrays, z);
    let [value, _] = evaluate(row.in_f64, &Cpu::default(), &inputs, &vec![0.0; want.len()], z);
    let error = distance(&value[0], &want) / (norm(&want) + (want.len() as f64).sqrt());
    assert!(error < NAIVE, "{}: {error:.1e} from the naive formula\n{z:?}", row.name);
    error
}

/// A gradient is the same to the bit whether the other inputs are variables or constants.
fn check_constants(row: &Row, z: &Sizes) -> f64 {
    let cpu = Cpu::<f64>::default();
    let inputs: Vec<_> = row.draw(z).iter().map(|x| x.on(&cpu)).collect();
    let gradient = |wanted: &dyn Fn(usize) -> bool, i: usize| {
        let tape = Tape::new(&cpu);
        let place = |(j, x)| if wanted(j) { tape.leaf(x) } else { tape.constant(x) };
        let x: Vec<_> = inputs.iter().enumerate().map(place).collect();
        let mut grads = (row.in_f64)(&x, z).tanh().sum().backward();
        for (j, x) in x.iter().enumerate() {
            assert!(wanted(j) || grads.get(*x).is_none(), "{}: a constant received a gradient", row.name);
        }
        grads.take(x[i].id(), &cpu).to_vec()
    };
    for i in 0..inputs.len() {
        assert_eq!(gradient(&|_| true, i), gradient(&|j| i == j, i), "{} input {i}\n{z:?}", row.name);
    }
    0.0
}

/// Runs a check on every row; `cargo test -- --nocapture` shows the worst of each.
fn every_row(z: &Sizes, worst: &mut [f64], check: fn(&Row, &Sizes) -> f64) {
    for (row, worst) in table().iter().zip(worst) {
        *worst = worst.max(check(row, z));
    }
}

/// A check on every row, over drawn sizes and the large ones.
fn property(what: &str, cases: u32, check: fn(&Row, &Sizes) -> f64) {
    let worst = std::cell::RefCell::new(vec![0.0; table().len()]);
    let mut runner = proptest::test_runner::TestRunner::new(config(cases));
    let outcome = runner.run(&sizes(), |z| {
        every_row(&z, &mut worst.borrow_mut(), check);
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{what}: {failure}");
    }
    for z in large_sizes() {
        every_row(&z, &mut worst.borrow_mut(), check);
    }
    for (row, worst) in table().iter().zip(worst.borrow().iter()) {
        println!("{what}: {:15} {worst:.2e}", row.name);
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    property("gradient, relative", 48, check_gradient);
}

#[test]
fn f32_agrees_with_f64() {
    property("f32, yardsticks", 64, check_f32);
}

#[test]
fn the_gpu_agrees_with_f64() {
    if gpu().is_some() {
        property("GPU, yardsticks", 24, check_gpu);
    }
}

#[test]
fn the_gpu_in_bf16_agrees_with_f64() {
    if gpu().is_some() {
        property("GPU in bf16, yardsticks", 24, check_gpu_in_bf16);
    }
}

#[test]
fn fused_ops_equal_their_naive_formula() {
    property("naive, relative", 64, check_naive);
}

#[test]
fn gradients_do_not_depend_on_which_inputs_are_constants() {
    property("constants", 32, check_constants);
}

// ---- guards: the tests, tested

/// The names of all ops, from the sources: what stands in quotes after `record(` and after `self.unary(`.
fn recorded_names() -> BTreeSet<String> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/autograd/ops");
    let mut names = BTreeSet::new();
    for file in std::fs::read_dir(folder).expect("the sources are here") {
        let text = std::fs::read_to_string(file.expect("readable").path()).expect("readable");
        for call in ["record(", "self.unary("] {
            for after in text.split(call).skip(1) {
                if let Some(quoted) = after.trim_start().strip_prefix('"') {
                    names.insert(quoted.split('"').next().unwrap_or_default().to_string());
                }
            }
        }
    }
    names
}

#[test]
fn every_recorded_op_has_a_row() {
    let z = Sizes { d: 5, n: 2, m: 3, k: 4, v: 6, tq: 3, ..large_sizes()[0] };
    let mut covered = BTreeSet::new();
    for row in table() {
        let tape = Tape::new(&Cpu::default());
        let x: Vec<_> = row.draw(&z).iter().map(|x| tape.leaf(&x.on(tape.device()))).collect();
        (row.in_f64)(&x, &z);
        covered.extend(tape.ops().into_iter().map(String::from));
    }
    let names = recorded_names();
    assert!(
        names.len() >= 25 && names.contains("tanh") && names.contains("concat"),
        "the scan is broken: {names:?}"
    );
    let missing: Vec<_> = names.difference(&covered).collect();
    assert!(missing.is_empty(), "no row of the table in tests/ops.rs runs {missing:?}");
}

/// x², whose gradient is `factor`·x.
fn square<'t>(x: Var<'t, Cpu<f64>>, factor: f64) -> Var<'t, Cpu<f64>> {
    let (value, id) = (x.value(), x.id());
    let y = Tensor::from_fn(value.device(), value.shape(), |i| value.buffer()[i].powi(2)); // like x
    x.tape().record("square", &[x], y, move |dy, grads| {
        let dx = Tensor::from_fn(dy.device(), dy.shape(), |i| factor * value.buffer()[i] * dy.buffer()[i]);
        grads.add(id, dx); // like x
    })
}

#[test]
fn a_gradient_wrong_by_a_thousandth_fails() {
    let x = [Tensor::from_fn(&Cpu::<f64>::default(), [3, 5], |i| 0.3 * i as f64 - 2.1)]; // [3, 5]
    for seed in 0..20 {
        assert!(gradcheck(&x, seed, |_, x| square(x[0], 2.0))[0].error < GRADIENT);
        assert!(gradcheck(&x, seed, |_, x| square(x[0], 2.002))[0].error > GRADIENT);
        assert!(gradcheck(&x, seed, |_, x| square(x[0].detach(), 2.0))[0].error > GRADIENT);
    }
}

#[test]
fn a_variable_used_twice_accumulates() {
    let cpu = Cpu::<f64>::default();
    let x = Tensor::from_fn(&cpu, [6, 6], |i| (i as f64 * 0.7).sin()); // [6, 6]
    let tape = Tape::new(&cpu);
    let v = tape.leaf(&x);
    let grads = (v * v).sum().backward();
    assert_eq!(grads.get(v).expect("reached").to_vec(), x.scale(2.0).to_vec());

    let twice: &[(&str, Expression<Cpu<f64>>)] = &[
        ("x + x", |x, _| x[0] + x[0]),
        ("x − x·x", |x, _| x[0] - x[0] * x[0]),
        ("x·xᵀ", |x, _| x[0].matmul_nt(x[0])),
        ("xᵀ·x", |x, _| x[0].matmul_tn(x[0])),
        ("x·x", |x, _| x[0].matmul(x[0])),
        ("xᵀ·xᵀ", |x, _| x[0].matmul_tt(x[0])),
        ("linear of itself", |x, _| x[0].linear(x[0])),
        ("lowrank_linear all the way", |x, _| x[0].lowrank_linear(x[0], x[0])),
        ("swiglu", |x, _| x[0].swiglu(x[0])),
        ("concat", |x, _| concat(&[x[0], x[0].tanh(), x[0]])),
        ("attention", |x, _| {
            x[0].attention(x[0], x[0], Attention { batch: 2, heads: 3, kv_heads: 3, causal: true })
        }),
        ("embedding twice", |x, _| x[0].embedding(&[1, 1, 5]) * x[0].embedding(&[5, 1, 0])),
        ("norms", |x, _| {
            let (g, b) = (x[1].slice(0..6), x[1].slice(6..12));
            x[0].rms_norm(g, 1e-5) * x[0].layer_norm(b, g, 1e-5)
        }),
        // one pair in two layers
        ("lowrank_linear twice", |x, _| x[0].lowrank_linear(x[2], x[3]).tanh().lowrank_linear(x[2], x[3])),
    ];
    let gains = Tensor::from_fn(&cpu, [12], |i| 1.0 + 0.1 * i as f64); // [12]
    let a = Tensor::from_fn(&cpu, [6, 2], |i| (i as f64).cos()); // [6, 2]
    let b = Tensor::from_fn(&cpu, [6, 2], |i| (i as f64 * 1.3).sin()); // [6, 2]
    for (name, f) in twice {
        let z = large_sizes()[0];
        for check in gradcheck(&[x.clone(), gains.clone(), a.clone(), b.clone()], 3, |_, x| f(x, &z)) {
            assert!(check.error < GRADIENT, "{name}: {check}");
        }
    }
}

#[test]
fn gradients_add_to_those_of_a_batch_before() {
    let cpu = Cpu::<f64>::default();
    let w = Tensor::from_fn(&cpu, [2, 3], |i| i as f64 - 2.0); // [2, 3]
    let batch = |from: f64| Tensor::from_fn(&cpu, [4, 3], |i| from + i as f64); // [4, 3]
    let mut before = Vec::new();
    let mut sum = vec![0.0; 6];
    for x in [batch(0.5), batch(-7.0)] {
        let tape = Tape::new(&cpu);
        let v = tape.leaf(&w);
        let mut grads =
            (tape.constant(&x).linear(v) * tape.constant(&x).linear(v)).sum().backward_onto(before);
        before = vec![(v.id(), grads.take(v.id(), &cpu))];

        let tape = Tape::new(&cpu);
        let v = tape.leaf(&w);
        let alone = (tape.constant(&x).linear(v) * tape.constant(&x).linear(v)).sum().backward();
        let alone = alone.get(v).expect("reached").to_vec();
        sum.iter_mut().zip(alone).for_each(|(sum, g)| *sum += g);
    }
    // small integers and halves: exact in whatever order they are added
    assert_eq!(before[0].1.to_vec(), sum);
}

/// Products for one leaf more than once, for leaves with and without a gradient, and for what is no leaf.
#[test]
fn layers_of_one_input_may_share_factors() {
    let cpu = Cpu::<f64>::default();
    let draw = |rows: usize, cols: usize, from: f64| {
        Tensor::from_fn(&cpu, [rows, cols], |i| ((i * 7 + 3) % 11) as f64 - from) // [rows, cols]
    };
    let (x, a, b, c) = (draw(4, 3, 5.0), draw(5, 2, 4.0), draw(3, 2, 6.0), draw(5, 2, 2.0)); // [4, 3], [5, 2], [3, 2], [5, 2]
    let gradients = |together: bool| -> Vec<Vec<f64>> {
        let tape = Tape::new(&cpu);
        let [vx, va, vb, vc] = [&x, &a, &b, &c].map(|value| tape.leaf(value));
        let before = [&a, &b].map(Clone::clone); // of A and B alone: gradients have their shapes
        let (a, b) = ([va, vc, va], [vb, vb, vb.scale(2.0)]);
        let ys = match together {
            true => vx.lowrank_linears(a, concat(&b)),
            false => [0, 1, 2].map(|i| vx.lowrank_linear(a[i], b[i])),
        };
        let loss = ys.into_iter().map(|y| (y * y).sum()).reduce(|a, b| a + b).expect("three"); // [1]
        let grads = loss.backward_onto([va.id(), vb.id()].into_iter().zip(before));
        [vx, va, vb, vc].map(|v| grads.get(v).expect("reached").to_f64()).into()
    };
    assert_eq!(gradients(true), gradients(false)); // integers: exact in whatever order they are added
}

/// Pairs whose B are one leaf, beside pairs and tensors that are not: values, and gradients over two batches, are those of leaves of their own.
/// Of the second batch one of the pairs gets no gradient.
#[test]
fn pairs_of_one_input_lie_side_by_side() {
    let cpu = Cpu::<f64>::default();
    let draw = |rows: usize, cols: usize, from: f64| {
        Tensor::from_fn(&cpu, [rows, cols], |i| ((i * 7 + 3) % 11) as f64 - from) // [rows, cols]
    };
    let mut params = Params::default();
    let mut add = |name: &str, m: usize, r: usize| {
        params.pair(name, FactorPair::new(draw(m, r, r as f64), draw(3, r, 4.0))) // [m, r], [3, r]
    };
    let [lone, q, k, v] =
        [("lone", 5, 2), ("q", 5, 2), ("k", 4, 3), ("v", 5, 2)].map(|(name, m, r)| add(name, m, r));
    let far = params.pair("far", FactorPair::new(draw(5, 2, 1.0), draw(4, 2, 1.0))); // [5, 2], [4, 2]: another input
    let (w, g) = (params.hidden("w", draw(5, 3, 1.0)), params.dense("g", draw(1, 5, 2.0).reshape([5]))); // [5, 3], [5]
    let leaves = params.leaves(&[vec![v, q, k]]);
    let same = |a: &Values<_>, b: &Values<_>| {
        let pairs = a.tensors().zip(b.tensors());
        pairs.for_each(|(a, b)| assert_eq!((a.shape(), a.to_vec()), (b.shape(), b.to_vec())));
    };
    same(&leaves.values(), &params.values);
    let gradients = |together: bool| {
        let leaves = if together { leaves.clone() } else { params.leaves(&[]) };
        let mut sum = None;
        for used in [3, 2] {
            let tape = Tape::new(&cpu);
            let p = leaves.on(&tape);
            let x = tape.constant(&draw(4, 3, used as f64)); // [4, 3]
            let ys = match together {
                true => x.lowrank_linears([v, q, k].map(|pair| p[pair].a), p[q].b),
                false => [v, q, k].map(|pair| x.lowrank_linear(p[pair].a, p[pair].b)),
            };
            let rest = x.linear(p[w]).add_bias(p[g]) + x.lowrank_linear(p[lone].a, p[lone].b); // [4, 5]
            let all = ys.into_iter().take(used).chain([rest]);
            let loss = all.map(|y| (y * y).sum()).reduce(|a, b| a + b).expect("some"); // [1]
            let before = sum.take().into_iter().flat_map(|sum| p.pair_up(sum));
            sum = Some(p.leaf_gradients(loss.backward_onto(before)));
        }
        sum.expect("two batches").values()
    };
    same(&gradients(true), &gradients(false)); // integers: exact in whatever order they are added
    let refused = |sharing: Vec<Pair>| {
        let all = std::panic::AssertUnwindSafe(|| drop(params.leaves(&[vec![q, k], sharing])));
        *std::panic::catch_unwind(all).expect_err("refused").downcast::<String>().expect("a message")
    };
    assert!(refused(vec![v, q]).contains("q is in a group already"));
    assert!(refused(vec![v, far]).contains("far has 4 inputs, others of its group 3"));
}

/// Some rows of logits at a time, the last of them fewer: value and gradients of all at once, to the rounding of another order of sums.
#[test]
fn the_loss_by_rows_is_the_loss() {
    let cpu = Cpu::<f64>::default();
    let value = |i: usize| ((i * 7919 % 1013) as f64 / 506.0 - 1.0) * 2.0;
    let x = Tensor::from_fn(&cpu, [5, 2, 7], value); // [5, 2, 7]
    let head = Tensor::from_fn(&cpu, [13, 7], |i| value(i + 70)); // [13, 7]
    let targets: Vec<u32> = (0..10).map(|i| (i * i + 3) % 13).collect();
    let run = |at_once: usize, wanted: [bool; 2]| -> Vec<Option<Vec<f64>>> {
        let tape = Tape::new(&cpu);
        let put = |x, wanted| if wanted { tape.leaf(x) } else { tape.constant(x) };
        let (vx, w) = (put(&x, wanted[0]), put(&head, wanted[1]));
        // a head that is itself computed, and a loss that is not the end
        let (loss, exact) = vx.linear_cross_entropy_wide(w.scale(0.5), &targets, 0.25, Some(at_once)); // [1], [1]
        let end = loss.scale(3.0); // [1]
        let mut found = vec![Some(end.value().to_vec()), Some(exact.to_vec())];
        let grads = end.backward();
        found.extend([vx, w].map(|v| grads.get(v).map(Tensor::to_vec)));
        found
    };
    for wanted in [[true, true], [true, false], [false, true], [false, false]] {
        let all = run(10, wanted);
        for at_once in [1, 3, 5, 9] {
            for (found, all) in run(at_once, wanted).into_iter().zip(&all) {
                assert!(found.is_some() == all.is_some());
                for (x, y) in found.into_iter().flatten().zip(all.iter().flatten()) {
                    assert!((x - y).abs() < 1e-14, "{at_once} rows: {x}, not {y}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "gradient: [3, 2] for a variable of shape [2, 3]")]
fn a_gradient_of_another_shape_is_refused() {
    let cpu = Cpu::<f64>::default();
    let tape = Tape::new(&cpu);
    let v = tape.leaf(&Tensor::zeros(&cpu, [2, 3])); // [2, 3]
    let wrong = Tensor::zeros(&cpu, [3, 2]); // [3, 2]
    v.sum().backward_onto([(v.id(), wrong)]);
}

/// Each gradient is given away as soon as it is complete, while earlier ops are still to come: those of the last ops first, and none with
/// something missing.
#[test]
fn a_gradient_is_complete_once_its_first_op_is_through() {
    let cpu = Cpu::<f64>::default();
    let [w, v] = [1, 2].map(|k| Tensor::from_fn(&cpu, [3, 3], |i| ((i * 5 + k) % 7) as f64 - 3.0)); // [3, 3] × 2
    let gain = Tensor::from_fn(&cpu, [3], |i| i as f64 + 1.0); // [3]
    let run = |early: bool| {
        let tape = Tape::new(&cpu);
        let [unused, w, v, g] = [&gain, &w, &v, &gain].map(|x| tape.leaf(x));
        let x = tape.constant(&gain.reshape([1, 3])); // [1, 3]
        let y = x.linear(w).add_bias(g).linear(v).linear(w); // [1, 3]: w first and last
        let loss = (y * y).sum(); // [1]
        let before = [unused, w].map(|leaf| (leaf.id(), leaf.value()));
        let mut given = Vec::new();
        let mut grads = loss.backward_with(before, |grads, leaf| {
            if early {
                given.push((leaf, grads.take(leaf, &cpu)));
            }
        });
        let order: Vec<_> = given.iter().map(|(leaf, _)| *leaf).collect();
        assert!(!early || order == [unused, v, g, w].map(|leaf| leaf.id()));
        given.into_iter().for_each(|(leaf, gradient)| grads.put(leaf, gradient));
        [unused, w, v, g].map(|leaf| grads.get(leaf).expect("there").to_vec())
    };
    assert_eq!(run(true), run(false));
}

#[test]
#[should_panic(expected = "gradient: an op adds to a leaf that is none of its inputs")]
fn an_op_that_hides_an_input_is_found() {
    let cpu = Cpu::<f64>::default();
    let tape = Tape::new(&cpu);
    let [x, y] = [0, 1].map(|_| tape.leaf(&Tensor::full(&cpu, [1], 1.0))); // [1] × 2
    let hidden = x.id();
    let op = tape.record("hides", &[y], x.value(), move |dy, grads| grads.add(hidden, dy)); // [1]
    let mut taken = Vec::new();
    let mut grads = op.sum().backward_with([], |grads, leaf| taken.push((leaf, grads.take(leaf, &cpu))));
    taken.into_iter().for_each(|(leaf, gradient)| grads.put(leaf, gradient));
}

#[test]
fn gradients_stop_at_detach() {
    let cpu = Cpu::<f64>::default();
    let tape = Tape::new(&cpu);
    let x = tape.leaf(&Tensor::full(&cpu, [3], 2.0)); // [3]
    let grads = (x * x.tanh().detach()).sum().backward();
    let want = 2f64.tanh();
    assert_eq!(grads.get(x).expect("reached").to_vec(), [want; 3]);
}

#[test]
fn the_first_non_finite_op_is_named_with_its_line() {
    let cpu = Cpu::<f32>::default();
    let tape = Tape::new(&cpu);
    let x = tape.leaf(&Tensor::zeros(&cpu, [2, 3])); // [2, 3]
    assert!(tape.first_non_finite().is_none());
    let line = line!() + 1;
    let y = x.log();
    y.exp().sum();
    let found = tape.first_non_finite().expect("log 0");
    assert_eq!(found.to_string(), format!("log [2, 3] at {}:{line}:{}", file!(), found.line.column()));
}

#[test]
fn a_forgotten_value_has_its_gradient_and_is_found_on_a_tape_that_keeps() {
    let cpu = Cpu::<f32>::default();
    let gradient = |forget: bool| {
        let tape = Tape::new(&cpu);
        let x = tape.leaf(&Tensor::from_fn(&cpu, [2, 3], |i| i as f32)); // [2, 3]
        let (y, z) = (x.scale(3.0), x.tanh()); // [2, 3] × 2
        let loss = (y + z).mean(); // [1]
        if forget {
            [y, z].into_iter().for_each(Var::forget);
        }
        loss.backward().get(x).expect("reached").to_vec()
    };
    assert_eq!(gradient(true), gradient(false));

    for (tape, op) in [(Tape::new(&cpu), "scale"), (Tape::keeping(&cpu), "log")] {
        let log = tape.leaf(&Tensor::zeros(&cpu, [2])).log(); // [2]
        log.scale(2.0);
        log.forget();
        assert_eq!(tape.first_non_finite().expect("log 0").op, op);
    }
}
