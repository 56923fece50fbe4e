//! The tables of a study: results.csv with a line for each run, table.md and tables.json with a line for each arm and rate.
//!
//! Written after each run, so that a study that is not over can be read. Not here: what the figures are (outcome.rs).

use std::path::Path;

use serde::Serialize;

use crate::config::{Config, name};
use crate::error::Result;
use crate::files::{write_atomically, write_json};
use crate::flops::{parameters, step_flops};
use crate::study::execute::Outcomes;
use crate::study::long;
use crate::study::outcome::Outcome;
use crate::study::plan::{Budget, Kind, Plan};
use crate::study::search::{Arm, State, Trial};

/// Rows of text under names of columns; tables.json is a list of these.
#[derive(Serialize)]
pub struct Table {
    pub title: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<const N: usize>(title: impl Into<String>, columns: [&str; N]) -> Self {
        Table { title: title.into(), columns: columns.map(str::to_owned).to_vec(), rows: vec![] }
    }

    fn to_markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rule = line(&vec!["---".to_owned(); self.columns.len()]);
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!("## {}\n\n{}{rule}{rows}\n", self.title, line(&self.columns))
    }
}

/// Writes the three files. Returns table.md. `frequencies`: [`Corpus::frequency_loss`](crate::data::Corpus::frequency_loss).
///
/// # Errors
/// A full disk and the like.
pub fn write(directory: &Path, plan: &Plan, frequencies: f64, outcomes: &Outcomes) -> Result<String> {
    let states = plan.states(outcomes);
    let arms: Arms = &plan.arms.iter().zip(&states).collect::<Vec<_>>();
    let title = match plan.kind {
        Kind::Methods => format!("methods at equal {}", name(plan.budget)),
        kind => name(kind),
    };
    let mut tables = vec![summary(&title, arms, outcomes)];
    match plan.kind {
        Kind::Methods if plan.budget == Budget::Flops => tables.push(best_sizes(&title, arms, outcomes)),
        Kind::Stability => tables.push(survival(&title, frequencies, arms, outcomes)),
        Kind::Long => tables.extend(long::tables(&title, &directory.join("runs"), arms, outcomes)?),
        _ => {}
    }
    tables.push(rates(&title, arms, outcomes));
    let notes: String = plan.notes.iter().map(|note| format!("- {note}\n")).collect();
    let markdown: String = tables.iter().map(Table::to_markdown).collect::<String>() + &notes;
    write_atomically(&directory.join("results.csv"), csv(arms, outcomes).as_bytes())?;
    write_json(&directory.join("tables.json"), &tables)?;
    write_atomically(&directory.join("table.md"), markdown.as_bytes())?;
    Ok(markdown)
}

/// The arms of a study and where each stands.
pub type Arms<'a> = &'a [(&'a Arm, &'a State)];

/// The runs of an arm that are over.
pub fn finished<'a>(
    state: &'a State,
    outcomes: &'a Outcomes,
) -> impl Iterator<Item = (&'a Trial, &'a Outcome)> {
    state.trials.iter().filter_map(|t| Some((t, outcomes.get(&t.id)?)))
}

/// One line for each run that is over; figures in full, empty where there is none.
fn csv(arms: Arms, outcomes: &Outcomes) -> String {
    let mut text =
        "run,arm,method,lr,adam_lr,seed,at_best,steps,params,tokens,train_flops,seconds,val_loss,val_bits_per_byte,\
                    best_val_loss,diverged_step,spikes,max_update_over_w\n"
            .to_owned();
    let number = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
    for (arm, state) in arms {
        for (trial, o) in finished(state, outcomes) {
            let (c, summary) = (&trial.config, o.end.as_ref().ok());
            let diverged = o.end.as_ref().err().map(|d| d.step);
            let steps = diverged.map_or(c.steps, |step| step as usize);
            text += &[
                trial.id.clone(),
                arm.label.clone(),
                name(c.method),
                c.lr.to_string(),
                c.adam_lr.to_string(),
                c.seed.to_string(),
                state.at_best.contains(trial).to_string(),
                steps.to_string(),
                parameters(c).to_string(),
                tokens(c, steps).to_string(),
                (step_flops(c).total() * steps as f64).to_string(),
                o.seconds.to_string(),
                number(summary.map(|s| s.val_loss)),
                number(summary.and_then(|s| s.val_bits_per_byte)),
                number(o.best_val_loss),
                diverged.map_or(String::new(), |step| step.to_string()),
                o.spikes.to_string(),
                number(o.max_update_over_w),
            ]
            .join(",");
            text.push('\n');
        }
    }
    text
}

/// One line for each arm, at its best rates.
fn summary(title: &str, arms: Arms, outcomes: &Outcomes) -> Table {
    let mut table = Table::new(
        format!("{title}: each arm at its best learning rate"),
        [
            "arm",
            "lr",
            "adam lr",
            "interior",
            "validation loss",
            "bits per byte",
            "seeds",
            "parameters",
            "training FLOPs",
            "tokens",
            "seconds per run",
            "diverged runs",
        ],
    );
    for (arm, state) in arms {
        let over = finished(state, outcomes).count();
        let diverged = finished(state, outcomes).filter(|(_, o)| o.end.is_err()).count();
        let diverged = format!("{diverged} of {over}");
        let Some((best, interior)) = &state.best else {
            let open = if state.expected > 0 { "(rates not yet compared)" } else { "(every rate diverged)" };
            let mut row = row_of(&table, [arm.label.clone(), open.into()]);
            *row.last_mut().expect("columns") = diverged;
            table.rows.push(row);
            continue;
        };
        let summaries: Vec<_> =
            state.at_best.iter().filter_map(|t| outcomes.get(&t.id)?.end.as_ref().ok()).collect();
        let losses: Vec<f64> = summaries.iter().map(|s| s.val_loss).collect();
        let bits: Vec<f64> = summaries.iter().filter_map(|s| s.val_bits_per_byte).collect();
        let seconds = summaries.iter().map(|s| s.seconds).sum::<f64>() / summaries.len() as f64;
        let c = &best.config;
        let interior = match interior {
            _ if arm.grid.len() == 1 => "not searched",
            true => "yes",
            false => "NO",
        };
        table.rows.push(vec![
            arm.label.clone(),
            c.lr.to_string(),
            c.adam_lr.to_string(),
            interior.into(),
            mean_and_sd(&losses),
            mean_and_sd(&bits),
            format!("{} of {}", losses.len(), arm.seeds.len()),
            parameters(c).to_string(),
            format!("{:.3e}", step_flops(c).total() * c.steps as f64),
            tokens(c, c.steps).to_string(),
            format!("{seconds:.1}"),
            diverged,
        ]);
    }
    table
}

/// The runs of an arm that are over, by rates, ascending.
fn by_rates<'a>(state: &'a State, outcomes: &'a Outcomes) -> Vec<(&'a Config, Vec<&'a Outcome>)> {
    let mut groups: Vec<(&Config, Vec<&Outcome>)> = vec![];
    for (trial, outcome) in finished(state, outcomes) {
        let rates = |c: &Config| (c.lr, c.adam_lr);
        match groups.iter_mut().find(|(c, _)| rates(c) == rates(&trial.config)) {
            Some((_, group)) => group.push(outcome),
            None => groups.push((&trial.config, vec![outcome])),
        }
    }
    groups.sort_by(|(a, _), (b, _)| a.lr.total_cmp(&b.lr).then(a.adam_lr.total_cmp(&b.adam_lr)));
    groups
}

/// Final validation losses of the runs that did not diverge.
fn losses<'a>(outcomes: impl IntoIterator<Item = &'a &'a Outcome>) -> Vec<f64> {
    outcomes.into_iter().map(|o| o.loss()).filter(|loss| loss.is_finite()).collect()
}

/// One line for each arm and pair of rates, over the seeds that were run there.
fn rates(title: &str, arms: Arms, outcomes: &Outcomes) -> Table {
    let mut table = Table::new(
        format!("{title}: all learning rates"),
        ["arm", "lr", "adam lr", "validation loss", "finished", "diverged at step", "spikes", "max ‖ΔW‖/‖W‖"],
    );
    for (arm, state) in arms {
        for (config, outcomes) in by_rates(state, outcomes) {
            let losses = losses(&outcomes);
            let diverged = outcomes.iter().filter_map(|o| Some(o.end.as_ref().err()?.step));
            let update = outcomes.iter().filter_map(|o| o.max_update_over_w).reduce(f64::max);
            table.rows.push(vec![
                arm.label.clone(),
                config.lr.to_string(),
                config.adam_lr.to_string(),
                mean_and_sd(&losses),
                format!("{} of {}", losses.len(), outcomes.len()),
                list(diverged),
                list(outcomes.iter().map(|o| o.spikes)),
                update.map_or(String::new(), |u| format!("{u:.3e}")),
            ]);
        }
    }
    table
}

/// One line for each method: the size whose mean loss is lowest, once all of its sizes are through.
fn best_sizes(title: &str, arms: Arms, outcomes: &Outcomes) -> Table {
    let mut table = Table::new(
        format!("{title}: each method at its best size"),
        ["method", "d", "interior size", "steps", "parameters", "validation loss", "seeds"],
    );
    for sizes in arms.chunk_by(|(a, _), (b, _)| a.config.method == b.config.method) {
        let through = |(arm, state): &(&Arm, &State)| {
            let at_best: Vec<&Outcome> = state.at_best.iter().filter_map(|t| outcomes.get(&t.id)).collect();
            let every_rate_diverged = state.best.is_none() && state.expected == 0;
            (at_best.len() == arm.seeds.len() || every_rate_diverged).then(|| losses(&at_best))
        };
        let method = name(sizes[0].0.config.method);
        let Some(losses) = sizes.iter().map(through).collect::<Option<Vec<_>>>() else {
            table.rows.push(row_of(&table, [method, "(sizes not yet compared)".into()]));
            continue;
        };
        let mean = |i: usize| losses[i].iter().sum::<f64>() / losses[i].len() as f64; // NaN: all diverged
        let tried = (0..sizes.len()).filter(|&i| mean(i).is_finite());
        let Some(best) = tried.reduce(|a, b| if mean(b) < mean(a) { b } else { a }) else {
            table.rows.push(row_of(&table, [method, "(every rate diverged)".into()]));
            continue;
        };
        let (arm, last) = (sizes[best].0, sizes.len() - 1);
        table.rows.push(vec![
            method,
            arm.config.dim.to_string(),
            if 0 < best && best < last { "yes" } else { "NO" }.into(),
            arm.config.steps.to_string(),
            parameters(&arm.config).to_string(),
            mean_and_sd(&losses[best]),
            format!("{} of {}", losses[best].len(), arm.seeds.len()),
        ]);
    }
    table
}

/// One line for each arm: how far beyond its best rate it can go.
///
/// A rate survives if each of its seeds keeps at least half of what the best rate learns beyond the frequencies of bytes: if
/// its loss is at most halfway from the best rate's mean to `frequencies`.
fn survival(title: &str, frequencies: f64, arms: Arms, outcomes: &Outcomes) -> Table {
    let mut table = Table::new(
        format!(
            "{title}: the largest rate below the first that fails (a rate survives if no seed ends above the halfway point from \
             the best rate's loss to that of byte frequencies, {frequencies:.4})"
        ),
        ["arm", "best lr", "largest surviving lr", "ratio", "first failing lr", "first lr with a spike"],
    );
    for (arm, state) in arms {
        let Some((best, _)) = &state.best else {
            table.rows.push(row_of(&table, [arm.label.clone(), "(none)".into()]));
            continue;
        };
        let groups = by_rates(state, outcomes);
        let at_best: Vec<f64> =
            state.at_best.iter().filter_map(|t| outcomes.get(&t.id)).map(Outcome::loss).collect();
        let bound = 0.5 * (at_best.iter().sum::<f64>() / at_best.len() as f64 + frequencies);
        let survives = |o: &&Outcome| o.loss() <= bound;
        let failing = groups.iter().position(|(_, os)| !os.iter().all(survives));
        let largest = groups[..failing.unwrap_or(groups.len())].last().map(|(c, _)| c.lr);
        let spiking = groups.iter().find(|(_, os)| os.iter().any(|o| o.spikes > 0));
        let show = |lr: Option<f64>| lr.map_or("none".into(), |lr| lr.to_string());
        table.rows.push(vec![
            arm.label.clone(),
            best.config.lr.to_string(),
            show(largest),
            largest.map_or(String::new(), |lr| format!("{:.3}", lr / best.config.lr)),
            show(failing.map(|i| groups[i].0.lr)),
            show(spiking.map(|(c, _)| c.lr)),
        ]);
    }
    table
}

/// A row that starts with these cells and is empty otherwise.
fn row_of<const N: usize>(table: &Table, cells: [String; N]) -> Vec<String> {
    let mut row = cells.to_vec();
    row.resize(table.columns.len(), String::new());
    row
}

fn list<T: ToString>(values: impl Iterator<Item = T>) -> String {
    values.map(|v| v.to_string()).collect::<Vec<_>>().join(", ")
}

fn tokens(c: &Config, steps: usize) -> usize {
    steps * c.accumulate * c.batch * c.context
}

/// "1.6844 ± 0.0090", the sample standard deviation; without it for one value; empty for none.
fn mean_and_sd(x: &[f64]) -> String {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let squares: f64 = x.iter().map(|x| (x - mean).powi(2)).sum();
    match x.len() {
        0 => String::new(),
        1 => format!("{mean:.4}"),
        _ => format!("{mean:.4} ± {:.4}", (squares / (n - 1.0)).sqrt()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The three seeds of docs/results.md.
    #[test]
    fn the_deviation_is_that_of_a_sample() {
        assert_eq!(mean_and_sd(&[1.6763, 1.6828, 1.6940]), "1.6844 ± 0.0090");
        assert_eq!((mean_and_sd(&[2.0]), mean_and_sd(&[])), ("2.0000".into(), String::new()));
    }
}
