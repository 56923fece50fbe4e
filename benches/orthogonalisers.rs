//! Prints the table of docs/orthogonalisers.md: `cargo bench --bench orthogonalisers`. No timings: those are in the lab's `bench`.
//!
//! M = U·Σ·Vᵀ [384, 96] with U, V drawn at random and σ from 1 down to 1/condition in equal ratios, so the SVD of M, and with
//! it every answer, is known in f64 before M is rounded to f32. Letters: O the output, p the map of the singular values.

use nalgebra::{DMatrix, DVector};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rankgrad::lowrank::{NewtonSchulz, Orthogonaliser, Space, haar};
use rankgrad::tensor::{Cpu, Scalar, Tensor};

const P: usize = 384;
const R: usize = 96;

fn main() {
    let jordan = NewtonSchulz::default();
    let plain = Space::Plain;
    let all = [
        ("Newton–Schulz, plain", Orthogonaliser::NewtonSchulz(NewtonSchulz { space: plain, ..jordan })),
        ("Newton–Schulz, Gram", Orthogonaliser::NewtonSchulz(jordan)),
        ("Polar Express 5, Gram", Orthogonaliser::PolarExpress { steps: 5, space: Space::Gram }),
        ("Polar Express 8, plain", Orthogonaliser::PolarExpress { steps: 8, space: plain }),
        ("Polar Express 8, Gram", Orthogonaliser::PolarExpress { steps: 8, space: Space::Gram }),
        ("polar factor", Orthogonaliser::PolarFactor),
    ];
    println!(
        "| orthogonaliser | MFLOP | bound of ‖O‖ | condition | type | σ max | σ min | ‖O − p(M)‖ | ‖O − UVᵀ‖ |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (name, how) in all {
        for condition in [0, 2, 4, 6, 8] {
            row::<f32>(name, how, condition, "f32");
            row::<f64>(name, how, condition, "f64");
        }
    }
}

fn row<T: Scalar>(name: &str, how: Orthogonaliser, condition: i32, kind: &str) {
    let rng = &mut ChaCha8Rng::seed_from_u64(1);
    let frame = |rows, rng: &mut _| DMatrix::from_vec(rows, R, haar(rng, rows, R).concat());
    let (u, v) = (frame(P, rng), frame(R, rng)); // [p, r], [r, r]
    let sigma: Vec<f64> =
        (0..R).map(|i| 10f64.powf(-f64::from(condition) * i as f64 / (R - 1) as f64)).collect();
    let norm = DVector::from_column_slice(&sigma).norm();
    let with = |f: &dyn Fn(f64) -> f64| {
        let values = DVector::from_iterator(R, sigma.iter().map(|&s| f(s)));
        &u * DMatrix::from_diagonal(&values) * v.transpose()
    };
    let m = with(&|s| s);
    let m = Tensor::from_fn(&Cpu::<T>::default(), [P, R], |i| T::of(m[(i / R, i % R)])); // [p, r]
    let o = matrix(&how.apply(&[&m])[0]);
    let eigen = (o.transpose() * &o).symmetric_eigen().eigenvalues;
    let error = |want: DMatrix<f64>| {
        let e = &o - want;
        (e.transpose() * &e).symmetric_eigen().eigenvalues.max().max(0.0).sqrt()
    };
    println!(
        "| {name} | {:.1} | {:.5} | 1e{condition} | {kind} | {:.5} | {:.1e} | {:.0e} | {:.0e} |",
        how.flops(P, R) / 1e6,
        how.norm_bound(),
        eigen.max().sqrt(),
        eigen.min().max(0.0).sqrt(),
        error(with(&|s| how.map(s / norm))),
        error(with(&|_| 1.0)),
    );
}

fn matrix<T: Scalar>(x: &Tensor<Cpu<T>>) -> DMatrix<f64> {
    DMatrix::from_row_slice(x.rows(), x.cols(), &x.to_f64())
}
