//! The tape, its variables and their gradients. No sorting, no recursion, no gradient stored on a value, nothing to reset.
//!
//! Times and the search for what is not finite are in watch.rs.
//! Gradients of leaves are in [`Backend::Wide`], where they are not rounded to fewer bits: many products add to each, and an optimizer
//! reads them. Those of all else have the tape's elements.
//! Letters: x, y variables; dy the gradient of the loss with respect to y.

use super::watch::Clock;
use crate::tensor::{Accum, Backend, Mat, Shape, Tensor};
use std::cell::{Cell, RefCell};
use std::panic::Location;

/// What an op does going backward: takes dy, adds to the gradients of its inputs.
type Backward<B> = Box<dyn FnOnce(Tensor<B>, &mut Grads<B>)>;

pub(super) struct Node<B: Backend> {
    pub op: &'static str,
    /// Where the user called the op.
    pub line: &'static Location<'static>,
    /// None once it is forgotten.
    pub value: Option<Tensor<B>>,
    pub shape: Shape,
    /// Whether a gradient is wanted here: it is a leaf, or depends on one.
    wanted: bool,
    /// The first op that has this as an input: going backward, the last that adds to its gradient.
    first_use: Option<usize>,
    /// None for leaves and constants.
    backward: Option<Backward<B>>,
}

/// The ops of one forward pass, in order.
pub struct Tape<B: Backend> {
    device: B,
    pub(super) nodes: RefCell<Vec<Node<B>>>,
    /// Whether backward() has run: old variables must not meet new nodes.
    consumed: Cell<bool>,
    pub(super) keeps: bool,
    pub(super) clock: Clock,
}

/// A value on a tape. `Copy`; ops are its methods.
pub struct Var<'t, B: Backend> {
    tape: &'t Tape<B>,
    id: VarId,
}

/// A variable's place on its tape: what a backward closure keeps of its inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VarId(usize);

impl<B: Backend> Tape<B> {
    /// An empty tape for tensors on `device`.
    pub fn new(device: &B) -> Self {
        Self {
            device: device.clone(),
            nodes: RefCell::default(),
            consumed: Cell::new(false),
            keeps: false,
            clock: Clock::default(),
        }
    }

    /// An input whose gradient is wanted.
    #[track_caller]
    pub fn leaf(&self, value: &Tensor<B>) -> Var<'_, B> {
        self.push("leaf", value.clone(), true, None)
    }

    /// An input whose gradient is not wanted.
    #[track_caller]
    pub fn constant(&self, value: &Tensor<B>) -> Var<'_, B> {
        self.push("constant", value.clone(), false, None)
    }

    /// Appends an op: the only way to make a variable that is not an input, so that no value exists without its gradient.
    ///
    /// `backward` receives dy and adds the gradient of each input to [`Grads`] by the input's [`Var::id`]. It should keep
    /// only the tensors that it needs: they live until it has run.
    ///
    /// # Panics
    /// If an input is on another tape.
    #[track_caller]
    pub fn record(
        &self,
        op: &'static str,
        inputs: &[Var<'_, B>],
        value: Tensor<B>,
        backward: impl FnOnce(Tensor<B>, &mut Grads<B>) + 'static,
    ) -> Var<'_, B> {
        let id = self.nodes.borrow().len();
        for input in inputs {
            assert!(std::ptr::eq(self, input.tape), "{op}: the inputs are on different tapes");
            if let Some(node) = self.nodes.borrow_mut().get_mut(input.id.0) {
                node.first_use.get_or_insert(id);
            }
        }
        let wanted = inputs.iter().any(|x| x.wanted());
        self.push(op, value, wanted, wanted.then(|| Box::new(backward) as Backward<B>))
    }

    #[track_caller]
    fn push(
        &self,
        op: &'static str,
        value: Tensor<B>,
        wanted: bool,
        backward: Option<Backward<B>>,
    ) -> Var<'_, B> {
        assert!(!self.consumed.get(), "{op}: this tape was consumed by backward(); start a new one");
        let (line, shape) = (Location::caller(), value.shape());
        self.clock.recorded(op, line);
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(Node { op, line, value: Some(value), shape, wanted, first_use: None, backward });
        Var { tape: self, id: VarId(nodes.len() - 1) }
    }
}

impl<'t, B: Backend> Var<'t, B> {
    /// The variable's value (shared, not copied).
    ///
    /// # Panics
    /// After [`Var::backward`], which frees the tape's values as it goes, or [`Var::forget`].
    #[track_caller]
    pub fn value(self) -> Tensor<B> {
        self.node(|node| node.value.clone()).expect("value: it was given back by forget()")
    }

    /// The shape of the value.
    #[track_caller]
    pub fn shape(self) -> Shape {
        self.node(|node| node.shape)
    }

    /// Where gradients for this variable go.
    pub fn id(self) -> VarId {
        self.id
    }

    /// Whether a gradient will be asked for: it is a leaf, or depends on one.
    pub(super) fn wanted(self) -> bool {
        self.node(|node| node.wanted)
    }

    #[track_caller]
    fn node<R>(self, f: impl FnOnce(&Node<B>) -> R) -> R {
        let nodes = self.tape.nodes.borrow();
        f(nodes.get(self.id.0).expect("this variable's tape was consumed by backward()"))
    }

    /// The gradients of this one-element variable with respect to the leaves. Consumes the tape's nodes, last first; each
    /// op's saved tensors are freed as soon as it has run.
    ///
    /// # Panics
    /// If the value has more than one element, or the tape was consumed before.
    #[track_caller]
    pub fn backward(self) -> Grads<B> {
        self.backward_onto([])
    }

    /// As [`Var::backward`], on top of gradients that leaves have already: those of several batches are summed so without a pass
    /// for it, since products add to what is there.
    ///
    /// # Panics
    /// Also if a gradient has not the shape of its leaf.
    #[track_caller]
    pub fn backward_onto(self, before: impl IntoIterator<Item = (VarId, Tensor<B::Wide>)>) -> Grads<B> {
        self.backward_with(before, |_, _| {})
    }

    /// As [`Var::backward_onto`]; `complete` is called for each leaf as soon as nothing will be added to its gradient any more: those
    /// that no op uses first, then those of the last ops. It may [`Grads::take`] that one, and [`Grads::put`] it back when all is done.
    #[track_caller]
    pub fn backward_with(
        self,
        before: impl IntoIterator<Item = (VarId, Tensor<B::Wide>)>,
        mut complete: impl FnMut(&mut Grads<B>, VarId),
    ) -> Grads<B> {
        let shape = self.shape();
        assert!(shape.len() == 1, "backward: the loss has shape {shape}; reduce it with sum() or mean()");
        let tape = self.tape;
        tape.consumed.set(true);
        let (mut grads, mut leaves) = {
            let nodes = tape.nodes.borrow();
            let is_leaf = |node: &Node<B>| node.wanted && node.backward.is_none();
            let grads = Grads {
                slots: nodes.iter().map(|_| None).collect(),
                leaves: nodes.iter().map(|_| None).collect(),
                is_leaf: nodes.iter().map(is_leaf).collect(),
                shapes: nodes.iter().map(|node| node.shape).collect(),
                wanted: nodes.iter().map(|node| node.wanted).collect(),
                seed: Tensor::full(&tape.device, shape, 1.0), // like the loss
            };
            let leaves = nodes.iter().enumerate().filter(|(_, node)| is_leaf(node));
            let last_add = |(id, node): (usize, &Node<B>)| (node.first_use.unwrap_or(usize::MAX), VarId(id));
            (grads, leaves.map(last_add).collect::<Vec<_>>())
        };
        leaves.sort_by_key(|(last_add, _)| *last_add);
        before.into_iter().for_each(|(leaf, gradient)| grads.add_wide(leaf, gradient, &tape.device));
        grads.add(self.id, grads.seed.clone());
        // each borrow ends before `backward` runs, so that it may look at the tape
        let last = || tape.nodes.borrow_mut().pop();
        while let Some(node) = last() {
            let id = tape.nodes.borrow().len();
            drop(node.value);
            if let (Some(backward), Some(dy)) = (node.backward, grads.slots[id].take()) {
                tape.clock.backward(node.op, node.line, || backward(dy, &mut grads));
            }
            while let Some((_, leaf)) = leaves.pop_if(|(last_add, _)| *last_add >= id) {
                complete(&mut grads, leaf);
            }
        }
        grads
    }
}

/// Gradients by variable. After [`Var::backward`], those of the leaves.
pub struct Grads<B: Backend> {
    /// Of what is no leaf.
    slots: Vec<Option<Tensor<B>>>,
    leaves: Vec<Option<Tensor<B::Wide>>>,
    is_leaf: Vec<bool>,
    shapes: Vec<Shape>,
    wanted: Vec<bool>,
    seed: Tensor<B>,
}

impl<B: Backend> Grads<B> {
    /// Whether `x` leads to a leaf: if not, its gradient need not be computed.
    pub fn wants(&self, x: VarId) -> bool {
        self.wanted[x.0]
    }

    /// Adds `dx` to the gradient of `x`.
    ///
    /// # Panics
    /// If the shape is not that of `x`.
    #[track_caller]
    pub fn add(&mut self, x: VarId, dx: Tensor<B>) {
        if !self.wants(x) {
            return;
        }
        self.fits(x, dx.shape());
        if self.is_leaf[x.0] {
            add_to(&mut self.leaves[x.0], B::widen(&[&dx]).remove(0)); // like x
        } else {
            add_to(&mut self.slots[x.0], dx);
        }
    }

    /// Adds the product `a · b` to the gradient of `x`, accumulating inside the product.
    #[track_caller]
    pub fn matmul<'a>(&mut self, x: VarId, a: impl Into<Mat<'a, B>>, b: impl Into<Mat<'a, B>>) {
        if !self.wants(x) {
            return;
        }
        let (a, b) = (a.into(), b.into());
        let device = a.tensor.device();
        if self.is_leaf[x.0] {
            let (sum, accum) = or_scratch(self.leaves[x.0].take(), &device.wide(), self.shapes[x.0]); // like x
            B::gemm_wide(&[a], &[b], &mut [self.leaves[x.0].insert(sum)], accum);
        } else {
            let (sum, accum) = or_scratch(self.slots[x.0].take(), device, self.shapes[x.0]); // like x
            B::gemm(&[a], &[b], &mut [self.slots[x.0].insert(sum)], accum);
        }
    }

    /// The gradient of the leaf `x`, or None if the loss does not depend on it.
    pub fn get(&self, x: Var<'_, B>) -> Option<&Tensor<B::Wide>> {
        self.leaves[x.id.0].as_ref()
    }

    /// Gives the leaf `x` a gradient where [`Grads::take`] has taken one.
    ///
    /// # Panics
    /// If there is one: something was added after it was complete, by an op that does not name all of its inputs.
    #[track_caller]
    pub fn put(&mut self, x: VarId, gradient: Tensor<B::Wide>) {
        assert!(self.leaves[x.0].is_none(), "gradient: an op adds to a leaf that is none of its inputs");
        self.fits(x, gradient.shape());
        self.leaves[x.0] = Some(gradient);
    }

    /// [`Grads::add`] of what is not rounded to the tape's elements, and for a leaf need not be.
    #[track_caller]
    pub(super) fn add_wide(&mut self, x: VarId, dx: Tensor<B::Wide>, device: &B) {
        if !self.is_leaf[x.0] {
            return self.add(x, device.narrow(&[&dx]).remove(0)); // like x
        }
        self.fits(x, dx.shape());
        add_to(&mut self.leaves[x.0], dx);
    }

    #[track_caller]
    fn fits(&self, x: VarId, given: Shape) {
        let shape = self.shapes[x.0];
        assert!(given == shape, "gradient: {given} for a variable of shape {shape}");
    }

    /// Takes out what has been added to the gradient of `x`, which is no leaf, for a backward that adds its own to it and gives the sum
    /// to [`Grads::add`].
    pub fn taken(&mut self, x: VarId) -> Option<Tensor<B>> {
        self.slots[x.0].take()
    }

    /// [`Grads::matmul`] of each product; those for leaves, and of one shape, in one batch.
    #[track_caller]
    pub(super) fn matmuls(&mut self, all: Vec<(VarId, Mat<'_, B>, Mat<'_, B>)>) {
        let (mut left, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|(x, ..)| self.is_leaf[x.0]);
        others.into_iter().for_each(|(x, a, b)| self.matmul(x, a, b));
        while let Some((first, a, b)) = left.first() {
            let (of_one_kind, begun) = ((a.kind(), b.kind()), self.leaves[first.0].is_some());
            let mut sums: Vec<(VarId, Tensor<B::Wide>)> = Vec::new();
            let (mut left_operands, mut right_operands, mut later) = (Vec::new(), Vec::new(), Vec::new());
            for (x, a, b) in left {
                // a leaf that occurs twice is in two batches
                let alike = (a.kind(), b.kind()) == of_one_kind && self.leaves[x.0].is_some() == begun;
                if !alike || sums.iter().any(|(other, _)| *other == x) {
                    later.push((x, a, b));
                    continue;
                }
                let device = a.tensor.device().wide();
                sums.push((x, or_scratch(self.leaves[x.0].take(), &device, self.shapes[x.0]).0)); // like x
                left_operands.push(a);
                right_operands.push(b);
            }
            let accum = if begun { Accum::Add } else { Accum::Replace };
            let mut c: Vec<_> = sums.iter_mut().map(|(_, sum)| sum).collect();
            B::gemm_wide(&left_operands, &right_operands, &mut c, accum);
            sums.into_iter().for_each(|(x, sum)| self.leaves[x.0] = Some(sum));
            left = later;
        }
    }

    /// The value of a one-element gradient. For the 1 that a backward begins with, the device need not be waited for.
    pub(super) fn scalar(&self, dy: &Tensor<B>) -> f64 {
        if std::ptr::eq(dy.buffer(), self.seed.buffer()) { 1.0 } else { dy.item() }
    }

    /// Takes the gradient of the leaf `x` out; zeros if the loss does not depend on it.
    pub fn take(&mut self, x: VarId, device: &B) -> Tensor<B::Wide> {
        let gradient = self.leaves[x.0].take();
        gradient.unwrap_or_else(|| Tensor::zeros(&device.wide(), self.shapes[x.0])) // like x
    }
}

fn add_to<B: Backend>(sum: &mut Option<Tensor<B>>, dx: Tensor<B>) {
    match sum {
        Some(sum) => sum.axpby(1.0, &dx, 1.0),
        empty => *empty = Some(dx),
    }
}

/// What there is to add a product to, or room for it.
fn or_scratch<B: Backend>(sum: Option<Tensor<B>>, device: &B, shape: Shape) -> (Tensor<B>, Accum) {
    match sum {
        Some(sum) => (sum, Accum::Add),
        None => (Tensor::scratch(device, shape), Accum::Replace), // shape
    }
}

impl<B: Backend> Clone for Var<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Var<'_, B> {}

impl<'t, B: Backend> Var<'t, B> {
    /// The tape it is on.
    pub fn tape(self) -> &'t Tape<B> {
        self.tape
    }

    /// Gives the value back, which then nobody can ask for any more. Without this it lives as long as its node, whether a derivative
    /// needs it or not (those that do have it themselves, and keep it). A tape from [`Tape::keeping`] forgets nothing.
    pub fn forget(self) {
        if let Some(node) = self.tape.nodes.borrow_mut().get_mut(self.id.0) {
            node.value.take_if(|_| !self.tape.keeps);
        }
    }
}

impl<B: Backend> Tape<B> {
    /// The device of the tape's tensors.
    pub fn device(&self) -> &B {
        &self.device
    }

    /// Appends an op that has no derivative. A gradient that reaches it panics, rather than being dropped in silence.
    #[track_caller]
    pub fn record_opaque(&self, op: &'static str, inputs: &[Var<'_, B>], value: Tensor<B>) -> Var<'_, B> {
        let line = Location::caller();
        self.record(op, inputs, value, move |_, _| {
            panic!(
                "{op} at {line} has no derivative, and the loss depends on it; \
                 call .detach() on its result if it is meant to be constant"
            )
        })
    }
}
