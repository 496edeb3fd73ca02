"""Random tiny checkpoints of any family: config.json in the release's form, tensors by what the family expects of it."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from m3quant.families import family_of
from tests.support.calibration.tiny import Tensors, write_checkpoint
from tests.support.paths import FIXTURES

TOKENIZER = FIXTURES / "tiny-m2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "vocab_size": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_EXPERTS: dict[str, Any] = {
    **_COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "attention_bias": False,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 48,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "llama3": {**_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": _LLAMA3},
    "llama-bias": {**_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True,
                   "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {**_COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 32,
                "sliding_window": None},
    "qwen2": {**_COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False,
              "sliding_window": 4096, "max_window_layers": 2},
    "qwen3": {**_COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128,
              "attention_bias": False},
    "qwen3_moe": _EXPERTS,
    "qwen3_moe-sums": {**_EXPERTS, "norm_topk_prob": False, "decoder_sparse_step": 2, "num_hidden_layers": 4,
                       "mlp_only_layers": [3]},
}  # fmt: skip


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Every tensor that the family expects, in BF16, scaled so that activations stay near 1; norms and biases never trivial."""
    family, generator = family_of(config), torch.Generator().manual_seed(seed)
    out: Tensors = {}
    for name, expected in family.expected_tensors.items():
        drawn = torch.randn(expected.shape, generator=generator)
        kind = family.role(name).kind
        if kind == "norm":
            drawn = torch.exp(0.3 * drawn)
        elif kind == "bias":
            drawn = 0.3 * drawn
        elif kind != "embedding":
            drawn = (
                drawn
                * (0.7 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
                / math.sqrt(drawn.shape[-1])
            )
        out[name] = drawn.to(torch.float32 if expected.float32 else torch.bfloat16)
    return out


def make_tiny(folder: Path, name: str, seed: int = 0, **overrides: Any) -> Path:
    """The checkpoint called `name` of CONFIGS, with a tokenizer."""
    config = {**CONFIGS[name], **overrides}
    write_checkpoint(folder, config, tiny_tensors(config, seed), shards=2)
    for file in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / file, folder / file)
    return folder
