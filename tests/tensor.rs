//! What holds of tensors as values: shared until written to, norms without overflow, finiteness.
//!
//! Not arithmetic: that is tests/ops.rs. Conversions to ndarray are tested where they are written.

mod common;

use common::{bits, config, gaussian, matrix, rng, tensor};
use proptest::prelude::*;
use rankgrad::tensor::{Backend, Cpu, Tensor};

#[test]
fn writing_to_a_clone_leaves_the_original() {
    // below and above the length from which buffers are recycled
    for len in [3usize, 5_000] {
        let x = Tensor::from_fn(&Cpu::<f32>::default(), [len], |i| i as f32); // [len]
        let before = bits(&x);
        let mut y = x.clone(); // [len]
        let mut z = x.reshape([1, len]); // [1, len]
        assert_eq!(x.buffer().as_ptr(), y.buffer().as_ptr(), "a clone is free");
        y.axpby(2.0, &x, 0.0);
        z.buffer_mut()[1] = -7.0;
        assert_eq!(bits(&x), before);
        assert_eq!((y.buffer()[1], z.buffer()[1]), (2.0, -7.0));
        let address = y.buffer().as_ptr();
        y.axpby(1.0, &x, 1.0);
        assert_eq!(y.buffer().as_ptr(), address, "an unshared tensor is written in place");
        assert_eq!(y.buffer()[1], 3.0);
    }
}

#[test]
fn a_prefix_is_read_as_a_tensor_of_its_own() {
    let cpu = Cpu::<f32>::default();
    for [rows, longer] in [[3, 7], [700, 2_000]] {
        let mut x = Tensor::from_fn(&cpu, [1, longer * 24], |i| (i % 31) as f32 - 15.0); // [1, longer·24]
        let first = x.prefix([rows, 24]); // [rows, 24]
        assert_eq!(x.buffer().as_ptr(), first.buffer().as_ptr(), "a prefix is free");
        let copy = Tensor::from_vec(&cpu, [rows, 24], x.to_vec()[..rows * 24].to_vec()); // [rows, 24]
        assert_eq!(bits(&first), bits(&copy));
        assert_eq!((first.norm(), Cpu::sum(&first)), (copy.norm(), Cpu::sum(&copy)));
        assert_eq!(bits(&first.add(&copy)), bits(&copy.scale(2.0)));
        assert_eq!(bits(&first.matmul(first.t())), bits(&copy.matmul(copy.t())));
        // written to, the longer one leaves the prefix as it was; alone again, it is written in place
        x.buffer_mut()[0] = 99.0;
        assert_eq!(bits(&first), bits(&copy));
        let address = x.buffer().as_ptr();
        drop(x.prefix([rows, 24]));
        x.buffer_mut()[0] = 98.0;
        assert_eq!(x.buffer().as_ptr(), address);
    }
}

#[test]
#[should_panic(expected = "prefix: [2, 3] holds 6 elements, [7] more")]
fn a_prefix_is_not_longer() {
    Tensor::zeros(&Cpu::<f32>::default(), [2, 3]).prefix([7]);
}

#[test]
fn axpby_with_beta_zero_does_not_read() {
    let x = Tensor::full(&Cpu::<f64>::default(), [4], 3.0); // [4]
    let mut y = Tensor::full(&Cpu::<f64>::default(), [4], f64::NAN); // [4]
    y.axpby(2.0, &x, 0.0);
    assert_eq!(y.to_vec(), [6.0; 4]);
}

#[test]
fn norms_at_the_ends_of_the_range() {
    let cpu = Cpu::<f64>::default();
    // 16,421 elements: several tasks
    for scale in [1.0, 1e200, 1e-200, 1e300, 1e-300, 5e-324] {
        for len in [1usize, 3, 16_421] {
            let x = Tensor::full(&cpu, [len], -scale); // [len]
            let want = scale * (len as f64).sqrt();
            // the smallest subnormal has no digits to spare: only the rounding of `want` itself
            assert!((x.norm() / want - 1.0).abs() < 1e-14, "{len} × {scale}: {} is not {want}", x.norm());
        }
    }
    let mixed = Tensor::from_vec(&cpu, [3], vec![3e200, 1e-200, -4e200]); // [3]
    assert!((mixed.norm() / 5e200 - 1.0).abs() < 1e-15);
    assert_eq!(Tensor::zeros(&cpu, [5]).norm(), 0.0);
    let tiny = Tensor::full(&Cpu::<f32>::default(), [4], 1e-45); // [4]
    assert_eq!(tiny.norm(), 2.0 * f64::from(1e-45f32));
    let huge = Tensor::full(&Cpu::<f32>::default(), [4], 3e38); // [4]
    assert_eq!(huge.norm(), 2.0 * f64::from(3e38f32));
}

/// A Gram matrix is symmetric to the bit, whichever half was computed; sizes around tiles, blocks, and what is shared out.
#[test]
fn symmetric_products_are_those_of_the_whole() {
    for (p, r) in [(1, 1), (7, 5), (40, 33), (300, 96), (129, 131), (20, 400)] {
        let x = tensor::<f32>(&gaussian(&mut rng(p as u64), p, r)); // [p, r]
        let whole = x.t().matmul(&x); // [r, r]
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut g = Tensor::scratch(x.device(), [r, r]); // [r, r]
            pool.install(|| Cpu::gemm_symmetric(&[x.t()], &[(&x).into()], &mut [&mut g]));
            assert!(bits(&g) == bits(&whole), "[{p}, {r}] with {threads} threads");
        }
    }
}

#[test]
fn finiteness() {
    let cpu = Cpu::<f64>::default();
    let with = |odd: f64| Tensor::from_vec(&cpu, [3], vec![1.0, odd, -2.0]); // [3]
    assert!(with(0.0).is_finite());
    assert!(with(f64::MAX).is_finite(), "a norm beyond the range does not make its elements infinite");
    assert!(Tensor::full(&cpu, [9], f64::MAX).is_finite());
    for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert!(!with(odd).is_finite(), "{odd}");
    }
    assert!(with(f64::NAN).norm().is_nan());
    assert_eq!(with(f64::NEG_INFINITY).norm(), f64::INFINITY);
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn products_equal_nalgebras(m in common::size(), k in common::size(), n in common::size(), seed: u64) {
        let mut rng = rng(seed);
        let (a, b) = (gaussian(&mut rng, m, k), gaussian(&mut rng, k, n));
        let want = &a * &b;
        // k products of size 1, summed in another order
        let allowed = 1e-15 * (m * k * n) as f64;
        for (a, ta) in [(a.clone(), false), (a.transpose(), true)] {
            for (b, tb) in [(b.clone(), false), (b.transpose(), true)] {
                let (a, b) = (tensor::<f64>(&a), tensor::<f64>(&b)); // [m, k], [k, n] or transposed
                let c = match (ta, tb) {
                    (false, false) => a.matmul(&b),
                    (true, false) => a.t().matmul(&b),
                    (false, true) => a.matmul(b.t()),
                    (true, true) => a.t().matmul(b.t()),
                }; // [m, n]
                prop_assert!((matrix(&c) - &want).norm() <= allowed);
            }
        }
    }
}

#[test]
fn the_identity_changes_no_matrix() {
    let x = Tensor::from_fn(&Cpu::<f32>::default(), [5, 4], |i| i as f32 + 1.0); // [5, 4]
    assert_eq!(bits(&x.matmul(&Tensor::identity(x.device(), 4))), bits(&x));
}
