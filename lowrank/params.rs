//! A model's parameters in one arena. A model holds `Copy` handles; gradients and momenta have the same layout; optimizers
//! route by type, so there are three lists and no name filters.

use super::FactorPair;
use crate::autograd::{Grads, Tape, Var, VarId};
use crate::tensor::{Backend, Tensor, blocks, cast_all, columns_of, scale_all, side_by_side};
use std::ops::{Index, Range};
use std::sync::Arc;

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
        let norms = B::read(&B::norms(&self.tensors().collect::<Vec<_>>()));
        norms.iter().map(|norm| norm.powi(2)).sum::<f64>().sqrt()
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
        self.leaves(&[]).on(tape)
    }

    /// The parameters as constants of a tape: for evaluation, where no gradient is wanted and none is prepared.
    #[track_caller]
    pub fn constants_on<'t>(&self, tape: &'t Tape<B>) -> ParamVars<'t, B> {
        self.leaves(&[]).constants_on(tape)
    }
}

/// The two leaves of a factor pair. Of pairs that share their input ([`Params::leaves`]) B is one leaf.
pub struct PairVar<'t, B: Backend> {
    pub a: Var<'t, B>,
    pub b: Var<'t, B>,
}

/// A model's parameters on a tape, indexed by handle: `x.linear(w[self.head])`.
pub struct ParamVars<'t, B: Backend> {
    pairs: Vec<PairVar<'t, B>>,
    hidden: Vec<Var<'t, B>>,
    dense: Vec<Var<'t, B>>,
    leaves: Vec<Var<'t, B>>,
    places: Arc<Places>,
}

impl<B: Backend> ParamVars<'_, B> {
    /// The gradients of all parameters, in their layout; zeros for those that the loss does not reach.
    pub fn gradients(&self, grads: Grads<B>) -> Values<B::Wide> {
        self.leaf_gradients(grads).values()
    }

    /// The same as the tape has them, for [`ParamVars::pair_up`].
    pub fn leaf_gradients(&self, mut grads: Grads<B>) -> Leaves<B::Wide> {
        let take = |x: &Var<'_, B>| grads.take(x.id(), x.tape().device()); // like x
        Leaves { tensors: self.leaves.iter().map(take).collect(), places: self.places.clone() }
    }

    /// Each gradient so far with its variable, for [`Var::backward_onto`].
    pub fn pair_up(&self, gradients: Leaves<B::Wide>) -> impl Iterator<Item = (VarId, Tensor<B::Wide>)> {
        self.leaves.iter().map(|x| x.id()).zip(gradients.tensors)
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

// ---- leaves

/// The parameters as a tape has them, tensor by tensor, or their gradients. Copies of parameters stay as they were when those move.
#[derive(Clone, Debug)]
pub struct Leaves<B: Backend> {
    tensors: Vec<Tensor<B>>,
    places: Arc<Places>,
}

/// Which leaf is what.
#[derive(Debug)]
struct Places {
    /// Of each pair, where A is, where B is, and in which of its columns.
    pairs: Vec<([usize; 2], Range<usize>)>,
    hidden: Range<usize>,
    dense: Range<usize>,
}

impl<B: Backend> Params<B> {
    /// The parameters as leaves. `sharing`: pairs that read the same input x; the B [n, r] of each such group are laid side by side as
    /// one leaf [n, Σr], for [`Var::lowrank_linears`], which then reads x once.
    ///
    /// # Panics
    /// If a pair stands in two groups, or twice in one, or the inputs of a group differ in number.
    #[track_caller]
    pub fn leaves(&self, sharing: &[Vec<Pair>]) -> Leaves<B> {
        let Values { pairs, hidden, dense } = &self.values;
        let mut tensors: Vec<_> = pairs.iter().map(|pair| pair.a.clone()).collect(); // [m, r] each
        let mut beside: Vec<Option<(usize, Range<usize>)>> = vec![None; pairs.len()];
        let mut groups = Vec::new();
        for group in sharing.iter().filter(|group| !group.is_empty()) {
            let leaf = tensors.len() + groups.len();
            let columns = blocks(group.iter().map(|pair| pairs[pair.0].rank()));
            for (&Pair(at), columns) in group.iter().zip(columns) {
                let (name, inputs) = (&self.pair_names[at], pairs[at].inputs());
                assert!(beside[at].is_none(), "leaves: {name} is in a group already");
                let others = pairs[group[0].0].inputs();
                assert!(inputs == others, "leaves: {name} has {inputs} inputs, others of its group {others}");
                beside[at] = Some((leaf, columns));
            }
            groups.push(group.iter().map(|pair| &pairs[pair.0].b).collect::<Vec<_>>());
        }
        tensors.extend(side_by_side(&groups.iter().map(Vec::as_slice).collect::<Vec<_>>())); // [n, Σr] each
        let place = |(i, (beside, pair)): (usize, (Option<_>, &FactorPair<B>))| {
            let (b, columns) = beside.unwrap_or_else(|| {
                tensors.push(pair.b.clone()); // [n, r]
                (tensors.len() - 1, 0..pair.rank())
            });
            ([i, b], columns)
        };
        let places = beside.into_iter().zip(pairs).enumerate().map(place).collect();
        let mut add = |more: &[Tensor<B>]| {
            tensors.extend_from_slice(more);
            tensors.len() - more.len()..tensors.len()
        };
        let places = Places { pairs: places, hidden: add(hidden), dense: add(dense) };
        Leaves { tensors, places: Arc::new(places) }
    }
}

impl<B: Backend> Leaves<B> {
    /// Variables of a tape that gradients are wanted of.
    #[track_caller]
    pub fn on<'t>(&self, tape: &'t Tape<B>) -> ParamVars<'t, B> {
        self.place(|x| tape.leaf(x))
    }

    /// Constants of a tape.
    #[track_caller]
    pub fn constants_on<'t>(&self, tape: &'t Tape<B>) -> ParamVars<'t, B> {
        self.place(|x| tape.constant(x))
    }

    fn place<'t>(&self, put: impl Fn(&Tensor<B>) -> Var<'t, B>) -> ParamVars<'t, B> {
        let leaves: Vec<_> = self.tensors.iter().map(put).collect();
        let Places { pairs, hidden, dense } = &*self.places;
        ParamVars {
            pairs: pairs.iter().map(|&([a, b], _)| PairVar { a: leaves[a], b: leaves[b] }).collect(),
            hidden: leaves[hidden.clone()].to_vec(),
            dense: leaves[dense.clone()].to_vec(),
            leaves,
            places: self.places.clone(),
        }
    }

    /// The tensors in the layout of the parameters: what lies side by side is copied apart.
    pub fn values(&self) -> Values<B> {
        let Places { pairs, hidden, dense } = &*self.places;
        let all: Vec<_> = self.tensors.iter().collect();
        let beside = |([_, b], columns): &&([usize; 2], Range<usize>)| columns.len() < all[*b].cols();
        let parts: Vec<_> =
            pairs.iter().filter(beside).map(|([_, b], columns)| (*b, columns.clone())).collect();
        let mut parts = columns_of(&all, &parts).into_iter(); // [n, r] each
        let pair = |place: &([usize; 2], Range<usize>)| {
            let [a, b] = place.0.map(|leaf| all[leaf].clone()); // [m, r], [n, Σr]
            let part = if beside(&place) { parts.next() } else { None };
            FactorPair { a, b: part.unwrap_or(b) }
        };
        Values {
            pairs: pairs.iter().map(pair).collect(),
            hidden: self.tensors[hidden.clone()].to_vec(),
            dense: self.tensors[dense.clone()].to_vec(),
        }
    }

    /// [`Tensor::cast`] of every tensor.
    pub fn cast<C: Backend<Wide = B::Wide>>(&self, device: &C) -> Leaves<C> {
        let tensors = cast_all(&self.tensors.iter().collect::<Vec<_>>(), device); // like each tensor
        Leaves { tensors, places: self.places.clone() }
    }

    /// Any of the tensors' device.
    ///
    /// # Panics
    /// If there are none.
    pub fn device(&self) -> &B {
        self.tensors[0].device()
    }
}
