//! `generate`: text sampled from a model, one token at a time.
//!
//! Each token is predicted from the last `context` tokens, computed anew. Not here: a key/value cache.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rankgrad::lowrank::Params;
use rankgrad::tensor::Backend;

use crate::checkpoint::{self, Checkpoint};
use crate::cli::GenerateArgs;
use crate::config::Config;
use crate::device::{self, on_device};
use crate::error::Result;
use crate::model::Model;
use crate::trainer::load_model;

/// How tokens are drawn.
pub struct Sampling {
    /// How many.
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest.
    pub temperature: f64,
    /// Only this many likeliest tokens count.
    pub top_k: Option<usize>,
    pub seed: u64,
}

/// Continues a prompt with a checkpoint's model.
///
/// # Errors
/// Unusable flags, or a checkpoint that cannot be read.
pub fn generate(args: &GenerateArgs) -> Result<()> {
    let prompt = args.checked_prompt()?;
    let checkpoint = Checkpoint::load(&checkpoint::find(&args.checkpoint)?)?;
    let config = checkpoint.meta.config.clone();
    let sampling =
        Sampling { tokens: args.tokens, temperature: args.temperature, top_k: args.top_k, seed: args.seed };
    let text = on_device!(device::open(args.on.device)?, |device| {
        let (model, params) = load_model(&device, checkpoint)?;
        crate::pool(0)?.install(|| sample(&model, &params, &config, prompt.as_bytes(), &sampling))
    });
    crate::say!("{prompt}{}", String::from_utf8_lossy(&text));
    Ok(())
}

/// The bytes that the model adds to `prompt`, which must not be empty.
pub fn sample<B: Backend<Elem = f32>>(
    model: &Model<B>,
    params: &Params<B>,
    config: &Config,
    prompt: &[u8],
    how: &Sampling,
) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(how.seed);
    let mut tokens: Vec<u32> = prompt.iter().map(|&b| u32::from(b)).collect();
    for _ in 0..how.tokens {
        let seen = &tokens[tokens.len().saturating_sub(config.context)..];
        let logits = model.predict(params, seen, 1).to_vec(); // [T, v]
        let last = &logits[logits.len() - config.vocab..]; // [v]
        // ids above 255 are no bytes; a byte-level model never saw them
        tokens.push(draw(&last[..256], how, &mut rng));
    }
    tokens[prompt.len()..].iter().map(|&t| t as u8).collect()
}

/// One token from its logits.
fn draw(logits: &[f32], how: &Sampling, rng: &mut ChaCha8Rng) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    if how.temperature == 0.0 {
        return order[0];
    }
    order.truncate(how.top_k.unwrap_or(order.len()));
    let top = f64::from(logits[order[0] as usize]);
    let weight = |&id: &u32| ((f64::from(logits[id as usize]) - top) / how.temperature).exp();
    let total: f64 = order.iter().map(weight).sum();
    let mut left = total * (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64; // uniform in [0, total)
    for id in &order {
        left -= weight(id);
        if left < 0.0 {
            return *id;
        }
    }
    order[order.len() - 1] // rounding used the sum up
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_temperature_and_top_k() {
        let logits = [0.0f32, 2.0, 1.0, -1.0];
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let how = |temperature, top_k| Sampling { tokens: 1, temperature, top_k, seed: 0 };
        assert!((0..50).all(|_| draw(&logits, &how(0.0, None), &mut rng) == 1));
        assert!((0..50).all(|_| draw(&logits, &how(5.0, Some(1)), &mut rng) == 1));
        let mut counts = [0.0; 4];
        for _ in 0..20_000 {
            counts[draw(&logits, &how(2.0, Some(3)), &mut rng) as usize] += 1.0 / 20_000.0;
        }
        let weights = [0.0f64, 1.0, 0.5].map(f64::exp);
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            assert!((count - weight / total).abs() < 0.015, "{counts:?}"); // 4 standard deviations
        }
        assert_eq!(counts[3], 0.0);
    }
}
