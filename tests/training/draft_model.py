"""An EAGLE3 draft in plain torch: one Llama layer that reads the next token's embedding and hidden states of the target.

For training, and as the reference for what an engine accepts. The layout of the files and the order of operations are vLLM's
`models/llama_eagle3.py`; the training in which a draft reads its own outputs is "training-time test" of EAGLE-3 (arXiv:2503.01840).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.training.model import TinyModel, rms_norm, rotate


@dataclass(frozen=True)
class DraftSpec:
    """taps: layers of the target before which its residual stream is read (its number of layers: after the last). tokens: that it can guess."""

    target_vocab: int = 2048
    hidden: int = 256
    tokens: int = 640
    taps: tuple[int, ...] = (1, 2, 3)
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    intermediate: int = 256
    rope_theta: float = 10_000.0
    eps: float = 1e-6
    max_position: int = 8192


class Eagle3(nn.Module):
    """guessed [V]: the target's id of each token that it can guess, ascending."""

    guessed: Tensor

    def __init__(self, spec: DraftSpec, guessed: Tensor) -> None:
        super().__init__()
        self.spec = spec
        h, wide = spec.hidden, spec.heads * spec.head_dim
        self.register_buffer("guessed", guessed)
        shapes = {"fc": (h, len(spec.taps) * h), "q_proj": (wide, 2 * h), "k_proj": (spec.kv_heads * spec.head_dim, 2 * h),
                  "v_proj": (spec.kv_heads * spec.head_dim, 2 * h), "o_proj": (h, wide), "gate_proj": (spec.intermediate, h),
                  "up_proj": (spec.intermediate, h), "down_proj": (h, spec.intermediate), "lm_head": (spec.tokens, h)}  # fmt: skip
        gains = {"o_proj": 0.4, "down_proj": 0.4, "lm_head": 0.3}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * gains.get(name, 1.0) * shape[1] ** -0.5))
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm", "norm"):
            setattr(self, name, nn.Parameter(torch.ones(h)))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, getattr(self, name), self.spec.eps, gemma=False)

    def _heads(self, x: Tensor, name: str, positions: Tensor | None) -> Tensor:
        """[B, L, 2H] -> [B, heads, L, D], turned to `positions` if given."""
        y = F.linear(x, getattr(self, name)).unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)
        if positions is None:
            return y
        inverse = self.spec.rope_theta ** (-torch.arange(0, self.spec.head_dim, 2).float() / self.spec.head_dim)
        angle = (positions.float()[:, None] * inverse).repeat(1, 2)
        return rotate(y, angle.cos(), angle.sin())

    def chains(self, features: Tensor, embedded: Tensor, steps: int) -> Iterator[Tensor]:
        """Logits [B, R, V] of guess 1, 2, .. of the chain that begins at each of R tokens.

        features: [B, L, taps * H] of tokens 0 .. L-1. embedded: [B, L, H] of the same tokens; R = L - steps. Guess k (from 0) of the chain
        at t is of token t + 2 + k. It is made from the embedding of token t + 1 + k and what guess k - 1 left (the features of t for the first), and
        attends to the first guesses of all chains up to t and to the guesses before it in its own.
        """
        spec, roots = self.spec, features.shape[1] - steps
        x = F.linear(features[:, :roots], self.fc)
        place = torch.arange(roots)
        later = place[None, :] > place[:, None]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step in range(steps):
            inputs = torch.cat(
                (self._norm(embedded[:, 1 + step : 1 + step + roots], "input_layernorm"), self._norm(x, "hidden_norm")),
                -1,
            )
            q = self._heads(inputs, "q_proj", place + step)
            group = spec.heads // spec.kv_heads
            keys.append(self._heads(inputs, "k_proj", place + step).repeat_interleave(group, 1))
            values.append(self._heads(inputs, "v_proj", None).repeat_interleave(group, 1))
            scores = (q @ keys[0].mT).masked_fill(later, -torch.inf)
            own = [(q * key).sum(-1, keepdim=True) for key in keys[1:]]
            weights = (torch.cat((scores, *own), -1) * spec.head_dim**-0.5).softmax(-1)
            mixed = weights[..., :roots] @ values[0]
            for number, value in enumerate(values[1:]):
                mixed = mixed + weights[..., roots + number, None] * value
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), self.o_proj)
            y = self._norm(x, "post_attention_layernorm")
            x = x + F.linear(F.silu(F.linear(y, self.gate_proj)) * F.linear(y, self.up_proj), self.down_proj)
            yield F.linear(self._norm(x, "norm"), self.lm_head)


@torch.no_grad()
def features_of(target: TinyModel, tokens: Tensor, taps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """tokens [B, L] -> what a draft reads [B, L, taps * H], and the target's logits [B, L, vocabulary]."""
    stream: list[Tensor] = []
    hidden, _, _ = target(tokens, stream=stream)
    return torch.cat([stream[tap] for tap in taps], -1), target.logits(hidden)


@torch.no_grad()
def accepted_per_step(draft: Eagle3, target: TinyModel, tokens: Tensor, prompt: int, steps: int) -> list[int]:
    """Guesses that greedy decoding accepts in each step, with `steps` guesses a step.

    tokens [L]: a prompt of `prompt` tokens and what the target answers greedily. Steps whose guesses reach beyond the last token are left out.
    """
    features, _ = features_of(target, tokens[None], draft.spec.taps)
    guesses = torch.stack(
        [draft.guessed[logits[0].argmax(-1)] for logits in draft.chains(features, target.embed[tokens][None], steps)]
    )
    counts, root = [], prompt - 1
    while root + 1 + steps < len(tokens):
        right = guesses[:, root] == tokens[root + 2 : root + 2 + steps]
        counts.append(int(right.int().cumprod(0).sum()))
        root += counts[-1] + 1
    return counts


_OUTER = ("fc", "norm", "lm_head")  # the rest is of the layer
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def stored_name(name: str) -> str:
    if name in _OUTER:
        return f"{name}.weight"
    part = "self_attn." if name in _ATTENTION else "mlp." if name.endswith("_proj") else ""
    return f"midlayer.{part}{name}.weight"


def config(spec: DraftSpec) -> dict[str, Any]:
    """config.json with the keys of the EAGLE3 drafts that are published for M2.x."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": spec.tokens,
        "dtype": "bfloat16",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(spec.taps), "use_aux_hidden_state": True},
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "max_position_embeddings": spec.max_position,
        "model_type": "llama",
        "num_attention_heads": spec.heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": spec.eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": spec.target_vocab,
    }


def save(draft: Eagle3, folder: Path) -> None:
    """BF16 weights, the two tables of tokens (d2t: how far a guessed token's id is from its place, t2d: which of the target's can be guessed), config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        stored_name(name): weight.detach().to(torch.bfloat16).contiguous() for name, weight in draft.named_parameters()
    }
    tensors["d2t"] = draft.guessed - torch.arange(draft.spec.tokens)
    tensors["t2d"] = torch.zeros(draft.spec.target_vocab, dtype=torch.bool).scatter(0, draft.guessed, True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(draft.spec), indent=1) + "\n")


@torch.no_grad()
def load(folder: Path) -> Eagle3:
    """The stored weights, as float32."""
    stored = load_file(folder / "model.safetensors")
    draft = Eagle3(DraftSpec(), stored["d2t"] + torch.arange(len(stored["d2t"])))
    for name, weight in draft.named_parameters():
        weight.copy_(stored[stored_name(name)])
    return draft
