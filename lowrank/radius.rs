//! How far the factors may move so that W = A·Bᵀ moves by at most η: two answers to one inequality.
//!
//! Letters: σ spectral norm, η learning rate, ρ radius: how far a factor moves, in spectral norm.

/// The paper's ρ = η / (σ_A + σ_B + 1): moving both factors by at most ρ moves W by at most η.
///
/// ΔW = ΔA·Bᵀ + A·ΔBᵀ + ΔA·ΔBᵀ, so ‖ΔW‖ ≤ ρ(σ_A + σ_B) + ρ² ≤ ρ(σ_A + σ_B + 1) = η if ρ ≤ 1 and both O have norm at
/// most 1. Newton–Schulz overshoots that by up to 1.2024 and power iteration estimates σ from below, so as it stands the
/// bound is one on the order of η, not a guarantee: see [`super::SpectronConfig::certify`].
pub fn update_radius(eta: f64, sigma_a: f64, sigma_b: f64) -> f64 {
    eta / (sigma_a + sigma_b + 1.0)
}

/// The largest ρ with ρ(σ_A + σ_B) + ρ² ≤ η: with s = σ_A + σ_B, ρ = (√(s² + 4η) − s)/2, written so that nothing cancels.
///
/// Never smaller than the paper's radius where that is at most 1; 1.5 times it for s = 2 and small η.
pub fn exact_radius(eta: f64, sigma_a: f64, sigma_b: f64) -> f64 {
    let s = sigma_a + sigma_b;
    let denominator = s + (s * s + 4.0 * eta).sqrt();
    if denominator == 0.0 { 0.0 } else { 2.0 * eta / denominator }
}

/// Which radius a step takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Radius {
    /// [`update_radius`].
    Paper,
    /// [`exact_radius`].
    Exact,
}

impl Radius {
    /// ρ.
    pub fn of(self, eta: f64, sigma_a: f64, sigma_b: f64) -> f64 {
        match self {
            Self::Paper => update_radius(eta, sigma_a, sigma_b),
            Self::Exact => exact_radius(eta, sigma_a, sigma_b),
        }
    }
}
