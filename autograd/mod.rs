//! Reverse-mode differentiation on a tape: a list that ops append to going forward and that is popped going backward.
//!
//! Read tape.rs first (the whole mechanism), then one op, e.g. `lowrank_linear` in ops/linear.rs. Every op is a method of
//! [`Var`]; its forward is one call of the backend, and its backward is the closure directly below.

mod gradcheck;
mod ops;
mod tape;
mod watch;

pub use gradcheck::{GradCheck, gradcheck};
pub use ops::{Rope, concat};
pub use tape::{Grads, Tape, Var, VarId};
#[cfg(feature = "cuda")]
pub(crate) use watch::at_work;
pub use watch::{NonFinite, OpTime};
