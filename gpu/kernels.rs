//! The sources of the kernels, which the executors compile: CUDA through NVRTC, the simulator as C++.

/// File and text, in the order in which they make one translation unit.
pub const SOURCES: [(&str, &str); 4] = [
    ("common.cuh", include_str!("kernels/common.cuh")),
    ("elementwise.cu", include_str!("kernels/elementwise.cu")),
    ("rows.cu", include_str!("kernels/rows.cu")),
    ("attention.cu", include_str!("kernels/attention.cu")),
];

/// All of them; `#line` lets a compiler's messages name the file.
pub fn source() -> String {
    SOURCES.iter().map(|(file, text)| format!("#line 1 \"{file}\"\n{text}")).collect()
}

/// The names of all kernels.
pub const NAMES: [&str; 36] = [
    "fill",
    "axpby",
    "unary",
    "unary_grad",
    "binary",
    "add_row",
    "copy_cols",
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
    "rms_norm_grad",
    "layer_norm",
    "layer_norm_grad",
    "sum_rows",
    "rms_norm_gain",
    "layer_norm_gain",
    "sum",
    "sum_squares",
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
