//! A model of your own: a residual network that forecasts a chaotic series, with factor pairs in its blocks, trained by Spectron.
//!
//! The series (Mackey & Glass 1977) grows by 0.2·p/(1 + p¹⁰) − 0.1·x per step, p being x 17 steps ago. From 24 values in a row
//! the network says what x will be 10 steps later. It is judged on a later part of the series against two forecasts that need no
//! network: "no change", and the linear one that least squares find on the same windows. One seed; the rates are a first guess.
//! Letters: N windows, L values seen, d width (2d inside a block), r rank.
//!
//! ```text
//! $ cargo run --release --example 07_own_model
//! error on 500 later windows, in units of the series' deviation, from 20032 parameters
//! no change    1.1517
//! linear       0.4038
//! the network  0.0030
//! ```

use nalgebra::DMatrix;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rankgrad::{autograd::*, lowrank::*, tensor::*};

type B = Cpu<f32>;
const SEEN: usize = 24;
const D: usize = 64;

struct Network {
    input: Dense,
    blocks: [[Pair; 2]; 3],
    output: Dense,
}

impl Network {
    /// From x [N, L] the value to come [N, 1]: the last one seen, plus what the network says, which at first is nothing.
    fn forecast<'t>(&self, w: &ParamVars<'t, B>, x: Var<'t, B>) -> Var<'t, B> {
        let mut h = x.linear(w[self.input]); // [N, d]
        for [up, down] in self.blocks {
            let inside = h.lowrank_linear(w[up].a, w[up].b).silu(); // [N, 2d]
            h = h + inside.lowrank_linear(w[down].a, w[down].b); // [N, d]
        }
        x.slice(SEEN - 1..SEEN) + h.linear(w[self.output]) // [N, 1]
    }
}

fn main() {
    let (cpu, ahead, steps) = (B::default(), 10, 600);
    let mut series = vec![1.2f64; 18];
    for t in 17..2000 {
        let (x, p) = (series[t], series[t - 17]);
        series.push(x + 0.2 * p / (1.0 + p.powi(10)) - 0.1 * x);
    }
    // what is seen of a time t, and what comes after; 0.9 and 0.25 are about the mean and the deviation
    let value = |t: usize| ((series[t] - 0.9) / 0.25) as f32;
    let seen = |t: usize, n: usize| Tensor::from_fn(&cpu, [n, SEEN], |i| value(t + i / SEEN + i % SEEN)); // [N, L]
    let next = |t: usize, n: usize| Tensor::from_fn(&cpu, [n, 1], |i| value(t + i + SEEN - 1 + ahead)); // [N, 1]
    let (x, y, later, truth) = (seen(300, 1000), next(300, 1000), seen(1400, 500), next(1400, 500));

    let mut params = Params::default();
    let rng = &mut ChaCha8Rng::seed_from_u64(1);
    let input = params.dense("input", gaussian(&cpu, rng, [D, SEEN], 0.2)); // [d, L]
    let output = params.dense("output", Tensor::zeros(&cpu, [1, D])); // [1, d]
    let mut pair = |name, s| params.pair(name, init_pair(&cpu, rng, s, D / 4, 0.1, PairInit::Spectral)); // [m, r], [n, r]
    let block = |i| [pair(format!("{i}.up"), [2 * D, D]), pair(format!("{i}.down"), [D, 2 * D])];
    let network = Network { input, blocks: [0, 1, 2].map(block), output };
    let mut optimizer = Optimizer::spectron(&params);
    for step in 0..steps {
        let tape = Tape::new(&cpu);
        let w = params.on(&tape);
        let error = network.forecast(&w, tape.constant(&x)) - tape.constant(&y); // [N, 1]
        let grads = w.gradients((error * error).mean().backward());
        let left = 1.0 - step as f64 / steps as f64; // the rates fall in a straight line
        optimizer.step(&mut params, &grads, 0.1 * left, 0.003 * left);
    }

    let matrix = |x: &Tensor<B>| DMatrix::from_row_slice(x.rows(), x.cols(), &x.to_f64());
    let (a, tape) = (matrix(&x), Tape::new(&cpu)); // [N, L]
    let normal = a.tr_mul(&a).cholesky().expect("windows that differ"); // the normal equations of least squares
    let linear = matrix(&later) * normal.solve(&a.tr_mul(&matrix(&y))); // [500, 1]
    let ours = network.forecast(&params.constants_on(&tape), tape.constant(&later)).value(); // [500, 1]
    let error = |forecast: DMatrix<f64>| (forecast - matrix(&truth)).norm() / 500f64.sqrt();
    println!(
        "error on 500 later windows, in units of the series' deviation, from {} parameters",
        params.count()
    );
    println!("no change    {:.4}", error(matrix(&later).columns(SEEN - 1, 1).into_owned()));
    println!("linear       {:.4}", error(linear));
    println!("the network  {:.4}", error(matrix(&ours)));
}
