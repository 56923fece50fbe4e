//! rankgrad
pub mod autograd;
pub mod lowrank;
pub mod tensor;
