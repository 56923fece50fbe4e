//! The language model: a Llama-style decoder whose hidden matrices are factor pairs (or, one switch away, dense).
//!
//! Pre-norm RMSNorm, rotary positions, grouped-query causal attention, SwiGLU, no biases (Touvron et al. 2023,
//! arXiv 2302.13971). Token by token, with its keys and values kept: model/decode.rs. Not here: how it is trained (trainer.rs)
//! or sampled (generate.rs).
//! Letters: N tokens of a batch (sequences one after the other), T context, d width, f ffn, h head size, v vocabulary.

mod decode;

use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rankgrad::autograd::{Rope, Var};
use rankgrad::lowrank::{
    Dense, FactorPair, Hidden, Leaves, Pair, PairInit, ParamVars, Params, gaussian, init_pair,
};
use rankgrad::tensor::{Attention, Backend, Tensor};

use crate::config::{Config, Init};
use crate::guide;
use crate::methods::{Matrices, entry};

pub use decode::{Cache, Weights};

/// Name and shape [m, n] of the matrices of all blocks, in the order of the model.
pub fn matrices(c: &Config) -> Vec<(String, [usize; 2])> {
    let Config { dim, ffn, .. } = *c;
    let kv_dim = dim / c.heads * c.kv_heads;
    let (square, narrow, wide) = ([dim, dim], [kv_dim, dim], [ffn, dim]);
    let block = [
        ("q", square),
        ("k", narrow),
        ("v", narrow),
        ("o", square),
        ("gate", wide),
        ("up", wide),
        ("down", [dim, ffn]),
    ];
    let of = |i: usize| block.map(|(part, shape)| (format!("blocks.{i}.{part}"), shape));
    (0..c.layers).flat_map(of).collect()
}

/// A hidden layer: x·Wᵀ.
#[derive(Clone, Copy)]
enum Linear {
    Factored(Pair),
    Whole(Hidden),
    /// Both, for self-guided training: the matrix starts as the pair's product.
    Guided(Pair, Hidden),
}

impl Linear {
    /// x [N, n] → [N, m]. `guides`: the weight of each guide; those that are absent, or of weight 0, are not computed.
    fn apply<'t, B: Backend>(self, w: &ParamVars<'t, B>, x: Var<'t, B>, guides: &[f64]) -> Var<'t, B> {
        match self {
            Self::Factored(pair) => x.lowrank_linear(w[pair].a, w[pair].b),
            Self::Whole(matrix) => x.linear(w[matrix]),
            Self::Guided(pair, matrix) => {
                let y = x.lowrank_linear(w[pair].a, w[pair].b); // [N, m]
                match guides.get(matrix.0) {
                    Some(&alpha) if alpha > 0.0 => x.linear(w[matrix]).scale(alpha) + y.scale(1.0 - alpha),
                    _ => y,
                }
            }
        }
    }

    /// [`Linear::apply`] of each to one x: as one op, if their B are one leaf.
    fn apply_all<'t, B: Backend, const K: usize>(
        all: [Self; K],
        w: &ParamVars<'t, B>,
        x: Var<'t, B>,
        guides: &[f64],
    ) -> [Var<'t, B>; K] {
        let pairs: Vec<_> = all.iter().filter_map(|linear| linear.factored()).collect();
        let shared = pairs.iter().all(|&pair| w[pair].b.id() == w[pairs[0]].b.id());
        match <[Pair; K]>::try_from(pairs) {
            Ok(pairs) if shared => x.lowrank_linears(pairs.map(|pair| w[pair].a), w[pairs[0]].b), // [N, m] each
            _ => all.map(|linear| linear.apply(w, x, guides)), // [N, m] each
        }
    }

    /// The pair, if it is nothing else.
    fn factored(self) -> Option<Pair> {
        if let Self::Factored(pair) = self { Some(pair) } else { None }
    }
}

struct Block {
    attention_norm: Dense,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    ffn_norm: Dense,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Handles of the model's parameters, and what the forward pass needs beside them.
pub struct Model<B: Backend> {
    embedding: Dense,
    blocks: Vec<Block>,
    norm: Dense,
    /// The embedding again if the two are tied.
    head: Dense,
    rope: Arc<Rope<B::Wide>>,
    norm_eps: f64,
    heads: usize,
    kv_heads: usize,
    context: usize,
    /// Self-guided training: the weight of each guide in the next forward pass. Otherwise, and once they are dropped, empty.
    pub guides: Vec<f64>,
}

/// Adds parameters one by one, drawing each from the same generator; without one, all but the gains are zero.
struct Builder<'a, B: Backend> {
    device: &'a B,
    config: &'a Config,
    params: Params<B>,
    rng: Option<ChaCha8Rng>,
}

impl<B: Backend> Builder<'_, B> {
    fn gain(&mut self, name: &str) -> Dense {
        let gain = Tensor::full(self.device, [self.config.dim], 1.0); // [d]
        self.params.dense(name, gain)
    }

    fn table(&mut self, name: &str) -> Dense {
        let Config { vocab, dim, init_std, .. } = *self.config;
        let table = self.gaussian([vocab, dim], init_std); // [v, d]
        self.params.dense(name, table)
    }

    fn gaussian(&mut self, shape: [usize; 2], std: f64) -> Tensor<B> {
        match &mut self.rng {
            Some(rng) => gaussian(self.device, rng, shape, std), // of `shape`
            None => Tensor::zeros(self.device, shape),           // of `shape`
        }
    }

    /// A hidden matrix [m, n]; `residual`: its output is added to the residual stream.
    fn linear(&mut self, name: &str, [m, n]: [usize; 2], residual: bool) -> Linear {
        let Config { layers, init, init_std, zero_init_output, .. } = *self.config;
        // 2·layers outputs add up in the residual stream: 1/√ of that keeps its variance (GPT-2)
        let std = if residual { init_std / (2.0 * layers as f64).sqrt() } else { init_std };
        let zero = residual && zero_init_output;
        if !self.config.factored() {
            let std = if zero { 0.0 } else { std };
            let w = self.gaussian([m, n], std); // [m, n]
            return Linear::Whole(self.params.hidden(name, w));
        }
        let init = match init {
            _ if zero => PairInit::Zero,
            Init::Spectral => PairInit::Spectral,
            Init::Orthogonal => PairInit::Orthogonal,
        };
        let r = self.config.rank(name, [m, n]);
        let zeros = |rows| Tensor::zeros(self.device, [rows, r]); // [rows, r]
        let pair = match &mut self.rng {
            Some(rng) => init_pair(self.device, rng, [m, n], r, std, init), // [m, r], [n, r]
            None => FactorPair::new(zeros(m), zeros(n)),                    // [m, r], [n, r]
        };
        if let Matrices::Guided { .. } = entry::<B>(self.config.method).matrices {
            let guide = self.params.hidden(format!("{name}.guide"), pair.to_dense()); // [m, n]
            return Linear::Guided(self.params.pair(name, pair), guide);
        }
        Linear::Factored(self.params.pair(name, pair))
    }
}

impl<B: Backend> Model<B> {
    /// The model that `config` describes, and its parameters, drawn from `config.seed`.
    pub fn new(device: &B, config: &Config) -> (Self, Params<B>) {
        Self::build(device, config, Some(ChaCha8Rng::seed_from_u64(config.seed)))
    }

    /// The same with matrices of zeros, for values that are read: to draw those of a large model takes minutes.
    pub fn blank(device: &B, config: &Config) -> (Self, Params<B>) {
        Self::build(device, config, None)
    }

    fn build(device: &B, config: &Config, rng: Option<ChaCha8Rng>) -> (Self, Params<B>) {
        let Config { dim, ffn, heads, kv_heads, layers, context, .. } = *config;
        let kv_dim = dim / heads * kv_heads;
        let mut make = Builder { device, config, params: Params::default(), rng };
        let embedding = make.table("embedding");
        let block = |i: usize| Block {
            attention_norm: make.gain(&format!("blocks.{i}.attention_norm")),
            q: make.linear(&format!("blocks.{i}.q"), [dim, dim], false),
            k: make.linear(&format!("blocks.{i}.k"), [kv_dim, dim], false),
            v: make.linear(&format!("blocks.{i}.v"), [kv_dim, dim], false),
            o: make.linear(&format!("blocks.{i}.o"), [dim, dim], true),
            ffn_norm: make.gain(&format!("blocks.{i}.ffn_norm")),
            gate: make.linear(&format!("blocks.{i}.gate"), [ffn, dim], false),
            up: make.linear(&format!("blocks.{i}.up"), [ffn, dim], false),
            down: make.linear(&format!("blocks.{i}.down"), [dim, ffn], true),
        };
        let blocks = (0..layers).map(block).collect();
        let norm = make.gain("norm");
        let head = if config.tie { embedding } else { make.table("head") };
        let rope = Arc::new(Rope::new(&device.wide(), context, dim / heads, config.rope_base)); // [T, h]
        let mut params = make.params;
        let norm_eps = config.norm_eps;
        let guides = Vec::new();
        let mut model =
            Self { embedding, blocks, norm, head, rope, norm_eps, heads, kv_heads, context, guides };
        model.guide_at(0, config, &mut params);
        (model, params)
    }

    /// The parameters as leaves: on a GPU with the pairs that read one input side by side, queries, keys and values of a block, and its gate and
    /// up. (On a processor that takes as long, and 7 to 15 % more memory: docs/performance.md.)
    pub fn leaves(&self, params: &Params<B>) -> Leaves<B> {
        let groups = self
            .blocks
            .iter()
            .flat_map(|block| [vec![block.q, block.k, block.v], vec![block.gate, block.up]]);
        let pairs = groups.filter_map(|group| group.into_iter().map(Linear::factored).collect());
        let sharing: Vec<_> = if B::ASYNCHRONOUS { pairs.collect() } else { vec![] };
        params.leaves(&sharing)
    }

    /// Gives the guides of self-guided training the weight of `step`; once that is 0, drops them from `params`.
    pub fn guide_at(&mut self, step: u64, config: &Config, params: &mut Params<B>) {
        let Matrices::Guided { .. } = entry::<B>(config.method).matrices else { return };
        let alpha = guide::alpha(config, step);
        if alpha == 0.0 {
            params.values.hidden.clear();
            params.hidden_names.clear();
        }
        self.guides = vec![alpha; params.values.hidden.len()];
    }

    /// What the head reads [N, d], of `batch` sequences of equal length, one after the other in `tokens`; in the precision of `w`.
    fn outputs<'t, C: Backend<Wide = B::Wide>>(
        &self,
        w: &ParamVars<'t, C>,
        tokens: &[u32],
        batch: usize,
    ) -> Var<'t, C> {
        let len = tokens.len() / batch;
        let how = Attention { batch, heads: self.heads, kv_heads: self.kv_heads, causal: true };
        let attend = |_, [q, k, v]: [Var<'t, C>; 3]| {
            let [qr, kr] = [q, k].map(|x| x.rope(&self.rope, len, 0)); // [N, heads·h], [N, kv_heads·h]
            [q, k].into_iter().for_each(Var::forget);
            qr.attention(kr, v, how) // [N, heads·h]
        };
        self.normed(w, self.residual(w, tokens, attend)) // [N, d]
    }

    /// The residual stream behind the last block [N, d]. `attend(i, [q, k, v])`: what block i's attention finds, from its
    /// queries and keys before their rotation, [N, heads·h], and [N, kv_heads·h] twice, to [N, heads·h].
    fn residual<'t, C: Backend<Wide = B::Wide>>(
        &self,
        w: &ParamVars<'t, C>,
        tokens: &[u32],
        mut attend: impl FnMut(usize, [Var<'t, C>; 3]) -> Var<'t, C>,
    ) -> Var<'t, C> {
        let guides = &self.guides[..];
        // x + y, which is added only here, since that costs no pass over x of its own; and its norm
        let add_norm = |x: Var<'t, C>, y: Option<Var<'t, C>>, gain: Dense| {
            let Some(y) = y else { return (x, x.rms_norm(w[gain], self.norm_eps)) }; // [N, d] × 2
            let both = x.add_rms_norm(y, w[gain], self.norm_eps); // [N, d] × 2
            y.forget(); // no derivative needs it
            both
        };
        let (mut x, mut y) = (w[self.embedding].embedding(tokens), None); // [N, d], and what is still to be added to it [N, d]
        for (i, block) in self.blocks.iter().enumerate() {
            let h; // [N, d]
            (x, h) = add_norm(x, y, block.attention_norm);
            let qkv = Linear::apply_all([block.q, block.k, block.v], w, h, guides); // [N, heads·h], [N, kv_heads·h] × 2
            let o = block.o.apply(w, attend(i, qkv), guides); // [N, d]
            let h; // [N, d]
            (x, h) = add_norm(x, Some(o), block.ffn_norm);
            let [gate, up] = Linear::apply_all([block.gate, block.up], w, h, guides); // [N, f] × 2
            let f = gate.swiglu(up); // [N, f]
            y = Some(block.down.apply(w, f, guides)); // [N, d]
        }
        let Some(y) = y else { return x };
        let sum = x + y; // [N, d]
        y.forget();
        sum
    }

    /// What the head reads [N, d] of the residual stream [N, d].
    fn normed<'t, C: Backend>(&self, w: &ParamVars<'t, C>, x: Var<'t, C>) -> Var<'t, C> {
        x.rms_norm(w[self.norm], self.norm_eps) // [N, d]
    }

    /// `share` times the mean cross-entropy on the tape \[1\], and the mean itself, in nats per token, as it is before it is rounded to
    /// the tape's elements \[1\].
    pub fn loss<'t, C: Backend<Wide = B::Wide>>(
        &self,
        w: &ParamVars<'t, C>,
        tokens: &[u32],
        targets: &[u32],
        batch: usize,
        share: f64,
    ) -> (Var<'t, C>, Tensor<B::Wide>) {
        self.outputs(w, tokens, batch).linear_cross_entropy_wide(w[self.head], targets, share, None)
    }

    /// Logits [N, v], without keeping anything for a gradient: what others are compared with.
    #[cfg(test)]
    pub fn predict(&self, params: &Params<B>, tokens: &[u32], batch: usize) -> Tensor<B> {
        let tape = rankgrad::autograd::Tape::new(params.values.dense[0].device());
        let w = params.constants_on(&tape);
        self.outputs(&w, tokens, batch).linear(w[self.head]).value() // [N, v]
    }
}
