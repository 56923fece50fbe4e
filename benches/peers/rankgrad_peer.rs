//! rankgrad's ops, used as the other libraries are: the whole batch on one tape.

use std::time::Instant;

use rankgrad::autograd::{Rope, Tape, Var};
use rankgrad::lowrank::{AdamW, Rule};
use rankgrad::tensor::{Attention, Cpu, Tensor};

use crate::*;

type B = Cpu<f32>;

struct Own<'t> {
    rope: &'t Rope<B>,
}

impl<'t> Peer for Own<'t> {
    type T = Var<'t, B>;
    type Loss = Var<'t, B>;

    fn embedding(&self, table: &Self::T, ids: &[u32]) -> Self::T {
        table.embedding(ids)
    }
    fn rms_norm(&self, x: &Self::T, gain: &Self::T) -> Self::T {
        x.rms_norm(*gain, EPS)
    }
    fn mul(&self, x: &Self::T, b: &Self::T) -> Self::T {
        x.matmul(*b)
    }
    fn mul_t(&self, x: &Self::T, a: &Self::T) -> Self::T {
        x.linear(*a)
    }
    fn add(&self, x: &Self::T, y: &Self::T) -> Self::T {
        *x + *y
    }
    fn swiglu(&self, gate: &Self::T, up: &Self::T) -> Self::T {
        gate.swiglu(*up)
    }
    fn attention(&self, q: &Self::T, k: &Self::T, v: &Self::T) -> Self::T {
        let how = Attention { batch: BATCH, heads: HEADS, kv_heads: HEADS, causal: true };
        q.rope(self.rope, CONTEXT, 0).attention(k.rope(self.rope, CONTEXT, 0), *v, how)
    }
    fn cross_entropy(&self, logits: &Self::T, targets: &[u32]) -> Self::Loss {
        logits.cross_entropy(targets)
    }
}

pub fn run(
    weights: Vec<Weight>,
    dense: bool,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    steps: usize,
) -> Vec<Times> {
    let cpu = B::default();
    let rope = Rope::new(&cpu, CONTEXT, HEAD, 10_000.0); // [T, h]
    let mut params: Vec<Tensor<B>> = weights
        .into_iter()
        .map(|(shape, x)| match shape[..] {
            [m, n] => Tensor::from_vec(&cpu, [m, n], x), // [m, n]
            _ => Tensor::from_vec(&cpu, [x.len()], x),   // [d]
        })
        .collect();
    let mut adamw = AdamW::new(&params);
    let rates = vec![LR; params.len()];
    (1..=steps as u64)
        .map(|t| {
            let mut start = Instant::now();
            let tape = Tape::new(&cpu);
            let w: Vec<Var<B>> = params.iter().map(|x| tape.leaf(x)).collect();
            let loss = crate::loss(&Own { rope: &rope }, &w, dense, &inputs, &targets); // [1]
            let value = loss.value().item();
            let forward = lap(&mut start);
            let mut grads = loss.backward();
            let grads: Vec<Tensor<B>> = w.iter().map(|&x| grads.take(x.id(), &cpu)).collect(); // like the params
            let backward = lap(&mut start);
            drop(w);
            Rule::<B, Tensor<B>>::step(&mut adamw, &mut params, &grads, &rates, t);
            (value, [forward, backward, lap(&mut start)])
        })
        .collect()
}
