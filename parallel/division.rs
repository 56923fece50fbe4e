//! Which worker updates which matrices. Each has a run of them, so that it can hand its rule a slice, and runs are cut where the
//! costs are most even: a model's blocks are alike, so little is lost against a free choice.
//!
//! Embeddings, heads and gains are not divided: AdamW's update of them costs less than handing them out.

use crate::lowrank::{FactorPair, Values};
use crate::tensor::{Backend, Tensor};
use std::ops::Range;

/// The pairs and the hidden matrices of each worker, by worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Division {
    pub pairs: Vec<Range<usize>>,
    pub hidden: Vec<Range<usize>>,
}

impl Division {
    /// By what the update of a pair and of a hidden matrix cost.
    pub fn new<B: Backend>(
        values: &Values<B>,
        pair: impl Fn(&FactorPair<B>) -> f64,
        hidden: impl Fn(&Tensor<B>) -> f64,
        workers: usize,
    ) -> Self {
        let pairs: Vec<f64> = values.pairs.iter().map(pair).collect();
        let matrices: Vec<f64> = values.hidden.iter().map(hidden).collect();
        Self { pairs: even_runs(&pairs, workers), hidden: even_runs(&matrices, workers) }
    }

    /// Every tensor that is divided, with its owner: for [`Collective::broadcast`](super::Collective::broadcast).
    pub fn owned<'a, B: Backend>(&self, values: &'a mut Values<B>) -> Vec<(usize, &'a mut Tensor<B>)> {
        let owner = |runs: &[Range<usize>], i: usize| runs.partition_point(|run| run.end <= i);
        let pairs = values.pairs.iter_mut().enumerate().flat_map(|(i, pair)| {
            let owner = owner(&self.pairs, i);
            [(owner, &mut pair.a), (owner, &mut pair.b)]
        });
        let hidden = values.hidden.iter_mut().enumerate().map(|(i, w)| (owner(&self.hidden, i), w));
        pairs.chain(hidden).collect()
    }
}

/// Cuts a list of items into `parts` runs: cut k is where the costs before come nearest to k/parts of all. So a run costs at most
/// the mean and one item more.
pub fn even_runs(costs: &[f64], parts: usize) -> Vec<Range<usize>> {
    let mut before = vec![0.0];
    before.extend(costs.iter().scan(0.0, |sum, cost| {
        *sum += cost;
        Some(*sum)
    }));
    let cut = |k: usize| {
        if k == parts {
            return costs.len();
        }
        let target = before[costs.len()] * k as f64 / parts as f64;
        let above = before.partition_point(|&sum| sum < target); // before[above] ≥ target
        let below = above.saturating_sub(1);
        if target - before[below] <= before[above] - target { below } else { above }
    };
    (0..parts).map(|k| cut(k)..cut(k + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_even_and_leave_nothing_out() {
        assert_eq!(even_runs(&[1.0; 6], 3), [0..2, 2..4, 4..6]);
        assert_eq!(even_runs(&[8.0, 1.0, 1.0, 1.0, 1.0, 4.0], 2), [0..1, 1..6]);
        assert_eq!(even_runs(&[5.0], 3), [0..0, 0..1, 1..1]); // more workers than matrices
        assert_eq!(even_runs(&[], 2), [0..0, 0..0]);
        // costs without a pattern
        let costs: Vec<f64> = (0..53).map(|i| (i * i % 17 + 1) as f64).collect();
        for parts in 1..9 {
            let runs = even_runs(&costs, parts);
            assert!(runs.windows(2).all(|two| two[0].end == two[1].start), "{runs:?}");
            assert_eq!((runs[0].start, runs[parts - 1].end), (0, costs.len()));
            let most = runs.iter().map(|run| costs[run.clone()].iter().sum::<f64>()).fold(0.0, f64::max);
            assert!(most <= costs.iter().sum::<f64>() / parts as f64 + 17.0, "{parts}: {most}");
        }
    }
}
