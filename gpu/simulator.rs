//! The kernels on the processor: test equipment for all that does not need a real GPU, see gpu/simulator/simulator.h. It needs a
//! C++ compiler (`c++`, or what the environment's CXX names).
//!
//! Every launch has another schedule of its threads. Memory starts as NaN and has a margin of NaN on both sides: what is read
//! beyond shows in results, what is written there panics when the memory is freed.

use super::executor::{Address, Arg, Executor, Gemm, Launch, Type, pointers};
use super::kernels;
use crate::tensor::Bf16;
use std::alloc::Layout;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

type Simulate = unsafe extern "C" fn(
    name: *const c_char,
    grid: *const u32,
    threads: u32,
    shared: usize,
    schedule: u32,
    args: *const *mut c_void,
    count: usize,
) -> *const c_char;

/// The compiled kernels.
#[derive(Debug)]
pub struct Simulator {
    simulate: Simulate,
    launches: AtomicU32,
    _library: libloading::Library, // `simulate` is in it
}

impl Simulator {
    /// The kernels as they are.
    ///
    /// # Errors
    /// That there is no compiler, or what it says.
    pub fn new() -> Result<Self, String> {
        Self::with(&kernels::source(), &kernels::all(), &[])
    }

    /// Another source, the kernels that are to be called in it, and more options of the compiler.
    ///
    /// # Errors
    /// As for [`Simulator::new`].
    pub fn with(source: &str, kernels: &[(&str, Type)], options: &[&str]) -> Result<Self, String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("rankgrad-simulator-{}-{number}", std::process::id()));
        std::fs::create_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let opened = Self::compile(&folder, source, kernels, options);
        std::fs::remove_dir_all(&folder).ok(); // what is loaded stays
        opened
    }

    fn compile(
        folder: &Path,
        source: &str,
        kernels: &[(&str, Type)],
        options: &[&str],
    ) -> Result<Self, String> {
        let library = folder.join("kernels.so");
        Self::build(&library, source, kernels, options)?;
        // SAFETY: a library that this function has made; its initialisers are those of the C++ library
        let library = unsafe { libloading::Library::new(&library) }.map_err(|e| e.to_string())?;
        // SAFETY: simulator.h defines the function with this type
        let simulate = unsafe { *library.get::<Simulate>(b"simulate").map_err(|e| e.to_string())? };
        Ok(Self { simulate, launches: AtomicU32::new(0), _library: library })
    }

    /// Makes the shared library, without opening it.
    ///
    /// # Errors
    /// As for [`Simulator::new`].
    pub fn build(
        library: &Path,
        source: &str,
        kernels: &[(&str, Type)],
        options: &[&str],
    ) -> Result<(), String> {
        let text = library.with_extension("cpp");
        let row = |(kernel, element): &(&str, Type)| format!("SIMULATE({element}, {kernel})\n");
        let table: String = kernels.iter().map(row).collect();
        let host = include_str!("simulator/simulator.h");
        let all = format!("#line 1 \"simulator.h\"\n{host}{source}\nSIMULATE_BEGIN\n{table}SIMULATE_END\n");
        std::fs::write(&text, all).map_err(|e| format!("{}: {e}", text.display()))?;
        let compiler = std::env::var("CXX").unwrap_or("c++".into());
        let mut command = Command::new(&compiler);
        let usual = "-std=c++17 -O2 -ffp-contract=off -fno-strict-aliasing -w -shared -fPIC";
        command.args(usual.split(' ')).args(options);
        command.arg("-o").arg(library).arg(&text).stdin(Stdio::null());
        let output = command.output().map_err(|e| format!("no C++ compiler: {compiler}: {e}"))?;
        if !output.status.success() {
            return Err(format!("{compiler}: {}", String::from_utf8_lossy(&output.stderr)));
        }
        Ok(())
    }
}

/// Bytes on both sides of an allocation, and its alignment.
const MARGIN: usize = 256;
/// Every byte that nobody has written: four of them are a NaN, and an index that is out of range.
const POISON: u8 = 0xff;

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes + 2 * MARGIN, MARGIN).expect("a size that fits")
}

impl Executor for Simulator {
    fn alloc(&self, bytes: usize) -> Address {
        // SAFETY: the layout has a size, and the whole of it is written
        unsafe {
            let start = std::alloc::alloc(layout(bytes));
            assert!(!start.is_null(), "{bytes} bytes: out of memory");
            start.write_bytes(POISON, bytes + 2 * MARGIN);
            start.add(MARGIN) as Address
        }
    }

    unsafe fn free(&self, address: Address, bytes: usize) {
        let start = (address as *mut u8).wrapping_sub(MARGIN);
        // SAFETY: the caller's promise: `alloc` made it with this layout
        let whole = unsafe {
            let all = std::slice::from_raw_parts(start, bytes + 2 * MARGIN);
            let whole = [&all[..MARGIN], &all[MARGIN + bytes..]].concat().iter().all(|&b| b == POISON);
            std::alloc::dealloc(start, layout(bytes));
            whole
        };
        assert!(
            whole || std::thread::panicking(),
            "a kernel wrote outside of an allocation of {bytes} bytes"
        );
    }

    unsafe fn upload(&self, from: &[u8], to: Address) {
        // SAFETY: the caller's promise
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) }
    }

    unsafe fn download(&self, from: Address, to: &mut [u8]) {
        // SAFETY: the caller's promise
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from as *const u8, to.len()) }
    }

    unsafe fn copy(&self, from: Address, to: Address, bytes: usize) {
        // SAFETY: the caller's promise
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes) }
    }

    unsafe fn launch(&self, launch: Launch, args: &[Arg]) {
        let Launch { kernel, element, grid, threads, shared } = launch;
        assert!(threads.is_multiple_of(32) && threads <= 1024, "{kernel}: {threads} threads");
        let schedule = self.launches.fetch_add(1, Ordering::Relaxed);
        let name = CString::new(kernels::name(kernel, element)).expect("names have no NUL");
        let args = pointers(args);
        // SAFETY: the caller's promise
        let error = unsafe {
            let (args, count) = (args.as_ptr(), args.len());
            (self.simulate)(name.as_ptr(), grid.as_ptr(), threads, shared as usize, schedule, args, count)
        };
        if !error.is_null() {
            // SAFETY: a literal of simulator.h
            let error = unsafe { CStr::from_ptr(error) }.to_string_lossy();
            panic!("{kernel}, schedule {schedule}: {error}");
        }
    }

    unsafe fn gemm(&self, gemm: &Gemm) {
        let Gemm { element, result, m, k, n, transposed: [ta, tb], rows, add, ref operands } = *gemm;
        let strides = |t: bool, row: usize| if t { (1, row as isize) } else { (row as isize, 1) };
        let ((ra, ca), (rb, cb)) = (strides(ta, rows[0]), strides(tb, rows[1]));
        let beta = if add { 1.0 } else { 0.0 };
        // SAFETY: the caller's promise
        let product = |a: *const f32, b: *const f32, c: *mut f32| unsafe {
            matrixmultiply::sgemm(m, k, n, 1.0, a, ra, ca, b, rb, cb, beta, c, rows[2] as isize, 1)
        };
        for &[a, b, c] in operands {
            match element {
                Type::F32 => product(a as *const f32, b as *const f32, c as *mut f32),
                Type::Bf16 => {
                    // elements from the first to the last, of `rows` rows of `cols` elements
                    let reach = |[rows, cols]: [usize; 2], row: usize| rows.saturating_sub(1) * row + cols;
                    let turned =
                        |t: bool, [rows, cols]: [usize; 2]| if t { [cols, rows] } else { [rows, cols] };
                    let [len_a, len_b] =
                        [reach(turned(ta, [m, k]), rows[0]), reach(turned(tb, [k, n]), rows[1])];
                    // SAFETY: the caller's promise, and any bits are a Bf16; A and B may be one, C is neither
                    let (a, b) = unsafe {
                        let slice = std::slice::from_raw_parts::<Bf16>;
                        (slice(a as *const _, len_a), slice(b as *const _, len_b))
                    };
                    let wide = |x: &[Bf16]| -> Vec<f32> { x.iter().map(|&x| x.into()).collect() };
                    let (a, b) = (wide(a), wide(b));
                    if result == Type::F32 {
                        product(a.as_ptr(), b.as_ptr(), c as *mut f32);
                        continue;
                    }
                    // SAFETY: as above
                    let c = unsafe { std::slice::from_raw_parts_mut(c as *mut Bf16, reach([m, n], rows[2])) };
                    let mut sum = wide(c);
                    product(a.as_ptr(), b.as_ptr(), sum.as_mut_ptr());
                    c.iter_mut().zip(sum).for_each(|(c, sum)| *c = sum.into()); // what lies between its columns stays as it is
                }
            }
        }
    }

    fn sync(&self) {}
}
