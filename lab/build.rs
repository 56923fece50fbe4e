//! Where Cargo.lock is: in a package beside its Cargo.toml, in this repository beside the workspace's. data.rs reads versions from it.

use std::path::Path;

fn main() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = [here.join("Cargo.lock"), here.join("../Cargo.lock")];
    let lock = places.iter().find(|path| path.exists()).expect("cargo writes Cargo.lock before it builds");
    println!("cargo::rustc-env=RANKGRAD_LOCK={}", lock.display());
    println!("cargo::rerun-if-changed={}", lock.display());
}
