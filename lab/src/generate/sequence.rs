//! Sequences that grow: each has its tokens, the window of them that the model looks at, and a cache for that window.
//!
//! The window: all tokens, as long as they are no more than the context T. Beyond that it begins at the smallest multiple of ⌊T/2⌋
//! that leaves at most T, so that it moves once in T/2 tokens, by T/2, and only then are keys and values computed anew (its
//! positions start at 0). What is predicted depends on the tokens alone, not on how they came in.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rankgrad::lowrank::Params;
use rankgrad::tensor::Backend;

use super::sampling::{Sampling, draw};
use super::text::Output;
use crate::awake;
use crate::model::{Cache, Model};

/// Tokens of a prompt that are fed at a time: enough for the matrix products, few enough that the activations stay small.
const CHUNK: usize = 128;

/// A sequence of tokens that is continued.
pub struct Sequence<B: Backend> {
    pub tokens: Vec<u32>,
    /// The first token of the window.
    start: usize,
    /// Of the window's tokens, without those that came last.
    cache: Cache<B>,
    rng: ChaCha8Rng,
}

/// Where the window of `len` tokens begins.
pub fn window_start(len: usize, context: usize) -> usize {
    len.saturating_sub(context).next_multiple_of((context / 2).max(1))
}

impl<B: Backend> Sequence<B> {
    /// A sequence that begins with `tokens`, for [`Model`]s of these sizes.
    pub fn new(model: &Model<B>, params: &Params<B>, tokens: Vec<u32>, seed: u64) -> Self {
        Self { tokens, start: 0, cache: model.cache(params), rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    fn window(&self) -> &[u32] {
        &self.tokens[self.start..]
    }

    /// The first `n` tokens of the window that the cache has not.
    fn pending(&self, n: usize) -> &[u32] {
        &self.window()[self.cache.len()..][..n]
    }

    /// Bytes of its cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }
}

/// The logits of each sequence's next token. What the caches lack is fed to the model: a prompt by itself, in chunks, and then
/// the last token of all sequences together.
pub fn advance<B: Backend<Elem = f32>>(
    model: &Model<B>,
    params: &Params<B>,
    sequences: &mut [&mut Sequence<B>],
) -> Vec<Vec<f32>> {
    for s in &mut *sequences {
        let start = window_start(s.tokens.len(), model.context());
        if start != s.start {
            s.start = start;
            s.cache.clear();
        }
        loop {
            let left = s.window().len() - s.cache.len() - 1;
            if left == 0 {
                break;
            }
            let chunk = s.pending(left.min(CHUNK)).to_vec();
            model.extend(params, &mut [&mut s.cache], &chunk);
        }
    }
    let last: Vec<u32> = sequences.iter().map(|s| s.pending(1)[0]).collect();
    let mut caches: Vec<&mut Cache<B>> = sequences.iter_mut().map(|s| &mut s.cache).collect();
    let logits = awake::<B, _>(|| model.extend(params, &mut caches, &last)); // [S, v]
    logits.to_vec().chunks(logits.cols()).map(<[f32]>::to_vec).collect()
}

/// What was added to a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Continuation {
    pub text: String,
    pub tokens: usize,
    /// By a stop string, rather than by the number of tokens.
    pub stopped: bool,
}

/// Continues all sequences, none of which may be empty. `show(i, text, over)` is given what was added to sequence i as soon as
/// it is certain, and returns whether anybody is still there to read.
pub fn continue_all<B: Backend<Elem = f32>>(
    model: &Model<B>,
    params: &Params<B>,
    sequences: &mut [Sequence<B>],
    how: &Sampling,
    mut show: impl FnMut(usize, &str, bool) -> bool,
) -> Vec<Continuation> {
    let mut outputs: Vec<Output> = sequences.iter().map(|_| Output::new(&how.stop, how.tokenizer)).collect();
    let mut added = vec![Continuation::default(); sequences.len()];
    let mut running = vec![true; sequences.len()];
    let ids = how.tokenizer.vocab(); // a model may have more, which it never saw
    while running.contains(&true) {
        let mut active: Vec<(usize, &mut Sequence<B>)> =
            sequences.iter_mut().enumerate().filter(|(i, _)| running[*i]).collect();
        let logits = {
            let mut active: Vec<&mut Sequence<B>> = active.iter_mut().map(|(_, s)| &mut **s).collect();
            advance(model, params, &mut active)
        };
        for ((i, s), logits) in active.into_iter().zip(logits) {
            let token = draw(&logits[..logits.len().min(ids)], &s.tokens[s.start..], how, &mut s.rng);
            s.tokens.push(token);
            let (output, added) = (&mut outputs[i], &mut added[i]);
            let mut text = output.push(token);
            added.tokens += 1;
            added.stopped = output.stopped();
            let over = added.stopped || added.tokens == how.tokens;
            if over {
                text += &output.finish();
                running[i] = false;
            }
            added.text += &text;
            if (over || !text.is_empty()) && !show(i, &text, over) {
                running.fill(false);
            }
        }
    }
    added
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Overrides};
    use crate::model::Weights;
    use rankgrad::tensor::Cpu;

    /// A small model that is sure of itself: weights of this size let the logits differ by whole units.
    fn small(more: &str) -> (Config, Model<Cpu<f32>>, Params<Cpu<f32>>) {
        let sizes = "dim = 32\nlayers = 2\nheads = 4\nkv_heads = 2\nffn = 48\ncontext = 21\ninit_std = 0.3\n";
        let [sizes, more] = [sizes, more].map(|toml| Overrides::from_toml(toml).unwrap());
        let config = more.over(&sizes).unwrap().resolve().unwrap();
        let (model, params) = Model::new(&Cpu::default(), &config);
        (config, model, params)
    }

    /// Logits of the last of `tokens` by a forward pass over all of them.
    fn from_scratch(model: &Model<Cpu<f32>>, params: &Params<Cpu<f32>>, tokens: &[u32]) -> Vec<f32> {
        let logits = model.predict(params, tokens, 1); // [T, v]
        logits.to_vec()[(tokens.len() - 1) * logits.cols()..].to_vec()
    }

    fn prompt(len: usize) -> Vec<u32> {
        (0..len as u32).map(|i| i * 37 % 256).collect()
    }

    fn near(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4)
    }

    fn likeliest(logits: &[f32]) -> u32 {
        draw(
            logits,
            &[],
            &Sampling { temperature: 0.0, ..Sampling::default() },
            &mut ChaCha8Rng::seed_from_u64(0),
        )
    }

    #[test]
    fn the_window_moves_by_half_a_context() {
        let starts = |context| (1..=14).map(|len| window_start(len, context)).collect::<Vec<_>>();
        assert_eq!(starts(6), [0, 0, 0, 0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9]);
        assert_eq!(starts(5), [0, 0, 0, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10]);
        assert_eq!(starts(1), (0..14).collect::<Vec<_>>());
        for context in 1..9 {
            for len in 1..50 {
                let window = len - window_start(len, context);
                assert!(
                    window <= context && window >= len.min(context.div_ceil(2)).max(1),
                    "{len} in {context}"
                );
            }
        }
    }

    /// At every position, several contexts long; from prompts that are short, fill the context, go beyond it, or take several chunks.
    #[test]
    fn greedy_decoding_is_that_of_a_forward_pass_from_scratch() {
        for (more, prompts) in
            [("tie = true\n", &[1, 20, 21, 22, 60][..]), ("context = 300\n", &[299]), ("context = 1\n", &[2])]
        {
            let (config, model, params) = small(more);
            for &len in prompts {
                let mut s = Sequence::new(&model, &params, prompt(len), 1);
                for _ in 0..(3 * config.context).min(70) {
                    let cached = advance(&model, &params, &mut [&mut s]).remove(0); // [v]
                    let window = &s.tokens[window_start(s.tokens.len(), config.context)..];
                    let whole = from_scratch(&model, &params, window); // [v]
                    assert!(near(&cached, &whole), "{} tokens, context {}", s.tokens.len(), config.context);
                    assert_eq!(likeliest(&cached), likeliest(&whole));
                    s.tokens.push(likeliest(&whole));
                }
            }
        }
    }

    #[test]
    fn a_batch_is_its_sequences_one_by_one() {
        let (_, model, params) = small("");
        let how = Sampling { tokens: 50, temperature: 1.0, top_p: 0.9, ..Sampling::default() };
        let start = |len: usize| Sequence::new(&model, &params, prompt(len), 3);
        // few rows at a time, and more than the kernels for few rows take
        for lengths in [&[5, 1, 30][..], &[5, 1, 30, 21, 22, 7, 7]] {
            let mut together: Vec<_> = lengths.iter().map(|&len| start(len)).collect();
            let mut shown = vec![String::new(); lengths.len()];
            let added = continue_all(&model, &params, &mut together, &how, |i, text, _| {
                shown[i] += text;
                true
            });
            for (i, &len) in lengths.iter().enumerate() {
                let alone = continue_all(&model, &params, &mut [start(len)], &how, |_, _, _| true);
                assert_eq!(added[i], alone[0]);
                assert_eq!(added[i].text, shown[i]);
                assert_eq!(added[i].tokens, 50);
            }
        }
    }

    #[test]
    fn a_stop_string_ends_one_sequence_and_no_reader_ends_all() {
        let (_, model, params) = small("");
        let how = Sampling { tokens: 40, ..Sampling::default() };
        let run = |how: &Sampling| {
            let mut both = [4, 9].map(|len| Sequence::new(&model, &params, prompt(len), 3));
            continue_all(&model, &params, &mut both, how, |_, _, _| true)
        };
        let free = run(&how);
        let chars: Vec<(usize, char)> =
            free[0].text.char_indices().filter(|(_, c)| *c != '\u{fffd}').collect();
        let (at, c) = chars[chars.len() / 2];
        let stopped = run(&Sampling { stop: vec![c.into(), "never seen".into()], ..how.clone() });
        assert!(stopped[0].stopped && stopped[0].tokens < 40);
        assert_eq!(stopped[0].text, free[0].text[..free[0].text.find(c).unwrap_or(at)]);
        assert!(free[1].text.starts_with(&stopped[1].text));
        let mut one = [Sequence::new(&model, &params, prompt(4), 3)];
        assert!(continue_all(&model, &params, &mut one, &how, |_, _, _| false)[0].tokens < 40);
    }

    /// A conversation goes on from its cache: the same as from its text.
    #[test]
    fn a_sequence_that_was_added_to_goes_on_as_a_new_one() {
        let (_, model, params) = small("");
        let mut s = Sequence::new(&model, &params, prompt(4), 3);
        advance(&model, &params, &mut [&mut s]);
        for more in [3, 1, 12, 5] {
            s.tokens.extend(prompt(more));
            let mut fresh = Sequence::new(&model, &params, s.tokens.clone(), 3);
            let logits = [&mut s, &mut fresh].map(|s| advance(&model, &params, &mut [s]).remove(0));
            assert!(near(&logits[0], &logits[1]));
        }
    }

    #[test]
    fn factors_and_their_products_predict_the_same() {
        let methods = ["spectron", "self-guided", "dense-muon"];
        for (method, ratio) in methods.into_iter().flat_map(|method| [0.25, 0.7].map(|ratio| (method, ratio)))
        {
            let (config, mut model, mut params) =
                small(&format!("method = \"{method}\"\nrank_ratio = {ratio}\n"));
            model.guides.fill(0.4);
            for guide in params.values.hidden.iter_mut().filter(|_| config.factored()) {
                *guide = guide.scale(1.1); // no longer what the pair says
            }
            let predict = |weights| {
                let (model, params) = model.for_decoding(&params, weights);
                let names: Vec<String> = params.names().collect();
                let mut s = Sequence::new(&model, &params, prompt(9), 3);
                (advance(&model, &params, &mut [&mut s]).remove(0), params.count(), names)
            };
            let whole = from_scratch(&model, &params, &prompt(9)); // [v]
            let (fewer, count, names) = predict(Weights::Fewer);
            let (factored, count_factored, names_factored) = predict(Weights::Factored);
            let (merged, count_merged, _) = predict(Weights::Merged);
            for logits in [&fewer, &factored, &merged] {
                assert!(near(logits, &whole), "{method} {ratio}");
            }
            assert!(count <= count_factored.min(count_merged), "{method} {ratio}");
            assert_eq!(count_factored, params.count());
            assert_eq!(names_factored, params.names().collect::<Vec<_>>());
            let pairs = names.iter().filter(|name| name.ends_with(".A")).count();
            // at 0.7 every pair has more elements than its product; guides are merged into theirs
            assert_eq!(pairs, if (method, ratio) == ("spectron", 0.25) { 14 } else { 0 }, "{method} {ratio}");
        }
    }
}
