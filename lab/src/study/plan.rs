//! The arms of each kind of study, and the sizes at which an equal budget is equal.
//!
//! `StudyOptions` is what the command line may say about them (the doc comments are the `--help` texts). Not here: the order
//! of the runs (search.rs). Letters: d width, C training FLOPs.

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::config::{Config, LrScale, Method, Overrides, Schedule, name};
use crate::error::{Error, Result};
use crate::flops::{parameters, step_flops};
use crate::methods::Family;
use crate::study::search::Arm;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// training methods, at an equal --budget
    Methods,
    /// Spectron's parts: neither (momentum-factors), renormalised, orthogonalised (muon-factors), both (spectron)
    Ablation,
    /// rank ratios, under one or more methods
    Rank,
    /// what happens beyond the best learning rate: spikes, divergence, the largest rate that survives
    Stability,
    /// 100,000 steps (or --steps) of a very small model at a constant learning rate: spikes, and where norms and gauge drift
    Long,
    /// options of the recipe, each added to momentum without look-ahead and then all together, for each method: --nesterov, --schedule
    /// linear to 0, --zero-init-output, --lr-scale shape
    Recipe,
}

/// What is equal between the arms of `methods`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Budget {
    /// steps, and the model's shape: d, layers, heads, ffn
    Tokens,
    /// parameters: dense models are made narrower until they have as many as the factored one, to 2 %
    Params,
    /// training FLOPs: those of spectron at the shape and --steps that were asked for; each method at several widths, best reported
    Flops,
}

/// What `study` takes beside the options of `train`.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Study")]
pub struct StudyOptions {
    /// Methods to compare, separated by commas
    /// [default: all; rank and long: spectron; recipe: spectron,dense-muon]
    #[arg(long, value_delimiter = ',', value_name = "A,B,..")]
    pub methods: Option<Vec<Method>>,
    /// For `methods`: what is equal [default: tokens]
    #[arg(long)]
    pub budget: Option<Budget>,
    /// Learning rates at the first seed, as factors on the method's default --lr. Where AdamW trains everything,
    /// --adam-lr moves along; elsewhere it stays at its default. One factor is taken as given
    /// [default: 0.25,0.5,1,2,4; stability and long: 1]
    #[arg(long, value_delimiter = ',', value_name = "F,F,..", value_parser = factor)]
    pub grid: Option<Vec<f64>>,
    /// Factors on the method's default --adam-lr, tried at the best --lr; not where AdamW trains everything [default: 1]
    #[arg(long, value_delimiter = ',', value_name = "F,F,..", value_parser = factor)]
    pub adam_grid: Option<Vec<f64>>,
    /// How many rates may be added to a grid, each on the side where the best is the last [default: 3]
    #[arg(long)]
    pub extensions: Option<usize>,
    /// Seeds: rates are compared at the first, the others run at the best rate only [default: 1,2,3; long: 1]
    #[arg(long, value_delimiter = ',', value_name = "S,S,..")]
    pub seeds: Option<Vec<u64>>,
    /// For `methods --budget flops`: widths d, at the same layers and heads, ffn in proportion
    /// [default: 3/4, 1 and 4/3 of --dim]
    #[arg(long, value_delimiter = ',', value_name = "D,D,..")]
    pub sizes: Option<Vec<usize>>,
    /// For `rank`: rank ratios, in (0, 1] [default: 0.125,0.25,0.4,1]
    #[arg(long, value_delimiter = ',', value_name = "R,R,..", value_parser = factor)]
    pub ratios: Option<Vec<f64>>,
    /// For `stability`: factors on the best rate of --grid, run with every seed [default: 1,3,10,30]
    #[arg(long, value_delimiter = ',', value_name = "F,F,..", value_parser = factor)]
    pub multiples: Option<Vec<f64>>,
}

fn factor(text: &str) -> std::result::Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(x) if x > 0.0 && x.is_finite() => Ok(x),
        _ => Err("each must be a positive number, and there must be at least one".into()),
    }
}

/// What is to be run.
pub struct Plan {
    pub kind: Kind,
    pub budget: Budget,
    pub arms: Vec<Arm>,
    /// What a reader of the tables must know about how the arms were made.
    pub notes: Vec<String>,
}

impl Plan {
    /// The arms of a study.
    ///
    /// # Errors
    /// Options that belong to another kind, or values that fit no model.
    pub fn new(kind: Kind, options: &StudyOptions, base: &Overrides) -> Result<Plan> {
        only_where_they_belong(kind, options, base)?;
        let budget = options.budget.unwrap_or(Budget::Tokens);
        let mut notes = vec![];
        let mut configs = match kind {
            Kind::Methods => match budget {
                Budget::Tokens => configs(&chosen(options, Method::value_variants()), base)?,
                Budget::Params => equal_parameters(options, base, &mut notes)?,
                Budget::Flops => equal_flops(options, base, &mut notes)?,
            },
            Kind::Ablation => ablation(base)?,
            Kind::Rank => ranks(options, base)?,
            Kind::Stability => configs(&chosen(options, Method::value_variants()), base)?,
            Kind::Long => configs(&chosen(options, &[Method::Spectron]), &long(base))?,
            Kind::Recipe => recipes(options, base)?,
        };
        if base.training.keep.is_none() {
            configs.iter_mut().for_each(|(_, config)| config.keep = 1);
        }
        if kind == Kind::Stability && base.training.log_every.is_none() {
            configs.iter_mut().for_each(|(_, config)| config.log_every = 1); // no spike between records
        }
        let searched = !matches!(kind, Kind::Stability | Kind::Long);
        let default_grid: &[f64] = if searched { &[0.25, 0.5, 1.0, 2.0, 4.0] } else { &[1.0] };
        let grid = ascending("grid", options.grid.as_deref().unwrap_or(default_grid))?;
        let adam_grid = ascending("adam-grid", options.adam_grid.as_deref().unwrap_or(&[1.0]))?;
        let multiples = match kind {
            Kind::Stability => options.multiples.as_deref().unwrap_or(&[1.0, 3.0, 10.0, 30.0]),
            _ => &[1.0],
        };
        let multiples = ascending("multiples", multiples)?;
        let seeds = options.seeds.clone().unwrap_or(if kind == Kind::Long { vec![1] } else { vec![1, 2, 3] });
        let distinct: std::collections::BTreeSet<u64> = seeds.iter().copied().collect();
        if distinct.len() < seeds.len() || seeds.is_empty() {
            return Err(Error::new(format!("--seeds {seeds:?}: at least one, and none twice")));
        }
        notes.push(format!(
            "Learning rates are chosen at seed {} by the final validation loss over the whole split; that seed's run at the \
             best rate is one of those averaged.",
            seeds[0]
        ));
        notes.push("Seconds are those of training, shared with the runs at the same time.".into());
        let mut idle = base.without_effect(configs[0].1.method);
        idle.retain(|flag| configs.iter().all(|(_, c)| base.without_effect(c.method).contains(flag)));
        if !idle.is_empty() {
            notes.push(format!("Without effect under every method here: {}.", idle.join(", ")));
        }
        let arm = |(label, config): (String, Config)| Arm {
            label,
            coupled: Family::of(config.method) == Family::AdamW,
            config,
            grid: grid.clone(),
            adam_grid: adam_grid.clone(),
            multiples: multiples.clone(),
            seeds: seeds.clone(),
            extensions: options.extensions.unwrap_or(3),
        };
        Ok(Plan { kind, budget, arms: configs.into_iter().map(arm).collect(), notes })
    }
}

fn only_where_they_belong(kind: Kind, o: &StudyOptions, base: &Overrides) -> Result<()> {
    let fail = |message: String| Err(Error::new(message));
    let (model, training) = (&base.model, &base.training);
    for (given, flag, instead) in [
        (model.method.is_some(), "method", "--methods"),
        (model.seed.is_some(), "seed", "--seeds"),
        (training.lr.is_some(), "lr", "--grid, in factors on the method's default"),
        (training.adam_lr.is_some(), "adam-lr", "--adam-grid, in factors on the method's default"),
    ] {
        if given {
            let key = flag.replace('-', "_");
            return fail(format!(
                "--{flag} (`{key}` in a configuration file) is for one run; a study takes {instead}"
            ));
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    for method in o.methods.iter().flatten().map(|&m| name(m)) {
        if !seen.insert(method.clone()) {
            return fail(format!("--methods names {method} twice"));
        }
    }
    if let Some(seed) = o.seeds.iter().flatten().find(|&&seed| i64::try_from(seed).is_err()) {
        return fail(format!("--seeds {seed}: TOML holds at most {}", i64::MAX));
    }
    if kind == Kind::Recipe {
        for (given, flag) in [
            (training.nesterov.is_some(), "nesterov"),
            (training.schedule.is_some(), "schedule"),
            (training.final_lr_fraction.is_some(), "final-lr-fraction"),
            (model.zero_init_output.is_some(), "zero-init-output"),
            (training.lr_scale.is_some(), "lr-scale"),
        ] {
            if given {
                return fail(format!("--{flag} is what `study recipe` compares: leave it out"));
            }
        }
    }
    let flops = o.budget == Some(Budget::Flops);
    for (given, flag, fits, wants) in [
        (o.methods.is_some(), "methods", kind != Kind::Ablation, "every kind but ablation"),
        (o.budget.is_some(), "budget", kind == Kind::Methods, "methods"),
        (o.sizes.is_some(), "sizes", flops, "methods --budget flops"),
        (o.ratios.is_some(), "ratios", kind == Kind::Rank, "rank"),
        (o.multiples.is_some(), "multiples", kind == Kind::Stability, "stability"),
        (
            model.rank_ratio.is_some(),
            "rank-ratio",
            kind != Kind::Rank,
            "every kind but rank, which has --ratios",
        ),
        (training.warmup.is_some(), "warmup", !flops, "other budgets, as each arm has its own steps"),
    ] {
        if given && !fits {
            return fail(format!("--{flag} is for {wants}; this study is {}", name(kind)));
        }
    }
    Ok(())
}

fn ascending(flag: &str, values: &[f64]) -> Result<Vec<f64>> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    if values.is_empty() || values.windows(2).any(|w| w[0] == w[1]) {
        return Err(Error::new(format!("--{flag} {values:?}: at least one, and none twice")));
    }
    Ok(values)
}

fn chosen(options: &StudyOptions, default: &[Method]) -> Vec<Method> {
    options.methods.clone().unwrap_or(default.to_vec())
}

/// One configuration, with the method's own learning rates.
fn config(method: Method, base: &Overrides) -> Result<Config> {
    let mut base = base.clone();
    base.model.method = Some(method);
    base.resolve()
}

fn configs(methods: &[Method], base: &Overrides) -> Result<Vec<(String, Config)>> {
    methods.iter().map(|&m| Ok((name(m), config(m, base)?))).collect()
}

fn ablation(base: &Overrides) -> Result<Vec<(String, Config)>> {
    let arms = [
        ("neither", Method::MomentumFactors),
        ("renormalised", Method::Renormalised),
        ("orthogonalised", Method::MuonFactors),
        ("both", Method::Spectron),
    ];
    arms.iter().map(|&(label, method)| Ok((label.to_owned(), config(method, base)?))).collect()
}

fn ranks(options: &StudyOptions, base: &Overrides) -> Result<Vec<(String, Config)>> {
    let ratios = ascending("ratios", options.ratios.as_deref().unwrap_or(&[0.125, 0.25, 0.4, 1.0]))?;
    let mut arms = vec![];
    for method in chosen(options, &[Method::Spectron]) {
        for &ratio in &ratios {
            let mut base = base.clone();
            base.model.rank_ratio = Some(ratio);
            let config = config(method, &base)?;
            if !config.factored() {
                let method = name(method);
                return Err(Error::new(format!(
                    "study rank: {method} has whole matrices, which have no rank"
                )));
            }
            arms.push((format!("{}-r{ratio}", name(method)), config));
        }
    }
    Ok(arms)
}

/// A very small model for very many steps, where nothing else was asked for.
fn long(base: &Overrides) -> Overrides {
    let mut long = base.clone();
    let m = &mut long.model;
    if m.preset.is_none() {
        (m.dim, m.layers, m.heads) = (m.dim.or(Some(32)), m.layers.or(Some(2)), m.heads.or(Some(2)));
        (m.ffn, m.context, m.batch) = (m.ffn.or(Some(88)), m.context.or(Some(32)), m.batch.or(Some(4)));
    }
    let t = &mut long.training;
    (t.steps, t.schedule) = (t.steps.or(Some(100_000)), t.schedule.or(Some(Schedule::Constant)));
    long
}

fn recipes(options: &StudyOptions, base: &Overrides) -> Result<Vec<(String, Config)>> {
    type Part = fn(&mut Overrides);
    let parts: [(&str, Part); 4] = [
        ("nesterov", |o| o.training.nesterov = Some(true)),
        ("linear-to-zero", |o| {
            (o.training.schedule, o.training.final_lr_fraction) = (Some(Schedule::Linear), Some(0.0));
        }),
        ("zero-init-output", |o| o.model.zero_init_output = Some(true)),
        ("lr-scale-shape", |o| o.training.lr_scale = Some(LrScale::Shape)),
    ];
    let mut base = base.clone();
    base.training.nesterov = Some(false); // without any of the parts
    let mut arms = vec![];
    for method in chosen(options, &[Method::Spectron, Method::DenseMuon]) {
        let mut arm = |label: &str, overrides: &Overrides| {
            arms.push((format!("{}-{label}", name(method)), config(method, overrides)?));
            Ok::<_, Error>(())
        };
        arm("base", &base)?;
        let mut all = base.clone();
        for (label, part) in parts {
            if label == "nesterov" && Family::of(method) == Family::AdamW {
                continue; // AdamW has none
            }
            let mut one = base.clone();
            part(&mut one);
            part(&mut all);
            arm(label, &one)?;
        }
        arm("all", &all)?;
    }
    Ok(arms)
}

/// The factored model as asked for, and the dense one with as many parameters.
fn equal_parameters(
    options: &StudyOptions,
    base: &Overrides,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, Config)>> {
    let target = parameters(&config(Method::Spectron, base)?);
    notes.push(format!("Equal parameters: the factored model has {target}."));
    let mut arms = configs(&chosen(options, Method::value_variants()), base)?;
    for (label, config) in arms.iter_mut().filter(|(_, config)| !config.factored()) {
        *config = with_parameters(config, target)?;
        let count = parameters(config);
        notes.push(format!(
            "{label}: d {}, ffn {}, {count} parameters ({:+.2} %).",
            config.dim,
            config.ffn,
            100.0 * (count as f64 / target as f64 - 1.0)
        ));
    }
    Ok(arms)
}

/// The tolerance of an equal number of parameters.
const PARAMETERS_WITHIN: f64 = 0.02;

/// `config` at the width, with the same heads and layers, whose parameters at the same ffn/d come nearest to `target`; ffn then
/// makes up for the steps of the width.
fn with_parameters(config: &Config, target: usize) -> Result<Config> {
    let step = 2 * config.heads; // heads of an even size
    let off = |c: &Config| parameters(c).abs_diff(target);
    let widths = (1..=config.dim / step).map(|k| at_width(config, k * step));
    let rough = widths.min_by_key(off).unwrap_or(config.clone());
    let ffns = (1..=2 * config.ffn).map(|ffn| Config { ffn, ..rough.clone() });
    let best = ffns.min_by_key(off).expect("an ffn of 1");
    if off(&best) as f64 > PARAMETERS_WITHIN * target as f64 {
        return Err(Error::new(format!(
            "no dense model of at most d = {} with {} heads comes within 2 % of {target} parameters; choose a wider --dim or \
             fewer --heads",
            config.dim, config.heads
        )));
    }
    Ok(best)
}

fn at_width(config: &Config, dim: usize) -> Config {
    let ffn = (config.ffn as f64 * dim as f64 / config.dim as f64).round().max(1.0) as usize;
    Config { dim, ffn, ..config.clone() }
}

/// Each method at each width, for as many steps as make the reference's FLOPs.
fn equal_flops(
    options: &StudyOptions,
    base: &Overrides,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, Config)>> {
    let reference = config(Method::Spectron, base)?;
    let budget = step_flops(&reference).total() * reference.steps as f64;
    notes.push(format!(
        "Equal training FLOPs: C = {budget:.4e}, those of spectron at d {} in {} steps (the optimizer's included; what is \
         counted is said in lab/src/flops.rs). Warm-up is 5 % of the steps.",
        reference.dim, reference.steps
    ));
    let step = 2 * reference.heads;
    let near = |part: f64| ((reference.dim as f64 * part / step as f64).round() as usize).max(1) * step;
    let mut sizes = options.sizes.clone().unwrap_or(vec![near(0.75), reference.dim, near(4.0 / 3.0)]);
    sizes.sort_unstable();
    sizes.dedup();
    if sizes.len() < 2 {
        return Err(Error::new(format!(
            "--sizes {sizes:?}: the best size is chosen, so give at least two widths"
        )));
    }
    let mut arms = vec![];
    for method in chosen(options, Method::value_variants()) {
        for &dim in &sizes {
            let mut sized = base.clone();
            (sized.model.dim, sized.model.ffn) = (Some(dim), Some(at_width(&reference, dim).ffn));
            let sized = with_flops(method, &sized, budget)?;
            let spent = step_flops(&sized).total() * sized.steps as f64;
            let label = format!("{}-d{dim}", name(method));
            notes.push(format!(
                "{label}: {} steps, {:+.2} % of C.",
                sized.steps,
                100.0 * (spent / budget - 1.0)
            ));
            arms.push((label, sized));
        }
    }
    Ok(arms)
}

/// The number of steps that costs `budget`. Self-guided training's cost of a step depends, a little, on their number: the
/// second round settles it.
fn with_flops(method: Method, base: &Overrides, budget: f64) -> Result<Config> {
    let mut base = base.clone();
    for _ in 0..3 {
        let steps = (budget / step_flops(&config(method, &base)?).total()).round();
        base.training.steps = Some(steps as usize);
    }
    config(method, &base)
}
