//! `generate`: text sampled from a model, one token at a time.
//!
//! Reading order: generate/text (what is shown of a text that grows), generate/sampling (which token), generate/sequence (windows and caches),
//! generate/bench. Here: the command. Not here: the model's part, model/decode.rs.

mod bench;
mod sampling;
mod sequence;
mod text;

use std::io::{BufRead, IsTerminal};

use rankgrad::lowrank::Params;
use rankgrad::tensor::Backend;
use serde::Serialize;

use crate::checkpoint::{self, Checkpoint};
use crate::cli::GenerateArgs;
use crate::config::{ModelOptions, Overrides, Precision};
use crate::device::{self, on_device};
use crate::error::{Error, Result, tell};
use crate::model::Model;
use crate::tokens::Tokenizer;
use crate::trainer::load_model;

pub use sampling::Sampling;
use sequence::{Continuation, Sequence, continue_all};

/// Continues prompts with a checkpoint's model, or times it.
///
/// # Errors
/// Unusable flags or prompts, or a checkpoint that cannot be read.
pub fn generate(args: &GenerateArgs) -> Result<()> {
    let sampling = args.sampling()?; // before anything is read
    let prompts = args.prompts()?;
    let checkpoint = match &args.checkpoint {
        Some(path) => Some(Checkpoint::load_weights(&checkpoint::find(path)?)?),
        None => None, // --bench, of a model that nobody trained
    };
    let of = |checkpoint: &Checkpoint| checkpoint.tokenizer_or(args.tokenizer.as_deref());
    let tokenizer = checkpoint.as_ref().map_or(Ok(Tokenizer::Bytes), of)?;
    let sampling = Sampling { tokenizer: &tokenizer, ..sampling };
    on_device!(device::open(args.on.device, Precision::F32)?, |device| {
        let (model, params) = match checkpoint {
            Some(checkpoint) => load_model(&device, checkpoint)?,
            None => Model::new(&device, &untrained(args)?),
        };
        if args.factored && params.values.pairs.is_empty() {
            return Err(Error::new("--factored: this model has no factor pairs; leave it out"));
        }
        crate::pool(args.threads)?.install(|| {
            if args.bench {
                bench::bench(&model, &params, args.weights(), args.tokens, args.json);
                return Ok(());
            }
            let (model, params) = {
                let whole = (model, params); // given back once what is shared of it is
                whole.0.for_decoding(&whole.1, args.weights())
            };
            if args.interactive {
                converse(&model, &params, &sampling)
            } else {
                continue_prompts(&model, &params, &prompts, &sampling, args.json)
            }
        })
    })
}

/// The configuration of `--bench` without a checkpoint.
fn untrained(args: &GenerateArgs) -> Result<crate::config::Config> {
    let model = ModelOptions { preset: args.preset, rank_ratio: args.rank_ratio, ..ModelOptions::default() };
    Overrides { model, ..Overrides::default() }.resolve()
}

/// The text that the model adds to `prompt`, which must not be empty.
///
/// # Errors
/// A prompt without tokens.
pub fn sample<B: Backend<Elem = f32>>(
    model: &Model<B>,
    params: &Params<B>,
    prompt: &str,
    how: &Sampling,
) -> Result<String> {
    let mut sequence = [Sequence::new(model, params, tokens(prompt, how)?, how.seed)];
    Ok(continue_all(model, params, &mut sequence, how, |_, _, _| true).remove(0).text)
}

fn tokens(text: &str, how: &Sampling) -> Result<Vec<u32>> {
    let tokens = how.tokenizer.encode(text.as_bytes(), "the prompt")?;
    match tokens.is_empty() {
        false => Ok(tokens),
        true => Err(Error::new(format!("the prompt {text:?} has no tokens; give another"))),
    }
}

/// One line of `--json`.
#[derive(Serialize)]
struct Line<'a> {
    prompt: &'a str,
    text: &'a str,
    /// Number of those added, one that only a stop string had included.
    tokens: usize,
    /// Whether a stop string ended it.
    stopped: bool,
}

/// Prints each prompt with its continuation, as it comes: that of the first one that is not over; of later ones when it is their turn.
fn continue_prompts<B: Backend<Elem = f32>>(
    model: &Model<B>,
    params: &Params<B>,
    prompts: &[String],
    how: &Sampling,
    json: bool,
) -> Result<()> {
    let start = |prompt: &String| Ok(Sequence::new(model, params, tokens(prompt, how)?, how.seed));
    let mut sequences: Vec<Sequence<B>> = prompts.iter().map(start).collect::<Result<_>>()?;
    if json {
        let all = continue_all(model, params, &mut sequences, how, |_, _, _| true);
        for (prompt, Continuation { text, tokens, stopped }) in prompts.iter().zip(&all) {
            let line = Line { prompt, text, tokens: *tokens, stopped: *stopped };
            crate::say!("{}", serde_json::to_string(&line).expect("plain values"));
        }
        return Ok(());
    }
    let head = |i: usize| match prompts {
        [prompt] => prompt.clone(),
        _ => format!("--- {} of {} ---\n{}", i + 1, prompts.len(), prompts[i]),
    };
    let mut waiting: Vec<(String, bool)> = (0..prompts.len()).map(|i| (head(i), false)).collect();
    let mut turn = 0;
    tell(format_args!("{}", std::mem::take(&mut waiting[0].0)));
    continue_all(model, params, &mut sequences, how, |i, text, over| {
        waiting[i].0 += text;
        waiting[i].1 |= over;
        let mut there = true;
        while let Some((text, over)) = waiting.get_mut(turn) {
            there &= tell(format_args!("{}{}", std::mem::take(text), if *over { "\n" } else { "" }));
            if !*over {
                break;
            }
            turn += 1;
        }
        there
    });
    Ok(())
}

/// Continues lines from standard input, each after all that was said before, until an empty one or the end.
fn converse<B: Backend<Elem = f32>>(model: &Model<B>, params: &Params<B>, how: &Sampling) -> Result<()> {
    let input = std::io::stdin();
    let person = input.is_terminal();
    if person {
        eprintln!("A line is continued from what was said so far; an empty one ends the conversation.");
    }
    let mut conversation = [Sequence::new(model, params, Vec::new(), how.seed)];
    for line in input.lock().lines() {
        let line =
            line.map_err(|e| Error::new(format!("cannot read a line of UTF-8 from standard input: {e}")))?;
        if line.is_empty() {
            break;
        }
        // lines stand below each other for the model, too
        let so_far = how.tokenizer.decode(&conversation[0].tokens);
        let apart = if so_far.is_empty() || so_far.ends_with(b"\n") { "" } else { "\n" };
        conversation[0].tokens.extend(tokens(&format!("{apart}{line}"), how)?);
        let there = if person { true } else { tell(format_args!("{line}")) }; // a terminal shows what is typed
        if !there {
            break;
        }
        continue_all(model, params, &mut conversation, how, |_, text, over| {
            tell(format_args!("{text}{}", if over { "\n" } else { "" }))
        });
    }
    Ok(())
}
