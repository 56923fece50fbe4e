//! CUDA C to machine code by NVRTC, at run time and for the device in hand, kept on disk for the next time. Never to PTX for use:
//! a driver that is older than NVRTC refuses its PTX, but takes machine code of the same major version.

use super::executor::Type;
use super::kernels;
use cudarc::nvrtc::{result, sys};
use std::ffi::{CStr, CString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

/// Compiles `source`; `arch` sm_90 gives machine code (a cubin), compute_90 PTX text. No device and no driver is needed.
///
/// # Errors
/// A missing NVRTC, or what the compiler says.
pub fn compile(source: &str, arch: &str) -> Result<Vec<u8>, String> {
    super::probe::compiler().map_err(|why| why.to_string())?;
    let text = CString::new(source).map_err(|e| e.to_string())?;
    let program = result::create_program(&text, Some(c"kernels.cu")).map_err(|e| e.to_string())?;
    let options = options(arch);
    // SAFETY: the program was just created
    let compiled = unsafe { result::compile_program(program, &options) };
    let image = match compiled {
        // SAFETY: the program has been compiled
        Ok(()) => unsafe { image(program, arch.starts_with("sm_")) }.map_err(|e| e.to_string()),
        // SAFETY: the program is there; the log ends with NUL
        Err(error) => Err(unsafe { result::get_program_log(program) }.map_or(error.to_string(), |log| {
            let log = log.iter().map(|&c| c as u8).collect::<Vec<u8>>();
            let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
            format!("{error}: {log}")
        })),
    };
    // SAFETY: not used any more
    unsafe { result::destroy_program(program) }.ok();
    image
}

fn options(arch: &str) -> [String; 3] {
    // the last for lambdas with parameters of any type, which cannot say that they are the device's
    [format!("--gpu-architecture={arch}"), "--std=c++17".into(), "--device-as-default-execution-space".into()]
}

/// # Safety
/// The program must have been compiled.
unsafe fn image(program: sys::nvrtcProgram, cubin: bool) -> Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0;
    // SAFETY: the caller's promise, and as many bytes as asked for
    unsafe {
        if cubin {
            sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        } else {
            sys::nvrtcGetPTXSize(program, &mut size).result()?;
        }
        let mut bytes = vec![0u8; size];
        let out = bytes.as_mut_ptr().cast();
        if cubin {
            sys::nvrtcGetCUBIN(program, out).result()?;
        } else {
            sys::nvrtcGetPTX(program, out).result()?;
        }
        Ok(bytes)
    }
}

/// All kernels as machine code: those of each type in one image. Images are compiled side by side.
///
/// # Errors
/// As for [`compile`]. A cache that cannot be used is none.
pub(super) fn cubins(arch: &str) -> Result<[(Type, Vec<u8>); 2], String> {
    let [f32_, bf16] = std::thread::scope(|scope| {
        let compilers = Type::ALL.map(|element| scope.spawn(move || cubin(element, arch)));
        compilers.map(|compiler| compiler.join().expect("it returns what is wrong"))
    });
    Ok([(Type::F32, f32_?), (Type::Bf16, bf16?)])
}

/// From the cache, where it is there already.
fn cubin(element: Type, arch: &str) -> Result<Vec<u8>, String> {
    let mut kernels = kernels::all();
    kernels.retain(|&(_, of)| of == element);
    let source = kernels::source_of(&kernels);
    super::probe::compiler().map_err(|why| why.to_string())?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| e.to_string())?;
    let mut hash = DefaultHasher::new();
    (&source, options(arch), major, minor).hash(&mut hash);
    let file =
        cache().map(|folder| folder.join(format!("kernels-{element}-{arch}-{:016x}.cubin", hash.finish())));
    if let Some(kept) = file.as_ref().and_then(|file| std::fs::read(file).ok()) {
        return Ok(kept);
    }
    let image = compile(&source, arch)?;
    if let Some(file) = file {
        // whole or not at all, whoever else writes
        let part = file.with_extension(format!("{}.part", std::process::id()));
        let written = std::fs::create_dir_all(file.parent().expect("it has a folder"))
            .and_then(|()| std::fs::write(&part, &image))
            .and_then(|()| std::fs::rename(&part, &file));
        drop(written);
    }
    Ok(image)
}

/// Where this program keeps what took time to find: in the person's directory for caches.
pub(super) fn cache() -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    of("XDG_CACHE_HOME").or(of("HOME").map(|home| home.join(".cache"))).map(|caches| caches.join("rankgrad"))
}
