//! The sources of the kernels, which the executors compile: CUDA through NVRTC, the simulator as C++.

use super::executor::Type;

/// What stands once in the translation unit: file and text.
const COMMON: (&str, &str) = ("common.cuh", include_str!("kernels/common.cuh"));

/// What stands in it once for each type of elements.
const BOTH: [(&str, &str); 2] = [
    ("elementwise.cu", include_str!("kernels/elementwise.cu")),
    ("rows.cu", include_str!("kernels/rows.cu")),
];

/// What stands in it for one type alone: kernels of the same names and arguments.
const F32: (&str, &str) = ("attention.cu", include_str!("kernels/attention.cu"));
const BF16: (&str, &str) = ("attention_bf16.cu", include_str!("kernels/attention_bf16.cu"));

/// The translation unit: in a namespace for each type of elements, T is the type and ELEMENT its name. `#line` lets a compiler's
/// messages name the file.
pub fn source() -> String {
    source_of(&all())
}

/// A translation unit of only those files that have one of these kernels.
pub fn source_of(kernels: &[(&str, Type)]) -> String {
    let file = |(name, text): (&str, &str)| format!("#line 1 \"{name}\"\n{text}");
    let of = |element: Type| {
        let (c, attention) = match element {
            Type::F32 => ("float", F32),
            Type::Bf16 => ("Bf16", BF16),
        };
        let wanted = |attention| {
            let is = |&(name, of): &(&str, Type)| of == element && name.starts_with("attention") == attention;
            kernels.iter().any(is)
        };
        let both = if wanted(false) { BOTH.map(file).concat() } else { String::new() };
        let own = if wanted(true) { file(attention) } else { String::new() };
        format!(
            "#undef ELEMENT\n#define ELEMENT {element}\nnamespace in_{element} {{\ntypedef {c} T;\n{both}{own}}}\n"
        )
    };
    file(COMMON) + &Type::ALL.map(of).concat()
}

/// All kernels: each name of [`NAMES`] for each type of elements.
pub fn all() -> Vec<(&'static str, Type)> {
    Type::ALL.into_iter().flat_map(|element| NAMES.map(|kernel| (kernel, element))).collect()
}

/// The name of a kernel in the translation unit.
pub fn name(kernel: &str, element: Type) -> String {
    format!("{kernel}_{element}")
}

/// The kernels, each of which is there for each type of elements.
pub const NAMES: [&str; 43] = [
    "fill",
    "widen",
    "narrow",
    "axpby",
    "axpby_each",
    "renormalised_step",
    "unary",
    "unary_grad",
    "binary",
    "add_row",
    "copy_cols",
    "copy_cols_each",
    "swiglu",
    "swiglu_grad",
    "rope",
    "embedding",
    "embedding_grad",
    "adamw",
    "softmax",
    "softmax_grad",
    "cross_entropy",
    "mean_loss",
    "rms_norm",
    "add_rms_norm",
    "rms_norm_grad",
    "layer_norm",
    "layer_norm_grad",
    "sum_rows",
    "layer_norm_gain",
    "sum",
    "sum_squares",
    "sum_parts",
    "normalised",
    "attention_1",
    "attention_2",
    "attention_4",
    "attention_delta",
    "attention_dq_1",
    "attention_dq_2",
    "attention_dq_4",
    "attention_dkv_1",
    "attention_dkv_2",
    "attention_dkv_4",
];
