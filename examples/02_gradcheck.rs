//! An op of your own, and a check of its gradient. `tape.record` takes a value together with its backward; `gradcheck`
//! compares that backward with differences of the op's values, in f64, along one random direction per input.
//!
//! The op is softplus(x) = ln(1 + eˣ), whose derivative is the logistic function σ(x) = 1/(1 + e⁻ˣ). Then the same op with a
//! gradient that is wrong by 0.1 %. Not here: an op for every backend, which goes through `Backend` (CONTRIBUTING.md).
//!
//! ```text
//! $ cargo run --release --example 02_gradcheck
//! softplus: right
//!   tape -0.099092, finite difference -0.099092, relative error below 1e-6: true
//! its gradient 0.1 % too large: WRONG
//!   tape -0.099191, finite difference -0.099092, relative error below 1e-6: false
//! ```

use rankgrad::{
    autograd::{GradCheck, Var, gradcheck},
    tensor::{Cpu, Tensor},
};

type B = Cpu<f64>; // differences need the digits

/// ln(1 + eˣ); the derivative is multiplied by `error`, which ought to be 1.
fn softplus(x: Var<'_, B>, error: f64) -> Var<'_, B> {
    let input = x.value(); // like x
    let map = |t: &Tensor<B>, f: &dyn Fn(f64) -> f64| {
        Tensor::from_vec(t.device(), t.shape(), t.to_vec().into_iter().map(f).collect()) // like t
    };
    let y = map(&input, &|x| x.exp().ln_1p()); // like x
    let ix = x.id();
    x.tape().record("softplus", &[x], y, move |dy, grads| {
        let slope = map(&input, &|x| error / (1.0 + (-x).exp())); // like x
        let dx = dy.to_vec().iter().zip(slope.to_vec()).map(|(dy, s)| dy * s).collect();
        grads.add(ix, Tensor::from_vec(dy.device(), dy.shape(), dx)); // like x
    })
}

fn check(error: f64) -> GradCheck {
    let x = Tensor::from_fn(&B::default(), [2, 3], |i| i as f64 - 2.5); // [2, 3]
    gradcheck(&[x], 1, |_, x| softplus(x[0], error))[0]
}

fn main() {
    for (name, error) in [("softplus", 1.0), ("its gradient 0.1 % too large", 1.001)] {
        let result = check(error);
        let verdict = if result.error < 1e-6 { "right" } else { "WRONG" };
        println!("{name}: {verdict}");
        println!(
            "  tape {:.6}, finite difference {:.6}, relative error below 1e-6: {}",
            result.analytic,
            result.numeric,
            result.error < 1e-6
        );
    }
}
