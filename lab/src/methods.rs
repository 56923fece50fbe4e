//! The methods side by side: what the blocks' matrices are, what moves them, and at which learning rates. One line each.
//!
//! A new method is a rule in the library, a name in [`Method`], and here a line in [`entry`] with a function that makes the rule.
//! Not here: embeddings, head and gains, which AdamW trains under every method.

use rankgrad::lowrank::{
    AdamW, FactorPair, LoraMuon, MomentumOnly, Muon, MuonScale, NewtonSchulz, Optimizer, Orthogonaliser,
    Params, Radius, Renormalised, Rule, Space, Spectron, SpectronConfig, shape_scale,
};
use rankgrad::parallel::Division;
use rankgrad::tensor::{Backend, Cpu, Tensor};

use crate::config::{Config, LrScale, Method, Precision};
use crate::flops;

pub type PairRule<B> = Box<dyn Rule<B, FactorPair<B>>>;
pub type MatrixRule<B> = Box<dyn Rule<B, Tensor<B>>>;

/// What the blocks' matrices are, with the rule that moves them.
pub enum Matrices<B: Backend> {
    /// Factor pairs.
    Factored(fn(&Config, &[FactorPair<B>]) -> PairRule<B>),
    /// Whole matrices.
    Dense(fn(&Config, &[Tensor<B>]) -> MatrixRule<B>),
    /// Factor pairs, each with a whole matrix beside it for the first half of the run (guide.rs); AdamW moves both.
    /// `skip`: a guide is left out of a forward pass with probability 1 − α.
    Guided { skip: bool },
}

/// Which of a configuration's options a rule reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// beta1 and beta2. One rate is the rate of everything, since AdamW trains the rest too.
    AdamW,
    /// momentum and nesterov.
    Momentum,
    /// Those and balance-every.
    Spectron,
    /// The same, and its bound needs Newton–Schulz in f32.
    Certified,
}

impl Family {
    /// Of a method.
    pub fn of(method: Method) -> Self {
        entry::<Cpu<f32>>(method).family
    }

    /// Whether pairs can be balanced, and a step promises ‖ΔW‖ ≤ η.
    pub fn is_spectron(self) -> bool {
        matches!(self, Self::Spectron | Self::Certified)
    }

    /// What weight decay λ leaves of a pair's W in a step at rate η, unless the rule reports it: AdamW takes each factor for a matrix.
    pub fn left_by_decay(self, eta: f64, decay: f64) -> f64 {
        let left = 1.0 - eta * decay;
        if self == Self::AdamW { left * left } else { left.max(0.0) }
    }
}

/// One line of the table.
pub struct Entry<B: Backend> {
    pub matrices: Matrices<B>,
    pub family: Family,
    /// Default peak learning rates: of the blocks' matrices, and of everything else.
    pub lr: f64,
    pub adam_lr: f64,
    /// FLOPs of one update of one matrix or factor [p, q].
    pub flops: fn(usize, usize) -> f64,
}

/// The table. Rates: for `spectron`, `adamw` and `dense-adamw` the best at `tiny` in 2,000 steps of plain momentum (with Nesterov's
/// look-ahead `spectron`'s is twice that, 0.008 better, and `dense-adamw`'s half, 0.002 better: docs/results.md); for the others the best
/// `lr` of a grid of factors of 2 at `tiny` in 500 steps, but `spectron-certified` as `spectron`. Starting points for a grid of your
/// own, no more.
pub fn entry<B: Backend>(method: Method) -> Entry<B> {
    use Family::{AdamW, Certified, Momentum};
    use Matrices::{Dense, Factored, Guided};
    let line = |matrices, family, lr, adam_lr, flops| Entry { matrices, family, lr, adam_lr, flops };
    match method {
        Method::Spectron => line(Factored(spectron), Family::Spectron, 0.025, 4e-3, flops::spectron),
        Method::SpectronExact => {
            line(Factored(spectron_exact), Family::Spectron, 0.025, 4e-3, flops::spectron)
        }
        Method::SpectronCertified => {
            line(Factored(certified), Certified, 0.025, 4e-3, flops::spectron_certified)
        }
        Method::SpectronExactCertified => {
            line(Factored(exact_certified), Certified, 0.025, 4e-3, flops::spectron_certified)
        }
        Method::Adamw => line(Factored(adamw_factors), AdamW, 2e-3, 2e-3, flops::adamw),
        Method::MuonFactors => line(Factored(muon_factors), Momentum, 0.01, 4e-3, flops::muon),
        Method::Renormalised => line(Factored(renormalised), Momentum, 0.05, 4e-3, flops::renormalised),
        Method::MomentumFactors => {
            line(Factored(momentum_factors), Momentum, 2.0, 4e-3, flops::momentum_only)
        }
        Method::LoraMuon => line(Factored(lora_muon), Momentum, 0.025, 4e-3, flops::lora_muon),
        Method::SelfGuided => line(Guided { skip: false }, AdamW, 2e-3, 2e-3, flops::adamw),
        Method::SelfGuidedCheap => line(Guided { skip: true }, AdamW, 1e-3, 1e-3, flops::adamw),
        Method::DenseAdamw => line(Dense(dense_adamw), AdamW, 1e-3, 1e-3, flops::adamw),
        Method::DenseMuon => line(Dense(dense_muon), Momentum, 0.01, 4e-3, flops::muon),
    }
}

/// Which worker updates which of a model's matrices: even in FLOPs.
pub fn division<B: Backend>(config: &Config, params: &Params<B>, workers: usize) -> Division {
    let flops = |w: &Tensor<B>| (entry::<B>(config.method).flops)(w.rows(), w.cols());
    Division::new(&params.values, |pair| flops(&pair.a) + flops(&pair.b), flops, workers)
}

/// The optimizer of a model under `config`, for a worker's part of the matrices.
pub fn optimizer<B: Backend>(
    config: &Config,
    params: &Params<B>,
    division: &Division,
    worker: usize,
) -> Optimizer<B, PairRule<B>> {
    let values = &params.values;
    let (own_pairs, own_hidden) = (division.pairs[worker].clone(), division.hidden[worker].clone());
    let (part, matrices) = (&values.pairs[own_pairs.clone()], &values.hidden[own_hidden.clone()]);
    let mut pairs: PairRule<B> = Box::new(adamw(config, AdamW::for_pairs(part)));
    let mut hidden: MatrixRule<B> = Box::new(adamw(config, AdamW::new(matrices)));
    match entry(config.method).matrices {
        Matrices::Factored(rule) => pairs = rule(config, part),
        Matrices::Dense(rule) => hidden = rule(config, matrices),
        Matrices::Guided { .. } => {}
    }
    let scale = |m: usize, n: usize| match config.lr_scale {
        LrScale::Uniform => 1.0,
        LrScale::Shape => shape_scale(m, n, config.dim),
    };
    Optimizer {
        pairs,
        hidden,
        dense: adamw(config, AdamW::new(&values.dense)),
        pair_scales: values.pairs.iter().map(|p| scale(p.outputs(), p.inputs())).collect(),
        hidden_scales: values.hidden.iter().map(|w| scale(w.rows(), w.cols())).collect(),
        own_pairs,
        own_hidden,
        steps: 0,
    }
}

fn adamw<B: Backend>(c: &Config, mut rule: AdamW<B>) -> AdamW<B> {
    (rule.beta1, rule.beta2, rule.weight_decay) = (c.beta1, c.beta2, c.weight_decay);
    rule
}

fn adamw_factors<B: Backend>(c: &Config, pairs: &[FactorPair<B>]) -> PairRule<B> {
    Box::new(adamw(c, AdamW::for_pairs(pairs)))
}

fn dense_adamw<B: Backend>(c: &Config, matrices: &[Tensor<B>]) -> MatrixRule<B> {
    Box::new(adamw(c, AdamW::new(matrices)))
}

fn spectron<B: Backend>(c: &Config, pairs: &[FactorPair<B>]) -> PairRule<B> {
    spectron_with(c, pairs, SpectronConfig::default())
}

fn spectron_exact<B: Backend>(c: &Config, pairs: &[FactorPair<B>]) -> PairRule<B> {
    spectron_with(c, pairs, SpectronConfig { radius: Radius::Exact, ..SpectronConfig::default() })
}

fn certified<B: Backend>(c: &Config, pairs: &[FactorPair<B>]) -> PairRule<B> {
    spectron_with(c, pairs, SpectronConfig { certify: true, ..SpectronConfig::default() })
}

fn exact_certified<B: Backend>(c: &Config, pairs: &[FactorPair<B>]) -> PairRule<B> {
    spectron_with(
        c,
        pairs,
        SpectronConfig { radius: Radius::Exact, certify: true, ..SpectronConfig::default() },
    )
}

fn spectron_with<B: Backend>(c: &Config, pairs: &[FactorPair<B>], base: SpectronConfig) -> PairRule<B> {
    let Config { momentum: beta, nesterov, weight_decay, .. } = *c;
    let (balance_every, orthogonaliser) = (c.balance_every as u64, orthogonaliser(c));
    let config = SpectronConfig { beta, nesterov, weight_decay, orthogonaliser, balance_every, ..base };
    Box::new(Spectron::with(config, pairs))
}

fn orthogonaliser(c: &Config) -> Orthogonaliser {
    let mut how = NewtonSchulz::default();
    if c.precision == Precision::Bf16NewtonSchulz {
        how.space = Space::Bf16;
    }
    Orthogonaliser::NewtonSchulz(how)
}

/// Without a scale by shape: Spectron less the renormalisation, and nothing else.
fn muon_factors<B: Backend>(c: &Config, pairs: &[FactorPair<B>]) -> PairRule<B> {
    let mut rule = Muon::for_pairs(pairs);
    (rule.beta, rule.nesterov, rule.weight_decay) = (c.momentum, c.nesterov, c.weight_decay);
    rule.orthogonaliser = orthogonaliser(c);
    Box::new(rule)
}

fn renormalised<B: Backend>(c: &Config, pairs: &[FactorPair<B>]) -> PairRule<B> {
    let mut rule = Renormalised::new(pairs);
    (rule.beta, rule.nesterov, rule.weight_decay) = (c.momentum, c.nesterov, c.weight_decay);
    Box::new(rule)
}

fn momentum_factors<B: Backend>(c: &Config, pairs: &[FactorPair<B>]) -> PairRule<B> {
    let mut rule = MomentumOnly::new(pairs);
    (rule.beta, rule.nesterov, rule.weight_decay) = (c.momentum, c.nesterov, c.weight_decay);
    Box::new(rule)
}

fn lora_muon<B: Backend>(c: &Config, pairs: &[FactorPair<B>]) -> PairRule<B> {
    let mut rule = LoraMuon::new(pairs);
    (rule.beta, rule.nesterov, rule.weight_decay) = (c.momentum, c.nesterov, c.weight_decay);
    rule.orthogonaliser = orthogonaliser(c);
    Box::new(rule)
}

/// With Jordan's scale, unless --lr-scale shape already scales by shape.
fn dense_muon<B: Backend>(c: &Config, matrices: &[Tensor<B>]) -> MatrixRule<B> {
    let mut rule = Muon::new(matrices);
    (rule.beta, rule.nesterov, rule.weight_decay) = (c.momentum, c.nesterov, c.weight_decay);
    rule.orthogonaliser = orthogonaliser(c);
    rule.scale = match c.lr_scale {
        LrScale::Uniform => MuonScale::Aspect,
        LrScale::Shape => MuonScale::One,
    };
    Box::new(rule)
}
