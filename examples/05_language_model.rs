//! A tiny language model: characters in, the next character out. An embedding, one attention block and one feed-forward
//! block whose matrices are all factor pairs, trained by Spectron on a nursery rhyme (traditional, in the public domain).
//!
//! It learns the text by heart, which shows that everything works and nothing about language. For real text: `rankgrad train`.
//! Letters: T context, N = batch·T tokens, v vocabulary, d width, f hidden width of the feed-forward block.
//!
//! ```text
//! $ cargo run --release --example 05_language_model
//! 371 characters, 24 different; 12240 parameters
//! step   1  loss 3.23 nats per character
//! step  80  loss 0.21 nats per character
//! step 160  loss 0.20 nats per character
//! step 240  loss 0.12 nats per character
//! step 320  loss 0.09 nats per character
//! step 400  loss 0.10 nats per character
//! This is the dog that worried the cat that killed the rat that ate the malt that lay in the house that Jack built.
//! ```

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rankgrad::{
    autograd::{Rope, Tape, Var},
    lowrank::*,
    tensor::{Attention, Cpu, Tensor},
};

type B = Cpu<f32>;
const TEXT: &str = "This is the house that Jack built.
This is the malt that lay in the house that Jack built.
This is the rat that ate the malt that lay in the house that Jack built.
This is the cat that killed the rat that ate the malt that lay in the house that Jack built.
This is the dog that worried the cat that killed the rat that ate the malt that lay in the house that Jack built.
";
const T: usize = 32;
const BATCH: usize = 8;
const D: usize = 48;
const F: usize = 96;
const STEPS: u64 = 400;

struct Model {
    embedding: Dense,
    /// Query, key, value, attention output [d, d]; feed-forward gate and up [f, d], down [d, f].
    pairs: [Pair; 7],
    norms: [Dense; 3],
    head: Dense,
    rope: Rope<B>,
}

impl Model {
    fn new(cpu: &B, params: &mut Params<B>, v: usize) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64(1);
        let names = ["q", "k", "v", "o", "gate", "up", "down"];
        let shapes = [[D, D], [D, D], [D, D], [D, D], [F, D], [F, D], [D, F]];
        let pairs = std::array::from_fn(|i| {
            params.pair(names[i], init_pair(cpu, rng, shapes[i], D / 4, 0.05, PairInit::Spectral)) // [m, r], [n, r]
        });
        let norms =
            ["norm 1", "norm 2", "norm 3"].map(|name| params.dense(name, Tensor::full(cpu, [D], 1.0))); // [d]
        let mut table = |name: &str| params.dense(name, gaussian(cpu, rng, [v, D], 0.05)); // [v, d]
        let (embedding, head) = (table("embedding"), table("head"));
        Self { embedding, pairs, norms, head, rope: Rope::new(cpu, T, D / 4, 1e4) }
    }

    /// Logits [N, v] of `batch` sequences, one after the other in `ids`.
    fn logits<'t>(&self, w: &ParamVars<'t, B>, ids: &[u32], batch: usize) -> Var<'t, B> {
        let layer = |i: usize, x: Var<'t, B>| x.lowrank_linear(w[self.pairs[i]].a, w[self.pairs[i]].b);
        let norm = |i: usize, x: Var<'t, B>| x.rms_norm(w[self.norms[i]], 1e-5);
        let len = ids.len() / batch;
        let x = w[self.embedding].embedding(ids); // [N, d]
        let h = norm(0, x); // [N, d]
        let (q, k) = (layer(0, h).rope(&self.rope, len, 0), layer(1, h).rope(&self.rope, len, 0)); // [N, d]
        let how = Attention { batch, heads: 4, kv_heads: 4, causal: true };
        let x = x + layer(3, q.attention(k, layer(2, h), how)); // [N, d]
        let h = norm(1, x); // [N, d]
        let x = x + layer(6, layer(4, h).swiglu(layer(5, h))); // [N, f] inside, [N, d]
        norm(2, x).linear(w[self.head]) // [N, v]
    }
}

fn main() {
    let cpu = B::default();
    let mut vocabulary: Vec<char> = TEXT.chars().collect();
    vocabulary.sort();
    vocabulary.dedup();
    let id = |c: char| vocabulary.binary_search(&c).expect("a character of the text") as u32;
    let text: Vec<u32> = TEXT.chars().map(id).collect();

    let mut params = Params::default();
    let model = Model::new(&cpu, &mut params, vocabulary.len());
    println!("{} characters, {} different; {} parameters", text.len(), vocabulary.len(), params.count());

    let mut optimizer = Optimizer::spectron(&params);
    let schedule = Schedule { kind: ScheduleKind::Cosine, steps: STEPS, warmup: 20, end: 0.1 };
    for step in 0..STEPS {
        let start = |row: usize| (step as usize * BATCH + row) * 37 % (text.len() - T); // 37: windows all over the text
        let window =
            |shift: usize| (0..BATCH).flat_map(move |row| start(row) + shift..start(row) + shift + T);
        let inputs: Vec<u32> = window(0).map(|i| text[i]).collect();
        let targets: Vec<u32> = window(1).map(|i| text[i]).collect();

        let tape = Tape::new(&cpu);
        let w = params.on(&tape);
        let loss = model.logits(&w, &inputs, BATCH).cross_entropy(&targets); // [1]
        if (step + 1) % 80 == 0 || step == 0 {
            println!("step {:3}  loss {:.2} nats per character", step + 1, loss.value().item());
        }
        let mut grads = w.gradients(loss.backward());
        clip_global_norm(&mut grads, 1.0);
        let factor = schedule.factor(step);
        optimizer.step(&mut params, &grads, 0.05 * factor, 0.01 * factor);
    }

    // The likeliest next character, again and again, from the last T of them.
    let mut sample: Vec<u32> = "This is the d".chars().map(id).collect();
    for _ in 0..100 {
        let tape = Tape::new(&cpu);
        let seen = &sample[sample.len().saturating_sub(T)..];
        let logits = model.logits(&params.constants_on(&tape), seen, 1).value().to_vec(); // [T, v]
        let last = &logits[logits.len() - vocabulary.len()..];
        let best = (0..last.len()).max_by(|&i, &j| last[i].total_cmp(&last[j]));
        sample.push(best.expect("a vocabulary") as u32);
    }
    println!("{}", sample.iter().map(|&i| vocabulary[i as usize]).collect::<String>());
}
