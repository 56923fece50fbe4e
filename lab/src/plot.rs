//! A picture (SVG) of loss curves: training loss faint and, smoothed, strong; validation losses as dots.
//!
//! One run or several, each in its own colour. Not here: where the numbers come from (run.rs).

use std::path::Path;

use plotters::prelude::*;

use crate::error::{Error, Result, write_atomically};
use crate::run::Record;

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

    /// Moving average with weights that fall by e every 2 % of the points.
    fn smoothed(&self) -> Vec<(f64, f64)> {
        let decay = (-50.0 / self.training.len().max(50) as f64).exp();
        let (mut sum, mut weight) = (0.0, 0.0);
        let average = |&(step, loss): &(f64, f64)| {
            sum = decay * sum + loss;
            weight = decay * weight + 1.0;
            (step, sum / weight)
        };
        self.training.iter().map(average).collect()
    }
}

/// Writes the picture.
///
/// # Errors
/// Curves without a point, or a file that cannot be written.
pub fn losses(path: &Path, curves: &[Curve]) -> Result<()> {
    let svg = draw(curves).map_err(|e| Error::new(format!("cannot draw {}: {e}", path.display())))?;
    write_atomically(path, svg.as_bytes())
}

fn draw(curves: &[Curve]) -> std::result::Result<String, Box<dyn std::error::Error>> {
    let all = || curves.iter().flat_map(|c| c.training.iter().chain(&c.validation));
    let last = all().map(|p| p.0).fold(1.0, f64::max);
    let low = all().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let high = all().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    if !low.is_finite() || !high.is_finite() {
        return Err("there are no finite losses yet".into());
    }
    let margin = 0.05 * (high - low).max(0.1);

    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (800, 450)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(55)
        .build_cartesian_2d(0.0..last, low - margin..high + margin)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .max_light_lines(0)
        .bold_line_style(BLACK.mix(0.1))
        .draw()?;
    for (i, curve) in curves.iter().enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        chart.draw_series(LineSeries::new(curve.training.iter().copied(), colour.mix(0.25)))?;
        chart
            .draw_series(LineSeries::new(curve.smoothed(), colour.stroke_width(2)))?
            .label(format!("{}: training", curve.name))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        if !curve.validation.is_empty() {
            let dots = curve.validation.iter().map(|&p| Circle::new(p, 4, colour.filled()));
            chart
                .draw_series(dots)?
                .label(format!("{}: validation", curve.name))
                .legend(move |(x, y)| Circle::new((x + 9, y), 4, colour.filled()));
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .draw()?;
    area.present()?;
    drop(chart);
    drop(area);
    Ok(svg)
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
        assert!(error.contains("no finite losses"), "{error}");
        assert!(losses(&path, &[]).is_err() && !path.exists());
    }

    #[test]
    fn smoothing_starts_at_the_first_loss_and_ends_near_the_last() {
        let curve = Curve {
            name: String::new(),
            training: (0..500).map(|i| (i as f64, 5.0)).collect(),
            validation: vec![],
        };
        assert!(curve.smoothed().iter().all(|p| (p.1 - 5.0).abs() < 1e-12));
    }
}
