//! Gradients against finite differences, in f64: for the library's own ops and for those that users write.

use super::{Tape, Var};
use crate::tensor::{Cpu, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use std::fmt;

type T64 = Tensor<Cpu<f64>>;

/// The derivative of one input along a random direction, twice.
#[derive(Clone, Copy, Debug)]
pub struct GradCheck {
    /// Which input.
    pub input: usize,
    /// ⟨gradient, direction⟩.
    pub analytic: f64,
    /// The same from differences of the function's values.
    pub numeric: f64,
    /// |analytic − numeric| relative to the larger of the two; or to the gradient's typical component along a random
    /// direction, where that happens to be larger; or to 1e7 times the rounding error of the difference, so that a
    /// derivative that is zero shows an error of about 1e-7 and not of 1.
    pub error: f64,
}

impl fmt::Display for GradCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { input, analytic, numeric, error } = self;
        write!(
            f,
            "input {input}: tape {analytic:.9e}, finite difference {numeric:.9e}, relative error {error:.1e}"
        )
    }
}

/// Checks the tape's gradient of `f` with respect to each of `inputs`.
///
/// The output of `f` may have any shape: it is contracted with a random tensor. The difference is the five-point formula
/// (f(−2h) − 8f(−h) + 8f(h) − f(2h)) / 12h along a random unit direction, accurate to about 1e-10 for well-scaled smooth
/// functions; a correct gradient shows an error below 1e-6, a kink inside the step does not.
///
/// ```
/// use rankgrad::{autograd::gradcheck, tensor::{Cpu, Tensor}};
/// let x = Tensor::from_vec(&Cpu::<f64>::default(), [3], vec![0.1, -0.2, 0.3]); // [3]
/// for check in gradcheck(&[x], 0, |_, x| x[0].tanh() * x[0]) {
///     assert!(check.error < 1e-6, "{check}");
/// }
/// ```
pub fn gradcheck(
    inputs: &[T64],
    seed: u64,
    f: impl for<'t> Fn(&'t Tape<Cpu<f64>>, &[Var<'t, Cpu<f64>>]) -> Var<'t, Cpu<f64>>,
) -> Vec<GradCheck> {
    let cpu = Cpu::default();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut normal = |like: &T64| Tensor::from_fn(&cpu, like.shape(), |_| StandardNormal.sample(&mut rng));

    let tape = Tape::new(&cpu);
    let vars: Vec<_> = inputs.iter().map(|x| tape.leaf(x)).collect();
    let y = f(&tape, &vars);
    let weight = normal(&y.value()); // like y
    let weighted = y * tape.constant(&weight); // like y
    let size = weighted.value().norm();
    let mut grads = weighted.sum().backward();

    let loss = |inputs: &[T64]| {
        let tape = Tape::new(&cpu);
        let vars: Vec<_> = inputs.iter().map(|x| tape.constant(x)).collect();
        dot(&f(&tape, &vars).value(), &weight)
    };
    (0..inputs.len())
        .map(|i| {
            let grad = grads.take(vars[i].id(), &cpu); // like inputs[i]
            let direction = normal(&inputs[i]); // like inputs[i]
            let direction = direction.scale(1.0 / direction.norm()); // like inputs[i]
            let h = 1e-3 * (inputs[i].norm() / (inputs[i].len() as f64).sqrt()).max(1e-2);
            let at = |steps: f64| {
                let mut moved = inputs.to_vec();
                moved[i].axpby(steps * h, &direction, 1.0);
                loss(&moved)
            };
            let numeric = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * h);
            let analytic = dot(&grad, &direction);
            let typical = grad.norm() / (grad.len() as f64).sqrt();
            let rounding = f64::EPSILON * size / h;
            let scale = analytic.abs().max(numeric.abs()).max(typical).max(1e7 * rounding);
            let error = if scale == 0.0 { 0.0 } else { (analytic - numeric).abs() / scale };
            GradCheck { input: i, analytic, numeric, error }
        })
        .collect()
}

fn dot(a: &T64, b: &T64) -> f64 {
    a.buffer().iter().zip(b.buffer().iter()).map(|(a, b)| a * b).sum()
}
