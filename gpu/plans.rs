//! Single products by cuBLASLt, with a plan for each shape: the library proposes some algorithms, and the fastest of them on this device
//! is kept. A product then costs the processor one call, without a search in it. And for each batch, whether its products one by one, with
//! their plan, are faster than cuBLAS's batch, whose algorithm cannot be chosen.
//!
//! What is fastest is measured once and written down beside the compiled kernels, so that the next process computes the same bits.
//! Not here: the batches themselves (cuda.rs). Letters: A [m, k], B [k, n], C [m, n] as they are stored, row by row; the library reads by columns, so what
//! it sees is transposed: Cᵀ = op(B)ᵀ·op(A)ᵀ, with B first.

use super::executor::{Address, Type};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaStream, DriverError};
use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt::{self, Display, Formatter};
use std::io::Write;
use std::path::PathBuf;

/// A kind of product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// Of A and B, and of C.
    pub types: [Type; 2],
    /// m, k, n.
    pub sizes: [usize; 3],
    /// A is stored as [k, m], B as [n, k].
    pub transposed: [bool; 2],
    /// Elements from one row of A, of B and of C to the next.
    pub rows: [usize; 3],
}

/// The algorithm of a plan, as the library has it: to be kept, but not understood.
type Algorithm = [u64; 8];

/// Algorithms that are tried.
const PROPOSALS: usize = 8;
/// Bytes that an algorithm may use beside its operands, for sums that are split among blocks. What PyTorch gives it on Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;
/// Runs of each, of which the fastest counts; the first also loads its code.
const RUNS: usize = 4;
/// A proposal takes the place of one before it if it needs less than this part of its time: less is noise, and the library's order better.
const FASTER: f32 = 0.97;

/// The library, open on a device, and the plans so far.
#[derive(Debug)]
pub(super) struct Plans {
    library: sys::cublasLtHandle_t,
    pub workspace: Address,
    plans: HashMap<Shape, Plan>,
    /// What was found to be fastest on this kind of device, by this process and others.
    known: HashMap<Shape, Algorithm>,
    /// Whether so many products of a shape are faster one by one.
    apart: HashMap<(Shape, usize), bool>,
    /// Where that is kept.
    file: Option<PathBuf>,
}

/// A product, described: D = αA·B + βC with D in C's place.
#[derive(Debug)]
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    /// As the library has them: B, A, C.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: the library's handles belong to no thread; `Plans` is used by one at a time
unsafe impl Send for Plans {}

impl Plans {
    /// `workspace`: [`WORKSPACE`] bytes on the device, for as long as this is there. `device`: its name.
    pub fn new(
        workspace: Address,
        device: &str,
        folder: Option<PathBuf>,
    ) -> Result<Self, result::CublasError> {
        let library = result::create_handle()?;
        // SAFETY: no arguments
        let version = unsafe { sys::cublasLtGetVersion() };
        let device: String =
            device.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let file = folder.map(|folder| folder.join(format!("products-{device}-{version}.txt")));
        let text = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok()).unwrap_or_default();
        let (mut known, mut apart) = (HashMap::new(), HashMap::new());
        for line in text.lines().filter_map(parse) {
            match line {
                Line::Product(shape, algorithm) => drop(known.insert(shape, algorithm)),
                Line::Batch(shape, count, one_by_one) => drop(apart.insert((shape, count), one_by_one)),
            }
        }
        Ok(Self { library, workspace, plans: HashMap::new(), known, apart, file })
    }

    /// Whether there is a plan for this shape.
    pub fn has(&self, shape: &Shape) -> bool {
        self.plans.contains_key(shape)
    }

    /// Enqueues C ← or += A·B, of a shape that there is a plan for.
    ///
    /// # Errors
    /// What the library says.
    ///
    /// # Safety
    /// The device must have allocated the matrices, and C may not overlap an operand; the stream's context must be this thread's.
    pub unsafe fn run(
        &self,
        stream: &CudaStream,
        shape: &Shape,
        operands: [Address; 3],
        add: bool,
    ) -> Result<(), String> {
        let plan = &self.plans[shape];
        // SAFETY: the caller's promise
        unsafe { self.enqueue(stream, plan, &plan.algorithm, operands, add) }
    }

    /// # Safety
    /// As for `run`.
    unsafe fn enqueue(
        &self,
        stream: &CudaStream,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        [a, b, c]: [Address; 3],
        add: bool,
    ) -> Result<(), String> {
        let (alpha, beta) = (1f32, if add { 1f32 } else { 0f32 });
        let [layout_b, layout_a, layout_c] = plan.layouts;
        let c = c as *mut c_void;
        // SAFETY: the caller's promise; the plan is of these shapes, and the workspace as long as it was told
        let done = unsafe {
            result::matmul(
                self.library,
                plan.product,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b as *const c_void,
                layout_b,
                a as *const c_void,
                layout_a,
                c,
                layout_c,
                c,
                layout_c,
                algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cu_stream().cast(),
            )
        };
        done.map_err(|error| format!("{error:?}"))
    }

    /// Makes the plan for a shape: with the algorithm that is known to be best there, or else that is best now, on these A and B; C is
    /// written. Waits for the device.
    ///
    /// # Errors
    /// What the library or the driver says.
    ///
    /// # Safety
    /// As for `run`.
    pub unsafe fn make(
        &mut self,
        stream: &CudaStream,
        shape: Shape,
        operands: [Address; 3],
    ) -> Result<(), String> {
        let (mut plan, proposals) = self.proposals(shape).map_err(|error| format!("{error:?}"))?;
        let known = self.known.get(&shape);
        plan.algorithm = match proposals.iter().find(|algorithm| Some(&algorithm.data) == known) {
            Some(&known) => known,
            None => {
                // SAFETY: the caller's promise
                let best = unsafe { self.fastest(stream, &plan, &proposals, operands) }?;
                self.known.insert(shape, best.data);
                self.write(Line::Product(shape, best.data));
                best
            }
        };
        self.plans.insert(shape, plan);
        Ok(())
    }

    /// The description of a product and what the library proposes for it, best first.
    fn proposals(&self, shape: Shape) -> Result<(Plan, Vec<sys::cublasLtMatmulAlgo_t>), result::CublasError> {
        use cudarc::cublas::sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        use sys::cublasLtMatmulDescAttributes_t::{CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB};
        use sys::cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as MEMORY,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES as OF_A,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES as OF_B,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES as OF_C,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES as OF_D,
            CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK as SUMS,
        };
        let Shape { types, sizes: [m, k, n], transposed: [ta, tb], rows } = shape;
        let f32_ = sys::cudaDataType::CUDA_R_32F;
        let [operands, sums] = types.map(|element| match element {
            Type::F32 => f32_,
            Type::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        });
        let layout = |element, [rows, cols]: [usize; 2], row: usize| {
            // rows of ours are the library's columns
            result::create_matrix_layout(element, cols as u64, rows as u64, row as i64)
        };
        let [a, b] = [if ta { [k, m] } else { [m, k] }, if tb { [n, k] } else { [k, n] }];
        let product = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32_)?;
        let mut plan = Plan { product, layouts: [std::ptr::null_mut(); 3], algorithm: unset() };
        plan.layouts =
            [layout(operands, b, rows[1])?, layout(operands, a, rows[0])?, layout(sums, [m, n], rows[2])?];
        let operation = |t: bool| if t { CUBLAS_OP_T } else { CUBLAS_OP_N };
        let preference = result::create_matmul_pref()?;
        let mut found = [sys::cublasLtMatmulHeuristicResult_t {
            algo: unset(),
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        }; PROPOSALS];
        let mut count = 0;
        // SAFETY: all handles were just created, each attribute is of the size and type that it has, `found` has room for PROPOSALS
        unsafe {
            for (which, operation) in
                [(CUBLASLT_MATMUL_DESC_TRANSA, operation(tb)), (CUBLASLT_MATMUL_DESC_TRANSB, operation(ta))]
            {
                let value = (&raw const operation).cast();
                result::set_matmul_desc_attribute(product, which, value, size_of_val(&operation))?;
            }
            let f32_sums = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            let value = (&raw const f32_sums).cast();
            result::set_matmul_pref_attribute(preference, SUMS, value, size_of::<u32>())?;
            let bytes = WORKSPACE;
            let value = (&raw const bytes).cast();
            result::set_matmul_pref_attribute(preference, MEMORY, value, size_of_val(&bytes))?;
            // a tensor begins at 256 bytes, columns of one at 16
            let natural = [a[1], b[1], n];
            let bytes = |side: usize| if rows[side] == natural[side] { 256u32 } else { 16 };
            for (which, bytes) in [(OF_A, bytes(1)), (OF_B, bytes(0)), (OF_C, bytes(2)), (OF_D, bytes(2))] {
                let value = (&raw const bytes).cast();
                result::set_matmul_pref_attribute(preference, which, value, size_of::<u32>())?;
            }
            let [b, a, c] = plan.layouts;
            let asked = sys::cublasLtMatmulAlgoGetHeuristic(
                self.library,
                product,
                b,
                a,
                c,
                c,
                preference,
                PROPOSALS as i32,
                found.as_mut_ptr(),
                &mut count,
            );
            result::destroy_matmul_pref(preference)?;
            asked.result()?;
        }
        let usable = |found: &&sys::cublasLtMatmulHeuristicResult_t| {
            found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
        };
        let proposals: Vec<_> =
            found[..count as usize].iter().filter(usable).map(|found| found.algo).collect();
        if proposals.is_empty() {
            return Err(result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
        }
        Ok((plan, proposals))
    }

    /// The fastest of the proposals; C is written.
    ///
    /// # Safety
    /// As for `run`.
    unsafe fn fastest(
        &self,
        stream: &CudaStream,
        plan: &Plan,
        proposals: &[sys::cublasLtMatmulAlgo_t],
        operands: [Address; 3],
    ) -> Result<sys::cublasLtMatmulAlgo_t, String> {
        let mut best = (f32::INFINITY, proposals[0]);
        for algorithm in proposals {
            let mut fastest = f32::INFINITY;
            for _ in 0..RUNS {
                // SAFETY: the caller's promise
                let run = || unsafe { self.enqueue(stream, plan, algorithm, operands, false) };
                fastest = fastest.min(time(stream, run)?);
            }
            if fastest < FASTER * best.0 {
                best = (fastest, *algorithm);
            }
        }
        Ok(best.1)
    }

    /// Whether `count` products of a shape are faster one by one; None if that has not been measured.
    pub fn apart(&self, shape: Shape, count: usize) -> Option<bool> {
        self.apart.get(&(shape, count)).copied()
    }

    /// Finds the answer, and keeps it, from the fastest run of `batch` and of `singles`, each of which enqueues the products.
    ///
    /// # Errors
    /// What the driver or a library says.
    pub fn compare(
        &mut self,
        stream: &CudaStream,
        (shape, count): (Shape, usize),
        batch: impl Fn() -> Result<(), String>,
        singles: impl Fn(&Self) -> Result<(), String>,
    ) -> Result<bool, String> {
        let [mut together, mut apart] = [f32::INFINITY; 2];
        for _ in 0..RUNS {
            together = together.min(time(stream, &batch)?);
            apart = apart.min(time(stream, || singles(self))?);
        }
        let one_by_one = apart < FASTER * together;
        self.apart.insert((shape, count), one_by_one);
        self.write(Line::Batch(shape, count, one_by_one));
        Ok(one_by_one)
    }

    /// Writes down what is best. A file that cannot be written is none: the next process looks again.
    fn write(&self, line: Line) {
        let Some(file) = &self.file else { return };
        // a line in one write to the end of the file: whole, whoever else writes
        let written = std::fs::create_dir_all(file.parent().expect("it has a folder"))
            .and_then(|()| std::fs::OpenOptions::new().create(true).append(true).open(file))
            .and_then(|mut file| file.write_all(line.to_string().as_bytes()));
        drop(written);
    }
}

/// Milliseconds between the beginning and the end of what is enqueued.
fn time(stream: &CudaStream, enqueue: impl FnOnce() -> Result<(), String>) -> Result<f32, String> {
    let driver = |error: DriverError| format!("{:?}", error.0);
    let from = stream.record_event(Some(CU_EVENT_DEFAULT)).map_err(driver)?;
    enqueue()?;
    let to = stream.record_event(Some(CU_EVENT_DEFAULT)).map_err(driver)?;
    from.elapsed_ms(&to).map_err(driver)
}

fn unset() -> sys::cublasLtMatmulAlgo_t {
    sys::cublasLtMatmulAlgo_t { data: [0; 8] }
}

/// What is written down, a line each.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Line {
    Product(Shape, Algorithm),
    /// So many products, and whether they are faster one by one.
    Batch(Shape, usize, bool),
}

impl Display for Line {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (shape, more) = match *self {
            Self::Product(shape, algorithm) => (shape, algorithm.to_vec()),
            Self::Batch(shape, count, apart) => (shape, vec![count as u64, apart.into()]),
        };
        let Shape { types: [operands, sums], sizes, transposed, rows } = shape;
        let sizes = sizes.into_iter().chain(rows).map(|size| size as u64);
        let numbers = sizes.chain(transposed.map(u64::from)).chain(more);
        let numbers: Vec<String> = numbers.map(|number| format!("{number:x}")).collect();
        writeln!(f, "{operands} {sums} {}", numbers.join(" "))
    }
}

/// None for a line that was not written so.
fn parse(line: &str) -> Option<Line> {
    let mut words = line.splitn(3, ' ');
    let mut element = || {
        let word = words.next()?;
        Type::ALL.into_iter().find(|known| known.to_string() == word)
    };
    let types = [element()?, element()?];
    let numbers = words.next()?;
    let numbers: Vec<u64> =
        numbers.split(' ').map(|number| u64::from_str_radix(number, 16).ok()).collect::<Option<_>>()?;
    let [m, k, n, row_a, row_b, row_c, ta, tb, more @ ..] = &numbers[..] else { return None };
    let flag = |x: u64| (x < 2).then_some(x == 1);
    let (sizes, rows) =
        ([*m, *k, *n].map(|size| size as usize), [*row_a, *row_b, *row_c].map(|row| row as usize));
    let shape = Shape { types, sizes, transposed: [flag(*ta)?, flag(*tb)?], rows };
    match more {
        &[count, apart] => Some(Line::Batch(shape, count as usize, flag(apart)?)),
        algorithm => Some(Line::Product(shape, algorithm.try_into().ok()?)),
    }
}

impl Drop for Plans {
    fn drop(&mut self) {
        // SAFETY: created by this, and not used again; what fails here, at the end, is past mending
        unsafe {
            for Plan { product, layouts, .. } in self.plans.values() {
                result::destroy_matmul_desc(*product).ok();
                for &layout in layouts {
                    result::destroy_matrix_layout(layout).ok();
                }
            }
            result::destroy_handle(self.library).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_again() {
        let shape = Shape {
            types: [Type::Bf16, Type::F32],
            sizes: [16_384, 768, 192],
            transposed: [false, true],
            rows: [768, 768, 576],
        };
        let product = Line::Product(shape, [1, 0xfedc_ba98_7654_3210, 3, 4, 5, 6, 7, u64::MAX]);
        let line = product.to_string();
        for kept in [product, Line::Batch(shape, 3, true), Line::Batch(shape, 24, false)] {
            assert_eq!(parse(kept.to_string().trim_end()), Some(kept));
        }
        let broken = [
            &line[..line.len() - 20],
            "",
            "bf16 f64 1 2 3",
            &line.replace("bf16", "f64"),
            &line.replace("bf16 f32", "bf16"),
            "f32 f32 1 2 3 1 2 3 2 0 1 2 3 4 5 6 7 8", // a flag that is 2
            "f32 f32 1 2 3 1 2 3 0 0 4 2",
        ];
        assert!(broken.into_iter().all(|line| parse(line.trim_end()).is_none()));
    }
}
