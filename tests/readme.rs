//! What README and CONTRIBUTING say about files is true: line counts of the reading path, links, the library example, that
//! every example shows its output (.ci/run compares it with what the example prints).

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
