//! The GPU backend, on the simulator of its kernels: what the op table does not reach, and whether planted bugs are found.
//!
//! The op table (tests/ops.rs) runs on it too, and ten training steps against PyTorch (lab/src/trainer.rs). Every test skips with
//! a line where there is no C++ compiler. The oracle is the CPU backend in f64.
//! Letters: tq, tk query and key lengths; h head size; d columns.

mod common;

use common::{gpu, rng, skip_without_compiler};
use rand_distr::{Distribution, StandardNormal};
use rankgrad::autograd::{Rope, Tape};
use rankgrad::gpu::executor::{Address, Arg, Executor, Gemm, Launch, Type};
use rankgrad::gpu::{Cuda, OnGpu, Simulator, kernels};
#[cfg(feature = "cuda")]
use rankgrad::gpu::{KernelTime, Nccl};
use rankgrad::lowrank::{
    FactorPair, NewtonSchulz, Optimizer, Params, Radius, Rule, Space, Spectron, SpectronConfig, StepReport,
    newton_schulz, spectral_norm_estimate,
};
#[cfg(feature = "cuda")]
use rankgrad::parallel::{Alone, Collective, Failed, Link, Sums, threads};
use rankgrad::tensor::{
    Accum, AdamWStep, AdamWUpdate, Attention, Backend, Bf16, Binary, Columns, Cpu, Element, Mat, Tensor,
    Unary,
};
use rayon::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Half the distance from 1 to the next f32.
const UNIT: f64 = f32::EPSILON as f64 / 2.0;

/// N(0, 1), the same values on every backend that holds those of E.
fn draw_in<E: Element, B: Backend>(device: &B, seed: u64, shape: &[usize]) -> Tensor<B> {
    let mut rng = rng(seed);
    let mut one = || -> f64 { StandardNormal.sample(&mut rng) };
    Tensor::from_fn(device, shape, |_| B::Elem::of(E::of(one()).f64())) // shape
}

fn draw<B: Backend>(device: &B, seed: u64, shape: &[usize]) -> Tensor<B> {
    draw_in::<f32, B>(device, seed, shape)
}

/// ‖x − y‖/‖y‖; infinite for NaN.
fn distance(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len());
    let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut x.iter().zip(y).map(|(x, y)| x - y)) / norm(&mut y.iter().copied()).max(1e-30);
    if error.is_nan() { f64::INFINITY } else { error }
}

fn attention<E: Element, B: Backend>(device: &B, [tq, tk, h]: [usize; 3], how: Attention) -> Vec<Vec<f64>> {
    let Attention { batch, heads, kv_heads, .. } = how;
    let draw = draw_in::<E, B>;
    let q = draw(device, 1, &[batch * tq, heads * h]); // [batch·tq, heads·h]
    let k = draw(device, 2, &[batch * tk, kv_heads * h]); // [batch·tk, kv_heads·h]
    let v = draw(device, 3, &[batch * tk, kv_heads * h]); // [batch·tk, kv_heads·h]
    let dout = draw(device, 4, &[batch * tq, heads * h]); // [batch·tq, heads·h]
    let (o, lse) = B::attention(&q, &k, &v, how); // [batch·tq, heads·h], [batch, heads, tq]
    let [dq, dk, dv] = B::attention_grad([&q, &k, &v], &o, &lse, &dout, how); // like q, k, v
    vec![o.to_f64(), lse.to_f64(), dq.to_f64(), dk.to_f64(), dv.to_f64()]
}

/// C ← A·B and then C += A·B, so many of each, by `gemm` and by `gemm_wide`.
fn products<E: Element, B: Backend>(
    device: &B,
    count: usize,
    [m, k, n]: [usize; 3],
    [ta, tb]: [bool; 2],
) -> [Vec<f64>; 2] {
    let draws = |first: usize, [rows, cols]: [usize; 2], t: bool| -> Vec<Tensor<B>> {
        let shape = if t { [cols, rows] } else { [rows, cols] };
        (first..first + count).map(|seed| draw_in::<E, B>(device, seed as u64, &shape)).collect() // shape
    };
    let (a, b) = (draws(0, [m, k], ta), draws(50, [k, n], tb));
    let mut c = draws(100, [m, n], false); // [m, n] each
    let mut wide = B::widen(&c.iter().collect::<Vec<_>>()); // [m, n] each
    fn mats<B: Backend>(xs: &[Tensor<B>], transposed: bool) -> Vec<Mat<'_, B>> {
        xs.iter().map(|x| Mat::from(x).t_if(transposed)).collect()
    }
    let (a, b) = (mats(&a, ta), mats(&b, tb));
    for accum in [Accum::Add, Accum::Replace, Accum::Add] {
        B::gemm(&a, &b, &mut c.iter_mut().collect::<Vec<_>>(), accum);
        B::gemm_wide(&a, &b, &mut wide.iter_mut().collect::<Vec<_>>(), accum);
    }
    [c.iter().flat_map(Tensor::to_f64).collect(), wide.iter().flat_map(Tensor::to_f64).collect()]
}

/// Gradients of leaves, and sums of products where that is asked for, are f32 on a tape in bf16: inputs are held exactly, so what is
/// off is f32's. (Rounded to bf16 they would be off by 1e-3.)
#[test]
fn gradients_of_leaves_in_bf16_are_not_rounded() {
    fn gradients<B: Backend>(device: &B) -> Vec<Vec<f64>> {
        let draw = draw_in::<Bf16, B>;
        let (w, table) = (draw(device, 1, &[6, 9]), draw(device, 2, &[4, 9])); // [6, 9], [4, 9]
        let mut before = Vec::new();
        for seed in [3, 4] {
            let tape = Tape::new(device);
            let (w, table) = (tape.leaf(&w), tape.leaf(&table));
            let x = tape.constant(&draw(device, seed, &[40, 9])); // [40, 9]
            let loss = x.linear(w).sum() + x.linear(w).sum() + table.sum(); // w twice, in one step
            let mut grads = loss.backward_onto(before);
            before = [w, table].map(|v| (v.id(), grads.take(v.id(), device))).into();
        }
        before.iter().map(|(_, gradient)| gradient.to_f64()).collect()
    }
    let Some(gpu) = gpu() else { return };
    let exact = gradients(&Cpu::<f64>::default());
    for (gpu, exact) in gradients(&gpu.with_elements::<Bf16>()).iter().zip(&exact) {
        let error = distance(gpu, exact);
        assert!(error < 10.0 * UNIT, "{error:e}");
    }
    let device = gpu.with_elements::<Bf16>();
    for (count, t) in [(1, [false, false]), (3, [true, false]), (2, [false, true])] {
        let gpu = products::<Bf16, _>(&device, count, [20, 30, 10], t);
        let exact = products::<Bf16, _>(&Cpu::<f64>::default(), count, [20, 30, 10], t);
        let [rounded, wide] = [0, 1].map(|i| distance(&gpu[i], &exact[i]));
        assert!(wide < 10.0 * UNIT && rounded > 1e-4, "{count} products: {wide:e}, {rounded:e}");
    }
}

#[test]
fn attention_of_every_head_size() {
    let Some(gpu) = gpu() else { return };
    for (i, h) in [1, 8, 31, 32, 33, 64, 65, 96, 127, 128].into_iter().enumerate() {
        let how = Attention { batch: 2, heads: 2, kv_heads: 1 + i % 2, causal: i % 3 != 0 };
        for sizes in [[70, 97, h], [33, 33, h]] {
            let exact = attention::<f32, _>(&Cpu::<f64>::default(), sizes, how);
            let cpu = attention::<f32, _>(&Cpu::<f32>::default(), sizes, how);
            for ((gpu, cpu), exact) in attention::<f32, _>(&gpu, sizes, how).iter().zip(&cpu).zip(&exact) {
                let (error, usual) = (distance(gpu, exact), distance(cpu, exact));
                assert!(error < 3.0 * usual + UNIT, "{sizes:?} {how:?}: {error:e}, on the CPU {usual:e}");
            }
        }
    }
}

/// The results are rounded once, and before that P or dS, or o which delta reads: two roundings. The log-sum-exp is none of
/// rounded things; its 2ˣ is good to 2 units of f32.
#[test]
fn attention_in_bf16_of_every_head_size() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.with_elements::<Bf16>();
    for (i, h) in [1, 8, 20, 31, 32, 33, 64, 65, 96, 128].into_iter().enumerate() {
        let how = Attention { batch: 2, heads: 2, kv_heads: 1 + i % 2, causal: i % 3 != 0 };
        // standing rows in one tile and in two, passing ones in one stage, two and three
        for sizes in [[70, 97, h], [33, 33, h], [130, 135, h]] {
            let exact = attention::<Bf16, _>(&Cpu::<f64>::default(), sizes, how);
            let gpu = attention::<Bf16, _>(&device, sizes, how);
            for (i, (gpu, exact)) in gpu.iter().zip(&exact).enumerate() {
                let (error, allowed) =
                    (distance(gpu, exact), if i == 1 { 4.0 * UNIT } else { 2.0 * Bf16::UNIT_ROUNDOFF });
                assert!(error < allowed, "{sizes:?} {how:?}, result {i}: {error:e}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "on GPUs a head has at most 128 columns, not 129")]
fn a_head_that_is_too_wide_is_refused() {
    let Some(gpu) = gpu() else { panic!("on GPUs a head has at most 128 columns, not 129") };
    let how = Attention { batch: 1, heads: 1, kv_heads: 1, causal: true };
    attention::<f32, _>(&gpu, [2, 2, 129], how);
}

#[test]
fn norms_of_large_small_and_missing_values() {
    let Some(gpu) = gpu() else { return };
    let norm = |values: Vec<f32>| Tensor::from_vec(&gpu, [values.len()], values).norm(); // [n]
    assert!((norm(vec![1e30; 10_000]) / 1e32 - 1.0).abs() < 1e-6);
    assert!((norm(vec![1e-40; 10_000]) / 1e-38 - 1.0).abs() < 1e-5); // 1e-40 has 17 bits
    assert_eq!(norm(vec![]), 0.0);
    assert_eq!(norm(vec![0.0; 5]), 0.0);
    assert!(norm(vec![1.0, f32::NAN]).is_nan());
    assert_eq!(norm(vec![1.0, f32::NEG_INFINITY]), f64::INFINITY);
    let many = draw(&gpu, 1, &[300_001]); // [300001]
    let want = many.to_f64();
    assert!((Cuda::sum(&many) - want.iter().sum::<f64>()).abs() < 1e-9);
    assert!((many.norm() / want.iter().map(|x| x * x).sum::<f64>().sqrt() - 1.0).abs() < 1e-12);
}

#[test]
fn directions_of_large_small_and_missing_values() {
    fn are_right<B: Backend<Elem = f32>>(device: &B) {
        let other = Tensor::from_vec(device, [2], vec![5.0, 6.0]); // [2]
        let sizes = [0.0, 1e-40, 1e-30, 1.0, 1e30, 8e37]; // 1e-40 has 17 bits
        let xs = sizes.map(|size: f32| Tensor::from_vec(device, [2], vec![3.0 * size, -4.0 * size])); // [2] each
        let directions = B::normalised(&xs.iter().map(|x| (x, &other)).collect::<Vec<_>>()); // [2] each
        assert_eq!(directions[0].to_f64(), [5.0, 6.0]);
        for (x, size) in directions.iter().zip(sizes).skip(1) {
            let allowed = if size < 1e-38 { 1e-4 } else { 1e-6 };
            assert!(distance(&x.to_f64(), &[0.6, -0.8]) < allowed, "{size:e}: {:?}", x.to_f64());
        }
        assert!(B::normalised(&[]).is_empty());
    }
    are_right(&Cpu::<f32>::default());
    let Some(gpu) = gpu() else { return };
    are_right(&gpu);
}

#[test]
fn nothing_is_read_that_is_to_be_replaced() {
    let Some(gpu) = gpu() else { return };
    let (x, w) = (draw(&gpu, 1, &[5, 7]), draw(&gpu, 2, &[7, 3])); // [5, 7], [7, 3]
    let mut y = Tensor::scratch(&gpu, [5, 7]); // [5, 7]: NaN on the simulator
    y.axpby(2.0, &x, 0.0);
    assert_eq!(y.to_f64(), x.scale(2.0).to_f64());
    y.axpby(-2.0, &x, 1.0);
    assert_eq!(y.to_f64(), [0.0; 35]);
    let mut c = Tensor::scratch(&gpu, [5, 3]); // [5, 3]
    Cuda::gemm(&[(&x).into()], &[(&w).into()], &mut [&mut c], Accum::Replace);
    let once = c.to_f64();
    assert!(once.iter().all(|x| x.is_finite()));
    Cuda::gemm(&[(&x).into()], &[(&w).into()], &mut [&mut c], Accum::Add);
    let twice: Vec<f64> = once.iter().map(|x| 2.0 * x).collect();
    assert!(distance(&c.to_f64(), &twice) < 4.0 * UNIT);
}

#[test]
fn a_shared_tensor_is_copied_before_it_is_written() {
    let Some(gpu) = gpu() else { return };
    let x = draw(&gpu, 1, &[40]); // [40]
    let mut y = x.clone();
    y.axpby(1.0, &x, 1.0);
    assert_eq!(x.scale(2.0).to_f64(), y.to_f64());
    assert_eq!(x.to_f64(), draw(&gpu, 1, &[40]).to_f64());
}

#[test]
fn tensors_without_elements() {
    let Some(gpu) = gpu() else { return };
    let none = Tensor::zeros(&gpu, [0, 3]); // [0, 3]
    assert_eq!(none.add(&none).to_f64(), [0f64; 0]);
    assert_eq!(Cuda::sum_rows(&none).to_f64(), [0.0; 3]);
    assert_eq!(none.matmul(&Tensor::zeros(&gpu, [3, 2])).to_f64(), [0f64; 0]);
    assert_eq!(Tensor::zeros(&gpu, [2, 0]).matmul(&Tensor::zeros(&gpu, [0, 2])).to_f64(), [0.0; 4]);
    let table = draw(&gpu, 1, &[4, 3]); // [4, 3]
    assert_eq!(Cuda::embedding(&table, &[]).to_f64(), [0f64; 0]);
    assert_eq!(Cuda::embedding_grad(table.shape(), &[], &none).to_f64(), [0.0; 12]);
}

#[test]
fn indices_out_of_range_are_refused() {
    let Some(gpu) = gpu() else { return };
    let table = draw(&gpu, 1, &[4, 3]); // [4, 3]
    let panics = |f: &dyn Fn()| catch_unwind(AssertUnwindSafe(f)).is_err();
    assert!(panics(&|| drop(Cuda::embedding(&table, &[4]))));
    assert!(panics(&|| drop(Cuda::embedding_grad(table.shape(), &[4, 0, 0, 0], &table))));
    assert!(panics(&|| drop(Cuda::cross_entropy(&table, &[0, 1, 2, 3], 1.0))));
    let short = Tensor::from_buffer(&gpu, [9, 9], gpu.scratch(3)); // [9, 9] by its own account
    assert!(panics(&|| drop(Cuda::unary(Unary::Exp, &short))));
}

/// A model with a pair, an embedding, a gain and a head; values and gradients of every step, and the weights after the last.
fn spectron_steps<B: Backend<Wide = B>>(device: &B, steps: usize) -> Vec<Vec<f64>> {
    steps_of(device, steps, SpectronConfig::default(), false)
}

/// The same, by other settings; `saves`: the optimizer's state is asked for after each step.
fn steps_of<B: Backend<Wide = B>>(
    device: &B,
    steps: usize,
    config: SpectronConfig,
    saves: bool,
) -> Vec<Vec<f64>> {
    let (tokens, d, m, r, v) = (24, 16, 40, 6, 11);
    let mut params = Params::default();
    let embedding = params.dense("embedding", draw(device, 1, &[v, d])); // [v, d]
    let gain = params.dense("gain", Tensor::full(device, [d], 1.0)); // [d]
    let factor = |seed, rows| draw(device, seed, &[rows, r]).scale(0.4); // [rows, r]
    let pairs = [(2, m, d), (4, m, d), (6, d, m)].map(|(seed, out, into)| {
        params.pair(format!("pair {seed}"), FactorPair::new(factor(seed, out), factor(seed + 1, into))) // [out, r], [into, r]
    });
    let head = params.dense("head", draw(device, 8, &[v, d]).scale(0.2)); // [v, d]
    let ids: Vec<u32> = (0..tokens).map(|i| (i * i + 3) % v as u32).collect();
    let targets: Vec<u32> = (0..tokens).map(|i| (5 * i + 1) % v as u32).collect();
    let mut optimizer = Optimizer::new(Spectron::with(config, &params.values.pairs), &params);
    let mut seen = Vec::new();
    for _ in 0..steps {
        let tape = Tape::new(device);
        let w = params.on(&tape);
        let x = w[embedding].embedding(&ids).rms_norm(w[gain], 1e-5); // [tokens, d]
        let [up, gate, down] = pairs.map(|p| (w[p].a, w[p].b));
        let y = x.lowrank_linear(up.0, up.1).swiglu(x.lowrank_linear(gate.0, gate.1)); // [tokens, m]
        let loss = (x + y.lowrank_linear(down.0, down.1)).linear(w[head]).cross_entropy(&targets); // [1]
        seen.push(vec![loss.value().item()]);
        let grads = w.gradients(loss.backward());
        seen.extend(grads.tensors().map(Tensor::to_f64));
        optimizer.step(&mut params, &grads, 0.05, 0.01);
        let reports = optimizer.pairs.reports().into_iter();
        seen.extend(reports.map(|report| vec![report.sigma_a, report.sigma_b, report.rho]));
        if saves {
            optimizer.state();
        }
    }
    seen.extend(params.values.tensors().map(Tensor::to_f64));
    seen
}

#[test]
fn spectron_steps_agree_with_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let exact = spectron_steps(&Cpu::<f64>::default(), 4);
    let cpu = spectron_steps(&Cpu::<f32>::default(), 4);
    for ((gpu, cpu), exact) in spectron_steps(&gpu, 4).iter().zip(&cpu).zip(&exact) {
        let (error, usual) = (distance(gpu, exact), distance(cpu, exact));
        // rounding grows from step to step, on each in its own way
        assert!(error < 10.0 * usual + 10.0 * UNIT && error < 1e-4, "{error:e}, on the CPU {usual:e}");
    }
}

/// The bounds that a step asks for are proven on the host while the device is at what comes before it: to what they are when they are proven
/// in the step itself, as after each checkpoint.
#[test]
fn certified_spectron_steps_agree_with_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for balance_every in [0, 3] {
        let config = SpectronConfig { certify: true, balance_every, ..SpectronConfig::default() };
        let ahead = steps_of(&gpu, 10, config, false);
        assert!(ahead == steps_of(&gpu, 10, config, true));
        let exact = steps_of(&Cpu::<f64>::default(), 10, config, false);
        let cpu = steps_of(&Cpu::<f32>::default(), 10, config, false);
        for ((gpu, cpu), exact) in ahead.iter().zip(&cpu).zip(&exact) {
            let (error, usual) = (distance(gpu, exact), distance(cpu, exact));
            assert!(error < 10.0 * usual + 10.0 * UNIT && error < 1e-3, "{error:e}, on the CPU {usual:e}");
        }
    }
}

/// An executor that counts how often it is waited for.
#[derive(Debug)]
struct Waits {
    executor: Simulator,
    count: AtomicUsize,
}

impl Executor for Waits {
    fn alloc(&self, bytes: usize) -> Address {
        self.executor.alloc(bytes)
    }
    unsafe fn free(&self, address: Address, bytes: usize) {
        // SAFETY: the caller's promise, here and below
        unsafe { self.executor.free(address, bytes) }
    }
    unsafe fn upload(&self, from: &[u8], to: Address) {
        unsafe { self.executor.upload(from, to) }
    }
    unsafe fn download(&self, from: Address, to: &mut [u8]) {
        self.count.fetch_add(1, Ordering::Relaxed);
        unsafe { self.executor.download(from, to) }
    }
    unsafe fn copy(&self, from: Address, to: Address, bytes: usize) {
        unsafe { self.executor.copy(from, to, bytes) }
    }
    unsafe fn launch(&self, launch: Launch, args: &[Arg]) {
        unsafe { self.executor.launch(launch, args) }
    }
    unsafe fn gemm(&self, gemm: &Gemm) {
        unsafe { self.executor.gemm(gemm) }
    }
    fn sync(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn an_update_does_not_wait_for_the_device() {
    let Some(executor) = skip_without_compiler(Simulator::new()) else { return };
    let executor = Arc::new(Waits { executor, count: AtomicUsize::new(0) });
    let device = Cuda::on(executor.clone());
    let mut params = Params::default();
    for (i, [m, n, r]) in [[24, 16, 4], [16, 24, 4], [24, 16, 4], [40, 8, 3]].into_iter().enumerate() {
        let [a, b] = [m, n].map(|rows| draw(&device, (m + rows) as u64, &[rows, r])); // [m, r], [n, r]
        params.pair(format!("{i}"), FactorPair::new(a, b));
    }
    params.dense("table", draw(&device, 9, &[7, 5])); // [7, 5]
    let grads = params.values.clone();
    // certified: for the one of eight factors whose turn it is, all of them in the first step
    for (certify, expected) in [(false, 0), (true, 1)] {
        let config = SpectronConfig { certify, ..SpectronConfig::default() };
        let mut optimizer = Optimizer::new(Spectron::with(config, &params.values.pairs), &params);
        let mut waits = || {
            let before = executor.count.load(Ordering::Relaxed);
            optimizer.step(&mut params, &grads, 0.05, 0.01);
            executor.count.load(Ordering::Relaxed) - before
        };
        waits();
        assert_eq!([waits(), waits()], [expected; 2], "certify: {certify}");
        let before = executor.count.load(Ordering::Relaxed);
        let reports = optimizer.pairs.reports(); // for whoever wants to see them
        assert_eq!(executor.count.load(Ordering::Relaxed) - before, 1 - expected);
        for (StepReport { sigma_a, sigma_b, rho, .. }, pair) in reports.iter().zip(&params.values.pairs) {
            // the factors have moved by ρ since
            let near = |sigma: f64, x: &Tensor<_>| sigma > 0.5 * (spectral_norm_estimate(x, 30) - 2.0 * rho);
            assert!(near(*sigma_a, &pair.a) && near(*sigma_b, &pair.b), "{sigma_a} {sigma_b}");
        }
    }
}

/// Every bf16 widened, and what lies half way between two, or beside that, narrowed: the bits that the host makes of it.
#[test]
fn kernels_round_to_bf16_as_the_host_does() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.with_elements::<Bf16>();
    let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits()).collect() };
    let all: Vec<Bf16> = (0..=u16::MAX).map(Bf16::from_bits).collect();
    let widened = Tensor::from_vec(&device, [all.len()], all.clone()).cast(&gpu); // [65536]
    let all: Vec<f32> = all.into_iter().map(f32::from).collect();
    assert!(bits(&widened.to_vec()) == bits(&all));
    let near = |x: &f32| [0x7fff, 0x8000, 0x8001].map(|low| f32::from_bits(x.to_bits() | low));
    let near: Vec<f32> = all.iter().flat_map(near).chain(all.iter().copied()).collect();
    let narrowed = Tensor::from_vec(&gpu, [near.len()], near.clone()).cast(&device); // [4·65536]
    let wanted = near.into_iter().map(|x| Bf16::from(x).to_bits());
    assert!(narrowed.to_vec().into_iter().map(Bf16::to_bits).eq(wanted));
}

/// Rows that are shorter than a pack, no multiple of packs, for a warp, for a block, too long to be kept; and those numbers of elements.
#[test]
fn rows_and_tensors_of_every_length() {
    fn agrees<T: OnGpu>(gpu: &Cuda<f32>) {
        let device = gpu.with_elements::<T>();
        for d in [1, 3, 7, 8, 9, 31, 64, 96, 513, 768, 1024, 1032, 2048, 2056, 16_390, 33_000] {
            let exact = rows::<T, _>(&Cpu::<f64>::default(), 5, d);
            for (i, (gpu, exact)) in rows::<T, _>(&device, 5, d).iter().zip(&exact).enumerate() {
                let (error, allowed) = (distance(gpu, exact), 1e-5f64.max(4.0 * T::UNIT_ROUNDOFF));
                assert!(error < allowed, "{d} columns, result {i}: {error:e}");
            }
        }
    }
    let Some(gpu) = gpu() else { return };
    agrees::<f32>(&gpu);
    agrees::<Bf16>(&gpu);
}

/// What looks at rows of d columns, or at n·d elements.
fn rows<E: Element, B: Backend>(device: &B, n: usize, d: usize) -> Vec<Vec<f64>> {
    let draw = draw_in::<E, B>;
    let [x, y, dy] = [1, 2, 3].map(|seed| draw(device, seed, &[n, d])); // [n, d]
    let [g, b] = [4, 5].map(|seed| draw(device, seed, &[d])); // [d]
    let ids = [2, 0, 2, 4, 2];
    let mut out = vec![B::binary(Binary::Add, &x, &y), B::swiglu(&x, &y), B::embedding(&x, &ids)];
    out.extend(B::swiglu_grad(&x, &y, &dy));
    out.extend([B::sum_rows(&x), B::embedding_grad([5, d].into(), &ids, &dy)]);
    let mut z = y.clone(); // [n, d]
    z.axpby(0.3, &x, -1.5);
    out.push(z);
    let mut wide = B::widen(&[&x, &g]); // [n, d], [d]
    out.extend(device.narrow(&wide.iter().collect::<Vec<_>>()));
    let (normed, inv_rms) = B::rms_norm(&x, &g, 1e-5); // [n, d], [n]
    if d <= 24 << 10 {
        out.extend(B::rms_norm_grad(&x, &g, &inv_rms, &dy, Some(y.clone())));
    }
    out.extend([normed, B::softmax(&x), B::softmax_grad(&x, &dy)]);
    let (both, inv_rms_of_both) = B::add_rms_norm(&x, &y, &g, 1e-5); // [n, d] × 2, [n]
    out.extend(both);
    wide.extend([inv_rms, inv_rms_of_both]);
    if d > 1 {
        // a single column is its own mean, and certain: what should be 0 is rounding
        let (normed, stats) = B::layer_norm(&x, &g, &b, 1e-5); // [n, d], [n, 2]
        out.extend(B::layer_norm_grad(&x, &g, &stats, &dy));
        let (loss, dx) = B::cross_entropy(&x, &ids.map(|id| id % d as u32), 0.25); // [1], [n, d]
        out.extend([normed, dx]);
        wide.extend([stats, loss]);
    }
    if d.is_multiple_of(2) {
        let rope = Rope::new(&device.wide(), 8, if d.is_multiple_of(64) { 64 } else { d }, 10_000.0);
        let tape = Tape::new(device);
        out.push(tape.constant(&x).rope(&rope, n, 3).value());
    }
    let values = out.iter().map(Tensor::to_f64).chain(wide.iter().map(Tensor::to_f64));
    values.chain([vec![x.norm(), B::sum(&x)]]).collect()
}

/// Newton–Schulz in bf16: at every step X and the sums of products are rounded, by 2⁻⁹ at most, in directions of no kind, and the
/// polynomials amplify what is small. And it is in bf16: f32 would be a thousand times nearer.
#[test]
fn newton_schulz_in_bf16() {
    let Some(gpu) = gpu() else { return };
    let how = |space| NewtonSchulz { space, ..NewtonSchulz::default() };
    for (seed, shape) in [(1, [70, 20]), (2, [20, 70]), (3, [48, 48])] {
        let [on_gpu, exact] = [
            newton_schulz(&[&draw(&gpu, seed, &shape)], how(Space::Bf16))[0].to_f64(), // shape
            newton_schulz(&[&draw(&Cpu::<f64>::default(), seed, &shape)], how(Space::Plain))[0].to_f64(), // shape
        ];
        let error = distance(&on_gpu, &exact);
        assert!((1e-4..0.03).contains(&error), "{shape:?}: {error}");
    }
    // a device without bf16 computes in what it has
    let x = draw(&Cpu::<f64>::default(), 1, &[70, 20]); // [70, 20]
    let [narrow, plain] =
        [Space::Bf16, Space::Plain].map(|space| newton_schulz(&[&x], how(space))[0].to_f64()); // [70, 20]
    assert!(narrow == plain);
}

/// Other schedules of the threads, the same bits.
#[test]
fn the_order_of_threads_does_not_matter() {
    fn same<B: Backend>(device: &B) {
        let bits =
            || -> Vec<u64> { workload::<f32, B>(device).concat().iter().map(|x| x.to_bits()).collect() };
        let first = bits();
        for _ in 0..4 {
            assert!(bits() == first);
        }
    }
    let Some(gpu) = gpu() else { return };
    same(&gpu);
    same(&gpu.with_elements::<Bf16>());
}

/// Every kernel.
fn workload<E: Element, B: Backend>(device: &B) -> Vec<Vec<f64>> {
    [simple_ops::<E, B>(device), attentions::<E, B>(device)].concat()
}

/// Every kernel but attention's, at sizes at which its loops go round more than once, on inputs that E holds.
fn simple_ops<E: Element, B: Backend>(device: &B) -> Vec<Vec<f64>> {
    let draw = draw_in::<E, B>;
    let (n, d) = (70, 304); // more rows than a tile, columns in packs, more than one for each thread of a warp
    let (x, y, dy) = (draw(device, 1, &[n, d]), draw(device, 2, &[n, d]), draw(device, 3, &[n, d])); // [n, d]
    let (g, b) = (draw(device, 4, &[d]), draw(device, 5, &[d])); // [d]
    let ids: Vec<u32> = (0..n as u32).map(|i| (i * i) % 23).collect();
    let (mut out, mut wide) = (vec![], vec![]);
    for f in [Unary::Exp, Unary::Tanh, Unary::Relu, Unary::Silu] {
        out.extend([B::unary(f, &x), B::unary_grad(f, &x, &dy)]);
    }
    out.push(B::unary_grad(Unary::Log, &x, &dy));
    out.extend([Binary::Add, Binary::Sub, Binary::Mul].map(|f| B::binary(f, &x, &y)));
    out.extend([B::add_row(&x, &b), B::swiglu(&x, &y), B::softmax(&x)]);
    out.extend(B::swiglu_grad(&x, &y, &dy));
    out.push(B::softmax_grad(&B::softmax(&x), &dy));
    let (normed, inv_rms) = B::rms_norm(&x, &g, 1e-5); // [n, d], [n]
    out.extend(B::rms_norm_grad(&x, &g, &inv_rms, &dy, None));
    out.extend(B::rms_norm_grad(&x, &g, &inv_rms, &dy, Some(y.clone())));
    out.push(normed);
    wide.push(inv_rms);
    let (both, inv_rms) = B::add_rms_norm(&x, &y, &g, 1e-5); // [n, d] × 2, [n]
    out.extend(both);
    wide.push(inv_rms);
    let long = draw(device, 10, &[2, 2200]); // [2, 2200]: a block for each row
    let gain = draw(device, 11, &[2200]); // [2200]
    let (normed, inv_rms) = B::rms_norm(&long, &gain, 1e-5); // [2, 2200], [2]
    out.extend(B::rms_norm_grad(&long, &gain, &inv_rms, &long, None));
    let (loss, dx) = B::cross_entropy(&long, &[3, 2000], 0.5); // [1], [2, 2200]
    out.extend([normed, dx]);
    wide.extend([inv_rms, loss]);
    let [odd, more] = [12, 13].map(|seed| draw(device, seed, &[9, 37])); // [9, 37]: no packs, and a tail
    out.extend([B::binary(Binary::Add, &odd, &more), B::sum_rows(&odd), B::softmax(&odd)]);
    let (normed, stats) = B::layer_norm(&x, &g, &b, 1e-5); // [n, d], [n, 2]
    out.extend(B::layer_norm_grad(&x, &g, &stats, &dy));
    out.push(normed);
    wide.push(stats);
    let (loss, dx) = B::cross_entropy(&x, &ids, 1.0); // [1], [n, d]
    out.push(dx);
    wide.push(loss);
    let long = 4104; // columns that a block takes, of several warps, and not a warp
    let [x_long, dy_long] = [10, 11].map(|seed| draw(device, seed, &[24, long])); // [24, long]
    let (g_long, b_long) = (draw(device, 12, &[long]), draw(device, 13, &[long])); // [long]
    let (normed, stats) = B::layer_norm(&x_long, &g_long, &b_long, 1e-5); // [24, long], [24, 2]
    out.extend(B::layer_norm_grad(&x_long, &g_long, &stats, &dy_long));
    out.extend([normed, B::cross_entropy(&x_long, &[4103; 24], 1.0).1]);
    out.extend([B::embedding(&x, &ids), B::embedding_grad([23, d].into(), &ids, &dy)]);
    out.push(B::sum_rows(&draw(device, 6, &[600, 40])));
    out.push(Tensor::full(device, [37, 3], 0.5)); // [37, 3]
    let rope = Rope::new(&device.wide(), 40, 16, 10_000.0);
    let tape = Tape::new(device);
    out.push(tape.constant(&x).rope(&rope, 35, 5).value());
    let mut z = y.clone();
    z.copy_cols(100, &x, 7..157);
    z.axpby(0.3, &x, -1.5);
    out.push(z);
    let mut weights = [x.clone(), odd.clone()]; // [n, d], [9, 37]
    let mut moments =
        [[y.clone(), B::binary(Binary::Mul, &y, &y)], [more.clone(), B::binary(Binary::Mul, &odd, &odd)]]; // like each, twice
    let updates = weights.iter_mut().zip([&dy, &more]).zip(&mut moments).enumerate();
    let update = |(i, ((w, g), moments))| AdamWUpdate { w, g, moments, lr: 0.1 * (1 + i) as f64, decay: 0.2 };
    let step = AdamWStep { beta1: 0.9, beta2: 0.99, eps: 1e-8, bias1: 0.3, bias2: 0.4 };
    B::adamw(step, updates.map(update).collect());
    out.extend(weights.into_iter().chain(moments.into_iter().flatten()));
    wide.extend(B::widen(&[&x, &g, &x]));
    let back = device.narrow(&wide[wide.len() - 3..].iter().collect::<Vec<_>>()); // [n, d], [d], [n, d]
    out.extend(back);
    for radius in [Radius::Paper, Radius::Exact] {
        let (sigma, mut pairs) =
            (B::norms(&[&g, &b, &x, &y]), [x.clone(), y.clone(), odd.clone(), more.clone()]); // like each
        let moves = pairs.iter_mut().zip([&y, &dy, &more, &odd]).enumerate();
        let moves = moves.map(|(k, (x, o))| (20.0 * (1 + k / 2) as f64, o, 0.75, x));
        B::renormalised_step(&sigma, radius, moves.collect());
        out.extend(pairs);
    }
    let [tiny, huge, zero] = [1e-32, 1e32, 0.0].map(|scale| odd.scale(scale)); // [9, 37] each
    out.extend(B::normalised(&[(&odd, &odd), (&x, &y), (&tiny, &odd), (&zero, &more), (&huge, &odd)]));
    for first in [8, 3] {
        // columns that begin at 16 bytes, and some that do not: read, read transposed, and written
        let part = |x, i: usize| Mat::columns(x, first + 40 * i..first + 40 * i + 24);
        let mut z = draw(device, 14, &[n, 2 * n + 30]); // [70, 170]
        B::gemm_beside(
            &[part(&x, 0), part(&y, 1)],
            &[part(&y, 2).t(), part(&x, 3).t()],
            &mut z,
            &[first, first + n + 8],
        );
        let mut small = draw(device, 15, &[24, 90]); // [24, 90]
        B::gemm_beside(&[part(&x, 0).t()], &[part(&y, 1)], &mut small, &[first]);
        let (mut sum, mut sum_wide) =
            (draw(device, 16, &[24, 24]), draw(device, 17, &[24, 24]).cast(&device.wide())); // [24, 24] × 2
        B::gemm(&[part(&x, 2).t()], &[part(&y, 3)], &mut [&mut sum], Accum::Add);
        B::gemm_wide(&[part(&x, 4).t()], &[part(&y, 0)], &mut [&mut sum_wide], Accum::Add);
        out.extend([z, small, sum]);
        wide.push(sum_wide);
        let mut w = [y.clone(), draw(device, 18, &[n, 330])]; // [70, 304], [70, 330]
        let block = |from, to, width| Columns { from, to, width };
        let copies =
            [block((0, first), (1, 2), 100), block((1, 7), (0, first), 31), block((0, 200), (0, 240), 64)];
        B::copy_cols(&[&x, &dy], &mut w.iter_mut().collect::<Vec<_>>(), &copies);
        out.extend(w);
    }
    let values = out.iter().map(Tensor::to_f64).chain(wide.iter().map(Tensor::to_f64));
    values.chain([vec![x.norm(), B::sum(&x)]]).collect()
}

/// Those of attention, likewise: of the rows that pass there are more than two buffers hold.
fn attentions<E: Element, B: Backend>(device: &B) -> Vec<Vec<f64>> {
    let of = |(h, causal)| {
        let how = Attention { batch: 1, heads: 2, kv_heads: 1, causal };
        attention::<E, B>(device, [70, 140, h], how)
    };
    [(40, true), (20, false), (72, true)].into_iter().flat_map(of).collect()
}

/// Which kernels work.
#[derive(Clone, Copy)]
enum Work {
    All,
    ButAttention,
    Attention,
}

/// Whether that work, so many times and under as many schedules, is right to the rounding of T.
fn is_right<T: OnGpu>(device: &Cuda<f32>, times: usize, work: Work) -> bool {
    fn done<T: Element, B: Backend>(device: &B, work: Work) -> Vec<Vec<f64>> {
        match work {
            Work::All => workload::<T, B>(device),
            Work::ButAttention => simple_ops::<T, B>(device),
            Work::Attention => attentions::<T, B>(device),
        }
    }
    let (device, exact) = (device.with_elements::<T>(), done::<T, _>(&Cpu::<f64>::default(), work));
    let allowed = 1e-5f64.max(4.0 * T::UNIT_ROUNDOFF); // some of the inputs here were computed, and rounded
    let once = || {
        let results = done::<T, _>(&device, work);
        results.iter().zip(&exact).all(|(x, exact)| distance(x, exact) < allowed)
    };
    (0..times).all(|_| catch_unwind(AssertUnwindSafe(once)).unwrap_or(false)) // the simulator panics at what it sees
}

/// The types in whose kernels a bug is; if it is in one only, it is in attention, and else not in attention.
#[derive(Clone, Copy, Debug)]
enum In {
    Both,
    F32,
    Bf16,
}

#[test]
fn planted_bugs_are_found() {
    // only the files that have the bug, since compiling them is most of the work
    let source = |types: In| {
        let mut kernels = kernels::all();
        kernels.retain(|&(kernel, element)| match types {
            In::Both => !kernel.starts_with("attention"),
            In::F32 => kernel.starts_with("attention") && element == Type::F32,
            In::Bf16 => kernel.starts_with("attention") && element == Type::Bf16,
        });
        (kernels::source_of(&kernels), kernels)
    };
    let run = |source: &str, kernels: &[(&str, Type)], types: In, times: usize| -> Option<Vec<bool>> {
        let opened = skip_without_compiler(Simulator::with(source, kernels, &["-O1"]))?;
        let device = Cuda::on(Arc::new(opened));
        Some(match types {
            In::Both => vec![
                is_right::<f32>(&device, times, Work::ButAttention),
                is_right::<Bf16>(&device, times, Work::ButAttention),
            ],
            In::F32 => vec![is_right::<f32>(&device, times, Work::Attention)],
            In::Bf16 => vec![is_right::<Bf16>(&device, times, Work::Attention)],
        })
    };
    for types in [In::Both, In::F32, In::Bf16] {
        let (source, kernels) = source(types);
        let Some(right) = run(&source, &kernels, types, 10) else { return };
        assert!(!right.contains(&false), "the kernels as they are: {types:?}: {right:?}");
    }
    let bugs = [
        (
            In::Both,
            "a barrier before the sum is read",
            "= v;\n    __syncthreads();\n    v = 0;",
            "= v;\n    v = 0;",
        ),
        (
            In::Both,
            "a barrier after the sum is read",
            "    __syncthreads(); // the next sum writes `part` again\n",
            "",
        ),
        (
            In::Both,
            "a barrier before the maximum is read",
            "= v;\n    __syncthreads();\n    v = part[0];",
            "= v;\n    v = part[0];",
        ),
        (In::Both, "rows of ids that do not occur are not written", "y[c] = 0.0f;", ";"),
        (
            In::Both,
            "a barrier before columns are added",
            "parts[j][threadIdx.x] = sums[j];\n    __syncthreads();",
            "parts[j][threadIdx.x] = sums[j];",
        ),
        (
            In::F32,
            "a barrier before tiles are loaded",
            "        __syncthreads(); // all warps are done with the tiles before\n",
            "",
        ),
        (
            In::F32,
            "a barrier after tiles are loaded",
            "z.tk, z.h);\n        __syncthreads();\n",
            "z.tk, z.h);\n",
        ),
        (
            In::F32,
            "the wait for the warp's own P",
            "        __syncwarp(); // the warp reads only its own rows of P\n",
            "",
        ),
        (
            In::F32,
            "a mask that shows one key too many",
            "key + z.tq <= i + z.tk",
            "key + z.tq <= i + z.tk + 1",
        ),
        (In::F32, "a mask that hides a query's own key", "key + z.tq <= i + z.tk", "key + z.tq < i + z.tk"),
        (
            In::F32,
            "a tile of keys that is left out",
            "(end < z.tq ? end : z.tq)",
            "(end < z.tq ? end - TILE : z.tq)",
        ),
        (
            In::F32,
            "a tile of queries that is left out",
            "(first - past) / TILE * TILE",
            "(first - past) / TILE * TILE + TILE",
        ),
        (In::Both, "moments in the wrong order", "T *m, *v;", "T *v, *m;"),
        (
            In::Both,
            "length and offset in the wrong order",
            "u32 h, u32 len, u32 offset",
            "u32 h, u32 offset, u32 len",
        ),
        (
            In::Both,
            "an argument too few",
            "KERNEL(fill)(T* y, float value, u64 n) {",
            "KERNEL(fill)(T* y, float value) {\n    const u64 n = 1;",
        ),
        (
            In::Both,
            "a write beyond the end",
            "i < n; i += thread.count) f(p[i]...);",
            "i < n + 1; i += thread.count) f(p[i]...);",
        ),
        (
            In::Both,
            "a tail that is left out",
            "    for (u64 i = packs * W + thread.number; i < n; i += thread.count) f(p[i]...); // the tail\n",
            "",
        ),
        (
            In::Both,
            "a tail that begins too late",
            "u64 i = packs * W + thread.number; i < n; i += thread.count) f",
            "u64 i = packs * W + thread.number + 1; i < n; i += thread.count) f",
        ),
        (In::Both, "a second pack that is the first", "(k + thread.count) * W)...);", "k * W)...);"),
        (
            In::Both,
            "a row's packs beyond its end",
            "if (c < d) apply<W>(g, neighbours<KEEPS",
            "if (c < d + W) apply<W>(g, neighbours<KEEPS",
        ),
        (
            In::Both,
            "a gain that begins too late",
            "y = g * x * s; }, row, g, at.of(y));",
            "y = g * x * s; }, row, g + 16, at.of(y));",
        ),
        (
            In::Both,
            "a barrier before the target is written",
            "    at.wait(); // the target's column is written\n",
            "",
        ),
        (
            In::Both,
            "a barrier before parts of a gain are added",
            "    __syncthreads(); // all parts are whole\n",
            "",
        ),
        (In::Both, "gradients that are not added to", "(adds ? before : 0.0f)", "(adds ? 0.0f : before)"),
        (
            In::Both,
            "a barrier that some threads do not reach",
            "    v = 0;\n",
            "    v = 0;\n    if (threadIdx.x == 40) return v;\n",
        ),
        (
            In::Bf16,
            "a wait for copies",
            "        wait_for_copies();\n        __syncthreads(); // these",
            "        __syncthreads(); // these",
        ),
        (
            In::Bf16,
            "a wait for copies in the backward",
            "wait_for_copies();\n        __syncthreads(); // as",
            "__syncthreads(); // as",
        ),
        (
            In::Bf16,
            "a wait for copies behind the barrier",
            "wait_for_copies();\n        __syncthreads(); // these",
            "__syncthreads(); wait_for_copies(); // these",
        ),
        (
            In::Bf16,
            "a wait for the standing rows",
            "    wait_for_copies();\n    __syncthreads();\n    const Kept",
            "    const Kept",
        ),
        (In::Bf16, "a barrier between passing rows", "__syncthreads(); // these", "// these"),
        (
            In::Bf16,
            "a barrier between passing rows in the backward",
            "__syncthreads(); // as above",
            "// as above",
        ),
        (In::Bf16, "copies to the buffer that is being read", "sk + (buffer ^ 1)", "sk + buffer"),
        (
            In::Bf16,
            "copies beyond the head's columns", // but not of rows beyond the tensor: they may end outside of all memory
            "there ? from : head, there",
            "first + row < end ? from : head, first + row < end",
        ),
        (
            In::Bf16,
            "a wait for the warp's own rows",
            "    __syncwarp(); // a row is stored by other lanes than have computed it\n",
            "",
        ),
        (In::Bf16, "a mask that shows one key too many", "i + 1 + z.tk - z.tq", "i + 2 + z.tk - z.tq"),
        (
            In::Bf16,
            "a mask that shows a key to a query too many",
            "key + z.tq - z.tk : 0",
            "key + z.tq - z.tk - 1 : 0",
        ),
        (In::Bf16, "no mask where some rows see all keys", "start + N > by_all", "start >= by_all"),
        (
            In::Bf16,
            "keys that only some rows see, left out",
            "if (start >= by_some)",
            "if (start + N > by_some)",
        ),
        (
            In::Bf16,
            "queries that see only some keys, left out",
            "if (start + part + N <= by_some)",
            "if (start + part <= by_some)",
        ),
        (In::Bf16, "another part of B", "s[m][n * 2], a[m], b[0], b[1]", "s[m][n * 2], a[m], b[0], b[2]"),
        (
            In::Bf16,
            "another part of A",
            "a[m][1] = bf16_pair(left[2], left[3])",
            "a[m][1] = bf16_pair(right[0], left[3])",
        ),
        (In::Bf16, "rows that begin at no multiple of 16 bytes", "C * 32 + 8;", "C * 32 + 2;"),
        (In::Bf16, "lanes that share no row", "h <= 32 ? 4", "h <= 32 ? 2"),
        (In::Both, "the radius of another pair", "blockIdx.x / 2 * 2", "blockIdx.x / 4 * 4"),
        (In::Both, "columns in another order", "y[row * dy + c]", "y[row * dy + width - 1 - c]"),
        (In::Both, "a zero that is divided by its norm", "if (norm == 0.0)", "if (norm < 0.0)"),
    ];
    bugs.par_iter().for_each(|&(types, what, from, to)| {
        let (source, kernels) = source(types);
        assert!(source.contains(from), "{what}: the source has changed: {from}");
        // some need a rare order of threads; most are found at once
        let right = run(&source.replace(from, to), &kernels, types, 60).expect("it compiled before");
        assert!(!right.contains(&true), "not found in {types:?}: {what}: {right:?}");
    });
}

/// By the same calls as on a device, but for its opening. benches/nvrtc.py looks closer.
#[test]
#[cfg(feature = "cuda")]
fn nvrtc_compiles_the_kernels() {
    let source = kernels::source();
    let cubin = match rankgrad::gpu::compile(&source, "sm_90") {
        Err(why) if why.starts_with("libnvrtc") && std::env::var_os("RANKGRAD_REQUIRE_NVRTC").is_none() => {
            return println!("skipped: {why}");
        }
        image => image.unwrap(),
    };
    assert!(cubin.starts_with(b"\x7fELF"));
    let ptx = rankgrad::gpu::compile(&source, "compute_80").unwrap();
    let ptx = String::from_utf8_lossy(&ptx);
    for (kernel, element) in kernels::all() {
        let name = kernels::name(kernel, element);
        assert!(ptx.contains(&format!(".entry {name}(")), "{name}");
    }
    let error = rankgrad::gpu::compile("KERNEL", "sm_90").unwrap_err();
    assert!(error.contains("kernels.cu(1): error"), "{error}");
}

/// gpu/cuda.rs through cudarc, and gpu/nccl.rs, on a driver, a cuBLAS, an NVRTC and an NCCL that are made of the simulator: tests/fake_cuda.cpp.
#[test]
#[cfg(all(feature = "cuda", target_os = "linux"))]
fn cuda_calls_do_what_they_should() {
    if std::env::var_os("RANKGRAD_TEST_CHILD").is_some() {
        return on_a_fake_driver();
    }
    let folder = std::env::temp_dir().join(format!("rankgrad-fake-cuda-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let library = folder.join("libcuda.so");
    let source =
        format!("{}\n#line 1 \"fake_cuda.cpp\"\n{}", kernels::source(), include_str!("fake_cuda.cpp"));
    if skip_without_compiler(Simulator::build(&library, &source, &kernels::all(), &[])).is_some() {
        for name in ["libcublas.so", "libcublasLt.so", "libnvrtc.so", "libnccl.so.2"] {
            std::fs::hard_link(&library, folder.join(name)).unwrap();
        }
        let mut child = std::process::Command::new(std::env::current_exe().expect("this test"));
        child
            .args(["--exact", "cuda_calls_do_what_they_should", "--nocapture"])
            .env("RANKGRAD_TEST_CHILD", "1");
        child.env("LD_LIBRARY_PATH", &folder).env("XDG_CACHE_HOME", &folder);
        let output = child.output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let kept = std::fs::read_dir(folder.join("rankgrad")).expect("the cache").flatten().count();
        assert_eq!(kept, 3); // kernels of both types, and products
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[cfg(all(feature = "cuda", target_os = "linux"))]
fn on_a_fake_driver() {
    let found = rankgrad::gpu::devices().unwrap();
    assert_eq!(found[0].to_string(), "cuda:0: Simulated, 1.0 GiB, compute capability 9.0");
    let error = Cuda::open(2).unwrap_err().to_string();
    assert_eq!(error, "there is no cuda:2: the devices are 0 to 1");
    two_gpus();
    let cpu = Cpu::<f64>::default();
    for _ in 0..2 {
        let gpu = Cuda::open(0).unwrap(); // the second time from the cache
        // from several threads: each has to enter the context
        [1, 1, 1].into_par_iter().for_each(|times| assert!(is_right::<f32>(&gpu, times, Work::All)));
        assert!(is_right::<Bf16>(&gpu, 1, Work::All));
        for (gpu, exact) in spectron_steps(&gpu, 4).iter().zip(&spectron_steps(&cpu, 4)) {
            assert!(distance(gpu, exact) < 1e-4);
        }
        gpu.watch_kernels();
        let x = draw(&gpu, 1, &[9, 10]); // [9, 10]
        [x.matmul(x.t()), x.scale(2.0), x.scale(3.0)].iter().for_each(drop);
        let times = gpu.kernel_times();
        let time = |calls, ms: f64, flops| KernelTime { calls, seconds: 1e-3 * ms, flops };
        assert_eq!(times["axpby f32"], time(2, 2.0, 0.0)); // a millisecond a call
        assert_eq!(times["gemm f32 9×10·(9×10)ᵀ"], time(1, 1.0, 2.0 * 9.0 * 10.0 * 9.0));
        assert!(times.len() == 2 && gpu.kernel_times().is_empty());
        drop(Tensor::scratch(&gpu, [1 << 20, 100])); // 400 MiB
        assert!((400 << 20..500 << 20).contains(&gpu.peak_bytes()));
        // every kind of product, alone and in a batch
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            for (count, k) in [(1, 7), (4, 7), (1, 0), (2, 0)] {
                let off = |gpu: [Vec<f64>; 2], exact: [Vec<f64>; 2]| {
                    [distance(&gpu[0], &exact[0]), distance(&gpu[1], &exact[1])]
                };
                let (sizes, t) = ([5, k, 3], [ta, tb]);
                let exact = products::<f32, _>(&cpu, count, sizes, t);
                let [single, _] = off(products::<f32, _>(&gpu, count, sizes, t), exact);
                let exact = products::<Bf16, _>(&cpu, count, sizes, t);
                let [half, wide] =
                    off(products::<Bf16, _>(&gpu.with_elements::<Bf16>(), count, sizes, t), exact);
                let fine = single < 1e-6 && half < Bf16::UNIT_ROUNDOFF && wide < 1e-6;
                assert!(fine, "{count} products, {k}, {ta} {tb}: {single:e} {half:e} {wide:e}");
            }
        }
        // two products at once, or one by one where that is faster, as it is here if A is transposed
        for (t, name, calls) in [(false, "gemm f32 2 of 5×7·7×3", 1), (true, "gemm f32 (7×5)ᵀ·7×3", 2)]
        {
            for _ in 0..2 {
                gpu.watch_kernels(); // the first time both ways are tried
                products::<f32, _>(&gpu, 2, [5, 7, 3], [t, false]);
            }
            assert_eq!(gpu.kernel_times()[name].calls, 6 * calls); // three times two kinds of sums
        }
        graphs_change_no_bit(&gpu);
        // what one size leaves behind is given up for another
        [600, 700].into_iter().for_each(|mib| drop(Tensor::scratch(&gpu, [mib << 18])));
        let too_much =
            catch_unwind(AssertUnwindSafe(|| drop(Tensor::scratch(&gpu, [1 << 20, 300])))).unwrap_err();
        let said = too_much.downcast_ref::<String>().expect("a message");
        assert!(
            said.contains("GPU cuda:0: 1.172 GiB asked for, ") && said.contains(" of 1.000 GiB free"),
            "{said}"
        );
    }
}

/// Work that comes again is launched as graphs, with other numbers and addresses each time, and does the same.
#[cfg(all(feature = "cuda", target_os = "linux"))]
fn graphs_change_no_bit(gpu: &Cuda<f32>) {
    assert_eq!(gpu.graph_use(), None);
    let plain = spectron_steps(gpu, 10);
    gpu.use_graphs(true).unwrap();
    for _ in 0..4 {
        assert!(is_right::<f32>(gpu, 1, Work::All) && is_right::<Bf16>(gpu, 1, Work::All));
    }
    // three at a time, so that what they write down is mixed
    [1, 1, 1].into_par_iter().for_each(|times| assert!(is_right::<f32>(gpu, times, Work::All)));
    gpu.use_graphs(true).unwrap(); // counted from here
    assert!(spectron_steps(gpu, 10) == plain);
    let used = gpu.graph_use().expect("they are on");
    assert!(used.captured > 0 && used.launched > 2 * used.captured && used.changed > 0, "{used:?}");
    // a graph's uploads are those of now: the same launch on the same memory, with other numbers
    let table = draw(gpu, 3, &[50, 8]); // [50, 8]
    let rows = |ids: &[u32]| ids.iter().fold(table.clone(), |x, &id| x.add(&gathered(&table, id))).to_f64();
    let ids = [[1, 2, 3, 4], [9, 8, 7, 6], [5, 5, 5, 5], [40, 30, 20, 10]];
    let first = ids.map(|ids| rows(&ids));
    // who takes the times of kernels sees each
    gpu.watch_kernels();
    table.scale(2.0);
    assert_eq!(gpu.kernel_times()["axpby f32"].calls, 1);
    gpu.use_graphs(false).unwrap();
    assert!(first == ids.map(|ids| rows(&ids)));
}

/// Row `id` of `table` [50, 8], fifty times.
#[cfg(all(feature = "cuda", target_os = "linux"))]
fn gathered(table: &Tensor<Cuda<f32>>, id: u32) -> Tensor<Cuda<f32>> {
    Cuda::embedding(table, &[id; 50]) // [50, 8]
}

/// Two tensors that each worker draws for itself.
#[cfg(feature = "cuda")]
fn own<B: Backend>(device: &B, worker: usize) -> [Tensor<B>; 2] {
    [draw(device, worker as u64, &[50, 7]), draw(device, 9 + worker as u64, &[3])] // [50, 7], [3]
}

#[cfg(all(feature = "cuda", target_os = "linux"))]
fn two_gpus() {
    let worker = |link: Arc<dyn Link>| {
        let k = link.worker();
        let gpu = Cuda::open(k).unwrap();
        let nccl = Nccl::join(&gpu, link.clone()).unwrap();
        let [x, y] = own(&gpu, k); // [50, 7], [3]
        let (before, other) = (x.clone(), x.scale(2.0)); // [50, 7] × 2
        let first = nccl.all_reduce(vec![x, y]).unwrap();
        // more of them, and other work of the GPU's, before the first is waited for
        let second = nccl.all_reduce(vec![other.scale(0.5)]).unwrap(); // [50, 7]
        drop(nccl.all_reduce(vec![other.scale(3.0)]).unwrap()); // [50, 7]: nobody wants to know
        assert_eq!(before.scale(2.0).to_vec(), other.to_vec(), "who shares a buffer keeps it as it was");
        let (first, second) = (first.wait().unwrap(), second.wait().unwrap()); // [50, 7], [3]; [50, 7]
        assert_eq!(first[0].to_vec(), second[0].to_vec());
        let sums: Vec<_> = first.iter().map(Tensor::to_f64).collect();
        let [mut x, mut y] = own(&gpu, k); // [50, 7], [3]
        nccl.broadcast(vec![(1, &mut x), (0, &mut y)]).unwrap();
        let handed_out = [x, y].map(|x| x.to_f64());
        // the other comes, and is lost before it calls NCCL: nobody waits for it
        if k == 1 {
            link.exchange(vec![], &mut |_| vec![]).unwrap();
            link.fail("lost");
        } else {
            let [x, _] = own(&gpu, k); // [50, 7]
            for _ in 0..2 {
                let why = nccl.all_reduce(vec![x.clone()]).and_then(Sums::wait).unwrap_err();
                assert_eq!(why, Failed("worker 1 failed: lost".into()));
            }
        }
        (sums, handed_out)
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let spawn = |link| scope.spawn(move || worker(link));
        let running: Vec<_> = threads(2).into_iter().map(spawn).collect();
        running.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let [[x0, y0], [x1, y1]] = [0, 1].map(|k| own(&Cpu::<f32>::default(), k));
    let sums = [x0.add(&x1).to_f64(), y0.add(&y1).to_f64()];
    for (sum, handed_out) in &results {
        assert_eq!(sum[..], sums);
        assert_eq!(handed_out, &[x1.to_f64(), y0.to_f64()]);
    }
}

/// Real NCCL with a single GPU, where there is one: that every call takes its arguments, and changes nothing.
#[test]
#[cfg(feature = "cuda")]
fn nccl_on_one_gpu() {
    let Ok(ordinal) = std::env::var("RANKGRAD_TEST_GPU") else {
        return println!("skipped: RANKGRAD_TEST_GPU");
    };
    let gpu = Cuda::open(ordinal.parse().expect("a number")).unwrap_or_else(|why| panic!("{why}"));
    match Nccl::join(&gpu, Arc::new(Alone)) {
        Err(Failed(why)) if why.starts_with("libnccl") => println!("skipped: {why}"),
        nccl => {
            let nccl = nccl.unwrap();
            let sums = nccl.all_reduce(own(&gpu, 0).into()).unwrap();
            let mut sums = sums.wait().unwrap(); // [50, 7], [3]
            nccl.broadcast(sums.iter_mut().map(|x| (0, x)).collect()).unwrap();
            for (x, y) in sums.iter().zip(own(&Cpu::<f32>::default(), 0)) {
                assert_eq!(x.to_f64(), y.to_f64());
            }
        }
    }
}

/// Where the processor is no x86-64 the fibers are made by the C library. The same there.
#[test]
fn the_other_way_to_switch_fibers() {
    let opened = Simulator::with(&kernels::source(), &kernels::all(), &["-DSIMULATOR_UCONTEXT"]);
    let Some(opened) = skip_without_compiler(opened) else { return };
    assert!(is_right::<f32>(&Cuda::on(Arc::new(opened)), 2, Work::All));
}

#[test]
fn a_missing_compiler_is_named() {
    // in another process, whose environment may be changed
    if std::env::var_os("RANKGRAD_TEST_CHILD").is_some() {
        let error = Simulator::new().map(drop).expect_err("no such compiler");
        assert!(error.starts_with("no C++ compiler: /nowhere/c++"), "{error}");
        return;
    }
    let mut child = std::process::Command::new(std::env::current_exe().expect("this test"));
    child.args(["--exact", "a_missing_compiler_is_named"]);
    let output =
        child.env("RANKGRAD_TEST_CHILD", "1").env("CXX", "/nowhere/c++").output().expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
