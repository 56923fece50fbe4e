//! `rankgrad devices` where no GPU can be used: an answer, never a panic. The driver is a stub, compiled here.
//!
//! Without the feature `cuda` there is one answer. With it, what is tried: no driver, drivers without a device, a device
//! without the libraries.

mod common;

use std::path::Path;
use std::process::Command;

/// What `devices` prints where `driver` is the first libcuda; None: where there is no C compiler to make it.
fn with_driver(driver: &str) -> Option<String> {
    let desk = common::Desk::new("");
    let (source, library) = (desk.path("stub.c"), desk.path("libcuda.so"));
    std::fs::write(&source, driver).unwrap();
    if !compile(&source, &library) {
        println!("skipped: no C compiler (cc) to make a stub of the driver");
        return None;
    }
    let mut command = desk.command("devices");
    command.env("LD_LIBRARY_PATH", desk.path(""));
    // none of the directories that this machine may have CUDA's libraries in
    command.env("RANKGRAD_CUDA_LIBS", desk.path("nothing")).env("PATH", "").env_remove("VIRTUAL_ENV");
    Some(answer(command))
}

fn answer(mut devices: Command) -> String {
    let output = devices.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn compile(source: &Path, library: &Path) -> bool {
    let compiler = std::env::var("CC").unwrap_or("cc".into());
    let mut command = Command::new(compiler);
    command.args(["-shared", "-fPIC", "-o"]).arg(library).arg(source);
    command.status().is_ok_and(|status| status.success())
}

/// A driver whose cuInit returns `init` and that counts `count` devices.
fn stub(init: u32, count: u32) -> String {
    format!(
        "int cuInit(unsigned flags) {{ return {init}; }}
         int cuDeviceGetCount(int *count) {{ *count = {count}; return 0; }}
         int cuDeviceGet(int *device, int ordinal) {{ *device = ordinal; return 0; }}
         int cuDeviceTotalMem_v2(unsigned long *bytes, int device) {{ *bytes = 80ul << 30; return 0; }}
         int cuDeviceGetAttribute(int *value, int which, int device) {{ *value = which == 75 ? 9 : 0; return 0; }}
         int cuDeviceGetName(char *name, int size, int device) {{ __builtin_strcpy(name, \"Stub\"); return 0; }}"
    )
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_build_without_the_feature_says_so() {
    let Some(answer) = with_driver(&stub(0, 1)) else { return };
    assert!(answer.starts_with("cpu: ") && answer.contains("\ncuda: "), "{answer}");
    assert!(answer.contains("build with --features cuda"), "{answer}");
    let error = common::Desk::new("").refused("bench --steps 1 --device cuda");
    assert!(error.starts_with("error: --device cuda: this build has no GPU support; build with"), "{error}");
    assert!(error.ends_with("; or use --device cpu\n") && error.lines().count() == 1, "{error}");
}

/// A model that takes no time.
const LITTLE: &str = "--layers 1 --dim 8 --heads 1 --ffn 8 --context 4 --batch 1";

#[test]
fn auto_is_the_processor_where_there_is_no_gpu() {
    let desk = common::Desk::new("");
    let mut bench = desk.command(&format!("bench --steps 1 --device auto {LITTLE}"));
    let output = bench.env("LD_LIBRARY_PATH", "/nowhere").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && errors.starts_with("device: cpu (") || errors.starts_with("device: cuda"),
        "{errors}"
    );
}

#[test]
fn bf16_is_refused_on_the_processor() {
    let desk = common::Desk::new("");
    for line in
        [format!("bench --steps 1 --precision bf16 {LITTLE}"), "train --precision bf16 --out run".into()]
    {
        let error = desk.refused(&line);
        assert!(
            error.starts_with("error: precision is bf16, in which only GPUs compute: add --device cuda"),
            "{error}"
        );
        assert!(error.lines().count() == 1 && !desk.path("run").exists(), "{error}");
    }
    let error = desk.refused("train --precision bf16-newton-schulz --method spectron-certified --out run");
    assert!(
        error.starts_with("error: spectron-certified keeps its bound with Newton–Schulz in f32"),
        "{error}"
    );
    let error = desk.refused("study methods --precision bf16 --out study");
    assert!(error.starts_with("error: precision is bf16, in which only GPUs compute"), "{error}");
    assert!(!desk.path("study").exists());
}

#[test]
fn other_devices_are_refused() {
    let desk = common::Desk::new("");
    for name in ["tpu", "cuda:", "cuda:x", "gpu"] {
        let error = desk.refused(&format!("bench --steps 1 --device {name}"));
        assert!(error.contains("one of cpu, cuda, cuda:N and auto"), "{error}");
    }
}

#[test]
#[cfg(all(feature = "cuda", target_os = "linux"))]
fn each_reason_has_its_own_words() {
    // cuInit's codes: 100 no device, 34 the toolkit's own stub, 999 unknown; 0 is success
    for (init, count, reason) in [
        (100, 0, "no usable device (CUDA_ERROR_NO_DEVICE)"),
        (34, 0, "no usable device (CUDA_ERROR_STUB_LIBRARY)"),
        (999, 0, "no usable device (CUDA_ERROR_UNKNOWN)"),
        (0, 0, "no usable device (it counts none)"),
    ] {
        let Some(answer) = with_driver(&stub(init, count)) else { return };
        assert!(answer.contains("\ncuda: ") && answer.contains(reason), "{init} {count}: {answer}");
    }
    let Some(answer) = with_driver(&stub(0, 1)) else { return };
    let missing = answer.contains("/nothing") && answer.contains("RANKGRAD_CUDA_LIBS");
    let found = answer.contains("cuda:0: Stub, 80.0 GiB, compute capability 9.0"); // the libraries are on the loader's path
    assert!(missing || found, "{answer}");
}

#[test]
#[cfg(feature = "cuda")]
fn this_machine_gets_an_answer_too() {
    let answer = answer(common::Desk::new("").command("devices"));
    assert!(answer.starts_with("cpu: ") && answer.contains("\ncuda:"), "{answer}");
    // there are not so many
    let error = common::Desk::new("").refused("bench --steps 1 --device cuda:99");
    assert!(error.starts_with("error: --device cuda: ") && error.lines().count() == 1, "{error}");
    assert!(answer.contains("\ncuda:0:") == error.contains("there is no cuda:99"), "{error}");
}

/// The whole program on a driver, a cuBLAS, an NVRTC and an NCCL that are made of the kernels' simulator (tests/fake_cuda.cpp).
#[test]
#[cfg(all(feature = "cuda", target_os = "linux"))]
fn a_run_on_a_fake_driver_is_that_of_the_processor() {
    use rankgrad::gpu::{Simulator, kernels};
    let small = "dim = 16\nlayers = 2\nheads = 2\nffn = 24\ncontext = 16\nbatch = 4\n";
    let desk = common::Desk::new(small);
    let source = format!("{}\n{}", kernels::source(), include_str!("../../tests/fake_cuda.cpp"));
    match Simulator::build(&desk.path("libcuda.so"), &source, &kernels::all(), &[]) {
        Err(why) if why.starts_with("no C++ compiler") => return println!("skipped: {why}"),
        built => built.unwrap(),
    }
    for name in ["libcublas.so", "libcublasLt.so", "libnvrtc.so"] {
        std::fs::hard_link(desk.path("libcuda.so"), desk.path(name)).unwrap();
    }
    let on_driver = |line: &str| {
        let mut command = desk.command(line);
        command.env("LD_LIBRARY_PATH", desk.path("")).env("XDG_CACHE_HOME", desk.path(""));
        command
    };
    let command = |line: &str| {
        let mut command = on_driver(line);
        command.env("RANKGRAD_CUDA_LIBS", desk.path("nothing")).env("PATH", "").env_remove("VIRTUAL_ENV");
        let output = command.output().unwrap();
        (output.status.success(), [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap()))
    };
    let run = |line: &str| match command(line) {
        (true, [said, _]) => said,
        (false, [_, errors]) => panic!("{line}: {errors}"),
    };
    let line = |n| format!("cuda:{n}: Simulated, 1.0 GiB, compute capability 9.0\n");
    assert!(run("devices").ends_with(&(line(0) + &line(1))));
    let train = "train --data text --config small.toml --quiet --steps 6 --telemetry-every 3";
    let loss = |[out, first, then]: [&str; 3]| {
        run(&format!("{train} --stop-after 3 --out {out} {first}"));
        run(&format!("train --resume {out} --quiet {then}"));
        let json = std::fs::read_to_string(desk.path(out).join("final.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        json["val_loss"].as_f64().unwrap()
    };
    // two GPUs need NCCL, and what there is of it here, if anything, wants another driver
    let (success, [_, errors]) = command(&format!("{train} --out none --devices 0,1"));
    assert!(!success && errors.lines().count() == 1, "{errors}");
    assert!(errors.starts_with("error: libnccl is neither") || errors.contains("NCCL"), "{errors}");
    std::fs::hard_link(desk.path("libcuda.so"), desk.path("libnccl.so.2")).unwrap();
    let cpu = loss(["cpu", "--device cpu", "--device cpu"]);
    let gpu = loss(["cuda", "--device cuda", "--devices cuda"]);
    let two = loss(["two", "--devices cuda:0,cuda:1", "--device cuda:1"]);
    run(&format!("{train} --devices cuda:0,cuda:1 --out both"));
    assert!((cpu - gpu).abs() < 1e-4, "{cpu}, on the GPU {gpu}");
    assert!((cpu - two).abs() < 1e-4, "{cpu}, on two GPUs {two}");
    // as graphs, to the bit; and where the driver captures none
    let tensors = |out: &str| {
        let file = std::fs::read(desk.path(out).join("step-00000006.safetensors")).unwrap();
        let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize; // has times in it
        file[8 + header..].to_vec()
    };
    for (plain, captures) in [("cuda", "1"), ("cuda", "0"), ("both", "1")] {
        let device = if plain == "both" { "--devices cuda:0,cuda:1" } else { "--device cuda" };
        let out = format!("{plain}-graphs-{captures}");
        let line = format!("{train} {device} --out {out}");
        let mut command = on_driver(&line);
        command.env("RANKGRAD_CUDA_GRAPHS", "1").env("RANKGRAD_FAKE_CAPTURES", captures);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(tensors(&out) == tensors(plain), "{out}");
    }
    // in bf16, and gone on with in it
    let train = "train --data text --config small.toml --quiet --steps 6 --precision bf16-newton-schulz --device cuda --out half";
    run(&format!("{train} --stop-after 3"));
    run("train --resume half --quiet --device cuda");
    let evaluated = |line: &str| {
        let json: serde_json::Value = serde_json::from_str(&run(&format!("eval {line} --json"))).unwrap();
        json["val_loss"].as_f64().unwrap()
    };
    let half = evaluated("half");
    assert!((half - gpu).abs() < 0.01 * gpu && half != gpu, "{gpu}, in bf16 {half}");
    let again = evaluated("half --bf16 --device cuda");
    assert!((again - half).abs() < 1e-3 * half && again != half, "{half}, evaluated in bf16 {again}");
    run(
        "train --data text --config small.toml --quiet --steps 6 --precision bf16 --devices 0,1 --out half-two",
    );
    let two = evaluated("half-two");
    assert!((two - gpu).abs() < 0.01 * gpu && two != gpu, "{gpu}, by two in bf16 {two}");
    // a study, on the processor, on a GPU by two runs at a time, on two GPUs
    let study = "study methods --methods spectron --data text --config small.toml --quiet --steps 4 --grid 1 --seeds 1,2 --eval-every 0";
    let losses = |out: &str, on: &str| -> Vec<(String, f64)> {
        run(&format!("{study} --out {out} {on}"));
        let text = std::fs::read_to_string(desk.path(out).join("results.csv")).unwrap();
        let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
        let header = lines.next().unwrap();
        let column = |name: &str| header.iter().position(|h| *h == name).unwrap();
        let (arm, seed, loss) = (column("arm"), column("seed"), column("val_loss"));
        lines.map(|cells| (format!("{} {}", cells[arm], cells[seed]), cells[loss].parse().unwrap())).collect()
    };
    let on_cpu = losses("study-cpu", "");
    assert_eq!(on_cpu.len(), 2);
    for (out, on) in [("study-gpu", "--device cuda:1 --jobs 2"), ("study-two", "--devices 0,1")] {
        for ((name, loss), (same, on_cpu)) in losses(out, on).into_iter().zip(&on_cpu) {
            assert!(
                name == *same && (loss - on_cpu).abs() < 1e-4,
                "{out}, {name}: {loss}, {on_cpu} for {same}"
            );
        }
    }
    let half = losses("study-half", "--device cuda --precision bf16");
    assert!(half.iter().zip(&on_cpu).all(|(half, one)| (half.1 - one.1).abs() < 0.01 * one.1), "{half:?}");
    assert!(half.iter().zip(&on_cpu).all(|(half, one)| half.1 != one.1), "{half:?}");
    // one's checkpoint on the other, to the same texts
    std::fs::write(desk.path("prompts"), "7\n12, 13").unwrap();
    let text = |run_of: &str, device: &str| {
        run(&format!("generate {run_of} --prompts prompts --tokens 24 --temperature 0 --device {device}"))
    };
    assert_eq!(text("cpu", "cuda"), text("cpu", "cpu"));
    assert!(evaluated("cuda --batches 2 --device auto") > 1.0);
    assert!(
        run("bench --steps 1 --layers 1 --dim 8 --heads 1 --ffn 8 --context 4 --batch 1 --device cuda")
            .contains("tokens/s")
    );
    // a device that fails ends the command with one line
    let fails_in = |precision: &str, name: &str, value: &str| {
        let train = "train --data text --config small.toml --quiet --out failed --steps 2 --device cuda";
        let output =
            on_driver(&format!("{train} --precision {precision}")).env(name, value).output().unwrap();
        assert!(!output.status.success(), "{name}");
        let _ = std::fs::remove_dir_all(desk.path("failed"));
        String::from_utf8(output.stderr).unwrap()
    };
    let fails = |name: &str, value: &str| fails_in("f32", name, value);
    let said = fails_in("bf16", "RANKGRAD_FAKE_MAJOR", "7");
    let wanted = "error: precision is bf16, for which cuda:0: Simulated, 1.0 GiB, compute capability 7.0 is too old (8.0 is needed)";
    assert!(said.starts_with(wanted) && said.lines().count() == 1, "{said}");
    // room for the parameters and the optimizer, not for a step
    let said = fails("RANKGRAD_FAKE_BYTES", "33734432");
    assert!(said.starts_with("error: GPU cuda:0: ") && said.lines().count() == 1, "{said}");
    assert!(
        said.contains(" GiB asked for after ") && said.contains("smaller --batch or --context"),
        "{said}"
    );
    let mut command = on_driver(&format!("{study} --out study-failed --devices 0,1"));
    let output = command.env("RANKGRAD_FAKE_FAILS", "attention_dq_1_f32").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.starts_with("error: run "), "{said}");
    assert!(said.contains(": GPU cuda:") && said.lines().count() == 1, "{said}");
    let said = fails("RANKGRAD_FAKE_FAILS", "attention_dq_1_f32");
    assert!(said.starts_with("error: GPU cuda:0: attention_dq_1: ") && said.lines().count() == 1, "{said}");
    assert!(said.contains(" in the backward of attention (lab/src/model.rs:"), "{said}");
}
