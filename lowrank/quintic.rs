//! The polynomials of Newton–Schulz as such: what a schedule of them does to singular values, in which groups its steps run in
//! Gram space, and what that costs. Not the iteration on matrices (newton_schulz.rs).
//!
//! Letters: p(x) = ax + bx³ + cx⁵ one step's map of a singular value; a schedule is a list of such (a, b, c); M [p, q] a matrix,
//! r = min(p, q), G its Gram matrix [r, r].

use super::Space;

/// p(x) = ax + bx³ + cx⁵.
pub(super) fn odd_quintic([a, b, c]: [f64; 3], x: f64) -> f64 {
    x * (a + x * x * (b + x * x * c))
}

/// Bounds what one p after the other does to [0, 1], in exact arithmetic: |x| at the end, and the derivative of x at the end
/// by x at the start. Each p sends [0, s] into [0, max |p|], and |p| is largest at s or where p'(x) = a + 3bx² + 5cx⁴ = 0;
/// |p'| at 0, at s, or where p''(x) = 6bx + 20cx³ = 0.
pub(super) fn bounds(schedule: &[[f64; 3]]) -> (f64, f64) {
    schedule.iter().fold((1.0, 1.0), |(s, slope), &[a, b, c]| {
        // 5c·y² + 3b·y + a = 0, y = x²; one root as q/(5c), the other as a/q, so that nothing cancels, also where c is 0
        let root = (9.0 * b * b - 20.0 * a * c).sqrt(); // NaN: p is monotone
        let q = -0.5 * (3.0 * b + root.copysign(b));
        let stationary = [q / (5.0 * c), a / q].map(f64::sqrt);
        let inflection = (-0.3 * b / c).sqrt();
        let largest = |f: &dyn Fn(f64) -> f64, at: &[f64]| -> f64 {
            let inside = at.iter().filter(|x| (0.0..s).contains(*x)).chain([&0.0, &s]);
            // NaN: ∞ − ∞ or 0·∞ on the way
            let size = |&x: &f64| if f(x).is_nan() { f64::INFINITY } else { f(x).abs() };
            inside.map(size).fold(0.0, f64::max)
        };
        let derivative = |x: f64| a + x * x * (3.0 * b + x * x * 5.0 * c);
        let steepest = largest(&derivative, &[inflection]);
        (largest(&|x| odd_quintic([a, b, c], x), &stationary), slope * steepest)
    })
}

/// How much errors of G may grow between restarts. Three steps of the default coefficients grow it by 3.4445⁴ = 141.
const DRIFT: f64 = 200.0;

/// The steps between restarts. From the end, since errors made early are amplified by every step that follows.
pub(super) fn groups<'a>(
    mut schedule: &'a [[f64; 3]],
    space: Space,
    p: usize,
    q: usize,
) -> Vec<&'a [[f64; 3]]> {
    let each = schedule.chunks(1).collect(); // a restart in every step: the plain form
    if space != Space::Gram {
        return each;
    }
    let mut groups: Vec<&'a [[f64; 3]]> = Vec::new();
    while let Some(last) = schedule.len().checked_sub(1) {
        let (mut first, mut growth) = (last, 1.0);
        while first > 0 {
            growth *= schedule[first - 1][0].powi(2);
            if growth.is_nan() || growth > DRIFT {
                break;
            }
            first -= 1;
        }
        groups.insert(0, &schedule[first..]);
        schedule = &schedule[..first];
    }
    if flops_of(&groups, p, q) < flops_of(&each, p, q) { groups } else { each }
}

/// FLOPs of one matrix [p, q]: norm and scaling 3pq; per group the Gram matrix and the product back, 2pqr each; per step G²
/// 2r³ and aI + bG + cG² 3r² + r; per step but the first of a group P·Q 2r³, and as often G·Q·Q 4r³.
pub(super) fn flops(schedule: &[[f64; 3]], space: Space, p: usize, q: usize) -> f64 {
    flops_of(&groups(schedule, space, p, q), p, q)
}

fn flops_of(groups: &[&[[f64; 3]]], p: usize, q: usize) -> f64 {
    let (pq, r) = ((p * q) as f64, p.min(q) as f64);
    let group = |group: &&[[f64; 3]]| {
        let (steps, inner) = (group.len() as f64, (group.len() - 1) as f64);
        4.0 * pq * r + steps * (2.0 * r.powi(3) + 3.0 * r * r + r) + inner * 6.0 * r.powi(3)
    };
    3.0 * pq + groups.iter().map(group).sum::<f64>()
}
