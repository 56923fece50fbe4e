//! What README, CONTRIBUTING and docs say is true: line counts of the reading path, links, the library example, that every
//! example shows its output (.ci/run compares it with what the example prints), that means are those of the recorded runs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The targets of Markdown links that are not addresses.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets.filter(|t| !t.contains("://")).collect()
}

/// How many lines a cell of the table means: not blank, before the tests; all, or those before a function, or its own.
fn lines(cell: &str) -> usize {
    let text = read(links(cell)[0]);
    let all: Vec<&str> = text
        .lines()
        .take_while(|line| *line != "#[cfg(test)]")
        .filter(|line| !line.trim().is_empty())
        .collect();
    let Some(name) = cell.split('`').nth(1) else { return all.len() };
    // a method, or a function of the file
    let heads = ["(", "<"].map(|after| format!("pub fn {name}{after}"));
    let at = all.iter().position(|line| heads.iter().any(|head| line.trim_start().starts_with(head)));
    let at = at.unwrap_or_else(|| panic!("{cell}: no such function"));
    let indent = &all[at][..all[at].find("pub").expect("it was found by that")];
    // its doc comment and attributes stand above it
    let above = |line: &&&str| line.trim_start().starts_with("///") || line.trim_start().starts_with("#[");
    let first = at - all[..at].iter().rev().take_while(above).count();
    if cell.contains("up to") {
        return first;
    }
    let end = format!("{indent}}}");
    all[first..].iter().position(|line| *line == end).expect("a closing brace") + 1
}

#[test]
fn the_reading_path_has_the_lines_it_says() {
    let readme = read("README.md");
    let table = readme.split("## Reading path").nth(1).and_then(|s| s.split("\n## ").next()).unwrap();
    let (mut is, mut should, mut total) = (String::new(), String::new(), 0);
    for row in table.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let count = if links(cells[1]).is_empty() { total } else { lines(cells[1]) };
        total += count;
        is += &format!("{row}\n");
        should += &format!("| {} | {count} | {} |\n", cells[1], cells[3]).replace("|  |", "| |");
    }
    assert!(is.lines().count() > 6, "{is}");
    assert!(is == should, "the reading path in README.md should be\n\n{should}");
    assert!(total / 2 <= 880, "{} lines are no short path", total / 2);
}

#[test]
fn the_library_example_is_that_of_the_documentation() {
    let readme = read("README.md");
    let example = readme.split("```rust\n").nth(1).and_then(|s| s.split("```").next()).unwrap();
    let library = read("lib.rs");
    let mut tested = library.lines().filter_map(|line| line.strip_prefix("//!"));
    for line in example.lines().filter(|line| !line.is_empty()) {
        assert!(
            tested.any(|t| t.trim() == line.trim()),
            "not in the example of lib.rs, or not in order: {line}"
        );
    }
}

#[test]
fn links_lead_somewhere() {
    let docs = ["results", "orthogonalisers", "performance", "gpu", "gpu-measurements"];
    let docs: Vec<String> = docs.iter().map(|name| format!("docs/{name}.md")).collect();
    for page in
        ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].into_iter().chain(docs.iter().map(String::as_str))
    {
        let text = read(page);
        for link in links(&text) {
            let from = Path::new(page).parent().unwrap();
            let path = link.split('#').next().unwrap();
            assert!(root().join(from).join(path).exists(), "{page}: {link}");
        }
    }
}

#[test]
fn every_example_shows_its_output() {
    for entry in std::fs::read_dir(root().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let head: Vec<&str> = text.lines().take_while(|line| line.starts_with("//!")).collect();
        let command =
            format!("cargo run --release --example {}", path.file_stem().unwrap().to_str().unwrap());
        let at = head.iter().position(|line| line.contains(&command));
        let at = at.unwrap_or_else(|| panic!("{}: no command at the top", path.display()));
        assert!(head.len() > at + 2, "{}: no expected output after the command", path.display());
    }
}

/// "1.6844 ± 0.0090" of a text, as mean, standard deviation, and what rounding may have changed in both.
fn means(text: &str) -> Vec<(f64, f64, f64)> {
    let number = |c: char| c.is_ascii_digit() || c == '.';
    let mean = |(before, after): (&str, &str)| {
        let mean = &before[before.rfind(|c| !number(c)).map_or(0, |at| at + 1)..];
        let deviation = &after[..after.find(|c| !number(c)).unwrap_or(after.len())];
        let digits = mean.len() - mean.find('.')? - 1;
        let rounding = 0.5001 * 0.1f64.powi(digits as i32);
        Some((mean.parse().ok()?, deviation.trim_end_matches('.').parse().ok()?, rounding))
    };
    text.match_indices(" ± ").filter_map(|(at, sign)| mean((&text[..at], &text[at + sign.len()..]))).collect()
}

/// Mean and sample standard deviation.
fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0)).sqrt())
}

/// Mean and deviation over the seeds for every arm and rate in a table of runs.
fn recorded(csv: &str) -> Vec<(f64, f64)> {
    let text = read(csv);
    let mut rows = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let header = rows.next().unwrap();
    let column = |name: &str| header.iter().position(|h| *h == name);
    let setting = ["arm", "network", "method", "lr", "adam_lr", "rest", "judged_on"].map(column);
    let value = column("val_loss").or(column("accuracy")).unwrap_or_else(|| panic!("{csv}: no results"));
    let mut groups: HashMap<Vec<&str>, Vec<f64>> = HashMap::new();
    for row in rows {
        let Ok(value) = row[value].parse() else { continue }; // a diverged run
        groups.entry(setting.iter().flatten().map(|&at| row[at]).collect()).or_default().push(value);
    }
    groups.into_values().filter(|values| values.len() > 1).map(|values| mean_and_deviation(&values)).collect()
}

#[test]
fn the_means_of_the_results_are_those_of_the_recorded_runs() {
    let close = |is: (f64, f64, f64), (mean, deviation): (f64, f64)| {
        (is.0 - mean).abs() <= is.2 && (is.1 - deviation).abs() <= is.2
    };
    let results = read("docs/results.md");
    let mut count = 0;
    for section in results.split("\n## ") {
        let tables = links(section).into_iter().filter(|link| link.ends_with(".csv"));
        let known: Vec<_> = tables.flat_map(|csv| recorded(&format!("docs/{csv}"))).collect();
        for line in section.lines() {
            // a row that lists its seeds' losses needs no table
            let seeds = line.split('|').map(|cell| cell.split(", ").map(|v| v.trim().parse()).collect());
            let seeds: Vec<Vec<f64>> =
                seeds.flat_map(|cell: Result<_, _>| cell).filter(|c: &Vec<_>| c.len() > 1).collect();
            let listed: Vec<_> = seeds.iter().map(|s| mean_and_deviation(s)).collect();
            for is in means(line) {
                count += 1;
                assert!(
                    known.iter().chain(&listed).any(|&runs| close(is, runs)),
                    "{} ± {} is in no table that its section links: {line}",
                    is.0,
                    is.1
                );
            }
        }
    }
    assert!(count > 200, "{count}");
    let known = means(&results);
    for is in means(&read("README.md")) {
        assert!(known.iter().any(|k| close(is, (k.0, k.1))), "{} ± {} is not in docs/results.md", is.0, is.1);
    }
}
