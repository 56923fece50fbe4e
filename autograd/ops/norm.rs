//! Ops that normalise each row (the last axis).
//!
//! Letters: d row length, g gain [d], b bias [d].

use crate::autograd::Var;
use crate::tensor::{Backend, Tensor, same_shape};

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
        check_gain(&x, &g);
        let (y, inv_rms) = B::rms_norm(&x, &g, eps); // [.., d], [N]
        self.rms_normed(gain, y, inv_rms)
    }

    /// The sum s = x + r, and [`Var::rms_norm`] of it: (s, y), in one pass where the backend has one.
    ///
    /// # Panics
    /// If the shapes of x and r differ, or as [`Var::rms_norm`].
    #[track_caller]
    pub fn add_rms_norm(self, r: Self, gain: Self, eps: f64) -> (Self, Self) {
        let (x, other, g) = (self.value(), r.value(), gain.value());
        same_shape("add_rms_norm", &x, &other);
        check_gain(&x, &g);
        let ([sum, y], inv_rms) = B::add_rms_norm(&x, &other, &g, eps); // [.., d] × 2, [N]
        let sum = self.added(r, sum); // [.., d]
        (sum, sum.rms_normed(gain, y, inv_rms))
    }

    /// Records what `rms_norm` gave.
    #[track_caller]
    fn rms_normed(self, gain: Self, y: Tensor<B>, inv_rms: Tensor<B::Wide>) -> Self {
        let (x, g, ix, ig) = (self.value(), gain.value(), self.id(), gain.id());
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

#[track_caller]
fn check_gain<B: Backend>(x: &Tensor<B>, g: &Tensor<B>) {
    let (d, gs) = (x.cols(), g.shape());
    assert!(gs.dims() == [d], "rms_norm: {} needs a gain of shape [{d}], not {gs}", x.shape());
}
