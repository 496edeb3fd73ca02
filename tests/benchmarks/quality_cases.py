"""What `quality` compares roundings on: models, calibration windows, held-out tokens, and the one evaluator of every result."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from m3quant.calibration.head import compare_heads
from m3quant.calibration.layers import Layer
from m3quant.calibration.mixture import mixed_windows, parse_mixture
from m3quant.calibration.stream import HiddenStates, Source, embed_source, read_head, read_layer, run_layer
from m3quant.calibration.windows import Windows, load_tokenizer
from m3quant.evaluate.models import open_model
from m3quant.families import Family, family_of
from m3quant.schemes import Scheme, parse_scheme

from ..support.paths import ROOT
from . import real_lm

FIXTURES = ROOT / "tests" / "fixtures"
SEED = 0
MICRO_BATCH = 16


@dataclass(frozen=True)
class Case:
    """One model. text: what is evaluated, its first `evaluated` windows of `window` tokens. calibration: for every method,
    `windows` windows of `length` tokens of that file, or of the bundled corpus. schemes: by role; other roles stay as
    they are."""

    name: str
    source: Path
    text: Path
    window: int
    evaluated: int
    calibration: str
    windows: int
    length: int
    schemes: Mapping[str, str]

    @property
    def scheme(self) -> Scheme:
        (name,) = set(self.schemes.values())
        return parse_scheme(name)

    @property
    def experts_only(self) -> bool:
        return "routed_experts" in self.schemes

    @cached_property
    def calibration_windows(self) -> Windows:
        """The windows that `m3quant convert` cuts under a recipe of these numbers and without held-out windows."""
        parts = parse_mixture([self.calibration])
        return mixed_windows(parts, load_tokenizer(self.source), self.windows, self.length, seed=SEED)

    def heldout(self) -> torch.Tensor:
        """[evaluated, window] int64."""
        encode = load_tokenizer(self.source)
        ids = encode(self.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids[: self.evaluated * self.window]).view(self.evaluated, self.window)


def cases(work: Path) -> dict[str, Case]:
    own = str(FIXTURES / "calibration.jsonl")
    found = {
        name: Case(
            name, FIXTURES / name, FIXTURES / "heldout.txt", 512, 64, own, 64, 512, {"routed_experts": "int4-g128"}
        )
        for name in ("tiny-m2", "tiny-m3")
    }
    for group in (64, 32):
        schemes = dict.fromkeys(("attention", "dense_mlp"), f"int4-g{group}")
        texts = work / "topics.txt", real_lm.LENGTH, real_lm.WINDOWS
        found[f"smollm2-g{group}"] = Case(f"smollm2-g{group}", work / "smollm2", *texts, "bundled", 128, 128, schemes)
    return found


def prepare(case: Case) -> None:
    """Make what does not lie in the tree: SmolLM2's BF16 weights and its held-out text."""
    if case.name.startswith("smollm2"):
        case.source.parent.mkdir(parents=True, exist_ok=True)
        real_lm.export(case.source)
        real_lm.write_topics(case.text)


class Overlaid:
    """A source with some tensors replaced, in the dtype of what they replace."""

    def __init__(self, source: Source, tensors: Mapping[str, torch.Tensor]) -> None:
        self._source, self._own = source, tensors
        self.tensors = source.tensors
        if unknown := sorted(set(tensors) - set(source.tensors)):
            raise ValueError(f"the source has no tensor {unknown[0]}")

    @property
    def config(self) -> dict[str, Any]:
        return self._source.config

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        found = self._source.read_many(names)
        for name, tensor in found.items():
            if name in self._own:
                own = self._own[name]
                if own.shape != tensor.shape:
                    raise ValueError(f"{name} has shape {tuple(own.shape)}, the source's {tuple(tensor.shape)}")
                found[name] = own.to(tensor.dtype)
        return found


class Evaluator:
    """Compares weights with the source's on the held-out tokens: float32 on the CPU, activations not rounded."""

    def __init__(self, case: Case, work: Path) -> None:
        model = open_model(case.source)
        self.case, self.source, self.tokens = case, model.reader, case.heldout()
        identity = model.fingerprint().encode() + self.tokens.numpy().tobytes()
        self._kept = work / f"states-{sha256(identity).hexdigest()[:16]}.safetensors"

    @cached_property
    def _states(self) -> HiddenStates:
        """The source's, kept in a file for the next process."""
        if not self._kept.exists():
            part = self._kept.with_suffix(f".{os.getpid()}")
            save_file({"states": self._last(self.source).read(slice(None))}, part)
            part.replace(self._kept)
        return HiddenStates(load_file(self._kept)["states"])

    def _last(self, source: Source) -> HiddenStates:
        """The hidden states that leave the last layer."""
        family = family_of(source.config)
        states = embed_source(source, self.tokens, torch.float32)
        for index in range(family.num_layers):
            layer = Layer(family.layer(index), read_layer(source, index), dtype=torch.float32)
            run_layer(layer, states, MICRO_BATCH)
        return states

    def folder(self, output: Path) -> dict[str, float]:
        """The figures of an output of m3quant."""
        return self._compare(open_model(output).reader)

    def tensors(self, changed: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The figures of the source with other weights, dequantized, under the source's names."""
        return self._compare(Overlaid(self.source, changed))

    def _compare(self, other: Source) -> dict[str, float]:
        """kl: nats per token, source to other; kl_error: standard error of its mean over windows."""
        heads = read_head(self.source), read_head(other)
        found = compare_heads(*heads, self._states, self._last(other), self.tokens)
        by_window = found.kl.double().mean(1)
        return {
            "kl": float(by_window.mean()),
            "kl_error": float(by_window.std() / len(by_window) ** 0.5),
            "perplexity": float(found.nll_quant.double().mean().exp()),
            "source_perplexity": float(found.nll_source.double().mean().exp()),
            "tokens": found.kl.numel(),
        }


LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
ROLES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def source_names(family: Family, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of decoder layers under transformers' names -> under the source's.

    Experts have a module each (`mlp.experts.3.gate_proj`), as llm-compressor and AutoRound lay them out; a shared expert's
    gate and up projection may be one. Raises ValueError for a tensor outside the decoder layers.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = LAYER.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} belongs to no decoder layer")
        index, rest = int(match[1]), match[2]
        spec, prefix = family.layer(index), family.layer_prefix(index)
        if spec.moe is None or not rest.startswith("mlp."):
            found[prefix + rest] = tensor
        elif expert := EXPERT.fullmatch(rest):
            found[prefix + spec.moe.expert_name(int(expert[1]), ROLES[expert[2]])] = tensor
        elif rest == "mlp.gate.weight":
            found[prefix + spec.moe.router_name] = tensor
        elif rest == "mlp.shared_experts.gate_up_proj.weight":
            halves = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            found |= {f"{prefix}{spec.moe.shared_prefix}{part}.weight": half for part, half in halves}
        else:
            found[prefix + spec.moe.block + rest.removeprefix("mlp.")] = tensor
    return found
