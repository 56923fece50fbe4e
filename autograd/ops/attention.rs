//! Multi-head attention and the rotary position embedding.
//!
//! Letters: h head size; q, k, v [tokens, heads·h], the sequences of a batch one after the other. Heads are never split in
//! memory.

use crate::autograd::Var;
use crate::tensor::{Attention, Backend, Element, Tensor};

impl<'t, B: Backend> Var<'t, B> {
    /// softmax(q·kᵀ/√h)·v for each head of each sequence, self being q [batch·q_len, heads·h]; k and v
    /// [batch·k_len, kv_heads·h]. Fused: the probabilities are recomputed in the backward, never stored.
    ///
    /// # Panics
    /// If the sizes do not divide as `how` says, or a causal q is longer than k.
    #[track_caller]
    pub fn attention(self, k: Self, v: Self, how: Attention) -> Self {
        let (qt, kt, vt) = (self.value(), k.value(), v.value());
        check_attention(&qt, &kt, &vt, how);
        let (o, lse) = B::attention(&qt, &kt, &vt, how); // [batch·q_len, heads·h], [batch, heads, q_len]
        let (iq, ik, iv, kept) = (self.id(), k.id(), v.id(), o.clone());
        self.tape().record("attention", &[self, k, v], o, move |dy, grads| {
            let [dq, dk, dv] = B::attention_grad([&qt, &kt, &vt], &kept, &lse, &dy, how); // like q, k, v
            grads.add(iq, dq);
            grads.add(ik, dk);
            grads.add(iv, dv);
        })
    }

    /// Rotates each head of x [batch·len, heads·h] by its position (row mod `len`, plus `offset`).
    ///
    /// # Panics
    /// If the head size does not divide the last axis, `len` does not divide the rows, or a position is not in the table.
    #[track_caller]
    pub fn rope(self, rope: &Rope<B::Wide>, len: usize, offset: usize) -> Self {
        let (x, table) = (self.value(), rope.table.clone());
        let (positions, h) = (table.rows(), table.cols());
        assert!(
            x.cols().is_multiple_of(h),
            "rope: heads of size {h} do not divide the last axis of {}",
            x.shape()
        );
        assert!(
            len > 0 && x.rows().is_multiple_of(len),
            "rope: sequences of {len} do not divide the rows of {}",
            x.shape()
        );
        let end = offset + len;
        assert!(
            end <= positions,
            "rope: {} reaches positions {offset}..{end}, but the table has {positions}",
            x.shape()
        );
        let y = B::rope(&x, &table, len, offset, false); // like x
        let ix = self.id();
        self.tape().record("rope", &[self], y, move |dy, grads| {
            grads.add(ix, B::rope(&dy, &table, len, offset, true)) // like x
        })
    }
}

#[track_caller]
fn check_attention<B: Backend>(q: &Tensor<B>, k: &Tensor<B>, v: &Tensor<B>, how: Attention) {
    let Attention { batch, heads, kv_heads, causal } = how;
    let [qs, ks, vs] = [q, k, v].map(Tensor::shape);
    let all = || format!("attention: q {qs}, k {ks}, v {vs}");
    assert!(batch > 0 && heads > 0 && kv_heads > 0, "{}: {how:?} has a zero", all());
    assert!(ks == vs, "{}: k and v must have one shape", all());
    assert!(
        heads.is_multiple_of(kv_heads),
        "{}: {kv_heads} key/value heads do not divide {heads} heads",
        all()
    );
    assert!(
        q.cols().is_multiple_of(heads) && k.cols() * heads == q.cols() * kv_heads,
        "{}: {heads} heads and {kv_heads} key/value heads must have one size",
        all()
    );
    assert!(
        q.rows().is_multiple_of(batch) && k.rows().is_multiple_of(batch),
        "{}: a batch of {batch} does not divide the rows",
        all()
    );
    assert!(!causal || k.rows() >= q.rows(), "{}: causal, but the queries are longer than the keys", all());
}

/// Cosines and sines of the rotary position embedding (Su et al. 2021, arXiv 2104.09864), computed once for a model.
///
/// The pair (i, i + h/2) turns by position · base^(−2i/h): the "rotate half" order of Llama checkpoints. On a backend that is
/// its own [`Backend::Wide`]: angles are not rounded to bf16.
pub struct Rope<B: Backend> {
    /// [positions, h]: cosines in the first half of a row, sines in the second.
    table: Tensor<B>,
}

impl<B: Backend> Rope<B> {
    /// A table for `positions` positions and heads of size `head`.
    ///
    /// # Panics
    /// If the head size is odd or zero.
    #[track_caller]
    pub fn new(device: &B, positions: usize, head: usize, base: f64) -> Self {
        assert!(head > 0 && head.is_multiple_of(2), "rope: the head size {head} is not even");
        let table = Tensor::from_fn(device, [positions, head], |i| {
            let (position, col) = (i / head, i % head);
            let pair = col % (head / 2);
            let angle = position as f64 * base.powf(-2.0 * pair as f64 / head as f64);
            B::Elem::of(if col < head / 2 { angle.cos() } else { angle.sin() })
        }); // [positions, h]
        Self { table }
    }
}
