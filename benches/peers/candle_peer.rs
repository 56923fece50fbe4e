//! candle. Its fused rms_norm, rope, softmax and attention have no gradient, so training uses the composed ones.

use std::time::Instant;

use candle_core::{D, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, loss, ops, rotary_emb};

use crate::*;

struct Candle {
    cos: Tensor,
    sin: Tensor,
    /// −∞ above the diagonal [T, T].
    mask: Tensor,
}

const OK: &str = "candle computes";

impl Peer for Candle {
    type T = Tensor;
    type Loss = Tensor;

    fn embedding(&self, table: &Tensor, ids: &[u32]) -> Tensor {
        table.index_select(&Tensor::new(ids, &Device::Cpu).expect(OK), 0).expect(OK)
    }
    fn rms_norm(&self, x: &Tensor, gain: &Tensor) -> Tensor {
        ops::rms_norm_slow(x, gain, EPS as f32).expect(OK)
    }
    fn mul(&self, x: &Tensor, b: &Tensor) -> Tensor {
        x.matmul(b).expect(OK)
    }
    fn mul_t(&self, x: &Tensor, a: &Tensor) -> Tensor {
        x.matmul(&a.t().expect(OK)).expect(OK)
    }
    fn add(&self, x: &Tensor, y: &Tensor) -> Tensor {
        (x + y).expect(OK)
    }
    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        (gate.silu().expect(OK) * up).expect(OK)
    }
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let run = || -> candle_core::Result<Tensor> {
            let heads = |x: &Tensor| x.reshape((BATCH, CONTEXT, HEADS, HEAD))?.transpose(1, 2)?.contiguous();
            let q = rotary_emb::rope_slow(&heads(q)?, &self.cos, &self.sin)?; // [B, H, T, h]
            let k = rotary_emb::rope_slow(&heads(k)?, &self.cos, &self.sin)?; // [B, H, T, h]
            let scores = (q.matmul(&k.t()?)? * (HEAD as f64).powf(-0.5))?.broadcast_add(&self.mask)?; // [B, H, T, T]
            let y = ops::softmax(&scores, D::Minus1)?.matmul(&heads(v)?)?; // [B, H, T, h]
            y.transpose(1, 2)?.reshape((BATCH * CONTEXT, DIM)) // [N, d]
        };
        run().expect(OK)
    }
    fn cross_entropy(&self, logits: &Tensor, targets: &[u32]) -> Tensor {
        loss::cross_entropy(logits, &Tensor::new(targets, &Device::Cpu).expect(OK)).expect(OK)
    }
}

pub fn run(
    weights: Vec<Weight>,
    dense: bool,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    steps: usize,
) -> Vec<Times> {
    let [cos, sin] = angles().map(|x| Tensor::from_vec(x, (CONTEXT, HEAD / 2), &Device::Cpu).expect(OK)); // [T, h/2] each
    let mask =
        (0..CONTEXT * CONTEXT).map(|i| if i % CONTEXT > i / CONTEXT { f32::NEG_INFINITY } else { 0.0 });
    let mask = Tensor::from_iter(mask, &Device::Cpu).and_then(|m| m.reshape((CONTEXT, CONTEXT))).expect(OK); // [T, T]
    let vars: Vec<Var> = weights
        .into_iter()
        .map(|(shape, x)| Var::from_tensor(&Tensor::from_vec(x, shape, &Device::Cpu).expect(OK)).expect(OK))
        .collect();
    let params = ParamsAdamW { lr: LR, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0 };
    let mut adamw = AdamW::new(vars.clone(), params).expect(OK);
    let candle = Candle { cos, sin, mask };
    (0..steps)
        .map(|_| {
            let mut start = Instant::now();
            let w: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            let loss = crate::loss(&candle, &w, dense, &inputs, &targets); // []
            let value = loss.to_scalar::<f32>().expect(OK);
            let forward = lap(&mut start);
            let grads = loss.backward().expect(OK);
            let backward = lap(&mut start);
            adamw.step(&grads).expect(OK);
            (f64::from(value), [forward, backward, lap(&mut start)])
        })
        .collect()
}
