//! `report`: one HTML page that compares runs and studies, and pictures of the same for papers.
//!
//! The page works without a network and without other files. Reading order: input (what is compared), figures (what is
//! drawn), page (what it looks like). Here: the command, and the SVG pictures.

mod figures;
mod input;
mod page;

use std::fs;
use std::path::{Path, PathBuf};

use crate::cli::ReportArgs;
use crate::error::{Error, Result, cannot};
use crate::files::write_atomically;
use crate::plot::{self, Curve, Line, Losses};
use figures::{QUANTITIES, layers, matrices, place, ramp, rate_lines, size_lines, with_spectra};
use input::Input;

/// Writes the page and, if asked, the pictures.
///
/// # Errors
/// A path that is neither run nor study, a run without records, an output that cannot be written.
pub fn report(args: &ReportArgs) -> Result<()> {
    let out = &args.out;
    let is_page =
        out.extension().is_some_and(|e| e.eq_ignore_ascii_case("html") || e.eq_ignore_ascii_case("htm"));
    if !is_page || out.is_dir() {
        return Err(Error::new(format!("--out {}: give a file whose name ends in .html", out.display())));
    }
    let input = write_page(&args.paths, out)?;
    let rows: usize = input.studies.iter().map(|s| s.trials.len()).sum();
    let results =
        if rows > 0 { format!("{} of studies, ", page::count(rows, "result")) } else { String::new() };
    crate::say!("{}: {results}{} with curves", out.display(), page::count(input.runs.len(), "run"));
    if let Some(directory) = &args.svg {
        fs::create_dir_all(directory).map_err(cannot("make the directory", directory))?;
        let count = pictures(&input, directory)?;
        crate::say!("{}: {}", directory.display(), page::count(count, "SVG picture"));
    }
    Ok(())
}

/// Writes the page of these runs and studies; returns what it shows.
///
/// # Errors
/// As [`report`].
pub fn write_page(paths: &[PathBuf], out: &Path) -> Result<Input> {
    let input = Input::read(paths)?;
    write_atomically(out, page::page(&input)?.as_bytes())?;
    Ok(input)
}

/// loss.svg, learning-rate.svg and size.svg of each study, RUN-QUANTITY.svg of each run with telemetry. Returns their number.
fn pictures(input: &Input, directory: &Path) -> Result<usize> {
    let mut count = 0;
    let curves: Vec<Curve> = input
        .runs
        .iter()
        .filter(|r| r.best)
        .map(|run| {
            let validation = run.validations().iter().map(|v| (v.0 as f64, v.3)).collect();
            Curve { validation, ..Curve::new(run.arm.clone(), &run.records) }
        })
        .collect();
    if !curves.is_empty() {
        plot::losses(&directory.join("loss.svg"), &curves)?;
        count += 1;
    }
    for (i, study) in input.studies.iter().enumerate() {
        let number = if input.studies.len() > 1 { format!("-{}", i + 1) } else { String::new() };
        for (file, x, lines) in
            [("learning-rate", "learning rate", rate_lines(study)), ("size", "parameters", size_lines(study))]
        {
            let losses: Vec<Losses> = lines
                .into_iter()
                .map(|l| Losses {
                    name: l.name,
                    runs: l.runs.iter().map(|r| (r.0, r.1)).collect(),
                    means: l.means,
                })
                .collect();
            if losses.iter().any(|l| !l.runs.is_empty()) {
                plot::final_losses(&directory.join(format!("{file}{number}.svg")), x, &losses)?;
                count += 1;
            }
        }
    }
    for run in with_spectra(input) {
        let names = matrices(&run.spectra);
        for (key, words) in QUANTITIES {
            let mut lines = vec![];
            for &name in &names {
                let value = |s: &input::Spectra| Some((s.step as f64, *s.matrices.get(name)?.get(key)?));
                let points: Vec<(f64, f64)> = run.spectra.iter().filter_map(value).collect();
                let layer = place(name).0;
                let group = layer.map_or(name.to_owned(), |l| format!("layer {l}"));
                if !points.is_empty() {
                    lines.push(Line { group, colour: ramp(layer.unwrap_or(0), layers(&names)), points });
                }
            }
            if !lines.is_empty() {
                let file = format!("{}-{}.svg", file_name(&run.name), key.replace('_', "-"));
                plot::lines(&directory.join(file), words, lines)?;
                count += 1;
            }
        }
    }
    Ok(count)
}

/// Letters, digits, points; a dash for the rest.
fn file_name(name: &str) -> String {
    name.chars().map(|c| if c.is_alphanumeric() || c == '.' { c } else { '-' }).collect()
}
