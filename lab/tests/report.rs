//! `report` as a person uses it: the page opened in Chromium, the pictures, and what bad input is answered with.
//!
//! Without a Chromium on this machine the tests in a browser say so and pass, unless RANKGRAD_REQUIRE_CHROMIUM is set.
//! Everything runs on made-up records with known numbers: what is looked for is that they arrive, not what they mean.

mod common;

use std::path::PathBuf;
use std::process::{Command, Output};

use common::browser::{assert_drawn, chromium, curves, figures, opened};

use tempfile::TempDir;

const LAYERS: usize = 2;
const KINDS: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

struct Desk {
    dir: TempDir,
}

impl Desk {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn report(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rankgrad"));
        command.arg("report").args(arguments).current_dir(self.dir.path()).output().unwrap()
    }

    /// The page that a report writes.
    fn page(&self, arguments: &[&str], out: &str) -> String {
        let output = self.report(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}\n{errors}");
        std::fs::read_to_string(self.path(out)).unwrap()
    }

    /// What a report that must fail says.
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.report(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{arguments:?} succeeded");
        assert!(errors.starts_with("error: ") && !errors.contains("panicked"), "{errors}");
        errors
    }

    /// A run of 30 records. Telemetry every 5 of them, under `field` if there is one.
    fn run(&self, name: &str, settings: &str, val_loss: f64, field: Option<&str>) {
        self.write(&format!("{name}/config.toml"), &format!("steps = 300\nlayers = {LAYERS}\n{settings}"));
        let record = |i: usize| {
            let step = 10 * i;
            let loss = val_loss + 4.0 / i as f64;
            let mut record = serde_json::json!({
                "step": step, "loss": loss, "lr": 0.01, "grad_norm": 1.0 + 1.0 / i as f64,
                "tokens": 768 * step, "seconds": 0.02 * step as f64, "tokens_per_second": 38400.0,
            });
            if i.is_multiple_of(10) {
                record["val_loss"] = (loss + 0.1).into();
            }
            if let Some(field) = field.filter(|_| i.is_multiple_of(5)) {
                for (layer, kind) in (0..LAYERS).flat_map(|l| KINDS.map(|k| (l, k))) {
                    let sigma = 1.0 + layer as f64 + step as f64 / 300.0;
                    record[field][format!("blocks.{layer}.{kind}")] = serde_json::json!({
                        "sigma_w": sigma, "stable_rank": 8.0, "update": 0.01, "update_over_eta": 0.9,
                        "update_over_w": 0.01 / sigma,
                    });
                    if field == "pairs" {
                        let more = &mut record[field][format!("blocks.{layer}.{kind}")];
                        more["sigma_a"] = sigma.sqrt().into();
                        more["sigma_b"] = sigma.sqrt().into();
                        more["rho"] = (0.01 / sigma).into();
                        more["shrink"] = 0.999.into();
                        more["gauge_imbalance"] = (step as f64).into();
                        if i == 5 {
                            more["gauge_imbalance"] = serde_json::Value::Null; // not finite
                        }
                    }
                }
            }
            record.to_string() + "\n"
        };
        self.write(&format!("{name}/metrics.jsonl"), &(1..=30).map(record).collect::<String>());
        let outcome = serde_json::json!({
            "val_loss": val_loss, "val_bits_per_byte": val_loss / std::f64::consts::LN_2, "params": 382_080,
            "tokens": 230_400, "seconds": 6.0, "steps": 300, "train_flops": 6e11,
        });
        self.write(&format!("{name}/final.json"), &outcome.to_string());
    }

    /// Two arms at three rates with two seeds; one run diverged. Its best rate is 0.02 in both arms.
    fn study(&self, name: &str) {
        self.write(&format!("{name}/study.toml"), "title = \"Rates & <i>arms</i>\"");
        let mut rows = String::from("run,arm,method,lr,adam_lr,seed,at_best,val_loss,diverged_step\n");
        for (arm, method) in [("pairs </script>", "spectron"), ("dense", "dense-muon")] {
            for (lr, val_loss) in [(0.01, 2.2), (0.02, 2.0), (0.04, 2.1)] {
                for seed in [1, 2] {
                    let id = format!("{method}-{lr}-{seed}");
                    let field = if method == "spectron" { "pairs" } else { "hidden" };
                    let settings =
                        format!("method = \"{method}\"\nlr = {lr}\nadam_lr = 0.004\nseed = {seed}\n");
                    let val_loss = val_loss + 0.01 * seed as f64;
                    self.run(&format!("{name}/runs/{id}"), &settings, val_loss, Some(field));
                    let diverged = (method, lr, seed) == ("spectron", 0.04, 2);
                    let outcome = if diverged { ",170".into() } else { format!("{val_loss},") };
                    let best = lr == 0.02;
                    rows += &format!("{id},{arm},{method},{lr},0.004,{seed},{best},{outcome}\n");
                }
            }
        }
        self.write(&format!("{name}/results.csv"), &rows);
        let table = serde_json::json!([
            {"title": "Best", "columns": ["arm", "loss"], "rows": [["a < b", "2.00 ± 0.01"], ["dense", "2.01"]]},
        ]);
        self.write(&format!("{name}/tables.json"), &table.to_string());
    }
}

/// Nothing in the page but plotly.js names another place, and the browser would refuse what plotly.js names.
fn assert_complete(page: &str) {
    assert!(page.contains("http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';"));
    let (before, rest) = page.split_once("<script type=\"text/javascript\">").unwrap();
    let (library, after) = rest.split_once("</script>").unwrap();
    assert!(library[..200].contains("plotly.js v"));
    for part in [before, after] {
        for word in ["http://", "https://", "src=", "href=", "@import", "url("] {
            assert!(!part.contains(word), "{word}");
        }
    }
}

#[test]
fn a_page_of_runs_draws_every_figure() {
    let desk = Desk::new();
    desk.run("a", "method = \"spectron\"\nlr = 0.02\n", 2.0, Some("pairs"));
    desk.run("b", "method = \"dense-muon\"\nlr = 0.04\n", 2.1, None);
    let page = desk.page(&["a", "b", "--out", "ab.html"], "ab.html");
    assert_complete(&page);
    for cell in ["<td>2.0000</td>", "<td>2.8854</td>", "<td>382,080</td>", "<dd>0.02, 0.04</dd>"] {
        assert!(page.contains(cell), "{cell}");
    }
    assert!(page.contains("1 of 2 runs recorded no spectra"));
    let Some(chromium) = chromium() else { return };
    let document = opened(&chromium, &desk.path("ab.html"));
    assert_eq!(assert_drawn(&document), ["loss", "lr", "norm", "spectra"]);
    let lines = |id: &str| curves(figures(&document).into_iter().find(|f| f.0 == id).unwrap().1);
    assert_eq!((lines("loss"), lines("lr")), (6, 2)); // training, smoothed, validation of each run
    assert_eq!(lines("spectra"), LAYERS * KINDS.len());
}

#[test]
fn a_page_of_a_study_shows_tables_and_the_best_rates() {
    let desk = Desk::new();
    desk.study("study");
    let page = desk.page(&["study", "--svg", "pictures"], "report.html");
    assert_complete(&page);
    assert!(page.contains("<td>2.00 ± 0.01</td>"));
    let names = std::fs::read_dir(desk.path("pictures")).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<String> = names.map(|n| n.into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names.len(), 2 + 10 + 5); // ten quantities of a pair, five of a dense matrix
    assert!(names.contains(&"learning-rate.svg".into()) && names.contains(&"loss.svg".into()), "{names:?}");
    let svg = std::fs::read_to_string(desk.path("pictures/learning-rate.svg")).unwrap();
    assert!(svg.contains("pairs &lt;/script&gt;") && svg.contains("validation loss (nats per token)"));

    let Some(chromium) = chromium() else { return };
    let document = opened(&chromium, &desk.path("report.html"));
    assert_eq!(assert_drawn(&document), ["rates0", "loss", "lr", "norm", "spectra"]);
    let all = figures(&document);
    // two arms at their best rate, two seeds each
    assert_eq!(curves(all[2].1), 4);
    // Eleven runs that ended and one that diverged; one mean for each of two arms and three rates.
    assert_eq!(all[0].1.matches("class=\"point\"").count(), 11 + 1 + 6);
    // A name with markup in it shows as it is.
    assert!(all[1].1.contains(">pairs &lt;/script&gt;</text>"), "{}", all[1].1);
    assert!(document.contains("<h1>Rates &amp; &lt;i&gt;arms&lt;/i&gt;</h1>"));
}

/// The pictures in docs/ are those of its tables.
#[test]
fn the_pictures_of_the_results_are_of_their_tables() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");
    for (table, drawn, shown) in
        [("methods-flops", "size", "flops"), ("stability", "learning-rate", "stability")]
    {
        let desk = Desk::new();
        desk.page(&[&format!("{docs}/studies/{table}.csv"), "--svg", "pictures"], "report.html");
        let drawn = std::fs::read_to_string(desk.path(&format!("pictures/{drawn}.svg"))).unwrap();
        let shown = std::fs::read_to_string(format!("{docs}/{shown}.svg")).unwrap();
        assert!(drawn == shown, "docs/{shown}.svg: draw it again (docs/results.md has the command)");
    }
}

/// Also what stands in docs/studies, which has no runs beside it.
#[test]
fn a_studys_table_alone_shows_rates_and_sizes() {
    let desk = Desk::new();
    let mut rows = String::from("run,arm,method,lr,adam_lr,seed,at_best,params,val_loss,diverged_step\n");
    for (method, at) in [("spectron", 0.0), ("dense-muon", 0.3)] {
        for (width, params) in [(24, 29_232), (48, 91_728)] {
            for seed in [1, 2] {
                for lr in [0.01, 0.02] {
                    let (best, loss) = (lr == 0.02, 2.0 + at - lr + 0.1 * f64::from(seed));
                    rows += &format!(
                        "{method}-{width}-{lr}-{seed},{method}-d{width},{method},{lr},0.004,{seed},{best},{params},{loss},\n"
                    );
                }
            }
        }
    }
    desk.write("flops.csv", &rows);
    let page = desk.page(&["flops.csv", "--svg", "pictures"], "report.html");
    assert!(page.contains("<h1>flops</h1>"));
    let said = String::from_utf8(desk.report(&["flops.csv"]).stdout).unwrap();
    assert!(said.contains("report.html: 16 results of studies, 0 runs with curves"), "{said}");
    let svg = std::fs::read_to_string(desk.path("pictures/size.svg")).unwrap();
    assert!(svg.contains(">\nparameters\n<") && svg.contains("dense-muon") && !svg.contains("d24"), "{svg}");
    assert!(desk.path("pictures/learning-rate.svg").exists());
    let own = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/studies")).unwrap();
    let own: Vec<_> =
        own.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "csv")).collect();
    // that of an example is of another form
    let own = own.iter().map(|p| p.to_str().unwrap()).filter(|p| !p.contains("mnist"));
    desk.page(&own.collect::<Vec<_>>(), "report.html");

    let Some(chromium) = chromium() else { return };
    desk.page(&["flops.csv"], "report.html");
    let document = opened(&chromium, &desk.path("report.html"));
    assert_eq!(assert_drawn(&document), ["sizes0", "rates0"]);
    let all = figures(&document);
    // two methods with two sizes: two seeds and a mean each; in the other figure at two rates
    assert_eq!(all[0].1.matches("class=\"point\"").count(), 2 * 2 * 3);
    assert_eq!(all[1].1.matches("class=\"point\"").count(), 2 * 2 * 3 * 2);
}

#[test]
fn every_choice_of_every_control_can_be_drawn() {
    let desk = Desk::new();
    desk.study("study");
    let page = desk.page(&["study", "--out", "page.html"], "page.html");
    let Some(chromium) = chromium() else { return };
    // Appended to the page: chooses each option once, and writes down what was drawn then.
    let script = r#"<script>
        const said = [];
        for (const select of document.querySelectorAll("select")) {
            const figure = select.closest("figure").querySelector(".plot");
            for (let i = 0; i < select.options.length; i++) {
                select.selectedIndex = i;
                select.dispatchEvent(new Event("change"));
                const title = figure.querySelector(".xtitle").textContent + "|" + figure.querySelector(".ytitle").textContent;
                const lines = [...figure.querySelectorAll(".js-line")].filter(p => p.getAttribute("d").includes("L"));
                said.push([select.id, select.options[i].text, lines.length, title, figure.layout.yaxis.type].join("|"));
            }
            select.selectedIndex = 0;
            select.dispatchEvent(new Event("change"));
        }
        const probe = document.createElement("pre");
        probe.id = "probe";
        probe.textContent = said.join("\n");
        document.body.append(probe);
    </script>"#;
    desk.write("probed.html", &page.replace("</body>", &format!("{script}</body>")));
    let document = opened(&chromium, &desk.path("probed.html"));
    let probe = document.split_once("<pre id=\"probe\">").unwrap().1.split_once("</pre>").unwrap().0;
    let lines: Vec<&str> = probe.lines().collect();
    for line in &lines {
        let drawn: usize = line.split('|').nth(2).unwrap().parse().unwrap();
        assert!(drawn > 0, "{line}");
    }
    for expected in [
        "loss-0|all (12)|36|step|loss (nats per token)|linear",
        "loss-1|validation only|4|step|loss (nats per token)|linear",
        "loss-2|seconds|12|training time (s)|loss (nats per token)|linear",
        "loss-4|logarithmic|12|step|loss (nats per token)|log",
        "lr-1|FLOPs|4|training FLOPs|learning rate|linear",
        "spectra-0|dense-muon-0.02-1|14|step|σ(W), spectral norm|linear",
        "spectra-1|‖ΔW‖₂ / η|14|step|‖ΔW‖₂ / η|linear",
        "spectra-1|radius ρ of the factors' step|14|step|radius ρ of the factors' step|linear",
        "spectra-2|gate|2|step|σ(W), spectral norm|linear",
        "spectra-3|layer 1|7|step|σ(W), spectral norm|linear",
    ] {
        assert!(lines.contains(&expected), "{expected}\n{probe}");
    }
}

#[test]
fn a_run_under_way_is_shown_without_an_outcome() {
    let desk = Desk::new();
    desk.run("a", "seed = 3\n", 2.0, None);
    std::fs::remove_file(desk.path("a/final.json")).unwrap();
    let page = desk.page(&["a"], "report.html");
    assert!(page.contains("1 of them did not end") && page.contains("<td>–</td>"));
}

#[test]
fn unusable_input_is_refused_with_a_reason() {
    let desk = Desk::new();
    desk.run("runs/a", "", 2.0, None);
    desk.run("empty", "", 2.0, None);
    desk.write("empty/metrics.jsonl", "");
    desk.write("file", "");
    desk.write("bare.csv", "loss\n2.0\n");
    desk.write("broken/study.toml", "");
    desk.write("broken/results.csv", "arm,lr,at_best\na,0.1,true\n");
    desk.run("odd", "", 2.0, None);
    let line =
        r#"{"step":1,"loss":1,"lr":1,"grad_norm":1,"tokens":1,"seconds":1,"tokens_per_second":1,"pairs":3}"#;
    desk.write("odd/metrics.jsonl", &format!("{line}\n"));
    for (arguments, says) in [
        (&["none"][..], "none does not exist"),
        (&["file"], "file is a file: give the directory"),
        (&["bare.csv"], "bare.csv has no column `arm`"),
        (&["runs"], "runs is neither a run"),
        (&["runs"], "there are runs inside: give runs/a"),
        (&["empty"], "empty has no records in metrics.jsonl yet"),
        (&["broken"], "broken/results.csv has no column `val_loss`"),
        (&["odd"], "odd/metrics.jsonl line 1 is no record"),
        (&["runs/a", "--out", "page.txt"], "--out page.txt: give a file whose name ends in .html"),
        (&["runs/a", "--out", "no/such/page.html"], "cannot write no/such/page.html"),
    ] {
        let error = desk.refused(arguments);
        assert!(error.contains(says), "{arguments:?}: {error}");
    }
    assert!(!desk.path("report.html").exists());
}

#[test]
fn a_page_that_exists_is_replaced_whole_or_stays() {
    let desk = Desk::new();
    desk.run("a", "", 2.0, None);
    desk.write("page.html", "before");
    desk.refused(&["none", "--out", "page.html"]);
    assert_eq!(std::fs::read_to_string(desk.path("page.html")).unwrap(), "before");
    assert!(desk.page(&["a", "--out", "page.html"], "page.html").ends_with("</html>"));
}
