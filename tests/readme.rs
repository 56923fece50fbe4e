//! What README and CONTRIBUTING say about files is true: line counts of the reading path, links, expected outputs.

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

#[test]
fn the_reading_path_has_the_lines_it_says() {
    let readme = read("README.md");
    let table = readme.split("## Reading path").nth(1).and_then(|s| s.split("\n## ").next()).unwrap();
    let rows: Vec<(String, usize)> = table
        .lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let path = links(cells.get(1)?).first()?.to_string();
            Some((path, cells[2].parse().unwrap_or_else(|_| panic!("{line}: no line count"))))
        })
        .collect();
    assert!(rows.len() >= 6, "{rows:?}");
    for (path, lines) in &rows {
        assert_eq!(read(path).lines().count(), *lines, "lines of {path}: mend README.md");
    }
    let total: usize = rows.iter().map(|(_, lines)| lines).sum();
    assert!(table.contains(&format!("| {total} |")), "the total is {total}");
    assert!(total <= 1200, "{total} lines are no short path");
}

#[test]
fn links_lead_somewhere() {
    for page in ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/results.md"] {
        let text = read(page);
        for link in links(&text) {
            let from = Path::new(page).parent().unwrap();
            assert!(root().join(from).join(link).exists(), "{page}: {link}");
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
