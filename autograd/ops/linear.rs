//! Products: matrices, a dense layer, a low-rank layer, a bias.
//!
//! Letters: N rows of x (its leading axes together), n inputs, m outputs, r rank; W [m, n] = A [m, r] · Bᵀ, B [n, r].

use crate::autograd::Var;
use crate::tensor::{Backend, Mat, Shape, Tensor, blocks, product_shape, products, products_beside};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

impl<'t, B: Backend> Var<'t, B> {
    /// The matrix product `self · other`: [m, k] · [k, n] → [m, n].
    ///
    /// # Panics
    /// If an operand is not a matrix or the inner sizes differ.
    #[track_caller]
    pub fn matmul(self, other: Self) -> Self {
        self.product(false, other, false)
    }

    /// `self · otherᵀ`: [m, k] · [n, k]ᵀ → [m, n].
    #[track_caller]
    pub fn matmul_nt(self, other: Self) -> Self {
        self.product(false, other, true)
    }

    /// `selfᵀ · other`: [k, m]ᵀ · [k, n] → [m, n].
    #[track_caller]
    pub fn matmul_tn(self, other: Self) -> Self {
        self.product(true, other, false)
    }

    /// `selfᵀ · otherᵀ`: [k, m]ᵀ · [n, k]ᵀ → [m, n].
    #[track_caller]
    pub fn matmul_tt(self, other: Self) -> Self {
        self.product(true, other, true)
    }

    #[track_caller]
    fn product(self, ta: bool, other: Self, tb: bool) -> Self {
        let (a, b) = (self.value(), other.value());
        let (left, right) = (Mat::from(&a).t_if(ta), Mat::from(&b).t_if(tb));
        assert!(
            a.shape().dims().len() == 2 && b.shape().dims().len() == 2,
            "matmul: {left} · {right}: both must be matrices"
        );
        let y = left.matmul(right); // [m, n]
        let (ia, ib) = (self.id(), other.id());
        self.tape().record("matmul", &[self, other], y, move |dy, grads| {
            // with P = A or Aᵀ and Q = B or Bᵀ, Y = P·Q: dP = dY·Qᵀ, dQ = Pᵀ·dY; a transposed operand takes the transpose
            let (p, q) = (Mat::from(&a).t_if(ta), Mat::from(&b).t_if(tb));
            if ta {
                grads.matmul(ia, q, dy.t());
            } else {
                grads.matmul(ia, &dy, q.t());
            }
            if tb {
                grads.matmul(ib, dy.t(), p);
            } else {
                grads.matmul(ib, p.t(), &dy);
            }
        })
    }

    /// A dense layer: x [.., n] · Wᵀ with W [m, n] → [.., m].
    ///
    /// # Panics
    /// If W is not a matrix or its inputs are not the last axis of x.
    #[track_caller]
    pub fn linear(self, w: Self) -> Self {
        let (x, wt) = (self.value(), w.value());
        assert!(wt.shape().dims().len() == 2, "linear: {} · {}: W must be a matrix", x.shape(), wt.t());
        let (_, m) = product_shape("linear", (&x).into(), wt.t());
        let y = x.matmul(wt.t()).reshape(x.shape().with_cols(m)); // [.., m]
        let (ix, iw) = (self.id(), w.id());
        self.tape().record("linear", &[self, w], y, move |dy, grads| {
            grads.matmul(ix, &dy, &wt); // dx [.., n]
            grads.matmul(iw, dy.t(), &x); // dW [m, n]
        })
    }

    /// A low-rank layer: (x·B)·Aᵀ = x·Wᵀ with W = A·Bᵀ, which is never formed; x [.., n], A [m, r], B [n, r] → [.., m].
    ///
    /// # Panics
    /// If the ranks of A and B differ, or the rows of B are not the last axis of x.
    #[track_caller]
    pub fn lowrank_linear(self, a: Self, b: Self) -> Self {
        let (x, a_, b_) = (self.value(), a.value(), b.value());
        let [m, _] = check_pair(&x, &a_, &b_);
        let h = x.matmul(&b_); // [N, r]
        let y = h.matmul(a_.t()).reshape(x.shape().with_cols(m)); // [.., m]
        let (ix, ia, ib) = (self.id(), a.id(), b.id());
        self.tape().record("lowrank_linear", &[self, a, b], y, move |dy, grads| {
            let dh = Mat::from(&dy).matmul(&a_); // [N, r]
            grads.matmul(ia, dy.t(), &h); // dA [m, r]
            grads.matmul(ib, x.t(), &dh); // dB [n, r]
            grads.matmul(ix, &dh, b_.t()); // dx [.., n]
        })
    }

    /// [`Var::lowrank_linear`] of one x with each of several pairs, whose B [n, r] lie side by side: (x·\[B₁|B₂|…\])·A₁ᵀ, and so on; x [.., n],
    /// A [m, r] each, B [n, Σr] → [.., m] each. So x is read once, forward and backward, and its gradient is one sum.
    ///
    /// A node of a tape has one value. So one node stands for all, before those of the ys, which hand it their gradients: its turn comes
    /// behind theirs.
    ///
    /// # Panics
    /// If the ranks of all A together are not that of B, or its rows are not the last axis of x.
    #[track_caller]
    pub fn lowrank_linears<const K: usize>(self, a: [Self; K], b: Self) -> [Self; K] {
        let (tape, x, b_) = (self.tape(), self.value(), b.value());
        let factors = a.map(|a| a.value()); // [m, r] each
        let (h_columns, shapes) = check_pairs(&x, &factors, &b_);
        let h = x.matmul(&b_); // [N, Σr]
        let part = |i: usize| Mat::columns(&h, h_columns[i].clone());
        let ys = products(factors.iter().enumerate().map(|(i, a)| (part(i), a.t()))); // [N, m] each
        let (ix, ia, ib) = (self.id(), a.map(|a| a.id()), b.id());
        let none = Tensor::zeros(tape.device(), [0]); // [0]
        let dys = Rc::new(RefCell::new(vec![None::<Tensor<B>>; K]));
        let handed = dys.clone();
        let inputs: Vec<Self> = a.into_iter().chain([b, self]).collect();
        let all = tape.record("lowrank_linears", &inputs, none.clone(), move |_, grads| {
            let dys: Vec<_> =
                handed.take().into_iter().enumerate().filter_map(|(i, dy)| Some((i, dy?))).collect(); // [.., m] each
            let mut dh = match dys.len() == K {
                true => Tensor::scratch(x.device(), h.shape()), // [N, Σr]
                false => Tensor::zeros(x.device(), h.shape()),  // [N, Σr]: some columns get nothing
            };
            let products = dys.iter().map(|(i, dy)| (dy.into(), (&factors[*i]).into(), h_columns[*i].start));
            products_beside(&products.collect::<Vec<_>>(), &mut dh); // dh = [dy₁·A₁|dy₂·A₂|…]
            let part = |i: usize| Mat::columns(&h, h_columns[i].clone());
            grads.matmuls(dys.iter().map(|(i, dy)| (ia[*i], dy.t(), part(*i))).collect()); // dA [m, r] each
            grads.matmul(ib, x.t(), &dh); // dB [n, Σr]
            grads.matmul(ix, &dh, b_.t()); // dx [.., n]
        });
        let mut ys = ys.into_iter().zip(shapes).enumerate();
        std::array::from_fn(|_| {
            let (i, (y, shape)) = ys.next().expect("as many as pairs");
            let (dys, to, none) = (dys.clone(), all.id(), none.clone()); // [0]
            tape.record("lowrank_linears", &[all], y.reshape(shape), move |dy, grads| {
                dys.borrow_mut()[i] = Some(dy); // [.., m]
                grads.add(to, none); // so that its turn comes
            })
        })
    }

    /// Adds the row vector `bias` \[d\] to every row of x [.., d].
    ///
    /// # Panics
    /// If the bias is not as long as the last axis of x.
    #[track_caller]
    pub fn add_bias(self, bias: Self) -> Self {
        let (x, b) = (self.value(), bias.value());
        assert!(
            b.shape().dims() == [x.cols()],
            "add_bias: {} needs a bias of shape [{}], not {}",
            x.shape(),
            x.cols(),
            b.shape()
        );
        let y = B::add_row(&x, &b); // [.., d]
        let (ix, ib) = (self.id(), bias.id());
        self.tape().record("add_bias", &[self, bias], y, move |dy, grads| {
            if grads.wants(ib) {
                grads.add(ib, B::sum_rows(&dy)); // [d]
            }
            grads.add(ix, dy);
        })
    }
}

/// m and r of A [m, r] and B [n, r], which fit each other and x [.., n].
#[track_caller]
fn check_pair<B: Backend>(x: &Tensor<B>, a: &Tensor<B>, b: &Tensor<B>) -> [usize; 2] {
    let (xs, sa, sb) = (x.shape(), a.shape(), b.shape());
    let (&[m, r], &[n, r_b]) = (sa.dims(), sb.dims()) else {
        panic!("lowrank_linear: x {xs}, A {sa}, B {sb}: A and B must be matrices")
    };
    assert!(r == r_b, "lowrank_linear: x {xs}, A {sa}, B {sb}: the ranks {r} and {r_b} of A and B differ");
    assert!(
        xs.cols() == n,
        "lowrank_linear: x {xs}, A {sa}, B {sb}: inner sizes {} of x and {n} of B differ",
        xs.cols()
    );
    [m, r]
}

/// The columns of x·B that belong to each A [m, r], and the shapes [.., m] of the results.
#[track_caller]
fn check_pairs<B: Backend, const K: usize>(
    x: &Tensor<B>,
    all: &[Tensor<B>; K],
    b: &Tensor<B>,
) -> (Vec<Range<usize>>, [Shape; K]) {
    let (xs, sb, ranks) = (x.shape(), b.shape(), all.each_ref().map(Tensor::cols));
    assert!(
        sb.dims().len() == 2 && all.iter().all(|a| a.shape().dims().len() == 2),
        "lowrank_linears: x {xs}, B {sb}: A and B must be matrices"
    );
    assert!(
        ranks.iter().sum::<usize>() == sb.cols(),
        "lowrank_linears: x {xs}, B {sb}: the ranks {ranks:?} of all A are not the columns of B"
    );
    assert!(
        xs.cols() == sb.rows(),
        "lowrank_linears: x {xs}, B {sb}: inner sizes {} of x and {} of B differ",
        xs.cols(),
        sb.rows()
    );
    (blocks(ranks).collect(), all.each_ref().map(|a| xs.with_cols(a.rows())))
}
