"""Logits by transformers, of a model that this program exported or of one that transformers itself draws and saves.

hf_logits.py DIRECTORY TEXT -> JSON with ids, text, logits [tokens, vocabulary] of an exported model
hf_logits.py --make DIRECTORY DTYPE SHARD_SIZE tied|untied KV_HEADS -> saves a model; JSON with ids, logits

Needs torch, transformers and safetensors (pip install torch transformers, the CPU wheels will do). Only the first context
tokens go through the model; ids and text are the tokenizer's, there and back.
"""

import json
import sys

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def logits(model, ids):
    """[T, v] in float32."""
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].tolist()


def make(directory, dtype, shard, tie, kv_heads):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=int(kv_heads), max_position_embeddings=40, rms_norm_eps=3e-6, initializer_range=0.2,
        tie_word_embeddings=tie == "tied", rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )
    config.rope_theta = 5e4  # where older versions look
    model = LlamaForCausalLM(config)
    for name, gain in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(gain, 0.5, 1.5)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=shard)
    ids = torch.randint(0, 300, (40,)).tolist()
    # read again: what is rounded in memory, the angles of the positions too, is not what the file says
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return {"ids": ids, "logits": logits(model, ids)}


def exported(directory, text):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, report = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    ids = tokenizer(text)["input_ids"]
    rows = logits(model, ids[: model.config.max_position_embeddings])
    return {"ids": ids, "text": tokenizer.decode(ids), "logits": rows}


first, *rest = sys.argv[1:]
print(json.dumps(make(*rest) if first == "--make" else exported(first, *rest)))
