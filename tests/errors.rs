//! Programmer errors: what the message says, and that it points at the line of the user, here of this file.
//!
//! Not about files, checkpoints or configuration: those return `Result` and belong to the application.

mod common;

use common::refusal;
use rankgrad::autograd::{Rope, Tape, concat};
use rankgrad::lowrank::{
    self, FactorPair, NewtonSchulz, Optimizer, PairInit, Params, newton_schulz, power_iteration,
};
use rankgrad::tensor::{Attention, Cpu, Tensor};
use std::panic::{AssertUnwindSafe, Location, catch_unwind};

type C = Cpu<f32>;

/// `f` must panic at the caller's line, with a message that starts with `op` and contains all `parts`.
#[track_caller]
fn refuses<R>(op: &str, parts: &[&str], f: impl FnOnce() -> R) {
    let (here, message) = (Location::caller(), refusal(f));
    assert!(message.starts_with(&format!("{op}: ")), "{here}: {message}");
    for part in parts {
        assert!(message.contains(part), "{here}: no {part} in: {message}");
    }
}

fn cpu() -> C {
    C::default()
}

fn zeros(shape: &[usize]) -> Tensor<C> {
    Tensor::zeros(&cpu(), shape) // shape
}

#[test]
fn the_message_of_matmul_in_full() {
    let tape = Tape::new(&cpu());
    let (a, b) = (tape.leaf(&zeros(&[4, 6])), tape.leaf(&zeros(&[5, 2])));
    let message = refusal(|| a.matmul(b));
    assert_eq!(message, "matmul: [4, 6] · [5, 2]: inner sizes 6 and 5 differ");
    let message = refusal(|| a.value().matmul(&b.value()));
    assert_eq!(message, "matmul: [4, 6] · [5, 2]: inner sizes 6 and 5 differ");
    let message = refusal(|| a.matmul_nt(b));
    assert_eq!(message, "matmul: [4, 6] · [5, 2]ᵀ: inner sizes 6 and 2 differ");
}

#[test]
fn products() {
    let tape = Tape::new(&cpu());
    let leaf = |shape: &[usize]| tape.leaf(&zeros(shape));
    let (a, b, c) = (leaf(&[4, 6]), leaf(&[5, 2]), leaf(&[2, 3, 6]));
    refuses("matmul", &["[4, 6]ᵀ · [5, 2]:", "4 and 5"], || a.matmul_tn(b));
    refuses("matmul", &["[4, 6]ᵀ · [5, 2]ᵀ:", "4 and 2"], || a.matmul_tt(b));
    refuses("matmul", &["[2, 3, 6]", "[4, 6]", "matrices"], || c.matmul_nt(a));
    refuses("matmul", &["[4, 6]ᵀ · [5, 2]:"], || a.value().t().matmul(&b.value()));
    refuses("linear", &["[2, 3, 6] · [5, 2]ᵀ", "6 and 2"], || c.linear(b));
    refuses("linear", &["[4, 6] · [2, 3, 6]ᵀ", "matrix"], || a.linear(c));
    let lowrank = [
        ([5, 2], [6, 3], ["[2, 3, 6]", "[5, 2]", "[6, 3]", "2 and 3"]),
        ([5, 2], [7, 2], ["[2, 3, 6]", "[5, 2]", "[7, 2]", "6 of x and 7 of B"]),
    ];
    for (a, b, parts) in lowrank {
        refuses("lowrank_linear", &parts, || c.lowrank_linear(leaf(&a), leaf(&b)));
    }
    refuses("lowrank_linear", &["[4, 6]", "[2, 3, 6]", "[5, 2]"], || a.lowrank_linear(c, b));
    let together = [
        ([6, 6], ["[2, 3, 6]", "[6, 6]", "[2, 3] of all A"]),
        ([7, 5], ["[2, 3, 6]", "[7, 5]", "6 of x and 7 of B"]),
    ];
    for (side_by_side, parts) in together {
        refuses("lowrank_linears", &parts, || {
            c.lowrank_linears([leaf(&[5, 2]), leaf(&[4, 3])], leaf(&side_by_side))
        });
    }
    refuses("add_bias", &["[4, 6]", "[6]", "not [5, 2]"], || a.add_bias(b));
}

#[test]
fn elementwise() {
    let tape = Tape::new(&cpu());
    let leaf = |shape: &[usize]| tape.leaf(&zeros(shape));
    let (a, b) = (leaf(&[4, 6]), leaf(&[6, 4]));
    let shapes = &["[4, 6]", "[6, 4]"];
    refuses("add", shapes, || a + b);
    refuses("sub", shapes, || a - b);
    refuses("mul", shapes, || a * b);
    refuses("swiglu", shapes, || a.swiglu(b));
    refuses("add", shapes, || a.value().add(&b.value()));
    refuses("sub", shapes, || a.value().sub(&b.value()));
    refuses("axpby", shapes, || a.value().axpby(1.0, &b.value(), 1.0));
}

#[test]
fn norms_and_layout() {
    let tape = Tape::new(&cpu());
    let leaf = |shape: &[usize]| tape.leaf(&zeros(shape));
    let (x, g, wrong) = (leaf(&[2, 3, 6]), leaf(&[6]), leaf(&[1, 6]));
    refuses("rms_norm", &["[2, 3, 6]", "[6]", "[1, 6]"], || x.rms_norm(wrong, 1e-5));
    refuses("layer_norm", &["[2, 3, 6]", "[6]", "[1, 6]"], || x.layer_norm(wrong, g, 1e-5));
    refuses("layer_norm", &["[2, 3, 6]", "[6]", "[1, 6]"], || x.layer_norm(g, wrong, 1e-5));
    refuses("reshape", &["[2, 3, 6]", "36", "[5, 7]", "35"], || x.reshape([5, 7]));
    refuses("reshape", &["[2, 3, 6]", "36", "[5, 7]", "35"], || x.value().reshape([5, 7]));
    refuses("slice", &["4..7", "[2, 3, 6]", "6 columns"], || x.slice(4..7));
    refuses("slice", &["4..4", "[2, 3, 6]"], || x.slice(4..4));
    refuses("concat", &["[2, 3, 6]", "[3, 2, 6]"], || concat(&[x, leaf(&[3, 2, 6])]));
    refuses("concat", &["nothing"], || concat::<C>(&[]));
}

#[test]
fn tokens_and_attention() {
    let tape = Tape::new(&cpu());
    let leaf = |shape: &[usize]| tape.leaf(&zeros(shape));
    let (table, x) = (leaf(&[5, 3]), leaf(&[2, 3, 6]));
    refuses("embedding", &["id 5", "position 2", "[5, 3]"], || table.embedding(&[0, 4, 5]));
    refuses("embedding", &["[2, 3, 6]", "matrix"], || x.embedding(&[0]));
    let (h, w) = (leaf(&[5, 4]), leaf(&[3, 4]));
    refuses("linear_cross_entropy", &["[5, 4]", "5 rows", "4 targets"], || {
        h.linear_cross_entropy_wide(w, &[0; 4], 1.0, Some(2)).0
    });
    refuses("linear_cross_entropy", &["target 3", "position 1", "[3, 4]"], || {
        h.linear_cross_entropy_wide(w, &[0, 3, 0, 0, 0], 1.0, Some(2)).0
    });
    refuses("cross_entropy", &["[5, 3]", "5 rows", "4 targets"], || table.cross_entropy(&[0; 4]));
    refuses("cross_entropy", &["target 3", "position 1", "[5, 3]"], || table.cross_entropy(&[0, 3, 0, 0, 0]));

    let rope = Rope::new(&cpu(), 4, 4, 1e4);
    refuses("rope", &["heads of size 4", "[2, 3, 6]"], || x.rope(&rope, 3, 0));
    let x8 = leaf(&[6, 8]);
    refuses("rope", &["sequences of 4", "[6, 8]"], || x8.rope(&rope, 4, 0));
    refuses("rope", &["[6, 8]", "2..5", "4"], || x8.rope(&rope, 3, 2));
    refuses("rope", &["head size 3"], || Rope::new(&cpu(), 4, 3, 1e4));

    let how = Attention { batch: 2, heads: 4, kv_heads: 2, causal: true };
    let (q, k) = (leaf(&[6, 8]), leaf(&[6, 4]));
    let cases: &[(&[usize], &[usize], Attention, &str)] = &[
        (&[6, 4], &[8, 4], how, "one shape"),
        (&[6, 4], &[6, 4], Attention { kv_heads: 3, ..how }, "do not divide 4 heads"),
        (&[6, 4], &[6, 4], Attention { heads: 0, ..how }, "zero"),
        (&[6, 8], &[6, 8], how, "one size"),
        (&[6, 4], &[6, 4], Attention { batch: 4, ..how }, "batch of 4"),
        (&[4, 4], &[4, 4], how, "longer than the keys"),
    ];
    for (k, v, how, part) in cases {
        let parts = ["q [6, 8]", &format!("k {k:?}"), &format!("v {v:?}"), part];
        refuses("attention", &parts, || q.attention(leaf(k), leaf(v), *how));
    }
    q.attention(k, k, how); // and what is right is not refused
}

#[test]
fn tensors_and_pairs() {
    refuses("from_vec", &["5 values", "[2, 3]", "6"], || Tensor::from_vec(&cpu(), [2, 3], vec![0.0; 5]));
    refuses("item", &["[2, 3]", "6 elements"], || zeros(&[2, 3]).item());
    let (a, b) = (zeros(&[4, 2]), zeros(&[5, 3]));
    refuses("FactorPair", &["[4, 2]", "[5, 3]", "2 and 3"], || FactorPair::new(a.clone(), b.clone()));
    refuses("FactorPair", &["[4, 2]", "[6]"], || FactorPair::new(a.clone(), zeros(&[6])));
    refuses("from_dense", &["rank 4", "[5, 3]", "1 and 3"], || FactorPair::from_dense(&b, 4));
    refuses("from_dense", &["rank 0", "[5, 3]"], || FactorPair::from_dense(&b, 0));
    let pair = FactorPair::new(zeros(&[5, 2]), zeros(&[3, 2]));
    refuses("truncate", &["rank 3", "1 and 2"], || pair.truncate(3));
    refuses("from_dense", &["[6]", "matrix"], || FactorPair::from_dense(&zeros(&[6]), 1));
    for rank in [0, 5] {
        refuses("init", &[&format!("rank {rank}"), "[4, 6]", "1 and 4"], || {
            lowrank::init_pair(&cpu(), &mut common::rng(0), [4, 6], rank, 0.02, PairInit::Spectral)
        });
    }
    refuses("newton_schulz", &["[4, 2]", "[5, 3]"], || newton_schulz(&[&a, &b], NewtonSchulz::default()));
    refuses("newton_schulz", &["[6]", "matrix"], || newton_schulz(&[&zeros(&[6])], NewtonSchulz::default()));
    let mut us = [zeros(&[5, 1])];
    refuses("power_iteration", &["[4, 2]ᵀ · [5, 1]", "4 and 5"], || power_iteration(&[&a], &mut us, 1));
    refuses("power_iteration", &["2 matrices, 1"], || power_iteration(&[&a, &a], &mut us, 1));
}

#[test]
fn parameters_without_momenta() {
    let mut params = Params::<C>::default();
    params.dense("gain", zeros(&[3]));
    let mut early = Optimizer::spectron(&params);
    params.pair("late", FactorPair::new(zeros(&[4, 2]), zeros(&[5, 2])));
    let grads = params.values.clone();
    refuses("optimizer", &["1 parameters", "momenta for 0"], || early.step(&mut params, &grads, 0.1, 0.1));
    params.values.pairs.clear();
    let mut grads = params.values.clone();
    grads.dense.push(zeros(&[3]));
    refuses("adamw", &["1 parameters, 2 gradients"], || early.step(&mut params, &grads, 0.1, 0.1));
}

#[test]
fn the_tape() {
    let tape = Tape::new(&cpu());
    let x = tape.leaf(&zeros(&[2, 3]));
    refuses("backward", &["[2, 3]", "sum() or mean()"], || x.backward());
    let y = x.exp(); // [2, 3]
    y.forget();
    refuses("value", &["forget()"], || y.value());
    refuses("value", &["forget()"], || y.exp());
    let other = Tape::new(&cpu());
    refuses("add", &["different tapes"], || x + other.leaf(&zeros(&[2, 3])));
    let id = x.id();
    let wrong = tape.record("my_op", &[x], zeros(&[1]), move |dy, grads| grads.add(id, dy));
    let message = refusal_anywhere(|| wrong.backward());
    assert_eq!(message, "gradient: [1] for a variable of shape [2, 3]");

    let tape = Tape::new(&cpu());
    let x = tape.leaf(&zeros(&[2, 3]));
    let loss = x.sum();
    loss.backward();
    let consumed = "this variable's tape was consumed by backward()";
    assert_eq!(refusal(|| loss.backward()), consumed);
    assert_eq!(refusal(|| x.value()), consumed);
    assert_eq!(refusal(|| x.exp()), consumed);
    refuses("leaf", &["consumed by backward()", "new one"], || tape.leaf(&zeros(&[1])));
}

/// The message of a panic that may come from inside a closure.
fn refusal_anywhere<R>(f: impl FnOnce() -> R) -> String {
    let panic = catch_unwind(AssertUnwindSafe(f)).err().expect("nothing was refused");
    panic.downcast::<String>().map(|s| *s).unwrap_or_default()
}

#[test]
fn an_op_without_a_derivative_refuses_a_gradient() {
    let tape = Tape::new(&cpu());
    let x = tape.leaf(&Tensor::full(&cpu(), [3], 1.6)); // [3]
    let line = line!() + 1;
    let y = tape.record_opaque("round", &[x], Tensor::full(&cpu(), [3], 2.0)); // [3]
    let loss = (x * y.detach()).sum();
    let message = refusal_anywhere(|| (loss + y.sum()).backward());
    assert!(message.starts_with(&format!("round at {}:{line}:", file!())), "{message}");
    assert!(message.contains("no derivative") && message.contains(".detach()"), "{message}");

    // the value may be used where no gradient passes
    let tape = Tape::new(&cpu());
    let x = tape.leaf(&Tensor::full(&cpu(), [3], 1.6)); // [3]
    let y = tape.record_opaque("round", &[x], Tensor::full(&cpu(), [3], 2.0)); // [3]
    let grads = (x * y.detach()).sum().backward();
    assert_eq!(grads.get(x).expect("reached").to_vec(), [2.0; 3]);
    let c = Tape::new(&cpu());
    let y = c.record_opaque("round", &[c.constant(&zeros(&[1]))], zeros(&[1]));
    assert!(c.leaf(&zeros(&[1])).sum().backward().get(y).is_none());
}
