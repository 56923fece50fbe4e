//! Ops that move elements without changing them.

use crate::autograd::Var;
use crate::tensor::{Backend, Shape, Tensor, blocks, columns_of, side_by_side};
use std::ops::Range;

impl<'t, B: Backend> Var<'t, B> {
    /// The same elements under another shape.
    ///
    /// # Panics
    /// If the number of elements differs.
    #[track_caller]
    pub fn reshape(self, shape: impl Into<Shape>) -> Self {
        let x = self.value();
        let (ix, old) = (self.id(), x.shape());
        let y = x.reshape(shape); // shape
        self.tape().record("reshape", &[self], y, move |dy, grads| grads.add(ix, dy.reshape(old)))
    }

    /// Columns `range` of the last axis.
    ///
    /// # Panics
    /// If the range is empty or reaches past the last axis.
    #[track_caller]
    pub fn slice(self, range: Range<usize>) -> Self {
        let x = self.value();
        let (shape, start, width) = (x.shape(), range.start, range.len());
        assert!(
            width > 0 && range.end <= x.cols(),
            "slice: {range:?} of the last axis of {shape}, which has {} columns",
            x.cols()
        );
        let y = columns_of(&[&x], &[(0, range.clone())]).remove(0); // [.., width]
        let ix = self.id();
        self.tape().record("slice", &[self], y, move |dy, grads| {
            let mut dx = Tensor::zeros(dy.device(), shape); // like x
            dx.copy_cols(start, &dy, 0..width);
            grads.add(ix, dx);
        })
    }

    /// The same value as a constant: no gradient passes through.
    #[track_caller]
    pub fn detach(self) -> Self {
        self.tape().constant(&self.value())
    }
}

/// Joins tensors along their last axis; the other axes must agree.
///
/// # Panics
/// If there are none, or the other axes differ.
#[track_caller]
pub fn concat<'t, B: Backend>(parts: &[Var<'t, B>]) -> Var<'t, B> {
    let first = parts.first().expect("concat: nothing to join");
    let values: Vec<_> = parts.iter().map(|x| x.value()).collect();
    let shape = values[0].shape();
    for other in values.iter().map(Tensor::shape) {
        assert!(
            other.with_cols(1) == shape.with_cols(1),
            "concat: {shape} and {other} differ before the last axis"
        );
    }
    let y = side_by_side(&[&values.iter().collect::<Vec<_>>()]).remove(0); // [.., Σ cols]
    let ids: Vec<_> = parts.iter().map(|x| x.id()).collect();
    let widths: Vec<_> = values.iter().map(Tensor::cols).collect();
    first.tape().record("concat", parts, y, move |dy, grads| {
        let parts: Vec<_> = blocks(widths).map(|range| (0, range)).collect();
        let dxs = columns_of(&[&dy], &parts); // like each part
        ids.into_iter().zip(dxs).for_each(|(id, dx)| grads.add(id, dx));
    })
}
