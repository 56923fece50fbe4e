//! The sizes of a tensor's axes: at most four, kept inline so that a shape is `Copy` and prints as `[4, 6]`.

use std::fmt;

const MAX_RANK: usize = 4;

/// Sizes of up to four axes, slowest first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    rank: usize,
    dims: [usize; MAX_RANK],
}

impl Shape {
    /// The sizes as a slice.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// Number of elements: the product of the sizes, 1 for rank 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.dims().iter().product()
    }

    /// Size of the last axis; 1 for rank 0.
    pub fn cols(&self) -> usize {
        self.dims().last().copied().unwrap_or(1)
    }

    /// Product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.dims().split_last().map_or(1, |(_, rest)| rest.iter().product())
    }

    /// The same shape with another last axis.
    ///
    /// # Panics
    /// If there is no last axis.
    #[track_caller]
    pub fn with_cols(mut self, cols: usize) -> Self {
        assert!(self.rank > 0, "with_cols: {self} has no last axis");
        self.dims[self.rank - 1] = cols;
        self
    }

    /// Both sizes of a matrix.
    ///
    /// # Panics
    /// If the rank is not 2; `op` names the caller's operation.
    #[track_caller]
    pub fn matrix(&self, op: &str) -> (usize, usize) {
        let [m, n] = *self.dims() else { panic!("{op}: {self} is not a matrix") };
        (m, n)
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(sizes: [usize; N]) -> Self {
        Self::from(&sizes[..])
    }
}

impl From<&[usize]> for Shape {
    /// # Panics
    /// With more than four axes.
    #[track_caller]
    fn from(sizes: &[usize]) -> Self {
        let rank = sizes.len();
        assert!(rank <= MAX_RANK, "{sizes:?}: a tensor has at most {MAX_RANK} axes");
        let mut dims = [1; MAX_RANK];
        dims[..rank].copy_from_slice(sizes);
        Self { rank, dims }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
