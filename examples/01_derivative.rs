//! A derivative: record a few operations on a tape, then walk the tape backward.
//!
//! y = Σ x²·tanh(x) at three points. The tape's gradient stands beside the formula 2x·tanh(x) + x²·(1 − tanh²(x)).
//! Letters: x input, y result (one number), dy/dx its gradient, of the shape of x.
//!
//! ```text
//! $ cargo run --release --example 01_derivative
//! y = 3.2100
//! recorded: leaf, mul, tanh, mul, sum
//! x = -1.0   dy/dx: tape 1.9432, formula 1.9432
//! x =  0.5   dy/dx: tape 0.6587, formula 0.6587
//! x =  2.0   dy/dx: tape 4.1387, formula 4.1387
//! ```

use rankgrad::{
    autograd::Tape,
    tensor::{Cpu, Tensor},
};

type B = Cpu<f32>;

fn main() {
    let cpu = B::default();
    let tape = Tape::new(&cpu);
    let points = Tensor::from_vec(&cpu, [3], vec![-1.0, 0.5, 2.0]); // [3]

    let x = tape.leaf(&points); // [3], an input whose gradient is wanted
    let y = (x * x * x.tanh()).sum(); // [1]; x is used three times, and its gradients add up
    println!("y = {:.4}", y.value().item());
    println!("recorded: {}", tape.ops().join(", "));

    let grads = y.backward(); // consumes the tape, last op first
    let gradient = grads.get(x).expect("y depends on x").to_vec(); // [3]
    for (x, tape) in points.to_vec().into_iter().zip(gradient) {
        let formula = 2.0 * x * x.tanh() + x * x * (1.0 - x.tanh().powi(2));
        println!("x = {x:4.1}   dy/dx: tape {tape:.4}, formula {formula:.4}");
    }
}
