"""What a draft's config.json says of quantized weights, held against its headers.

An engine makes parameters by config.json. Where the file holds others, it stops after minutes of loading, or computes with what it never
read. Names and rules of lists: vLLM 0.33, models/llama_eagle3.py, models/utils.py (`get_draft_quant_config`, `map_draft_quant_config`),
layers/quantization/utils/quant_utils.py (`is_layer_skipped`). Engines and releases differ in both, so that only what no reading of the
lists allows is refused. `fc` and the output head may be plain whatever is said: not every engine builds them by the section.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint import CONFIG_NAME, Checkpoint, TensorInfo
from ..checkpoint.name_list import NameList
from ..checkpoint.patterns import Allowance
from ..checkpoint.strict_json import described, shown
from ..errors import CheckpointError
from ..planning.integer_kinds import QWEIGHT
from ..planning.source_format import REMEDY, config_format, hf_quant_of
from ..planning.source_layouts import PACKED, PLAIN
from ..planning.source_sections import kept_entries, kept_problem
from ..planning.source_tensors import FLOAT_DTYPES

_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
}  # fmt: skip
_PARTS = {fused: [part for part, into in _FUSED.items() if into == fused] for fused in _FUSED.values()}
_LINEARS = (*_FUSED, "qkv_proj", "gate_up_proj", "o_proj", "down_proj")  # every engine builds these by the section
_LISTING = ("compressed-tensors", "fp8", "mxfp8", "fbgemm_fp8", "awq")  # `kept_entries` has all they leave out
# They quantize plain weights, or give their tensors other names.
_WHILE_LOADING = ("bitsandbytes", "experts_int8", "torchao")
_PLAIN_DTYPES = (*FLOAT_DTYPES, "F64")
_REMEDY = "A draft's lists have tens of entries: take the config.json that was written with these weights."
SECONDS = 10.0  # of comparing lists with names: those of released drafts take milliseconds


def check_stated_format(checkpoint: Checkpoint, body: Mapping[str, Any], layers: int) -> None:
    """Raise CheckpointError where config.json (or hf_quant_config.json) and the draft's tensors disagree on what is quantized.

    body: the object that describes the draft's layers, in which the section may stand too. layers: of the target, after which engines
    count the draft's.
    """
    source = config_format({"text_config": body, **checkpoint.config}, f"{checkpoint.root}/{CONFIG_NAME}", hf_quant_of(checkpoint))  # fmt: skip
    section = source.section
    # Not refused here: a method that m3quant itself does not read. What is read and refused has another file that says otherwise.
    if source.refused and (not section or kept_problem(section) or source.stated.kind):
        raise CheckpointError(source.refused.removesuffix(REMEDY).rstrip())  # which is about models to convert
    said = _Said(section, source.kind == PLAIN, layers, Allowance(source.file, _REMEDY, CheckpointError, SECONDS))
    codes, plain = dict[str, TensorInfo](), dict[str, TensorInfo]()
    for name, info in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in (PACKED, QWEIGHT) or (leaf == "weight" and info.dtype not in _PLAIN_DTYPES):
            codes[module] = info
        elif leaf == "weight" and module.rpartition(".")[2] in _LINEARS:
            plain[module] = info
    for module, info in codes.items():
        if section and said.may_quantize(module):
            continue
        states = f"says that {shown(module)} is not" if section else "has no quantization_config"
        raise CheckpointError(
            f"{_tensor(checkpoint, info)} is {info.dtype}, the codes of a quantized weight, but {source.file} {states}: an engine would not load "
            "the draft, or would take the codes for values. Take the config.json that was written with these weights, or a draft in BF16."
        )
    wrong = [info for module, info in plain.items() if said.quantizes(module)]
    if wrong and said.method not in _WHILE_LOADING and (said.lists_all or not codes):
        many = f", and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{_tensor(checkpoint, wrong[0])} is {wrong[0].dtype}{many}, but {source.file} says that it is quantized (quant_method "
            f"{described(section.get('quant_method'))}) and does not leave it out: an engine would not load the draft, or would compute with scales "
            "that it never read. Take the config.json that was written with these weights: for a plain draft, one without quantization_config."
        )


def _tensor(checkpoint: Checkpoint, info: TensorInfo) -> str:
    return f"{checkpoint.root}/{info.shard}: tensor {shown(info.name)}"


class _Said:
    """What a quantization section says of modules. nothing: it is about the cache alone, or there is none."""

    def __init__(self, section: Mapping[str, Any], nothing: bool, layers: int, allowance: Allowance) -> None:
        self.method = str(section.get("quant_method")).lower()
        self._nothing, self._layers = nothing, layers
        self._kept = NameList(kept_entries(section), allowance, globs=True, regexes=True)
        self._pieces = self.method.startswith(("awq", "modelopt"))  # where an entry is also any piece of a name
        listed = section.get("quantized_layers")
        self._modules = listed if isinstance(listed, Mapping) else None
        self._by_target = self.method == "compressed-tensors"
        targets = list(_targets(section)) if self._by_target else []
        self._linears, self._classes = "Linear" in targets, any(target[:1].isupper() for target in targets)
        self._targeted = NameList(targets, allowance, globs=True, regexes=True)

    @property
    def lists_all(self) -> bool:
        """Whether the lists that are read here are all in which the method names modules."""
        return self.method in _LISTING or self.method.startswith("modelopt")

    def quantizes(self, module: str) -> bool:
        """Whether a Linear layer is said to be quantized, and no list can be read as leaving it out."""
        names = _names(module, self._layers)
        return self._claims(names, self._linears) and not any(map(self._leaves_out, names))

    def may_quantize(self, module: str) -> bool:
        """Whether a module may be quantized by what is said: it is not left out under the name that its tensors have."""
        return self._claims(_names(module, self._layers), self._classes) and not self._kept.names(module)

    def _leaves_out(self, name: str) -> bool:
        """Whether an entry can be read as about this name."""
        kept = self._kept
        return kept.names(name) or kept.has_run(name) or (self._pieces and kept.has_piece(name))

    def _claims(self, names: set[str], of_class: bool) -> bool:
        """of_class: whether a target is the name of a class that the module may be of."""
        if self._nothing:
            return False
        if self._modules is not None:
            return not names.isdisjoint(self._modules)
        if not self._by_target:
            return True
        return of_class or any(map(self._targeted.names, names))


def _targets(section: Mapping[str, Any]) -> Iterator[str]:
    """Of the groups that quantize weights."""
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and group.get("weights") and isinstance(group.get("targets"), list):
            yield from (target for target in group["targets"] if isinstance(target, str))


def _names(module: str, layers: int) -> set[str]:
    """Names of a module: on disk, and as engines make them of it, which count `layers` of the target before the draft's."""
    found = {module.removeprefix("model.")}
    found |= {re.sub(r"(^|\.)midlayer\.", r"\1layers.0.", name) for name in found}
    found |= {
        re.sub(r"(^|\.)layers\.(\d{1,4})\.", lambda m: f"{m[1]}layers.{int(m[2]) + layers}.", name) for name in found
    }
    for name in tuple(found):
        parent, dot, leaf = name.rpartition(".")
        found |= {f"{parent}{dot}{other}" for other in [*_PARTS.get(leaf, ()), *filter(None, [_FUSED.get(leaf)])]}
    return found | {f"model.{name}" for name in found}
