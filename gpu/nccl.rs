//! NCCL: sums and broadcasts between GPUs, of one machine or of several, each GPU a worker with a thread or a process of its own.
//!
//! The library is looked for at run time (probe.rs); what is called of it stands in one table. The work has a stream of its own, so that
//! the GPU computes meanwhile: it waits, there, for all that was asked of the GPU before, and its end is waited for by the host, which
//! so sees when another worker is lost. A communicator is, as in NCCL, one worker's end of the whole.

use super::backend::{Cuda, address};
use super::cuda::Gpu;
use super::probe::{devices, nccl_library};
use crate::parallel::{Collective, Failed, Link, Sums};
use crate::tensor::Tensor;
use cudarc::driver::{CudaStream, result, sys};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt::Display;
use std::sync::{Arc, Mutex, OnceLock};

/// ncclUniqueId: by this the workers find each other.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// ncclComm_t.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Communicator(*mut c_void);
// SAFETY: NCCL takes calls from any thread that has entered the GPU's context, one at a time: `enter` and a mutex see to it
unsafe impl Send for Communicator {}

/// ncclResult_t; every other number is an error.
type Code = c_int;
const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;
/// Of ncclDataType_t and of ncclRedOp_t.
const FLOAT: c_int = 7;
const SUM: c_int = 0;

macro_rules! table {
    ($($name:ident = $symbol:literal: fn($($arg:ty),*) -> $out:ty;)*) => {
        /// The functions that are called, with the types of nccl.h (2.4 or later).
        struct Api {
            $($name: unsafe extern "C" fn($($arg),*) -> $out,)*
        }

        impl Api {
            /// From the library of this machine, which stays open: it has threads of its own.
            fn open() -> Result<Self, Failed> {
                let library = nccl_library().map_err(|why| Failed(why.to_string()))?;
                let missing = |name| move |_| Failed(format!("NCCL is too old: it has no {name}"));
                // SAFETY: the types are those of nccl.h
                let api = unsafe { Self { $($name: *library.get($symbol).map_err(missing($symbol))?,)* } };
                std::mem::forget(library);
                Ok(api)
            }
        }
    };
}

table! {
    unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> Code;
    init = "ncclCommInitRank": fn(*mut Communicator, c_int, UniqueId, c_int) -> Code;
    abort = "ncclCommAbort": fn(Communicator) -> Code;
    state = "ncclCommGetAsyncError": fn(Communicator, *mut Code) -> Code;
    message = "ncclGetErrorString": fn(Code) -> *const c_char;
    begin = "ncclGroupStart": fn() -> Code;
    end = "ncclGroupEnd": fn() -> Code;
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Communicator, sys::CUstream) -> Code;
    broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, Communicator, sys::CUstream) -> Code;
}

impl Api {
    /// # Errors
    /// What NCCL says of a code that is not success.
    fn check(&self, what: &str, code: Code) -> Result<(), Failed> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: a string that is always there
        let message = unsafe { CStr::from_ptr((self.message)(code)) }.to_string_lossy();
        Err(Failed(format!("NCCL: {what}: {message}; NCCL_DEBUG=WARN in the environment makes it say more")))
    }
}

fn api() -> Result<&'static Api, Failed> {
    static API: OnceLock<Result<Api, Failed>> = OnceLock::new();
    API.get_or_init(Api::open).as_ref().map_err(Clone::clone)
}

/// A GPU among those that train together.
pub struct Nccl {
    api: &'static Api,
    device: Cuda<f32>,
    link: Arc<dyn Link>,
    stream: Arc<CudaStream>,
    /// None once it is given up.
    communicator: Mutex<Option<Communicator>>,
}

impl Nccl {
    /// Makes this GPU the worker that the link says, together with all others, and tries it out with a sum.
    ///
    /// # Errors
    /// NCCL is missing (what to do about it), does not want these GPUs, or gives a wrong sum; another worker has failed.
    ///
    /// # Panics
    /// If the device is not a GPU but a simulator of one.
    pub fn join(device: &Cuda<f32>, link: Arc<dyn Link>) -> Result<Self, Failed> {
        let api = api()?;
        let gpu = gpu(device);
        open_to_peers(gpu).map_err(|why| failed(gpu, "access of other GPUs", &why))?;
        let mut id = UniqueId([0; 128]);
        if link.worker() == 0 {
            // SAFETY: writes 128 bytes
            api.check("making an id", unsafe { (api.unique_id)(&raw mut id) })?;
        }
        let mut of_first = |ids: Vec<Vec<u8>>| ids[0].clone();
        let id = link.exchange(id.0.to_vec(), &mut of_first)?;
        let id = UniqueId(id.try_into().map_err(|_| Failed("worker 0 sent no id of NCCL's".into()))?);
        gpu.enter();
        let mut communicator = Communicator(std::ptr::null_mut());
        let (worker, workers) = (link.worker() as c_int, link.workers() as c_int);
        // SAFETY: the GPU's context is this thread's; every worker does the same with the same id
        let made = unsafe { (api.init)(&raw mut communicator, workers, id, worker) };
        api.check(&format!("joining with cuda:{}", gpu.ordinal), made)?;
        let stream = gpu.context.new_stream().map_err(|why| failed(gpu, "a second stream", &why))?;
        let communicator = Mutex::new(Some(communicator));
        let this = Self { api, device: device.clone(), link, stream, communicator };
        let ones = Tensor::full(device, [1], 1.0); // [1]
        let sum = this.all_reduce(vec![ones])?.wait()?[0].item();
        if sum != f64::from(workers) {
            return Err(Failed(format!("NCCL: the sum of {workers} ones is {sum}")));
        }
        Ok(this)
    }

    /// Enqueues, with `call`, one operation in place for each of `places` (address and number of f32), behind all that the GPU has been
    /// asked for: as one group, for which NCCL starts one kernel. A flat buffer would take a copy in and out, and as much memory again.
    fn group(
        &self,
        places: &[(u64, usize)],
        mut call: impl FnMut(usize, *mut c_void, usize, Communicator, sys::CUstream) -> Code,
    ) -> Result<(), Failed> {
        // when all have come, nobody's failure on the host can leave a GPU waiting
        self.link.exchange(Vec::new(), &mut |_| Vec::new())?;
        let gpu = gpu(&self.device);
        self.with_communicator(|own| {
            let _alone = gpu.alone();
            gpu.enter();
            self.stream.join(&gpu.stream).map_err(|why| failed(gpu, "between two streams", &why))?;
            let api = self.api;
            // SAFETY: takes nothing
            let mut code = unsafe { (api.begin)() };
            for (i, &(address, len)) in places.iter().enumerate() {
                if code == SUCCESS {
                    code = call(i, address as *mut c_void, len, own, self.stream.cu_stream());
                }
            }
            // SAFETY: ends what has begun
            let ended = unsafe { (api.end)() };
            api.check("starting", if code == SUCCESS { ended } else { code })
        })
    }

    /// Until all groups are through, or somebody fails: a GPU that waits for another would wait for ever.
    fn wait(&self) -> Result<(), Failed> {
        let gpu = gpu(&self.device);
        self.with_communicator(|own| {
            gpu.context.bind_to_thread().map_err(|why| failed(gpu, "waiting", &why))?;
            loop {
                // SAFETY: the stream lives as long as this
                match unsafe { sys::cuStreamQuery(self.stream.cu_stream()) } {
                    sys::CUresult::CUDA_SUCCESS => return Ok(()),
                    sys::CUresult::CUDA_ERROR_NOT_READY => {}
                    error => return Err(failed(gpu, "waiting", &format!("{error:?}"))),
                }
                let mut state = SUCCESS;
                // SAFETY: writes a number
                self.api.check("asking", unsafe { (self.api.state)(own, &raw mut state) })?;
                if state != IN_PROGRESS {
                    self.api.check("between the GPUs", state)?;
                }
                self.link.failure().map_or(Ok(()), Err)?;
                std::thread::yield_now();
            }
        })
    }

    /// The `work`; if it fails, what NCCL still does is given up.
    fn with_communicator(&self, work: impl FnOnce(Communicator) -> Result<(), Failed>) -> Result<(), Failed> {
        let mut communicator = self.communicator.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let own = communicator.ok_or_else(|| Failed("NCCL was given up before".into()))?;
        work(own).inspect_err(|_| {
            *communicator = None;
            // SAFETY: the communicator is used for the last time; what it still waits for ends
            unsafe { (self.api.abort)(own) };
            self.stream.synchronize().ok(); // nobody writes to the tensors any more
        })
    }
}

impl Collective<Cuda<f32>> for Nccl {
    fn link(&self) -> &dyn Link {
        &*self.link
    }

    fn all_reduce(&self, mut tensors: Vec<Tensor<Cuda<f32>>>) -> Result<Sums<'_, Cuda<f32>>, Failed> {
        let places: Vec<_> = tensors.iter_mut().map(|x| (address(x), x.len())).collect();
        self.group(&places, |_, x, len, own, stream| {
            // SAFETY: x is this GPU's and so long, and kept until the sum is there; the stream comes to it after what wrote it
            unsafe { (self.api.all_reduce)(x, x, len, FLOAT, SUM, own, stream) }
        })?;
        Ok(Sums::new(tensors, || self.wait()))
    }

    fn broadcast(&self, tensors: Vec<(usize, &mut Tensor<Cuda<f32>>)>) -> Result<(), Failed> {
        let owners: Vec<c_int> = tensors.iter().map(|(owner, _)| *owner as c_int).collect();
        let places: Vec<_> = tensors.into_iter().map(|(_, x)| (address(x), x.len())).collect();
        self.group(&places, |i, x, len, own, stream| {
            // SAFETY: as above, and waited for below
            unsafe { (self.api.broadcast)(x, x, len, FLOAT, owners[i], own, stream) }
        })?;
        self.wait()
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        let communicator = self.communicator.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(own) = communicator.take() {
            // not ncclCommDestroy, which may wait for the others; there is nothing to wait for, since every group was
            // SAFETY: used for the last time
            unsafe { (self.api.abort)(own) };
        }
    }
}

/// The GPU that the backend runs on.
fn gpu(device: &Cuda<f32>) -> &Gpu {
    Gpu::of(device.executor()).expect("NCCL is for GPUs, and this device is none")
}

/// What a GPU failed at, and what was said.
fn failed(gpu: &Gpu, what: &str, why: &dyn Display) -> Failed {
    Failed(format!("cuda:{}: {what}: {why}", gpu.ordinal))
}

/// Lets the other GPUs of this machine reach this one's memory: within a process NCCL copies between the tensors themselves, and
/// memory of a pool is open to its own GPU alone unless that is said.
fn open_to_peers(gpu: &Gpu) -> Result<(), String> {
    if !gpu.pooled {
        return Ok(());
    }
    let code = |error: result::DriverError| format!("{:?}", error.0);
    let own = gpu.context.cu_device();
    // SAFETY: devices that the driver has counted, and numbers to write into
    unsafe {
        let pool = result::device::get_default_mem_pool(own).map_err(code)?;
        for peer in devices().map_err(|why| why.to_string())? {
            let peer = result::device::get(peer.ordinal as c_int).map_err(code)?;
            let mut can = 0;
            if peer != own {
                sys::cuDeviceCanAccessPeer(&raw mut can, peer, own).result().map_err(code)?;
            }
            if can != 0 {
                let location = sys::CUmemLocation {
                    type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
                    id: peer,
                };
                let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
                let access = sys::CUmemAccessDesc { location, flags };
                sys::cuMemPoolSetAccess(pool, &raw const access, 1).result().map_err(code)?;
            }
        }
    }
    Ok(())
}
