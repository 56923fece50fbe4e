//! Which token comes next: the distribution that the logits and the person's wishes give, and a draw from it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use crate::tokens::Tokenizer;

/// How tokens are drawn, how many, and what ends them.
#[derive(Clone, Debug)]
pub struct Sampling<'a> {
    /// How many at most.
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest.
    pub temperature: f64,
    /// Only this many likeliest tokens count.
    pub top_k: Option<usize>,
    /// Only the fewest likeliest tokens whose probabilities add up to this count (Holtzman et al. 2020, arXiv 1904.09751).
    pub top_p: f64,
    /// θ: divides the logits of tokens in the window if they are positive, and multiplies them if not; 1 changes nothing.
    pub repetition_penalty: f64,
    /// The text ends before the first of these.
    pub stop: Vec<String>,
    /// Every sequence starts its own generator from it.
    pub seed: u64,
    /// What the tokens mean.
    pub tokenizer: &'a Tokenizer,
}

impl Default for Sampling<'_> {
    fn default() -> Self {
        let (temperature, top_p, repetition_penalty) = (0.8, 1.0, 1.0);
        let (stop, tokenizer) = (Vec::new(), &Tokenizer::Bytes);
        Self { tokens: 300, temperature, top_k: None, top_p, repetition_penalty, stop, seed: 1, tokenizer }
    }
}

/// The tokens that can come next with their probabilities, likeliest first. `window`: the tokens that the model looks at.
///
/// The penalty comes first (Keskar et al. 2019, arXiv 1909.05858, who divide negative logits too, which makes those tokens
/// likelier), then the temperature, top-k, top-p.
pub fn distribution(logits: &[f32], window: &[u32], how: &Sampling) -> Vec<(u32, f64)> {
    let mut scores: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    if how.repetition_penalty != 1.0 {
        let mut seen = vec![false; scores.len()];
        window.iter().for_each(|&token| seen[token as usize] = true);
        for (score, _) in scores.iter_mut().zip(seen).filter(|(_, seen)| *seen) {
            *score *= if *score > 0.0 { 1.0 / how.repetition_penalty } else { how.repetition_penalty };
        }
    }
    let first = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    if how.temperature == 0.0 {
        let likeliest = order.into_iter().min_by(first).expect("there are tokens");
        return vec![(likeliest, 1.0)];
    }
    if let Some(k) = how.top_k.filter(|&k| k < order.len()) {
        order.select_nth_unstable_by(k, first);
        order.truncate(k);
    }
    order.sort_unstable_by(first);
    let top = scores[order[0] as usize];
    let weight = |id: u32| (id, ((scores[id as usize] - top) / how.temperature).exp());
    let mut all: Vec<(u32, f64)> = order.into_iter().map(weight).collect();
    normalise(&mut all);
    if how.top_p < 1.0 {
        let mut sum = 0.0;
        let enough = all.iter().position(|(_, p)| {
            sum += p;
            sum >= how.top_p
        });
        all.truncate(enough.map_or(all.len(), |last| last + 1));
        normalise(&mut all);
    }
    all
}

fn normalise(all: &mut [(u32, f64)]) {
    let total: f64 = all.iter().map(|(_, p)| p).sum();
    all.iter_mut().for_each(|(_, p)| *p /= total);
}

/// One token from its logits.
pub fn draw(logits: &[f32], window: &[u32], how: &Sampling, rng: &mut ChaCha8Rng) -> u32 {
    let all = distribution(logits, window, how);
    let mut left = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64; // uniform in [0, 1)
    for (id, p) in &all {
        left -= p;
        if left < 0.0 {
            return *id;
        }
    }
    all[all.len() - 1].0 // rounding used the sum up
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    /// Logits of the probabilities 0.5, 0.25, 0.125, 0.125.
    const LN: [f32; 4] = [-std::f32::consts::LN_2, -1.386_294_4, -2.079_441_5, -2.079_441_5];

    fn agree(got: &[(u32, f64)], want: &[(u32, f64)]) {
        let near = |(a, b): (&(u32, f64), &(u32, f64))| a.0 == b.0 && (a.1 - b.1).abs() < 1e-6;
        assert!(got.len() == want.len() && got.iter().zip(want).all(near), "{got:?}, not {want:?}");
    }

    #[test]
    fn draws_follow_temperature_and_top_k() {
        let logits = [0.0f32, 2.0, 1.0, -1.0];
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let how = |temperature, top_k| Sampling { temperature, top_k, ..Sampling::default() };
        assert!((0..50).all(|_| draw(&logits, &[], &how(0.0, None), &mut rng) == 1));
        assert!((0..50).all(|_| draw(&logits, &[], &how(5.0, Some(1)), &mut rng) == 1));
        let mut counts = [0.0; 4];
        for _ in 0..20_000 {
            counts[draw(&logits, &[], &how(2.0, Some(3)), &mut rng) as usize] += 1.0 / 20_000.0;
        }
        let weights = [0.0f64, 1.0, 0.5].map(f64::exp);
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            assert!((count - weight / total).abs() < 0.015, "{counts:?}"); // 4 standard deviations
        }
        assert_eq!(counts[3], 0.0);
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it() {
        let keep = |top_p, top_k, temperature| {
            distribution(&LN, &[], &Sampling { top_p, top_k, temperature, ..Sampling::default() })
        };
        agree(&keep(1.0, None, 1.0), &[(0, 0.5), (1, 0.25), (2, 0.125), (3, 0.125)]);
        agree(&keep(0.4, None, 1.0), &[(0, 1.0)]);
        agree(&keep(0.6, None, 1.0), &[(0, 2.0 / 3.0), (1, 1.0 / 3.0)]);
        agree(&keep(0.8, None, 1.0), &[(0, 4.0 / 7.0), (1, 2.0 / 7.0), (2, 1.0 / 7.0)]);
        // after top-k: 2/3 and 1/3 are left, the first of which reaches 0.6
        agree(&keep(0.6, Some(2), 1.0), &[(0, 1.0)]);
        // after the temperature: √p normalised, 0.7071 : 0.5 : 0.3536 : 0.3536, of which two reach 0.6
        agree(&keep(0.6, None, 2.0), &[(0, 0.585_786_4), (1, 0.414_213_6)]);
    }

    #[test]
    fn the_penalty_counts_a_token_of_the_window_once() {
        let ln = |p: [f64; 3]| p.map(|p| p.ln() as f32);
        let how = Sampling { temperature: 1.0, repetition_penalty: 2.0, ..Sampling::default() };
        // 4 : 4 : 1 becomes √4 : 4 : 1
        agree(
            &distribution(&ln([4.0, 4.0, 1.0]), &[0, 0, 0], &how),
            &[(1, 4.0 / 7.0), (0, 2.0 / 7.0), (2, 1.0 / 7.0)],
        );
        // 1/2 : 1/2 : 1 becomes 1/4 : 1/2 : 1; a logit of 0 stays
        agree(
            &distribution(&ln([0.5, 0.5, 1.0]), &[2, 0], &how),
            &[(2, 4.0 / 7.0), (1, 2.0 / 7.0), (0, 1.0 / 7.0)],
        );
        let greedy = Sampling { temperature: 0.0, ..how };
        assert_eq!(distribution(&[3.0, 2.0, 0.0], &[0], &greedy), [(1, 1.0)]);
        assert_eq!(distribution(&[3.0, 3.0, 0.0], &[], &greedy), [(0, 1.0)], "of equals, the first");
    }
}
