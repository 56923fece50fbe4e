//! `export`: a checkpoint's model as files that other programs read, in the layout of Hugging Face's Llama.
//!
//! W = ABᵀ is multiplied out, or, with `--factorized`, kept as two tensors. The model's rotary positions, norms and SwiGLU
//! are Llama's own, so names and one JSON file are all that changes. Reading such files: import.rs.
//! Letters: m outputs, n inputs, r rank.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use rankgrad::lowrank::Params;
use rankgrad::tensor::{Cpu, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::checkpoint::{self, Checkpoint};
use crate::cli::{ExportArgs, Layout};
use crate::config::{Config, name};
use crate::error::{Error, Result, cannot};
use crate::tokens::byte_letters;
use crate::trainer::{load_model, without_guides};

/// Writes a directory, whole or not at all.
///
/// # Errors
/// A checkpoint that cannot be read or still has guides, a directory that exists, a full disk.
pub fn export(args: &ExportArgs) -> Result<()> {
    let Layout::HfLlama = args.to;
    let checkpoint = Checkpoint::load_weights(&checkpoint::find(&args.checkpoint)?)?;
    let tokenizer = checkpoint.tokenizer.clone();
    let config = checkpoint.meta.config.clone();
    without_guides(&checkpoint, &args.checkpoint)?;
    let (_, params) = load_model(&Cpu::default(), checkpoint)?;
    if args.factorized && params.pair_names.is_empty() {
        let method = name(config.method);
        return Err(Error::new(format!(
            "--factorized: a model of {method} has no factor pairs; leave it out"
        )));
    }
    let tensors = tensors(&params, args.factorized)?;
    let count: usize = tensors.iter().map(|(_, x)| x.len()).sum();
    let files = files(&config, &tensors, args.factorized, tokenizer)?;
    write_directory(&args.directory, &files)?;
    let what = if args.factorized { "factor pairs" } else { "merged" };
    crate::say!("{}: {} tensors, {count} parameters ({what})", args.directory.display(), tensors.len());
    Ok(())
}

/// Names and contents of all files. `tokenizer`: the text of its tokenizer.json; None: bytes are tokens.
pub fn files(
    config: &Config,
    tensors: &[(String, Tensor<Cpu<f32>>)],
    factorized: bool,
    tokenizer: Option<String>,
) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let json = |value| (serde_json::to_string_pretty(&value).expect("plain values") + "\n").into_bytes();
    let mut files = vec![
        ("config.json", json(config_json(config))),
        ("model.safetensors", safetensors(tensors)?),
        ("tokenizer.json", tokenizer.map_or_else(|| json(tokenizer_json()), String::into_bytes)),
        ("tokenizer_config.json", json(tokenizer_config_json(config))),
    ];
    if factorized {
        files.push(("README.md", FACTORIZED_README.into()));
    }
    Ok(files)
}

/// What Hugging Face's Llama calls our parameters; None: no such name.
pub fn llama_name(own: &str) -> Option<String> {
    Some(match own {
        "embedding" => "model.embed_tokens.weight".into(),
        "norm" => "model.norm.weight".into(),
        "head" => "lm_head.weight".into(),
        _ => {
            let (layer, part) = own.strip_prefix("blocks.")?.split_once('.')?;
            let part = match part {
                "attention_norm" => "input_layernorm",
                "ffn_norm" => "post_attention_layernorm",
                "q" => "self_attn.q_proj",
                "k" => "self_attn.k_proj",
                "v" => "self_attn.v_proj",
                "o" => "self_attn.o_proj",
                "gate" => "mlp.gate_proj",
                "up" => "mlp.up_proj",
                "down" => "mlp.down_proj",
                _ => return None,
            };
            format!("model.layers.{layer}.{part}.weight")
        }
    })
}

/// All parameters under the names of Llama; factors, where they are kept, as NAME.A and NAME.B.
pub fn tensors(params: &Params<Cpu<f32>>, factorized: bool) -> Result<Vec<(String, Tensor<Cpu<f32>>)>> {
    let known = |own: &String| {
        llama_name(own).ok_or_else(|| Error::new(format!("Llama has no tensor for the parameter `{own}`")))
    };
    let mut all = vec![];
    for (own, pair) in params.pair_names.iter().zip(&params.values.pairs) {
        let name = known(own)?;
        if factorized {
            let stem = name.trim_end_matches(".weight");
            all.push((format!("{stem}.A"), pair.a.clone())); // [m, r]
            all.push((format!("{stem}.B"), pair.b.clone())); // [n, r]
        } else {
            all.push((name, pair.to_dense())); // [m, n]
        }
    }
    let whole = params.hidden_names.iter().zip(&params.values.hidden);
    for (own, x) in whole.chain(params.dense_names.iter().zip(&params.values.dense)) {
        all.push((known(own)?, x.clone())); // as it is
    }
    Ok(all)
}

fn safetensors(tensors: &[(String, Tensor<Cpu<f32>>)]) -> Result<Vec<u8>> {
    let failed = |e: &dyn std::fmt::Display| Error::new(format!("cannot encode the weights: {e}"));
    let host: Vec<(&String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, x)| {
            let bytes = x.to_vec().into_iter().flat_map(f32::to_le_bytes).collect();
            (name, x.shape().dims().to_vec(), bytes)
        })
        .collect();
    let views = host.iter().map(|(name, shape, bytes)| {
        Ok((*name, TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(|e| failed(&e))?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]); // what transformers asks for
    safetensors::serialize(views, Some(metadata)).map_err(|e| failed(&e))
}

fn config_json(c: &Config) -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.dim / c.heads,
        "max_position_embeddings": c.context,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
        "rope_parameters": { "rope_type": "default", "rope_theta": c.rope_base }, // where newer versions look
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": c.tie,
        "initializer_range": c.init_std,
        "bos_token_id": null,
        "eos_token_id": null,
        "dtype": "float32",
    })
}

/// Bytes as tokens: a byte-level BPE without merges, in which byte b has the id b.
fn tokenizer_json() -> serde_json::Value {
    let vocab: serde_json::Map<_, _> =
        byte_letters().zip(0..256).map(|(c, b)| (c.into(), b.into())).collect();
    let bytes =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": null,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
        },
    })
}

fn tokenizer_config_json(c: &Config) -> serde_json::Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": c.context,
        "clean_up_tokenization_spaces": false,
    })
}

const FACTORIZED_README: &str = "\
# Factor pairs

`model.safetensors` has Hugging Face Llama's tensors, but each matrix of a block as two: `NAME.A` [outputs, rank] and `NAME.B`
[inputs, rank], with `NAME.weight` = A·Bᵀ. `transformers` does not know them; with the pairs multiplied out it does:

    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, LlamaForCausalLM

    tensors = load_file('model.safetensors')
    for name in [name[:-2] for name in tensors if name.endswith('.A')]:
        tensors[name + '.weight'] = tensors.pop(name + '.A') @ tensors.pop(name + '.B').T
    model = LlamaForCausalLM(AutoConfig.from_pretrained('.'))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {'lm_head.weight'}  # missing where it is tied to the embedding
    model.tie_weights()

In PyTorch a layer of its own keeps them apart: y = (x @ B) @ A.T, 2·rank·(inputs + outputs) FLOPs a token.
";

/// A directory that is to be written must not exist yet.
///
/// # Errors
/// It does.
pub fn must_be_new(directory: &Path) -> Result<()> {
    match directory.exists() {
        true => Err(Error::new(format!("{} exists; choose a new directory", directory.display()))),
        false => Ok(()),
    }
}

/// Writes files into a directory that must not exist yet, under another name first: whoever finds it finds all of it.
///
/// # Errors
/// A directory that exists, a full disk.
pub fn write_directory(directory: &Path, files: &[(&str, Vec<u8>)]) -> Result<()> {
    must_be_new(directory)?;
    let mut unfinished = directory.as_os_str().to_owned();
    unfinished.push(".writing");
    let unfinished = PathBuf::from(unfinished);
    let write = || {
        fs::create_dir_all(&unfinished)?;
        files.iter().try_for_each(|(name, bytes)| fs::write(unfinished.join(name), bytes))?;
        fs::rename(&unfinished, directory)
    };
    write().map_err(|e| {
        let _ = fs::remove_dir_all(&unfinished);
        cannot("write", directory)(e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Method, Overrides};
    use crate::model::Model;

    /// The model of `config`, exported and read back by transformers, must give our logits. Needs a Python with torch and
    /// transformers, named by RANKGRAD_HF_PYTHON; says so and passes without.
    #[test]
    fn transformers_gives_the_same_logits() {
        let Some(python) = std::env::var_os("RANKGRAD_HF_PYTHON") else {
            println!("skipped: RANKGRAD_HF_PYTHON names no Python with torch and transformers");
            return;
        };
        for (method, tie, kv_heads) in [(Method::Spectron, false, 2), (Method::DenseMuon, true, 4)] {
            let defaults = Overrides::default().resolve().unwrap();
            let sizes = Config { dim: 32, layers: 2, heads: 4, kv_heads, ffn: 48, context: 24, ..defaults };
            let config = Config { method, tie, init_std: 0.3, ..sizes };
            let (model, params) = Model::new(&Cpu::<f32>::default(), &config);
            let dir = tempfile::tempdir().unwrap();
            let tensors = tensors(&params, false).unwrap();
            let files = files(&config, &tensors, false, None).unwrap();
            write_directory(&dir.path().join("hf"), &files).unwrap();
            let text = "Now is the ünter of – 你";
            let tokens: Vec<u32> = text.bytes().take(config.context).map(u32::from).collect();
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hf_logits.py");
            let output = std::process::Command::new(&python)
                .args([script, dir.path().join("hf").to_str().unwrap(), text])
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let theirs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            let ids: Vec<u32> = text.bytes().map(u32::from).collect();
            assert_eq!(theirs["ids"], json!(ids), "the tokenizer");
            assert_eq!(theirs["text"], text);
            let ours = model.predict(&params, &tokens, 1).to_vec(); // [T, v]
            let rows = theirs["logits"].as_array().unwrap();
            let theirs = rows.iter().flat_map(|row| row.as_array().unwrap()).map(|x| x.as_f64().unwrap());
            let mut worst = 0.0f64;
            for (a, b) in ours.iter().zip(theirs) {
                worst = worst.max((f64::from(*a) - b).abs());
            }
            println!("{}: logits differ by at most {worst:.1e}", name(method));
            assert_eq!(rows.len() * config.vocab, ours.len());
            assert!(worst < 1e-4, "{worst:e}"); // logits of a few units, in f32 on both sides
        }
    }
}
