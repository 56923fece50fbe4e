//! The tables of a study: results.csv with a line for each run, table.md and tables.json with a line for each arm and rate.
//!
//! Written after each run, so that a study that is not over can be read. Not here: what the figures are (outcome.rs).

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::config::name;
use crate::error::{Result, write_atomically};
use crate::flops::{parameters, step_flops};
use crate::study::execute::Outcomes;
use crate::study::outcome::Outcome;
use crate::study::plan::{Kind, Plan};
use crate::study::search::{Arm, State, Trial};

/// Rows of text under names of columns; tables.json is a list of these.
#[derive(Serialize)]
pub struct Table {
    pub title: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    fn new<const N: usize>(title: impl Into<String>, columns: [&str; N]) -> Self {
        Table { title: title.into(), columns: columns.map(str::to_owned).to_vec(), rows: vec![] }
    }

    fn to_markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rule = line(&vec!["---".to_owned(); self.columns.len()]);
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!("## {}\n\n{}{rule}{rows}\n", self.title, line(&self.columns))
    }
}

/// Writes the three files. Returns table.md.
///
/// # Errors
/// A full disk and the like.
pub fn write(directory: &Path, kind: Kind, plan: &Plan, outcomes: &Outcomes) -> Result<String> {
    let states = plan.states(outcomes);
    let arms: Vec<(&Arm, &State)> = plan.arms.iter().zip(&states).collect();
    let tables = [summary(kind, &arms, outcomes), rates(kind, &arms, outcomes)];
    let notes: String = plan.notes.iter().map(|note| format!("- {note}\n")).collect();
    let markdown: String = tables.iter().map(Table::to_markdown).collect::<String>() + &notes;
    let json = serde_json::to_string_pretty(&tables).expect("plain values") + "\n";
    write_atomically(&directory.join("results.csv"), csv(&arms, outcomes).as_bytes())?;
    write_atomically(&directory.join("tables.json"), json.as_bytes())?;
    write_atomically(&directory.join("table.md"), markdown.as_bytes())?;
    Ok(markdown)
}

/// The finished runs of an arm.
fn finished<'a>(state: &'a State, outcomes: &'a Outcomes) -> impl Iterator<Item = (&'a Trial, &'a Outcome)> {
    state.trials.iter().filter_map(|t| Some((t, outcomes.get(&t.id)?)))
}

/// One line for each run that is over; figures in full, empty where there is none.
fn csv(arms: &[(&Arm, &State)], outcomes: &Outcomes) -> String {
    let mut text =
        "run,arm,method,lr,adam_lr,seed,steps,params,tokens,train_flops,seconds,val_loss,val_bits_per_byte,\
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
                steps.to_string(),
                parameters(c).to_string(),
                o.tokens.to_string(),
                (step_flops(c).total() * steps as f64).to_string(),
                o.seconds.to_string(),
                number(summary.map(|s| s.val_loss)),
                number(summary.map(|s| s.val_bits_per_byte)),
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
fn summary(kind: Kind, arms: &[(&Arm, &State)], outcomes: &Outcomes) -> Table {
    let mut table = Table::new(
        format!("Study {}: each arm at its best learning rate", name(kind)),
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
            "seconds",
            "diverged runs",
        ],
    );
    for (arm, state) in arms {
        let over = finished(state, outcomes).count();
        let diverged = finished(state, outcomes).filter(|(_, o)| o.end.is_err()).count();
        let diverged = format!("{diverged} of {over}");
        let Some((best, interior)) = &state.best else {
            let open = if state.expected > 0 { "(rates not yet compared)" } else { "(every rate diverged)" };
            let mut row = vec![arm.label.clone(), open.into()];
            row.resize(table.columns.len() - 1, String::new());
            row.push(diverged);
            table.rows.push(row);
            continue;
        };
        let summaries: Vec<_> =
            state.at_best.iter().filter_map(|t| outcomes.get(&t.id)?.end.as_ref().ok()).collect();
        let losses: Vec<f64> = summaries.iter().map(|s| s.val_loss).collect();
        let bits: Vec<f64> = summaries.iter().map(|s| s.val_bits_per_byte).collect();
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
            (c.steps * c.accumulate * c.batch * c.context).to_string(),
            format!("{seconds:.1}"),
            diverged,
        ]);
    }
    table
}

/// One line for each arm and pair of rates, over the seeds that were run there.
fn rates(kind: Kind, arms: &[(&Arm, &State)], outcomes: &Outcomes) -> Table {
    let mut table = Table::new(
        format!("Study {}: all learning rates", name(kind)),
        ["arm", "lr", "adam lr", "validation loss", "finished", "diverged at step", "spikes", "max ‖ΔW‖/‖W‖"],
    );
    for (arm, state) in arms {
        // ascending: positive floats sort like their bits
        let mut groups: BTreeMap<(u64, u64), Vec<&Outcome>> = BTreeMap::new();
        for (trial, outcome) in finished(state, outcomes) {
            let key = (trial.config.lr.to_bits(), trial.config.adam_lr.to_bits());
            groups.entry(key).or_default().push(outcome);
        }
        for ((lr, adam_lr), outcomes) in groups {
            let losses: Vec<f64> =
                outcomes.iter().filter_map(|o| Some(o.end.as_ref().ok()?.val_loss)).collect();
            let steps: Vec<String> =
                outcomes.iter().filter_map(|o| Some(o.end.as_ref().err()?.step.to_string())).collect();
            let spikes: Vec<String> = outcomes.iter().map(|o| o.spikes.to_string()).collect();
            let update = outcomes.iter().filter_map(|o| o.max_update_over_w).reduce(f64::max);
            table.rows.push(vec![
                arm.label.clone(),
                f64::from_bits(lr).to_string(),
                f64::from_bits(adam_lr).to_string(),
                mean_and_sd(&losses),
                format!("{} of {}", losses.len(), outcomes.len()),
                steps.join(", "),
                spikes.join(", "),
                update.map_or(String::new(), |u| format!("{u:.3e}")),
            ]);
        }
    }
    table
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
