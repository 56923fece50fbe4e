//! rankgrad
pub mod tensor;
