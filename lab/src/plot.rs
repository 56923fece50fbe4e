//! Pictures (SVG) for papers: loss curves, final loss against the learning rate or the size, a quantity over the steps.
//!
//! Curves of the same name share a colour and an entry in the legend, which stands beside the plot. The colours keep apart for
//! colour-blind readers (Okabe and Ito 2008, without their lightest); beyond six names, lines are dashed.
//! Not here: where the numbers come from (run.rs, report.rs).

use std::path::Path;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::coord::types::RangedCoordf64;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::run::Record;

/// Red, green, blue; a seventh name starts again.
pub const COLOURS: [[u8; 3]; 6] =
    [[0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [230, 159, 0], [86, 180, 233]];

/// The losses of one run, as (step, nats per token).
pub struct Curve {
    pub name: String,
    pub training: Vec<(f64, f64)>,
    pub validation: Vec<(f64, f64)>,
}

impl Curve {
    /// The losses among a run's records.
    pub fn new(name: impl Into<String>, records: &[Record]) -> Self {
        let points = |loss: fn(&Record) -> Option<f64>| -> Vec<(f64, f64)> {
            records.iter().filter_map(|r| Some((r.step as f64, loss(r)?))).collect()
        };
        Curve { name: name.into(), training: points(|r| r.loss), validation: points(|r| r.val_loss) }
    }
}

/// Moving average with weights that fall by e every 2 % of the points.
pub fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let decay = (-50.0 / points.len().max(50) as f64).exp();
    let (mut sum, mut weight) = (0.0, 0.0);
    let average = |&(x, y): &(f64, f64)| {
        sum = decay * sum + y;
        weight = decay * weight + 1.0;
        (x, sum / weight)
    };
    points.iter().map(average).collect()
}

/// What is drawn of a series' points.
enum Mark {
    /// A line of this width.
    Line(u32),
    Dots,
    /// Vertical bars of y ± this, one per point.
    Ranges(Vec<f64>),
}

struct Series {
    /// Empty: not in the legend.
    name: String,
    colour: RGBAColor,
    mark: Mark,
    /// Lines, in pixels; None: whole ones.
    dash: Option<u32>,
    points: Vec<(f64, f64)>,
}

/// The colour and the dashes of each curve: those of its name.
fn colours<'a>(names: impl Iterator<Item = &'a str>) -> Vec<(RGBColor, Option<u32>)> {
    let mut known: Vec<&str> = vec![];
    let place = |name: &'a str| {
        let place = known.iter().position(|k| *k == name).unwrap_or_else(|| {
            known.push(name);
            known.len() - 1
        });
        let [r, g, b] = COLOURS[place % COLOURS.len()];
        let dash = [None, Some(8), Some(2)][(place / COLOURS.len()).min(2)];
        (RGBColor(r, g, b), dash)
    };
    names.map(place).collect()
}

/// Writes the picture of the losses: training faint and, smoothed, strong; validation as dots.
///
/// # Errors
/// Curves without a point, or a file that cannot be written.
pub fn losses(path: &Path, curves: &[Curve]) -> Result<()> {
    let mut series = vec![];
    for (curve, (colour, dash)) in curves.iter().zip(colours(curves.iter().map(|c| c.name.as_str()))) {
        let raw = curve.training.clone();
        series.push(Series {
            name: String::new(),
            colour: colour.mix(0.25),
            mark: Mark::Line(1),
            dash: None,
            points: raw,
        });
        let name = format!("{}: training", curve.name);
        let points = smoothed(&curve.training);
        series.push(Series { name, colour: colour.to_rgba(), mark: Mark::Line(2), dash, points });
        if !curve.validation.is_empty() {
            let name = format!("{}: validation", curve.name);
            let points = curve.validation.clone();
            series.push(Series { name, colour: colour.to_rgba(), mark: Mark::Dots, dash, points });
        }
    }
    write(path, ["step", "loss (nats per token)"], false, series)
}

/// Final losses of one arm or method: (x, loss) of each run, and (x, mean, standard deviation).
pub struct Losses {
    pub name: String,
    pub runs: Vec<(f64, f64)>,
    pub means: Vec<(f64, f64, f64)>,
}

/// Writes the picture of final losses against x, on a logarithmic axis.
///
/// # Errors
/// Arms without a point, or a file that cannot be written.
pub fn final_losses(path: &Path, x: &str, arms: &[Losses]) -> Result<()> {
    let mut series = vec![];
    for (arm, (colour, dash)) in arms.iter().zip(colours(arms.iter().map(|a| a.name.as_str()))) {
        let points: Vec<_> = arm.means.iter().map(|&(x, mean, _)| (x.log10(), mean)).collect();
        let deviations = arm.means.iter().map(|m| m.2).collect();
        let runs = arm.runs.iter().map(|&(x, loss)| (x.log10(), loss)).collect();
        let (none, colour) = (String::new(), colour.to_rgba());
        let dots = Series {
            name: none.clone(),
            colour: colour.mix(0.5),
            mark: Mark::Dots,
            dash: None,
            points: runs,
        };
        let mark = Mark::Ranges(deviations);
        let ranges = Series { name: none, colour, mark, dash: None, points: points.clone() };
        let line = Series { name: arm.name.clone(), colour, mark: Mark::Line(2), dash, points };
        series.extend([dots, ranges, line]);
    }
    write(path, [x, "validation loss (nats per token)"], true, series)
}

/// A line of (step, value), with what the legend calls it and those like it.
pub struct Line {
    pub group: String,
    pub colour: [u8; 3],
    pub points: Vec<(f64, f64)>,
}

/// Writes the picture of a quantity over the steps; the legend names the groups.
///
/// # Errors
/// Lines without a point, or a file that cannot be written.
pub fn lines(path: &Path, quantity: &str, lines: Vec<Line>) -> Result<()> {
    let series = |line: Line| Series {
        name: line.group,
        colour: RGBColor(line.colour[0], line.colour[1], line.colour[2]).to_rgba(),
        mark: Mark::Line(1),
        dash: None,
        points: line.points,
    };
    write(path, ["step", quantity], false, lines.into_iter().map(series).collect())
}

fn write(path: &Path, axes: [&str; 2], log_x: bool, series: Vec<Series>) -> Result<()> {
    let svg =
        draw(axes, log_x, series).map_err(|e| Error::new(format!("cannot draw {}: {e}", path.display())))?;
    write_atomically(path, svg.as_bytes())
}

/// An axis with ticks of our own.
struct Across {
    range: RangedCoordf64,
    ticks: Vec<f64>,
}

impl Ranged for Across {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, x: &f64, limit: (i32, i32)) -> i32 {
        self.range.map(x, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.range.range()
    }
}

/// Of the picture, without the legend.
const SIZE: (u32, u32) = (800, 450);

/// Between two entries of the legend, from its left edge to the text, and the room of a letter in it.
const LEGEND_STEP: i32 = 18;
const LEGEND_TEXT: i32 = 26;
const LETTER: i32 = 7;

/// `log_x`: the x are decimal logarithms.
fn draw(
    [x, y]: [&str; 2],
    log_x: bool,
    series: Vec<Series>,
) -> std::result::Result<String, Box<dyn std::error::Error>> {
    let all = || series.iter().flat_map(|s| &s.points).filter(|p| p.0.is_finite() && p.1.is_finite());
    let least = |of: fn(&(f64, f64)) -> f64| all().map(of).fold(f64::INFINITY, f64::min);
    let most = |of: fn(&(f64, f64)) -> f64| all().map(of).fold(f64::NEG_INFINITY, f64::max);
    if all().next().is_none() {
        return Err("there are no finite values yet".into());
    }
    let (low, high) = (least(|p| p.1), most(|p| p.1));
    let margin = 0.05 * if high > low { high - low } else { high.abs().max(1e-6) };
    let across = if log_x { least(|p| p.0) - 0.1..most(|p| p.0) + 0.1 } else { 0.0..most(|p| p.0).max(1.0) };
    let ticks = match log_x {
        true => one_two_five(across.clone()),
        false => RangedCoordf64::from(across.clone()).key_points(10),
    };

    let mut legend: Vec<&Series> = vec![];
    for line in series.iter().filter(|s| !s.name.is_empty()) {
        if legend.iter().all(|l| l.name != line.name) {
            legend.push(line);
        }
    }
    let letters = legend.iter().map(|s| s.name.chars().count()).max().unwrap_or(0) as i32;
    let beside = if letters > 0 { LEGEND_TEXT + LETTER * letters + 12 } else { 0 };
    let tall = (SIZE.1 as i32).max(24 + LEGEND_STEP * legend.len() as i32);

    let mut svg = String::new();
    let whole = SVGBackend::with_string(&mut svg, (SIZE.0 + beside as u32, tall as u32)).into_drawing_area();
    whole.fill(&WHITE)?;
    let (area, legend_area) = whole.split_horizontally(SIZE.0);
    for (i, line) in legend.into_iter().enumerate() {
        let y = 24 + LEGEND_STEP * i as i32;
        let sample = vec![(0, y), (20, y)];
        let style = line.colour.stroke_width(2);
        match (&line.mark, line.dash) {
            (Mark::Dots, _) => legend_area.draw(&Circle::new((10, y), 4, line.colour.filled()))?,
            (_, None) => legend_area.draw(&PathElement::new(sample, style))?,
            (_, Some(dash)) => legend_area.draw(&DashedPathElement::new(sample, dash, 4, style))?,
        }
        let text = ("sans-serif", 13).into_font().into_text_style(&legend_area);
        let text = text.pos(Pos::new(HPos::Left, VPos::Center));
        legend_area.draw(&Text::new(line.name.as_str(), (LEGEND_TEXT, y), text))?;
    }
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(Across { range: across.into(), ticks }, low - margin..high + margin)?;
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .x_label_formatter(&|&x| if log_x { short(10f64.powf(x)) } else { format!("{x:.0}") })
        .y_label_formatter(&|&y| short(y))
        .max_light_lines(0)
        .bold_line_style(BLACK.mix(0.1))
        .draw()?;
    for Series { colour, mark, dash, points, .. } in series {
        match mark {
            Mark::Line(width) => match dash {
                None => chart.draw_series(LineSeries::new(points, colour.stroke_width(width)))?,
                Some(dash) => {
                    chart.draw_series(DashedLineSeries::new(points, dash, 4, colour.stroke_width(width)))?
                }
            },
            Mark::Dots => chart.draw_series(points.iter().map(|&p| Circle::new(p, 4, colour.filled())))?,
            Mark::Ranges(deviations) => chart.draw_series(
                points
                    .iter()
                    .zip(deviations)
                    .map(|(&(x, y), d)| ErrorBar::new_vertical(x, y - d, y, y + d, colour.filled(), 8)),
            )?,
        };
    }
    whole.present()?;
    drop((chart, area, legend_area, whole));
    Ok(svg)
}

/// The decimal logarithms within `range` of 1, 2 and 5 times the powers of ten.
fn one_two_five(range: std::ops::Range<f64>) -> Vec<f64> {
    let powers = range.start.floor() as i32..=range.end.ceil() as i32;
    let ticks = powers.flat_map(|power| [1.0f64, 2.0, 5.0].map(|digit| power as f64 + digit.log10()));
    ticks.filter(|tick| range.contains(tick)).collect()
}

/// Three digits, with a power of ten where they would not show.
fn short(x: f64) -> String {
    let power = if x == 0.0 { 0 } else { x.abs().log10().floor() as i32 };
    match power {
        -4..=2 => {
            let decimals = (2 - power).clamp(0, 6) as usize;
            let text = format!("{x:.decimals$}");
            let end = text.trim_end_matches('0').trim_end_matches('.');
            if text.contains('.') { end.to_owned() } else { text }
        }
        3..=5 => format!("{x:.0}"),
        _ => format!("{x:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(name: &str, end: f64) -> Curve {
        let training: Vec<(f64, f64)> =
            (1..=200).map(|i| (10.0 * i as f64, end + 4.0 / i as f64 + 0.1 * (i as f64).sin())).collect();
        let validation = training.iter().copied().skip(24).step_by(25).map(|(s, l)| (s, l + 0.1)).collect();
        Curve { name: name.into(), training, validation }
    }

    #[test]
    fn every_run_is_in_the_picture() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.svg");
        losses(&path, &[curve("spectron", 1.7), curve("adamw", 1.9)]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.trim_end().ends_with("</svg>"));
        for text in ["step", "loss (nats per token)", "spectron: training", "adamw: validation"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(svg.matches("<circle").count() >= 16);
    }

    #[test]
    fn nothing_to_draw_is_an_error_and_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.svg");
        let error = losses(&path, &[curve("a", f64::NAN)]).unwrap_err().to_string();
        assert!(error.contains("no finite values"), "{error}");
        assert!(losses(&path, &[]).is_err() && !path.exists());
    }

    #[test]
    fn smoothing_keeps_a_constant() {
        let points: Vec<(f64, f64)> = (0..500).map(|i| (i as f64, 5.0)).collect();
        assert!(smoothed(&points).iter().all(|p| (p.1 - 5.0).abs() < 1e-12));
    }

    #[test]
    fn rates_and_lines_are_named_once_and_names_are_escaped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rates.svg");
        let arm = Losses {
            name: "a <b> & c".into(),
            runs: vec![(0.01, 2.0), (0.1, 1.5)],
            means: vec![(0.01, 2.0, 0.1)],
        };
        final_losses(&path, "learning rate", &[arm]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.contains("a &lt;b&gt; &amp; c") && svg.contains("learning rate"), "{svg}");
        let line =
            |top| Line { group: "layer 0".into(), colour: COLOURS[0], points: vec![(1.0, top), (2.0, 1.0)] };
        lines(&path, "σ(W)", vec![line(2.0), line(3.0)]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert_eq!((svg.matches("layer 0").count(), svg.matches("σ(W)").count()), (1, 1));
    }

    #[test]
    fn labels_have_three_digits() {
        let texts: Vec<String> =
            [0.0, 1.0, 0.025, 1234.0, 1.5e-7, 100.0, 2.345].iter().map(|&x| short(x)).collect();
        assert_eq!(texts, ["0", "1", "0.025", "1234", "1.5e-7", "100", "2.35"]);
    }
}
