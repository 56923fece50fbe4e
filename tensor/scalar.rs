//! The element types, f32 and f64: arithmetic from num-traits, the matrix product of the CPU, a vectorisable exp.

use super::cpu::{Product, dgemm, sgemm};
use num_traits::{Float, NumAssign};
use std::fmt::{Debug, Display};

/// An element type of the CPU backend.
pub trait Scalar: Float + NumAssign + Default + Debug + Display + Send + Sync + 'static {
    /// Rounds an f64 to this type.
    fn of(x: f64) -> Self;
    /// Widens to f64.
    fn f64(self) -> f64;
    /// eˣ without branches or calls, so that loops over it vectorise.
    fn fast_exp(self) -> Self;
    /// The free list that buffers of this type return to.
    fn pool() -> &'static super::cpu::Pool<Self>;

    /// One matrix product.
    ///
    /// # Safety
    /// Each pointer must be valid for every element its sizes and strides reach, and C must not overlap A or B.
    unsafe fn gemm(product: Product<Self>);
}

macro_rules! scalar {
    ($t:ident, $gemm:ident, $exp:expr) => {
        impl Scalar for $t {
            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn fast_exp(self) -> Self {
                $exp(self)
            }
            fn pool() -> &'static super::cpu::Pool<Self> {
                static POOL: super::cpu::Pool<$t> = super::cpu::Pool::new();
                &POOL
            }
            unsafe fn gemm(product: Product<Self>) {
                // SAFETY: the caller's promise is the callee's condition
                unsafe { $gemm(product) }
            }
        }
    };
}

scalar!(f32, sgemm, exp_f32);
scalar!(f64, dgemm, f64::exp);

/// eˣ in f32 within 2 ulp on [−87.3, 88.7]; below it goes to 0, above to infinity; NaN stays NaN.
///
/// x = n·ln 2 + t with |t| ≤ ln 2 / 2 (Cody & Waite's two-part ln 2), eᵗ by its Taylor polynomial of degree 7 (remainder
/// below 2⁻²⁷), 2ⁿ through the exponent bits in two halves so that subnormal results come out too.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4; // 355/512, exact in 9 bits: n·LN2_HI is exact
    const LN2_LO: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer
    let x = x.clamp(-104.0, 89.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let t = x - n * LN2_HI - n * LN2_LO;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * t + c;
    }
    // the integer stands in the low bits of `rounded`; a NaN leaves rubbish here and NaN in p
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let pow2 = |e: i32| f32::from_bits((e.wrapping_add(127) as u32) << 23);
    p * pow2(half) * pow2(n.wrapping_sub(half))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_2_ulp_of_f64() {
        let mut worst = 0.0f64;
        for i in -873_000..887_000 {
            let x = i as f32 * 1e-4;
            let want = (x as f64).exp();
            let ulp = (want as f32).next_up() as f64 - (want as f32) as f64;
            worst = worst.max((exp_f32(x) as f64 - want).abs() / ulp);
        }
        assert!(worst < 2.0, "worst error {worst} ulp");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(-1e30), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f32(200.0), f32::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan());
        let tiny = exp_f32(-100.0); // subnormal
        assert!((tiny as f64 / (-100f64).exp() - 1.0).abs() < 0.05, "{tiny}");
    }
}
