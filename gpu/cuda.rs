//! The executor on a real GPU, through cudarc: one context, one stream, memory from the driver's own pool and then kept, kernels
//! compiled by NVRTC, products by cuBLAS (plans.rs).
//!
//! Everything but NCCL's work (nccl.rs) is enqueued on the one stream, from whichever thread: so the order of calls is the order of effects, and memory
//! may be given to others as soon as the last launch that uses it has been asked for. With CUDA graphs what is asked for is written down
//! first (graphs.rs), in the same order.

use super::backend::Cuda;
use super::executor::{Address, Arg, Executor, Gemm, Launch, Type, pointers};
use super::graphs::{self, GraphUse, Graphs, Work};
use super::plans::{Plans, Shape, WORKSPACE};
use super::probe::{Unavailable, devices, reason};
use super::{FAILURE, compile, kernels};
use crate::autograd::at_work;
use cudarc::cublas::{CudaBlas, sys as blas_sys};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaStream, result, sys};
use cudarc::nvrtc::Ptx;
use std::any::Any;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::ffi::c_void;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard};

/// One GPU.
#[derive(Debug)]
pub(super) struct Gpu {
    pub ordinal: usize,
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    /// Whether memory comes from the driver's pool, in the order of the stream.
    pub pooled: bool,
    /// For batches of products. A handle must not be used by two threads at a time.
    blas: Mutex<CudaBlas>,
    /// For single products.
    plans: Mutex<Plans>,
    functions: HashMap<(&'static str, Type), CudaFunction>,
    kept: Mutex<Kept>,
    /// What has run since somebody asked for times.
    spans: Mutex<Option<Vec<Span>>>,
    /// None: work is enqueued as it is asked for.
    graphs: Mutex<Option<Graphs>>,
}

/// A call that failed: which one, and what was said.
#[derive(Debug)]
pub(super) struct Refused {
    call: String,
    why: String,
}

impl Refused {
    /// Of an error of this call.
    pub fn of<E: Debug>(call: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |error| Self { call: call.into(), why: format!("{error:?}") }
    }
}

/// Memory that has been given back, for the next who asks for as much. The driver's own pool takes some microseconds for what this does
/// in a tenth of one, and an optimizer's step makes a thousand tensors. Nothing need be waited for: the next user's work comes behind
/// the last one's in the stream.
#[derive(Debug, Default)]
struct Kept {
    /// By bytes, as [`rounded`]; the lowest goes first, so that a step which begins with the same tensors as one before uses the same
    /// addresses, whatever order they came back in: graphs then fit.
    free: HashMap<usize, BinaryHeap<Reverse<Address>>>,
    /// Bytes in use, and the most that there were at one time.
    used: usize,
    most: usize,
}

/// Tensors of almost one size share what they leave behind; at most an eighth is lost, if they are not tiny.
fn rounded(bytes: usize) -> usize {
    let grain = (bytes.next_power_of_two() / 16).clamp(512, 2 << 20);
    bytes.max(1).next_multiple_of(grain) // the driver has no empty allocations
}

/// Something that ran on the device: which kernel (of cuBLAS, `gemm` and the sizes), from when to when, and its FLOPs if it is a product.
#[derive(Debug)]
struct Span {
    kernel: String,
    between: [CudaEvent; 2],
    flops: f64,
}

/// How long a kernel took on the device, over all its calls.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KernelTime {
    pub calls: usize,
    pub seconds: f64,
    /// Of products; 0 for other kernels.
    pub flops: f64,
}

impl Cuda<f32> {
    /// Opens a GPU and compiles the kernels for it, a few seconds the first time.
    ///
    /// # Errors
    /// What [`devices`] says; no such device; a device that fails.
    pub fn open(ordinal: usize) -> Result<Self, Unavailable> {
        let found = devices()?;
        let device = found.get(ordinal).ok_or(Unavailable::NoSuchDevice(ordinal, found.len()))?;
        let [major, minor] = device.capability;
        let failed =
            |what: &str, why: &dyn Debug| Unavailable::Failed(format!("cuda:{ordinal}: {what}: {why:?}"));
        let driver =
            |error: result::DriverError| Unavailable::Failed(format!("cuda:{ordinal}: {}", reason(error)));

        let context = CudaContext::new(ordinal).map_err(driver)?;
        let stream = context.new_stream().map_err(driver)?;
        let pooled = context.has_async_alloc();
        if pooled {
            keep_freed_memory(&context).map_err(driver)?;
        }
        let blas = CudaBlas::new(stream.clone()).map_err(|e| failed("cuBLAS", &e))?;
        // where a sum of bf16 products is split, its parts are otherwise rounded to bf16 too
        use blas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION as F32_SUMS;
        // SAFETY: the handle is open
        let set = unsafe { blas_sys::cublasSetMathMode(*blas.handle(), F32_SUMS) };
        set.result().map_err(|e| failed("cuBLAS", &e))?;
        // SAFETY: the context was made this thread's own when it was opened, and the stream is alive
        let workspace = unsafe { allocate(&stream, pooled, WORKSPACE) }.map_err(driver)?;
        let plans =
            Plans::new(workspace, &device.name, compile::cache()).map_err(|e| failed("cuBLAS", &e))?;
        let images = compile::cubins(&format!("sm_{major}{minor}")).map_err(|e| failed("kernels", &e))?;
        let load = |(element, image)| Ok((element, context.load_module(Ptx::from_binary(image))?));
        let modules = images.into_iter().map(load).collect::<Result<HashMap<_, _>, _>>().map_err(driver)?;
        let function = |(kernel, element): (&'static str, Type)| {
            let function = modules[&element].load_function(&kernels::name(kernel, element));
            function.map(|function| ((kernel, element), function))
        };
        let functions = kernels::all().into_iter().map(function).collect::<Result<_, _>>().map_err(driver)?;
        // SAFETY: the handle is open, and the memory there for as long; one stream is all that either library works on
        let set =
            unsafe { blas_sys::cublasSetWorkspace_v2(*blas.handle(), workspace as *mut c_void, WORKSPACE) };
        set.result().map_err(|e| failed("cuBLAS", &e))?;
        let cuda = Self::on(Arc::new(Gpu {
            ordinal,
            context,
            stream,
            pooled,
            blas: Mutex::new(blas),
            plans: Mutex::new(plans),
            functions,
            kept: Mutex::default(),
            spans: Mutex::default(),
            graphs: Mutex::default(),
        }));
        if std::env::var_os(graphs::SWITCH).is_some_and(|value| value == "1") {
            cuda.use_graphs(true)?;
        }
        Ok(cuda)
    }

    /// Whether work that comes again is launched as CUDA graphs, from now on. At first it is not, unless RANKGRAD_CUDA_GRAPHS=1 stands in
    /// the environment. Results are the same; a failure is noticed later, and near another op.
    ///
    /// # Errors
    /// A driver that is too old for them.
    pub fn use_graphs(&self, on: bool) -> Result<(), Unavailable> {
        let Some(gpu) = self.gpu() else { return Ok(()) };
        if on && !graphs::supported() {
            let why = "graphs need a driver for CUDA 12.3 or later: leave out";
            return Err(Unavailable::Failed(format!("cuda:{}: {why} {}", gpu.ordinal, graphs::SWITCH)));
        }
        let mut graphs = gpu.alone();
        if let Some(mut before) = graphs.take() {
            before.forget(gpu);
        }
        *graphs = on.then(Graphs::default);
        Ok(())
    }

    /// What graphs did since [`Cuda::use_graphs`]; None without them.
    pub fn graph_use(&self) -> Option<GraphUse> {
        self.gpu()?.graphs().as_ref().map(|graphs| graphs.seen)
    }

    fn gpu(&self) -> Option<&Gpu> {
        Gpu::of(self.executor())
    }

    /// From now on, and until [`Cuda::kernel_times`], takes the time of each kernel: by events on the device, which take some
    /// microseconds each themselves.
    pub fn watch_kernels(&self) {
        if let Some(gpu) = self.gpu() {
            gpu.pause_graphs(true);
            *gpu.spans() = Some(Vec::new());
        }
    }

    /// The times since [`Cuda::watch_kernels`], by name and type of elements, products by their sizes too. Waits for the device.
    ///
    /// # Panics
    /// If the device has failed.
    pub fn kernel_times(&self) -> BTreeMap<String, KernelTime> {
        let mut times = BTreeMap::<String, KernelTime>::new();
        let Some(gpu) = self.gpu() else { return times };
        gpu.pause_graphs(false);
        for Span { kernel, between: [from, to], flops } in gpu.spans().take().unwrap_or_default() {
            let time = times.entry(kernel).or_default();
            time.calls += 1;
            time.seconds += 1e-3 * f64::from(gpu.must(from.elapsed_ms(&to).map_err(Refused::of("times"))));
            time.flops += flops;
        }
        times
    }

    /// The most bytes that tensors and the like held at one time since the device was opened.
    pub fn peak_bytes(&self) -> usize {
        self.gpu().map_or(0, |gpu| gpu.kept().most)
    }
}

/// By default the pool returns what is free to the driver whenever the stream is waited for, which a training step does.
fn keep_freed_memory(context: &CudaContext) -> Result<(), result::DriverError> {
    use sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as THRESHOLD;
    let mut bytes = u64::MAX;
    // SAFETY: the device is there, and the attribute is an u64
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, THRESHOLD, (&raw mut bytes).cast())
    }
}

/// # Safety
/// The stream's context must be this thread's own.
unsafe fn allocate(stream: &CudaStream, pooled: bool, bytes: usize) -> Result<Address, result::DriverError> {
    // SAFETY: the caller's promise
    unsafe {
        match pooled {
            true => result::malloc_async(stream.cu_stream(), bytes),
            false => result::malloc_sync(bytes),
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // what is written down nobody will read; what fails here, at the end, is past mending
        if let Some(mut graphs) = self.graphs().take() {
            graphs.forget(self);
        }
        self.give_back().ok();
        let workspace = self.plans.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).workspace;
        // SAFETY: the plans are not used any more
        unsafe { self.release(workspace) }.ok();
    }
}

impl Gpu {
    /// The GPU that an executor is, unless it is another kind.
    pub fn of(executor: &dyn Executor) -> Option<&Self> {
        (executor as &dyn Any).downcast_ref()
    }

    /// The value, or a panic that says which GPU failed at what, and near which op.
    #[track_caller]
    pub fn must<T>(&self, outcome: Result<T, Refused>) -> T {
        outcome.unwrap_or_else(|Refused { call, why }| {
            panic!(
                "{FAILURE}{}: {call}: {why}{} (what a kernel did wrong is noticed later: CUDA_LAUNCH_BLOCKING=1 has it noticed at once)",
                self.ordinal,
                at_work()
            )
        })
    }

    fn spans(&self) -> MutexGuard<'_, Option<Vec<Span>>> {
        self.spans.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn graphs(&self) -> MutexGuard<'_, Option<Graphs>> {
        self.graphs.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Enqueues what is only written down, and keeps others from writing more, or capturing the stream, while the guard lives. Whoever enqueues or waits
    /// by other ways than `put` needs it.
    pub fn alone(&self) -> MutexGuard<'_, Option<Graphs>> {
        let mut graphs = self.graphs();
        if let Some(graphs) = &mut *graphs {
            graphs.flush(self);
        }
        graphs
    }

    fn pause_graphs(&self, pause: bool) {
        if let Some(graphs) = &mut *self.alone() {
            graphs.paused = pause;
        }
    }

    /// Has a piece of work done after all before: now, or when graphs have enough of them.
    ///
    /// # Safety
    /// The device must have allocated what the work's addresses are taken for, and no C may overlap an operand; the arguments must be
    /// those of the kernel.
    unsafe fn put(&self, work: Work, args: &[Arg], bytes: &[u8]) {
        let mut graphs = self.graphs();
        match &mut *graphs {
            // SAFETY: the caller's promise
            Some(graphs) if !graphs.paused => unsafe { graphs.put(self, work, args, bytes) },
            _ => {
                drop(graphs);
                self.enter();
                // SAFETY: the caller's promise
                self.must(unsafe { self.enqueue(work, args, bytes) });
            }
        }
    }

    /// Enqueues a piece of work, between two events if somebody watches. An upload comes from ordinary memory: the driver has taken its copy
    /// when this returns.
    ///
    /// # Errors
    /// What the driver or cuBLAS says.
    ///
    /// # Safety
    /// As for `put`; the context must be this thread's own.
    pub unsafe fn enqueue(&self, work: Work, args: &[Arg], bytes: &[u8]) -> Result<(), Refused> {
        let stream = self.stream.cu_stream();
        // SAFETY: the caller's promise
        unsafe {
            match work {
                Work::Upload { to, .. } => {
                    result::memcpy_htod_async(to, bytes, stream).map_err(Refused::of("upload"))
                }
                Work::Copy { from, to, bytes } => {
                    result::memcpy_dtod_async(to, from, bytes, stream).map_err(Refused::of("copy"))
                }
                Work::Zero { at, bytes } => {
                    result::memset_d8_async(at, 0, bytes, stream).map_err(Refused::of("gemm"))
                }
                Work::Launch { launch, .. } => self.start(launch, args),
                Work::Product { shape, add, operands } => {
                    let plans = self.plans();
                    let run = || {
                        let done = plans.run(&self.stream, &shape, operands, add);
                        done.map_err(|why| Refused::of(name(&shape, 1))(why))
                    };
                    self.span(|| name(&shape, 1), flops(&shape), run)
                }
                Work::Batch { shape, add, count, table } => self.batch(shape, add, count, table),
            }
        }
    }

    /// Enqueues something, between two events if somebody watches.
    fn span(
        &self,
        kernel: impl FnOnce() -> String,
        flops: f64,
        enqueue: impl FnOnce() -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let mut spans = self.spans();
        let Some(spans) = &mut *spans else {
            drop(spans); // others need not wait for the driver
            return enqueue();
        };
        let now = || {
            let event = self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
            event.map_err(Refused::of("times"))
        };
        let from = now()?;
        enqueue()?;
        spans.push(Span { kernel: kernel(), between: [from, now()?], flops });
        Ok(())
    }

    /// The compiled kernel.
    pub fn function(&self, launch: &Launch) -> &CudaFunction {
        &self.functions[&(launch.kernel, launch.element)]
    }

    /// # Safety
    /// As for `enqueue`.
    unsafe fn start(&self, launch: Launch, args: &[Arg]) -> Result<(), Refused> {
        let Launch { kernel, element, grid: [x, y, z], threads, shared } = launch;
        let function = self.function(&launch);
        if shared > 48 << 10 {
            // more than every device gives without being asked
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
            function.set_attribute(SHARED, shared as i32).map_err(Refused::of(kernel))?;
        }
        let (function, stream) = (function.cu_function(), self.stream.cu_stream());
        let mut args = pointers(args);
        self.span(
            || format!("{kernel} {element}"),
            0.0,
            || {
                // SAFETY: the caller's promise
                let started = unsafe {
                    result::launch_kernel(function, (x, y, z), (threads, 1, 1), shared, stream, &mut args)
                };
                started.map_err(Refused::of(kernel))
            },
        )
    }

    /// # Safety
    /// As for `enqueue`.
    unsafe fn batch(&self, shape: Shape, add: bool, count: usize, table: Address) -> Result<(), Refused> {
        use blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F as COMPUTE;
        use blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DFALT as ALGORITHM;
        use blas_sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        use blas_sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        // the library reads by columns, so what it sees is transposed: Cᵀ = op(B)ᵀ·op(A)ᵀ, with B first
        let Shape { types, sizes: [m, k, n], transposed: [ta, tb], rows } = shape;
        let [t, t_sums] = types.map(|element| match element {
            Type::F32 => CUDA_R_32F,
            Type::Bf16 => CUDA_R_16BF,
        });
        let operation = |t: bool| if t { CUBLAS_OP_T } else { CUBLAS_OP_N };
        let int = |size: usize| i32::try_from(size).expect("a side of a matrix below 2³¹");
        let [lda, ldb, ldc] = rows.map(int);
        let (opa, opb, m, n, k) = (operation(ta), operation(tb), int(m), int(n), int(k));
        let (alpha, beta) = (1f32, if add { 1f32 } else { 0f32 });
        let (alpha, beta) = ((&raw const alpha).cast(), (&raw const beta).cast());
        let blas = self.blas.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let handle = *blas.handle();
        let side = |i: usize| table + (i * count * size_of::<Address>()) as u64;
        let (a, b, c) =
            (side(0) as *const *const c_void, side(1) as *const *const c_void, side(2) as *const *mut c_void);
        let run = || {
            // SAFETY: the caller's promise
            let done = unsafe {
                blas_sys::cublasGemmBatchedEx(
                    handle,
                    opb,
                    opa,
                    n,
                    m,
                    k,
                    alpha,
                    b,
                    t,
                    ldb,
                    a,
                    t,
                    lda,
                    beta,
                    c,
                    t_sums,
                    ldc,
                    int(count),
                    COMPUTE,
                    ALGORITHM,
                )
            };
            done.result().map_err(Refused::of("a batch of products"))
        };
        self.span(|| name(&shape, count), count as f64 * flops(&shape), run)
    }

    /// Makes the plan for a shape, unless there is one.
    ///
    /// # Safety
    /// As for `put`.
    unsafe fn plan(&self, shape: Shape, [a, b, c]: [Address; 3], add: bool) {
        if self.plans().has(&shape) {
            return;
        }
        let elsewhere = add.then(|| self.elsewhere(&shape)); // C is there to be added to
        let _alone = self.alone();
        self.enter();
        // SAFETY: the caller's promise; what is elsewhere is as long as C, and freed behind its last use
        let made = unsafe {
            let made = self.plans().make(&self.stream, shape, [a, b, elsewhere.map_or(c, |c| c.0)]);
            if let Some((address, bytes)) = elsewhere {
                self.free(address, bytes);
            }
            made
        };
        self.must(made.map_err(|why| Refused::of(name(&shape, 1))(why)));
    }

    /// Memory that is as long as a C, and its bytes.
    fn elsewhere(&self, shape: &Shape) -> (Address, usize) {
        let bytes = shape.types[1].bytes() * shape.sizes[0] * shape.rows[2];
        (self.alloc(bytes), bytes)
    }

    /// Whether a batch is faster product by product, as is measured when one comes for the first time. Those of many matrices are not: they
    /// would cost the host as many launches.
    ///
    /// # Safety
    /// As for `put`.
    unsafe fn apart(&self, shape: Shape, operands: &[[Address; 3]], add: bool) -> bool {
        const MOST: usize = 4;
        let count = operands.len();
        if count > MOST {
            return false;
        }
        if let Some(known) = self.plans().apart(shape, count) {
            return known;
        }
        let elsewhere: Vec<_> = operands.iter().filter(|_| add).map(|_| self.elsewhere(&shape)).collect();
        let mut operands = operands.to_vec();
        operands.iter_mut().zip(&elsewhere).for_each(|([.., c], other)| *c = other.0);
        // SAFETY: the caller's promise; what is elsewhere is as long as a C, and it and the table are freed behind their last use
        let compared = unsafe {
            self.plan(shape, operands[0], false);
            let table = self.table(&operands);
            let _alone = self.alone();
            self.enter();
            let batch = || self.batch(shape, false, count, table.0).map_err(|refused| refused.why);
            let singles = |plans: &Plans| {
                operands.iter().try_for_each(|&operands| plans.run(&self.stream, &shape, operands, false))
            };
            let compared = self.plans().compare(&self.stream, (shape, count), batch, singles);
            elsewhere.into_iter().chain([table]).for_each(|(address, bytes)| self.free(address, bytes));
            compared
        };
        self.must(compared.map_err(|why| Refused::of(name(&shape, count))(why)))
    }

    /// The addresses of a batch on the device, first of all A, then of all B, then of all C: where, and how many bytes.
    fn table(&self, operands: &[[Address; 3]]) -> (Address, usize) {
        let mut addresses = Vec::with_capacity(size_of_val(operands));
        for side in 0..3 {
            operands.iter().for_each(|operand| addresses.extend_from_slice(&operand[side].to_ne_bytes()));
        }
        let table = self.alloc(addresses.len());
        // SAFETY: the table is as long
        unsafe { self.upload(&addresses, table) };
        (table, addresses.len())
    }

    /// Makes the context this thread's own: the driver's calls refer to it.
    pub fn enter(&self) {
        self.must(self.context.bind_to_thread().map_err(Refused::of("entering its context")));
    }

    fn wait(&self) {
        self.must(self.stream.synchronize().map_err(Refused::of("waiting")));
    }

    fn plans(&self) -> MutexGuard<'_, Plans> {
        self.plans.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Memory that is not taken from what others leave, and makes nobody give up anything.
    ///
    /// # Errors
    /// What the driver says.
    pub fn find(&self, bytes: usize) -> Result<Address, Refused> {
        self.try_alloc(bytes).map_err(Refused::of("memory"))
    }

    /// # Safety
    /// The memory must come from `find`, and be used by no work that is still to be enqueued.
    pub unsafe fn give_up(&self, address: Address) {
        // SAFETY: the caller's promise; what fails here is a device that has failed, which others will say
        unsafe { self.release(address) }.ok();
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn try_alloc(&self, bytes: usize) -> Result<Address, result::DriverError> {
        // SAFETY: the context is this thread's own, and the stream is alive
        unsafe { allocate(&self.stream, self.pooled, bytes) }
    }

    /// # Safety
    /// The memory must come from `try_alloc`, and not be used again.
    unsafe fn release(&self, address: Address) -> Result<(), result::DriverError> {
        self.context.bind_to_thread()?;
        // SAFETY: the caller's promise; without a pool, all work that may use the memory is waited for
        unsafe {
            if self.pooled {
                return result::free_async(address, self.stream.cu_stream());
            }
            self.stream.synchronize()?;
            result::free_sync(address)
        }
    }

    /// What is free in the driver's pool becomes free for any size.
    fn trim(&self) -> Result<(), result::DriverError> {
        if !self.pooled {
            return Ok(());
        }
        // SAFETY: the device is there, and so is its pool
        unsafe {
            result::device::get_default_mem_pool(self.context.cu_device())
                .and_then(|pool| result::mem_pool::trim_to(pool, 0))
        }
    }

    /// Gives all that is kept back to the driver.
    fn give_back(&self) -> Result<(), result::DriverError> {
        let all = std::mem::take(&mut self.kept().free);
        // SAFETY: nobody has the addresses
        all.into_values().flatten().try_for_each(|Reverse(address)| unsafe { self.release(address) })
    }
}

/// A product's name and sizes, for people.
fn name(shape: &Shape, count: usize) -> String {
    let Shape { types, sizes: [m, k, n], transposed: [ta, tb], .. } = shape;
    let [element, result] = types;
    let operand = |t: bool, rows: usize, cols: usize| {
        if t { format!("({cols}×{rows})ᵀ") } else { format!("{rows}×{cols}") }
    };
    let batch = if count > 1 { format!("{count} of ") } else { String::new() };
    let sums = if result == element { String::new() } else { format!(" to {result}") };
    format!("gemm {element}{sums} {batch}{}·{}", operand(*ta, *m, *k), operand(*tb, *k, *n))
}

fn flops(shape: &Shape) -> f64 {
    2.0 * shape.sizes.iter().map(|&size| size as f64).product::<f64>()
}

impl Executor for Gpu {
    fn alloc(&self, bytes: usize) -> Address {
        let size = rounded(bytes);
        {
            let mut kept = self.kept();
            kept.used += size;
            kept.most = kept.most.max(kept.used);
            if let Some(Reverse(address)) = kept.free.get_mut(&size).and_then(BinaryHeap::pop) {
                return address;
            }
        }
        let mut graphs = self.graphs(); // not while the stream is captured: the memory would be the graph's
        self.enter();
        self.try_alloc(size)
            .or_else(|_| {
                if let Some(graphs) = &mut *graphs {
                    graphs.flush(self); // it may use what is kept
                }
                // what is kept in other sizes, and what the work so far still holds, will be free after it
                self.give_back()?;
                self.stream.synchronize()?;
                self.trim()?;
                self.try_alloc(size)
            })
            .unwrap_or_else(|error| {
                self.kept().used -= size;
                let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
                let (free, total) = self.context.mem_get_info().unwrap_or_default();
                panic!(
                    "{FAILURE}{}: {:.3} GiB asked for{}, {:.3} of {:.3} GiB free ({}): use a smaller --batch or --context",
                    self.ordinal,
                    gib(bytes),
                    at_work(),
                    gib(free),
                    gib(total),
                    reason(error)
                )
            })
    }

    unsafe fn free(&self, address: Address, bytes: usize) {
        let size = rounded(bytes);
        let mut kept = self.kept();
        kept.used -= size;
        kept.free.entry(size).or_default().push(Reverse(address));
    }

    unsafe fn upload(&self, from: &[u8], to: Address) {
        // SAFETY: the caller's promise
        unsafe { self.put(Work::Upload { to, bytes: from.len() }, &[], from) };
    }

    unsafe fn download(&self, from: Address, to: &mut [u8]) {
        let _alone = self.alone();
        self.enter();
        // SAFETY: the caller's promise, and `to` is waited for below
        let asked = unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) };
        self.must(asked.map_err(Refused::of("download")));
        self.wait();
    }

    unsafe fn copy(&self, from: Address, to: Address, bytes: usize) {
        // SAFETY: the caller's promise
        unsafe { self.put(Work::Copy { from, to, bytes }, &[], &[]) };
    }

    unsafe fn launch(&self, launch: Launch, args: &[Arg]) {
        if !launch.grid.contains(&0) {
            // SAFETY: the caller's promise
            unsafe { self.put(Work::Launch { launch, args: args.len() }, args, &[]) };
        }
    }

    unsafe fn gemm(&self, gemm: &Gemm) {
        let Gemm { element, result, m, k, n, transposed, rows, add, ref operands } = *gemm;
        let shape = Shape { types: [element, result], sizes: [m, k, n], transposed, rows };
        if k == 0 {
            assert!(rows[2] == n, "gemm: no sums for columns of a matrix");
            for &[.., c] in operands.iter().filter(|_| !add) {
                // SAFETY: the caller's promise
                unsafe { self.put(Work::Zero { at: c, bytes: result.bytes() * m * n }, &[], &[]) };
            }
            return;
        }
        // SAFETY: the caller's promise
        unsafe {
            if operands.len() == 1 || self.apart(shape, operands, add) {
                self.plan(shape, operands[0], add);
                for &operands in operands {
                    self.put(Work::Product { shape, add, operands }, &[], &[]);
                }
                return;
            }
            let table = self.table(operands);
            self.put(Work::Batch { shape, add, count: operands.len(), table: table.0 }, &[], &[]);
            self.free(table.0, table.1); // behind the batch
        }
    }

    fn sync(&self) {
        let _alone = self.alone();
        self.wait();
    }
}
