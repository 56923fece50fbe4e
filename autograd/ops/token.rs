//! Ops that meet token ids: the embedding and the loss.
//!
//! Letters: N tokens, v vocabulary, d width, c rows at a time.

use crate::autograd::Var;
use crate::tensor::{Accum, Backend, Shape, Tensor, product_shape};

/// Bytes of logits that [`Var::linear_cross_entropy`] has at a time: few beside all, and still so many rows that a product has its full speed, on a
/// GPU too.
const LOGITS: usize = 128 << 20;

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

    /// `self.linear(w).cross_entropy(targets)` of x [.., d] and W [v, d] → \[1\]: the output head and the loss in one. Where all logits
    /// would be more than 128 MiB, they exist for some rows at a time.
    ///
    /// # Panics
    /// As [`Var::linear`] and [`Var::cross_entropy`].
    #[track_caller]
    pub fn linear_cross_entropy(self, w: Self, targets: &[u32]) -> Self {
        self.linear_cross_entropy_wide(w, targets, 1.0, None).0
    }

    /// [`Var::linear_cross_entropy`] as [`Var::cross_entropy_wide`] has it, with the logits of `at_once` rows at a time. While they are
    /// there, in the forward pass, their gradients are taken too, and multiplied: the backward only hands on those of x and W. So there
    /// are as many products as otherwise.
    ///
    /// # Panics
    /// As [`Var::linear_cross_entropy`].
    #[track_caller]
    pub fn linear_cross_entropy_wide(
        self,
        w: Self,
        targets: &[u32],
        share: f64,
        at_once: Option<usize>,
    ) -> (Self, Tensor<B::Wide>) {
        let (tape, device) = (self.tape(), self.tape().device());
        let (x, wt) = (self.value(), w.value());
        let (n, d) = (x.rows(), x.cols());
        let row = wt.rows() * size_of::<B::Elem>(); // bytes
        let at_once = at_once.unwrap_or(LOGITS / row.max(1)).max(1);
        if n <= at_once {
            return self.linear(w).cross_entropy_wide(targets, share);
        }
        let (_, v) = product_shape("linear_cross_entropy", (&x).into(), wt.t());
        assert!(
            targets.len() == n,
            "linear_cross_entropy: {} has {n} rows, but there are {} targets",
            x.shape(),
            targets.len()
        );
        in_vocabulary("linear_cross_entropy", "target", targets, wt.shape(), v);
        let row = x.reshape([1, n * d]); // [1, N·d]
        let mut loss = Tensor::zeros(&device.wide(), [1]); // [1]
        let mut dx = self.wanted().then(|| Tensor::scratch(device, [1, n * d])); // [1, N·d]
        let mut dw = w.wanted().then(|| Tensor::scratch(&device.wide(), wt.shape())); // [v, d]
        for (i, targets) in targets.chunks(at_once).enumerate() {
            let (c, start) = (targets.len(), i * at_once * d);
            let mut part = Tensor::scratch(device, [1, c * d]); // [1, c·d]
            part.copy_cols(0, &row, start..start + c * d);
            let part = part.reshape([c, d]); // [c, d]
            let logits = part.matmul(wt.t()); // [c, v]
            let of_all = c as f64 / n as f64;
            let (mean, dlogits) = B::cross_entropy(&logits, targets, share * of_all); // [1], [c, v]
            drop(logits);
            loss.axpby(of_all, &mean, 1.0);
            if let Some(dx) = &mut dx {
                let part = dlogits.matmul(&wt).reshape([1, c * d]); // [1, c·d]
                dx.copy_cols(start, &part, 0..c * d);
            }
            if let Some(dw) = &mut dw {
                let accum = if i == 0 { Accum::Replace } else { Accum::Add };
                B::gemm_wide(&[dlogits.t()], &[(&part).into()], &mut [dw], accum);
            }
        }
        let dx = dx.map(|dx| dx.reshape(x.shape())); // [.., d]
        let (ix, iw, rounded) = (self.id(), w.id(), loss.scale(share).cast(device)); // [1]
        let device = device.clone();
        let y = tape.record("linear_cross_entropy", &[self, w], rounded, move |dy, grads| {
            let dy = grads.scalar(&dy); // as in cross_entropy
            if let Some(dx) = dx {
                grads.add(ix, if dy == 1.0 { dx } else { dx.scale(dy) });
            }
            if let Some(dw) = dw {
                grads.add_wide(iw, if dy == 1.0 { dw } else { dw.scale(dy) }, &device);
            }
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
