//! Where the workers of a training are: mostly there is one. `--devices` makes each a thread of this process, and the variables that
//! torchrun sets make this process one of several.
//!
//! Not here: what they do together (trainer.rs), and how (rankgrad::parallel).

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rankgrad::parallel::{Alone, Link, tcp, threads};

use crate::cli::TrainArgs;
use crate::config::Config;
use crate::device::{Device, Devices, check};
use crate::error::{Error, Result};

/// One worker of this process.
pub struct Worker {
    pub device: Device,
    pub link: Arc<dyn Link>,
    /// Of its pool; 0: as many as there are cores.
    pub threads: usize,
}

/// The workers of this process, each with the way to the others.
///
/// # Errors
/// A device that is not there; a batch that does not divide; variables that make no sense, or a worker that does not come.
pub fn places(args: &TrainArgs, config: &Config) -> Result<Vec<Worker>> {
    let launched = Launched::from(|name| env::var(name).ok())?;
    let (devices, workers, here) = match (&launched, &args.devices) {
        (Some(_), Some(_)) => {
            return Err(Error::new(
                "--devices is for one process, and WORLD_SIZE says that there are several, each with its own; give --device",
            ));
        }
        (Some(it), None) => (vec![it.device(args.on.device)?], it.workers, it.here),
        (None, Some(Devices(devices))) => (devices.clone(), devices.len(), devices.len()),
        (None, None) => (vec![args.on.device], 1, 1),
    };
    if !config.batch.is_multiple_of(workers) {
        return Err(Error::new(format!(
            "--batch {} does not divide among {workers} workers: give a multiple of {workers}",
            config.batch
        )));
    }
    devices.iter().try_for_each(|&device| check(device))?;
    let links = match launched {
        Some(launched) => vec![launched.link()?],
        None if workers == 1 => vec![Arc::new(Alone) as Arc<dyn Link>],
        None => threads(workers),
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = match (config.threads, here) {
        (asked, 1) => asked,
        (0, here) => (cores / here).max(1),
        (asked, here) => (asked / here).max(1),
    };
    let places = devices.into_iter().zip(links);
    Ok(places.map(|(device, link)| Worker { device, link, threads }).collect())
}

/// Lets every worker of this process `work`, on a thread of its own if there are several, each with a copy of `start`. When one
/// fails or panics, all end.
///
/// # Errors
/// That of the first worker that has one; others than the one to blame say which it was.
pub fn run<S: Clone + Send>(
    workers: &[Worker],
    start: S,
    work: impl Fn(&Worker, S) -> Result<()> + Sync,
) -> Result<()> {
    if let [worker] = workers {
        return watched(worker, || work(worker, start));
    }
    thread::scope(|scope| {
        let spawn = |worker| {
            let (start, work) = (start.clone(), &work);
            let thread = thread::Builder::new().name(format!("worker {}", number(worker)));
            let started = thread.spawn_scoped(scope, move || watched(worker, || work(worker, start)));
            started.map_err(|why| {
                let why = format!("cannot start its thread: {why}");
                worker.link.fail(&why);
                Error::new(why)
            })
        };
        let running: Vec<_> = workers.iter().map(spawn).collect(); // all, before the first is waited for
        let ends = running.into_iter().map(|thread| thread?.join().expect("its panics are caught"));
        ends.collect::<Vec<Result<()>>>().into_iter().collect()
    })
}

fn number(worker: &Worker) -> usize {
    worker.link.worker()
}

/// Does a worker's work, and lets the others know if that fails.
fn watched(worker: &Worker, work: impl FnOnce() -> Result<()>) -> Result<()> {
    if worker.link.workers() == 1 {
        return work();
    }
    let end = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a word");
        Err(Error::new(format!("it panicked: {text}")))
    });
    end.inspect_err(|why| worker.link.fail(&why.to_string()))
}

/// How long the processes wait for each other at the start.
const PATIENCE: Duration = Duration::from_secs(300);

/// What torchrun says to a process that it starts.
#[derive(Debug, PartialEq)]
struct Launched {
    worker: usize,
    workers: usize,
    /// The number among the processes of this machine, and how many those are.
    local: usize,
    here: usize,
    address: String,
    port: u16,
}

impl Launched {
    /// From the environment; None: one process, which nobody has to be told anything.
    ///
    /// # Errors
    /// A variable that is missing or makes no sense.
    fn from(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        fn number<T: std::str::FromStr>(name: &str, text: Option<String>) -> Result<T> {
            let text = text.ok_or_else(|| {
                Error::new(format!(
                    "WORLD_SIZE asks for several processes, and {name} is not set; torchrun sets both"
                ))
            })?;
            text.parse().map_err(|_| Error::new(format!("{name} is `{text}`: it must be a number")))
        }
        let read = |name: &str| number(name, variable(name));
        let workers =
            variable("WORLD_SIZE").map(|text| number("WORLD_SIZE", Some(text))).transpose()?.unwrap_or(1);
        if workers == 1 {
            return Ok(None);
        }
        let (worker, local) = (read("RANK")?, read("LOCAL_RANK")?);
        if worker >= workers {
            return Err(Error::new(format!("RANK is {worker}: it must be below WORLD_SIZE, {workers}")));
        }
        let here = variable("LOCAL_WORLD_SIZE").map(|text| number("LOCAL_WORLD_SIZE", Some(text)));
        let address = variable("MASTER_ADDR").unwrap_or("127.0.0.1".into());
        let port: u16 = number("MASTER_PORT", variable("MASTER_PORT"))?;
        // torchrun itself listens at the port where it says so
        let taken = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text == "True");
        let (here, port) = (here.transpose()?.unwrap_or(1).max(1), port.wrapping_add(u16::from(taken)));
        Ok(Some(Self { worker, workers, local, here, address, port }))
    }

    fn device(&self, asked: Device) -> Result<Device> {
        match asked {
            Device::Cpu => Ok(Device::Cpu),
            Device::Cuda(0) => Ok(Device::Cuda(self.local)),
            other => Err(Error::new(format!(
                "--device {other}: each of several processes has the GPU of its LOCAL_RANK; give --device cuda, or cpu"
            ))),
        }
    }

    fn link(&self) -> Result<Arc<dyn Link>> {
        let Self { worker, workers, ref address, port, .. } = *self;
        Ok(tcp(worker, workers, (address, port), PATIENCE)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the program says when the workers of one process do that, until they cannot go on.
    fn end(work: impl Fn(usize, usize) -> Result<()> + Sync) -> String {
        let links = threads(3).into_iter();
        let workers: Vec<_> = links.map(|link| Worker { device: Device::Cpu, link, threads: 1 }).collect();
        let end = run(&workers, vec![7], |worker, start: Vec<i32>| {
            assert_eq!(start, [7]);
            for round in 0.. {
                work(number(worker), round)?;
                worker.link.sums([1.0])?;
            }
            unreachable!("numbers do not end")
        });
        end.unwrap_err().to_string()
    }

    #[test]
    fn one_that_fails_or_panics_ends_all() {
        for failing in 0..3 {
            let why = end(|worker, round| match (worker == failing, round) {
                (true, 5) => Err(Error::new("no space left")),
                _ => Ok(()),
            });
            let blamed =
                ["no space left", "worker 1 failed: no space left", "worker 2 failed: no space left"];
            assert_eq!(why, blamed[failing]);
        }
        let why = end(|worker, round| {
            assert!(worker != 1 || round < 3, "as it was meant to");
            Ok(())
        });
        assert_eq!(why, "worker 1 failed: it panicked: as it was meant to");
    }

    #[test]
    fn torchruns_variables_are_read_and_checked() {
        let from = |text: &str| {
            let pairs: Vec<(&str, &str)> = text.split(' ').filter_map(|pair| pair.split_once('=')).collect();
            let value = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
            Launched::from(value).map_err(|e| e.to_string())
        };
        assert_eq!(from(""), Ok(None));
        assert_eq!(from("WORLD_SIZE=1 RANK=0"), Ok(None));
        let all = "WORLD_SIZE=4 RANK=3 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=node0 MASTER_PORT=29500";
        let got = from(all).unwrap().unwrap();
        assert_eq!(
            got,
            Launched { worker: 3, workers: 4, local: 1, here: 2, address: "node0".into(), port: 29500 }
        );
        assert_eq!(from(&format!("{all} TORCHELASTIC_USE_AGENT_STORE=True")).unwrap().unwrap().port, 29501);
        assert_eq!(got.device(Device::Cuda(0)).unwrap(), Device::Cuda(1));
        assert_eq!(got.device(Device::Cpu).unwrap(), Device::Cpu);
        assert!(got.device(Device::Cuda(1)).unwrap_err().to_string().starts_with("--device cuda:1: each of"));
        for (text, says) in [
            ("WORLD_SIZE=x", "WORLD_SIZE is `x`: it must be a number"),
            ("WORLD_SIZE=2", "RANK is not set"),
            ("WORLD_SIZE=2 RANK=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=- MASTER_PORT=1", "LOCAL_WORLD_SIZE is `-`"),
            ("WORLD_SIZE=2 RANK=2 LOCAL_RANK=0", "RANK is 2: it must be below WORLD_SIZE, 2"),
            ("WORLD_SIZE=2 RANK=1 LOCAL_RANK=0", "MASTER_PORT is not set"),
            ("WORLD_SIZE=2 RANK=1 LOCAL_RANK=0 MASTER_PORT=99999", "MASTER_PORT is `99999`"),
        ] {
            let why = from(text).unwrap_err();
            assert!(why.contains(says), "{text}: {why}");
        }
    }
}
