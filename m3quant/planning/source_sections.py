"""What a `quantization_config` says about stored weights, for every method that m3quant reads. Torch-free.

Sources: vLLM 0.33 and SGLang 0.5.23 (which keys are tested), compressed-tensors 0.20 (QuantizationScheme), ModelOpt 0.47
(convert_hf_config.py), and `quant_method: mxfp8` with `moe_quant_*` as MiniMax-M3.1-Flash writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.strict_json import described
from ..schemes import FP8_BLOCK as BLOCK
from .integer_kinds import awq_kind, packed_kind
from .source_layouts import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    MX_GROUP,
    MXFP4,
    MXFP8,
    NV_GROUP,
    NVFP4,
    NVFP4_PACKED,
    PLAIN,
)

_INTEGERS = {
    "gptq": "GPTQ integers", "auto-round": "AutoRound integers", "intel/auto-round": "AutoRound integers",
    "inc": "AutoRound integers", "bitsandbytes": "bitsandbytes", "mxfp4": "GPT-OSS's MXFP4", "hqq": "HQQ", "quark": "Quark",
}  # fmt: skip
_MODELOPT = {
    "NVFP4": NVFP4, "W4A16_NVFP4": NVFP4, "MXFP4": MXFP4, "MXFP8": MXFP8, "FP8": FP8_TENSOR, "FP8_PER_CHANNEL_PER_TOKEN": FP8_CHANNEL,
}  # fmt: skip
_GROUP_SIZES = {NVFP4: NV_GROUP, MXFP4: MX_GROUP, MXFP8: MX_GROUP}
_FORMATS = {"nvfp4-pack-quantized": NVFP4_PACKED, "mxfp4-pack-quantized": MXFP4, "mxfp8-quantized": MXFP8}
_KEPT_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")


@dataclass(frozen=True)
class Stated:
    """kind: of every quantized module but those below; "" for what m3quant does not read, and then `words` say what it is.

    label: short name for tables. experts: kind of routed experts, where it is another. modules: kind by module, where a list names each
    (a module that it does not name is unquantized). others: further kinds that a module may be stored in, where targets tell which.
    """

    kind: str
    label: str
    words: str = ""
    experts: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)
    others: frozenset[str] = frozenset()


def kept_entries(section: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries for modules that are left as they are, whatever the key."""
    lists = (section.get(key) for key in _KEPT_KEYS)
    return tuple(entry for entries in lists if isinstance(entries, list) for entry in entries if isinstance(entry, str))


def kept_problem(section: Mapping[str, Any]) -> str:
    """What is wrong with the lists of modules that are left as they are; "" if nothing is."""
    for key in _KEPT_KEYS:
        names = section.get(key)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            return f"'{key}' of the quantization section is {described(names)}, no list of names"
    return ""


def _word(value: object) -> str:
    """A value as a word of a message: the file may contain anything."""
    return "".join(c if c.isprintable() else "?" for c in (value if isinstance(value, str) else described(value))[:60])


def read_section(section: Mapping[str, Any]) -> Stated:
    """What a quantization section says of the weights."""
    method = section.get("quant_method")
    name = _word(method or ("modelopt" if section.get("quant_algo") else "")).lower()
    if name in ("fp8", "mxfp8"):
        return _fp8_or_mxfp8(name, section)
    if name == "fbgemm_fp8":
        return Stated(FP8_CHANNEL, FP8_CHANNEL)
    if name.startswith("modelopt"):
        return _modelopt(section, method)
    if name == "compressed-tensors":
        return _compressed_tensors(section)
    if name == "awq":
        kind, wrong = awq_kind(section)
        return Stated(kind, kind or name, wrong)
    return Stated("", name or "quantized", _INTEGERS.get(name, "a format that m3quant does not know"))


def _algorithms(section: Mapping[str, Any]) -> dict[str, str]:
    """Algorithm -> the key that states it; those of what is computed or cached, not of stored weights, left out."""
    return {
        _word(value).upper(): _word(key)
        for key, value in section.items()
        if str(key).endswith("quant_algo") and not str(key).startswith(("kv_cache", "attention", "index")) and value
    }


def _fp8_or_mxfp8(name: str, section: Mapping[str, Any]) -> Stated:
    parts = _algorithms(section)
    others = sorted(algo for algo in parts if algo not in ("MXFP8", "FP8"))
    label = "+".join([name, *others]).lower()
    mixed = name == "mxfp8" and others == ["NVFP4"] and parts["NVFP4"] == "moe_quant_algo"
    if others and not mixed:
        stated = ", ".join(f"{algo} ({parts[algo]})" for algo in others)
        return Stated("", label, f"{name.upper()} mixed with {stated}")
    base = _fp8(section) if name == "fp8" else _mxfp8(section)
    if not mixed or not base.kind:
        return base
    form, group = section.get("moe_quant_format"), section.get("group_size")
    if form not in (None, "nvfp4-pack-quantized") or group not in (None, NV_GROUP):
        return Stated("", label, f"NVFP4 experts of moe_quant_format {described(form)} in groups of {described(group)}")
    return Stated(MXFP8, label, experts=NVFP4_PACKED)


def _mxfp8(section: Mapping[str, Any]) -> Stated:
    block = section.get("weight_block_size")
    if block not in (None, [1, MX_GROUP]):
        return Stated("", MXFP8, f"MXFP8 with blocks of {described(block)}, not [1, {MX_GROUP}]")
    return Stated(MXFP8, MXFP8)


def _fp8(section: Mapping[str, Any]) -> Stated:
    block, form = section.get("weight_block_size"), section.get("fmt")
    if form not in (None, "e4m3", "float8_e4m3fn"):
        return Stated("", "fp8", f"FP8 of {_word(form)}, not E4M3")
    if block is None:
        return Stated(FP8_TENSOR, FP8_TENSOR, others=frozenset({FP8_CHANNEL}))
    if block != [BLOCK, BLOCK]:
        return Stated("", "fp8", f"FP8 in blocks of {described(block)}, not [{BLOCK}, {BLOCK}]")
    return Stated(FP8_BLOCK, FP8_BLOCK)


def _modelopt(section: Mapping[str, Any], method: object) -> Stated:
    algorithms = [algo for algo in _algorithms(section) if algo not in ("NONE", "NULL")]
    if not algorithms and method == "modelopt" and "quant_algo" in section:
        return Stated(PLAIN, "bf16")  # a quantized cache alone
    listed = section.get("quantized_layers")
    if algorithms == ["MIXED_PRECISION"] or (listed and not algorithms):
        return _by_module(listed)
    said = ", ".join(algorithms) or "no quant_algo"
    kind = _MODELOPT.get(said, "")
    if not kind:
        return Stated("", said.lower() if algorithms else "modelopt", f"ModelOpt's {described(said)}")
    return _of_group(Stated(kind, _label([kind])), section.get("group_size"))


def _of_group(stated: Stated, group: object) -> Stated:
    wanted = _GROUP_SIZES.get(stated.kind)
    if group is None or wanted is None or group == wanted:
        return stated
    return Stated("", stated.label, f"{stated.kind} in groups of {described(group)}, not {wanted}")


def _by_module(listed: object) -> Stated:
    if not isinstance(listed, Mapping) or not listed:
        return Stated(
            "", "mixed_precision", "ModelOpt's MIXED_PRECISION without quantized_layers, which say what each module is"
        )
    modules: dict[str, str] = {}
    for module, facts in listed.items():
        algo = _word(facts.get("quant_algo")).upper() if isinstance(facts, Mapping) else ""
        found = (
            _of_group(Stated(_MODELOPT.get(algo, ""), algo.lower()), facts.get("group_size"))
            if algo
            else Stated("", "")
        )
        if not found.kind:
            what = found.words or f"quant_algo {described(algo)}"
            return Stated(
                "", "mixed_precision", f"ModelOpt's MIXED_PRECISION, where {described(str(module))} is {what}"
            )
        modules[str(module)] = found.kind
    kinds = sorted(set(modules.values()))
    return Stated(kinds[0], _label(kinds), modules=modules)


def _label(kinds: Iterable[str]) -> str:
    """Of a mixture, with either convention of a global scale."""
    return "+".join(sorted({NVFP4 if kind == NVFP4_PACKED else kind for kind in kinds}))


def _compressed_tensors(section: Mapping[str, Any]) -> Stated:
    groups, top = section.get("config_groups"), _word(section.get("format"))
    if section.get("transform_config"):
        return Stated(
            "", "compressed-tensors", "compressed-tensors with a transform_config, which rotates what layers read"
        )
    if not isinstance(groups, Mapping) or not groups:
        kind = _FORMATS.get(top, "")
        return Stated(
            kind, _label([kind]) if kind else "compressed-tensors", "" if kind else f"format {described(top)}"
        )
    kinds = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        form = _word(group.get("format") or top) if isinstance(group, Mapping) else top
        kind, wrong = _kind_of_weights(weights, form) if isinstance(weights, Mapping) else ("", "")
        if not kind:
            shown = wrong or f"weights of {_shown(weights)}"
            return Stated("", "compressed-tensors", f"format {described(form)} with {shown}")
        kinds.append(kind)
    found = sorted(set(kinds))
    return Stated(found[0], _label(found), others=frozenset(found[1:]))


def _kind_of_weights(weights: Mapping[str, Any], form: str) -> tuple[str, str]:
    """(kind, why there is none) of a group's `weights`."""
    if weights.get("type") == "int" and form == "pack-quantized":
        return packed_kind(weights)
    return _kind_of_floats(weights), ""


def _kind_of_floats(weights: Mapping[str, Any]) -> str:
    if weights.get("type") != "float" or weights.get("symmetric") is False:
        return ""
    bits, strategy, group = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    if bits == 4:
        if (group, strategy) == (NV_GROUP, "tensor_group"):
            return NVFP4_PACKED
        return MXFP4 if (group, strategy) == (MX_GROUP, "group") else ""
    if bits != 8:
        return ""
    if strategy == "block":
        return FP8_BLOCK if weights.get("block_structure") in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}") else ""
    if strategy == "group":
        return MXFP8 if group == MX_GROUP else ""
    return {"channel": FP8_CHANNEL, "tensor": FP8_TENSOR}.get(str(strategy), "")


def _shown(weights: object) -> str:
    if not isinstance(weights, Mapping):
        return "no kind"
    keys = ("num_bits", "type", "strategy", "group_size")
    return ", ".join(f"{key} {described(weights[key])}" for key in keys if weights.get(key) is not None) or "no kind"
