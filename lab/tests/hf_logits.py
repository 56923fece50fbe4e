"""Logits of an exported model by transformers: hf_logits.py DIRECTORY TEXT -> JSON with ids, text, logits [tokens, vocabulary].

Needs torch, transformers and safetensors (pip install torch transformers, the CPU wheels will do). Only the first context
tokens go through the model; ids and text are the tokenizer's, there and back.
"""

import json
import sys

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

directory, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory)
model, report = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
ids = tokenizer(text)["input_ids"]
tokens = torch.tensor([ids[: model.config.max_position_embeddings]])  # [1, T]
with torch.no_grad():
    logits = model.eval()(tokens).logits[0]  # [T, v]
print(json.dumps({"ids": ids, "text": tokenizer.decode(ids), "logits": logits.tolist()}))
