//! Decoding: a model that is fed more and more tokens of a sequence, and keeps the keys and values of those it has seen.
//!
//! Not here: which tokens (generate/). Letters: S sequences, n tokens fed to each, v vocabulary, h head size.

use rankgrad::autograd::{Tape, Var, concat};
use rankgrad::lowrank::{Pair, Params, Values};
use rankgrad::tensor::{Attention, Backend, Tensor};

use super::{Block, Linear, Model};

/// Positions that a new cache has room for.
const FIRST_CAPACITY: usize = 64;

/// The keys, rotated, and the values of a sequence so far, for every block.
pub struct Cache<B: Backend> {
    /// Positions that are filled.
    len: usize,
    /// Positions that there is room for; doubled when they are used up, so that a token costs no copy of those before it.
    capacity: usize,
    /// Elements of a position: kv_heads·h.
    width: usize,
    /// Keys and values of each block [1, capacity·width]: one row, so that a run of positions is a run of columns.
    blocks: Vec<[Tensor<B>; 2]>,
}

impl<B: Backend> Cache<B> {
    /// Number of positions in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Forgets all positions, and keeps the memory.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Bytes that it occupies.
    pub fn bytes(&self) -> usize {
        2 * self.blocks.len() * self.capacity * self.width * size_of::<B::Elem>()
    }

    /// Makes room for `n` more positions; there can be at most `context`.
    fn reserve(&mut self, n: usize, context: usize) {
        let needed = self.len + n;
        assert!(needed <= context, "{needed} positions in a context of {context}");
        if needed <= self.capacity {
            return;
        }
        self.capacity = needed.max(2 * self.capacity).min(context);
        for x in self.blocks.iter_mut().flatten() {
            let mut longer = Tensor::scratch(x.device(), [1, self.capacity * self.width]); // [1, capacity·width]
            longer.copy_cols(0, x, 0..self.len * self.width);
            *x = longer;
        }
    }

    /// Writes the keys and values [n, width] of block `i` behind the others; returns all of them [len + n, width], not copied.
    fn append(&mut self, i: usize, new: [Tensor<B>; 2]) -> [Tensor<B>; 2] {
        let (start, width) = (self.len * self.width, self.width);
        let all = [self.len + new[0].rows(), width];
        for (old, new) in self.blocks[i].iter_mut().zip(new) {
            let run = new.len();
            old.copy_cols(start, &new.reshape([1, run]), 0..run);
        }
        self.blocks[i].each_ref().map(|x| x.prefix(all)) // [len + n, width]
    }
}

/// How the factor pairs are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Each pair as whatever has fewer elements, its factors, r·(m + n), or W, m·n: a token takes the time to read them.
    Fewer,
    /// x·B, then ·Aᵀ.
    Factored,
    /// x·Wᵀ.
    Merged,
}

impl<B: Backend> Model<B> {
    /// Tokens that it can look back on.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The elements of `params` that a token's logits are computed from: all, but of an embedding of its own one row.
    pub fn elements_read(&self, params: &Params<B>) -> usize {
        let embedding = &params.values.dense[self.embedding.0];
        let unread = if self.head == self.embedding { 0 } else { embedding.len() - embedding.cols() };
        params.count() - unread
    }

    /// An empty cache on the device of `params`.
    pub fn cache(&self, params: &Params<B>) -> Cache<B> {
        let embedding = &params.values.dense[self.embedding.0]; // [v, d]
        let width = embedding.cols() / self.heads * self.kv_heads;
        let capacity = FIRST_CAPACITY.min(self.context);
        let room = || Tensor::scratch(embedding.device(), [1, capacity * width]); // [1, capacity·width]
        let blocks = self.blocks.iter().map(|_| [room(), room()]).collect();
        Cache { len: 0, capacity, width, blocks }
    }

    /// Feeds n tokens to each of S sequences, those of the first coming first in `tokens`; returns the logits [S, v] of what
    /// follows each one's last. The linear layers see the rows of all sequences together.
    ///
    /// # Panics
    /// If S does not divide the tokens, or a sequence gets longer than the context.
    pub fn extend(&self, params: &Params<B>, caches: &mut [&mut Cache<B>], tokens: &[u32]) -> Tensor<B> {
        let (s, n) = (caches.len(), tokens.len() / caches.len());
        assert!(n > 0 && s * n == tokens.len(), "{} tokens for {s} sequences", tokens.len());
        for cache in &mut *caches {
            cache.reserve(n, self.context);
        }
        let tape = Tape::new(params.values.dense[0].device());
        let w = params.constants_on(&tape);
        let x = self.residual(&w, tokens, |block, qkv| self.attend(&tape, caches, block, qkv)); // [S·n, d]
        for cache in caches {
            cache.len += n;
        }
        let last: Vec<u32> = (1..=s).map(|i| (i * n - 1) as u32).collect();
        self.normed(&w, x.embedding(&last)).linear(w[self.head]).value() // [S, v]
    }

    /// Attention of a block, whose queries, keys and values are [S·n, heads·h], and [S·n, kv_heads·h] twice → [S·n, heads·h]:
    /// of each sequence over what its cache holds, to which its keys and values are added.
    fn attend<'t>(
        &self,
        tape: &'t Tape<B>,
        caches: &mut [&mut Cache<B>],
        block: usize,
        qkv: [Var<'t, B>; 3],
    ) -> Var<'t, B> {
        let (s, n) = (caches.len(), qkv[0].shape().rows() / caches.len());
        let how = Attention { batch: 1, heads: self.heads, kv_heads: self.kv_heads, causal: true };
        let one = |(i, cache): (usize, &mut &mut Cache<B>)| {
            let ids: Vec<u32> = (i * n..(i + 1) * n).map(|row| row as u32).collect();
            let [q, k, v] = if s == 1 { qkv } else { qkv.map(|x| x.embedding(&ids)) }; // [n, heads·h], [n, kv_heads·h] × 2
            let [q, k] = [q, k].map(|x| x.rope(&self.rope, n, cache.len)); // like q, k
            let seen = cache.append(block, [k.value(), v.value()]); // [len + n, kv_heads·h] × 2
            let [k, v] = seen.each_ref().map(|x| tape.constant(x)); // [len + n, kv_heads·h]
            q.attention(k, v, how) // [n, heads·h]
        };
        let found: Vec<Var<'t, B>> = caches.iter_mut().enumerate().map(one).collect();
        if let [found] = found[..] {
            return found; // [n, heads·h]
        }
        let width = found[0].shape().cols();
        let rows: Vec<Var<'t, B>> = found.into_iter().map(|x| x.reshape([1, n * width])).collect();
        concat(&rows).reshape([s * n, width]) // [S·n, heads·h]
    }

    /// The same model, to within rounding, with its pairs as `weights` says. What is kept as it was is shared, not copied.
    pub fn for_decoding(&self, params: &Params<B>, weights: Weights) -> (Self, Params<B>) {
        let mut out = Params {
            values: Values { dense: params.values.dense.clone(), ..Values::default() },
            dense_names: params.dense_names.clone(),
            ..Params::default()
        };
        let mut guides = Vec::new();
        let mut convert = |linear: Linear| {
            let guided = match linear {
                Linear::Guided(_, guide) => self.guides.get(guide.0).copied().filter(|&alpha| alpha > 0.0),
                _ => None,
            };
            match linear {
                Linear::Whole(w) => {
                    Linear::Whole(out.hidden(&params.hidden_names[w.0], params.values.hidden[w.0].clone()))
                }
                Linear::Factored(Pair(at)) | Linear::Guided(Pair(at), _) => {
                    let (name, pair) = (&params.pair_names[at], &params.values.pairs[at]);
                    let costs = pair.costs();
                    let merge = match weights {
                        Weights::Fewer => guided.is_some() || costs.dense_parameters < costs.parameters,
                        Weights::Factored => false,
                        Weights::Merged => true,
                    };
                    match (linear, guided) {
                        (Linear::Guided(_, guide), Some(alpha)) if merge => {
                            let mut w = pair.to_dense(); // [m, n]
                            w.axpby(alpha, &params.values.hidden[guide.0], 1.0 - alpha);
                            Linear::Whole(out.hidden(name, w))
                        }
                        (Linear::Guided(_, guide), Some(alpha)) => {
                            guides.push(alpha);
                            let kept = params.values.hidden[guide.0].clone(); // [m, n]
                            let kept = out.hidden(&params.hidden_names[guide.0], kept);
                            Linear::Guided(out.pair(name, pair.clone()), kept)
                        }
                        _ if merge => Linear::Whole(out.hidden(name, pair.to_dense())),
                        _ => Linear::Factored(out.pair(name, pair.clone())),
                    }
                }
            }
        };
        let blocks = self.blocks.iter().map(|block| Block {
            q: convert(block.q),
            k: convert(block.k),
            v: convert(block.v),
            o: convert(block.o),
            gate: convert(block.gate),
            up: convert(block.up),
            down: convert(block.down),
            ..*block
        });
        let blocks = blocks.collect();
        let model = Self { blocks, guides, rope: self.rope.clone(), ..*self };
        (model, out)
    }
}
