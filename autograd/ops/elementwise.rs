//! Ops on single elements, and the sums that end them.

use crate::autograd::Var;
use crate::tensor::{Backend, Binary, Tensor, Unary, same_shape};
use std::ops::{Add, Mul, Sub};

impl<'t, B: Backend> Add for Var<'t, B> {
    type Output = Self;

    /// Elementwise sum of two tensors of one shape.
    #[track_caller]
    fn add(self, other: Self) -> Self {
        let y = self.value().add(&other.value()); // like self
        self.added(other, y)
    }
}

impl<'t, B: Backend> Sub for Var<'t, B> {
    type Output = Self;

    /// Elementwise difference of two tensors of one shape.
    #[track_caller]
    fn sub(self, other: Self) -> Self {
        let y = self.value().sub(&other.value()); // like self
        let (ia, ib) = (self.id(), other.id());
        self.tape().record("sub", &[self, other], y, move |dy, grads| {
            if grads.wants(ib) {
                grads.add(ib, dy.scale(-1.0));
            }
            grads.add(ia, dy);
        })
    }
}

impl<'t, B: Backend> Mul for Var<'t, B> {
    type Output = Self;

    /// Elementwise (Hadamard) product of two tensors of one shape.
    #[track_caller]
    fn mul(self, other: Self) -> Self {
        let (a, b) = (self.value(), other.value());
        same_shape("mul", &a, &b);
        let y = B::binary(Binary::Mul, &a, &b); // like self
        let (ia, ib) = (self.id(), other.id());
        self.tape().record("mul", &[self, other], y, move |dy, grads| {
            if grads.wants(ia) {
                grads.add(ia, B::binary(Binary::Mul, &dy, &b));
            }
            if grads.wants(ib) {
                grads.add(ib, B::binary(Binary::Mul, &dy, &a));
            }
        })
    }
}

impl<'t, B: Backend> Var<'t, B> {
    /// Records y = self + other.
    #[track_caller]
    pub(super) fn added(self, other: Self, y: Tensor<B>) -> Self {
        let (ia, ib) = (self.id(), other.id());
        self.tape().record("add", &[self, other], y, move |dy, grads| {
            grads.add(ia, dy.clone());
            grads.add(ib, dy);
        })
    }

    /// `alpha · x`.
    #[track_caller]
    pub fn scale(self, alpha: f64) -> Self {
        let y = self.value().scale(alpha); // like self
        let ix = self.id();
        self.tape().record("scale", &[self], y, move |dy, grads| grads.add(ix, dy.scale(alpha)))
    }

    /// The sum of all elements → \[1\].
    #[track_caller]
    pub fn sum(self) -> Self {
        let x = self.value();
        let (device, shape) = (x.device().clone(), x.shape());
        let y = Tensor::full(&device, [1], B::sum(&x)); // [1]
        let ix = self.id();
        self.tape().record("sum", &[self], y, move |dy, grads| {
            grads.add(ix, Tensor::full(&device, shape, grads.scalar(&dy))) // like x
        })
    }

    /// The mean of all elements → \[1\].
    #[track_caller]
    pub fn mean(self) -> Self {
        self.sum().scale(1.0 / self.shape().len() as f64)
    }

    /// eˣ.
    #[track_caller]
    pub fn exp(self) -> Self {
        self.unary("exp", Unary::Exp)
    }

    /// The natural logarithm.
    #[track_caller]
    pub fn log(self) -> Self {
        self.unary("log", Unary::Log)
    }

    /// The hyperbolic tangent.
    #[track_caller]
    pub fn tanh(self) -> Self {
        self.unary("tanh", Unary::Tanh)
    }

    /// max(x, 0); its derivative at 0 is taken as 0.
    #[track_caller]
    pub fn relu(self) -> Self {
        self.unary("relu", Unary::Relu)
    }

    /// x / (1 + e⁻ˣ).
    #[track_caller]
    pub fn silu(self) -> Self {
        self.unary("silu", Unary::Silu)
    }

    #[track_caller]
    fn unary(self, op: &'static str, f: Unary) -> Self {
        let x = self.value();
        let y = B::unary(f, &x); // like x
        let ix = self.id();
        self.tape().record(op, &[self], y, move |dy, grads| grads.add(ix, B::unary_grad(f, &x, &dy)))
    }

    /// `silu(self) ∘ up`, self being the gate (Shazeer 2020, arXiv 2002.05202), in one pass.
    ///
    /// # Panics
    /// If the shapes differ.
    #[track_caller]
    pub fn swiglu(self, up: Self) -> Self {
        let (gate, u) = (self.value(), up.value());
        same_shape("swiglu", &gate, &u);
        let y = B::swiglu(&gate, &u); // like gate
        let (ig, iu) = (self.id(), up.id());
        self.tape().record("swiglu", &[self, up], y, move |dy, grads| {
            let [dgate, dup] = B::swiglu_grad(&gate, &u, &dy); // like gate
            grads.add(ig, dgate);
            grads.add(iu, dup);
        })
    }
}
