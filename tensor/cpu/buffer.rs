//! Buffers that are recycled. A training step asks for the same sizes every time, and a fresh large allocation costs a page
//! fault per 4 KiB; so a dropped buffer goes to a free list and the next one of its length comes from there.

use super::Scalar;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// Elements of a CPU tensor. Dropping it returns the memory to the pool of its element type.
pub struct Buffer<T: Scalar>(Vec<T>);

impl<T: Scalar> Buffer<T> {
    /// A buffer of unspecified contents (in debug builds NaN, so that a kernel that leaves a gap is seen).
    pub fn scratch(len: usize) -> Self {
        let mut values = T::pool().take(len);
        if cfg!(debug_assertions) {
            values.fill(T::nan());
        }
        Self(values)
    }

    /// The elements, taken out of the pool's reach.
    pub fn into_vec(mut self) -> Vec<T> {
        std::mem::take(&mut self.0)
    }
}

impl<T: Scalar> From<Vec<T>> for Buffer<T> {
    fn from(values: Vec<T>) -> Self {
        Self(values)
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
        T::pool().give(std::mem::take(&mut self.0));
    }
}

impl<T: Scalar> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Scalar> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

/// Shorter buffers are left to the allocator, which is fast at them.
const MIN_LEN: usize = 1024;

/// A free list per length. It never holds more elements than were in use at the busiest moment.
pub struct Pool<T>(Mutex<State<T>>);

struct State<T> {
    free: BTreeMap<usize, Vec<Vec<T>>>,
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
    fn take(&self, len: usize) -> Vec<T> {
        if len < MIN_LEN {
            return vec![T::zero(); len];
        }
        let mut s = self.0.lock().expect("no thread panics while it holds the pool");
        s.used += len;
        s.peak = s.peak.max(s.used);
        let found = s.free.get_mut(&len).and_then(Vec::pop);
        if found.is_some() {
            s.idle -= len;
        }
        drop(s); // allocate outside the lock
        found.unwrap_or_else(|| vec![T::zero(); len])
    }

    fn give(&self, values: Vec<T>) {
        let len = values.len();
        if len < MIN_LEN {
            return;
        }
        let mut s = self.0.lock().expect("no thread panics while it holds the pool");
        // saturating: a buffer may have come from the user's own Vec
        s.used = s.used.saturating_sub(len);
        if s.idle + s.used + len <= s.peak {
            s.idle += len;
            s.free.entry(len).or_default().push(values);
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
        drop(first);
        assert_eq!(Buffer::<f32>::scratch(len).as_ptr(), address);
    }
}
