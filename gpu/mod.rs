//! NVIDIA GPUs: a backend whose kernels are CUDA C, behind the features `cuda` and `simulator`.
//!
//! From below: kernels/ (the sources), [`executor`] (what they need of a device), cuda.rs (a real one: feature `cuda`) and
//! simulator.rs (the same kernels on the processor: feature `simulator`, for tests), [`Cuda`] (the methods of
//! [`Backend`](crate::tensor::Backend) over it), graphs.rs (work
//! that comes again, launched as a whole), nccl.rs (several GPUs), probe.rs (which devices there are). The tape and everything above does not
//! know what it runs on. docs/gpu.md says what has been tested and how.

mod backend;
#[cfg(feature = "cuda")]
mod compile;
#[cfg(feature = "cuda")]
mod cuda;
pub mod executor;
#[cfg(feature = "cuda")]
mod graphs;
pub mod kernels;
#[cfg(feature = "cuda")]
mod nccl;
#[cfg(feature = "cuda")]
mod plans;
#[cfg(feature = "cuda")]
mod probe;
#[cfg(feature = "simulator")]
mod simulator;

pub use backend::{Buffer, Cuda, Memory, OnGpu};
#[cfg(feature = "cuda")]
pub use compile::compile;
#[cfg(feature = "cuda")]
pub use cuda::KernelTime;
#[cfg(feature = "cuda")]
pub use graphs::GraphUse;
#[cfg(feature = "cuda")]
pub use nccl::Nccl;
#[cfg(feature = "cuda")]
pub use probe::{Found, LIBS, Unavailable, devices};
#[cfg(feature = "simulator")]
pub use simulator::Simulator;

/// The beginning of the message of each panic by which a device fails in the middle of a computation (no method of
/// [`Backend`](crate::tensor::Backend) returns an error, and nothing on a failed device can be trusted), so that a program can tell it from a
/// mistake of its own.
pub const FAILURE: &str = "GPU cuda:";
