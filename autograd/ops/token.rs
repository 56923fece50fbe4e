//! Ops that meet token ids: the embedding and the loss.
//!
//! Letters: N tokens, v vocabulary, d width.

use crate::autograd::Var;
use crate::tensor::{Backend, Shape, Tensor};

impl<'t, B: Backend> Var<'t, B> {
    /// Row `ids[i]` of this table [v, d], for each i → [N, d].
    ///
    /// # Panics
    /// If an id is not below v.
    #[track_caller]
    pub fn embedding(self, ids: &[u32]) -> Self {
        let table = self.value();
        let (v, _) = table.shape().matrix("embedding");
        in_vocabulary("embedding", "id", ids, table.shape(), v);
        let y = B::embedding(&table, ids); // [N, d]
        let (it, shape, ids) = (self.id(), table.shape(), ids.to_vec());
        self.tape().record("embedding", &[self], y, move |dy, grads| {
            grads.add(it, B::embedding_grad(shape, &ids, &dy)) // [v, d]
        })
    }

    /// The mean over N rows of logits [.., v] of −ln softmax(row)\[target\], in nats → \[1\].
    ///
    /// # Panics
    /// If there is not one target per row, or one is not below v.
    #[track_caller]
    pub fn cross_entropy(self, targets: &[u32]) -> Self {
        self.cross_entropy_wide(targets, 1.0).0
    }

    /// `share` times [`Var::cross_entropy`], for a part of a batch without another pass over the logits; and the loss itself,
    /// unrounded: from 2 to 4 nats, bf16 has steps of 1/64. The gradient does not see that rounding.
    ///
    /// # Panics
    /// As [`Var::cross_entropy`].
    #[track_caller]
    pub fn cross_entropy_wide(self, targets: &[u32], share: f64) -> (Self, Tensor<B::Wide>) {
        let logits = self.value();
        assert!(
            targets.len() == logits.rows() && !targets.is_empty(),
            "cross_entropy: {} has {} rows, but there are {} targets",
            logits.shape(),
            logits.rows(),
            targets.len()
        );
        in_vocabulary("cross_entropy", "target", targets, logits.shape(), logits.cols());
        let (loss, dlogits) = B::cross_entropy(&logits, targets, share); // [1], [.., v]
        let (ix, rounded) = (self.id(), loss.scale(share).cast(self.tape().device())); // [1]
        let y = self.tape().record("cross_entropy", &[self], rounded, move |dy, grads| {
            // the loss is nearly always the end of the tape, where dy = 1 and a pass over the logits is saved
            let dy = grads.scalar(&dy);
            grads.add(ix, if dy == 1.0 { dlogits } else { dlogits.scale(dy) });
        });
        (y, loss)
    }
}

#[track_caller]
fn in_vocabulary(op: &str, what: &str, ids: &[u32], of: Shape, v: usize) {
    if let Some((i, id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= v) {
        panic!("{op}: {what} {id} at position {i} is outside the vocabulary of {v} in {of}");
    }
}
