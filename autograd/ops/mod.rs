//! Every op, grouped by subject: forward, and its backward directly below.

mod attention;
mod elementwise;
mod layout;
mod linear;
mod norm;
mod token;

pub use attention::Rope;
pub use layout::concat;
