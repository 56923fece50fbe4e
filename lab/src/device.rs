//! `devices`: what there is to compute on.

use crate::error::Result;

/// Prints a line for the processor and one for each GPU, or why there is none.
///
/// # Errors
/// None: that there is no GPU is an answer.
pub fn devices() -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    crate::say!("cpu: {cores} threads");
    match gpus() {
        Ok(lines) => crate::say!("{}", lines.join("\n")),
        Err(why) => crate::say!("cuda: {why}"),
    }
    Ok(())
}

/// One line for each GPU.
///
/// # Errors
/// Why none can be used.
#[cfg(feature = "cuda")]
fn gpus() -> std::result::Result<Vec<String>, String> {
    let found = rankgrad::gpu::devices().map_err(|why| why.to_string())?;
    Ok(found.iter().map(ToString::to_string).collect())
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> std::result::Result<Vec<String>, String> {
    Err("this build has no GPU support; build with --features cuda".into())
}
