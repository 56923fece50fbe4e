//! What can be read off a tape beside values and gradients: the time of each op, the first op that was not finite, and the op that
//! is at work, for a device that fails.
//!
//! Not needed to follow a derivative: that is tape.rs.

use super::Tape;
use crate::tensor::{Backend, Shape};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::panic::Location;
use std::time::{Duration, Instant};

/// The calls of one op, and the time they took.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpTime {
    pub calls: usize,
    pub forward: Duration,
    pub backward: Duration,
}

/// Takes the time of each op; None: takes none.
#[derive(Default)]
pub(super) struct Clock(Option<RefCell<Times>>);

struct Times {
    /// The end of the op before.
    last: Instant,
    ops: BTreeMap<&'static str, OpTime>,
}

/// An op and where it was called.
type Place = (&'static str, &'static Location<'static>);

thread_local! {
    /// How this thread's tapes are getting on: whether backward, and with which op.
    static AT_WORK: Cell<Option<(bool, Place)>> = const { Cell::new(None) };
}

/// What this thread's tapes are doing, for a message: "in the backward of OP (LINE)", or "after OP (LINE)" in a forward pass, where an
/// op is known once it is done; empty if they do nothing.
#[cfg(feature = "cuda")]
pub(crate) fn at_work() -> String {
    match AT_WORK.get() {
        Some((true, (op, line))) => format!(" in the backward of {op} ({line})"),
        Some((false, (op, line))) => format!(" after {op} ({line})"),
        None => String::new(),
    }
}

impl Clock {
    /// An op was recorded.
    pub fn recorded(&self, op: &'static str, line: &'static Location<'static>) {
        AT_WORK.set(Some((false, (op, line))));
        let Some(times) = &self.0 else { return };
        let mut times = times.borrow_mut();
        let now = Instant::now();
        let spent = now - std::mem::replace(&mut times.last, now);
        let time = times.ops.entry(op).or_default();
        time.calls += 1;
        time.forward += spent;
    }

    /// Runs the backward of an op.
    pub fn backward(&self, op: &'static str, line: &'static Location<'static>, run: impl FnOnce()) {
        AT_WORK.set(Some((true, (op, line))));
        let start = self.0.is_some().then(Instant::now);
        run();
        AT_WORK.set(None);
        let (Some(times), Some(start)) = (&self.0, start) else { return };
        times.borrow_mut().ops.entry(op).or_default().backward += start.elapsed();
    }
}

/// An op that produced a NaN or an infinity.
#[derive(Clone, Debug)]
pub struct NonFinite {
    pub op: &'static str,
    /// Where it was called.
    pub line: &'static Location<'static>,
    pub shape: Shape,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} at {}", self.op, self.shape, self.line)
    }
}

impl<B: Backend> Tape<B> {
    /// An empty tape that takes the time of each op: see [`Tape::times`].
    pub fn timed(device: &B) -> Self {
        let times = Times { last: Instant::now(), ops: BTreeMap::new() };
        let mut tape = Self::new(device);
        tape.clock = Clock(Some(RefCell::new(times)));
        tape
    }

    /// An empty tape that keeps values which are given back by [`Var::forget`](super::Var::forget), for
    /// [`Tape::first_non_finite`] to look at.
    pub fn keeping(device: &B) -> Self {
        let mut tape = Self::new(device);
        tape.keeps = true;
        tape
    }

    /// The time spent so far by name of op; of a tape from [`Tape::new`], nothing. An op's forward is the time since the op
    /// before it was recorded, so what runs in between counts as the next op's.
    pub fn times(&self) -> BTreeMap<&'static str, OpTime> {
        self.clock.0.as_ref().map(|times| times.borrow().ops.clone()).unwrap_or_default()
    }

    /// The names of the recorded ops, in order.
    pub fn ops(&self) -> Vec<&'static str> {
        self.nodes.borrow().iter().map(|node| node.op).collect()
    }

    /// The first op whose value has a NaN or an infinity: the place to look when a loss is not finite. Of values that were
    /// forgotten nothing is known.
    pub fn first_non_finite(&self) -> Option<NonFinite> {
        let nodes = self.nodes.borrow();
        let node = nodes.iter().find(|node| node.value.as_ref().is_some_and(|value| !value.is_finite()))?;
        Some(NonFinite { op: node.op, line: node.line, shape: node.shape })
    }
}
