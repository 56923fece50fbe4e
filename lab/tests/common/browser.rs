//! Pages opened in Chromium, and what is drawn there.
//!
//! Without a Chromium on this machine there is none to open them with, which is said, unless RANKGRAD_REQUIRE_CHROMIUM is set.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Of the PATH.
pub fn chromium() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let found = std::env::split_paths(&path).flat_map(|d| names.map(|n| d.join(n))).find(|p| p.is_file());
    if found.is_none() {
        assert!(
            std::env::var_os("RANKGRAD_REQUIRE_CHROMIUM").is_none(),
            "RANKGRAD_REQUIRE_CHROMIUM is set, and no chromium is in PATH"
        );
        eprintln!("skipped: no chromium in PATH to open the page with");
    }
    found
}

/// The document after its scripts have run. Anything on the console, a refused request included, fails the test.
pub fn opened(chromium: &Path, page: &Path) -> String {
    let profile = tempfile::tempdir().unwrap();
    let flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
                 --disable-component-update --disable-sync --enable-logging=stderr --window-size=1400,1000 \
                 --virtual-time-budget=20000 --dump-dom";
    let output = Command::new(chromium)
        .args(flags.split_whitespace())
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    let console: Vec<&str> = log.lines().filter(|line| line.contains("CONSOLE")).collect();
    assert!(output.status.success() && console.is_empty(), "{log}");
    String::from_utf8(output.stdout).unwrap()
}

/// The figures of an opened page: id and markup.
pub fn figures(document: &str) -> Vec<(&str, &str)> {
    let figure = |part| {
        let (markup, _): (&str, &str) = str::split_once(part, "</figure>").unwrap();
        let (_, rest) = markup.split_once("class=\"plot").unwrap();
        let (id, _) = rest.split_once("id=\"").unwrap().1.split_once('"').unwrap();
        (id, markup)
    };
    document.split("<figure>").skip(1).map(figure).collect()
}

/// The number of a figure's curves: of lines with a second point, which those of the legend lack.
pub fn curves(markup: &str) -> usize {
    let lines = markup.split("class=\"js-line\"").skip(1).map(|rest| rest.split('>').next().unwrap());
    lines
        .filter(|tag| tag.split_once(" d=\"M").is_some_and(|d| d.1.split('"').next().unwrap().contains('L')))
        .count()
}

/// Every figure has curves and titled axes. Returns the ids.
pub fn assert_drawn(document: &str) -> Vec<&str> {
    let figures = figures(document);
    for (id, markup) in &figures {
        assert!(curves(markup) > 0, "{id} has no curve");
        for class in ["xtitle", "ytitle"] {
            let title = markup.split(&format!("<text class=\"{class}\"")).nth(1).expect(class);
            let text = title.split_once('>').unwrap().1.split('<').next().unwrap();
            assert!(!text.trim().is_empty(), "{id}: {class}");
        }
    }
    figures.into_iter().map(|f| f.0).collect()
}
