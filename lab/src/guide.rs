//! Self-guided training (Wei et al. 2024, arXiv 2406.16450): the weight α of the dense guides.
//!
//! A guided layer computes α·W·x + (1−α)·A(Bᵀx), W starting as A·Bᵀ. α is half a cosine, from 1 at the first step to 0 at
//! half of the steps; then the guides are dropped. All pure functions of the position in the run, so that a resumed run
//! needs no saved state. Not here: the layer itself (model.rs).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::config::Config;

/// α at `step`, counted from 0.
pub fn alpha(config: &Config, step: u64) -> f64 {
    let done = step as f64 / (0.5 * config.steps as f64);
    if done < 1.0 { 0.5 * (1.0 + (std::f64::consts::PI * done).cos()) } else { 0.0 }
}

/// The weight of each of `guides` guides in one forward pass of training: α, or with `skip` (the paper's `reduce_flop`) 0
/// with probability 1 − α, and then the layer is A(Bᵀx) alone.
pub fn training_weights(config: &Config, skip: bool, step: u64, micro_step: u64, guides: usize) -> Vec<f64> {
    let alpha = alpha(config, step);
    if !skip {
        return vec![alpha; guides];
    }
    // another key than the data's, or layers would be skipped by what is in the batch
    let mut rng = ChaCha8Rng::seed_from_u64(!config.seed);
    rng.set_stream(step);
    rng.set_word_pos(2 * u128::from(micro_step) * guides as u128); // two words a draw
    let uniform = |rng: &mut ChaCha8Rng| (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    (0..guides).map(|_| if uniform(&mut rng) < alpha { alpha } else { 0.0 }).collect()
}

/// Means over the steps of a run: how many of the guides exist, and how many are computed in a forward pass.
pub fn shares(config: &Config, skip: bool) -> [f64; 2] {
    let steps = config.steps as u64;
    let alphas = (0..steps).map(|step| alpha(config, step)).filter(|&alpha| alpha > 0.0);
    let (exist, sum) = alphas.fold((0.0, 0.0), |(n, sum), alpha| (n + 1.0, sum + alpha));
    [exist, if skip { sum } else { exist }].map(|x| x / steps as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;

    fn config(steps: usize, seed: u64) -> Config {
        Config { steps, seed, ..Overrides::default().resolve().unwrap() }
    }

    #[test]
    fn alpha_is_a_cosine_over_the_first_half() {
        let c = config(200, 1);
        assert_eq!((alpha(&c, 0), alpha(&c, 100), alpha(&c, 150), alpha(&c, 200)), (1.0, 0.0, 0.0, 0.0));
        assert!((alpha(&c, 50) - 0.5).abs() < 1e-15);
        assert!((0..100).all(|step| alpha(&c, step + 1) < alpha(&c, step)));
    }

    #[test]
    fn guides_are_skipped_with_probability_one_minus_alpha() {
        let c = config(4000, 3);
        let drawn = |step: u64| training_weights(&c, true, step, 0, 28);
        let share = |from: u64| {
            let drawn: Vec<f64> = (from..from + 20).flat_map(drawn).collect();
            drawn.iter().filter(|&&w| w > 0.0).count() as f64 / drawn.len() as f64
        };
        // 560 draws: a standard deviation of 0.02
        assert!((share(990) - 0.5).abs() < 0.06 && share(0) > 0.99, "{} {}", share(990), share(0));
        assert!((share(600) - alpha(&c, 610)).abs() < 0.06);
        // a pure function of seed, step and micro-step, and of nothing else
        assert_eq!(drawn(1000), drawn(1000));
        assert_ne!(drawn(1000), training_weights(&c, true, 1000, 1, 28));
        assert_ne!(drawn(1000), training_weights(&config(4000, 4), true, 1000, 0, 28));
        assert_eq!(training_weights(&c, false, 1000, 0, 3), [alpha(&c, 1000); 3]);
        // half of the steps have guides; on average α is a half there
        let [exist, computed] = shares(&c, true);
        assert!((exist - 0.5).abs() < 1e-12 && (computed - 0.25).abs() < 1e-3, "{exist} {computed}");
        assert_eq!(shares(&c, false), [0.5, 0.5]);
    }
}
