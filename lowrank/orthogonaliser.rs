//! The ways to orthogonalise a momentum, as values that an optimizer takes as a setting; docs/orthogonalisers.md compares them.
//!
//! Not here: the iteration itself, which the first two share (newton_schulz.rs).
//! Letters: M [p, q] momentum, O its orthogonalisation, r = min(p, q), U·Σ·Vᵀ the SVD of M, σ its singular values.

use super::newton_schulz::iterate;
use super::pair::{from_nalgebra, to_nalgebra};
use super::quintic::{bounds, flops, odd_quintic};
use super::svd::svd;
use super::{NewtonSchulz, Space};
use crate::tensor::{Backend, Bf16, Element, Tensor, cast_all, same_shape};
use rayon::prelude::*;

/// How M becomes O.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Orthogonaliser {
    /// One polynomial, repeated: the paper's Algorithm 2, and the default.
    NewtonSchulz(NewtonSchulz),
    /// The composition of quintics that is, but for a cushion, nearest to 1 on [1e-3, 1] (Amsel et al. 2025, arXiv 2505.16932): [`POLAR_EXPRESS`],
    /// then (15/8, −10/8, 3/8) for steps beyond the table. Without the paper's safety factor 1.01, which is for bfloat16. Its first
    /// steps are steep at 1, so that in f32 rounding can lift a matrix of rank 1 by up to 1e-3.
    PolarExpress { steps: usize, space: Space },
    /// O = U·Vᵀ itself, from an f64 SVD on the host; what is below rounding in M (max(p, q)·2⁻⁵² of its largest σ) counts as 0.
    /// Slow: for comparison.
    PolarFactor,
}

impl Default for Orthogonaliser {
    fn default() -> Self {
        Self::NewtonSchulz(NewtonSchulz::default())
    }
}

/// The coefficients (a, b, c) of Polar Express's first steps, for singular values in [1e-3, 1]. Step t minimises |1 − p| on
/// [max(l, 0.0240733·u), u], [l, u] being where the steps before send [1e-3, 1], and is scaled so that p(l) + p(u) = 2 (the
/// paper's Algorithm 1 and its appendix; 0.0240733 is its cushion). `python3 benches/polar_express.py` derives them anew.
pub const POLAR_EXPRESS: [[f64; 3]; 7] = [
    [8.28721201814563, -23.595886519098837, 17.300387312530933],
    [4.107059111542203, -2.9478499167379106, 0.5448431082926601],
    [3.9486908534822946, -2.908902115962949, 0.5518191394370137],
    [3.3184196573706015, -2.488488024314874, 0.51004894012372],
    [2.300652019954817, -1.6689039845747493, 0.4188073119525673],
    [1.891301407787398, -1.2679958271945868, 0.37680408948524835],
    [1.8750014808534479, -1.2500016453999487, 0.3750001645474248],
];

impl Orthogonaliser {
    /// O for each M in a batch of one shape [p, q]; 0 for M = 0.
    ///
    /// # Panics
    /// If the matrices are not of one shape.
    #[track_caller]
    pub fn apply<B: Backend>(&self, batch: &[&Tensor<B>]) -> Vec<Tensor<B>> {
        match *self {
            Self::NewtonSchulz(NewtonSchulz { space, .. }) | Self::PolarExpress { space, .. } => {
                match (space, batch.first()) {
                    (Space::Bf16, Some(first)) => {
                        let narrow = cast_all(batch, &first.device().narrower()); // [p, q] each
                        let narrow: Vec<_> = narrow.iter().collect();
                        let os = iterate(&narrow, &self.coefficients(), Space::Plain); // [p, q] each
                        cast_all(&os.iter().collect::<Vec<_>>(), first.device()) // [p, q] each
                    }
                    _ => iterate(batch, &self.coefficients(), space),
                }
            }
            Self::PolarFactor => polar_factors(batch),
        }
    }

    /// (a, b, c) of each step; none for the polar factor.
    pub fn coefficients(&self) -> Vec<[f64; 3]> {
        match self {
            Self::NewtonSchulz(how) => how.schedule(),
            Self::PolarExpress { steps, .. } => {
                let limit = std::iter::repeat([15.0 / 8.0, -10.0 / 8.0, 3.0 / 8.0]);
                POLAR_EXPRESS.into_iter().chain(limit).take(*steps).collect()
            }
            Self::PolarFactor => Vec::new(),
        }
    }

    /// Where a singular value of M goes, in exact arithmetic; `x` = σ/‖M‖_F, between 0 and 1.
    pub fn map(&self, x: f64) -> f64 {
        match self {
            Self::PolarFactor => f64::from(x > 0.0),
            _ => self.coefficients().into_iter().fold(x, |x, p| odd_quintic(p, x)),
        }
    }

    /// A proven bound of ‖O‖₂ in exact arithmetic: 1 for the polar factor; otherwise the steps' polynomials are followed from
    /// [0, 1] on, each maximum where its derivative vanishes or at the end of its interval. Infinite if they diverge.
    pub fn norm_bound(&self) -> f64 {
        bounds(&self.coefficients()).0
    }

    /// What rounding may add to [`Self::norm_bound`], relative to it, for elements of unit roundoff `u`: ten roundings, amplified
    /// by the steepest slope that each step's polynomial has where it is used. Argued, and tested against an SVD
    /// (tests/spectron.rs, docs/orthogonalisers.md), not proven. Default, in f32: 5.1e-4. For the polar factor 10·r·u.
    pub fn rounding(&self, u: f64, r: usize) -> f64 {
        match self {
            Self::PolarFactor => 10.0 * r as f64 * u,
            _ => 10.0 * u.max(self.unit_roundoff()) * bounds(&self.coefficients()).1.max(1.0),
        }
    }

    /// That of what it computes in, if it may be coarser than what it is given.
    fn unit_roundoff(&self) -> f64 {
        match *self {
            Self::NewtonSchulz(NewtonSchulz { space, .. }) | Self::PolarExpress { space, .. }
                if space == Space::Bf16 =>
            {
                Bf16::UNIT_ROUNDOFF
            }
            _ => 0.0,
        }
    }

    /// FLOPs for one matrix [p, q], a multiply-add counting as two. For the polar factor by the leading terms, at eight sweeps
    /// of Jacobi: QR with its Q 4pqr, two products 4pqr, 18r per pair of columns and sweep, 72r³.
    pub fn flops(&self, p: usize, q: usize) -> f64 {
        match *self {
            Self::NewtonSchulz(NewtonSchulz { space, .. }) | Self::PolarExpress { space, .. } => {
                flops(&self.coefficients(), space, p, q)
            }
            Self::PolarFactor => {
                let r = p.min(q) as f64;
                8.0 * (p * q) as f64 * r + 72.0 * r.powi(3)
            }
        }
    }
}

/// U·Vᵀ of each matrix.
#[track_caller]
fn polar_factors<B: Backend>(batch: &[&Tensor<B>]) -> Vec<Tensor<B>> {
    for m in batch {
        m.shape().matrix("polar factor");
        same_shape("polar factor", batch[0], m);
    }
    let one = |m: &&Tensor<B>| {
        if !m.is_finite() {
            return m.scale(f64::NAN); // like m
        }
        let (mut u, sigma, v) = svd(&to_nalgebra(m));
        let floor = m.rows().max(m.cols()) as f64 * f64::EPSILON * sigma.first().copied().unwrap_or(0.0);
        for (j, s) in sigma.iter().enumerate() {
            if *s <= floor {
                u.column_mut(j).fill(0.0);
            }
        }
        from_nalgebra(m.device(), &(u * v.transpose())) // [p, q]
    };
    batch.par_iter().map(one).collect()
}
