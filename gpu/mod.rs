//! NVIDIA GPUs.

mod probe;

pub use probe::{Found, LIBS, Unavailable, devices};
