//! burn with Flex, its CPU backend (SIMD and threads on, as by default). Its fused attention computes a gradient by falling back to
//! the composed one, which is what stands here.

use std::time::Instant;

use burn::module::{Module, Param};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData, activation};
use burn_nn::loss::CrossEntropyLossConfig;
use burn_optim::{AdamWConfig, GradientsParams};

use crate::*;

type T2 = Tensor<2>;

/// Gains are rows [1, d].
#[derive(Module, Debug)]
struct Weights {
    all: Vec<Param<T2>>,
}

struct Burn {
    device: Device,
    /// [1, 1, T, h/2] each.
    cos: Tensor<4>,
    sin: Tensor<4>,
    /// True above the diagonal [1, 1, T, T].
    mask: Tensor<4, Bool>,
}

impl Burn {
    /// Coordinate i of a head turns with i + h/2.
    fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let all = |range| [0..BATCH, 0..HEADS, 0..CONTEXT, range];
        let (a, b) = (x.clone().slice(all(0..HEAD / 2)), x.slice(all(HEAD / 2..HEAD))); // [B, H, T, h/2] each
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let left = a.clone() * cos.clone() - b.clone() * sin.clone(); // [B, H, T, h/2]
        Tensor::cat(vec![left, b * cos + a * sin], 3) // [B, H, T, h]
    }
}

fn heads(x: &T2) -> Tensor<4> {
    x.clone().reshape([BATCH, CONTEXT, HEADS, HEAD]).swap_dims(1, 2) // [B, H, T, h]
}

fn ids(device: &Device, ids: &[u32]) -> Tensor<1, Int> {
    let ids: Vec<i64> = ids.iter().map(|&i| i64::from(i)).collect();
    Tensor::from_data(TensorData::from(&ids[..]), device) // [N]
}

impl Peer for Burn {
    type T = T2;
    type Loss = Tensor<1>;

    fn embedding(&self, table: &T2, tokens: &[u32]) -> T2 {
        table.clone().select(0, ids(&self.device, tokens))
    }
    fn rms_norm(&self, x: &T2, gain: &T2) -> T2 {
        let rms = (x.clone().square().mean_dim(1) + EPS).sqrt(); // [N, 1]
        x.clone() / rms * gain.clone()
    }
    fn mul(&self, x: &T2, b: &T2) -> T2 {
        x.clone().matmul(b.clone())
    }
    fn mul_t(&self, x: &T2, a: &T2) -> T2 {
        x.clone().matmul(a.clone().transpose())
    }
    fn add(&self, x: &T2, y: &T2) -> T2 {
        x.clone() + y.clone()
    }
    fn swiglu(&self, gate: &T2, up: &T2) -> T2 {
        activation::silu(gate.clone()) * up.clone()
    }
    fn attention(&self, q: &T2, k: &T2, v: &T2) -> T2 {
        let (q, k) = (self.rotate(heads(q)), self.rotate(heads(k))); // [B, H, T, h] each
        let scores = q.matmul(k.transpose()) * (HEAD as f64).powf(-0.5); // [B, H, T, T]
        let mask = self.mask.clone().expand([BATCH, HEADS, CONTEXT, CONTEXT]);
        let p = activation::softmax(scores.mask_fill(mask, f32::NEG_INFINITY), 3); // [B, H, T, T]
        p.matmul(heads(v)).swap_dims(1, 2).reshape([BATCH * CONTEXT, DIM]) // [N, d]
    }
    fn cross_entropy(&self, logits: &T2, targets: &[u32]) -> Tensor<1> {
        CrossEntropyLossConfig::new().init(&self.device).forward(logits.clone(), ids(&self.device, targets))
    }
}

pub fn run(
    weights: Vec<Weight>,
    dense: bool,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    steps: usize,
) -> Vec<Times> {
    let device = Device::flex().autodiff();
    let [cos, sin] =
        angles().map(|x| Tensor::from_data(TensorData::new(x, [1, 1, CONTEXT, HEAD / 2]), &device)); // [1, 1, T, h/2]
    let mask = (0..CONTEXT * CONTEXT).map(|i| i % CONTEXT > i / CONTEXT).collect();
    let mask = Tensor::from_data(TensorData::new::<bool, _>(mask, [1, 1, CONTEXT, CONTEXT]), &device); // [1, 1, T, T]
    let burn = Burn { device: device.clone(), cos, sin, mask };
    let param = |(shape, x): Weight| {
        let [m, n] = if shape.len() == 2 { [shape[0], shape[1]] } else { [1, shape[0]] };
        Param::from_tensor(Tensor::from_data(TensorData::new(x, [m, n]), &device)) // [m, n]
    };
    let mut model = Weights { all: weights.into_iter().map(param).collect() };
    let mut adamw = AdamWConfig::new().with_beta_2(0.99).with_weight_decay(0.0).init();
    let mut step = |_| {
        let mut start = Instant::now();
        let w: Vec<T2> = model.all.iter().map(|p| p.val()).collect();
        let loss = crate::loss(&burn, &w, dense, &inputs, &targets); // [1]
        let value: f32 = loss.clone().into_scalar();
        let forward = lap(&mut start);
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        let backward = lap(&mut start);
        drop(w);
        model = adamw.step(LR, model.clone(), grads);
        (f64::from(value), [forward, backward, lap(&mut start)])
    };
    (0..steps).map(|i| step(i)).collect()
}
