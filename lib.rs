//! rankgrad
