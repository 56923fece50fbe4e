//! Buffers that are recycled. A training step asks for the same sizes every time, and a fresh large allocation costs a page
//! fault per 4 KiB; so a dropped buffer goes to a free list and the next one of its length comes from there.

use super::Scalar;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// Elements of a CPU tensor. Dropping it returns the memory to the pool of its element type.
pub struct Buffer<T: Scalar>(Run<T>);

/// `len` elements of a vector, from `start` on.
struct Run<T> {
    values: Vec<T>,
    start: usize,
    len: usize,
}

/// Bytes of a cache line, where buffers begin: with AVX-512 a vector is as long, and half of them would lie across two.
const LINE: usize = 64;

impl<T: Scalar> Run<T> {
    fn new(len: usize) -> Self {
        let values = vec![T::zero(); len + LINE / size_of::<T>() - 1];
        let start = values.as_ptr().align_offset(LINE);
        Self { values, start, len }
    }
}

impl<T: Scalar> Buffer<T> {
    /// A buffer of unspecified contents (in debug builds NaN, so that a kernel that leaves a gap is seen).
    pub fn scratch(len: usize) -> Self {
        let mut buffer = Self(T::pool().take(len));
        if cfg!(debug_assertions) {
            buffer.fill(T::nan());
        }
        buffer
    }

    /// The elements, taken out of the pool's reach; a copy, unless they came as a vector.
    pub fn into_vec(mut self) -> Vec<T> {
        if self.0.values.len() > self.0.len {
            return self.to_vec();
        }
        self.0.len = 0;
        std::mem::take(&mut self.0.values)
    }
}

impl<T: Scalar> From<Vec<T>> for Buffer<T> {
    fn from(values: Vec<T>) -> Self {
        Self(Run { len: values.len(), values, start: 0 })
    }
}

impl<T: Scalar> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        let mut copy = Self(T::pool().take(self.len()));
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: Scalar> Drop for Buffer<T> {
    fn drop(&mut self) {
        let Run { values, start, len } = &mut self.0;
        T::pool().give(Run { values: std::mem::take(values), start: *start, len: *len });
    }
}

impl<T: Scalar> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0.values[self.0.start..][..self.0.len]
    }
}

impl<T: Scalar> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0.values[self.0.start..][..self.0.len]
    }
}

/// Shorter buffers are left to the allocator, which is fast at them.
const MIN_LEN: usize = 1024;

/// A free list per length. It never holds more elements than were in use at the busiest moment.
pub struct Pool<T>(Mutex<State<T>>);

struct State<T> {
    free: BTreeMap<usize, Vec<Run<T>>>,
    /// Elements in `free`, in use, and in use at the busiest moment.
    idle: usize,
    used: usize,
    peak: usize,
}

impl<T: Scalar> Default for Pool<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Pool<T> {
    /// An empty pool.
    pub const fn new() -> Self {
        Self(Mutex::new(State { free: BTreeMap::new(), idle: 0, used: 0, peak: 0 }))
    }
}

impl<T: Scalar> Pool<T> {
    fn take(&self, len: usize) -> Run<T> {
        if len < MIN_LEN {
            return Run { values: vec![T::zero(); len], start: 0, len };
        }
        let mut s = self.0.lock().expect("no thread panics while it holds the pool");
        s.used += len;
        s.peak = s.peak.max(s.used);
        let found = s.free.get_mut(&len).and_then(Vec::pop);
        if found.is_some() {
            s.idle -= len;
        }
        drop(s); // allocate outside the lock
        found.unwrap_or_else(|| Run::new(len))
    }

    fn give(&self, run: Run<T>) {
        let len = run.len;
        if len < MIN_LEN {
            return;
        }
        let mut s = self.0.lock().expect("no thread panics while it holds the pool");
        // saturating: a buffer may have come from the user's own Vec
        s.used = s.used.saturating_sub(len);
        if s.idle + s.used + len <= s.peak {
            s.idle += len;
            s.free.entry(len).or_default().push(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back() {
        let len = 123_457; // a length no other test uses
        let first = Buffer::<f32>::scratch(len);
        let address = first.as_ptr();
        assert_eq!(address.addr() % LINE, 0);
        drop(first);
        assert_eq!(Buffer::<f32>::scratch(len).as_ptr(), address);
    }
}
