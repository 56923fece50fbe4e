//! A model's parameters in one arena. A model holds `Copy` handles; gradients and momenta have the same layout; optimizers
//! route by type, so there are three lists and no name filters.

use super::FactorPair;
use crate::autograd::{Grads, Tape, Var, VarId};
use crate::tensor::{Backend, Tensor, cast_all, scale_all};
use std::ops::Index;

/// One tensor set per kind of parameter: values, gradients or momenta.
#[derive(Clone, Debug)]
pub struct Values<B: Backend> {
    /// Hidden matrices kept as factors.
    pub pairs: Vec<FactorPair<B>>,
    /// Hidden matrices kept whole: what a dense model has where a low-rank one has pairs.
    pub hidden: Vec<Tensor<B>>,
    /// Everything else: embeddings, output heads, gains, biases.
    pub dense: Vec<Tensor<B>>,
}

impl<B: Backend> Default for Values<B> {
    fn default() -> Self {
        Self { pairs: Vec::new(), hidden: Vec::new(), dense: Vec::new() }
    }
}

impl<B: Backend> Values<B> {
    /// Every tensor: A and B of each pair, then the hidden matrices, then the rest.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor<B>> {
        let factors = self.pairs.iter().flat_map(|p| [&p.a, &p.b]);
        factors.chain(&self.hidden).chain(&self.dense)
    }

    /// As [`Values::tensors`], for writing.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor<B>> {
        let factors = self.pairs.iter_mut().flat_map(|p| [&mut p.a, &mut p.b]);
        factors.chain(&mut self.hidden).chain(&mut self.dense)
    }

    /// `self ← self + alpha·other`, for accumulating gradients over micro-batches.
    pub fn add_scaled(&mut self, alpha: f64, other: &Self) {
        B::axpby(self.tensors_mut().zip(other.tensors()).map(|(x, y)| (alpha, y, 1.0, x)).collect());
    }

    /// `self ← alpha·self`.
    pub fn scale(&mut self, alpha: f64) {
        let scaled = scale_all(&self.tensors().map(|x| (alpha, x)).collect::<Vec<_>>()); // like each tensor
        self.tensors_mut().zip(scaled).for_each(|(x, y)| *x = y);
    }

    /// The norm of all elements together.
    pub fn norm(&self) -> f64 {
        B::norms(&self.tensors().collect::<Vec<_>>()).iter().map(|norm| norm.powi(2)).sum::<f64>().sqrt()
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.tensors().map(Tensor::len).sum()
    }
}

/// Handle of a factor pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair(pub usize);
/// Handle of a hidden matrix that is kept whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hidden(pub usize);
/// Handle of any other tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dense(pub usize);

/// The parameters of a model, with their names.
#[derive(Clone, Debug)]
pub struct Params<B: Backend> {
    /// The parameters themselves.
    pub values: Values<B>,
    /// Names in the order of the lists of `values`.
    pub pair_names: Vec<String>,
    pub hidden_names: Vec<String>,
    pub dense_names: Vec<String>,
}

impl<B: Backend> Default for Params<B> {
    fn default() -> Self {
        Self {
            values: Values::default(),
            pair_names: Vec::new(),
            hidden_names: Vec::new(),
            dense_names: Vec::new(),
        }
    }
}

impl<B: Backend> Params<B> {
    /// Adds a factor pair.
    pub fn pair(&mut self, name: impl Into<String>, pair: FactorPair<B>) -> Pair {
        self.values.pairs.push(pair);
        self.pair_names.push(name.into());
        Pair(self.values.pairs.len() - 1)
    }

    /// Adds a hidden matrix that is kept whole.
    pub fn hidden(&mut self, name: impl Into<String>, w: Tensor<B>) -> Hidden {
        self.values.hidden.push(w);
        self.hidden_names.push(name.into());
        Hidden(self.values.hidden.len() - 1)
    }

    /// Adds any other tensor.
    pub fn dense(&mut self, name: impl Into<String>, x: Tensor<B>) -> Dense {
        self.values.dense.push(x);
        self.dense_names.push(name.into());
        Dense(self.values.dense.len() - 1)
    }

    /// The names of [`Values::tensors`], in its order: `NAME.A` and `NAME.B` for the factors of a pair.
    pub fn names(&self) -> impl Iterator<Item = String> + '_ {
        let factors = self.pair_names.iter().flat_map(|n| [format!("{n}.A"), format!("{n}.B")]);
        factors.chain(self.hidden_names.iter().chain(&self.dense_names).cloned())
    }

    /// Number of parameters.
    pub fn count(&self) -> usize {
        self.values.count()
    }

    /// The parameters as leaves of a tape.
    #[track_caller]
    pub fn on<'t>(&self, tape: &'t Tape<B>) -> ParamVars<'t, B> {
        self.place(|x| tape.leaf(x))
    }

    /// The parameters as constants of a tape: for evaluation, where no gradient is wanted and none is prepared.
    #[track_caller]
    pub fn constants_on<'t>(&self, tape: &'t Tape<B>) -> ParamVars<'t, B> {
        self.place(|x| tape.constant(x))
    }

    fn place<'t>(&self, put: impl Fn(&Tensor<B>) -> Var<'t, B>) -> ParamVars<'t, B> {
        ParamVars {
            pairs: self.values.pairs.iter().map(|p| PairVar { a: put(&p.a), b: put(&p.b) }).collect(),
            hidden: self.values.hidden.iter().map(&put).collect(),
            dense: self.values.dense.iter().map(&put).collect(),
        }
    }
}

/// The two leaves of a factor pair.
pub struct PairVar<'t, B: Backend> {
    pub a: Var<'t, B>,
    pub b: Var<'t, B>,
}

/// A model's parameters on a tape, indexed by handle: `x.linear(w[self.head])`.
pub struct ParamVars<'t, B: Backend> {
    pairs: Vec<PairVar<'t, B>>,
    hidden: Vec<Var<'t, B>>,
    dense: Vec<Var<'t, B>>,
}

impl<B: Backend> ParamVars<'_, B> {
    /// The gradients of all parameters, in their layout; zeros for those that the loss does not reach.
    pub fn gradients(&self, mut grads: Grads<B>) -> Values<B::Wide> {
        let mut take = |x: &Var<'_, B>| grads.take(x.id(), x.tape().device());
        Values {
            pairs: self.pairs.iter().map(|p| FactorPair { a: take(&p.a), b: take(&p.b) }).collect(),
            hidden: self.hidden.iter().map(&mut take).collect(),
            dense: self.dense.iter().map(&mut take).collect(),
        }
    }

    /// Each gradient so far with its variable, for [`Var::backward_onto`].
    pub fn pair_up(&self, gradients: Values<B::Wide>) -> impl Iterator<Item = (VarId, Tensor<B::Wide>)> {
        let factors = self.pairs.iter().flat_map(|p| [p.a, p.b]);
        let vars = factors.chain(self.hidden.iter().copied()).chain(self.dense.iter().copied());
        let Values { pairs, hidden, dense } = gradients;
        let gradients = pairs.into_iter().flat_map(|p| [p.a, p.b]).chain(hidden).chain(dense);
        vars.map(Var::id).zip(gradients)
    }
}

impl<'t, B: Backend> Index<Pair> for ParamVars<'t, B> {
    type Output = PairVar<'t, B>;
    fn index(&self, handle: Pair) -> &PairVar<'t, B> {
        &self.pairs[handle.0]
    }
}
impl<'t, B: Backend> Index<Hidden> for ParamVars<'t, B> {
    type Output = Var<'t, B>;
    fn index(&self, handle: Hidden) -> &Var<'t, B> {
        &self.hidden[handle.0]
    }
}
impl<'t, B: Backend> Index<Dense> for ParamVars<'t, B> {
    type Output = Var<'t, B>;
    fn index(&self, handle: Dense) -> &Var<'t, B> {
        &self.dense[handle.0]
    }
}

// ---- in another precision

impl<B: Backend> Values<B> {
    /// [`Tensor::cast`] of every tensor.
    pub fn cast<C: Backend<Wide = B::Wide>>(&self, device: &C) -> Values<C> {
        let mut all = cast_all(&self.tensors().collect::<Vec<_>>(), device).into_iter(); // like each tensor
        let mut next = || all.next().expect("as many as there are tensors");
        Values {
            pairs: self.pairs.iter().map(|_| FactorPair { a: next(), b: next() }).collect(),
            hidden: self.hidden.iter().map(|_| next()).collect(),
            dense: self.dense.iter().map(|_| next()).collect(),
        }
    }
}

impl<B: Backend> Params<B> {
    /// [`Tensor::cast`] of every parameter.
    pub fn cast<C: Backend<Wide = B::Wide>>(&self, device: &C) -> Params<C> {
        Params {
            values: self.values.cast(device),
            pair_names: self.pair_names.clone(),
            hidden_names: self.hidden_names.clone(),
            dense_names: self.dense_names.clone(),
        }
    }
}
