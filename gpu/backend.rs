//! The backend of GPUs: each method checks what its kernel relies on, and launches it. The kernels, with their formulas, are in
//! gpu/kernels/; memory, launches and matrix products are the executor's.
//!
//! Letters: n rows, d columns of a tensor read as rows of its last axis; dy gradient of y.

use super::executor::{Address, Arg, Executor, Gemm, Launch, Type};
use crate::lowrank::Radius;
use crate::tensor::{
    Accum, AdamWStep, AdamWUpdate, Attention, Axpby, Backend, Bf16, Binary, Columns, Element, Mat, Shape,
    Tensor, Unary, apart, columns_of,
};
use std::marker::PhantomData;
use std::sync::Arc;

/// Arguments of a kernel.
macro_rules! args {
    ($($x:expr),* $(,)?) => { &[$(Arg::from($x)),*] };
}

/// A GPU whose tensors have elements of type `T` (f32 or [`Bf16`]). It computes in f32 whatever `T` is.
#[derive(Clone, Debug)]
pub struct Cuda<T> {
    executor: Arc<dyn Executor>,
    element: PhantomData<T>,
}

impl Cuda<f32> {
    /// On an executor that is open.
    pub fn on(executor: Arc<dyn Executor>) -> Self {
        Self { executor, element: PhantomData }
    }
}

impl<T: OnGpu> Cuda<T> {
    /// The same device, with tensors of another type. For attention in bf16 a GPU needs compute capability 8.0.
    pub fn with_elements<U: OnGpu>(&self) -> Cuda<U> {
        Cuda { executor: self.executor.clone(), element: PhantomData }
    }

    /// What it runs on.
    #[cfg(feature = "cuda")]
    pub(super) fn executor(&self) -> &dyn Executor {
        &*self.executor
    }

    fn alloc(&self, bytes: usize) -> Memory {
        Memory { executor: self.executor.clone(), address: self.executor.alloc(bytes), bytes }
    }

    /// Host values of any plain type on the device, for the time of one launch.
    fn stage<V: Plain>(&self, values: &[V]) -> Memory {
        let memory = self.alloc(size_of_val(values));
        // SAFETY: V is a number without padding, and the memory is as long
        unsafe {
            let bytes = std::slice::from_raw_parts(values.as_ptr().cast(), memory.bytes);
            self.executor.upload(bytes, memory.address);
        }
        memory
    }

    /// # Safety
    /// The arguments must be those of the kernel, in number, type and meaning.
    unsafe fn launch(&self, kernel: &'static str, grid: [usize; 3], threads: u32, args: &[Arg]) {
        let grid = grid.map(int);
        // SAFETY: the caller's promise
        unsafe { self.executor.launch(Launch { kernel, element: T::TYPE, grid, threads, shared: 0 }, args) }
    }

    /// A kernel that looks at `n` elements, each by itself: a thread for 32 bytes.
    ///
    /// # Safety
    /// As for `launch`.
    unsafe fn each(&self, kernel: &'static str, n: usize, args: &[Arg]) {
        let n = n.div_ceil(2 * Self::PACK);
        let threads = threads(n);
        // SAFETY: the caller's promise
        unsafe { self.launch(kernel, [blocks(n, threads), 1, 1], threads, args) }
    }

    /// A kernel that looks at the elements of each (alpha, x, beta, y) of a batch, each by itself; alpha and beta may have no meaning.
    ///
    /// # Safety
    /// The kernel's Terms must have y of type `Y`, and x of type `X`; `more` must be its other arguments.
    unsafe fn each_term<'a, X: OnGpu, Y: OnGpu>(
        &self,
        kernel: &'static str,
        terms: impl IntoIterator<Item = (f64, &'a Tensor<Cuda<X>>, f64, &'a mut Tensor<Cuda<Y>>)>,
        more: &[Arg],
    ) {
        let row = |(alpha, x, beta, y): (f64, &Tensor<Cuda<X>>, f64, &mut Tensor<Cuda<Y>>)| {
            assert!(x.len() == y.len(), "{kernel}: {} and {}", x.shape(), y.shape());
            let [alpha, beta] = [alpha, beta].map(|x| u64::from((x as f32).to_bits()));
            [address(y), checked::<X>(x.buffer(), x.len()).address(), alpha | beta << 32, x.len() as u64]
        };
        // SAFETY: the caller's promise, and each row has the fields of a Term
        unsafe { self.each_row(kernel, terms.into_iter().map(row).collect(), |[.., n]| n as usize, more) };
    }

    /// A kernel that looks at the elements of some tensors for each row of a table, each element by itself. `len`: how many.
    ///
    /// # Safety
    /// The rows must be the structs that the kernel takes first, and `more` its other arguments.
    unsafe fn each_row<const N: usize>(
        &self,
        kernel: &'static str,
        table: Vec<[u64; N]>,
        len: impl Fn([u64; N]) -> usize,
        more: &[Arg],
    ) {
        let Some(most) = table.iter().copied().map(len).max() else { return };
        let grid = [table.len(), blocks(most.div_ceil(2 * Self::PACK), THREADS).min(512), 1];
        let staged = self.stage(table.as_flattened());
        // SAFETY: the caller's promise
        unsafe { self.launch(kernel, grid, THREADS, &[args![&staged], more].concat()) };
    }

    /// Elements of 16 bytes, which kernels load and store at once.
    const PACK: usize = 16 / size_of::<T>();

    /// Threads of a block, and how many rows of `d` columns it takes side by side. As gpu/kernels/common.cuh has it: a warp for each
    /// row of up to 4 KiB, otherwise a block.
    fn sides(d: usize) -> (u32, usize) {
        match d * size_of::<T>() {
            0..=4096 => (128, 4),
            bytes => ((bytes / 64).next_multiple_of(32).min(512) as u32, 1), // four packs for a thread, or more
        }
    }

    /// A kernel that looks at each of `n` rows of `d` columns.
    ///
    /// # Safety
    /// As for `launch`.
    unsafe fn rows(&self, kernel: &'static str, [n, d]: [usize; 2], args: &[Arg]) {
        let (threads, sides) = Self::sides(d);
        // SAFETY: the caller's promise
        unsafe { self.launch(kernel, [n.div_ceil(sides), 1, 1], threads, args) }
    }

    /// Sums over the rows of [n, d] by a kernel that ends with the arguments (y, n, d, chunk) → \[d\]: so many chunks of rows that
    /// the device is busy, then their sum.
    ///
    /// # Safety
    /// As for `launch`.
    unsafe fn column_sums(&self, kernel: &'static str, [n, d]: [usize; 2], inputs: &[Arg]) -> Tensor<Self> {
        // rows that one block adds: few, but not so few that adding up the chunks takes as long again
        let chunk = n.div_ceil(512).max(128);
        // SAFETY: the caller's promise
        let sums = unsafe { self.chunk_sums(kernel, [n, d], chunk, 256, inputs) }; // [chunks, d]
        self.total(sums) // [d]
    }

    /// The sum of the rows of [chunks, d] → \[d\].
    fn total(&self, mut sums: Tensor<Cuda<f32>>) -> Tensor<Self> {
        let (chunks, d) = (sums.rows(), sums.cols());
        if chunks != 1 {
            // SAFETY: (x, …)
            sums =
                unsafe { self.wide().chunk_sums("sum_rows", [chunks, d], chunks.max(1), 1024, args![&sums]) }; // [1, d]
        }
        sums.reshape([d]).cast(self) // [d]
    }

    /// The sum of each `chunk` rows, one chunk if there are no rows → [chunks, d], in f32 for the next sum to go on with.
    ///
    /// # Safety
    /// As for `column_sums`.
    unsafe fn chunk_sums(
        &self,
        kernel: &'static str,
        [n, d]: [usize; 2],
        chunk: usize,
        threads: u32,
        inputs: &[Arg],
    ) -> Tensor<Cuda<f32>> {
        let chunks = n.div_ceil(chunk).max(1);
        let mut y = Tensor::scratch(&self.wide(), [chunks, d]); // [chunks, d]
        let args = [inputs, args![&mut y, n as u64, int(d), int(chunk)]].concat();
        // SAFETY: the caller's promise, and y has a row for each chunk
        unsafe { self.launch(kernel, [d.div_ceil(32 * Self::PACK), chunks, 1], threads, &args) };
        y
    }

    /// Σ over all elements of each tensor, by a kernel that writes one f64 for each part of it. f64, on the device; None for none.
    fn totals(kernel: &'static str, xs: &[&Tensor<Self>]) -> Option<Memory> {
        let device = xs.first()?.device();
        let parts = |x: &Tensor<Self>| x.len().div_ceil(2 * Self::PACK * THREADS as usize).clamp(1, 512);
        let each = |&x: &&Tensor<Self>| {
            [checked::<T>(x.buffer(), x.len()).address(), x.len() as u64, parts(x) as u64]
        };
        let all = device.stage(&xs.iter().flat_map(each).collect::<Vec<u64>>());
        let most = xs.iter().map(|x| parts(x)).max().expect("there is one");
        let [parts, sums] = [xs.len() * most, xs.len()].map(|n| device.alloc(n * size_of::<f64>()));
        // SAFETY: (all, parts), with a row of parts for each tensor; (all, parts, sums, most)
        unsafe {
            device.launch(kernel, [xs.len(), most, 1], THREADS, args![&all, &parts]);
            device.launch("sum_parts", [xs.len(), 1, 1], THREADS, args![&all, &parts, &sums, int(most)]);
        }
        Some(sums)
    }
}

/// Σx² of some tensors, in f64 on the device; None: of no tensor.
pub struct Squares(Option<Memory>);

/// Numbers that may be copied as bytes.
pub trait Plain: Copy + Default {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for f32 {}
impl Plain for Bf16 {}
impl Plain for f64 {}

/// Types of elements that there are kernels for.
pub trait OnGpu: Element + Plain {
    /// The type, as kernels have it.
    const TYPE: Type;
    /// [`Backend::widen`].
    fn widen(xs: &[&Tensor<Cuda<Self>>]) -> Vec<Tensor<Cuda<f32>>>;
    /// [`Backend::narrow`].
    fn narrow(device: &Cuda<Self>, xs: &[&Tensor<Cuda<f32>>]) -> Vec<Tensor<Cuda<Self>>>;
}

impl OnGpu for f32 {
    const TYPE: Type = Type::F32;
    fn widen(xs: &[&Tensor<Cuda<f32>>]) -> Vec<Tensor<Cuda<f32>>> {
        xs.iter().copied().cloned().collect()
    }
    fn narrow(_: &Cuda<f32>, xs: &[&Tensor<Cuda<f32>>]) -> Vec<Tensor<Cuda<f32>>> {
        xs.iter().copied().cloned().collect()
    }
}

impl OnGpu for Bf16 {
    const TYPE: Type = Type::Bf16;
    fn widen(xs: &[&Tensor<Cuda<Bf16>>]) -> Vec<Tensor<Cuda<f32>>> {
        let Some(first) = xs.first() else { return Vec::new() };
        let scratch = |x: &&Tensor<Cuda<Bf16>>| Tensor::scratch(&x.device().wide(), x.shape()); // like x
        let mut ys: Vec<_> = xs.iter().map(scratch).collect();
        let terms = xs.iter().zip(&mut ys).map(|(x, y)| (0.0, *x, 0.0, y));
        // SAFETY: its terms are to f32 from bf16
        unsafe { first.device().each_term("widen", terms, &[]) };
        ys
    }
    fn narrow(device: &Cuda<Bf16>, xs: &[&Tensor<Cuda<f32>>]) -> Vec<Tensor<Cuda<Bf16>>> {
        let mut ys: Vec<_> = xs.iter().map(|x| Tensor::scratch(device, x.shape())).collect(); // like x
        let terms = xs.iter().zip(&mut ys).map(|(x, y)| (0.0, *x, 0.0, y));
        // SAFETY: its terms are to bf16 from f32
        unsafe { device.each_term("narrow", terms, &[]) };
        ys
    }
}

/// Sizes that a kernel counts in 32 bits.
fn int(x: usize) -> u32 {
    u32::try_from(x).unwrap_or_else(|_| panic!("GPU: a size of {x} is beyond 32 bits"))
}

/// Threads of a block.
const THREADS: u32 = 256;

/// Threads of a block for `n` elements: no more than are needed.
fn threads(n: usize) -> u32 {
    n.next_multiple_of(32).clamp(32, THREADS as usize) as u32
}

/// Blocks for `n` elements: one thread each, up to so many as keep the largest device busy.
fn blocks(n: usize, threads: u32) -> usize {
    n.div_ceil(threads as usize).min(4096)
}

/// A run of device memory, given back when dropped.
#[derive(Debug)]
pub struct Memory {
    executor: Arc<dyn Executor>,
    address: Address,
    bytes: usize,
}

impl Memory {
    pub(super) fn address(&self) -> Address {
        self.address
    }

    /// What is in it, on the host.
    fn fetch<V: Plain>(&self) -> Vec<V> {
        let mut values = vec![V::default(); self.bytes / size_of::<V>()];
        // SAFETY: any bytes are a V, and the vector is as long as the memory
        unsafe {
            let bytes = std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), self.bytes);
            self.executor.download(self.address, bytes);
        }
        values
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with as many bytes, and nobody has the address but work that comes before
        unsafe { self.executor.free(self.address, self.bytes) }
    }
}

/// Elements of a tensor on the device.
#[derive(Debug)]
pub struct Buffer(Memory);

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let Memory { executor, address, bytes } = &self.0;
        let copy = executor.alloc(*bytes);
        // SAFETY: both are as long
        unsafe { executor.copy(*address, copy, *bytes) };
        Self(Memory { executor: executor.clone(), address: copy, bytes: *bytes })
    }
}

/// The address of a tensor's buffer, which must hold the tensor: a user could hand over another.
fn checked<T>(buffer: &Buffer, len: usize) -> &Memory {
    let Memory { bytes, .. } = buffer.0;
    assert!(bytes >= len * size_of::<T>(), "GPU: a buffer of {bytes} bytes for {len} elements");
    &buffer.0
}

impl<T: OnGpu> From<&Tensor<Cuda<T>>> for Arg {
    fn from(x: &Tensor<Cuda<T>>) -> Self {
        checked::<T>(x.buffer(), x.len()).into()
    }
}

impl<T: OnGpu> From<&mut Tensor<Cuda<T>>> for Arg {
    fn from(x: &mut Tensor<Cuda<T>>) -> Self {
        address(x).into()
    }
}

/// Where a tensor is, for writing: copied first if another tensor shares the buffer.
pub(super) fn address<T: OnGpu>(x: &mut Tensor<Cuda<T>>) -> Address {
    let len = x.len();
    checked::<T>(x.buffer_mut(), len).address()
}

/// Panics unless all have the first one's length: kernels rely on it.
fn same_len<T: OnGpu, const N: usize>(op: &str, tensors: [&Tensor<Cuda<T>>; N]) {
    let len = tensors[0].len();
    assert!(tensors.iter().all(|x| x.len() == len), "{op}: {:?}", tensors.map(Tensor::shape));
}

/// Panics unless every index is below `size`.
fn below(op: &str, indices: &[u32], size: usize) {
    assert!(indices.iter().all(|&i| (i as usize) < size), "{op}: an index is not below {size}");
}

impl<T: OnGpu> Backend for Cuda<T> {
    type Elem = T;
    type Buffer = Buffer;
    type Norms = Squares;
    type Wide = Cuda<f32>;
    type Narrow = Cuda<Bf16>;
    const ASYNCHRONOUS: bool = true;
    const WORKING_SET: usize = usize::MAX;

    fn upload(&self, host: Vec<T>) -> Buffer {
        Buffer(self.stage(&host))
    }
    fn download(&self, buffer: &Buffer) -> Vec<T> {
        buffer.0.fetch()
    }
    fn scratch(&self, len: usize) -> Buffer {
        Buffer(self.alloc(len * size_of::<T>()))
    }
    fn filled(&self, len: usize, value: f64) -> Buffer {
        let buffer = self.scratch(len);
        // SAFETY: (y, value, n)
        unsafe { self.each("fill", len, args![&buffer.0, value as f32, len as u64]) };
        buffer
    }
    fn wide(&self) -> Cuda<f32> {
        self.with_elements()
    }
    fn narrower(&self) -> Cuda<Bf16> {
        self.with_elements()
    }
    fn widen(xs: &[&Tensor<Self>]) -> Vec<Tensor<Cuda<f32>>> {
        T::widen(xs)
    }
    fn narrow(&self, xs: &[&Tensor<Cuda<f32>>]) -> Vec<Tensor<Self>> {
        T::narrow(self, xs)
    }
    fn sync(&self) {
        self.executor.sync();
    }

    fn gemm(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut [&mut Tensor<Self>], accum: Accum) {
        multiply(a, b, c, accum);
    }
    fn gemm_wide(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut [&mut Tensor<Cuda<f32>>], accum: Accum) {
        multiply(a, b, c, accum);
    }
    fn gemm_beside(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut Tensor<Self>, first: &[usize]) {
        let (Some(one), Some(other)) = (a.first(), b.first()) else { return };
        let ((m, k), n) = (one.sizes(), other.sizes().1);
        apart(first, n, c);
        assert!(c.rows() == m, "gemm: {one} · {other} → columns of {}", c.shape());
        if k > 0 && first.iter().copied().all(aligned::<T>) {
            let (len, row) = (c.len(), c.cols());
            let start = checked::<T>(c.buffer_mut(), len).address;
            let c = first.iter().map(|first| start + (first * size_of::<T>()) as u64).collect();
            // SAFETY: C has the rows, and the columns of each product end before those of the next
            return unsafe { multiply_into(a, b, T::TYPE, c, row, Accum::Replace) };
        }
        let scratch = |_: &Mat<Self>| Tensor::scratch(c.device(), [m, n]); // [m, n]
        let mut parts: Vec<_> = a.iter().map(scratch).collect();
        multiply(a, b, &mut parts.iter_mut().collect::<Vec<_>>(), Accum::Replace);
        let copies = first.iter().enumerate();
        let copies: Vec<_> =
            copies.map(|(i, &first)| Columns { from: (i, 0), to: (0, first), width: n }).collect();
        Self::copy_cols(&parts.iter().collect::<Vec<_>>(), &mut [c], &copies);
    }

    fn gemm_symmetric(a: &[Mat<Self>], b: &[Mat<Self>], c: &mut [&mut Tensor<Self>]) {
        Self::gemm(a, b, c, Accum::Replace);
    }

    fn axpby(mut terms: Vec<Axpby<Self>>) {
        if let [(alpha, x, beta, y)] = &mut terms[..] {
            same_len("axpby", [x, y]);
            let (n, args) = (x.len(), args![*alpha as f32, *x, *beta as f32, &mut **y, x.len() as u64]);
            // SAFETY: (alpha, x, beta, y, n)
            return unsafe { x.device().each("axpby", n, args) };
        }
        let Some((_, first, ..)) = terms.first() else { return };
        // SAFETY: its terms are of one type
        unsafe { first.device().clone().each_term("axpby_each", terms, &[]) };
    }

    fn sum(x: &Tensor<Self>) -> f64 {
        Self::totals("sum", &[x]).expect("of one tensor").fetch()[0]
    }
    fn norms(xs: &[&Tensor<Self>]) -> Squares {
        Squares(Self::totals("sum_squares", xs))
    }
    fn read(Squares(sums): &Squares) -> Vec<f64> {
        sums.as_ref().map_or(vec![], Memory::fetch).into_iter().map(f64::sqrt).collect()
    }
    fn normalised(xs: &[(&Tensor<Self>, &Tensor<Self>)]) -> Vec<Tensor<Self>> {
        let Some(squares) = Self::totals("sum_squares", &xs.iter().map(|x| x.0).collect::<Vec<_>>()) else {
            return Vec::new();
        };
        let device = xs[0].0.device();
        let mut ys: Vec<_> = xs.iter().map(|(x, _)| Tensor::scratch(device, x.shape())).collect(); // like each x
        let row = |(&(x, other), y): (&(&Tensor<Self>, &Tensor<Self>), &mut Tensor<Self>)| {
            same_len("normalised", [x, other]);
            let [x_at, other] = [x, other].map(|x| checked::<T>(x.buffer(), x.len()).address());
            [address(y), x_at, other, x.len() as u64]
        };
        let table = xs.iter().zip(&mut ys).map(row).collect();
        // SAFETY: (all, squares), each row with the fields of a Direction
        unsafe { device.each_row("normalised", table, |[.., n]| n as usize, args![&squares]) };
        ys
    }

    fn unary(f: Unary, x: &Tensor<Self>) -> Tensor<Self> {
        let mut y = Tensor::scratch(x.device(), x.shape()); // like x
        // SAFETY: (f, x, y, n)
        unsafe { x.device().each("unary", x.len(), args![f as u32, x, &mut y, x.len() as u64]) };
        y
    }
    fn unary_grad(f: Unary, x: &Tensor<Self>, dy: &Tensor<Self>) -> Tensor<Self> {
        same_len("unary_grad", [x, dy]);
        let mut dx = Tensor::scratch(x.device(), x.shape()); // like x
        // SAFETY: (f, x, dy, dx, n)
        unsafe { x.device().each("unary_grad", x.len(), args![f as u32, x, dy, &mut dx, x.len() as u64]) };
        dx
    }

    fn binary(f: Binary, a: &Tensor<Self>, b: &Tensor<Self>) -> Tensor<Self> {
        same_len("binary", [a, b]);
        let mut y = Tensor::scratch(a.device(), a.shape()); // like a
        // SAFETY: (f, a, b, y, n)
        unsafe { a.device().each("binary", a.len(), args![f as u32, a, b, &mut y, a.len() as u64]) };
        y
    }

    fn add_row(x: &Tensor<Self>, b: &Tensor<Self>) -> Tensor<Self> {
        let d = x.cols();
        assert!(b.len() == d, "add_row: {} to rows of {}", b.shape(), x.shape());
        let mut y = Tensor::scratch(x.device(), x.shape()); // [n, d]
        // SAFETY: (x, b, y, n, d)
        unsafe { x.device().each("add_row", x.len(), args![x, b, &mut y, x.len() as u64, int(d)]) };
        y
    }
    fn sum_rows(x: &Tensor<Self>) -> Tensor<Self> {
        // SAFETY: (x, …)
        unsafe { x.device().column_sums("sum_rows", [x.rows(), x.cols()], args![x]) } // [d]
    }

    fn copy_cols(xs: &[&Tensor<Self>], ys: &mut [&mut Tensor<Self>], copies: &[Columns]) {
        let Some(device) = xs.first().map(|x| x.device().clone()) else { return };
        let block = |&Columns { from: (x, x_start), to: (y, y_start), width }: &Columns| {
            let (x, y) = (xs[x], &mut *ys[y]);
            let (rows, dx, dy) = (x.rows(), x.cols(), y.cols());
            assert!(
                y.rows() == rows && x_start + width <= dx && y_start + width <= dy,
                "copy_cols: {width} columns from {x_start} of {} to {y_start} of {}",
                x.shape(),
                y.shape()
            );
            let at = |address: u64, column: usize| address + (column * size_of::<T>()) as u64;
            let from = checked::<T>(x.buffer(), x.len()).address();
            let pair = |low: usize, high: usize| u64::from(int(low)) | u64::from(int(high)) << 32;
            [at(address(y), y_start), at(from, x_start), pair(dy, dx), pair(width, rows)]
        };
        let blocks: Vec<_> = copies.iter().map(block).collect();
        let halves = |both: u64| [both as u32, (both >> 32) as u32];
        if let &[[y, x, sizes, counts]] = &blocks[..] {
            let ([dy, dx], [width, rows]) = (halves(sizes), halves(counts));
            let args = args![x, dx, y, dy, width, rows];
            // SAFETY: (x, dx, y, dy, width, rows), with the columns just checked
            return unsafe { device.each("copy_cols", width as usize * rows as usize, args) };
        }
        let len = |[.., counts]: [u64; 4]| halves(counts).map(|n| n as usize).iter().product();
        // SAFETY: each row has the fields of a Block
        unsafe { device.each_row("copy_cols_each", blocks, len, &[]) };
    }

    fn softmax(x: &Tensor<Self>) -> Tensor<Self> {
        let (n, d) = (x.rows(), x.cols());
        let mut y = Tensor::scratch(x.device(), x.shape()); // [n, d]
        // SAFETY: (x, y, n, d)
        unsafe { x.device().rows("softmax", [n, d], args![x, &mut y, n as u64, int(d)]) };
        y
    }
    fn softmax_grad(y: &Tensor<Self>, dy: &Tensor<Self>) -> Tensor<Self> {
        same_len("softmax_grad", [y, dy]);
        let (n, d) = (y.rows(), y.cols());
        let mut dx = Tensor::scratch(y.device(), y.shape()); // [n, d]
        // SAFETY: (y, dy, dx, n, d)
        unsafe { y.device().rows("softmax_grad", [n, d], args![y, dy, &mut dx, n as u64, int(d)]) };
        dx
    }

    fn rms_norm(x: &Tensor<Self>, g: &Tensor<Self>, eps: f64) -> (Tensor<Self>, Tensor<Cuda<f32>>) {
        let (n, d) = (x.rows(), x.cols());
        assert!(g.len() == d, "rms_norm: {} for {}", g.shape(), x.shape());
        let mut y = Tensor::scratch(x.device(), x.shape()); // [n, d]
        let mut inv_rms = Tensor::scratch(&x.device().wide(), [n]); // [n]
        let args = args![x, g, &mut y, &mut inv_rms, n as u64, int(d), eps as f32];
        // SAFETY: (x, g, y, inv_rms, n, d, eps)
        unsafe { x.device().rows("rms_norm", [n, d], args) };
        (y, inv_rms)
    }
    fn add_rms_norm(
        x: &Tensor<Self>,
        r: &Tensor<Self>,
        g: &Tensor<Self>,
        eps: f64,
    ) -> ([Tensor<Self>; 2], Tensor<Cuda<f32>>) {
        let (n, d) = (x.rows(), x.cols());
        same_len("add_rms_norm", [x, r]);
        assert!(g.len() == d, "add_rms_norm: {} for {}", g.shape(), x.shape());
        let [mut sum, mut y] = [(); 2].map(|()| Tensor::scratch(x.device(), x.shape())); // [n, d] each
        let mut inv_rms = Tensor::scratch(&x.device().wide(), [n]); // [n]
        let args = args![x, r, g, &mut sum, &mut y, &mut inv_rms, n as u64, int(d), eps as f32];
        // SAFETY: (x, r, g, sum, y, inv_rms, n, d, eps)
        unsafe { x.device().rows("add_rms_norm", [n, d], args) };
        ([sum, y], inv_rms)
    }
    fn rms_norm_grad(
        x: &Tensor<Self>,
        g: &Tensor<Self>,
        inv_rms: &Tensor<Cuda<f32>>,
        dy: &Tensor<Self>,
        before: Option<Tensor<Self>>,
    ) -> [Tensor<Self>; 2] {
        let (n, d, device) = (x.rows(), x.cols(), x.device());
        let adds = before.is_some();
        let mut dx = before.unwrap_or_else(|| Tensor::scratch(device, x.shape())); // [n, d]
        same_len("rms_norm_grad", [x, dy, &dx]);
        assert!(g.len() == d && inv_rms.len() == n, "rms_norm_grad: {} and {}", g.shape(), inv_rms.shape());
        // what the smallest device since sm_80 gives a block of shared memory, 99 KiB, holds a row of sums
        assert!(d <= 24 << 10, "rms_norm_grad: on GPUs a row has at most {} columns, not {d}", 24 << 10);
        let (threads, sides) = Self::sides(d);
        let threads = threads.min(128); // three rows take many registers
        let chunk = n.div_ceil(512).max(sides); // all blocks at once, each long enough that its sums are few
        let blocks = n.div_ceil(chunk);
        let mut sums = Tensor::scratch(&device.wide(), [blocks, d]); // [blocks, d]
        let args =
            args![x, g, inv_rms, dy, &mut dx, &mut sums, n as u64, int(d), int(chunk), u32::from(adds)];
        let launch = Launch {
            kernel: "rms_norm_grad",
            element: T::TYPE,
            grid: [int(blocks), 1, 1],
            threads,
            shared: int(sides * d * size_of::<f32>()),
        };
        // SAFETY: (x, g, inv_rms, dy, dx, sums, n, d, chunk, adds), and sums has a row for each chunk
        unsafe { device.executor.launch(launch, args) };
        [dx, device.total(sums)]
    }

    fn layer_norm(
        x: &Tensor<Self>,
        g: &Tensor<Self>,
        b: &Tensor<Self>,
        eps: f64,
    ) -> (Tensor<Self>, Tensor<Cuda<f32>>) {
        let (n, d) = (x.rows(), x.cols());
        assert!(
            g.len() == d && b.len() == d,
            "layer_norm: {} and {} for {}",
            g.shape(),
            b.shape(),
            x.shape()
        );
        let mut y = Tensor::scratch(x.device(), x.shape()); // [n, d]
        let mut stats = Tensor::scratch(&x.device().wide(), [n, 2]); // [n, 2]
        let args = args![x, g, b, &mut y, &mut stats, n as u64, int(d), eps as f32];
        // SAFETY: (x, g, b, y, stats, n, d, eps)
        unsafe { x.device().rows("layer_norm", [n, d], args) };
        (y, stats)
    }
    fn layer_norm_grad(
        x: &Tensor<Self>,
        g: &Tensor<Self>,
        stats: &Tensor<Cuda<f32>>,
        dy: &Tensor<Self>,
    ) -> [Tensor<Self>; 3] {
        let (n, d) = (x.rows(), x.cols());
        same_len("layer_norm_grad", [x, dy]);
        assert!(g.len() == d && stats.len() == 2 * n, "layer_norm_grad: {} and {}", g.shape(), stats.shape());
        let mut dx = Tensor::scratch(x.device(), x.shape()); // [n, d]
        // SAFETY: (x, g, stats, dy, dx, n, d)
        unsafe {
            x.device().rows("layer_norm_grad", [n, d], args![x, g, stats, dy, &mut dx, n as u64, int(d)])
        };
        // SAFETY: (x, stats, dy, …)
        let dg = unsafe { x.device().column_sums("layer_norm_gain", [n, d], args![x, stats, dy]) }; // [d]
        [dx, dg, Self::sum_rows(dy)]
    }

    fn swiglu(gate: &Tensor<Self>, up: &Tensor<Self>) -> Tensor<Self> {
        same_len("swiglu", [gate, up]);
        let (n, mut y) = (gate.len(), Tensor::scratch(gate.device(), gate.shape())); // [n, f]
        // SAFETY: (a, b, y, n)
        unsafe { gate.device().each("swiglu", n, args![gate, up, &mut y, n as u64]) };
        y
    }
    fn swiglu_grad(gate: &Tensor<Self>, up: &Tensor<Self>, dy: &Tensor<Self>) -> [Tensor<Self>; 2] {
        same_len("swiglu_grad", [gate, up, dy]);
        let n = gate.len();
        let mut da = Tensor::scratch(gate.device(), gate.shape()); // [n, f]
        let mut db = Tensor::scratch(gate.device(), gate.shape()); // [n, f]
        // SAFETY: (a, b, dy, da, db, n)
        unsafe { gate.device().each("swiglu_grad", n, args![gate, up, dy, &mut da, &mut db, n as u64]) };
        [da, db]
    }

    fn embedding(table: &Tensor<Self>, ids: &[u32]) -> Tensor<Self> {
        let (rows, d, device) = (ids.len(), table.cols(), table.device());
        below("embedding", ids, table.rows());
        let mut y = Tensor::scratch(device, [rows, d]); // [ids, d]
        let ids = device.stage(ids);
        // SAFETY: (table, ids, y, rows, d), the ids below the table's rows
        unsafe { device.rows("embedding", [rows, d], args![table, &ids, &mut y, rows as u64, int(d)]) };
        y
    }
    fn embedding_grad(shape: Shape, ids: &[u32], dy: &Tensor<Self>) -> Tensor<Self> {
        let (device, d) = (dy.device(), shape.cols());
        below("embedding_grad", ids, shape.rows());
        assert!(dy.len() == ids.len() * d, "embedding_grad: {} for {} rows of {d}", dy.shape(), ids.len());
        // sorted by counting: equal ids stay in their order
        let mut starts = vec![0; shape.rows() + 1];
        ids.iter().for_each(|&id| starts[id as usize + 1] += 1);
        (1..starts.len()).for_each(|id| starts[id] += starts[id - 1]);
        let (mut next, mut order) = (starts.clone(), vec![0; ids.len()]);
        for (i, &id) in ids.iter().enumerate() {
            let place = &mut next[id as usize];
            order[*place as usize] = int(i);
            *place += 1;
        }
        let mut dtable = Tensor::scratch(device, shape); // [v, d]
        let [order, starts] = [&order, &starts].map(|x| device.stage(x));
        let args = args![dy, &order, &starts, &mut dtable, int(d)];
        let grid = [shape.rows(), d.div_ceil(32 * Self::PACK), 1];
        // SAFETY: (dy, order, starts, dtable, d), positions of dy's rows, as many of them as starts counts
        unsafe { device.launch("embedding_grad", grid, 128, args) };
        dtable
    }

    fn rope(
        x: &Tensor<Self>,
        table: &Tensor<Cuda<f32>>,
        len: usize,
        offset: usize,
        inverse: bool,
    ) -> Tensor<Self> {
        let (rows, d, h) = (x.rows(), x.cols(), table.cols());
        assert!(
            d.is_multiple_of(h) && h.is_multiple_of(2) && len > 0 && offset + len.min(rows) <= table.rows(),
            "rope: {} with a table {}, positions {offset} to {}",
            x.shape(),
            table.shape(),
            offset + len
        );
        let sign = if inverse { -1f32 } else { 1f32 };
        let mut y = Tensor::scratch(x.device(), x.shape()); // [n, d]
        let args = args![x, table, &mut y, rows as u64, int(d), int(h), int(len), int(offset), sign];
        // SAFETY: (x, table, y, rows, d, h, len, offset, sign)
        unsafe { x.device().rows("rope", [rows, d], args) };
        y
    }

    fn attention(
        q: &Tensor<Self>,
        k: &Tensor<Self>,
        v: &Tensor<Self>,
        how: Attention,
    ) -> (Tensor<Self>, Tensor<Cuda<f32>>) {
        let z = Layout::new(q, k, how);
        same_len("attention", [k, v]);
        let mut o = Tensor::scratch(q.device(), q.shape()); // [batch·tq, heads·h]
        let mut lse = Tensor::scratch(&q.device().wide(), [how.batch, how.heads, z.tq]); // [batch, heads, tq]
        let args = args![q, k, v, &mut o, &mut lse];
        // SAFETY: (q, k, v, o, lse, …)
        unsafe { z.launch(q.device(), Pass::Forward, args) };
        (o, lse)
    }
    fn attention_grad(
        [q, k, v]: [&Tensor<Self>; 3],
        o: &Tensor<Self>,
        lse: &Tensor<Cuda<f32>>,
        dout: &Tensor<Self>,
        how: Attention,
    ) -> [Tensor<Self>; 3] {
        let z = Layout::new(q, k, how);
        same_len("attention_grad", [k, v]);
        same_len("attention_grad", [q, o, dout]);
        let device = q.device();
        let rows = how.batch * z.tq * how.heads;
        assert!(lse.len() == rows, "attention_grad: {} log-sum-exps", lse.shape());
        let mut delta = Tensor::scratch(&device.wide(), [how.batch, how.heads, z.tq]); // [batch, heads, tq]
        let mut dq = Tensor::scratch(device, q.shape()); // [batch·tq, heads·h]
        let mut dk = Tensor::scratch(device, k.shape()); // [batch·tk, kv_heads·h]
        let mut dv = Tensor::scratch(device, v.shape()); // [batch·tk, kv_heads·h]
        let args = args![o, dout, &mut delta, rows as u64, int(how.heads), int(z.tq), int(z.h)];
        let lanes = match T::TYPE {
            Type::F32 => 32,
            Type::Bf16 => z.columns() / 8,
        };
        // SAFETY: (o, dout, delta, rows, heads, tq, h); so many lanes for each row
        unsafe { device.launch("attention_delta", [(rows * lanes).div_ceil(128), 1, 1], 128, args) };
        let args = args![q, k, v, dout, lse, &delta, &mut dq];
        // SAFETY: (q, k, v, dout, lse, delta, dq, …)
        unsafe { z.launch(device, Pass::Queries, args) };
        let args = args![q, k, v, dout, lse, &delta, &mut dk, &mut dv];
        // SAFETY: (q, k, v, dout, lse, delta, dk, dv, …)
        unsafe { z.launch(device, Pass::Keys, args) };
        [dq, dk, dv]
    }

    fn cross_entropy(
        logits: &Tensor<Self>,
        targets: &[u32],
        share: f64,
    ) -> (Tensor<Cuda<f32>>, Tensor<Self>) {
        let (n, d, device) = (logits.rows(), logits.cols(), logits.device());
        assert!(targets.len() == n, "cross_entropy: {} targets for {}", targets.len(), logits.shape());
        below("cross_entropy", targets, d);
        let mut dx = Tensor::scratch(device, logits.shape()); // [n, v]
        let mut loss = Tensor::scratch(&device.wide(), [1]); // [1]
        let (targets, losses) = (device.stage(targets), device.alloc(n * size_of::<f64>()));
        let args = args![logits, &targets, &mut dx, &losses, n as u64, int(d), (share / n as f64) as f32];
        // SAFETY: (x, targets, dx, losses, n, d, weight), the targets below d
        unsafe { device.rows("cross_entropy", [n, d], args) };
        // SAFETY: (losses, mean, n)
        unsafe { device.launch("mean_loss", [1, 1, 1], 1024, args![&losses, &mut loss, int(n)]) };
        (loss, dx)
    }

    fn renormalised_step(Squares(sigma): &Squares, radius: Radius, moves: Vec<Axpby<Self>>) {
        let Some(squares) = sigma else { return };
        assert!(
            squares.bytes == moves.len() * size_of::<f64>() && moves.len().is_multiple_of(2),
            "one σ for each factor"
        );
        let exact = u32::from(radius == Radius::Exact);
        let Some((_, first, ..)) = moves.first() else { return };
        // SAFETY: (terms, squares, exact), with σ² for each term
        unsafe { first.device().clone().each_term("renormalised_step", moves, args![squares, exact]) };
    }

    fn adamw(step: AdamWStep, updates: Vec<AdamWUpdate<Self>>) {
        let AdamWStep { beta1, beta2, eps, bias1, bias2 } = step;
        let Some(device) = updates.first().map(|update| update.g.device().clone()) else { return };
        let row = |AdamWUpdate { w, g, moments: [m, v], lr, decay }: AdamWUpdate<Self>| {
            same_len("adamw", [w, g, m, v]);
            let [keep, rate] = [1.0 - lr * decay, lr / bias1].map(|x| u64::from((x as f32).to_bits()));
            let gradient = checked::<T>(g.buffer(), g.len()).address();
            [address(w), gradient, address(m), address(v), keep | rate << 32, g.len() as u64]
        };
        let [beta1, c1, beta2, c2] = [beta1, 1.0 - beta1, beta2, 1.0 - beta2].map(|x| x as f32);
        let args = args![eps as f32, beta1, c1, beta2, c2, (1.0 / bias2) as f32];
        // SAFETY: (updates, eps, beta1, c1, beta2, c2, inv_bias2), each row with the fields of an Update
        unsafe {
            device.each_row("adamw", updates.into_iter().map(row).collect(), |[.., n]| n as usize, args)
        };
    }
}

/// [`Backend::gemm`] with sums in elements of type R.
#[track_caller]
fn multiply<T: OnGpu, R: OnGpu>(
    a: &[Mat<Cuda<T>>],
    b: &[Mat<Cuda<T>>],
    c: &mut [&mut Tensor<Cuda<R>>],
    accum: Accum,
) {
    assert!(a.len() == c.len() && b.len() == c.len(), "gemm: batch sizes differ");
    let Some(first) = a.first() else { return };
    let (m, n) = (first.sizes().0, b[0].sizes().1);
    let address = |c: &mut &mut Tensor<Cuda<R>>| {
        assert!((c.rows(), c.cols()) == (m, n), "gemm: {first} · {} → {}", b[0], c.shape());
        checked::<R>(c.buffer_mut(), m * n).address
    };
    let c = c.iter_mut().map(address).collect();
    // SAFETY: `buffer_mut` gave each C a buffer of its own, as long as was just checked
    unsafe { multiply_into(a, b, R::TYPE, c, n, accum) };
}

/// A batch of products at addresses on the device, with `row` elements from one row of a C to the next.
///
/// # Safety
/// Each C must have room for its rows, which nothing else may be in.
#[track_caller]
unsafe fn multiply_into<T: OnGpu>(
    a: &[Mat<Cuda<T>>],
    b: &[Mat<Cuda<T>>],
    result: Type,
    c: Vec<Address>,
    row: usize,
    accum: Accum,
) {
    let (first, other) = (&a[0], &b[0]);
    let ((m, k), n) = (first.sizes(), other.sizes().1);
    for (a, b) in a.iter().zip(b) {
        assert!(
            a.kind() == first.kind() && b.kind() == other.kind() && b.sizes().0 == k,
            "gemm: {a} · {b}: every product of a batch is of one shape and kind, as {first} · {other}"
        );
    }
    if m * n == 0 {
        return;
    }
    let device = first.tensor.device();
    let ((a, row_a), (b, row_b)) = (Operands::of(a), Operands::of(b));
    let operands = a.addresses.iter().zip(&b.addresses).zip(c).map(|((&a, &b), c)| [a, b, c]).collect();
    // SAFETY: live tensors of the sizes just checked, and the caller's promise
    unsafe {
        device.executor.gemm(&Gemm {
            element: T::TYPE,
            result,
            m,
            k,
            n,
            transposed: [first.transposed, other.transposed],
            rows: [row_a, row_b, row],
            add: accum == Accum::Add,
            operands,
        });
    }
}

/// Where the operands of a batch begin.
struct Operands<T: OnGpu> {
    addresses: Vec<Address>,
    /// What they are copies in.
    _copies: Vec<Tensor<Cuda<T>>>,
}

impl<T: OnGpu> Operands<T> {
    /// The operands as they are, or copies of them where columns begin between two multiples of 16 bytes, which the libraries may not take;
    /// and the elements from one row to the next.
    fn of(mats: &[Mat<Cuda<T>>]) -> (Self, usize) {
        let start = |x: &Tensor<Cuda<T>>, column: usize| {
            checked::<T>(x.buffer(), x.len()).address + (column * size_of::<T>()) as u64
        };
        if mats.iter().all(|mat| aligned::<T>(mat.columns[0])) {
            let addresses = mats.iter().map(|mat| start(mat.tensor, mat.columns[0])).collect();
            return (Self { addresses, _copies: Vec::new() }, mats[0].tensor.cols());
        }
        let tensors: Vec<_> = mats.iter().map(|mat| mat.tensor).collect();
        let parts =
            mats.iter().enumerate().map(|(i, mat)| (i, mat.columns[0]..mat.columns[0] + mat.columns[1]));
        let copies = columns_of(&tensors, &parts.collect::<Vec<_>>()); // [rows, columns] each
        (
            Self { addresses: copies.iter().map(|x| start(x, 0)).collect(), _copies: copies },
            mats[0].columns[1],
        )
    }
}

/// Whether a column of a matrix begins at a multiple of 16 bytes, if the matrix does.
fn aligned<T>(column: usize) -> bool {
    (column * size_of::<T>()).is_multiple_of(16)
}

/// The sizes that all attention kernels take, checked.
struct Layout {
    tq: usize,
    tk: usize,
    h: usize,
    how: Attention,
}

/// The three kernels.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    /// dQ: queries stand, as in the forward.
    Queries,
    /// dK and dV: keys stand.
    Keys,
}

impl Layout {
    /// Threads of a block.
    const THREADS: u32 = 128;
    /// The largest head size: a kernel for up to 32·4.
    const MAX_HEAD: usize = 128;

    fn new<T: OnGpu>(q: &Tensor<Cuda<T>>, k: &Tensor<Cuda<T>>, how: Attention) -> Self {
        let Attention { batch, heads, kv_heads, causal } = how;
        let h = q.cols() / heads;
        assert!(
            h <= Self::MAX_HEAD,
            "attention: on GPUs a head has at most {} columns, not {h}",
            Self::MAX_HEAD
        );
        // what the kernels rely on; callers have said it in their own words
        assert!(q.cols() == heads * h && k.cols() == kv_heads * h, "attention: head sizes");
        assert!(heads.is_multiple_of(kv_heads), "attention: head groups");
        assert!(q.rows().is_multiple_of(batch) && k.rows().is_multiple_of(batch), "attention: batch");
        assert!(!causal || k.rows() >= q.rows(), "attention: causal lengths");
        assert!(
            batch.max(heads) < 1 << 16,
            "attention: {batch} sequences, {heads} heads: at most 65535 on GPUs"
        );
        Self { tq: q.rows() / batch, tk: k.rows() / batch, h, how }
    }

    /// Columns that the kernels compute with: there is one for 32, for 64 and for 128.
    fn columns(&self) -> usize {
        self.h.next_power_of_two().max(32)
    }

    /// Rows of a tile that stands, and bytes of shared memory, as the kernels have them (gpu/kernels/attention.cu, attention_bf16.cu).
    fn tile(&self, element: Type, pass: Pass) -> [usize; 2] {
        let columns = self.columns();
        let standing = if pass == Pass::Forward { 1 } else { 2 }; // tensors; two pass
        match element {
            Type::F32 => {
                let scores = if pass == Pass::Keys { 2 } else { 1 };
                [32, ((standing + 2) * 32 * (columns + 1) + scores * 32 * 32) * size_of::<f32>()]
            }
            Type::Bf16 => {
                let rows = if columns < 128 { 128 } else { 64 };
                let passing = if columns < 128 || pass == Pass::Forward { 64 } else { 32 };
                let wide = standing * rows + 2 * 2 * passing; // rows, with two buffers
                let statistics = if pass == Pass::Keys { 2 * 2 * passing } else { 0 };
                [rows, wide * (columns + 8) * size_of::<Bf16>() + statistics * size_of::<f32>()]
            }
        }
    }

    /// The kernel for this head size, with `args` and then the sizes.
    ///
    /// # Safety
    /// `args` must be those of the kernel, in number, type and meaning.
    unsafe fn launch<T: OnGpu>(&self, device: &Cuda<T>, pass: Pass, args: &[Arg]) {
        let Attention { batch, heads, kv_heads, causal } = self.how;
        let kernels = match pass {
            Pass::Forward => ["attention_1", "attention_2", "attention_4"],
            Pass::Queries => ["attention_dq_1", "attention_dq_2", "attention_dq_4"],
            Pass::Keys => ["attention_dkv_1", "attention_dkv_2", "attention_dkv_4"],
        };
        let [rows, shared] = self.tile(T::TYPE, pass);
        let (len, heads_of_grid) = if pass == Pass::Keys { (self.tk, kv_heads) } else { (self.tq, heads) };
        let launch = Launch {
            kernel: kernels[self.columns().ilog2() as usize - 5],
            element: T::TYPE,
            grid: [len.div_ceil(rows), heads_of_grid, batch].map(int),
            threads: Self::THREADS,
            shared: int(shared),
        };
        let sizes = [self.tq, self.tk, heads, kv_heads, self.h].map(|x| Arg::from(int(x)));
        let scale = (1.0 / (self.h as f64).sqrt()) as f32;
        let args = [args, &sizes, args![u32::from(causal), scale]].concat();
        // SAFETY: the caller's promise
        unsafe { device.executor.launch(launch, &args) }
    }
}
