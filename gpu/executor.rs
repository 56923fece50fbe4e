//! What the GPU backend stands on: memory, launches, matrix products. Two implementations: CUDA (cuda.rs), and the simulator
//! (simulator.rs), which runs the same kernels on the processor, so that everything above is tested without a GPU.
//!
//! Calls take effect in the order in which they are made, as if each waited for the one before: freed memory may be given out
//! again at once. Only `download` waits in fact. Failures panic: a training step cannot go on without its GPU, and CUDA reports
//! most of them at some later call.

use super::backend::Memory;
use std::any::Any;
use std::ffi::c_void;
use std::fmt::{self, Debug, Display, Formatter};

/// An address in the executor's memory.
pub type Address = u64;

/// One argument of a kernel: its bits, from the lowest on, as its C type has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arg(u64);

impl From<u32> for Arg {
    fn from(x: u32) -> Self {
        Self(x.into())
    }
}
impl From<u64> for Arg {
    fn from(x: u64) -> Self {
        Self(x)
    }
}
impl From<f32> for Arg {
    fn from(x: f32) -> Self {
        Self(x.to_bits().into())
    }
}
impl From<&Memory> for Arg {
    fn from(x: &Memory) -> Self {
        Self(x.address())
    }
}

/// The arguments as cuLaunchKernel wants them: a pointer to each.
pub(super) fn pointers(args: &[Arg]) -> Vec<*mut c_void> {
    const { assert!(cfg!(target_endian = "little")) } // an u32 lies at the address of the u64 that holds it
    args.iter().map(|arg| (&raw const arg.0).cast_mut().cast()).collect()
}

/// A type of elements, as device memory has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    F32,
    Bf16,
}

impl Type {
    pub const ALL: [Self; 2] = [Self::F32, Self::Bf16];

    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl Display for Type {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// How a kernel is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    pub kernel: &'static str,
    /// Which of the kernels of this name.
    pub element: Type,
    pub grid: [u32; 3],
    /// Threads of a block, a multiple of 32.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// A batch of products C ← or += A·B of one shape, row-major. `transposed`: A is stored as [k, m], B as [n, k].
#[derive(Clone, Debug)]
pub struct Gemm {
    /// Of A and B.
    pub element: Type,
    /// Of C: the same, or f32.
    pub result: Type,
    pub m: usize,
    pub k: usize,
    pub n: usize,
    pub transposed: [bool; 2],
    /// Elements from one row of A, of B and of C to the next, as they are stored: more than a row has, where they are columns of a wider
    /// matrix. Those begin at a multiple of 16 bytes.
    pub rows: [usize; 3],
    /// C is added to, instead of being replaced without being read.
    pub add: bool,
    /// A, B and C of each product.
    pub operands: Vec<[Address; 3]>,
}

/// A device.
pub trait Executor: Any + Send + Sync + Debug {
    /// So many bytes, of unspecified contents. Aligned for every kernel (256 bytes).
    ///
    /// # Panics
    /// If memory runs out: how much was asked for and how much is free.
    fn alloc(&self, bytes: usize) -> Address;
    /// Gives memory back.
    ///
    /// # Safety
    /// `address` must come from `alloc` with as many bytes, and not be used again.
    unsafe fn free(&self, address: Address, bytes: usize);
    /// Copies host memory to the device.
    ///
    /// # Safety
    /// The device must have allocated as many bytes at `to`.
    unsafe fn upload(&self, from: &[u8], to: Address);
    /// Copies from the device, after everything before.
    ///
    /// # Safety
    /// As for `upload`.
    unsafe fn download(&self, from: Address, to: &mut [u8]);
    /// Copies within the device.
    ///
    /// # Safety
    /// As for `upload`, at both addresses.
    unsafe fn copy(&self, from: Address, to: Address, bytes: usize);
    /// Starts a kernel. A grid with a side of 0 does nothing.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, in number, type and meaning.
    unsafe fn launch(&self, launch: Launch, args: &[Arg]);
    /// A batch of products. Sums are f32 and rounded once, to C's elements; inputs are not rounded (no TF32).
    ///
    /// # Safety
    /// The device must have allocated all matrices, and no C may overlap another or an operand.
    unsafe fn gemm(&self, gemm: &Gemm);
    /// Waits until all is done.
    fn sync(&self);
}
