"""Draft models of a few thousand parameters: files as their makers write them, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, INNER = 256, 2048, 4, 2, 64, 512  # of tiny-m2, but for the MLP


def _linear(out: int, into: int) -> torch.Tensor:
    return (torch.randn(out, into, generator=torch.Generator().manual_seed(out * into)) * into**-0.5).to(torch.bfloat16)


def write_eagle3(folder: Path, vocabulary: int = 1024, **changes: Any) -> Path:
    """One layer whose inputs are the embedding and three hidden states of the target; it guesses among the first `vocabulary` tokens."""
    layer = {f"midlayer.{norm}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)
             for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}  # fmt: skip
    for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        layer[f"midlayer.self_attn.{part}_proj.weight"] = _linear(heads * HEAD_DIM, 2 * HIDDEN)
    layer["midlayer.self_attn.o_proj.weight"] = _linear(HIDDEN, HEADS * HEAD_DIM)
    layer |= {f"midlayer.mlp.{part}_proj.weight": _linear(INNER, HIDDEN) for part in ("gate", "up")}
    layer["midlayer.mlp.down_proj.weight"] = _linear(HIDDEN, INNER)
    tensors = {
        "fc.weight": _linear(HIDDEN, 3 * HIDDEN), "norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "lm_head.weight": _linear(vocabulary, HIDDEN), "d2t": torch.zeros(vocabulary, dtype=torch.int64),
        "t2d": torch.arange(VOCABULARY) < vocabulary, **layer,
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "draft_vocab_size": vocabulary, "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "intermediate_size": INNER, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 8192,
        "rope_theta": 10000.0, "dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    return write_draft(folder, config | changes, tensors)


def write_draft(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder
