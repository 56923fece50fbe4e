//! Which GPUs there are, or why none can be used. Nothing here panics, with or without a driver, and nothing is computed.
//!
//! cudarc opens the CUDA libraries at run time, and panics where one is missing. So every use of it stands behind
//! [`devices`], which asks first whether each library can be opened. cuBLAS (matrix products) and NVRTC (the compiler of the
//! kernels) come with the toolkit, but also with a PyTorch installation; where the loader does not find them by itself,
//! [`preload`] opens them by their full path.

use cudarc::driver::{result, sys};
use cudarc::{cublas, cublaslt, nvrtc};
use libloading::Library;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A GPU that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The driver's number, from 0.
    pub ordinal: usize,
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: [i32; 2],
    /// Bytes.
    pub memory: usize,
}

impl Found {
    /// Whether it can compute in bf16: the kernels of attention use instructions of compute capability 8.0.
    pub fn has_bf16(&self) -> bool {
        self.capability >= [8, 0]
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor] = self.capability;
        let gib = self.memory as f64 / (1u64 << 30) as f64;
        write!(f, "cuda:{}: {}, {gib:.1} GiB, compute capability {major}.{minor}", self.ordinal, self.name)
    }
}

/// Why there is no GPU to compute on, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// libcuda cannot be opened.
    NoDriver,
    /// The driver has no device; what it says.
    NoDevice(String),
    /// A library that the driver does not bring, and the directories that were looked into beside the loader's own.
    NoLibrary(&'static str, Vec<PathBuf>),
    /// The device asked for, and how many there are.
    NoSuchDevice(usize, usize),
    /// A device that is there, but fails.
    Failed(String),
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDriver => {
                write!(f, "no NVIDIA driver: libcuda cannot be opened; install the driver of your GPU")
            }
            Self::NoDevice(why) => {
                write!(f, "the NVIDIA driver has no usable device ({why}); nvidia-smi may tell more")
            }
            Self::NoLibrary(name, tried) => {
                let tried: Vec<_> = tried.iter().map(|d| d.display().to_string()).collect();
                let packages = match *name {
                    "nccl" => "nvidia-nccl-cu13, or nvidia-nccl-cu12 for an older driver",
                    _ => "nvidia-cublas nvidia-cuda-nvrtc",
                };
                write!(
                    f,
                    "lib{name} is neither on the loader's path nor in {}; install it (pip install {packages}) or set {LIBS} \
                     to its directory",
                    tried.join(", ")
                )
            }
            Self::NoSuchDevice(asked, have) => {
                write!(f, "there is no cuda:{asked}: the devices are 0 to {}", have - 1)
            }
            Self::Failed(why) => write!(f, "the GPU cannot be used: {why}"),
        }
    }
}

impl std::error::Error for Unavailable {}

/// Directories with CUDA libraries, separated as in PATH; they come before all others.
pub const LIBS: &str = "RANKGRAD_CUDA_LIBS";

/// The GPUs that can be used. Looked for once in a process.
///
/// # Errors
/// No driver, no device, or a missing library: there is at least one GPU in an `Ok`.
pub fn devices() -> Result<&'static [Found], Unavailable> {
    static FOUND: OnceLock<Result<Vec<Found>, Unavailable>> = OnceLock::new();
    FOUND.get_or_init(look).as_deref().map_err(Clone::clone)
}

fn look() -> Result<Vec<Found>, Unavailable> {
    // SAFETY: opens and closes the library; its initialisers are NVIDIA's own
    if !unsafe { sys::is_culib_present() } {
        return Err(Unavailable::NoDriver);
    }
    let no_device = |error: result::DriverError| Unavailable::NoDevice(reason(error));
    result::init().map_err(no_device)?;
    let count = result::device::get_count().map_err(no_device)?;
    if count == 0 {
        return Err(Unavailable::NoDevice("it counts none".into()));
    }
    let found = (0..count).map(describe).collect::<Result<_, _>>().map_err(no_device)?;
    products()?;
    compiler()?;
    Ok(found)
}

fn describe(ordinal: i32) -> Result<Found, result::DriverError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let device = result::device::get(ordinal)?;
    // SAFETY: a device that the driver has just named
    let (memory, major, minor) = unsafe {
        (
            result::device::total_mem(device)?,
            result::device::get_attribute(device, MAJOR)?,
            result::device::get_attribute(device, MINOR)?,
        )
    };
    let name = result::device::get_name(device)?;
    Ok(Found { ordinal: ordinal as usize, name, capability: [major, minor], memory })
}

/// The driver's words for its error. Not cudarc's own, which ask a symbol that a stub of the driver may lack.
pub(super) fn reason(error: result::DriverError) -> String {
    format!("{:?}", error.0)
}

/// Makes sure that cuBLAS can be opened.
fn products() -> Result<(), Unavailable> {
    // SAFETY: as in `look`
    let present = || unsafe { cublas::sys::is_culib_present() && cublaslt::sys::is_culib_present() };
    opened("cublas", &["cublasLt", "cublas"], present)
}

/// Makes sure that NVRTC can be opened. It needs no driver.
pub(super) fn compiler() -> Result<(), Unavailable> {
    // it looks for its builtins by name alone, so they come first
    // SAFETY: as in `look`
    opened("nvrtc", &["nvrtc-builtins", "nvrtc"], || unsafe { nvrtc::sys::is_culib_present() })
}

/// NCCL, opened. Only what trains on several GPUs asks for it.
pub(super) fn nccl_library() -> Result<Library, Unavailable> {
    // SAFETY: as in `look`
    let by_name =
        || ["libnccl.so.2", "libnccl.so"].into_iter().find_map(|name| unsafe { Library::new(name) }.ok());
    opened("nccl", &["nccl"], || by_name().is_some())?;
    by_name().ok_or_else(|| Unavailable::NoLibrary("nccl", directories()))
}

/// `parts`: the files of the library, each before those that need it.
fn opened(name: &'static str, parts: &[&str], present: impl Fn() -> bool) -> Result<(), Unavailable> {
    if present() {
        return Ok(());
    }
    let tried = directories();
    for part in parts {
        tried.iter().find(|directory| preload(directory, part));
    }
    if present() { Ok(()) } else { Err(Unavailable::NoLibrary(name, tried)) }
}

/// Opens lib`name`.so.* of a directory for the rest of the process, if it is there. A later opening by name alone, which is
/// what cudarc does, then finds the same copy: the loader knows it by its soname.
#[cfg(target_os = "linux")]
fn preload(directory: &Path, name: &str) -> bool {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    let prefix = format!("lib{name}.so.");
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut versions: Vec<_> =
        files.map(|file| file.path()).filter(|path| file_name(path).starts_with(&prefix)).collect();
    versions.sort();
    // the newest that opens
    versions.iter().rev().any(|path| {
        // SAFETY: NVIDIA's library by its name; its initialisers run, as they would for any program linked to it
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
        library.map(std::mem::forget).is_ok() // stays open
    })
}

#[cfg(not(target_os = "linux"))]
fn preload(_: &Path, _: &str) -> bool {
    false
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// Where CUDA's libraries may be: what [`LIBS`] says, the toolkit's usual place, and what pip installs for a virtual
/// environment or for the first python3 of the PATH.
fn directories() -> Vec<PathBuf> {
    let split = |name: &str| -> Vec<PathBuf> {
        std::env::var_os(name).map(|value| std::env::split_paths(&value).collect()).unwrap_or_default()
    };
    let mut directories = split(LIBS);
    directories.push("/usr/local/cuda/lib64".into());
    let python = split("PATH").into_iter().find(|bin| bin.join("python3").exists());
    let prefixes =
        split("VIRTUAL_ENV").into_iter().chain(python.and_then(|bin| bin.parent().map(Path::to_owned)));
    for prefix in prefixes.chain([PathBuf::from("/usr/local")]) {
        let versions = std::fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten();
        for version in
            versions.map(|entry| entry.path()).filter(|path| file_name(path).starts_with("python3"))
        {
            for packages in ["site-packages", "dist-packages"] {
                for folder in ["cu13/lib", "cublas/lib", "cuda_nvrtc/lib", "nccl/lib"] {
                    directories.push(version.join(packages).join("nvidia").join(folder));
                }
            }
        }
    }
    // what is not there is not worth naming, but for the one place that the person has named
    let named = split(LIBS);
    directories.retain(|directory| {
        named.contains(directory) || directory.is_dir() || directory.starts_with("/usr/local/cuda")
    });
    directories.dedup();
    directories
}
