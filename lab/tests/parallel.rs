//! `train` with several workers: `--devices cpu,cpu`, and several processes as torchrun starts them.
//!
//! That the steps are those of one worker is tested where they are taken (lab/src/trainer.rs), GPUs in devices.rs.

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::Desk;

const SMALL: &str = "dim = 16\nlayers = 2\nheads = 2\nffn = 24\ncontext = 16\nbatch = 4\naccumulate = 2\nsteps = 8\nadam_lr = 0.01\n\
                     warmup = 2\neval_every = 4\neval_batches = 3\nlog_every = 1\ntelemetry_every = 4\n";
const TRAIN: &str = "train --data text --config small.toml --quiet";

/// All of the newest checkpoint behind its header, which has the seconds in it: every tensor, bit for bit.
fn tensors(run: &Path) -> Vec<u8> {
    let files = std::fs::read_dir(run).unwrap().map(|entry| entry.unwrap().path());
    let newest = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).max().unwrap();
    let bytes = std::fs::read(newest).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].to_vec()
}

/// Training and validation losses by step.
fn losses(run: &Path) -> Vec<[Option<f64>; 2]> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let record = |line: &str| {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        ["loss", "val_loss"].map(|key| record[key].as_f64())
    };
    text.lines().map(record).collect()
}

#[test]
fn workers_on_a_processor_train_one_model() {
    let desk = Desk::new(SMALL);
    desk.succeeds(&format!("{TRAIN} --out plain"));
    desk.succeeds(&format!("{TRAIN} --out one --devices cpu"));
    assert!(tensors(&desk.path("plain")) == tensors(&desk.path("one")), "one worker: the plain path");
    let line = format!("{} --out two --devices cpu,cpu", TRAIN.replace(" --quiet", ""));
    let [said, noted] = desk.succeeds(&line);
    assert_eq!(said.matches("validation loss").count(), 1, "{said}");
    assert_eq!(noted.matches("run: two (").count(), 1, "{noted}");
    desk.succeeds(&format!("{TRAIN} --out four --devices cpu,cpu,cpu,cpu --threads 3"));
    let plain = losses(&desk.path("plain"));
    for run in ["two", "four"] {
        let these = losses(&desk.path(run));
        assert_eq!(these.len(), plain.len());
        for (x, y) in these.iter().flatten().zip(plain.iter().flatten()) {
            assert_eq!(x.is_some(), y.is_some());
            let (x, y) = (x.unwrap_or(0.0), y.unwrap_or(0.0));
            assert!((x - y).abs() < 1e-4, "{run}: {x}, alone {y}"); // f32 over 8 steps
        }
    }
    // the reports of both workers' pairs reach the records
    let records = std::fs::read_to_string(desk.path("two/metrics.jsonl")).unwrap();
    assert_eq!(records.matches("\"rho\":").count(), 2 * 14, "{records}");

    // stopped and resumed: to the bit by as many, also whatever the threads; and by one
    desk.succeeds(&format!("{TRAIN} --out parts --devices cpu,cpu --stop-after 3"));
    let copy = |to: &str| {
        std::fs::create_dir(desk.path(to)).unwrap();
        for file in std::fs::read_dir(desk.path("parts")).unwrap().map(|entry| entry.unwrap()) {
            std::fs::copy(file.path(), desk.path(to).join(file.file_name())).unwrap();
        }
    };
    copy("by-one");
    desk.succeeds("train --resume parts --quiet --devices cpu,cpu --threads 1");
    assert!(tensors(&desk.path("parts")) == tensors(&desk.path("two")));
    desk.succeeds("train --resume by-one --quiet");
    let last = |run: &str| losses(&desk.path(run)).last().unwrap()[0].unwrap();
    assert!((last("by-one") - last("two")).abs() < 1e-4);

    // an import of another's weights
    desk.succeeds(&format!("{TRAIN} --from two --out onward --devices cpu,cpu"));
}

#[test]
fn what_cannot_be_divided_is_refused() {
    let desk = Desk::new(SMALL);
    let error = desk.refused(&format!("{TRAIN} --out x --devices cpu,cpu,cpu"));
    assert_eq!(error, "error: --batch 4 does not divide among 3 workers: give a multiple of 3\n");
    let error = desk.refused(&format!("{TRAIN} --out x --devices cuda:98,cuda:99"));
    assert!(error.starts_with("error: --device cuda: ") && error.lines().count() == 1, "{error}");
    assert!(!desk.path("x").exists());
    // a run that diverges says so once
    let error = desk.refused(&format!("{TRAIN} --out y --devices cpu,cpu --lr 1e30 --adam-lr 1e30"));
    assert!(error.contains("is not finite") && error.matches("error: ").count() == 1, "{error}");
}

/// A process as torchrun would start it.
fn process(desk: &Desk, [worker, workers]: [usize; 2], port: u16, line: &str) -> Child {
    let mut command: Command = desk.command(line);
    for (name, value) in [("RANK", worker), ("LOCAL_RANK", worker), ("WORLD_SIZE", workers)] {
        command.env(name, value.to_string());
    }
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A port that was free a moment ago.
fn port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn end(child: Child) -> (bool, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn processes_train_one_model() {
    let desk = Desk::new(SMALL);
    desk.succeeds(&format!("{TRAIN} --out threads --devices cpu,cpu"));
    let both = |lines: [&str; 2]| {
        let port = port();
        let children = [1, 0].map(|worker| process(&desk, [worker, 2], port, lines[worker]));
        children.map(end)
    };
    let line = format!("{TRAIN} --out processes --threads 1");
    for (success, errors) in both([&line, &line]) {
        assert!(success && errors.is_empty(), "{errors}");
    }
    // both add up in the order of the workers
    assert!(tensors(&desk.path("processes")) == tensors(&desk.path("threads")));

    for (success, errors) in both([&line.replace("processes", "x"), &format!("{line} --seed 2")]) {
        assert!(!success && errors.contains("worker 1 has other options, other data"), "{errors}");
    }
    for (success, errors) in
        both([&format!("{line} --devices cpu,cpu"), &format!("{line} --devices cpu,cpu")])
    {
        assert!(!success && errors.starts_with("error: --devices is for one process"), "{errors}");
    }
}

#[test]
fn a_process_that_dies_ends_the_other() {
    let desk = Desk::new(SMALL);
    let line = format!("{TRAIN} --out run --steps 1000000 --log-every 1 --threads 1");
    let port = port();
    let [first, mut second] = [0, 1].map(|worker| process(&desk, [worker, 2], port, &line));
    let started = Instant::now();
    while std::fs::metadata(desk.path("run/metrics.jsonl")).map_or(0, |file| file.len()) == 0 {
        assert!(started.elapsed() < Duration::from_secs(60), "it does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    second.kill().unwrap();
    second.wait().unwrap();
    let (success, errors) = end(first);
    assert!(!success && errors.starts_with("error: worker 1 cannot be reached: "), "{errors}");
    assert!(desk.path("run/step-00000000.safetensors").exists());
}
