//! What the momentum rules share: the moving average of the gradients, and batches of one shape for the orthogonalisation.
//!
//! Letters: M momentum, β its decay, ∇ the gradient.

use super::FactorPair;
use super::optimizer::State;
use crate::tensor::{Backend, Tensor, in_batches, items_per_task, scale_all};
use rayon::prelude::*;

/// M ← βM + (1−β)∇ for each average; returns the directions to go against: M, or with `nesterov` βM + (1−β)∇, the average
/// as it would stand after the same gradient once more (Dozat 2016; Muon's default).
pub(crate) fn momentum<'a, B: Backend>(
    averages: impl IntoIterator<Item = &'a mut Tensor<B>>,
    grads: impl IntoIterator<Item = &'a Tensor<B>>,
    beta: f64,
    nesterov: bool,
) -> Vec<Tensor<B>> {
    let some = |pairs: &mut [(&mut Tensor<B>, &Tensor<B>)]| -> Vec<Tensor<B>> {
        B::axpby(pairs.iter_mut().map(|(m, g)| (1.0 - beta, *g, beta, &mut **m)).collect());
        if !nesterov {
            return pairs.iter().map(|(m, _)| (**m).clone()).collect(); // like each m
        }
        let scaled: Vec<_> = pairs.iter().map(|(_, g)| (1.0 - beta, *g)).collect();
        let mut ahead = scale_all(&scaled); // like each m
        B::axpby(ahead.iter_mut().zip(pairs).map(|(ahead, (m, _))| (beta, &**m, 1.0, ahead)).collect());
        ahead
    };
    let mut pairs: Vec<_> = averages.into_iter().zip(grads).collect();
    let bytes = pairs.first().map_or(0, |(m, _)| 4 * m.len() * size_of::<B::Elem>());
    pairs.par_chunks_mut(items_per_task::<B>(bytes)).flat_map_iter(some).collect()
}

/// What weight decay leaves of W: 1 − ηλ, or nothing.
pub(super) fn left_by_decay(eta: f64, decay: f64) -> f64 {
    1.0 - (eta * decay).min(1.0)
}

/// A and B of each pair, in turn.
pub(crate) fn factors<B: Backend>(pairs: &[FactorPair<B>]) -> Vec<&Tensor<B>> {
    pairs.iter().flat_map(|p| [&p.a, &p.b]).collect()
}

/// As [`factors`], for writing.
pub(crate) fn factors_mut<B: Backend>(pairs: &mut [FactorPair<B>]) -> Vec<&mut Tensor<B>> {
    pairs.iter_mut().flat_map(|p| [&mut p.a, &mut p.b]).collect()
}

/// State of one kind, a tensor for each tensor of the parameters.
pub(crate) fn named<'a, B: Backend>(
    what: &'static str,
    tensors: impl IntoIterator<Item = &'a mut Tensor<B>>,
) -> State<'a, B> {
    tensors.into_iter().enumerate().map(|(i, x)| (what, i, x)).collect()
}

/// Applies `f` to batches of one shape each; the results come back in the order of `items`.
pub(crate) fn each_shape<B: Backend>(
    items: &[&Tensor<B>],
    f: impl Fn(&[&Tensor<B>]) -> Vec<Tensor<B>>,
) -> Vec<Tensor<B>> {
    in_batches(items, |x| x.shape(), f)
}
