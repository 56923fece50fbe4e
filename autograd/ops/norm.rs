//! Ops that normalise each row (the last axis).
//!
//! Letters: d row length, g gain [d], b bias [d].

use crate::autograd::Var;
use crate::tensor::Backend;

impl<'t, B: Backend> Var<'t, B> {
    /// eˣ / Σ eˣ over the last axis.
    #[track_caller]
    pub fn softmax(self) -> Self {
        let y = B::softmax(&self.value()); // [.., d]
        let (ix, kept) = (self.id(), y.clone());
        self.tape().record("softmax", &[self], y, move |dy, grads| grads.add(ix, B::softmax_grad(&kept, &dy)))
    }

    /// g ∘ x / √(mean x² + eps) over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).
    ///
    /// # Panics
    /// If the gain is not as long as the last axis.
    #[track_caller]
    pub fn rms_norm(self, gain: Self, eps: f64) -> Self {
        let (x, g) = (self.value(), gain.value());
        let (d, gs) = (x.cols(), g.shape());
        assert!(gs.dims() == [d], "rms_norm: {} needs a gain of shape [{d}], not {gs}", x.shape());
        let (y, inv_rms) = B::rms_norm(&x, &g, eps); // [.., d], [N]
        let (ix, ig) = (self.id(), gain.id());
        self.tape().record("rms_norm", &[self, gain], y, move |dy, grads| {
            let before = grads.taken(ix); // in models the residual stream's, and a pass over it is saved
            let [dx, dg] = B::rms_norm_grad(&x, &g, &inv_rms, &dy, before); // [.., d], [d]
            grads.add(ix, dx);
            grads.add(ig, dg);
        })
    }

    /// g ∘ (x − mean) / √(variance + eps) + b over the last axis (Ba et al. 2016, arXiv 1607.06450).
    ///
    /// # Panics
    /// If gain or bias are not as long as the last axis.
    #[track_caller]
    pub fn layer_norm(self, gain: Self, bias: Self, eps: f64) -> Self {
        let (x, g, b) = (self.value(), gain.value(), bias.value());
        let (d, gs, bs) = (x.cols(), g.shape(), b.shape());
        assert!(
            gs.dims() == [d] && bs.dims() == [d],
            "layer_norm: {} needs a gain and a bias of shape [{d}], not {gs} and {bs}",
            x.shape()
        );
        let (y, stats) = B::layer_norm(&x, &g, &b, eps); // [.., d], [N, 2]
        let (ix, ig, ib) = (self.id(), gain.id(), bias.id());
        self.tape().record("layer_norm", &[self, gain, bias], y, move |dy, grads| {
            let [dx, dg, db] = B::layer_norm_grad(&x, &g, &stats, &dy); // [.., d], [d], [d]
            grads.add(ix, dx);
            grads.add(ig, dg);
            grads.add(ib, db);
        })
    }
}
