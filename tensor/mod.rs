//! Dense tensors: a shape, a device and a shared, contiguous, row-major buffer.
//!
//! There are no strides, no general broadcasting, and of views only the beginning of a tensor ([`Tensor::prefix`]). A
//! transpose is a flag of the matrix product ([`Tensor::t`]), heads are split by index arithmetic inside attention, and every
//! other op reads a tensor as rows of its last axis. A tensor is cheap to clone; writing to a shared one copies it first.
//! Derivatives live in [`crate::autograd`], not here.

mod backend;
mod cpu;
mod scalar;
mod shape;

pub use backend::{Accum, AdamWStep, AdamWUpdate, Attention, Axpby, Backend, Binary, Columns, Mat, Unary};
pub(crate) use backend::{apart, in_batches, items_per_task, product_shape, products, products_beside};
pub use cpu::Cpu;
pub(crate) use cpu::simd;
pub use scalar::{Bf16, Element, Scalar};
pub use shape::Shape;

use std::ops::Range;
use std::{fmt, sync::Arc};

/// An n-dimensional array of `B::Elem` on the device `B` (rank 0 to 4, row-major).
pub struct Tensor<B: Backend> {
    device: B,
    shape: Shape,
    buffer: Arc<B::Buffer>,
}

impl<B: Backend> Clone for Tensor<B> {
    /// Shares the buffer; the first write to either copies it.
    fn clone(&self) -> Self {
        Self { device: self.device.clone(), shape: self.shape, buffer: self.buffer.clone() }
    }
}

impl<B: Backend> Tensor<B> {
    /// A tensor of `shape` from row-major `values`.
    ///
    /// # Panics
    /// If the number of values is not the product of the shape.
    #[track_caller]
    pub fn from_vec(device: &B, shape: impl Into<Shape>, values: Vec<B::Elem>) -> Self {
        let shape = shape.into();
        let n = values.len();
        assert!(n == shape.len(), "from_vec: {n} values for {shape}, which holds {}", shape.len());
        Self::from_buffer(device, shape, device.upload(values))
    }

    /// A tensor of `shape` whose row-major element `i` is `f(i)`.
    pub fn from_fn(device: &B, shape: impl Into<Shape>, f: impl FnMut(usize) -> B::Elem) -> Self {
        let shape = shape.into();
        Self::from_vec(device, shape, (0..shape.len()).map(f).collect())
    }

    /// A tensor of `shape` filled with `value`.
    pub fn full(device: &B, shape: impl Into<Shape>, value: f64) -> Self {
        let shape = shape.into();
        Self::from_buffer(device, shape, device.filled(shape.len(), value))
    }

    /// A tensor of zeros.
    pub fn zeros(device: &B, shape: impl Into<Shape>) -> Self {
        Self::full(device, shape, 0.0)
    }

    /// The identity matrix [n, n].
    pub fn identity(device: &B, n: usize) -> Self {
        let mut values = vec![B::Elem::of(0.0); n * n];
        values.iter_mut().step_by(n + 1).for_each(|x| *x = B::Elem::of(1.0));
        Self::from_vec(device, [n, n], values) // [n, n]
    }

    /// A tensor whose elements are unspecified, to be overwritten whole.
    pub fn scratch(device: &B, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Self::from_buffer(device, shape, device.scratch(shape.len()))
    }

    /// Zeros with the shape and device of `self`.
    pub fn zeros_like(&self) -> Self {
        Self::zeros(&self.device, self.shape)
    }

    /// Wraps a backend's own buffer, whose length must be that of `shape`.
    pub fn from_buffer(device: &B, shape: impl Into<Shape>, buffer: B::Buffer) -> Self {
        Self { device: device.clone(), shape: shape.into(), buffer: Arc::new(buffer) }
    }

    /// The device the tensor lives on.
    pub fn device(&self) -> &B {
        &self.device
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Number of elements.
    #[allow(clippy::len_without_is_empty)] // a tensor has at least one element unless an axis is zero
    pub fn len(&self) -> usize {
        self.shape.len()
    }

    /// Product of all axes but the last (1 for rank 0 and 1).
    pub fn rows(&self) -> usize {
        self.shape.rows()
    }

    /// Size of the last axis (1 for rank 0).
    pub fn cols(&self) -> usize {
        self.shape.cols()
    }

    /// The backend's buffer (row-major).
    pub fn buffer(&self) -> &B::Buffer {
        &self.buffer
    }

    /// The backend's buffer for writing; copied first if another tensor shares it.
    pub fn buffer_mut(&mut self) -> &mut B::Buffer {
        Arc::make_mut(&mut self.buffer)
    }

    /// The elements on the host, row-major.
    pub fn to_vec(&self) -> Vec<B::Elem> {
        let mut values = self.device.download(&self.buffer);
        values.truncate(self.len()); // the buffer of a prefix is longer
        values
    }

    /// The elements on the host as f64, row-major.
    pub fn to_f64(&self) -> Vec<f64> {
        self.to_vec().into_iter().map(Element::f64).collect()
    }

    /// The only element, as f64.
    ///
    /// # Panics
    /// If there is not exactly one.
    #[track_caller]
    pub fn item(&self) -> f64 {
        assert!(self.len() == 1, "item: {} has {} elements", self.shape, self.len());
        self.to_vec()[0].f64()
    }

    /// The same elements on a device with another precision, rounded if it has a smaller one; the same tensor if it has this one.
    pub fn cast<C: Backend<Wide = B::Wide>>(&self, device: &C) -> Tensor<C> {
        cast_all(&[self], device).remove(0) // like self
    }

    /// The same elements under another shape, without a copy.
    ///
    /// # Panics
    /// If the number of elements differs.
    #[track_caller]
    pub fn reshape(&self, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        assert!(
            shape.len() == self.len(),
            "reshape: {} holds {} elements, {shape} holds {}",
            self.shape,
            self.len(),
            shape.len()
        );
        Self { shape, ..self.clone() }
    }

    /// As many of the first elements as `shape` holds, without a copy: the buffer stays the longer one, of which ops read what
    /// the shape says. So a tensor that grows in place can be read, as long as it is there; a write copies the buffer whole.
    ///
    /// # Panics
    /// If there are fewer elements.
    #[track_caller]
    pub fn prefix(&self, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        let held = self.len();
        assert!(shape.len() <= held, "prefix: {} holds {held} elements, {shape} more", self.shape);
        Self { shape, ..self.clone() }
    }

    /// Columns `range` of the last axis of x, over as many of this tensor's, from `first` on.
    ///
    /// # Panics
    /// If one of them has fewer, or they have not as many rows.
    #[track_caller]
    pub fn copy_cols(&mut self, first: usize, x: &Self, range: Range<usize>) {
        assert!(
            x.rows() == self.rows() && range.end <= x.cols() && first + range.len() <= self.cols(),
            "copy_cols: {range:?} of {} to {first} of {}",
            x.shape,
            self.shape
        );
        B::copy_cols(
            &[x],
            &mut [self],
            &[Columns { from: (0, range.start), to: (0, first), width: range.len() }],
        );
    }

    /// This matrix, transposed, as an operand of a product: a flag, not a copy.
    pub fn t(&self) -> Mat<'_, B> {
        Mat::from(self).t()
    }

    /// The matrix product `self · other`, [m, k] · [k, n] → [m, n]; either side may be transposed with [`Tensor::t`]. A
    /// tensor of another rank counts as its rows × its last axis.
    ///
    /// # Panics
    /// If the inner sizes differ.
    #[track_caller]
    pub fn matmul<'a>(&'a self, other: impl Into<Mat<'a, B>>) -> Self {
        Mat::from(self).matmul(other)
    }

    /// `alpha · self`.
    pub fn scale(&self, alpha: f64) -> Self {
        let mut y = Self::scratch(&self.device, self.shape);
        B::axpby(vec![(alpha, self, 0.0, &mut y)]);
        y
    }

    /// `self ← alpha · x + beta · self`; with `beta` = 0 the old values are not read.
    ///
    /// # Panics
    /// If the shapes differ.
    #[track_caller]
    pub fn axpby(&mut self, alpha: f64, x: &Self, beta: f64) {
        same_shape("axpby", x, self);
        B::axpby(vec![(alpha, x, beta, self)]);
    }

    /// Elementwise sum.
    #[track_caller]
    pub fn add(&self, other: &Self) -> Self {
        same_shape("add", self, other);
        B::binary(Binary::Add, self, other)
    }

    /// Elementwise difference.
    #[track_caller]
    pub fn sub(&self, other: &Self) -> Self {
        same_shape("sub", self, other);
        B::binary(Binary::Sub, self, other)
    }

    /// The Frobenius norm √Σx², without overflow or underflow on the way; NaN if an element is NaN.
    pub fn norm(&self) -> f64 {
        B::read(&B::norms(&[self]))[0]
    }

    /// Whether every element is finite.
    pub fn is_finite(&self) -> bool {
        let norm = self.norm();
        // a sum of squares can overflow while every element is finite: only then look at each
        norm.is_finite() || self.to_vec().iter().all(|x| x.f64().is_finite())
    }
}

impl<B: Backend> fmt::Debug for Tensor<B> {
    /// Shape and the first eight elements.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = self.to_vec();
        let more = if v.len() > 8 { ", …" } else { "" };
        write!(f, "Tensor{} [", self.shape)?;
        for (i, x) in v.iter().take(8).enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{x}")?;
        }
        write!(f, "{more}]")
    }
}

/// [`Tensor::cast`] of each.
pub(crate) fn cast_all<B: Backend, C: Backend<Wide = B::Wide>>(
    xs: &[&Tensor<B>],
    device: &C,
) -> Vec<Tensor<C>> {
    device.narrow(&B::widen(xs).iter().collect::<Vec<_>>()) // like each x
}

/// The columns that blocks of these widths have, side by side from 0 on.
pub(crate) fn blocks(widths: impl IntoIterator<Item = usize>) -> impl Iterator<Item = Range<usize>> {
    widths.into_iter().scan(0, |end, width| {
        *end += width;
        Some(*end - width..*end)
    })
}

/// The tensors of each group side by side, along the last axis; a group has one number of rows.
pub(crate) fn side_by_side<B: Backend>(groups: &[&[&Tensor<B>]]) -> Vec<Tensor<B>> {
    let scratch = |group: &&[&Tensor<B>]| {
        let width = group.iter().map(|x| x.cols()).sum();
        Tensor::scratch(group[0].device(), group[0].shape().with_cols(width)) // [.., Σ cols]
    };
    let mut ys: Vec<_> = groups.iter().map(scratch).collect();
    let (mut copies, mut x) = (Vec::new(), 0);
    for (y, group) in groups.iter().enumerate() {
        for range in blocks(group.iter().map(|x| x.cols())) {
            copies.push(Columns { from: (x, 0), to: (y, range.start), width: range.len() });
            x += 1;
        }
    }
    B::copy_cols(&groups.concat(), &mut ys.iter_mut().collect::<Vec<_>>(), &copies);
    ys
}

/// Columns of some tensors, each with which of them it is from.
pub(crate) fn columns_of<B: Backend>(xs: &[&Tensor<B>], parts: &[(usize, Range<usize>)]) -> Vec<Tensor<B>> {
    let scratch = |(x, range): &(usize, Range<usize>)| {
        Tensor::scratch(xs[*x].device(), xs[*x].shape().with_cols(range.len())) // [.., range]
    };
    let mut ys: Vec<_> = parts.iter().map(scratch).collect();
    let copy = |(y, (x, range)): (usize, &(usize, Range<usize>))| Columns {
        from: (*x, range.start),
        to: (y, 0),
        width: range.len(),
    };
    let copies: Vec<_> = parts.iter().enumerate().map(copy).collect();
    B::copy_cols(xs, &mut ys.iter_mut().collect::<Vec<_>>(), &copies);
    ys
}

/// alpha · x for each (alpha, x).
pub(crate) fn scale_all<B: Backend>(terms: &[(f64, &Tensor<B>)]) -> Vec<Tensor<B>> {
    let scratch = |(_, x): &(f64, &Tensor<B>)| Tensor::scratch(x.device(), x.shape()); // like x
    let mut ys: Vec<_> = terms.iter().map(scratch).collect();
    B::axpby(terms.iter().zip(&mut ys).map(|(&(alpha, x), y)| (alpha, x, 0.0, y)).collect());
    ys
}

/// Panics with both shapes at the caller's line unless they are equal.
#[track_caller]
pub(crate) fn same_shape<B: Backend>(op: &str, a: &Tensor<B>, b: &Tensor<B>) {
    let (a, b) = (a.shape(), b.shape());
    assert!(a == b, "{op}: {a} and {b}: the shapes must be equal");
}
