//! What there is to compute on: `devices` lists it, `--device` and `--devices` choose. And what becomes of a device that fails.

use std::any::Any;
use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rankgrad::parallel::{Alone, Link, ThroughHost};
use rankgrad::tensor::{Backend, Cpu};
use serde::Serialize;

use crate::config::Precision;
use crate::error::{Error, Result};
use crate::trainer::Together;

/// What `--device` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    Cpu,
    Cuda(usize),
    /// The first GPU if there is one, else the processor.
    Auto,
}

impl FromStr for Device {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "auto" => Ok(Self::Auto),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Ok(Self::Cuda(ordinal)),
                _ => Err("one of cpu, cuda, cuda:N and auto".into()),
            },
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

/// What `--devices` says: one for each worker, all of one kind, no GPU twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices(pub Vec<Device>);

impl FromStr for Devices {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let one = |name: &str| match (name.parse(), name.parse()) {
            (Ok(ordinal), _) => Ok(Device::Cuda(ordinal)),
            (_, Ok(device)) if device != Device::Auto => Ok(device),
            _ => Err(format!("`{name}` is none of cpu, cuda, cuda:N and N, with a comma between two")),
        };
        let devices = text.split(',').map(one).collect::<std::result::Result<Vec<Device>, _>>()?;
        let (cpus, gpus): (Vec<Device>, Vec<Device>) = devices.iter().partition(|&&d| d == Device::Cpu);
        if !cpus.is_empty() && !gpus.is_empty() {
            return Err("processors and GPUs do not train together: give one kind".into());
        }
        let mut seen = HashSet::new();
        match gpus.iter().find(|&&gpu| !seen.insert(gpu)) {
            Some(gpu) => Err(format!("{gpu} is there twice: each GPU is one worker")),
            None => Ok(Self(devices)),
        }
    }
}

/// A backend on which several workers can train together.
pub trait Join: Backend<Elem = f32> {
    /// This worker's part in what they do together, over their link.
    ///
    /// # Errors
    /// Whatever it is done with is missing or fails.
    fn join(&self, link: Arc<dyn Link>) -> Result<Together<Self>>;
}

impl Join for Cpu<f32> {
    fn join(&self, link: Arc<dyn Link>) -> Result<Together<Self>> {
        Ok(if link.workers() == 1 { Arc::new(Alone) } else { Arc::new(ThroughHost(link)) })
    }
}

#[cfg(feature = "cuda")]
impl Join for rankgrad::gpu::Cuda<f32> {
    fn join(&self, link: Arc<dyn Link>) -> Result<Together<Self>> {
        if link.workers() == 1 {
            return Ok(Arc::new(Alone));
        }
        let nccl = rankgrad::gpu::Nccl::join(self, link);
        Ok(Arc::new(nccl.map_err(|why| Error::new(why.to_string()))?))
    }
}

/// A backend whose work can be watched where it is done, apart from the processor that asks for it.
pub trait Watch: Backend {
    /// Takes the time of each kernel from now on.
    fn watch_kernels(&self) {}
    /// The times since then, the longest first; none of a processor, whose ops have theirs.
    fn kernel_times(&self) -> Vec<KernelTime> {
        Vec::new()
    }
    /// The most bytes of the device's memory that were in use at one time; None where that is the processor's.
    fn peak_bytes(&self) -> Option<usize> {
        None
    }
    /// What CUDA graphs did so far; None where there are none.
    fn graph_use(&self) -> Option<String> {
        None
    }
}

/// What a kernel took on the device in all its calls.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTime {
    pub kernel: String,
    pub calls: usize,
    pub ms: f64,
    /// Of products; 0 for other kernels.
    pub flops: f64,
}

impl Watch for Cpu<f32> {}

#[cfg(feature = "cuda")]
impl Watch for rankgrad::gpu::Cuda<f32> {
    fn watch_kernels(&self) {
        self.watch_kernels();
    }
    fn kernel_times(&self) -> Vec<KernelTime> {
        let times = self.kernel_times().into_iter().map(|(kernel, time)| {
            let rankgrad::gpu::KernelTime { calls, seconds, flops } = time;
            KernelTime { kernel, calls, ms: 1e3 * seconds, flops }
        });
        let mut times: Vec<KernelTime> = times.collect();
        times.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        times
    }
    fn peak_bytes(&self) -> Option<usize> {
        Some(self.peak_bytes())
    }
    fn graph_use(&self) -> Option<String> {
        self.graph_use().map(|used| used.to_string())
    }
}

/// A device, ready to compute. [`on_device`] runs the same code on either.
#[derive(Clone)]
pub enum Opened {
    Cpu(Cpu<f32>),
    #[cfg(feature = "cuda")]
    Cuda(rankgrad::gpu::Cuda<f32>),
    /// Trains in bf16, with weights in f32.
    #[cfg(feature = "cuda")]
    Mixed(rankgrad::gpu::Cuda<f32>),
}

/// Opens what was asked for; `auto` says on standard error what it takes.
///
/// # Errors
/// Why there is no such GPU, and what to do. bf16 on the processor, or on a GPU that has none.
pub fn open(device: Device, precision: Precision) -> Result<Opened> {
    #[cfg(feature = "cuda")]
    if precision != Precision::F32 {
        has_bf16(device)?; // before kernels are compiled
    }
    match (opened(device)?, precision) {
        (opened, Precision::F32) => Ok(opened),
        #[cfg(feature = "cuda")]
        (Opened::Cuda(gpu) | Opened::Mixed(gpu), _) => Ok(Opened::Mixed(gpu)),
        (Opened::Cpu(_), _) => Err(Error::new(
            "precision is bf16, in which only GPUs compute: add --device cuda, or take f32 (a run keeps the precision that it began with)",
        )),
    }
}

fn opened(device: Device) -> Result<Opened> {
    let cpu = Opened::Cpu(Cpu::default());
    match device {
        Device::Cpu => Ok(cpu),
        Device::Cuda(ordinal) => {
            cuda(ordinal).map_err(|why| Error::new(format!("--device cuda: {why}; or use --device cpu")))
        }
        Device::Auto => match cuda(0) {
            Ok(gpu) => {
                eprintln!("device: cuda:0");
                Ok(gpu)
            }
            Err(why) => {
                eprintln!("device: cpu ({why})");
                Ok(cpu)
            }
        },
    }
}

/// Opens a device for each of several runs at a time, of those that were asked for in turn; so many runs at a time (`jobs`), or one on
/// each GPU, or as many as `on_cpu`.
///
/// # Errors
/// As for [`open`].
pub fn open_each(
    devices: &[Device],
    precision: Precision,
    jobs: Option<usize>,
    on_cpu: usize,
) -> Result<Vec<Opened>> {
    let first = open(devices[0], precision)?;
    let cpu = matches!(first, Opened::Cpu(_));
    let jobs = jobs.unwrap_or(if cpu && devices.len() == 1 { on_cpu } else { devices.len() });
    let rest = (1..jobs).map(|job| match devices[job % devices.len()] {
        Device::Auto if cpu => open(Device::Cpu, precision), // it has said so
        Device::Auto => open(Device::Cuda(0), precision),
        device => open(device, precision),
    });
    std::iter::once(Ok(first)).chain(rest).collect()
}

/// Whether there is a device of that number, without opening it.
///
/// # Errors
/// Why there is none.
pub fn check(device: Device) -> Result<()> {
    let Device::Cuda(ordinal) = device else { return Ok(()) };
    found(ordinal).map_err(|why| Error::new(format!("--device cuda: {why}; or use --device cpu")))
}

/// Evaluates an expression with `$device` bound to the opened backend, whichever it is, and `$compute` to the same in the
/// precision of forward and backward.
macro_rules! on_device {
    ($opened:expr, |$device:ident| $run:expr) => {
        $crate::device::on_device!($opened, |$device, _compute| $run)
    };
    ($opened:expr, |$device:ident, $compute:ident| $run:expr) => {
        match $opened {
            $crate::device::Opened::Cpu($device) => {
                let $compute = $device;
                $run
            }
            #[cfg(feature = "cuda")]
            $crate::device::Opened::Cuda($device) => {
                let $compute = $device.clone();
                $run
            }
            #[cfg(feature = "cuda")]
            $crate::device::Opened::Mixed($device) => {
                let $compute = $device.with_elements::<rankgrad::tensor::Bf16>();
                $run
            }
        }
    };
}
pub(crate) use on_device;

/// Does `work`, once per program. A device that fails in the middle of it, out of memory or worse, is an error with its message; another
/// panic is a mistake of ours and stays one.
///
/// # Errors
/// Those of `work`, and the device's.
#[cfg(feature = "cuda")]
pub fn caught(work: impl FnOnce() -> Result<()>) -> Result<()> {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook};

    let usual = take_hook();
    set_hook(Box::new(move |panic| {
        if failure(panic.payload()).is_none() {
            usual(panic);
        }
    }));
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| match failure(&*payload) {
        Some(said) => Err(Error::new(said)),
        None => resume_unwind(payload),
    })
}

/// Without GPUs, no device fails.
#[cfg(not(feature = "cuda"))]
pub fn caught(work: impl FnOnce() -> Result<()>) -> Result<()> {
    work()
}

/// What a device said that failed, of what a panic carries; None: it was another panic.
#[cfg(feature = "cuda")]
pub fn failure(panic: &dyn Any) -> Option<String> {
    let said = panic.downcast_ref::<String>();
    said.filter(|said| said.starts_with(rankgrad::gpu::FAILURE)).cloned()
}

/// As above.
#[cfg(not(feature = "cuda"))]
pub fn failure(_: &dyn Any) -> Option<String> {
    None
}

/// `devices`: a line for the processor and one for each GPU, or why there is none.
///
/// # Errors
/// None: that there is no GPU is an answer.
pub fn devices() -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    crate::say!("cpu: {cores} threads");
    match gpus() {
        Ok(lines) => crate::say!("{}", lines.join("\n")),
        Err(why) => crate::say!("cuda: {why}"),
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn gpus() -> std::result::Result<Vec<String>, String> {
    let found = rankgrad::gpu::devices().map_err(|why| why.to_string())?;
    Ok(found.iter().map(ToString::to_string).collect())
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> std::result::Result<Opened, String> {
    rankgrad::gpu::Cuda::open(ordinal).map(Opened::Cuda).map_err(|why| why.to_string())
}

#[cfg(feature = "cuda")]
fn found(ordinal: usize) -> std::result::Result<(), String> {
    use rankgrad::gpu::Unavailable::NoSuchDevice;
    let count = rankgrad::gpu::devices().map_err(|why| why.to_string())?.len();
    if ordinal < count { Ok(()) } else { Err(NoSuchDevice(ordinal, count).to_string()) }
}

#[cfg(feature = "cuda")]
fn has_bf16(device: Device) -> Result<()> {
    let ordinal = match device {
        Device::Cpu => return Ok(()), // it has its own words
        Device::Auto => 0,
        Device::Cuda(ordinal) => ordinal,
    };
    match rankgrad::gpu::devices().ok().and_then(|all| all.get(ordinal)) {
        Some(old) if !old.has_bf16() => Err(Error::new(format!(
            "precision is bf16, for which {old} is too old (8.0 is needed): take f32 (a run keeps the precision that it began with)"
        ))),
        _ => Ok(()),
    }
}

#[cfg(not(feature = "cuda"))]
const NOT_BUILT: &str = "this build has no GPU support; build with --features cuda";

#[cfg(not(feature = "cuda"))]
fn gpus() -> std::result::Result<Vec<String>, String> {
    Err(NOT_BUILT.into())
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> std::result::Result<Opened, String> {
    Err(NOT_BUILT.into())
}

#[cfg(not(feature = "cuda"))]
fn found(_: usize) -> std::result::Result<(), String> {
    Err(NOT_BUILT.into())
}
