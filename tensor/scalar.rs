//! The element types: what every backend's have in common ([`Element`]), and what the CPU needs of its own, f32 and f64
//! ([`Scalar`]): arithmetic from num-traits, a matrix product, a vectorisable exp.
//!
//! [`Bf16`] is no `Scalar`: the host only converts it. It is our own because that is all that is asked of it, in one rounding
//! from f64, and a crate for it would bring another.

use super::cpu::{Product, dgemm, sgemm};
use num_traits::{Float, NumAssign};
use std::fmt::{self, Debug, Display};

/// An element type of a backend, as the host sees it.
pub trait Element: Copy + Default + PartialEq + Debug + Display + Send + Sync + 'static {
    /// The largest relative error of a rounding: half the distance from 1 to the next number.
    const UNIT_ROUNDOFF: f64;
    /// Rounds an f64 to this type, to nearest, ties to even.
    fn of(x: f64) -> Self;
    /// Widens to f64.
    fn f64(self) -> f64;
}

/// An element type of the CPU backend.
pub trait Scalar: Element + Float + NumAssign {
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
        impl Element for $t {
            const UNIT_ROUNDOFF: f64 = $t::EPSILON as f64 / 2.0;
            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn f64(self) -> f64 {
                self as f64
            }
        }
        impl Scalar for $t {
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

/// The upper half of an f32: its sign, its 8 bits of exponent and so its range, and 8 significant bits.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Bf16(u16);

impl Bf16 {
    /// From its bits.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }
    /// Its bits.
    pub const fn to_bits(self) -> u16 {
        self.0
    }
}

impl From<f32> for Bf16 {
    /// To nearest, ties to even; a NaN to the one that GPUs make of it.
    fn from(x: f32) -> Self {
        let bits = x.to_bits();
        let odd = (bits >> 16) & 1; // a tie goes up only where that makes the result even; a carry into the exponent is right
        if x.is_nan() { Self(0x7fff) } else { Self(((bits + 0x7fff + odd) >> 16) as u16) }
    }
}

impl From<Bf16> for f32 {
    fn from(x: Bf16) -> f32 {
        f32::from_bits(u32::from(x.0) << 16)
    }
}

impl Element for Bf16 {
    const UNIT_ROUNDOFF: f64 = 1.0 / 256.0;
    fn of(x: f64) -> Self {
        // Through f32 by rounding to odd (towards zero, and the last bit says whether something was lost): what is no tie of
        // bf16's then does not become one, and two roundings are as good as one.
        let near = x as f32;
        let beyond = f64::from(near).abs() > x.abs();
        let lost = f64::from(near) != x;
        Self::from(f32::from_bits((near.to_bits() - u32::from(beyond)) | u32::from(lost)))
    }
    fn f64(self) -> f64 {
        f32::from(self).into()
    }
}

impl PartialEq for Bf16 {
    /// As numbers: 0 = −0, and NaN is not itself.
    fn eq(&self, other: &Self) -> bool {
        f32::from(*self) == f32::from(*other)
    }
}
impl Debug for Bf16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Debug::fmt(&f32::from(*self), f)
    }
}
impl Display for Bf16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Display::fmt(&f32::from(*self), f)
    }
}

/// eˣ in f32 within 2 ulp on [−87.3, 88.7]; below it goes to 0, above to infinity; NaN stays NaN.
///
/// x = n·ln 2 + t with |t| ≤ ln 2 / 2 (Cody & Waite's two-part ln 2), eᵗ by its Taylor polynomial of degree 7 (remainder
/// below 2⁻²⁷), 2ⁿ through the exponent bits in two halves so that subnormal results come out too. Multiplied and added at once:
/// with AVX-512 all of SwiGLU takes a third less time; processors without such an instruction call the C library's.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4; // 355/512, exact in 9 bits: n·LN2_HI is exact
    const LN2_LO: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer
    let x = x.clamp(-104.0, 89.0);
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let t = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p.mul_add(t, c);
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
    fn every_bf16_comes_back_from_f32_and_f64() {
        for bits in 0..=u16::MAX {
            let x = Bf16::from_bits(bits);
            if x.f64().is_nan() {
                assert!(bits & 0x7fff > 0x7f80 && f32::from(Bf16::of(x.f64())).is_nan());
                continue;
            }
            assert_eq!([Bf16::from(f32::from(x)).to_bits(), Bf16::of(x.f64()).to_bits()], [bits; 2]);
        }
    }

    /// Half way between neighbours, beside it by the least that f32 has, and by the least that f64 has.
    #[test]
    fn bf16_is_rounded_to_nearest_and_ties_to_even() {
        for bits in 0..0x7f80u16 {
            let (low, high) = (bits, bits + 1); // 0x7f80 is infinity: what lies half way to it, or beyond, is rounded to it
            let even = if low % 2 == 0 { low } else { high };
            let middle = f32::from_bits((u32::from(low) << 16) | 0x8000);
            for sign in [1.0, -1.0] {
                let negative = if sign < 0.0 { 0x8000 } else { 0 };
                let cases = [(middle.next_down(), low), (middle, even), (middle.next_up(), high)];
                for (x, want) in cases {
                    let got = [Bf16::from(sign * x), Bf16::of(f64::from(sign * x))].map(Bf16::to_bits);
                    assert_eq!(got, [want | negative; 2], "{x:e}");
                }
                let middle = f64::from(middle);
                for (x, want) in [(middle.next_down(), low), (middle.next_up(), high)] {
                    assert_eq!(Bf16::of(f64::from(sign) * x).to_bits(), want | negative, "{x:e}");
                }
            }
        }
        assert_eq!(Bf16::of(1e300).to_bits(), 0x7f80);
        assert_eq!(Bf16::of(1e-300).to_bits(), 0);
        assert_eq!(1.0 + Bf16::UNIT_ROUNDOFF, f64::from(f32::from_bits(0x3f80_8000)));
        assert_eq!(format!("{} {:?}", Bf16::of(1.5), Bf16::of(-2.0)), "1.5 -2.0");
    }

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
