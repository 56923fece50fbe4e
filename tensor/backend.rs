//! What a device must be able to do. One trait without default bodies, so that a missing kernel is a compile error.
//!
//! A backend computes; it checks nothing (shapes are checked where the user calls) and knows no tape. `*_grad` is the
//! vector-Jacobian product of the method above it: given the gradient of the output, it returns that of the inputs.
//! Letters: n rows, d columns of a tensor read as rows of its last axis; dy gradient of y.

use super::{Element, Scalar, Shape, Tensor};
use crate::lowrank::Radius;
use std::ops::Range;

/// A device and an element type, e.g. [`Cpu<f32>`](super::Cpu).
pub trait Backend: Clone + Send + Sync + 'static {
    /// Element type as the host sees it.
    type Elem: Element;
    /// A contiguous run of elements on the device.
    type Buffer: Clone + Send + Sync;
    /// Norms of some tensors, where they were computed.
    type Norms: Send;
    /// The same device computing in at least f32: for what must not be rounded to fewer bits, which are statistics of rows,
    /// losses, and weights in training. Itself, if it does.
    type Wide: Backend<Wide = Self::Wide>;
    /// The same device computing in bf16, for what need not be exact; itself, if it cannot.
    type Narrow: Backend<Wide = Self::Wide>;
    /// Whether a call returns before its work is done, as on a GPU: many small calls then cost more than few large ones, and a time is that of
    /// the work only after [`Backend::sync`].
    const ASYNCHRONOUS: bool;
    /// A chain of batched products is run on so many bytes of the batch at a time; unlimited where a batch is one launch.
    const WORKING_SET: usize;

    /// Moves host values to the device.
    fn upload(&self, host: Vec<Self::Elem>) -> Self::Buffer;
    /// Copies a buffer to the host.
    fn download(&self, buffer: &Self::Buffer) -> Vec<Self::Elem>;
    /// A buffer of unspecified contents, for kernels that overwrite all of it.
    fn scratch(&self, len: usize) -> Self::Buffer;
    /// `len` copies of `value`.
    fn filled(&self, len: usize, value: f64) -> Self::Buffer;
    /// This device as `Wide`.
    fn wide(&self) -> Self::Wide;
    /// This device as `Narrow`.
    fn narrower(&self) -> Self::Narrow;
    /// The same elements in `Wide`; no copies where that is `Self`.
    fn widen(xs: &[&Tensor<Self>]) -> Vec<Tensor<Self::Wide>>;
    /// Rounds to this backend's elements; no copies where they are `Wide`'s.
    fn narrow(&self, xs: &[&Tensor<Self::Wide>]) -> Vec<Tensor<Self>>;
    /// Waits until everything asked for so far is done. Only measurements of time need it.
    fn sync(&self);

    /// `c[i] ←` or `+= a[i] · b[i]` for a batch of independent products of one shape. Not the whole batch need be contiguous.
    fn gemm(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut [&mut Tensor<Self>], accum: Accum);
    /// `c[:, first[i]..] ← a[i] · b[i]` for a batch of products of one shape, side by side in one matrix: each replaces the columns that it is wide.
    fn gemm_beside(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut Tensor<Self>, first: &[usize]);
    /// As `gemm`, with sums that are not rounded to this backend's elements: for gradients, which many products add to.
    fn gemm_wide(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut [&mut Tensor<Self::Wide>], accum: Accum);
    /// `c[i] ← a[i] · b[i]`, where the caller knows each product to be symmetric: one half may be copied from the other.
    fn gemm_symmetric(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut [&mut Tensor<Self>]);
    /// `y ← alpha·x + beta·y` for each (alpha, x, beta, y); `y` is not read where `beta` = 0.
    fn axpby(terms: Vec<Axpby<Self>>);
    /// Σ x.
    fn sum(x: &Tensor<Self>) -> f64;
    /// √Σx² of each tensor, scaled so that it neither overflows nor underflows. No device is waited for.
    fn norms(xs: &[&Tensor<Self>]) -> Self::Norms;
    /// The norms on the host; waits for a device.
    fn read(norms: &Self::Norms) -> Vec<f64>;
    /// x/‖x‖ of each (x, other), and `other`, a tensor of its shape, where x is zero; neither overflows nor underflows on the way, and
    /// no device is waited for.
    fn normalised(xs: &[(&Tensor<Self>, &Tensor<Self>)]) -> Vec<Tensor<Self>>;

    /// `y = f(x)` per element.
    fn unary(f: Unary, x: &Tensor<Self>) -> Tensor<Self>;
    /// `f'(x)·dy` per element.
    fn unary_grad(f: Unary, x: &Tensor<Self>, dy: &Tensor<Self>) -> Tensor<Self>;
    /// `f(a, b)` per element.
    fn binary(f: Binary, a: &Tensor<Self>, b: &Tensor<Self>) -> Tensor<Self>;
    /// Adds the row `b` \[d\] to each row of `x` [n, d].
    fn add_row(x: &Tensor<Self>, b: &Tensor<Self>) -> Tensor<Self>;
    /// Sum of the rows of `x` [n, d] → \[d\].
    fn sum_rows(x: &Tensor<Self>) -> Tensor<Self>;
    /// Copies columns of some of `xs` over columns of some of `ys`, none of them twice.
    fn copy_cols(xs: &[&Tensor<Self>], ys: &mut [&mut Tensor<Self>], copies: &[Columns]);

    /// Softmax of each row.
    fn softmax(x: &Tensor<Self>) -> Tensor<Self>;
    fn softmax_grad(y: &Tensor<Self>, dy: &Tensor<Self>) -> Tensor<Self>;
    /// `y = g ∘ x / rms`, rms = √(mean x² + eps) per row; also returns 1/rms \[n\].
    fn rms_norm(x: &Tensor<Self>, g: &Tensor<Self>, eps: f64) -> (Tensor<Self>, Tensor<Self::Wide>);
    /// `x + r`, and `rms_norm` of that: \[sum, y\] and 1/rms \[n\].
    fn add_rms_norm(
        x: &Tensor<Self>,
        r: &Tensor<Self>,
        g: &Tensor<Self>,
        eps: f64,
    ) -> ([Tensor<Self>; 2], Tensor<Self::Wide>);
    /// (before + dx, dg).
    fn rms_norm_grad(
        x: &Tensor<Self>,
        g: &Tensor<Self>,
        inv_rms: &Tensor<Self::Wide>,
        dy: &Tensor<Self>,
        before: Option<Tensor<Self>>,
    ) -> [Tensor<Self>; 2];
    /// `y = g ∘ (x − mean)/std + b` per row, std = √(var + eps); also returns mean and 1/std side by side [n, 2].
    fn layer_norm(
        x: &Tensor<Self>,
        g: &Tensor<Self>,
        b: &Tensor<Self>,
        eps: f64,
    ) -> (Tensor<Self>, Tensor<Self::Wide>);
    /// (dx, dg, db).
    fn layer_norm_grad(
        x: &Tensor<Self>,
        g: &Tensor<Self>,
        stats: &Tensor<Self::Wide>,
        dy: &Tensor<Self>,
    ) -> [Tensor<Self>; 3];
    /// `silu(gate) ∘ up`, silu(x) = x / (1 + e⁻ˣ).
    fn swiglu(gate: &Tensor<Self>, up: &Tensor<Self>) -> Tensor<Self>;
    /// (dgate, dup).
    fn swiglu_grad(gate: &Tensor<Self>, up: &Tensor<Self>, dy: &Tensor<Self>) -> [Tensor<Self>; 2];

    /// Row `ids[i]` of `table` [v, d] for each i → [ids, d].
    fn embedding(table: &Tensor<Self>, ids: &[u32]) -> Tensor<Self>;
    /// The gradient of a table of `shape`: row `ids[i]` receives `dy[i]`.
    fn embedding_grad(shape: Shape, ids: &[u32], dy: &Tensor<Self>) -> Tensor<Self>;
    /// Rotates the pairs (i, i + h/2) of each head of size h by the angle whose cosine and sine stand at columns i and
    /// i + h/2 of row `offset + (row mod len)` of `table` [positions, h]. `inverse` turns the other way: that is the gradient.
    fn rope(
        x: &Tensor<Self>,
        table: &Tensor<Self::Wide>,
        len: usize,
        offset: usize,
        inverse: bool,
    ) -> Tensor<Self>;
    /// Softmax attention; returns the output [like q] and the log-sum-exp of each query's scores [batch, heads, q_len].
    fn attention(
        q: &Tensor<Self>,
        k: &Tensor<Self>,
        v: &Tensor<Self>,
        how: Attention,
    ) -> (Tensor<Self>, Tensor<Self::Wide>);
    /// (dq, dk, dv), from the output `o` and the log-sum-exp; the probabilities are recomputed.
    fn attention_grad(
        qkv: [&Tensor<Self>; 3],
        o: &Tensor<Self>,
        lse: &Tensor<Self::Wide>,
        dout: &Tensor<Self>,
        how: Attention,
    ) -> [Tensor<Self>; 3];
    /// Mean over the rows of −log softmax(logits)\[target\] \[1\], and `share` times its gradient with respect to the logits [n, v].
    fn cross_entropy(
        logits: &Tensor<Self>,
        targets: &[u32],
        share: f64,
    ) -> (Tensor<Self::Wide>, Tensor<Self>);

    /// `x ← beta·x − ρ·o` for each (η, o, beta, x), where ρ is the radius of η and the norms σ_A and σ_B of a pair, of whose factors there are A
    /// and B in turn. No device is waited for.
    fn renormalised_step(sigma: &Self::Norms, radius: Radius, moves: Vec<Axpby<Self>>);
    /// AdamW updates of some tensors and their moments, each in one sweep.
    fn adamw(step: AdamWStep, updates: Vec<AdamWUpdate<Self>>);
}

/// Columns that are copied between two tensors with as many rows. A place is a tensor, counted from 0, and the first column in it.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    pub from: (usize, usize),
    pub to: (usize, usize),
    pub width: usize,
}

/// alpha, x, beta and y of `y ← alpha·x + beta·y`.
pub type Axpby<'a, B> = (f64, &'a Tensor<B>, f64, &'a mut Tensor<B>);

/// How many items of `bytes` each a task should take from a list of independent ones: enough to fill [`Backend::WORKING_SET`].
pub(crate) fn items_per_task<B: Backend>(bytes: usize) -> usize {
    (B::WORKING_SET / bytes.max(1)).max(1)
}

/// Whether a product replaces its destination or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accum {
    Replace,
    Add,
}

/// A matrix operand of a product: a tensor, or some of its columns, and whether it is read transposed.
pub struct Mat<'a, B: Backend> {
    pub(crate) tensor: &'a Tensor<B>,
    pub(crate) transposed: bool,
    /// The first of the tensor's columns that belong to it, and how many do: kernels rely on it that the tensor has them.
    pub(crate) columns: [usize; 2],
}

// derived, these would ask for B: Copy
impl<B: Backend> Clone for Mat<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Mat<'_, B> {}

impl<'a, B: Backend> From<&'a Tensor<B>> for Mat<'a, B> {
    fn from(tensor: &'a Tensor<B>) -> Self {
        Self { tensor, transposed: false, columns: [0, tensor.cols()] }
    }
}

impl<'a, B: Backend> Mat<'a, B> {
    /// Columns `range` of a tensor's last axis, without a copy.
    ///
    /// # Panics
    /// If the tensor has not so many.
    #[track_caller]
    pub fn columns(tensor: &'a Tensor<B>, range: Range<usize>) -> Self {
        assert!(range.end <= tensor.cols(), "columns: {range:?} of {}", tensor.shape());
        Self { tensor, transposed: false, columns: [range.start, range.len()] }
    }

    /// Rows and columns as the product sees them. A tensor of rank 3 or 4 counts as its rows × its last axis.
    pub fn sizes(&self) -> (usize, usize) {
        let (m, n) = (self.tensor.rows(), self.columns[1]);
        if self.transposed { (n, m) } else { (m, n) }
    }

    /// This operand, transposed.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// This operand, transposed if that is asked for.
    pub fn t_if(self, transposed: bool) -> Self {
        if transposed { self.t() } else { self }
    }

    /// What operands of one batch have in common: sizes, whether they are transposed, and elements from one of the tensor's rows to the next.
    pub(crate) fn kind(&self) -> ((usize, usize), bool, usize) {
        (self.sizes(), self.transposed, self.tensor.cols())
    }

    /// The product `self · other`, a new matrix.
    ///
    /// # Panics
    /// If the inner sizes differ.
    #[track_caller]
    pub fn matmul(self, other: impl Into<Mat<'a, B>>) -> Tensor<B> {
        let other = other.into();
        let (m, n) = product_shape("matmul", self, other);
        let device = self.tensor.device();
        let mut c = Tensor::scratch(device, [m, n]); // [m, n]
        B::gemm(&[self], &[other], &mut [&mut c], Accum::Replace);
        c
    }
}

/// The product of each two matrices, those of one kind and shape in one batch.
///
/// # Panics
/// If the inner sizes of a product differ.
#[track_caller]
pub(crate) fn products<'a, B: Backend>(
    operands: impl IntoIterator<Item = (Mat<'a, B>, Mat<'a, B>)>,
) -> Vec<Tensor<B>> {
    let operands: Vec<_> = operands.into_iter().collect();
    let kind = |(a, b): &(Mat<B>, Mat<B>)| (a.kind(), b.kind());
    in_batches(&operands, kind, |batch| {
        let (a, b): (Vec<_>, Vec<_>) = batch.iter().copied().unzip();
        let (m, n) = product_shape("products", a[0], b[0]);
        let scratch = |a: &Mat<B>| Tensor::scratch(a.tensor.device(), [m, n]); // [m, n]
        let mut c: Vec<_> = a.iter().map(scratch).collect();
        B::gemm(&a, &b, &mut c.iter_mut().collect::<Vec<_>>(), Accum::Replace);
        c
    })
}

/// `c[:, first..] ← a·b` for each (a, b, first), those of one kind and shape in one batch.
pub(crate) fn products_beside<B: Backend>(operands: &[(Mat<B>, Mat<B>, usize)], c: &mut Tensor<B>) {
    let kind = |(a, b, _): &(Mat<B>, Mat<B>, usize)| (a.kind(), b.kind());
    in_batches(operands, kind, |batch| {
        let (a, b): (Vec<_>, Vec<_>) = batch.iter().map(|&(a, b, _)| (a, b)).unzip();
        B::gemm_beside(&a, &b, c, &batch.iter().map(|o| o.2).collect::<Vec<_>>());
        vec![(); batch.len()]
    });
}

/// Applies `f` to batches of one kind each; the results come back in the order of `items`.
pub(crate) fn in_batches<T: Copy, K: PartialEq, R>(
    items: &[T],
    kind: impl Fn(&T) -> K,
    mut f: impl FnMut(&[T]) -> Vec<R>,
) -> Vec<R> {
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    while let Some(first) = results.iter().position(Option::is_none) {
        let alike = |&i: &usize| kind(&items[i]) == kind(&items[first]);
        let members: Vec<usize> = (first..items.len()).filter(alike).collect();
        let batch: Vec<T> = members.iter().map(|&i| items[i]).collect();
        members.into_iter().zip(f(&batch)).for_each(|(i, y)| results[i] = Some(y));
    }
    results.into_iter().flatten().collect()
}

/// Panics unless blocks of `width` columns of `c`, from each of `first` on, are columns of it, and one behind the other.
#[track_caller]
pub(crate) fn apart<B: Backend>(first: &[usize], width: usize, c: &Tensor<B>) {
    let ends = first.iter().map(|first| first + width);
    let next = first.iter().skip(1).copied().chain([c.cols()]);
    assert!(
        ends.zip(next).all(|(end, next)| end <= next),
        "{width} columns of {} from {first:?} on",
        c.shape()
    );
}

/// The shape of a · b; panics at the caller's line, with both shapes, if the inner sizes differ.
#[track_caller]
pub(crate) fn product_shape<B: Backend>(op: &str, a: Mat<B>, b: Mat<B>) -> (usize, usize) {
    let ((m, k), (k2, n)) = (a.sizes(), b.sizes());
    assert!(k == k2, "{op}: {a} · {b}: inner sizes {k} and {k2} differ");
    (m, n)
}

impl<B: Backend> std::fmt::Display for Mat<'_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mark = if self.transposed { "ᵀ" } else { "" };
        match self.columns {
            [0, all] if all == self.tensor.cols() => write!(f, "{}{mark}", self.tensor.shape()),
            [first, count] => {
                write!(f, "columns {first}..{} of {}{mark}", first + count, self.tensor.shape())
            }
        }
    }
}

/// Functions of one element. Value and slope stand together in [`Unary::value`] and [`Unary::slope`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unary {
    Exp,
    Log,
    Tanh,
    Relu,
    Silu,
}

impl Unary {
    /// f(x).
    #[inline(always)]
    pub fn value<T: Scalar>(self, x: T) -> T {
        let one = T::one();
        match self {
            Self::Exp => x.fast_exp(),
            Self::Log => x.ln(),
            Self::Tanh => x.tanh(),
            Self::Relu => x.max(T::zero()),
            Self::Silu => x / (one + (-x).fast_exp()),
        }
    }

    /// f'(x); at the kink of relu, 0.
    #[inline(always)]
    pub fn slope<T: Scalar>(self, x: T) -> T {
        let one = T::one();
        match self {
            Self::Exp => x.fast_exp(),
            Self::Log => one / x,
            Self::Tanh => one - x.tanh() * x.tanh(),
            Self::Relu if x > T::zero() => one,
            Self::Relu => T::zero(),
            Self::Silu => {
                let s = one / (one + (-x).fast_exp());
                s * (one + x * (one - s))
            }
        }
    }
}

/// Functions of two elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    Add,
    Sub,
    Mul,
}

/// How queries, keys and values are laid out: q [batch·q_len, heads·h], k and v [batch·k_len, kv_heads·h].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Sequences in the batch; every sequence has the same length.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head j reads head j / (heads / kv_heads).
    pub kv_heads: usize,
    /// A query sees no key after its own position; with k_len > q_len the queries are the last positions.
    pub causal: bool,
}

/// What AdamW updates have in common (Loshchilov & Hutter 2019, Algorithm 2).
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// 1 − beta1ᵗ and 1 − beta2ᵗ.
    pub bias1: f64,
    pub bias2: f64,
}

/// The update of one tensor.
pub struct AdamWUpdate<'a, B: Backend> {
    pub w: &'a mut Tensor<B>,
    pub g: &'a Tensor<B>,
    /// First and second.
    pub moments: &'a mut [Tensor<B>; 2],
    pub lr: f64,
    /// λ: w ← w·(1 − lr·λ) before the update.
    pub decay: f64,
}
