//! The page: what was compared, a row per run, a study's tables, the figures; one file that needs no other.
//!
//! The words and their escaping are the template's (templates/report.html). Not here: what is read and what is drawn.

use askama::Template;
use plotly::Plot;

use super::figures::Figures;
use super::input::{Input, Run, Study, Table};
use crate::config::name;
use crate::error::{Error, Result};

#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    title: String,
    about: Vec<String>,
    runs: Table,
    differing: Vec<(String, String)>,
    common: Vec<(String, String)>,
    studies: &'a [Study],
    figures: &'a Figures,
    notes: Vec<String>,
    version: &'static str,
    style: &'static str,
    script: &'static str,
    library: String,
    data: String,
}

/// The page as HTML.
///
/// # Errors
/// A configuration that cannot be written as TOML.
pub fn page(input: &Input) -> Result<String> {
    let figures = Figures::new(input);
    let (differing, common) = settings(&input.runs)?;
    let mut notes = input.notes.clone();
    if figures.thinned {
        notes.push(format!(
            "Curves of more than {} points are thinned: every k-th point and the last are shown, averages are over all.",
            figures.limit
        ));
    }
    let spectra = input.runs.iter().filter(|r| !r.spectra.is_empty()).count();
    if spectra < input.runs.len() {
        let runs = input.runs.len();
        notes.push(format!("{} of {runs} runs recorded no spectra.", runs - spectra));
    }
    let page = Page {
        title: title(input),
        about: about(input),
        runs: table(&input.runs),
        differing,
        common,
        studies: &input.studies,
        figures: &figures,
        notes,
        version: env!("CARGO_PKG_VERSION"),
        style: include_str!("../../templates/report.css"),
        script: include_str!("../../templates/report.js"),
        library: plotly_js(),
        data: script_safe(&serde_json::to_string(&figures).expect("plain values")),
    };
    page.render().map_err(|e| Error::new(format!("cannot make the page: {e}")))
}

/// JSON that stays JSON and cannot end the `<script>` around it.
fn script_safe(json: &str) -> String {
    json.replace('<', "\\u003c")
}

/// The crate's plotly.js in its `<script>`, without the MathJax that follows there: no text here is TeX.
fn plotly_js() -> String {
    let scripts = Plot::offline_js_sources();
    let end = scripts.find("</script>").expect("the crate gives script elements") + "</script>".len();
    scripts[..end].to_owned()
}

fn title(input: &Input) -> String {
    let studies: Vec<&str> = input.studies.iter().map(|s| s.title.as_str()).collect();
    let alone: Vec<&str> = match input.studies.is_empty() {
        true => input.runs.iter().map(|r| r.name.as_str()).collect(),
        false => vec![],
    };
    let names = [studies, alone].concat();
    match names.len() {
        0..=4 => names.join(", "),
        n => format!("{}, and {} more", names[..3].join(", "), n - 3),
    }
}

fn about(input: &Input) -> Vec<String> {
    let list = |mut words: Vec<String>| {
        words.sort();
        words.dedup();
        words.join(", ")
    };
    let runs = &input.runs;
    let mut about = vec![];
    for study in &input.studies {
        let arms = list(study.trials.iter().map(|t| t.arm.clone()).collect());
        let diverged = study.trials.iter().filter(|t| t.diverged.is_some()).count();
        about.push(format!(
            "The study {}: {} runs, {diverged} of them diverged. Arms: {arms}.",
            study.title,
            study.trials.len()
        ));
    }
    if !runs.is_empty() {
        let methods = list(runs.iter().map(|r| name(r.config.method)).collect());
        let seeds = list(runs.iter().map(|r| r.config.seed.to_string()).collect());
        let running = runs.iter().filter(|r| r.outcome.is_none()).count();
        let unfinished =
            if running > 0 { format!(" {running} of them did not end, or not yet.") } else { String::new() };
        about.push(format!(
            "{} shown here. Methods: {methods}. Seeds: {seeds}.{unfinished}",
            count(runs.len(), "run")
        ));
    }
    about.push("Losses are in nats per token. Times are of training alone and depend on the machine.".into());
    about
}

/// "1 run", "2 runs".
pub fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn table(runs: &[Run]) -> Table {
    let columns = [
        "run",
        "method",
        "parameters",
        "steps",
        "tokens",
        "training time (s)",
        "training FLOPs",
        "final validation loss (nats per token)",
        "bits per byte",
        "learning rate",
        "AdamW's rate",
        "seed",
    ];
    let row = |run: &Run| {
        let (config, last, outcome) = (&run.config, run.last(), run.outcome.as_ref());
        let done = last.step;
        let steps =
            if done < config.steps as u64 { format!("{done} of {}", config.steps) } else { done.to_string() };
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "–".into());
        vec![
            run.name.clone(),
            name(config.method),
            or_none(outcome.and_then(|o| o.params).map(grouped)),
            steps,
            grouped(last.tokens),
            format!("{:.1}", last.seconds),
            or_none(outcome.and_then(|o| o.train_flops).map(|f| format!("{f:.3e}"))),
            or_none(outcome.and_then(|o| o.val_loss).map(|l| format!("{l:.4}"))),
            or_none(outcome.and_then(|o| o.val_bits_per_byte).map(|l| format!("{l:.4}"))),
            config.lr.to_string(),
            config.adam_lr.to_string(),
            config.seed.to_string(),
        ]
    };
    Table {
        title: "Runs".into(),
        columns: columns.map(str::to_owned).to_vec(),
        rows: runs.iter().map(row).collect(),
    }
}

/// 382080 as 382,080.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

type Settings = Vec<(String, String)>;

/// The settings that differ between the runs, with their values, and those that do not.
fn settings(runs: &[Run]) -> Result<(Settings, Settings)> {
    let (mut differing, mut common) = (vec![], vec![]);
    let tables: Vec<toml::Table> = runs
        .iter()
        .map(|run| Ok(toml::from_str(&run.config.to_toml()?).expect("just written")))
        .collect::<Result<_>>()?;
    let Some(first) = tables.first() else { return Ok((differing, common)) };
    for key in first.keys() {
        let mut values: Vec<String> = vec![];
        for table in &tables {
            let value = table.get(key).map_or("–".into(), shown);
            if !values.contains(&value) {
                values.push(value);
            }
        }
        match &values[..] {
            [value] => common.push((key.clone(), value.clone())),
            _ => {
                let number = |v: &String| v.parse::<f64>().unwrap_or(f64::INFINITY);
                values.sort_by(|a, b| number(a).total_cmp(&number(b))); // words stay in the order of the runs
                differing.push((key.clone(), values.join(", ")));
            }
        }
    }
    Ok((differing, common))
}

/// A value without quotes; of the data's paths only the last parts, since a page is passed on.
fn shown(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Array(paths) if paths.is_empty() => "the default".into(),
        toml::Value::Array(paths) => {
            let last = |p: &toml::Value| {
                p.as_str().map_or(p.to_string(), |p| p.rsplit('/').next().unwrap_or(p).into())
            };
            paths.iter().map(last).collect::<Vec<String>>().join(", ")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_plotly_alone() {
        let library = plotly_js();
        assert!(library[..200].contains("plotly.js v") && !library.contains("mathjax@"));
        assert_eq!(library.matches("</script").count(), 1);
    }

    #[test]
    fn digits_are_grouped() {
        assert_eq!(
            [0, 999, 1000, 382_080, 1_536_000].map(grouped),
            ["0", "999", "1,000", "382,080", "1,536,000"]
        );
    }
}
