//! `import`: a Llama-style model in Hugging Face's layout as a checkpoint of this program, its matrices as factor pairs.
//!
//! The way back of export.rs, from files that other programs wrote: nothing in them is taken on trust, and what this program's model
//! cannot do is refused by its name. Not here: how matrices are cut (ranks.rs), tokenizers (tokens.rs).
//! Letters: W [m, n], d width.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use rankgrad::lowrank::Params;
use rankgrad::tensor::{Cpu, Tensor};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value};

use crate::cli::ImportArgs;
use crate::config::{Config, Method, Overrides, name};
use crate::error::{Error, Result, cannot};
use crate::export::{llama_name, must_be_new};
use crate::files::mapped;
use crate::model::Model;
use crate::ranks::{Cut, factorise, print, write_model};
use crate::tokens::Tokenizer;

/// Where max_position_embeddings is larger, sequences of this length; --context asks for others.
const LONGEST: usize = 2048;

/// Reads a model and writes a checkpoint directory, whole or not at all.
///
/// # Errors
/// A model that this program cannot represent, files that are missing or damaged, a directory that exists.
pub fn import(args: &ImportArgs) -> Result<()> {
    let cut = match args.dense {
        true => None,
        false => Some(Cut::of(("--rank-ratio", args.rank_ratio), args.energy)?),
    };
    must_be_new(&args.out)?; // before any work is done
    crate::pool(0)?.install(|| {
        let (mut config, mut params, directory) = read(&args.model, args.context)?;
        let tokenizer = directory.join("tokenizer.json");
        let tokenizer = Tokenizer::open(tokenizer.exists().then_some(&*tokenizer))?; // it may need what this build lacks
        let before = params.count();
        if let Some(cut) = cut {
            let (factored, pairs, rows) = factorise(&config, params, cut)?;
            print(&rows, before, pairs.count());
            (config, params) = (factored, pairs);
        }
        write_model(&args.out, &config, &params, &tokenizer)?;
        crate::say!(
            "{}: {}, {} layers, d {}, context {}, vocabulary {}, {} parameters; step 0",
            args.out.display(),
            name(config.method),
            config.layers,
            config.dim,
            config.context,
            config.vocab,
            params.count()
        );
        Ok(())
    })
}

/// The model as whole matrices, and the directory that it is in.
fn read(path: &Path, context: Option<usize>) -> Result<(Config, Params<Cpu<f32>>, PathBuf)> {
    let is_directory = fs::metadata(path).map_err(cannot("find the model", path))?.is_dir();
    let directory = if is_directory { path } else { path.parent().unwrap_or(Path::new("")) };
    let weights = match is_directory {
        false => path.to_owned(),
        true => {
            let names = ["model.safetensors", "model.safetensors.index.json"].map(|name| path.join(name));
            names.into_iter().find(|file| file.exists()).ok_or_else(|| {
                Error::new(format!(
                    "{} has neither model.safetensors nor model.safetensors.index.json",
                    path.display()
                ))
            })?
        }
    };
    let json = directory.join("config.json");
    let config = parse(&json).and_then(|value| {
        config(&value, context).map_err(|e| Error::new(format!("{}: {e}", json.display())))
    })?;
    let files = Weights::open(&weights)?;
    let params = files.params(&config)?;
    Ok((config, params, directory.to_owned()))
}

fn parse(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).map_err(cannot("read", path))?;
    serde_json::from_str(&text).map_err(cannot("understand", path))
}

/// What config.json says, in this program's terms. Defaults are those of transformers' LlamaConfig.
fn config(json: &Map<String, Value>, context: Option<usize>) -> Result<Config> {
    let fail = |message: String| Err(Error::new(message));
    let given = |key: &str| json.get(key).filter(|value| !value.is_null());
    let other = |key: &str, means: &str| {
        let found = given(key).map_or("absent".into(), Value::to_string);
        Error::new(format!("`{key}` is {found}: {means}"))
    };
    match (given("model_type"), given("architectures").and_then(Value::as_array).map(Vec::as_slice)) {
        (_, Some([only])) if only != "LlamaForCausalLM" => {
            return Err(other("architectures", "only LlamaForCausalLM can be imported"));
        }
        (Some(kind), _) if kind == "llama" => {}
        _ => return Err(other("model_type", "only \"llama\" can be imported")),
    }
    for key in ["attention_bias", "mlp_bias"] {
        if given(key).is_some_and(|value| value != false) {
            return Err(other(key, "this program's model has no biases"));
        }
    }
    if given("hidden_act").is_some_and(|value| value != "silu") {
        return Err(other("hidden_act", "this program's model has the activation \"silu\" only"));
    }
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(value) = given(key) else { continue };
        let kind = value.get("rope_type").or_else(|| value.get("type"));
        let partial = value.get("partial_rotary_factor").is_some_and(|part| part.as_f64() != Some(1.0));
        // where only rope_scaling speaks, older files mean a scaling whatever it is
        if partial || kind.map_or(key == "rope_scaling", |kind| kind != "default") {
            return Err(other(
                key,
                "this program's rotary positions have no rope scaling, and turn whole heads",
            ));
        }
    }
    if given("partial_rotary_factor").is_some_and(|part| part.as_f64() != Some(1.0)) {
        return Err(other("partial_rotary_factor", "this program's rotary positions turn whole heads"));
    }
    if given("quantization_config").is_some() {
        return Err(other("quantization_config", "weights must be F32, F16 or BF16"));
    }
    let whole = |key: &str| match given(key) {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            Some(n @ 1..=0xffff_ffff) => Ok(Some(n as usize)),
            _ => Err(other(key, "it must be a whole number above 0")),
        },
    };
    let needed = |key: &str| whole(key)?.ok_or_else(|| other(key, "it is needed"));
    let real = |key: &str, value: Option<&Value>, default: f64| match value {
        None => Ok(default),
        Some(value) => value.as_f64().ok_or_else(|| other(key, "it must be a number")),
    };
    let (dim, heads) = (needed("hidden_size")?, needed("num_attention_heads")?);
    if let Some(size) = whole("head_dim")?.filter(|size| size * heads != dim) {
        return fail(format!(
            "`head_dim` is {size}: this program's heads have hidden_size/num_attention_heads = {dim}/{heads}"
        ));
    }
    let theta = given("rope_parameters").and_then(|value| value.get("rope_theta")).or(given("rope_theta"));
    let tie = match given("tie_word_embeddings") {
        None => false,
        Some(value) => value.as_bool().ok_or_else(|| other("tie_word_embeddings", "true or false"))?,
    };
    let longest = whole("max_position_embeddings")?.unwrap_or(LONGEST);
    if let Some(context) = context.filter(|context| *context > longest) {
        return fail(format!("--context {context} is longer than `max_position_embeddings`, {longest}"));
    }
    let config = Config {
        method: Method::DenseMuon,
        dim,
        heads,
        kv_heads: whole("num_key_value_heads")?.unwrap_or(heads),
        layers: needed("num_hidden_layers")?,
        ffn: needed("intermediate_size")?,
        vocab: needed("vocab_size")?,
        context: context.unwrap_or(longest.min(LONGEST)),
        tie,
        init_std: real("initializer_range", given("initializer_range"), 0.02)?,
        rope_base: real("rope_theta", theta, 10_000.0)?,
        norm_eps: real("rms_norm_eps", given("rms_norm_eps"), 1e-6)?,
        ..default_for(Method::DenseMuon)?
    };
    config.check()?;
    Ok(config)
}

fn default_for(method: Method) -> Result<Config> {
    let mut overrides = Overrides::default();
    overrides.model.method = Some(method);
    overrides.resolve()
}

/// The safetensors files of a model, in memory as far as they are looked at.
struct Weights {
    files: Vec<(PathBuf, Mmap)>,
}

impl Weights {
    /// One file, or those that an index.json names.
    fn open(path: &Path) -> Result<Self> {
        let mut paths = vec![path.to_owned()];
        if path.extension().is_some_and(|e| e == "json") {
            let index = parse(path)?;
            let wrong = |what: &str| Error::new(format!("{}: {what}", path.display()));
            let map = index.get("weight_map").and_then(Value::as_object);
            let map = map.ok_or_else(|| wrong("an index needs a `weight_map`, from tensors to files"))?;
            let shards: BTreeSet<Option<&str>> = map.values().map(Value::as_str).collect();
            let shard = |name: &Option<&str>| match name {
                // a name and no path: an index has no business elsewhere on the disk
                Some(name) if Path::new(name).file_name() == Some(name.as_ref()) => {
                    Ok(path.with_file_name(name))
                }
                _ => Err(wrong("`weight_map` has an entry that is not the name of a file beside it")),
            };
            paths = shards.iter().map(shard).collect::<Result<_>>()?;
        }
        let open = |path: PathBuf| {
            let map = mapped("read", &path)?;
            Ok((path, map))
        };
        Ok(Self { files: paths.into_iter().map(open).collect::<Result<_>>()? })
    }

    /// All parameters of the model that `config` describes, and nothing else may be there.
    fn params(&self, config: &Config) -> Result<Params<Cpu<f32>>> {
        let mut tensors: BTreeMap<String, (&Path, TensorView)> = BTreeMap::new();
        for (path, map) in &self.files {
            let file = SafeTensors::deserialize(map).map_err(cannot("understand", path))?;
            for (name, view) in file.tensors() {
                // angles that older programs saved; they follow from the configuration
                if name.ends_with(".rotary_emb.inv_freq") {
                    continue;
                }
                if let Some((first, _)) = tensors.get(&name) {
                    let (first, second) = (first.display(), path.display());
                    return Err(Error::new(format!("{first} and {second} both have a tensor `{name}`")));
                }
                tensors.insert(name, (path, view));
            }
        }
        let (_, mut params) = Model::<Cpu<f32>>::blank(&Cpu::default(), config);
        let names: Vec<String> = params.names().collect();
        let mut wanted = Vec::new();
        for (own, x) in names.iter().zip(params.values.tensors_mut()) {
            let name = llama_name(own).expect("a whole model has Llama's parameters");
            let (path, view) = tensors.remove(&name).ok_or_else(|| {
                let shape = x.shape();
                Error::new(format!(
                    "the model has no tensor `{name}` {shape}, which its config.json asks for"
                ))
            })?;
            wanted.push((name, path, view, x));
        }
        if let Some((name, (path, view))) = tensors.first_key_value() {
            let tied = if name == "lm_head.weight" {
                ": config.json says that the embedding is the head"
            } else {
                ""
            };
            return Err(Error::new(format!(
                "{} has a tensor `{name}` {:?} that this program's model has no place for{tied}",
                path.display(),
                view.shape()
            )));
        }
        wanted.into_par_iter().try_for_each(|(name, path, view, x)| {
            let fail = |what: String| Err(Error::new(format!("{}: `{name}` {what}", path.display())));
            if view.shape() != x.shape().dims() {
                return fail(format!("has shape {:?}; config.json makes it {}", view.shape(), x.shape()));
            }
            let Some(values) = values(&view) else {
                return fail(format!("is of type {:?}; F32, F16 and BF16 can be read", view.dtype()));
            };
            if values.iter().any(|x| !x.is_finite()) {
                return fail("has an element that is not finite".into());
            }
            *x = Tensor::from_vec(&Cpu::default(), x.shape(), values); // like x
            Ok(())
        })?;
        Ok(params)
    }
}

/// The elements in f32; None: of a type that is not read.
fn values(view: &TensorView) -> Option<Vec<f32>> {
    let halves = || view.data().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    Some(match view.dtype() {
        Dtype::F32 => {
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        Dtype::F16 => halves().map(f16).collect(),
        Dtype::BF16 => halves().map(|bits| f32::from_bits(u32::from(bits) << 16)).collect(), // the upper half of an f32
        _ => return None,
    })
}

/// An IEEE 754 half: sign, 5 bits of exponent (bias 15), 10 of fraction.
fn f16(bits: u16) -> f32 {
    let (sign, exponent, fraction) =
        (u32::from(bits >> 15) << 31, u32::from(bits >> 10 & 31), u32::from(bits & 0x3ff));
    match exponent {
        0 => f32::from_bits(sign | (fraction as f32 / 16_777_216.0).to_bits()), // fraction·2⁻²⁴
        31 => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),              // infinite, or not a number
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export;
    use serde_json::json;

    type B = Cpu<f32>;

    /// A small model with gains that are not 1.
    fn drawn(method: Method, tie: bool, kv_heads: usize) -> (Config, Params<B>) {
        let defaults = Overrides::default().resolve().unwrap();
        let sizes = Config { dim: 32, layers: 2, heads: 4, kv_heads, ffn: 48, context: 24, ..defaults };
        let rest = Config { rope_base: 5e5, norm_eps: 1e-6, rank_ratio: 0.5, init_std: 0.2, ..sizes };
        let config = Config { method, tie, ..rest };
        let (_, mut params) = Model::new(&B::default(), &config);
        for (i, (name, x)) in params.dense_names.iter().zip(&mut params.values.dense).enumerate() {
            if name.ends_with("norm") {
                *x =
                    Tensor::from_fn(&B::default(), x.shape(), |j| 1.0 + ((7 * i + 3 * j) % 11) as f32 * 0.05); // [d]
            }
        }
        (config, params)
    }

    fn logits(config: &Config, params: &Params<B>) -> Vec<f32> {
        let (model, _) = Model::blank(&B::default(), config);
        let tokens: Vec<u32> = (0..config.context as u32).map(|i| i * 37 % 256).collect();
        model.predict(params, &tokens, 1).to_vec() // [T, v]
    }

    fn differ(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        let size = a.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        a.iter().zip(b).fold(0.0f32, |max, (a, b)| max.max((a - b).abs())) / size
    }

    /// A directory with the export of a model.
    fn exported(config: &Config, params: &Params<B>) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let tensors = export::tensors(params, false).unwrap();
        let files = export::files(config, &tensors, false, None).unwrap();
        export::write_directory(&dir.path().join("hf"), &files).unwrap();
        dir
    }

    #[test]
    fn what_export_wrote_comes_back() {
        for (method, tie, kv_heads) in
            [(Method::Spectron, false, 2), (Method::DenseMuon, true, 4), (Method::DenseMuon, false, 1)]
        {
            let (config, params) = drawn(method, tie, kv_heads);
            let dir = exported(&config, &params);
            let (whole, read, _) = read(&dir.path().join("hf"), None).unwrap();
            assert_eq!((whole.norm_eps, whole.rope_base, whole.context), (1e-6, 5e5, 24));
            let [before, after] = [logits(&config, &params), logits(&whole, &read)];
            if method == Method::DenseMuon {
                assert_eq!(before, after);
            }
            // products in another order, rounded to f32
            assert!(differ(&before, &after) < 1e-5, "{:e}", differ(&before, &after));
            for cut in [Cut::Ratio(1.0), Cut::Energy(1.0)] {
                let (factored, pairs, rows) = factorise(&whole, read.clone(), cut).unwrap();
                assert_eq!((factored.method, rows.len()), (Method::Spectron, 2 * 7));
                let after = logits(&factored, &pairs);
                assert!(differ(&before, &after) < 1e-5, "{cut:?}: {:e}", differ(&before, &after));
            }
            // the model of rank ratio 0.5 loses nothing at that ratio, as each of its ranks is what is asked for
            if method == Method::Spectron {
                let (factored, pairs, _) = factorise(&whole, read.clone(), Cut::Ratio(0.5)).unwrap();
                assert_eq!(pairs.count(), params.count());
                assert!(differ(&before, &logits(&factored, &pairs)) < 1e-5);
            }
        }
    }

    /// The values of one of these types, little-endian.
    fn encoded(dtype: Dtype, values: &[f32]) -> Vec<u8> {
        let half = |x: &f32| match (x.to_bits(), *x == 0.0) {
            (bits, true) => (bits >> 16) as u16,
            (bits, false) => {
                ((bits >> 16 & 0x8000) | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 0x3ff)) as u16
            }
        };
        match dtype {
            Dtype::F16 => values.iter().flat_map(|x| half(x).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    /// One safetensors file of these tensors.
    fn file(dtype: Dtype, tensors: &[(String, Tensor<B>)]) -> Vec<u8> {
        let host: Vec<_> = tensors.iter().map(|(_, x)| encoded(dtype, &x.to_vec())).collect();
        let view = |(name, x): &(String, Tensor<B>), bytes| {
            (name.clone(), TensorView::new(dtype, x.shape().dims().to_vec(), bytes).unwrap())
        };
        safetensors::serialize(tensors.iter().zip(&host).map(|(x, bytes)| view(x, bytes)), None).unwrap()
    }

    #[test]
    fn halves_are_read_exactly() {
        for (dtype, kept) in [(Dtype::F16, 1.0 / 1024.0), (Dtype::BF16, 0.0)] {
            let (config, mut params) = drawn(Method::DenseMuon, false, 2);
            // to values that the type has: multiples of 2⁻¹⁰ below 2, or the upper half of the bits
            for x in params.values.tensors_mut() {
                let round = |x: f32| match dtype {
                    Dtype::F16 => (x / kept).round().clamp(-2047.0, 2047.0) * kept,
                    _ => f32::from_bits(x.to_bits() & 0xffff_0000),
                };
                *x = Tensor::from_vec(&B::default(), x.shape(), x.to_vec().into_iter().map(round).collect()); // like x
            }
            let dir = exported(&config, &params);
            let path = dir.path().join("hf/model.safetensors");
            fs::write(&path, file(dtype, &export::tensors(&params, false).unwrap())).unwrap();
            let (whole, read, _) = read(&path, Some(16)).unwrap();
            assert_eq!(whole.context, 16);
            for (a, b) in params.values.tensors().zip(read.values.tensors()) {
                assert_eq!(a.to_vec(), b.to_vec(), "{dtype:?}");
            }
        }
    }

    #[test]
    fn every_half_has_its_value() {
        for bits in 0..=u16::MAX {
            let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 0x3ff) / 1024.0);
            let size = match exponent {
                0 => fraction * 2f64.powi(-14),
                31 if fraction == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1.0 + fraction) * 2f64.powi(exponent - 15),
            };
            let found = f16(bits);
            assert_eq!(found.is_sign_negative(), bits >> 15 == 1);
            assert!(f64::from(found.abs()) == size || size.is_nan() && found.is_nan(), "{bits:x}");
        }
    }

    /// What `change` to config.json is answered with.
    fn refusal(dir: &Path, change: Value) -> String {
        let path = dir.join("hf/config.json");
        let before = fs::read(&path).unwrap();
        let mut json: Map<String, Value> = serde_json::from_slice(&before).unwrap();
        json.extend(change.as_object().unwrap().clone());
        fs::write(&path, serde_json::to_vec(&json).unwrap()).unwrap();
        let error = read(&dir.join("hf"), None).map(|_| ()).expect_err(&change.to_string()).to_string();
        fs::write(&path, before).unwrap();
        error
    }

    #[test]
    fn models_of_another_kind_are_refused_by_name() {
        let (config, params) = drawn(Method::DenseMuon, false, 2);
        let dir = exported(&config, &params);
        for (change, says) in [
            (json!({"architectures": ["MistralForCausalLM"]}), "`architectures` is [\"MistralForCausalLM\"]"),
            (json!({"model_type": "qwen2"}), "`model_type` is \"qwen2\""),
            (json!({"attention_bias": true}), "`attention_bias` is true: this program's model has no biases"),
            (json!({"mlp_bias": true}), "`mlp_bias` is true"),
            (json!({"hidden_act": "gelu"}), "`hidden_act` is \"gelu\""),
            (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), "no rope scaling"),
            (json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "`rope_scaling` is {"),
            (json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}), "`rope_parameters` is {"),
            (json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor` is 0.5"),
            (json!({"quantization_config": {"bits": 4}}), "`quantization_config`"),
            (json!({"head_dim": 16}), "`head_dim` is 16"),
            (json!({"hidden_size": null}), "`hidden_size` is absent: it is needed"),
            (json!({"hidden_size": -1}), "`hidden_size` is -1: it must be a whole number"),
            (json!({"rms_norm_eps": "small"}), "`rms_norm_eps` is \"small\""),
            (json!({"num_key_value_heads": 3}), "kv-heads is 3, which does not divide heads = 4"),
            (json!({"num_hidden_layers": 3}), "no tensor `model.layers.2."),
            (json!({"num_hidden_layers": 1}), "a tensor `model.layers.1.input_layernorm.weight` [32] that"),
            (json!({"intermediate_size": 50}), "has shape [48, 32]; config.json makes it [50, 32]"),
            (
                json!({"tie_word_embeddings": true}),
                "`lm_head.weight` [256, 32] that this program's model has no place for: ",
            ),
        ] {
            let error = refusal(dir.path(), change.clone());
            assert!(error.contains(says), "{change}: {error}");
        }
        let long = read(&dir.path().join("hf"), Some(25)).err().unwrap().to_string();
        assert!(long.contains("--context 25 is longer than `max_position_embeddings`, 24"), "{long}");
    }

    #[test]
    fn damaged_and_foreign_weights_are_refused_by_name() {
        let (config, params) = drawn(Method::DenseMuon, false, 2);
        let dir = exported(&config, &params);
        let (hf, path) = (dir.path().join("hf"), dir.path().join("hf/model.safetensors"));
        let tensors = export::tensors(&params, false).unwrap();
        let refused = |says: &str| {
            let error = read(&hf, None).err().unwrap_or_else(|| panic!("{says}")).to_string();
            assert!(error.contains(says), "{error}");
        };
        let with = |i: usize, x: Tensor<B>| {
            let mut tensors = tensors.clone();
            tensors[i].1 = x;
            fs::write(&path, file(Dtype::F32, &tensors)).unwrap();
        };
        let (name, x) = &tensors[3];
        with(3, x.scale(f64::NAN));
        refused(&format!("`{name}` has an element that is not finite"));
        with(3, Tensor::zeros(&B::default(), [2, 3])); // [2, 3]
        refused(&format!("`{name}` has shape [2, 3]"));
        let host: Vec<Vec<u8>> = tensors.iter().map(|(_, x)| vec![0; x.len()]).collect();
        let bytes = tensors.iter().zip(&host).map(|((name, x), bytes)| {
            (name.clone(), TensorView::new(Dtype::I8, x.shape().dims().to_vec(), bytes).unwrap())
        });
        fs::write(&path, safetensors::serialize(bytes, None).unwrap()).unwrap();
        refused("is of type I8; F32, F16 and BF16 can be read");
        let whole = file(Dtype::F32, &tensors);
        fs::write(&path, &whole[..whole.len() - 10]).unwrap();
        refused("cannot understand ");
        fs::remove_file(&path).unwrap();
        refused("has neither model.safetensors nor model.safetensors.index.json");

        // two shards
        let index = hf.join("model.safetensors.index.json");
        fs::write(hf.join("1.safetensors"), file(Dtype::F32, &tensors[..5])).unwrap();
        fs::write(hf.join("2.safetensors"), file(Dtype::F32, &tensors[5..])).unwrap();
        let map = |first: &str| json!({"weight_map": {"a": first, "b": "2.safetensors"}}).to_string();
        fs::write(&index, map("1.safetensors")).unwrap();
        for path in [&hf, &index] {
            let (whole, read, _) = read(path, None).unwrap();
            assert_eq!(logits(&whole, &read), logits(&config, &params));
        }
        for (entry, says) in [
            ("../hf/1.safetensors", "not the name of a file beside it"),
            ("/etc/passwd", "not the name of a file beside it"),
            ("..", "not the name of a file beside it"),
            ("3.safetensors", "3.safetensors"),
            ("2.safetensors", "has no tensor"),
        ] {
            fs::write(&index, map(entry)).unwrap();
            refused(says);
        }
        fs::write(hf.join("1.safetensors"), file(Dtype::F32, &tensors[..6])).unwrap();
        fs::write(&index, map("1.safetensors")).unwrap();
        refused("both have a tensor");
        fs::write(&index, "{}").unwrap();
        refused("needs a `weight_map`");
        fs::write(hf.join("config.json"), "{").unwrap();
        refused("cannot understand ");
    }

    /// A model that transformers made and saved must give its logits here. Needs a Python with torch and transformers, named by
    /// RANKGRAD_HF_PYTHON; says so and passes without.
    #[test]
    fn models_of_transformers_give_the_same_logits() {
        let Some(python) = std::env::var_os("RANKGRAD_HF_PYTHON") else {
            println!("skipped: RANKGRAD_HF_PYTHON names no Python with torch and transformers");
            return;
        };
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hf_logits.py");
        for (dtype, shard, tie, kv_heads) in [
            ("float32", "1GB", "untied", "4"),
            ("float32", "40KB", "tied", "2"),
            ("bfloat16", "20KB", "untied", "1"),
            ("float16", "1GB", "tied", "4"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("made");
            let output = std::process::Command::new(&python)
                .args([script, "--make", path.to_str().unwrap(), dtype, shard, tie, kv_heads])
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert_eq!(path.join("model.safetensors.index.json").exists(), shard != "1GB");
            let theirs: Value = serde_json::from_slice(&output.stdout).unwrap();
            let tokens: Vec<u32> = serde_json::from_value(theirs["ids"].clone()).unwrap();
            let rows: Vec<Vec<f32>> = serde_json::from_value(theirs["logits"].clone()).unwrap();
            let (whole, read, _) = read(&path, None).unwrap();
            assert_eq!((whole.tie, whole.context, whole.rope_base), (tie == "tied", 40, 5e4));
            let (factored, pairs, _) = factorise(&whole, read.clone(), Cut::Ratio(1.0)).unwrap();
            for (config, params) in [(&whole, &read), (&factored, &pairs)] {
                let (model, _) = Model::blank(&B::default(), config);
                let ours = model.predict(params, &tokens, 1).to_vec(); // [T, v]
                let worst =
                    ours.iter().zip(rows.iter().flatten()).fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
                println!("{dtype}, {tie}, {}: logits differ by at most {worst:.1e}", name(config.method));
                assert_eq!(ours.len(), rows.iter().map(Vec::len).sum::<usize>());
                assert!(worst < 1e-4, "{worst:e}"); // logits of a few units, in f32 on both sides
            }
        }
    }
}
