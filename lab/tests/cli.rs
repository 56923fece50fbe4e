//! The binary as a person uses it: train, stop, resume, evaluate, generate, inspect; and what bad input is answered with.
//!
//! Everything runs on a small made-up text and a model of a few thousand parameters. Losses that mean something are
//! measured in docs/results.md, not here.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use serde_json::Value;

/// A model of 12,000 parameters.
const SMALL: &str =
    "dim = 16\nlayers = 2\nheads = 2\nffn = 24\ncontext = 16\nbatch = 4\nrank_ratio = 0.5\nadam_lr = 0.01\n";

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

    /// Standard output of a command that must succeed.
    fn ok(&self, line: &str) -> String {
        let [output, _] = self.succeeds(line);
        output
    }

    fn train(&self, out: &str, more: &str) -> String {
        self.ok(&format!("train --data text --config small.toml --quiet --out {out} {more}"))
    }

    /// The tensors of a checkpoint, or of a run's newest, names and bits.
    fn tensors(&self, run: &str) -> Vec<(String, Vec<u8>)> {
        let path = self.path(run);
        let bytes = std::fs::read(if path.is_dir() { newest(&path) } else { path }).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: Vec<_> =
            file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect();
        tensors.sort();
        tensors
    }
}

fn newest(run: &Path) -> PathBuf {
    let files = std::fs::read_dir(run).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).max().unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn resuming_changes_no_bit() {
    for (method, more) in [
        ("spectron", ""),
        ("adamw", ""),
        ("muon-factors", "--nesterov=false"),
        ("renormalised", ""),
        ("momentum-factors", "--lr-scale shape"),
        ("lora-muon", ""),
        // two micro-batches: each draws the guides to skip anew
        ("self-guided", "--accumulate 2"),
        ("self-guided-cheap", "--accumulate 2"),
        ("dense-adamw", ""),
        ("dense-muon", "--lr-scale shape"),
    ] {
        let desk = Desk::new();
        let flags = format!(
            "--method {method} --steps 200 --eval-every 50 --telemetry-every 25 --weight-decay 0.1 {more}"
        );
        desk.train("whole", &flags);
        // before and after step 100, where the guides are dropped
        desk.train("parts", &format!("{flags} --stop-after 70 --threads 1"));
        desk.ok("train --resume parts --quiet --threads 2 --stop-after 120");
        assert!(!desk.path("parts/final.json").exists());
        desk.ok("train --resume parts --quiet --threads 3");
        assert_eq!(desk.tensors("whole"), desk.tensors("parts"), "{method}");
        // the same records too, but for the times
        let strip = |run: &str| -> Vec<Value> {
            let mut records = metrics(&desk.path(run));
            for record in &mut records {
                let record = record.as_object_mut().unwrap();
                record.retain(|key, _| !["seconds", "tokens_per_second"].contains(&key.as_str()));
            }
            records
        };
        assert_eq!(strip("whole"), strip("parts"));
        assert_eq!(metrics(&desk.path("parts")).len(), 20 + 4); // every 10 and every 25 steps
        for key in ["val_loss", "max_update_over_w", "max_update_over_eta"] {
            let [whole, parts] = ["whole", "parts"].map(|run| json(&desk.path(run).join("final.json")));
            assert!(whole[key].as_f64().unwrap() > 0.0);
            assert_eq!(whole[key], parts[key], "{method}: {key}");
        }
    }
}

#[test]
fn a_run_learns_and_its_files_say_so() {
    let desk = Desk::new();
    desk.train("run", "--steps 150 --lr 0.05 --seed 3 --checkpoint-every 40 --keep 2");
    let summary = json(&desk.path("run/final.json"));
    for key in [
        "val_bits_per_byte",
        "params",
        "tokens",
        "seconds",
        "tokens_per_second",
        "peak_memory_mib",
        "train_flops",
    ] {
        assert!(summary[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert_eq!(summary["steps"], 150);
    assert_eq!(summary["method"], "spectron");
    assert_eq!(summary["seed"], 3);
    assert_eq!(summary["tokens"], 150 * 4 * 16);
    // 13 different bytes of equal weight would be ln 13 = 2.56 nats
    let loss = summary["val_loss"].as_f64().unwrap();
    assert!(loss < 2.0, "{loss}");
    let files = std::fs::read_dir(desk.path("run")).unwrap().count();
    assert_eq!(files, 4 + 2, "config.toml, metrics.jsonl, final.json, loss.svg and two checkpoints");

    let evaluation: Value = serde_json::from_str(&desk.ok("eval run --data text --json")).unwrap();
    assert_eq!(evaluation["val_loss"], summary["val_loss"]);
    assert!(evaluation["tokens"].as_u64().unwrap() > 1500);
    let text = desk.ok("generate run --prompt 7 --tokens 40 --seed 5");
    assert_eq!(text, desk.ok("generate run --prompt 7 --tokens 40 --seed 5"));
    assert_ne!(text, desk.ok("generate run --prompt 7 --tokens 40 --seed 6"));
    assert!(text.starts_with('7') && text.len() > 40);
    let table = desk.ok("inspect run");
    assert!(table.contains("blocks.1.down") && table.contains("σ(W)"), "{table}");
    let report: Value = serde_json::from_str(&desk.ok("inspect run --json")).unwrap();
    let pairs = report["pairs"].as_array().unwrap();
    assert_eq!(pairs.len(), 2 * 7);
    for pair in pairs {
        let f = |key: &str| pair[key].as_f64().unwrap();
        assert!(f("sigma_w") <= f("sigma_a") * f("sigma_b") * 1.0001 && f("stable_rank") >= 0.999, "{pair}");
    }
}

/// The same text alone, in a batch, streamed, as JSON, in a conversation; ended by a stop string; timed.
#[test]
fn text_is_generated_in_every_way() {
    let desk = Desk::new();
    desk.train("run", "--steps 100");
    let alone = |prompt: &str| desk.ok(&format!("generate run --prompt {prompt} --tokens 40 --top-p 0.9"));
    let (seven, one) = (alone("7"), alone("1,"));
    std::fs::write(desk.path("prompts"), "7\n\n1,\n").unwrap();
    let both = desk.ok("generate run --prompts prompts --tokens 40 --top-p 0.9");
    assert_eq!(both, format!("--- 1 of 2 ---\n{seven}--- 2 of 2 ---\n{one}"));
    let lines = desk.ok("generate run --prompts prompts --tokens 40 --top-p 0.9 --json");
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let whole =
        |line: &Value| format!("{}{}\n", line["prompt"].as_str().unwrap(), line["text"].as_str().unwrap());
    assert_eq!([whole(&lines[0]), whole(&lines[1])], [seven.clone(), one]);
    assert_eq!((lines[0]["tokens"].as_u64(), lines[0]["stopped"].as_bool()), (Some(40), Some(false)));

    // two characters from the middle of what comes
    let added = &seven[1..seven.len() - 1];
    let stop: String = added.chars().skip(20).take(2).collect();
    let mut command = desk.command("generate run --prompt 7 --tokens 40 --top-p 0.9 --stop");
    let output = command.arg(&stop).output().unwrap();
    let cut = &added[..added.find(&stop).unwrap()];
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("7{cut}\n"));

    let talk = |input: &str| {
        use std::io::Write;
        use std::process::Stdio;
        let mut command = desk.command("generate run --interactive --tokens 40 --top-p 0.9");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(talk("7\n"), seven);
    let two = talk("7\n1,\n\nnot read\n");
    assert!(two.starts_with(&seven) && two[seven.len()..].starts_with("1,"), "{two}");
    assert_eq!(talk(""), "");

    let table = desk.ok("generate run --bench --tokens 2");
    assert!(table.contains("factored") && table.contains("merged") && table.contains("decode"), "{table}");
    let bench: Value =
        serde_json::from_str(&desk.ok("generate --bench --preset tiny --tokens 2 --json")).unwrap();
    assert_eq!((bench["prompt_tokens"].as_u64(), bench["decoded_tokens"].as_u64()), (Some(32), Some(2)));
    for row in bench["rows"].as_array().unwrap() {
        assert!(row["decode_tokens_per_second"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn bench_takes_its_steps_once_for_each_line_it_is_given() {
    use std::io::Write;
    use std::process::Stdio;
    let line =
        "bench --rounds --steps 2 --layers 1 --dim 8 --heads 1 --ffn 8 --context 4 --batch 3 --accumulate 2";
    let mut child = Desk::new().command(line).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"1\n\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let (ready, reports) = text.split_once('\n').unwrap();
    assert_eq!((ready, reports.lines().count()), ("ready", 2), "{text}");
    for report in reports.lines() {
        let report: Value = serde_json::from_str(report).unwrap();
        assert_eq!((&report["steps"], &report["tokens_per_step"]), (&2.into(), &24.into()), "{report}");
        assert!(report["step_ms"].as_f64().unwrap() > 0.0, "{report}");
    }
}

/// A model under guidance is validated, inspected and sampled with its guides; at the end none is left.
#[test]
fn guides_come_and_go() {
    let desk = Desk::new();
    let flags = "--method self-guided-cheap --steps 100 --lr 0.01 --adam-lr 0.01 --eval-batches 0 --keep 0";
    desk.train("run", &format!("{flags} --eval-every 20 --checkpoint-every 20"));
    let tensors = |step: &str| {
        let bytes = std::fs::read(desk.path(&format!("run/step-{step}.safetensors"))).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        file.names().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let guides = |step: &str| tensors(step).iter().filter(|name| name.contains("guide")).count();
    assert_eq!((guides("00000040"), guides("00000060")), (2 * 7, 0));
    assert!(tensors("00000060").iter().all(|name| !name.starts_with("opt.hidden")));
    for (i, step) in ["00000020", "00000040", "00000060"].iter().enumerate() {
        let file = format!("run/step-{step}.safetensors");
        let evaluation: Value = serde_json::from_str(&desk.ok(&format!("eval {file} --json"))).unwrap();
        let records = metrics(&desk.path("run"));
        let validated = records.iter().filter(|r| r.get("val_loss").is_some()).nth(i).unwrap();
        assert_eq!(evaluation["val_loss"], validated["val_loss"]);
        desk.ok(&format!("inspect {file}"));
        desk.ok(&format!("generate {file} --tokens 3"));
    }
    desk.train("plain", "--method adamw --steps 1");
    let summary = json(&desk.path("run/final.json"));
    assert_eq!(summary["params"], json(&desk.path("plain/final.json"))["params"]);
    assert!(summary["val_loss"].as_f64().unwrap() < 3.0);
}

/// The numbers of a record's matrix; each is there and finite.
fn numbers(matrix: &Value, keys: &[&str]) -> Vec<f64> {
    assert_eq!(matrix.as_object().unwrap().len(), keys.len(), "{matrix}");
    keys.iter().map(|key| matrix[*key].as_f64().unwrap_or_else(|| panic!("{key} in {matrix}"))).collect()
}

const MATRIX: [&str; 5] = ["sigma_w", "stable_rank", "update", "update_over_eta", "update_over_w"];
const PAIR: [&str; 8] = [
    "sigma_w",
    "stable_rank",
    "update",
    "update_over_eta",
    "update_over_w",
    "sigma_a",
    "sigma_b",
    "gauge_imbalance",
];

#[test]
fn telemetry_looks_and_touches_nothing() {
    for (method, more) in [
        ("spectron", "--tie --weight-decay 0.1 --lr-scale shape"),
        ("adamw", "--accumulate 2"),
        ("self-guided", "--tie"),
        ("dense-muon", "--lr-scale shape"),
    ] {
        let desk = Desk::new();
        let flags = format!("--method {method} --steps 30 --log-every 8 {more}");
        desk.train("blind", &format!("{flags} --telemetry-every 0"));
        desk.train("fast", &format!("{flags} --telemetry-every 1 --threads 3"));
        desk.train("exact", &format!("{flags} --telemetry-every 5 --telemetry exact"));
        assert_eq!(desk.tensors("blind"), desk.tensors("fast"), "{method}");
        assert_eq!(desk.tensors("blind"), desk.tensors("exact"), "{method}");
        let blind = metrics(&desk.path("blind"));
        assert_eq!(blind.iter().map(|r| r["step"].as_u64().unwrap()).collect::<Vec<_>>(), [8, 16, 24, 30]);
        assert!(blind.iter().all(|r| r.get("pairs").is_none() && r.get("hidden").is_none()));
        assert!(json(&desk.path("blind/final.json"))["max_update_over_w"].is_null());

        let [fast, exact] = ["fast", "exact"].map(|run| metrics(&desk.path(run)));
        assert_eq!((fast.len(), exact.len()), (30, 6 + 3)); // 5, 8, 10, 15, 16, 20, 24, 25, 30
        let (mut over_w, mut over_eta) = (0.0f64, 0.0f64);
        for record in &fast {
            let step = record["step"].as_u64().unwrap();
            let lr = record["lr"].as_f64().unwrap();
            for (kind, keys, there) in [
                ("pairs", &PAIR[..], method != "dense-muon"),
                // guides are gone by half of the steps
                ("hidden", &MATRIX[..], method == "dense-muon" || method == "self-guided" && step < 15),
            ] {
                assert_eq!(record.get(kind).is_some(), there, "{method} {kind} at {step}");
                let Some(matrices) = record.get(kind) else { continue };
                assert_eq!(matrices.as_object().unwrap().len(), 2 * 7);
                for (name, matrix) in matrices.as_object().unwrap() {
                    let mut keys = keys.to_vec();
                    if method == "spectron" {
                        keys.push("rho");
                    }
                    if kind == "pairs" {
                        keys.push("shrink");
                    }
                    let seen = numbers(matrix, &keys);
                    // the feed-forward matrices are 24 wide in a model of 16
                    let wide = ["gate", "up", "down"].iter().any(|ffn| name.ends_with(ffn));
                    let scale = if more.contains("shape") && wide { 1.5f64.sqrt() } else { 1.0 };
                    // a guided pair does not move in the first step, where all the weight is the guide's
                    let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b;
                    assert!(seen[2] > 0.0 || method == "self-guided" && step == 1, "{matrix}");
                    assert!(
                        near(seen[3] * lr * scale, seen[2]) && near(seen[4] * seen[0], seen[2]),
                        "{matrix}"
                    );
                    assert!(seen[1] >= 1.0, "{matrix}");
                    if method == "spectron" {
                        // ρ(σ_A + σ_B + 1) = η with σ from before the step, so nearly
                        let eta = seen[8] * (seen[5] + seen[6] + 1.0);
                        assert!((eta / (lr * scale) - 1.0).abs() < 0.1, "{name}: {matrix}");
                        assert!(
                            (seen[9] - (1.0 - 0.1 * lr * scale)).abs() < 1e-12 && seen[3] < 1.3,
                            "{matrix}"
                        );
                    }
                    (over_eta, over_w) = (over_eta.max(seen[3]), over_w.max(seen[4]));
                }
            }
        }
        let summary = json(&desk.path("fast/final.json"));
        assert_eq!(summary["max_update_over_w"], over_w);
        assert_eq!(summary["max_update_over_eta"], over_eta);
        // no matrix here has more than 24 singular values, where the estimates are exact
        for record in exact.iter().filter(|r| r["step"].as_u64().unwrap().is_multiple_of(5)) {
            let same = fast.iter().find(|r| r["step"] == record["step"]).unwrap();
            for kind in ["pairs", "hidden"] {
                let matrices = record.get(kind).and_then(Value::as_object).into_iter().flatten();
                for (name, matrix) in matrices {
                    for (key, value) in matrix.as_object().unwrap() {
                        let (a, b) = (value.as_f64().unwrap(), same[kind][name][key].as_f64().unwrap());
                        assert!((a - b).abs() <= 1e-6 * b.abs(), "{name}.{key}: {a} {b}");
                    }
                }
            }
        }
    }
}

#[test]
fn telemetry_may_change_on_resume_and_inspect_shows_the_newest() {
    let desk = Desk::new();
    desk.train("run", "--steps 40 --checkpoint-every 10 --keep 0 --telemetry-every 15 --stop-after 22");
    desk.ok("train --resume run --quiet --telemetry-every 4 --telemetry exact");
    let records = metrics(&desk.path("run"));
    let seen: Vec<_> = records.iter().filter(|r| r.get("pairs").is_some()).map(|r| &r["step"]).collect();
    assert_eq!(seen, [15, 24, 28, 32, 36, 40]);
    for (step, newest) in [(10, None), (20, Some(15)), (30, Some(28)), (40, Some(40))] {
        let file = format!("run/step-{step:08}.safetensors");
        let report: Value = serde_json::from_str(&desk.ok(&format!("inspect {file} --json"))).unwrap();
        assert_eq!(report["telemetry_step"].as_u64(), newest);
        let record = records.iter().find(|r| r["step"].as_u64() == newest);
        for pair in report["pairs"].as_array().unwrap() {
            let then = record.map(|r| &r["pairs"][pair["name"].as_str().unwrap()]);
            for key in ["rho", "shrink", "update", "update_over_eta", "update_over_w"] {
                assert_eq!(&pair[key], then.map_or(&Value::Null, |then| &then[key]), "{key}");
            }
            for key in ["sigma_a", "sigma_b", "sigma_w", "stable_rank", "gauge_imbalance"] {
                let now = pair[key].as_f64().unwrap();
                assert!(now > 0.0);
                // the telemetry of the checkpoint's own step is of the same weights
                let same =
                    then.filter(|_| newest == Some(step)).map_or(now, |then| then[key].as_f64().unwrap());
                assert!((now / same - 1.0).abs() < 1e-6, "{key}: {now} {same}");
            }
        }
    }
    let table = desk.ok("inspect run/step-00000010.safetensors");
    assert!(
        table.contains("‖ΔW‖/‖W‖") && table.contains(" –") && !table.contains("those of step"),
        "{table}"
    );
    let table = desk.ok("inspect run");
    assert!(table.contains("those of step 40") && !table.contains(" –"), "{table}");
    // far from its run, a checkpoint is still shown
    std::fs::copy(newest(&desk.path("run")), desk.path("alone.safetensors")).unwrap();
    assert!(desk.ok("inspect alone.safetensors").contains(" –"));

    desk.train("dense", "--method dense-adamw --steps 2 --telemetry-every 1");
    let table = desk.ok("inspect dense");
    assert!(
        table.contains("blocks.1.down") && table.contains("σ(W), est.") && !table.contains(" –"),
        "{table}"
    );
    let report: Value = serde_json::from_str(&desk.ok("inspect dense --json")).unwrap();
    assert_eq!(report["hidden"].as_array().unwrap().len(), 2 * 7);
    assert!(
        report["hidden"][0]["stable_rank"].as_f64().unwrap() >= 1.0
            && report["pairs"] == serde_json::json!([])
    );
}

#[test]
fn micro_batches_make_one_batch() {
    let desk = Desk::new();
    desk.train("whole", "--steps 20 --batch 8 --log-every 1");
    desk.train("parts", "--steps 20 --batch 2 --accumulate 4 --log-every 1");
    for (a, b) in metrics(&desk.path("whole")).iter().zip(metrics(&desk.path("parts"))) {
        let (a, b) = (a["loss"].as_f64().unwrap(), b["loss"].as_f64().unwrap());
        assert!((a / b - 1.0).abs() < 1e-4, "{a} {b}"); // f32 sums in another order, over 20 steps
    }
}

#[test]
fn variants_of_the_model_train() {
    let desk = Desk::new();
    let line = "train --config small.toml --data text --steps 1 --method dense-adamw --momentum 0.9 --init orthogonal --balance-every 2 --beta1 0.8";
    let [_, said] = desk.succeeds(line);
    assert!(
        said.contains("without effect under dense-adamw: --init, --momentum, --balance-every\n"),
        "{said}"
    );
    for (i, flags) in [
        "--kv-heads 1 --tie",
        "--zero-init-output --init orthogonal --schedule wsd",
        "--method dense-adamw --lr 0.01 --zero-init-output --schedule linear",
        "--rank-ratio 1 --schedule constant --clip 0",
        "--nesterov=false --lr-scale shape --schedule linear --final-lr-fraction 0 --zero-init-output",
        "--method lora-muon --zero-init-output",
        "--method self-guided --zero-init-output --kv-heads 1",
        "--method spectron-certified --balance-every 3 --weight-decay 0.1",
    ]
    .iter()
    .enumerate()
    {
        desk.train(&format!("run{i}"), &format!("--steps 30 {flags}"));
        let loss = json(&desk.path(&format!("run{i}/final.json")))["val_loss"].as_f64().unwrap();
        assert!(loss < 4.0, "{flags}: {loss}"); // from ln 256 = 5.5
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_a_checkpoint() {
    let desk = Desk::new();
    let line = "train --data text --config small.toml --out run --steps 1000000 --log-every 1";
    let mut child = desk.command(line).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while std::fs::metadata(desk.path("run/metrics.jsonl")).map_or(0, |m| m.len()) < 1000 {
        assert!(start.elapsed() < Duration::from_secs(60), "training did not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert!(child.wait().unwrap().success());
    let mut errors = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut errors).unwrap();
    assert!(errors.contains("interrupted after step") && errors.contains("--resume run"), "{errors}");
    let steps = metrics(&desk.path("run")).len();
    assert!(newest(&desk.path("run")).ends_with(format!("step-{steps:08}.safetensors")));
}

#[test]
fn a_run_that_diverges_says_where_and_keeps_its_checkpoint() {
    let desk = Desk::new();
    let errors = desk.refused(
        "train --data text --config small.toml --out run --steps 50 --method adamw --lr 1e30 --adam-lr 1e30 \
         --checkpoint-every 1 --telemetry-every 1",
    );
    assert!(errors.contains("step ") && errors.contains("not finite"), "{errors}");
    desk.ok("inspect run"); // what was saved last still loads, and so do its records
    let diverged = json(&desk.path("run/diverged.json"));
    assert!(desk.ok("runs run").contains(&format!("diverged at step {}", diverged["step"])));
    assert!(errors.contains(diverged["reason"].as_str().unwrap()), "{errors}");
}

#[cfg(unix)]
#[test]
fn a_full_disk_loses_nothing() {
    let desk = Desk::new();
    desk.train("run", "--steps 20 --stop-after 10");
    let before = desk.tensors("run");
    // no file may grow beyond 8 blocks of 1 KiB: the next checkpoint cannot be written
    let line = format!("trap '' XFSZ; ulimit -f 8; {} train --resume run", env!("CARGO_BIN_EXE_rankgrad"));
    let output = Command::new("bash").args(["-c", &line]).current_dir(desk.path("")).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains("cannot write"), "{errors}");
    assert_eq!(before, desk.tensors("run"));
    assert!(!desk.path("run/.writing").exists());
    desk.ok("train --resume run --quiet");
}

#[test]
fn bad_input_is_answered_by_name() {
    let desk = Desk::new();
    std::fs::write(desk.path("empty"), "").unwrap();
    std::fs::write(desk.path("short"), "to be or not").unwrap();
    std::fs::write(desk.path("bad.toml"), "rank_ration = 0.5\n").unwrap();
    std::fs::write(desk.path("foreign.safetensors"), b"not a checkpoint").unwrap();
    std::fs::create_dir(desk.path("nothing")).unwrap();
    desk.train("run", "--steps 2");
    let whole = std::fs::read(newest(&desk.path("run"))).unwrap();
    std::fs::write(desk.path("cut.safetensors"), &whole[..whole.len() - 100]).unwrap();
    for (line, says) in [
        ("train --data missing", "missing"),
        ("train --data empty", "empty"),
        ("train --data short", "context + 1"),
        ("train --data nothing", "no files"),
        ("train --data text --rank-ratio 0", "(0, 1]"),
        ("train --data text --rank-ratio 1.5", "(0, 1]"),
        ("train --data text --heads 3", "does not divide dim"),
        ("train --data text --kv-heads 3", "does not divide heads"),
        ("train --data text --dim 12 --heads 4", "odd size 3"),
        ("train --preset smal", "small"),
        ("train --method spektron", "spectron"),
        ("train --stepz 3", "--steps"),
        ("train --lr-scale shap", "shape"),
        ("train --telemetry exakt", "exact"),
        ("train --config bad.toml", "rank_ratio"),
        ("train --data text --steps 0", "steps is 0"),
        ("train --data text --threads 1000000", "--threads 1000000: at most"),
        ("train --data text --batch 0", "batch is 0"),
        ("train --data text --context 0", "context is 0"),
        ("train --data text --out run", "already holds a run"),
        ("train --data text --out /proc/nowhere", "/proc/nowhere"),
        ("train --resume nothing", "no checkpoint"),
        ("train --resume run --steps 7", "steps"),
        ("train --resume run --data short", "text"),
        ("eval foreign.safetensors --data text", "safetensors"),
        ("eval cut.safetensors --data text", "truncated"),
        ("eval missing", "missing"),
        ("generate run --top-k 0", "--top-k is 0"),
        ("generate run --temperature -1", "--temperature is -1"),
        ("generate run --top-p 2", "--top-p is 2"),
        ("generate run --prompts nothing", "cannot read prompts from nothing"),
        ("inspect text", "truncated, damaged or not a safetensors file"),
    ] {
        let errors = desk.refused(line);
        // `--data short` has other bytes than the run: too short, or another hash
        let expected = if says == "text" { "context + 1" } else { says };
        assert!(errors.contains(expected), "{line}: expected {expected:?} in\n{errors}");
    }
    let mut empty_prompt = desk.command("generate run --prompt");
    let output = empty_prompt.arg("").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("--prompt is empty"));
    // nothing half-written was left behind by all that
    assert!(!desk.path("runs").exists());
}

#[test]
fn resuming_on_other_data_is_refused() {
    let desk = Desk::new();
    desk.train("run", "--steps 4 --stop-after 2");
    std::fs::write(desk.path("other"), "another text, long enough for it. ".repeat(100)).unwrap();
    let errors = desk.refused("train --resume run --data other");
    assert!(errors.contains("data differs"), "{errors}");
}

#[test]
fn a_model_is_exported_whole_or_not_at_all() {
    let desk = Desk::new();
    desk.ok("train --config small.toml --data text --steps 3 --quiet --out run");
    let shown = desk.ok("export run hf");
    assert!(shown.contains("hf: 21 tensors") && shown.contains("(merged)"), "{shown}");
    let read = |name: &str| std::fs::read(desk.path(name)).unwrap();
    let config: Value = serde_json::from_slice(&read("hf/config.json")).unwrap();
    assert_eq!((config["hidden_size"].as_u64(), config["num_hidden_layers"].as_u64()), (Some(16), Some(2)));
    let bytes = read("hf/model.safetensors");
    let merged = SafeTensors::deserialize(&bytes).unwrap();
    desk.ok("export run factors --factorized");
    let bytes = read("factors/model.safetensors");
    let factors = SafeTensors::deserialize(&bytes).unwrap();
    let values = |file: &SafeTensors, name: &str| -> (Vec<usize>, Vec<f32>) {
        let x = file.tensor(name).unwrap();
        let values = x.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        (x.shape().to_vec(), values)
    };
    let (shape, w) = values(&merged, "model.layers.1.mlp.down_proj.weight"); // [16, 24]
    let (_, a) = values(&factors, "model.layers.1.mlp.down_proj.A"); // [16, 8]
    let (b_shape, b) = values(&factors, "model.layers.1.mlp.down_proj.B"); // [24, 8]
    assert_eq!((shape, b_shape), (vec![16, 24], vec![24, 8]));
    for i in 0..16 {
        for j in 0..24 {
            let sum: f32 = (0..8).map(|k| a[i * 8 + k] * b[j * 8 + k]).sum();
            assert!((sum - w[i * 24 + j]).abs() < 1e-6);
        }
    }
    assert_eq!(values(&merged, "lm_head.weight"), values(&factors, "lm_head.weight"));
    assert!(desk.path("factors/README.md").exists() && !desk.path("hf/README.md").exists());

    assert!(desk.refused("export run hf").contains("hf exists; choose a new directory"));
    assert!(desk.refused("export nowhere x").contains("cannot find the checkpoint nowhere"));
    desk.ok("train --config small.toml --data text --steps 3 --quiet --method dense-muon --out dense");
    assert!(desk.refused("export dense x --factorized").contains("dense-muon has no factor pairs"));
    desk.ok("train --config small.toml --data text --steps 9 --stop-after 2 --quiet --method self-guided --out guided");
    assert!(desk.refused("export guided x").contains("still has the guides of self-guided"));
    assert!(!desk.path("x").exists() && !desk.path("x.writing").exists());
}

/// The weights among a checkpoint's tensors, guides left out.
fn weights(desk: &Desk, checkpoint: &str) -> Vec<(String, Vec<u8>)> {
    let weight = |name: &str| name.starts_with("param.") && !name.ends_with(".guide");
    desk.tensors(checkpoint).into_iter().filter(|(name, _)| weight(name)).collect()
}

fn val_loss(desk: &Desk, checkpoint: &str) -> f64 {
    let evaluation = desk.ok(&format!("eval {checkpoint} --data text --json"));
    serde_json::from_str::<Value>(&evaluation).unwrap()["val_loss"].as_f64().unwrap()
}

#[test]
fn a_model_goes_out_comes_in_and_is_trained_on() {
    let desk = Desk::new();
    desk.train("run", "--steps 150 --lr 0.05 --method spectron --kv-heads 1");
    desk.ok("export run hf");
    let table = desk.ok("import hf in --rank-ratio 0.5");
    assert!(
        table.contains("blocks.1.down") && table.contains("16×24") && table.contains("in: spectron"),
        "{table}"
    );
    let trained = val_loss(&desk, "run");
    // rank 0.5 to rank 0.5: nothing is lost but roundings, of a loss of about 1.5
    assert!((val_loss(&desk, "in") - trained).abs() < 1e-5);
    assert!(desk.ok("generate in --prompt 7 --tokens 5").starts_with('7'));
    assert!(desk.ok("inspect in").contains("spectron after 0 steps"));
    desk.ok("export in again");
    assert!(
        std::fs::read(desk.path("again/tokenizer.json")).unwrap()
            == std::fs::read(desk.path("hf/tokenizer.json")).unwrap()
    );
    desk.ok("import again/model.safetensors whole --dense");
    assert!((val_loss(&desk, "whole") - trained).abs() < 1e-5);
    let report: Value = serde_json::from_str(&desk.ok("inspect whole --json")).unwrap();
    assert_eq!(report["config"]["method"], "dense-muon");
    desk.ok("import hf most --energy 0.9");
    let report: Value = serde_json::from_str(&desk.ok("inspect most --json")).unwrap();
    let ranks = report["config"]["ranks"].as_object().unwrap();
    assert_eq!(ranks.len(), 2 * 7);
    for pair in report["pairs"].as_array().unwrap() {
        assert_eq!(pair["rank"], ranks[pair["name"].as_str().unwrap()]);
    }

    for (from, method) in [
        ("in", "spectron"),
        ("in", "self-guided"),
        ("most", "adamw"),
        ("whole", "dense-adamw"),
        ("run", "lora-muon"),
    ] {
        let out = format!("{from}-{method}");
        let flags =
            format!("--data text --from {from} --method {method} --lr 0.001 --steps 40 --batch 4 --quiet");
        let flags = format!("train {flags} --eval-every 0 --checkpoint-every 10 --keep 0");
        desk.ok(&format!("{flags} --out {out} --threads 1"));
        let first = format!("{out}/step-00000000.safetensors");
        assert_eq!(std::fs::read_dir(desk.path(&out)).unwrap().count(), 4 + 5);
        let (begun, there) = (val_loss(&desk, &first), val_loss(&desk, from));
        assert_eq!(weights(&desk, &first), weights(&desk, from), "{out}");
        // batches of another size, whose losses add up in another order; guides are products of the pairs, rounded
        assert!((begun - there).abs() <= 1e-5, "{out}: {begun} {there}");
        assert!(val_loss(&desk, &out) < there + 0.01, "{out}");
        // stopped and resumed without the model that it started from
        let parts = format!("{out}-parts");
        desk.ok(&format!("{flags} --out {parts} --stop-after 15"));
        std::fs::rename(desk.path(from), desk.path("away")).unwrap();
        desk.ok(&format!("train --resume {parts} --quiet --threads 2"));
        std::fs::rename(desk.path("away"), desk.path(from)).unwrap();
        assert_eq!(desk.tensors(&out), desk.tensors(&parts), "{out}");
    }
    let recorded = std::fs::read_to_string(desk.path("most-adamw/config.toml")).unwrap();
    assert!(recorded.contains("[ranks]") && recorded.contains("\"blocks.1.down\" = "), "{recorded}");
    desk.ok("train --config most-adamw/config.toml --steps 1 --warmup 0 --quiet --out fresh"); // the same shape, drawn anew

    for (line, says) in [
        ("import hf in --dense", "in exists; choose a new directory"),
        ("import hf x --rank-ratio 1.5", "--rank-ratio is 1.5: it must be in (0, 1]"),
        ("import hf x --energy 0", "--energy is 0: it must be in (0, 1]"),
        ("import hf x --rank-ratio 0.01", "a rank of 0; use at least"),
        ("import nowhere x --dense", "cannot find the model nowhere"),
        ("import run x --dense", "has neither model.safetensors"),
        (
            "train --resume in --data text",
            "in holds a model, not a run to continue; start one from its weights with --from in",
        ),
        ("train --from in --data text --dim 32", "`dim` is 16, 32 was asked for"),
        ("train --from in --data text --method dense-muon", "rankgrad merge"),
        ("train --from whole --data text --method spectron", "rankgrad rank"),
    ] {
        let errors = desk.refused(line);
        assert!(errors.contains(says), "{line}: expected {says:?} in\n{errors}");
    }
    assert!(!desk.path("x").exists() && !desk.path("x.writing").exists());
}

#[test]
fn ranks_are_cut_and_pairs_merged() {
    let desk = Desk::new();
    desk.train("run", "--steps 150 --lr 0.05");
    let before = val_loss(&desk, "run");
    let shown = desk.ok("merge run whole --data text");
    let losses = |shown: &str| -> [f64; 2] {
        let line = shown.lines().find(|line| line.starts_with("validation loss")).unwrap();
        let numbers: Vec<f64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        numbers.try_into().unwrap()
    };
    let [first, second] = losses(&shown);
    assert!((first - before).abs() < 1e-4 && (second - before).abs() < 1e-4, "{shown}"); // printed with four digits
    assert!((val_loss(&desk, "whole") - before).abs() < 1e-5);
    // from pairs and from whole matrices, the same cut
    let one = desk.ok("rank run cut --to-ratio 0.25 --data text");
    let two = desk.ok("rank whole cut-whole --to-ratio 0.25 --data text");
    assert!(
        one.contains("blocks.0.q") && one.contains("whole model") && one.contains("cut: spectron, step 0"),
        "{one}"
    );
    assert!(losses(&one)[1] > before);
    assert!((losses(&one)[1] - losses(&two)[1]).abs() < 2e-4, "{one}{two}");
    assert!((val_loss(&desk, "cut") - losses(&one)[1]).abs() < 1e-4);
    // what the table says of a matrix: error² = dropped energy, parameters r·(m + n)
    let row = one.lines().find(|line| line.starts_with("blocks.0.gate")).unwrap();
    let cells: Vec<&str> = row.split_whitespace().collect();
    let number = |i: usize| cells[i].parse::<f64>().unwrap();
    assert_eq!((cells[1], cells[2], cells[5], cells[6]), ("24×16", "4", "320", "160"));
    assert!((number(3).powi(2) / number(4) - 1.0).abs() < 2e-3, "{row}");
    desk.ok("rank run most --energy 0.99");
    desk.ok("rank run all --energy 1");
    assert!((val_loss(&desk, "all") - before).abs() < 1e-5);
    assert_eq!(weights(&desk, "all").len(), weights(&desk, "run").len());

    desk.ok("train --config small.toml --data text --steps 9 --stop-after 2 --quiet --method self-guided --out guided");
    for (line, says) in [
        ("rank cut x --to-ratio 0.5", "`blocks.0.q` [16, 16] has rank 4; a rank of 8 would be above it"),
        ("rank run cut --to-ratio 0.25", "cut exists; choose a new directory"),
        ("rank run x --to-ratio 0", "--to-ratio is 0: it must be in (0, 1]"),
        ("rank run x --energy 1.5", "--energy is 1.5"),
        ("merge whole x", "dense-muon has no factor pairs to merge"),
        ("merge run x --data nowhere", "cannot read the data nowhere"),
        ("rank run x --energy 0.9 --data nowhere", "cannot read the data nowhere"),
        ("merge guided x", "still has the guides of self-guided"),
        ("train --from guided --data text", "still has the guides of self-guided"),
    ] {
        let errors = desk.refused(line);
        assert!(errors.contains(says), "{line}: expected {says:?} in\n{errors}");
    }
    assert!(!desk.path("x").exists() && !desk.path("x.writing").exists());
}

/// A tokenizer is trained, used on text and on packed tokens, kept by the checkpoints, and exported.
#[cfg(feature = "tokenizers")]
#[test]
fn a_tokenizer_goes_where_the_model_goes() {
    let desk = Desk::new();
    let shown = desk.ok("tokenizer train --data text --vocab 300 --out small.json");
    assert!(shown.starts_with("small.json: 300 tokens; "), "{shown}");
    let train = "train --config small.toml --steps 30 --eval-every 0 --quiet";
    desk.ok(&format!("{train} --data text --tokenizer small.json --out run"));
    let outcome = json(&desk.path("run/final.json"));
    let number = |key: &str| outcome[key].as_f64().unwrap();
    assert!(number("val_bits_per_byte") < 0.9 * number("val_loss") / std::f64::consts::LN_2); // more than a byte a token
    std::fs::rename(desk.path("small.json"), desk.path("elsewhere.json")).unwrap();
    let again: Value = serde_json::from_str(&desk.ok("eval run --json")).unwrap();
    assert_eq!(
        (&again["val_loss"], &again["val_bits_per_byte"]),
        (&outcome["val_loss"], &outcome["val_bits_per_byte"])
    );
    desk.ok("export run hf");
    let same =
        |a: &str, b: &str| std::fs::read(desk.path(a)).unwrap() == std::fs::read(desk.path(b)).unwrap();
    assert!(same("hf/tokenizer.json", "elsewhere.json"));

    std::fs::write(
        desk.path("lines.jsonl"),
        "{\"text\": \"0123456789 0123456789 0123456789\"}\n".repeat(200),
    )
    .unwrap();
    desk.ok(
        "data pack --data lines.jsonl --tokenizer elsewhere.json --val-fraction 0.2 --out tokens --quiet",
    );
    assert!(same("tokens/tokenizer.json", "elsewhere.json"));
    desk.ok(&format!("{train} --data tokens --tokenizer tokens/tokenizer.json --out packed"));
    assert!(json(&desk.path("packed/final.json"))["val_bits_per_byte"].as_f64().unwrap() > 0.0);
    // of a model that knows tokens alone, text is read and written with the tokenizer beside them
    desk.ok(&format!("{train} --data tokens --vocab 300 --out ids"));
    let line = "generate ids --tokenizer tokens/tokenizer.json --prompt 0123 --tokens 4 --temperature 0";
    assert_eq!(desk.ok(line), desk.ok("generate packed --prompt 0123 --tokens 4 --temperature 0"));
    desk.ok("eval ids --tokenizer tokens/tokenizer.json --data text");
    desk.ok(&format!("{train} --data text --out bytes"));
    desk.ok("tokenizer train --data text --vocab 290 --out other.json");
    for (line, says) in [
        (format!("{train} --data tokens --out x"), "beyond the model's vocabulary of 256"),
        (format!("{train} --data tokens --tokenizer other.json --out x"), "made with another tokenizer"),
        (
            format!("{train} --data text --tokenizer other.json --vocab 256 --out x"),
            "fewer than the tokens of",
        ),
        (format!("{train} --data text --tokenizer text --out x"), "not a tokenizer.json"),
        (
            "eval run --tokenizer other.json".into(),
            "other.json is not the one that the checkpoint was trained with",
        ),
        ("generate bytes --tokenizer other.json".into(), "it has 290 tokens, the model 256"),
        (format!("{train} --data tokens text --out x"), "give files of one kind"),
    ] {
        let errors = desk.refused(&line);
        assert!(errors.contains(says), "{line}: expected {says:?} in\n{errors}");
    }
    assert!(!desk.path("x").exists());
}

/// The token files are read by hand here: llm.c's header of 256 i32, then u16.
#[test]
fn text_is_packed_into_token_files() {
    let desk = Desk::new();
    std::fs::write(desk.path("more.jsonl"), "{\"body\": \"one\"}\n{\"body\": \"two\"}\n{\"body\": \"\"}\n")
        .unwrap();
    let line =
        "data pack --data text more.jsonl --field body --shard-tokens 8000 --val-fraction 0.0001 --quiet";
    let shown = desk.ok(&format!("{line} --out tokens"));
    let pack = json(&desk.path("tokens/pack.json"));
    let text = std::fs::read(desk.path("text")).unwrap();
    let total = |key: &str| pack["train"][key].as_u64().unwrap() + pack["val"][key].as_u64().unwrap();
    assert_eq!((total("documents"), total("bytes")), (3, text.len() as u64 + 6));
    assert_eq!((total("tokens"), &pack["empty_documents"]), (text.len() as u64 + 9, &1.into()));
    assert_eq!(
        (&pack["vocabulary"], &pack["end_token"], &pack["seed"]),
        (&257.into(), &256.into(), &1.into())
    );
    assert_eq!((&pack["format"], &pack["tokenizer_sha256"]), (&"llm-c".into(), &Value::Null));
    let train = &pack["train"];
    let says = format!("tokens/train: {} tokens of {} documents", train["tokens"], train["documents"]);
    assert!(shown.starts_with(&says), "{shown}");
    let read = |name: String| {
        let bytes = std::fs::read(desk.path(&name)).unwrap();
        let header = |i: usize| i32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap());
        assert_eq!((header(0), header(1), header(2) as usize), (20240520, 1, (bytes.len() - 1024) / 2));
        let tokens = bytes[1024..].chunks(2).map(|token| u16::from_le_bytes([token[0], token[1]]));
        tokens.collect::<Vec<_>>()
    };
    let mut tokens = vec![];
    for part in ["train", "val"] {
        for i in 0..pack[part]["shards"].as_u64().unwrap() {
            tokens.extend(read(format!("tokens/{part}-{i:06}.bin")));
        }
    }
    let ids = |id: &u16| *id as u8;
    let mut documents: Vec<Vec<u8>> =
        tokens.split(|&id| id == 256).skip(1).map(|document| document.iter().map(ids).collect()).collect();
    documents.sort();
    let mut expected = vec![b"one".to_vec(), b"two".to_vec(), text];
    expected.sort();
    assert_eq!(documents, expected);
    let files = std::fs::read_dir(desk.path("tokens")).unwrap().count() as u64;
    assert_eq!(files, total("shards") + 1);

    // nanoGPT's files are the same without headers
    desk.ok(&format!("{line} --format nanogpt --out raw --threads 1"));
    let bytes = std::fs::read(desk.path("tokens/train-000000.bin")).unwrap();
    assert!(std::fs::read(desk.path("raw/train-000000.bin")).unwrap() == bytes[1024..]);

    assert!(desk.refused(&format!("{line} --out tokens")).contains("tokens exists; choose a new directory"));
    let errors = desk.refused("data pack --data more.jsonl --out x");
    assert!(errors.contains("more.jsonl, line 1: no field `text`; there are: body;"), "{errors}");
    assert!(desk.refused("data pack --data text --out x").contains("only one document"));
    assert!(desk.refused("data pack --data text --out x --val-fraction -1").contains("--val-fraction is -1"));
    let errors = desk.refused("data pack --data text --out x --shard-tokens 3000000000");
    assert!(errors.contains("holds 2147483647 at most"), "{errors}");
    assert!(!desk.path("x").exists() && !desk.path("x.packing").exists());
}

#[test]
fn runs_are_listed() {
    let desk = Desk::new();
    assert!(desk.refused("runs").contains("no run in runs: `rankgrad train` makes one"));
    desk.train("runs/one", "--steps 20 --eval-every 0");
    desk.train("runs/deep/two", "--steps 30 --stop-after 4 --eval-every 2 --seed 7 --log-every 1");
    let shown = desk.ok("runs");
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), 3, "{shown}");
    assert!(
        lines[1].starts_with("runs/deep/two")
            && lines[1].contains("  step 4 of 30  ")
            && lines[1].contains(" ~")
    );
    assert!(lines[2].starts_with("runs/one") && lines[2].contains("  finished  ") && !lines[2].contains('~'));

    // one that is finished is not trained again, nor its files written anew
    let [said, _] = desk.succeeds("train --resume runs/one");
    assert!(said.contains("runs/one is finished, 20 of 20 steps"), "{said}");

    let rows: Vec<Value> = desk
        .ok("runs runs/one runs/deep --by loss --json")
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let outcome = json(&desk.path("runs/one/final.json"));
    let one = rows.iter().find(|row| row["run"] == "runs/one").unwrap();
    for key in ["val_loss", "val_bits_per_byte", "params", "tokens", "method", "seed"] {
        assert_eq!(one[key], outcome[key], "{key}");
    }
    let two = rows.iter().find(|row| row["run"] == "runs/deep/two").unwrap();
    let newest = metrics(&desk.path("runs/deep/two")).pop().unwrap();
    assert_eq!((&two["val_loss"], &two["step"], &two["seed"]), (&newest["val_loss"], &4.into(), &7.into()));
    let losses: Vec<f64> = rows.iter().map(|row| row["val_loss"].as_f64().unwrap()).collect();
    assert!(losses.is_sorted(), "{losses:?}");

    // one that cannot be read hides no other
    std::fs::write(desk.path("runs/one/metrics.jsonl"), "{}\n").unwrap();
    let [shown, errors] = desk.succeeds("runs");
    assert_eq!(shown.lines().count(), 2, "{shown}");
    assert!(
        errors.contains("left out: ") && errors.contains("metrics.jsonl line 1 is no record"),
        "{errors}"
    );
    assert!(desk.refused("runs nowhere").contains("cannot list nowhere"));
    std::fs::create_dir(desk.path("empty")).unwrap();
    assert!(desk.refused("runs empty").contains("no run in empty: `rankgrad train` makes one"));
}

/// TensorBoard's own reader sees what metrics.jsonl says, each step once, though the run was stopped and went on, the first part
/// without event files. Its Python is named by RANKGRAD_TENSORBOARD_PYTHON; says so and passes without.
#[test]
fn tensorboard_reads_the_records() {
    let Some(python) = std::env::var_os("RANKGRAD_TENSORBOARD_PYTHON") else {
        println!("skipped: RANKGRAD_TENSORBOARD_PYTHON names no Python with tensorboard");
        return;
    };
    let desk = Desk::new();
    let more = "--steps 12 --eval-every 3 --log-every 1 --telemetry-every 4 --checkpoint-every 5";
    desk.train("run", &format!("{more} --stop-after 5"));
    desk.ok("train --resume run --tensorboard --quiet --stop-after 8");
    // as if the machine had stopped after step 8 but before its checkpoint
    std::fs::remove_file(newest(&desk.path("run"))).unwrap();
    desk.ok("train --resume run --quiet");

    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tensorboard_scalars.py");
    let output = Command::new(python).arg(script).arg(desk.path("run")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let scalars: Value = serde_json::from_slice(&output.stdout).unwrap();
    let read = |tag: &str| -> Vec<(u64, f64)> {
        let points = scalars[tag].as_array().unwrap_or_else(|| panic!("no {tag}"));
        points.iter().map(|p| (p[0].as_u64().unwrap(), p[1].as_f64().unwrap())).collect()
    };
    let records = metrics(&desk.path("run"));
    assert_eq!(records.len(), 12);
    let written = |at: &dyn Fn(&Value) -> Option<f64>| -> Vec<(u64, f64)> {
        let point = |r: &Value| Some((r["step"].as_u64().unwrap(), f64::from(at(r)? as f32)));
        records.iter().filter_map(point).collect()
    };
    for (tag, key) in [
        ("loss/training", "loss"),
        ("loss/validation", "val_loss"),
        ("step/learning_rate", "lr"),
        ("step/gradient_norm", "grad_norm"),
        ("step/tokens", "tokens"),
    ] {
        assert_eq!(read(tag), written(&|r| r[key].as_f64()), "{tag}");
    }
    for quantity in ["sigma_a", "sigma_w", "update_over_eta", "rho"] {
        let tag = format!("{quantity}/blocks.1.down");
        let points = read(&tag);
        assert_eq!(points.iter().map(|p| p.0).collect::<Vec<_>>(), [4, 8, 12]);
        assert_eq!(points, written(&|r| r["pairs"]["blocks.1.down"][quantity].as_f64()), "{tag}");
    }
    let last = f64::from(json(&desk.path("run/final.json"))["val_loss"].as_f64().unwrap() as f32);
    assert_eq!(read("final/validation_loss"), [(12, last)]);
}
