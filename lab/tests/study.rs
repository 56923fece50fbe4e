//! `study` as a person uses it: what a study leaves behind, stopping and going on, budgets, and what bad input is answered with.
//!
//! Everything runs on a small made-up text and a model of a few thousand parameters; which method is best there means nothing.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::browser;
use serde_json::Value;

/// A model of 12,000 parameters.
const SMALL: &str = "data = [\"text\"]\ndim = 16\nlayers = 2\nheads = 2\nffn = 24\ncontext = 16\nbatch = 4\nrank_ratio = 0.5\n\
                     eval_every = 0\n";

/// What these tests ask of a desk beside what all do.
struct Desk(common::Desk);

impl std::ops::Deref for Desk {
    type Target = common::Desk;
    fn deref(&self) -> &common::Desk {
        &self.0
    }
}

impl Desk {
    fn new() -> Self {
        Self(common::Desk::new(SMALL))
    }

    /// Standard error of a command that must succeed.
    fn ok(&self, line: &str) -> String {
        let [_, errors] = self.succeeds(line);
        errors
    }

    /// results.csv, a map for each line.
    fn results(&self, study: &str) -> Vec<BTreeMap<String, String>> {
        let text = self.text(&format!("{study}/results.csv"));
        let mut lines = text.lines().map(|line| line.split(',').map(str::to_owned));
        let header: Vec<String> = lines.next().unwrap().collect();
        lines.map(|cells| header.iter().cloned().zip(cells).collect()).collect()
    }

    /// The rows of the table of tables.json whose title contains `title`.
    fn table(&self, study: &str, title: &str) -> Vec<BTreeMap<String, String>> {
        let tables: Value = serde_json::from_str(&self.text(&format!("{study}/tables.json"))).unwrap();
        let mut tables = tables.as_array().unwrap().iter();
        let table = tables.find(|t| t["title"].as_str().unwrap().contains(title)).unwrap();
        let texts = |v: &Value| -> Vec<String> {
            v.as_array().unwrap().iter().map(|cell| cell.as_str().unwrap().to_owned()).collect()
        };
        let columns = texts(&table["columns"]);
        let rows = table["rows"].as_array().unwrap().iter().map(texts);
        rows.map(|cells| columns.iter().cloned().zip(cells).collect()).collect()
    }

    fn text(&self, file: &str) -> String {
        std::fs::read_to_string(self.path(file)).unwrap()
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_str(&self.text(file)).unwrap()
    }

    fn checkpoint(&self, run: &str) -> Option<PathBuf> {
        let files = std::fs::read_dir(self.path(run)).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).max()
    }
}

fn tensors(checkpoint: &Path) -> Vec<(String, Vec<u8>)> {
    let bytes = std::fs::read(checkpoint).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> =
        file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect();
    tensors.sort();
    tensors
}

fn number(row: &BTreeMap<String, String>, key: &str) -> f64 {
    row[key].parse().unwrap_or_else(|_| panic!("{key} is {:?}", row[key]))
}

#[test]
fn figures_are_those_of_the_runs() {
    let desk = Desk::new();
    let line = "study methods --config small.toml --steps 40 --methods spectron,dense-adamw --grid 0.5,1,2 --seeds 3,1 \
                --out s --adam-grid 1,2";
    let shown = desk.ok(line);
    assert!(shown.contains("study: s (2 arms") && shown.contains("-seed3: validation loss "), "{shown}");
    let results = desk.results("s");
    for row in &results {
        let run = format!("s/runs/{}", row["run"]);
        let (summary, config) =
            (desk.json(&format!("{run}/final.json")), desk.text(&format!("{run}/config.toml")));
        for key in
            ["val_loss", "val_bits_per_byte", "steps", "seed", "params", "tokens", "train_flops", "seconds"]
        {
            assert_eq!(number(row, key), summary[key].as_f64().unwrap(), "{run}: {key}");
        }
        assert_eq!(row["method"], summary["method"].as_str().unwrap());
        let config: toml::Table = config.parse().unwrap();
        assert_eq!(number(row, "lr"), config["lr"].as_float().unwrap());
        assert_eq!(number(row, "adam_lr"), config["adam_lr"].as_float().unwrap());
        assert_eq!((row["diverged_step"].as_str(), row["spikes"].as_str()), ("", "0"));
        assert!(desk.checkpoint(&run).is_none(), "checkpoints of finished runs are removed");
    }
    let summary = desk.table("s", "at its best learning rate");
    for arm in ["spectron", "dense-adamw"] {
        let of_arm: Vec<_> = results.iter().filter(|row| row["arm"] == arm).collect();
        let row = summary.iter().find(|row| row["arm"] == arm).unwrap();
        // the rate with the lowest loss at the first seed, and the mean and deviation of the two seeds there
        let at_first = of_arm.iter().filter(|r| r["seed"] == "3");
        let best = at_first.min_by(|a, b| number(a, "val_loss").total_cmp(&number(b, "val_loss"))).unwrap();
        assert_eq!((&row["lr"], &row["adam lr"]), (&best["lr"], &best["adam_lr"]));
        let at_best: Vec<_> = of_arm.iter().filter(|r| r["at_best"] == "true").collect();
        assert_eq!(at_best.len(), 2);
        assert!(at_best.iter().all(|r| (&r["lr"], &r["adam_lr"]) == (&best["lr"], &best["adam_lr"])));
        let [a, b] = [0, 1].map(|i| number(at_best[i], "val_loss"));
        // of two values: half their sum, and their difference over √2
        assert_eq!(
            row["validation loss"],
            format!("{:.4} ± {:.4}", (a + b) / 2.0, (a - b).abs() / 2f64.sqrt())
        );
        assert_eq!(row["seeds"], "2 of 2");
        let rates: std::collections::BTreeSet<u64> =
            of_arm.iter().map(|r| number(r, "lr").to_bits()).collect();
        let edge = [rates.first(), rates.last()].contains(&Some(&number(best, "lr").to_bits()));
        assert_eq!(row["interior"], if edge { "NO" } else { "yes" });
        assert!((3..=6).contains(&rates.len()) && (!edge || rates.len() == 6));
        // AdamW's one rate moves as a whole; Spectron's second is searched by itself, at the best of the first
        let alone = of_arm.iter().any(|r| number(r, "adam_lr") != number(r, "lr"));
        assert_eq!(alone, arm == "spectron");
    }
    if let Some(chromium) = browser::chromium() {
        let document = browser::opened(&chromium, &desk.path("s/report.html"));
        assert_eq!(browser::assert_drawn(&document), ["rates0", "loss", "lr", "norm"]);
        assert!(document.contains(&format!("<td>{}</td>", summary[0]["validation loss"])));
    }
    let markdown = desk.text("s/table.md");
    assert!(summary.iter().all(|row| markdown.contains(&format!("| {} | {} |", row["arm"], row["lr"]))));
}

#[test]
fn runs_equal_those_of_train() {
    let desk = Desk::new();
    let line = "study methods --config small.toml --steps 30 --methods self-guided-cheap,spectron --grid 2 --seeds 5 \
                --weight-decay 0.1 --out s --keep-checkpoints --quiet";
    desk.ok(line);
    for row in desk.results("s") {
        let run = format!("s/runs/{}", row["run"]);
        desk.ok(&format!("train --config {run}/config.toml --out again-{} --threads 2 --quiet", row["arm"]));
        let again = format!("again-{}", row["arm"]);
        assert_eq!(tensors(&desk.checkpoint(&run).unwrap()), tensors(&desk.checkpoint(&again).unwrap()));
        let val_loss = |run: &str| desk.json(&format!("{run}/final.json"))["val_loss"].clone();
        assert_eq!(val_loss(&run), val_loss(&again));
        let losses = |run: &str| -> Vec<Value> {
            let text = desk.text(&format!("{run}/metrics.jsonl"));
            text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].clone()).collect()
        };
        assert_eq!(losses(&run), losses(&again));
    }
}

#[cfg(unix)]
#[test]
fn a_stopped_study_goes_on_where_it_was() {
    let desk = Desk::new();
    let study =
        "study methods --config small.toml --steps 400 --methods spectron --grid 1 --seeds 1,2,3 --jobs 1";
    let mut child = desk.command(&format!("{study} --out s")).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    let second = desk.path("s/runs/spectron-lr0.025-adam0.004-seed2/metrics.jsonl");
    while std::fs::metadata(&second).map_or(0, |m| m.len()) < 1000 {
        assert!(start.elapsed() < Duration::from_secs(120), "the second run did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    let both = desk.refused("study --resume s");
    assert!(both.contains("s is in use: another rankgrad is at work on this study"), "{both}");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert!(child.wait().unwrap().success());
    let mut errors = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut errors).unwrap();
    assert!(errors.contains("interrupted. Continue with: rankgrad study --resume s"), "{errors}");
    assert_eq!(desk.results("s").len(), 1, "the tables of a partial study");
    let stopped_at = desk.text("s/runs/spectron-lr0.025-adam0.004-seed2/metrics.jsonl").lines().count();
    assert!((1..40).contains(&stopped_at), "{stopped_at} records of 40");
    assert!(desk.checkpoint("s/runs/spectron-lr0.025-adam0.004-seed2").is_some());
    let first = desk.path("s/runs/spectron-lr0.025-adam0.004-seed1/final.json");
    let written = |path: &Path| std::fs::metadata(path).unwrap().modified().unwrap();
    let before = written(&first);

    let shown = desk.ok("study --resume s");
    assert!(!shown.contains("seed1: validation") && shown.contains("seed2: validation"), "{shown}");
    assert_eq!(written(&first), before);
    desk.ok(&format!("{study} --out whole"));
    let strip = |study: &str| {
        let mut rows = desk.results(study);
        rows.iter_mut().for_each(|row| assert!(row.remove("seconds").is_some()));
        rows
    };
    assert_eq!(strip("s"), strip("whole"));
    assert_eq!(strip("s").len(), 3);
    // the same command once more repeats nothing
    assert!(!desk.ok(&format!("{study} --out s")).contains(": validation loss "));
}

#[test]
fn other_settings_are_refused() {
    let desk = Desk::new();
    // the study has its own --ratios
    std::fs::write(desk.path("small.toml"), SMALL.replace("rank_ratio = 0.5\n", "")).unwrap();
    let study = "study rank --config small.toml --steps 3 --grid 1 --seeds 1 --ratios 0.5,1 --out s --quiet";
    desk.ok(study);
    for (line, says) in [
        ("study --resume s --steps 4", "`steps` is 3 there, 4 now"),
        ("study --resume s --ratios 0.5", "`ratios` is [0.5, 1.0] there, [0.5] now"),
        ("study --resume s --nesterov", "`nesterov` is not given there, true now"),
        ("study methods --config small.toml --steps 3 --rank-ratio 0.5 --out s", "`kind` is \"rank\" there"),
        (
            "study rank --config small.toml --steps 3 --grid 1 --seeds 1 --out s",
            "`ratios` is [0.5, 1.0] there, not given now",
        ),
        ("study ablation --resume s", "this is a study of rank, not of ablation"),
        ("study --resume s --out t", "--out cannot go with --resume"),
        ("study --resume text", "study.toml"),
    ] {
        let errors = desk.refused(line);
        assert!(errors.contains(says), "{line}: expected {says:?} in\n{errors}");
    }
    // jobs and threads change no result
    desk.ok("study --resume s --jobs 3 --threads 2 --quiet");
    // a run whose record is of another configuration
    let config = "s/runs/spectron-r1-lr0.025-adam0.004-seed1/config.toml";
    std::fs::write(desk.path(config), desk.text(config).replace("momentum = 0.95", "momentum = 0.9"))
        .unwrap();
    let errors = desk.refused("study --resume s");
    assert!(errors.contains("was run with `momentum` = 0.9, the study asks for 0.95"), "{errors}");
    std::fs::write(desk.path("text"), "another text, long enough for it. ".repeat(100)).unwrap();
    assert!(desk.refused("study --resume s").contains("`data_sha256`"));
}

#[test]
fn bad_input_is_answered_by_name() {
    let desk = Desk::new();
    desk.ok("train --config small.toml --steps 2 --quiet --out run");
    for (line, says) in [
        ("study", "name the KIND"),
        ("study method", "'methods'"),
        ("study methods --methods spektron", "'spectron'"),
        ("study methods --grid ", "a value is required"),
        ("study methods --grid 1,,2", "each must be a positive number"),
        ("study methods --grid 1,-2", "each must be a positive number"),
        ("study methods --grid 0", "each must be a positive number"),
        ("study methods --grid 1,1", "none twice"),
        ("study methods --seeds 1,1", "none twice"),
        ("study methods --seeds 9223372036854775808", "--seeds 9223372036854775808: TOML holds at most"),
        ("study methods --methods adamw,spectron,adamw", "--methods names adamw twice"),
        ("study recipe --nesterov=false", "--nesterov is what `study recipe` compares"),
        ("study recipe --lr-scale shape", "--lr-scale is what `study recipe` compares"),
        ("study methods --jobs 0", "0 is not in 1.."),
        (
            "study methods --lr 0.1",
            "--lr (`lr` in a configuration file) is for one run; a study takes --grid",
        ),
        ("study methods --adam-lr 0.1", "--adam-grid"),
        ("study methods --method adamw", "--methods"),
        ("study methods --seed 2", "--seeds"),
        ("study methods --ratios 0.5", "--ratios is for rank"),
        ("study methods --multiples 2", "--multiples is for stability"),
        ("study methods --sizes 16,32", "--sizes is for methods --budget flops"),
        ("study methods --budget flops --sizes 16", "at least two widths"),
        ("study methods --budget flops --sizes 16,17", "heads is 2, which does not divide dim = 17"),
        ("study methods --budget flops --warmup 3", "--warmup"),
        ("study ablation --methods adamw", "--methods is for every kind but ablation"),
        ("study rank --ratios 0.5,2 --methods spectron", "rank-ratio is 2"),
        ("study rank --ratios 0.5 --methods dense-adamw", "no rank"),
        ("study stability --multiples 0", "each must be a positive number"),
        ("study methods --out run", "holds runs, but no study.toml"),
        ("study methods --out /proc/nowhere", "/proc/nowhere"),
        ("study methods --data missing", "missing"),
        ("study --resume nowhere", "nowhere"),
    ] {
        let config =
            if line.contains("rank --ratios") || line == "study" { "" } else { "--config small.toml" };
        let errors = desk.refused(&format!("{line} {config}"));
        assert!(errors.contains(says), "{line}: expected {says:?} in\n{errors}");
    }
    assert!(!desk.path("studies").exists(), "nothing was begun");
}

#[test]
fn a_run_that_diverges_is_an_outcome() {
    let desk = Desk::new();
    let line = "study methods --config small.toml --steps 20 --methods adamw --grid 1,1e30 --extensions 0 --seeds 1,2 \
                --momentum 0.9 --out s";
    let shown = desk.ok(line);
    let idle = "Without effect under every method here: --momentum.";
    assert!(shown.contains(idle) && desk.text("s/table.md").contains(idle), "{shown}");
    let rate = "2000000000000000000000000000";
    let run = format!("adamw-lr{rate}-adam{rate}-seed1");
    assert!(shown.contains(&format!("{run}: diverged, step ")), "{shown}");
    let diverged = desk.json(&format!("s/runs/{run}/diverged.json"));
    assert!(diverged["reason"].as_str().unwrap().contains("not finite"), "{diverged}");
    let results = desk.results("s");
    let row = results.iter().find(|r| r["lr"] == rate).unwrap();
    assert_eq!(number(row, "diverged_step"), diverged["step"].as_f64().unwrap());
    assert_eq!((row["val_loss"].as_str(), row["at_best"].as_str()), ("", "false"));
    let summary = &desk.table("s", "at its best learning rate")[0];
    assert_eq!((summary["lr"].as_str(), summary["seeds"].as_str()), ("0.002", "2 of 2"));
    assert_eq!((summary["diverged runs"].as_str(), summary["interior"].as_str()), ("1 of 3", "NO"));
    assert!(!desk.ok(line).contains("diverged, step"), "not run again");
    let [listed, _] = desk.succeeds("runs s");
    assert!(
        listed
            .lines()
            .any(|l| l.contains(rate) && l.contains(&format!("diverged at step {}", diverged["step"])))
    );
    // nothing survives: said, not averaged
    desk.ok("study methods --config small.toml --steps 20 --methods adamw --grid 1e30 --seeds 1,2 --out t");
    assert_eq!(desk.table("t", "at its best learning rate")[0]["lr"], "(every rate diverged)");
    assert_eq!(desk.results("t").len(), 1);
}

#[cfg(unix)]
#[test]
fn a_full_disk_stops_the_study_with_its_message() {
    let desk = Desk::new();
    // no file may grow beyond 8 blocks of 1 KiB: the first checkpoint cannot be written
    let study =
        "study methods --config small.toml --steps 5 --methods spectron --grid 1 --seeds 1,2 --out s --quiet";
    let line = format!("trap '' XFSZ; ulimit -f 8; {} {study}", env!("CARGO_BIN_EXE_rankgrad"));
    let output = Command::new("bash").args(["-c", &line]).current_dir(desk.path("")).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains("error: cannot write s/runs/"), "{errors}");
    desk.ok(study);
    assert_eq!(desk.results("s").len(), 2);
}

#[test]
fn budgets_are_met() {
    let desk = Desk::new();
    let small = "--config small.toml --dim 32 --ffn 80 --rank-ratio 0.25 --grid 1 --seeds 1 --quiet";
    desk.ok(&format!(
        "study methods --budget params {small} --steps 2 --methods spectron,dense-adamw,dense-muon --out p"
    ));
    let results = desk.results("p");
    let params: Vec<f64> = results.iter().map(|row| number(row, "params")).collect();
    assert!(params.iter().all(|p| (p / params[0] - 1.0).abs() <= 0.02), "{params:?}");
    let table: toml::Table = desk.text(&format!("p/runs/{}/config.toml", results[1]["run"])).parse().unwrap();
    let dim = table["dim"].as_integer().unwrap();
    assert!(dim < 32 && dim % 4 == 0, "narrower, two heads of an even size: {dim}");

    desk.ok(&format!(
        "study methods --budget flops {small} --steps 40 --methods spectron,self-guided,dense-muon --out f"
    ));
    let results = desk.results("f");
    let arms: Vec<&str> = results.iter().map(|row| row["arm"].as_str()).collect();
    assert_eq!(arms[..3], ["spectron-d24", "spectron-d32", "spectron-d44"]);
    assert_eq!(arms.len(), 9);
    let budget = number(&results[1], "train_flops");
    assert_eq!(number(&results[1], "steps"), 40.0);
    for row in &results {
        let (flops, steps) = (number(row, "train_flops"), number(row, "steps"));
        // to half a step, the nearest whole number of them
        assert!(
            (flops / budget - 1.0).abs() <= 0.501 / steps,
            "{}: {flops} of {budget} in {steps}",
            row["arm"]
        );
        let config: toml::Table = desk.text(&format!("f/runs/{}/config.toml", row["run"])).parse().unwrap();
        assert_eq!(config["warmup"].as_integer().unwrap(), steps as i64 / 20);
    }
    let best = desk.table("f", "best size");
    assert_eq!(
        best.iter().map(|r| r["method"].as_str()).collect::<Vec<_>>(),
        ["spectron", "self-guided", "dense-muon"]
    );
    for row in best {
        let of_method = results.iter().filter(|r| r["method"] == row["method"]);
        let lowest =
            of_method.min_by(|a, b| number(a, "val_loss").total_cmp(&number(b, "val_loss"))).unwrap();
        assert_eq!(lowest["arm"], format!("{}-d{}", row["method"], row["d"]));
    }
}

#[test]
fn each_kind_has_its_arms_and_tables() {
    let desk = Desk::new();
    let with = |line: &str| desk.ok(&format!("study {line} --config small.toml --seeds 1 --quiet"));
    let arms = |study: &str| -> Vec<String> {
        desk.table(study, "best learning rate").into_iter().map(|row| row["arm"].clone()).collect()
    };
    with("ablation --steps 3 --grid 1 --out a");
    assert_eq!(arms("a"), ["neither", "renormalised", "orthogonalised", "both"]);
    let methods: Vec<String> = desk.results("a").iter().map(|row| row["method"].clone()).collect();
    assert_eq!(methods, ["momentum-factors", "renormalised", "muon-factors", "spectron"]);

    with("recipe --steps 3 --grid 1 --methods adamw,dense-muon --out c");
    let parts = ["base", "linear-to-zero", "zero-init-output", "lr-scale-shape", "all"];
    assert_eq!(arms("c")[..5], parts.map(|part| format!("adamw-{part}")));
    assert_eq!(arms("c")[5..7], ["dense-muon-base", "dense-muon-nesterov"]);
    let all: toml::Table =
        desk.text("c/runs/dense-muon-all-lr0.01-adam0.004-seed1/config.toml").parse().unwrap();
    assert_eq!((all["nesterov"].as_bool(), all["zero_init_output"].as_bool()), (Some(true), Some(true)));
    assert_eq!((all["schedule"].as_str(), all["lr_scale"].as_str()), (Some("linear"), Some("shape")));
    assert_eq!(all["final_lr_fraction"].as_float(), Some(0.0));

    // AdamW at 1e30 times its rate does not survive
    with("stability --steps 300 --methods adamw --multiples 1,3,1e30 --out st");
    let row = &desk.table("st", "the largest rate")[0];
    assert_eq!((row["best lr"].as_str(), row["largest surviving lr"].as_str()), ("0.002", "0.006"));
    assert_eq!(
        (row["ratio"].as_str(), row["first failing lr"].as_str()),
        ("3.000", "2000000000000000000000000000")
    );

    with("long --steps 50 --log-every 1 --out l");
    let config: toml::Table =
        desk.text("l/runs/spectron-lr0.025-adam0.004-seed1/config.toml").parse().unwrap();
    assert_eq!((config["schedule"].as_str(), config["dim"].as_integer()), (Some("constant"), Some(16)));
    let drift = desk.table("l", "drift");
    assert_eq!(drift.len(), 10);
    let records = desk.text("l/runs/spectron-lr0.025-adam0.004-seed1/metrics.jsonl");
    let losses: Vec<f64> = records
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64().unwrap())
        .collect();
    let last = losses[45..].iter().sum::<f64>() / 5.0;
    assert_eq!(
        (drift[9]["steps"].as_str(), drift[9]["training loss"].clone()),
        ("to 50", format!("{last:.4}"))
    );
    let limits = desk.table("l", "limits");
    assert!(limits.iter().any(|row| row["what"] == "loss spikes" && row["held"] == "yes"), "{limits:?}");
}
