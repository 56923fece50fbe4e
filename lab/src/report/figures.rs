//! The interactive figures: curves as plotly.js wants them, and what a reader can choose in each.
//!
//! A figure holds every curve that it can show. Each curve has tags (its arm, its quantity, ...); the options chosen in
//! the figure's controls say which tags are shown, which of the run's x values stand below, and what the axes are. The
//! script of the page (templates/report.js) only does that. Names may hold anything: see [`escaped`].

use std::collections::BTreeMap;

use plotly::common::{
    DashType, ErrorData, ErrorType, ExponentFormat, Line, Marker, MarkerSymbol, Mode, Title,
};
use plotly::layout::{Axis, AxisType, HoverMode, Layout, Margin};
use plotly::{Scatter, layout::Legend};
use serde::Serialize;
use serde_json::{Value, json};

use super::input::{Input, Run, Spectra, Study, Trial, settings};
use crate::flops::step_flops;
use crate::plot::{COLOURS, smoothed};

/// A figure of the page, without its title and its words.
#[derive(Serialize)]
pub struct Figure {
    pub id: String,
    curves: Vec<Curve>,
    layout: Layout,
    pub controls: Vec<Control>,
    #[serde(skip)]
    pub title: String,
    #[serde(skip)]
    pub caption: String,
}

#[derive(Serialize)]
struct Curve {
    trace: Box<Scatter<f64, f64>>,
    /// Key into [`Figures::x`]; absent: the trace has its own x.
    x: Option<String>,
    tags: BTreeMap<&'static str, String>,
    /// May stand in the legend for its group.
    legend: bool,
}

/// One `<select>`.
#[derive(Serialize)]
pub struct Control {
    pub label: &'static str,
    pub options: Vec<Choice>,
}

/// One `<option>`, and what it does.
#[derive(Serialize, Default)]
pub struct Choice {
    pub label: String,
    /// Which of the x values.
    x: Option<&'static str>,
    /// Only curves with these tags.
    only: BTreeMap<&'static str, String>,
    /// Paths into the layout, and the values there.
    layout: BTreeMap<&'static str, Value>,
}

/// All figures, and the x values that their curves share: key → "step", "tokens", "seconds", "flops".
#[derive(Serialize)]
pub struct Figures {
    pub figures: Vec<Figure>,
    x: BTreeMap<String, BTreeMap<&'static str, Vec<f64>>>,
    /// Curves have at most this many points.
    #[serde(skip)]
    pub limit: usize,
    /// Whether a curve had more.
    #[serde(skip)]
    pub thinned: bool,
}

/// What telemetry may hold: its key in the records, and the axis title.
pub const QUANTITIES: [(&str, &str); 10] = [
    ("sigma_a", "σ(A), spectral norm"),
    ("sigma_b", "σ(B), spectral norm"),
    ("sigma_w", "σ(W), spectral norm"),
    ("stable_rank", "stable rank ‖W‖²_F / σ(W)²"),
    ("gauge_imbalance", "gauge imbalance ‖AᵀA − BᵀB‖_F"),
    ("update", "‖ΔW‖₂ of one step"),
    ("update_over_eta", "‖ΔW‖₂ / η"),
    ("update_over_w", "‖ΔW‖₂ / ‖W‖₂"),
    ("rho", "radius ρ of the factors' step"),
    ("shrink", "what weight decay leaves of W in a step, 1 − ηλ"),
];

/// Text for plotly.js, which reads a little HTML in names: all of it shows as written.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A matrix's name, as its layer and its place in it: "blocks.3.q" is (3, "q"); others have no layer.
pub fn place(matrix: &str) -> (Option<usize>, &str) {
    let parts = matrix.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
    match parts.and_then(|(layer, kind)| Some((layer.parse().ok()?, kind))) {
        Some((layer, kind)) => (Some(layer), kind),
        None => (None, matrix),
    }
}

/// The runs whose telemetry is shown: one of each arm, at its best rate.
pub fn with_spectra(input: &Input) -> Vec<&Run> {
    let mut shown: Vec<&Run> = vec![];
    for run in input.runs.iter().filter(|r| r.best && !r.spectra.is_empty()) {
        if shown.iter().all(|s| s.arm != run.arm) {
            shown.push(run);
        }
    }
    shown
}

impl Figures {
    /// All figures that the input has numbers for.
    pub fn new(input: &Input) -> Self {
        let limit = (20_000 / input.runs.len().max(1)).clamp(200, 2000);
        let mut all = Figures { figures: vec![], x: BTreeMap::new(), limit, thinned: false };
        for (i, study) in input.studies.iter().enumerate() {
            all.study(i, study, &input.arms());
        }
        if !input.runs.is_empty() {
            all.losses(input);
            all.scalars(input);
        }
        all.spectra(input);
        all
    }

    /// The shared x values of these (step, tokens, seconds).
    fn share(&mut self, key: String, run: &Run, points: &[(u64, u64, f64)]) -> Option<String> {
        let per_step = match run.outcome.as_ref().and_then(|o| o.train_flops) {
            Some(flops) => flops / run.config.steps as f64,
            None => step_flops(&run.config).total(),
        };
        let all = |of: &dyn Fn(&(u64, u64, f64)) -> f64| points.iter().map(of).map(rounded).collect();
        let x = BTreeMap::from([
            ("step", all(&|p| p.0 as f64)),
            ("tokens", all(&|p| p.1 as f64)),
            ("seconds", all(&|p| p.2)),
            ("flops", all(&|p| p.0 as f64 * per_step)),
        ]);
        self.x.insert(key.clone(), x);
        Some(key)
    }

    /// Every k-th point and the last, so that no more than the limit are left.
    fn thin<T: Clone>(&mut self, points: &[T]) -> Vec<T> {
        let every = points.len().div_ceil(self.limit).max(1);
        self.thinned |= every > 1;
        let kept = |i: &usize| i.is_multiple_of(every) || i + 1 == points.len();
        (0..points.len()).filter(kept).map(|i| points[i].clone()).collect()
    }

    fn losses(&mut self, input: &Input) {
        let arms = input.arms();
        let mut curves = vec![];
        for (i, run) in input.runs.iter().enumerate() {
            let colour = Colour::of(&run.arm, &arms);
            let curve = |trace: Box<Scatter<f64, f64>>, x, kind: &str, legend| {
                let mut tags = tags(run);
                tags.insert("kind", kind.into());
                Curve { trace: named(trace, run), x, tags, legend }
            };
            let known: Vec<_> = run.records.iter().filter_map(|r| Some((r, r.loss?))).collect();
            let losses: Vec<_> = known.iter().map(|&(r, loss)| (r.step as f64, loss)).collect();
            let smooth: Vec<f64> = smoothed(&losses).into_iter().map(|p| p.1).collect();
            let points: Vec<_> = known
                .iter()
                .zip(smooth)
                .map(|(&(r, loss), s)| ((r.step, r.tokens, r.seconds), loss, s))
                .collect();
            let points = self.thin(&points);
            let at: Vec<_> = points.iter().map(|p| p.0).collect();
            let x = self.share(format!("{i} training"), run, &at);
            let raw = scatter(points.iter().map(|p| p.1)).line(Line::new().color(colour.faint()).width(1.0));
            curves.push(curve(raw.hover_info(plotly::common::HoverInfo::Skip), x.clone(), "training", false));
            let smooth = scatter(points.iter().map(|p| p.2)).line(colour.line(2.0));
            let hover = "%{meta}<br>training, smoothed: %{y:.4f}<br>at %{x}<extra></extra>";
            curves.push(curve(smooth.hover_template(hover), x, "training", true));

            let validations = run.validations();
            let at: Vec<_> = validations.iter().map(|v| (v.0, v.1, v.2)).collect();
            let x = self.share(format!("{i} validation"), run, &at);
            let symbol = if validations.last().is_some_and(|v| v.4) { "whole split" } else { "sample" };
            let dots = scatter(validations.iter().map(|v| v.3))
                .mode(Mode::LinesMarkers)
                .line(Line::new().color(colour.faint()).width(1.0).dash(DashType::Dot))
                .marker(Marker::new().color(colour.text()).size(7))
                .hover_template(format!(
                    "%{{meta}}<br>validation: %{{y:.4f}}<br>at %{{x}}<br>(the last point: {symbol})<extra></extra>"
                ));
            curves.push(curve(dots, x, "validation", true));
        }
        let kind = |label: &str, kind: &str| Choice {
            label: label.into(),
            only: BTreeMap::from([("kind", kind.into())]),
            ..Choice::default()
        };
        let both = Choice { label: "training and validation".into(), ..Choice::default() };
        let kinds = vec![both, kind("validation only", "validation"), kind("training only", "training")];
        let mut controls = runs_control(input);
        controls.push(Control { label: "curves", options: kinds });
        controls.extend([
            x_control(),
            scale("x scale", "xaxis.type", false),
            scale("y scale", "yaxis.type", false),
        ]);
        let caption = "Faint: training loss of the step's batch. Strong: its moving average. Points: validation loss, \
                       the last one on the whole validation split where the run has ended, the others on a sample.";
        let layout = layout("step", "loss (nats per token)", false);
        self.push("loss", "Loss", caption, curves, layout, controls);
    }

    fn scalars(&mut self, input: &Input) {
        type Of = fn(&crate::run::Record) -> Option<f64>;
        let (lr, norm): (Of, Of) = (|r| Some(r.lr), |r| r.grad_norm);
        let arms = input.arms();
        for (id, title, y, caption, log, of) in [
            ("lr", "Learning rate", "learning rate", "Of the blocks' matrices.", false, lr),
            ("norm", "Gradient norm", "gradient norm (L2)", "Global, before clipping.", true, norm),
        ] {
            let mut curves = vec![];
            for (i, run) in input.runs.iter().enumerate() {
                let value = |r: &crate::run::Record| Some(((r.step, r.tokens, r.seconds), of(r)?));
                let points: Vec<_> = run.records.iter().filter_map(value).collect();
                let points = self.thin(&points);
                let at: Vec<_> = points.iter().map(|p| p.0).collect();
                let x = self.share(format!("{i} {id}"), run, &at);
                let trace = scatter(points.iter().map(|p| p.1))
                    .line(Colour::of(&run.arm, &arms).line(1.5))
                    .hover_template("%{meta}<br>%{y:.4g}<br>at %{x}<extra></extra>");
                curves.push(Curve { trace: named(trace, run), x, tags: tags(run), legend: true });
            }
            let mut controls = runs_control(input);
            controls.extend([
                x_control(),
                scale("x scale", "xaxis.type", false),
                scale("y scale", "yaxis.type", log),
            ]);
            self.push(id, title, caption, curves, layout("step", y, false), controls);
        }
    }

    /// Final losses of a study: against the learning rate and, where a method was run at several sizes, against these.
    fn study(&mut self, number: usize, study: &Study, arms: &[&str]) {
        if study.trials.iter().all(|t| t.val_loss.is_none()) {
            return;
        }
        let sizes = size_lines(study);
        if !sizes.is_empty() {
            let methods: Vec<&str> = sizes.iter().map(|l| l.arm.as_str()).collect();
            self.losses_against(SIZES, &format!("sizes{number}"), &study.title, &sizes, &methods);
        }
        self.losses_against(RATES, &format!("rates{number}"), &study.title, &rate_lines(study), arms);
    }

    fn losses_against(&mut self, x: Against, id: &str, study: &str, lines: &[LossLine], coloured: &[&str]) {
        let mut curves = vec![];
        let highest = lines.iter().flat_map(|l| &l.runs).map(|r| r.1).fold(f64::NEG_INFINITY, f64::max);
        for line in lines {
            let colour = Colour::of(&line.arm, coloured);
            let mut add = |trace: Box<Scatter<f64, f64>>, legend| {
                let trace = trace
                    .name(escaped(&line.arm))
                    .legend_group(escaped(&line.name))
                    .meta(escaped(&line.name));
                curves.push(Curve { trace, x: None, tags: BTreeMap::new(), legend });
            };
            let hover = |what: &str| format!("%{{meta}}<br>{} %{{x}}<br>{what}<extra></extra>", x.word);
            let xs = line.means.iter().map(|m| m.0).collect();
            let mut mean = Scatter::new(xs, line.means.iter().map(|m| rounded(m.1)).collect())
                .mode(Mode::LinesMarkers)
                .line(colour.line(2.0))
                .marker(Marker::new().color(colour.text()).size(9).symbol(MarkerSymbol::LineEWOpen))
                .hover_template(hover("mean %{y:.4f}"));
            if line.means.iter().any(|m| m.2 > 0.0) {
                let deviations = line.means.iter().map(|m| rounded(m.2)).collect();
                mean = mean.error_y(ErrorData::new(ErrorType::Data).array(deviations).color(colour.text()));
            }
            add(mean, true);
            let seeds = Scatter::new(
                line.runs.iter().map(|r| r.0).collect(),
                line.runs.iter().map(|r| rounded(r.1)).collect(),
            )
            .mode(Mode::Markers)
            .marker(Marker::new().color(colour.text()).size(8).opacity(0.6))
            .hover_template(hover("%{y:.4f} %{text}"))
            .text_array(line.runs.iter().map(|r| escaped(&r.2)).collect());
            add(seeds, false);
            if !line.diverged.is_empty() && highest.is_finite() {
                let top = vec![highest; line.diverged.len()];
                let crosses = Scatter::new(line.diverged.iter().map(|d| d.0).collect(), top)
                    .mode(Mode::Markers)
                    .marker(
                        Marker::new()
                            .color(colour.text())
                            .size(11)
                            .symbol(MarkerSymbol::XThin)
                            .line(colour.line(2.0)),
                    )
                    .hover_template(hover("%{text}"))
                    .text_array(line.diverged.iter().map(|d| escaped(&d.1)).collect());
                add(crosses, false);
            }
        }
        let layout = layout(x.axis, "final validation loss (nats per token)", true);
        let title = format!("{study}: {}", x.title);
        let controls = vec![scale("x scale", "xaxis.type", true), scale("y scale", "yaxis.type", false)];
        self.push(id, &title, x.caption, curves, layout, controls);
    }

    fn spectra(&mut self, input: &Input) {
        let runs = with_spectra(input);
        let mut curves = vec![];
        let mut quantities: Vec<(&str, &str)> = vec![];
        let mut kinds: Vec<String> = vec![];
        let mut found: Vec<usize> = vec![];
        for run in &runs {
            let spectra = self.thin(&run.spectra.iter().collect::<Vec<&Spectra>>());
            let at: Vec<_> = spectra.iter().map(|s| (s.step, s.tokens, s.seconds)).collect();
            let x = self.share(format!("{} spectra", run.name), run, &at);
            let names = matrices(&run.spectra);
            let count = layers(&names);
            for name in names {
                let (layer, kind) = place(name);
                for &(quantity, words) in &QUANTITIES {
                    let value = |s: &&Spectra| s.matrices.get(name).and_then(|m| m.get(quantity)).copied();
                    let values: Vec<Option<f64>> = spectra.iter().map(value).collect();
                    if values.iter().all(Option::is_none) {
                        continue;
                    }
                    let group = layer.map_or(escaped(name), |l| format!("layer {l}"));
                    let [r, g, b] = ramp(layer.unwrap_or(0), count);
                    let colour = format!("rgb({r},{g},{b})");
                    let trace = scatter(values.into_iter().map(|v| v.unwrap_or(f64::NAN)))
                        .mode(Mode::LinesMarkers)
                        .line(Line::new().color(colour.clone()).width(1.5).dash(dash(kind)))
                        .marker(Marker::new().color(colour).size(4))
                        .name(&group)
                        .legend_group(group)
                        .meta(format!("{}<br>{}", escaped(&run.name), escaped(name)))
                        .hover_template("%{meta}: %{y:.5g}<br>at %{x}<extra></extra>");
                    let mut tags = BTreeMap::from([("run", run.name.clone()), ("quantity", quantity.into())]);
                    tags.insert("kind", kind.into());
                    tags.insert("layer", layer.map_or("none".into(), |l| l.to_string()));
                    curves.push(Curve { trace, x: x.clone(), tags, legend: true });
                    if !quantities.contains(&(quantity, words)) {
                        quantities.push((quantity, words));
                    }
                    if !kinds.iter().any(|k| k == kind) {
                        kinds.push(kind.into());
                    }
                    found.extend(layer.filter(|l| !found.contains(l)));
                }
            }
        }
        if curves.is_empty() {
            return;
        }
        found.sort_unstable();
        quantities.sort_by_key(|q| QUANTITIES.iter().position(|known| known == q));
        quantities.sort_by_key(|q| q.0 != "sigma_w"); // what every matrix has comes first
        let of = |tag, value: &str, label: &str| Choice {
            label: label.into(),
            only: BTreeMap::from([(tag, value.into())]),
            ..Choice::default()
        };
        let all = |label: &str| Choice { label: label.into(), ..Choice::default() };
        let quantity = |&(key, words): &(&str, &str)| Choice {
            layout: BTreeMap::from([("yaxis.title.text", json!(words))]),
            ..of("quantity", key, words)
        };
        let each_kind = kinds.iter().map(|k| of("kind", k, k));
        let each_layer = found.iter().map(|l| of("layer", &l.to_string(), &format!("layer {l}")));
        let controls = vec![
            Control { label: "run", options: runs.iter().map(|r| of("run", &r.name, &r.name)).collect() },
            Control { label: "quantity", options: quantities.iter().map(quantity).collect() },
            Control { label: "matrix", options: std::iter::once(all("all")).chain(each_kind).collect() },
            Control { label: "layer", options: std::iter::once(all("all")).chain(each_layer).collect() },
            x_control(),
            scale("y scale", "yaxis.type", false),
        ];
        let more = if runs.len() < input.runs.len() {
            " One run of each arm, at its best learning rate."
        } else {
            ""
        };
        let caption = format!(
            "One line per matrix W, coloured by layer; its place in the layer sets the dashes.{more}"
        );
        self.push(
            "spectra",
            "Spectra per layer",
            &caption,
            curves,
            layout("step", quantities[0].1, false),
            controls,
        );
    }

    fn push(
        &mut self,
        id: &str,
        title: &str,
        caption: &str,
        curves: Vec<Curve>,
        layout: Layout,
        controls: Vec<Control>,
    ) {
        let (id, title, caption) = (id.into(), title.into(), caption.into());
        self.figures.push(Figure { id, curves, layout, controls, title, caption });
    }
}

/// What a study's final losses are drawn against.
struct Against {
    title: &'static str,
    axis: &'static str,
    word: &'static str,
    caption: &'static str,
}

const RATES: Against = Against {
    title: "final loss against learning rate",
    axis: "peak learning rate of the blocks' matrices",
    word: "learning rate",
    caption: "Points: one run each. Line and bars: mean and standard deviation over the seeds. Crosses at the top edge: runs \
              that diverged.",
};

const SIZES: Against = Against {
    title: "final loss against size, each size at its best learning rate",
    axis: "parameters",
    word: "parameters",
    caption: "Points: one run each. Line and bars: mean and standard deviation over the seeds.",
};

/// One line of a study's picture: final losses against x, the learning rate or the number of parameters.
pub struct LossLine {
    /// The arm or, against sizes, the method.
    pub arm: String,
    /// The same, and AdamW's rate where the arm has several for one learning rate.
    pub name: String,
    /// (x, mean, standard deviation over the seeds), by x. Diverged runs do not count.
    pub means: Vec<(f64, f64, f64)>,
    /// (x, loss, words).
    pub runs: Vec<(f64, f64, String)>,
    /// (x, words).
    pub diverged: Vec<(f64, String)>,
}

impl LossLine {
    /// Adds the runs that differ in their seed only.
    fn add(&mut self, x: f64, trials: &[&Trial]) {
        let mut losses = vec![];
        for trial in trials {
            let seed = trial.seed.as_ref().map_or(String::new(), |s| format!("seed {s}"));
            match (&trial.diverged, trial.val_loss) {
                (None, Some(loss)) => {
                    self.runs.push((x, loss, seed));
                    losses.push(loss);
                }
                (Some(step), _) => self.diverged.push((x, format!("diverged at step {step}, {seed}"))),
                (None, None) => self.diverged.push((x, format!("no final loss, {seed}"))),
            }
        }
        if !losses.is_empty() {
            let n = losses.len() as f64;
            let mean = losses.iter().sum::<f64>() / n;
            let square: f64 = losses.iter().map(|l| (l - mean).powi(2)).sum();
            self.means.push((x, mean, (square / (n - 1.0).max(1.0)).sqrt()));
            self.means.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
    }
}

/// The line of this name, at the end if it is a new one.
fn line<'a>(lines: &'a mut Vec<LossLine>, arm: &str, name: &str) -> &'a mut LossLine {
    let at = lines.iter().position(|l| l.name == name).unwrap_or_else(|| {
        let (means, runs, diverged) = (vec![], vec![], vec![]);
        lines.push(LossLine { arm: arm.to_owned(), name: name.to_owned(), means, runs, diverged });
        lines.len() - 1
    });
    &mut lines[at]
}

/// The lines of a study against the rate: one per arm, or per arm and AdamW's rate where these vary independently.
pub fn rate_lines(study: &Study) -> Vec<LossLine> {
    let settings = settings(&study.trials);
    let mut lines = vec![];
    for setting in &settings {
        let first = setting[0];
        let several = settings.iter().any(|other| {
            let other = other[0];
            (&other.arm, other.lr) == (&first.arm, first.lr) && other.adam_lr != first.adam_lr
        });
        let name = match first.adam_lr {
            Some(rate) if several => format!("{}, AdamW's rate {rate}", first.arm),
            _ => first.arm.clone(),
        };
        line(&mut lines, &first.arm, &name).add(first.lr, setting);
    }
    lines
}

/// The lines of a study against the size: one per method, each arm at its best rate. None where no method has two sizes.
pub fn size_lines(study: &Study) -> Vec<LossLine> {
    let mut lines = vec![];
    for setting in settings(&study.trials) {
        let at_best: Vec<&Trial> = setting.into_iter().filter(|t| t.at_best).collect();
        let Some(first) = at_best.first() else { continue };
        if let (Some(method), Some(size)) = (&first.method, first.parameters) {
            line(&mut lines, method, method).add(size, &at_best);
        }
    }
    let sizes = |l: &LossLine| l.means.first().map(|m| m.0) != l.means.last().map(|m| m.0);
    if lines.iter().any(sizes) { lines } else { vec![] }
}

/// The matrices of a run, by layer.
pub fn matrices(spectra: &[Spectra]) -> Vec<&str> {
    let mut names: Vec<&str> = vec![];
    for name in spectra.iter().flat_map(|s| s.matrices.keys()) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    names.sort_by_key(|name| place(name));
    names
}

/// The number of layers among these matrices.
pub fn layers(matrices: &[&str]) -> usize {
    matrices.iter().filter_map(|m| place(m).0).max().map_or(1, |last| last + 1)
}

/// Six digits, which is more than a screen shows: the page is a third of the size.
fn rounded(x: f64) -> f64 {
    format!("{x:.5e}").parse().unwrap_or(x)
}

fn scatter(y: impl Iterator<Item = f64>) -> Box<Scatter<f64, f64>> {
    Scatter::new(vec![], y.map(rounded).collect()).mode(Mode::Lines)
}

/// Legend, group and hover of a run's curve.
fn named(trace: Box<Scatter<f64, f64>>, run: &Run) -> Box<Scatter<f64, f64>> {
    let rates = format!("learning rate {}, seed {}", run.config.lr, run.config.seed);
    let meta = format!("{}<br>{rates}", escaped(&run.name));
    trace.name(escaped(&run.arm)).legend_group(escaped(&run.arm)).meta(meta)
}

fn tags(run: &Run) -> BTreeMap<&'static str, String> {
    BTreeMap::from([("arm", run.arm.clone()), ("best", run.best.to_string())])
}

/// The choice of runs, where there are others than the best.
fn runs_control(input: &Input) -> Vec<Control> {
    if input.runs.iter().all(|r| r.best) {
        return vec![];
    }
    let only = |label: String, tag, value: String| Choice {
        label,
        only: BTreeMap::from([(tag, value)]),
        ..Choice::default()
    };
    let count = |f: &dyn Fn(&&Run) -> bool| input.runs.iter().filter(f).count();
    let best =
        only(format!("best learning rate of each arm ({})", count(&|r| r.best)), "best", "true".into());
    let all = Choice { label: format!("all ({})", input.runs.len()), ..Choice::default() };
    let arms = input.arms().into_iter().filter_map(|arm| {
        let runs = count(&|r| r.arm == arm);
        (runs > 0).then(|| only(format!("{arm}, all rates ({runs})"), "arm", arm.to_owned()))
    });
    vec![Control { label: "runs", options: [best, all].into_iter().chain(arms).collect() }]
}

fn x_control() -> Control {
    let option = |key, label: &str, title: &str| Choice {
        label: label.into(),
        x: Some(key),
        layout: BTreeMap::from([("xaxis.title.text", json!(title))]),
        ..Choice::default()
    };
    let options = vec![
        option("step", "steps", "step"),
        option("tokens", "tokens", "training tokens"),
        option("seconds", "seconds", "training time (s)"),
        option("flops", "FLOPs", "training FLOPs"),
    ];
    Control { label: "x axis", options }
}

fn scale(label: &'static str, path: &'static str, log: bool) -> Control {
    let option = |name: &str| Choice {
        label: if name == "log" { "logarithmic".into() } else { name.into() },
        layout: BTreeMap::from([(path, json!(name))]),
        ..Choice::default()
    };
    let mut options = vec![option("linear"), option("log")];
    if log {
        options.reverse();
    }
    Control { label, options }
}

fn layout(x: &str, y: &str, log_x: bool) -> Layout {
    let axis = |title: &str, log| {
        let kind = if log { AxisType::Log } else { AxisType::Linear };
        Axis::new().title(Title::with_text(title)).type_(kind).auto_margin(true).zero_line(false)
    };
    let across =
        axis(x, log_x).exponent_format(if log_x { ExponentFormat::Power } else { ExponentFormat::SI });
    Layout::new()
        .x_axis(across)
        .y_axis(axis(y, false).exponent_format(ExponentFormat::Power))
        .hover_mode(HoverMode::Closest)
        .margin(Margin::new().left(70).right(20).top(36).bottom(60))
        .legend(Legend::new().trace_group_gap(2))
        .show_legend(true)
}

/// An arm's colour and, beyond the first six arms, dashes.
struct Colour {
    rgb: [u8; 3],
    dash: DashType,
}

impl Colour {
    fn of(arm: &str, arms: &[&str]) -> Self {
        let place = arms.iter().position(|a| *a == arm).expect("every arm is listed");
        let dashes = [DashType::Solid, DashType::Dash, DashType::Dot, DashType::DashDot];
        let dash = dashes[place / COLOURS.len() % dashes.len()].clone();
        Colour { rgb: COLOURS[place % COLOURS.len()], dash }
    }

    fn text(&self) -> String {
        let [r, g, b] = self.rgb;
        format!("rgb({r},{g},{b})")
    }

    fn faint(&self) -> String {
        let [r, g, b] = self.rgb;
        format!("rgba({r},{g},{b},0.4)")
    }

    fn line(&self, width: f64) -> Line {
        Line::new().color(self.text()).width(width).dash(self.dash.clone())
    }
}

/// From blue to orange through grey: apart for colour-blind readers, and in the middle of the lightness that shows on
/// white as well as on black.
pub fn ramp(layer: usize, layers: usize) -> [u8; 3] {
    let part = layer as f64 / (layers.max(2) - 1) as f64;
    let mix = |from: f64, to: f64| (from + part * (to - from)).round() as u8;
    [mix(47.0, 224.0), mix(111.0, 123.0), mix(222.0, 0.0)]
}

/// Queries and keys, values and outputs, and the feed-forward part look apart.
fn dash(kind: &str) -> DashType {
    match kind {
        "q" | "k" => DashType::Dash,
        "v" | "o" => DashType::Dot,
        _ => DashType::Solid,
    }
}
