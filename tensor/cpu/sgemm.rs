//! One matrix product in f32: blocks that fit the caches, and a tile of C that stays in registers (Goto & van de Geijn 2008).
//!
//! Not the sharing among threads (gemm.rs). B is copied into panels as wide as a tile, so that it is read in order, unless few tiles would read the copy. A tile
//! reads one element at a time of each of its rows of A: where they stand if they are contiguous, or are read few times. Tiles
//! come strip by strip, side by side in the same rows, so that C is written along its rows: the processor fetches ahead along a few
//! rows, not along a hundred. Letters: C (m×n) ← or += A (m×k) · B (k×n); i, p, j run over m, k, n.

use super::{Accum, prefetch};
use pulp::{Simd, WithSimd};
use std::cell::RefCell;
use std::sync::atomic::{Ordering, compiler_fence};

/// Blocks of k, of m, and of n in panels: a strip of A (a tile's height × k) stays in the first-level cache while it meets all panels of B
/// (k × a tile's width), which stay in the second with the block of A. The fewer blocks of k, the less often C is read and written; [k, panels]
/// where there are 32 registers, as with AVX-512, which comes with a second level of 1 MiB or more, and where there are 16. MC is a
/// multiple of both tile heights.
const WITH_32: [usize; 2] = [384, 10];
const WITH_16: [usize; 2] = [256, 16];
const MC: usize = 240;

/// The most elements across a tile: three registers of 16.
const WIDEST: usize = 48;

thread_local! {
    /// Copies of a block of B and one of A, kept from one product to the next.
    static PACKED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A product to run; pointers with their row and column strides in elements.
pub struct Product<T> {
    pub sizes: [usize; 3],
    pub a: (*const T, isize, isize),
    pub b: (*const T, isize, isize),
    pub accum: Accum,
    /// Its rows are contiguous.
    pub c: (*mut T, isize),
    /// `Some(row)`: C is a part, from this row on, of a symmetric matrix of which only what is on and below the diagonal will
    /// be read; tiles above it are left out.
    pub lower: Option<usize>,
}

/// Runs a product.
///
/// # Safety
/// Each pointer must be valid for every element that its sizes and strides reach, and C must not overlap A or B.
pub unsafe fn sgemm(product: Product<f32>) {
    // SAFETY: the caller's promise
    unsafe { sgemm_on(pulp::Arch::new(), product) }
}

/// # Safety
/// As [`sgemm`].
unsafe fn sgemm_on(arch: pulp::Arch, product: Product<f32>) {
    PACKED.with_borrow_mut(|packed| {
        let [k_most, panels] = WITH_32;
        packed.resize(k_most * panels * WIDEST + (k_most + 1) * MC + 16, 0.0);
        let skip = packed.as_ptr().align_offset(64); // loads of a whole cache line should not straddle two
        let (b, a) = packed[skip..].split_at_mut(k_most * panels * WIDEST);
        arch.dispatch(Run { product, packed: [a, b] });
    })
}

struct Run<'a> {
    product: Product<f32>,
    packed: [&'a mut [f32]; 2],
}

impl WithSimd for Run<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // A tile's accumulators, with a row of B and an element of A, fill the registers. Of the shapes that do, the wide and low one has the fewest
        // instructions besides its products: 8 × 3 takes 11 loads for 24 products, 12 × 2 takes 14, and addresses of 12 rows for which there are not
        // enough registers.
        // SAFETY: `sgemm_on` is the only place that makes a `Run`, and has the caller's promise
        unsafe {
            match S::REGISTER_COUNT {
                _ if S::F32_LANES == 1 => portable_sgemm(self.product),
                32 => blocks::<S, 8, 3>(simd, WITH_32, self.product, self.packed),
                _ => blocks::<S, 6, 2>(simd, WITH_16, self.product, self.packed),
            }
        }
    }
}

/// One product in f64, and in f32 on processors without vectors that multiply and add at once: matrixmultiply's.
macro_rules! library {
    ($name:ident, $t:ty, $gemm:ident) => {
        ///
        /// # Safety
        /// As [`sgemm`].
        pub unsafe fn $name(product: Product<$t>) {
            let Product { sizes: [m, k, n], a, b, accum, c, .. } = product;
            let beta = if accum == Accum::Add { 1.0 } else { 0.0 };
            // SAFETY: the caller's promise is the callee's condition
            unsafe { matrixmultiply::$gemm(m, k, n, 1.0, a.0, a.1, a.2, b.0, b.1, b.2, beta, c.0, c.1, 1) }
        }
    };
}
library!(portable_sgemm, f32, sgemm);
library!(dgemm, f64, dgemm);

/// The loops over blocks. `H`: height of a tile; `V`: registers across it.
///
/// # Safety
/// As [`sgemm`].
#[inline(always)]
unsafe fn blocks<S: Simd, const H: usize, const V: usize>(
    simd: S,
    [k_most, panels_most]: [usize; 2],
    product: Product<f32>,
    packed: [&mut [f32]; 2],
) {
    let Product { sizes: [m, k, n], a: (a, a_row, a_col), b: (b, b_row, b_col), accum, c: (c, c_row), lower } =
        product;
    let (width, lanes) = (V * S::F32_LANES, S::F32_LANES);
    // blocks of k of nearly one size, whatever m and n are: the sums must not depend on how C is cut
    let k_step = k.div_ceil(k.div_ceil(k_most).max(1)).max(1);
    // a transposed A that few panels read is not worth a copy
    let copy_a = a_col != 1 && n > 2 * width;
    // nor is a B whose panels few tiles read, or that is a panel already; rows that end within a panel would be read beyond their end
    let not_worth_it = m <= 4 * H || (n == width && b_row == width as isize);
    let copy_b = !(not_worth_it && b_col == 1 && n.is_multiple_of(lanes));
    let [a_packed, b_packed] = packed.map(<[f32]>::as_mut_ptr);
    // SAFETY: all offsets stay inside the operands (m, k, n) or the packed blocks
    unsafe {
        for j0 in (0..n).step_by(panels_most * width) {
            let nc = (panels_most * width).min(n - j0);
            for p0 in (0..k.max(1)).step_by(k_step) {
                let kc = k_step.min(k - p0);
                let accum = if p0 > 0 { Accum::Add } else { accum };
                let b = b.offset(p0 as isize * b_row + j0 as isize * b_col);
                let mut panels = Panels { first: b, row: Some(b_row), wanted: nc, cols: nc };
                if copy_b {
                    for j in (0..nc).step_by(width) {
                        let cols = width.min(nc - j);
                        let (from, to) = (b.offset(j as isize * b_col), b_packed.add(j * kc));
                        match cols.div_ceil(lanes) {
                            1 => pack_b::<S, 1>(kc, cols, from, b_row, b_col, to),
                            2 => pack_b::<S, 2>(kc, cols, from, b_row, b_col, to),
                            _ => pack_b::<S, V>(kc, cols, from, b_row, b_col, to),
                        }
                    }
                    panels = Panels { first: b_packed, row: None, ..panels };
                }
                for i0 in (0..m).step_by(MC) {
                    let mc = MC.min(m - i0);
                    let block = (a.offset(i0 as isize * a_row + p0 as isize * a_col), a_row, a_col);
                    if copy_a {
                        pack_a::<H>(kc, mc, block, a_packed);
                    }
                    let mut i = 0;
                    while i < mc {
                        let h = height::<H>(mc - i);
                        let rows = if copy_a {
                            (a_packed.add(i * (kc + 1)).cast_const(), 1, h as isize)
                        } else {
                            (block.0.offset(i as isize * a_row), a_row, a_col)
                        };
                        let c = (c.offset((i0 + i) as isize * c_row + j0 as isize), c_row);
                        panels.wanted = lower.map_or(nc, |row| nc.min((row + i0 + i + h).saturating_sub(j0)));
                        match h {
                            8 => strip::<S, 8, V>(simd, kc, rows, panels, accum, c),
                            4 => strip::<S, 4, V>(simd, kc, rows, panels, accum, c),
                            2 => strip::<S, 2, V>(simd, kc, rows, panels, accum, c),
                            1 => strip::<S, 1, V>(simd, kc, rows, panels, accum, c),
                            _ => strip::<S, H, V>(simd, kc, rows, panels, accum, c),
                        }
                        i += h;
                    }
                }
            }
        }
    }
}

/// The height of the next tile, `left` rows before the end of a block.
#[inline(always)]
fn height<const H: usize>(left: usize) -> usize {
    [H, 8, 4, 2, 1].into_iter().find(|&h| h <= left.min(H)).unwrap_or(1)
}

/// Copies `kc` rows and `cols` columns of B to a panel of `V` registers' width, with zeros in the columns that are missing.
///
/// # Safety
/// B must have these elements, and the panel room for `kc` rows.
#[inline(always)]
unsafe fn pack_b<S: Simd, const V: usize>(
    kc: usize,
    cols: usize,
    b: *const f32,
    b_row: isize,
    b_col: isize,
    panel: *mut f32,
) {
    let width = V * S::F32_LANES;
    // SAFETY: the caller's promise; `p` < kc and `j` < cols
    unsafe {
        if cols < width {
            for p in 0..kc {
                for j in 0..width {
                    let x = if j < cols { *b.offset(p as isize * b_row + j as isize * b_col) } else { 0.0 };
                    *panel.add(p * width + j) = x;
                }
            }
        } else if b_col == 1 {
            for p in 0..kc {
                let from = b.offset(p as isize * b_row).cast::<[S::f32s; V]>();
                panel.add(p * width).cast::<[S::f32s; V]>().write_unaligned(from.read_unaligned());
            }
        } else {
            // 4×4 at a time, which the compiler turns into shuffles of registers
            let whole = if b_row == 1 { kc - kc % 4 } else { 0 };
            for p in (0..whole).step_by(4) {
                for j in (0..width).step_by(4) {
                    let mut x = [[0.0f32; 4]; 4];
                    for (i, x) in x.iter_mut().enumerate() {
                        *x = b
                            .offset(p as isize + (j + i) as isize * b_col)
                            .cast::<[f32; 4]>()
                            .read_unaligned();
                    }
                    let y: [[f32; 4]; 4] = std::array::from_fn(|i| x.map(|x| x[i])); // [p, j]
                    for (i, y) in y.into_iter().enumerate() {
                        panel.add((p + i) * width + j).cast::<[f32; 4]>().write_unaligned(y);
                    }
                }
            }
            for p in whole..kc {
                for j in 0..width {
                    *panel.add(p * width + j) = *b.offset(p as isize * b_row + j as isize * b_col);
                }
            }
        }
    }
}

/// Copies a block of A [mc, kc] whose columns are contiguous, tile by tile, each as [kc, height] with room after it: columns
/// of a whole tile are copied 8 long, if that is longer, and what is too much is overwritten by the next column.
///
/// # Safety
/// A must have these elements, and `packed` room for them.
#[inline(always)]
unsafe fn pack_a<const H: usize>(kc: usize, mc: usize, a: (*const f32, isize, isize), packed: *mut f32) {
    let (a, a_row, a_col) = a;
    // SAFETY: the caller's promise; i + h ≤ mc and p < kc
    unsafe {
        let whole = if a_row == 1 { mc - mc % H } else { 0 };
        let long = if H <= 8 { whole.min((mc + H).saturating_sub(8) / H * H) } else { 0 }; // A ends 8 rows after its last tile
        for p in 0..kc {
            let (from, to) = (a.offset(p as isize * a_col), packed.add(p * H));
            for i in (0..long).step_by(H) {
                let column = from.add(i).cast::<[f32; 8]>().read_unaligned();
                to.add(i * (kc + 1)).cast::<[f32; 8]>().write_unaligned(column);
            }
            for i in (long..whole).step_by(H) {
                let column = from.add(i).cast::<[f32; H]>().read_unaligned();
                to.add(i * (kc + 1)).cast::<[f32; H]>().write_unaligned(column);
            }
        }
        let mut i = whole;
        while i < mc {
            let h = height::<H>(mc - i);
            for p in 0..kc {
                for r in 0..h {
                    *packed.add(i * (kc + 1) + p * h + r) =
                        *a.offset((i + r) as isize * a_row + p as isize * a_col);
                }
            }
            i += h;
        }
    }
}

/// Panels of a block of B, side by side; the last may be less wide than a tile.
#[derive(Clone, Copy)]
struct Panels {
    first: *const f32,
    /// From one row of B to the next, where it lies in place; copied, panels follow each other, each as wide as it is.
    row: Option<isize>,
    /// Columns of the block, and those of them in which the tiles begin that are asked for.
    cols: usize,
    wanted: usize,
}

/// `H` rows of C, tile by tile.
///
/// # Safety
/// As [`tile`], for every panel.
#[inline(always)]
unsafe fn strip<S: Simd, const H: usize, const V: usize>(
    simd: S,
    kc: usize,
    a: (*const f32, isize, isize),
    panels: Panels,
    accum: Accum,
    (c, c_row): (*mut f32, isize),
) {
    for j in (0..panels.wanted).step_by(V * S::F32_LANES) {
        let cols = panels.cols - j;
        let vectors = cols.div_ceil(S::F32_LANES).min(V);
        // SAFETY: the caller's promise
        unsafe {
            let panel = match panels.row {
                Some(row) => (panels.first.add(j), row),
                None => (panels.first.add(j * kc), (vectors * S::F32_LANES) as isize),
            };
            let c = (c.add(j), c_row);
            match vectors {
                1 => tile::<S, H, 1>(simd, kc, a, panel, accum, c, cols),
                2 => tile::<S, H, 2>(simd, kc, a, panel, accum, c, cols),
                _ => tile::<S, H, V>(simd, kc, a, panel, accum, c, cols),
            }
        }
    }
}

/// `H` rows of C and `V` registers across, or as many columns as there are: `cols`.
///
/// # Safety
/// A must have `H` rows and `kc` columns, one of its strides must be 1, the panel have `kc` rows, C `H` rows and the columns.
#[inline(always)]
unsafe fn tile<S: Simd, const H: usize, const V: usize>(
    simd: S,
    kc: usize,
    (a, a_row, a_col): (*const f32, isize, isize),
    (panel, b_row): (*const f32, isize),
    accum: Accum,
    (c, c_row): (*mut f32, isize),
    cols: usize,
) {
    let width = V * S::F32_LANES;
    let zero = simd.splat_f32s(0.0);
    let mut sums = [[zero; V]; H];
    // SAFETY: the caller's promise
    unsafe {
        for i in 0..H {
            for j in (0..width).step_by(16) {
                prefetch(c.offset(i as isize * c_row).wrapping_add(j)); // a cache line, which arrives while the sums are formed
            }
        }
        // what the compiler knows of the strides becomes part of the instructions
        match (a_col == 1, b_row == width as isize) {
            (true, true) => add_products(simd, kc, (a, a_row, 1), (panel, width as isize), &mut sums),
            (true, false) => add_products(simd, kc, (a, a_row, 1), (panel, b_row), &mut sums),
            (false, true) => add_products(simd, kc, (a, 1, a_col), (panel, width as isize), &mut sums),
            (false, false) => add_products(simd, kc, (a, 1, a_col), (panel, b_row), &mut sums),
        }
        if cols >= width {
            for (i, sums) in sums.into_iter().enumerate() {
                let c = c.offset(i as isize * c_row).cast::<[S::f32s; V]>();
                let mut y = sums;
                if accum == Accum::Add {
                    for (y, c) in y.iter_mut().zip(c.read_unaligned()) {
                        *y = simd.add_f32s(c, *y);
                    }
                }
                c.write_unaligned(y);
            }
        } else {
            // a copy: were the sums themselves read by address, they would not be kept in registers above
            let copy = sums;
            let copy = (&raw const copy).cast::<f32>();
            for i in 0..H {
                for j in 0..cols {
                    let (c, sum) = (c.offset(i as isize * c_row + j as isize), *copy.add(i * width + j));
                    *c = if accum == Accum::Add { *c + sum } else { sum };
                }
            }
        }
    }
}

/// Adds A, `H` rows and `kc` columns, times a panel to `sums`.
///
/// # Safety
/// Both must have these elements.
#[inline(always)]
unsafe fn add_products<S: Simd, const H: usize, const V: usize>(
    simd: S,
    kc: usize,
    (mut a, a_row, a_col): (*const f32, isize, isize),
    (mut b, b_row): (*const f32, isize),
    sums: &mut [[S::f32s; V]; H],
) {
    // four steps at a time: few instructions besides the products matter where two threads share a core
    const STEPS: usize = 4;
    let mut left = kc;
    // SAFETY: the caller's promise
    unsafe {
        while left >= STEPS {
            for p in 0..STEPS as isize {
                add_product(simd, a.offset(p * a_col), a_row, b.offset(p * b_row), sums);
                // otherwise the compiler loads for the next step before this one's products, for which 16 registers are too few: a sum goes to memory
                if S::REGISTER_COUNT == 16 {
                    compiler_fence(Ordering::SeqCst);
                }
            }
            (a, b) = (a.offset(STEPS as isize * a_col), b.offset(STEPS as isize * b_row));
            left -= STEPS;
        }
        for p in 0..left as isize {
            add_product(simd, a.offset(p * a_col), a_row, b.offset(p * b_row), sums);
        }
    }
}

/// Adds a column of A, `H` elements from `a` on, times a row of a panel to `sums`.
///
/// # Safety
/// Both must have these elements.
#[inline(always)]
unsafe fn add_product<S: Simd, const H: usize, const V: usize>(
    simd: S,
    a: *const f32,
    a_row: isize,
    b: *const f32,
    sums: &mut [[S::f32s; V]; H],
) {
    // SAFETY: the caller's promise
    unsafe {
        let b = b.cast::<[S::f32s; V]>().read_unaligned();
        for (i, sums) in sums.iter_mut().enumerate() {
            let a = simd.splat_f32s(*a.offset(i as isize * a_row));
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = simd.mul_add_f32s(a, b, *sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_sum_in_f64() {
        agrees_on(pulp::Arch::new());
    }

    /// The paths that a newer processor does not take by itself.
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    #[test]
    fn agrees_with_the_sum_in_f64_on_older_processors() {
        agrees_on(pulp::Arch::Scalar);
        match pulp::x86::V3::try_new() {
            Some(avx2) => agrees_on(pulp::Arch::V3(avx2)),
            None => println!("no AVX2 here: its path was not tested"),
        }
    }

    /// Sizes around the edges of tiles and of blocks.
    fn agrees_on(arch: pulp::Arch) {
        let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 7) % 2048) as f32 / 1024.0 - 1.0;
        let mut case = 0;
        for m in [1, 5, 11, 12, 13, 121, 253] {
            for k in [0, 1, 7, 8, 257, 515] {
                for n in [1, 15, 16, 32, 33, 48, 64, 70, 96, 144, 1030] {
                    case += 1;
                    if m * k * n > 2_000_000 && case % 8 != 0 {
                        continue;
                    }
                    let (ta, tb, add) = (case & 1 == 1, case & 2 == 2, case & 4 == 4);
                    let a: Vec<f32> = (0..m * k).map(value).collect();
                    let b: Vec<f32> = (0..k * n).map(|i| value(i + 12_345)).collect();
                    let start: Vec<f32> = (0..m * n).map(|i| value(i + 54_321)).collect();
                    let mut c = start.clone();
                    let at = |t: bool, rows: usize, cols: usize| {
                        if t { [1, rows as isize] } else { [cols as isize, 1] }
                    };
                    let ([ar, ac], [br, bc]) = (at(ta, m, k), at(tb, k, n));
                    let accum = if add { Accum::Add } else { Accum::Replace };
                    // SAFETY: the strides are those of the vectors' sizes
                    unsafe {
                        sgemm_on(
                            arch,
                            Product {
                                sizes: [m, k, n],
                                a: (a.as_ptr(), ar, ac),
                                b: (b.as_ptr(), br, bc),
                                accum,
                                c: (c.as_mut_ptr(), n as isize),
                                lower: None,
                            },
                        );
                    }
                    for i in 0..m {
                        for j in 0..n {
                            let term = |p: usize| {
                                let a = a[(i as isize * ar + p as isize * ac) as usize] as f64;
                                a * b[(p as isize * br + j as isize * bc) as usize] as f64
                            };
                            let before = if add { start[i * n + j] as f64 } else { 0.0 };
                            let want = before + (0..k).map(term).sum::<f64>();
                            let size = 1.0 + (0..k).map(|p| term(p).abs()).sum::<f64>();
                            // each of at most k + 2 roundings is off by half an ulp of the sum of magnitudes, at worst
                            let tolerance = (k + 2) as f64 * 6e-8 * size;
                            let got = c[i * n + j] as f64;
                            assert!(
                                (got - want).abs() <= tolerance,
                                "{arch:?} {m}×{k}×{n} {ta} {tb} {accum:?}: [{i}, {j}] is {got}, not {want}"
                            );
                        }
                    }
                }
            }
        }
    }
}
