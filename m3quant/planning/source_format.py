"""What a checkpoint's weights are stored as: decided here alone, from config.json, hf_quant_config.json and headers. Torch-free.

`plan`, `plan --on`, `convert`, `eval` and `verify` all ask this module, so that they agree on what can be read and what is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_NAME, Checkpoint, TensorInfo
from ..checkpoint.bounded import CONFIG_BYTES, read_bounded
from ..checkpoint.strict_json import described, parse_object
from ..errors import CheckpointError
from ..families.base import QUANTIZABLE, Family
from ..schemes import FP8_BLOCK as BLOCK

PLAIN, FP8_BLOCK, MXFP8 = "plain", "fp8-block", "mxfp8"
MX_GROUP = 32
HF_QUANT_CONFIG = "hf_quant_config.json"  # where ModelOpt wrote it before 0.30; vLLM and SGLang still look there
REMEDY = "Start from the BF16, FP8-block or MXFP8 release."

_ONE_SCALE = "FP8 with one scale for a whole tensor or row"
_INTEGERS = {
    "awq": "AWQ integers", "gptq": "GPTQ integers", "auto-round": "AutoRound integers", "intel/auto-round": "AutoRound integers",
    "inc": "AutoRound integers", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "mxfp4": "MXFP4",
    "hqq": "HQQ", "quark": "Quark", "fbgemm_fp8": _ONE_SCALE,
}  # fmt: skip
_KEPT_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")


@dataclass(frozen=True)
class SourceFormat:
    """kind: PLAIN, FP8_BLOCK or MXFP8, or "" for what m3quant does not read. label: short name for tables. refused: why it is not
    read and what to do, or "". section: the quantization section, wherever it stood; kept: entries for modules left as they are."""

    kind: str
    label: str
    refused: str = ""
    section: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()

    def required_kind(self) -> str:
        """The kind. Raises CheckpointError for what m3quant does not read."""
        if self.refused:
            raise CheckpointError(self.refused)
        return self.kind


def config_format(config: Mapping[str, Any], where: str, hf_quant: Mapping[str, Any] | None = None) -> SourceFormat:
    """What config.json says, or hf_quant_config.json where it says nothing. where: config.json as messages name it."""
    section, file = _section(config), where
    if section is None and hf_quant is not None:
        inner = hf_quant.get("quantization")
        section = {"quant_method": "modelopt", **inner} if isinstance(inner, Mapping) else {"quant_method": "modelopt"}
        file = str(Path(where).with_name(HF_QUANT_CONFIG))
    if section is None:
        return SourceFormat(PLAIN, "bf16")
    if not isinstance(section, Mapping):
        return SourceFormat(
            "", "quantized", f"{file}: the quantization section is no object: restore the release's own file."
        )
    kind, label, what = _judge(section)
    kept: list[str] = []
    for key in _KEPT_KEYS:
        names = section.get(key)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            wrong = f"{file}: '{key}' of the quantization section is {described(names)}, no list of names: restore the release's own file."
            return SourceFormat("", label, wrong, section)
        kept += names or ()
    refused = "" if kind else _refusal(file, section.get("quant_method"), what, label)
    return SourceFormat(kind, label, refused, section, tuple(kept))


def source_format(checkpoint: Checkpoint) -> SourceFormat:
    """What a checkpoint is, from all three. Raises CheckpointError for a damaged hf_quant_config.json."""
    where = f"{checkpoint.root}/{CONFIG_NAME}"
    said = config_format(checkpoint.config, where, _hf_quant_of(checkpoint))
    found = header_format(checkpoint.tensors)
    if found is None or (said.refused and said.label not in _VAGUE):
        return said
    label, what, tensor = found
    shown = f"{checkpoint.root}/{tensor.shard}: tensor '{tensor.name}'"
    return SourceFormat("", label, f"{shown} is of {what}. {_advice(label)}", said.section, said.kept)


def file_format(path: Path, config: Mapping[str, Any]) -> SourceFormat:
    """What a config.json that lies there alone says, with the hf_quant_config.json beside it. Raises CheckpointError."""
    beside = path.with_name(HF_QUANT_CONFIG)
    raw = _hf_quant(read_bounded(beside, CONFIG_BYTES, follow=True), str(beside)) if beside.is_file() else None
    return config_format(config, str(path), raw)


def _hf_quant_of(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    if HF_QUANT_CONFIG not in checkpoint.other_files or _section(checkpoint.config) is not None:
        return None
    where = f"{checkpoint.root}/{HF_QUANT_CONFIG}"
    if (size := checkpoint.file_size(HF_QUANT_CONFIG)) > CONFIG_BYTES:
        raise CheckpointError(f"{where} has {size:,} bytes, no such file is that large: download it again.")
    return _hf_quant(checkpoint.file_bytes(HF_QUANT_CONFIG), where)


def _hf_quant(raw: bytes, where: str) -> Mapping[str, Any]:
    return parse_object(raw, where, "Download it again.", constants=True)


def _section(config: Mapping[str, Any]) -> Any:
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if place.get(key):
                return place[key]
    return None


def _judge(section: Mapping[str, Any]) -> tuple[str, str, str]:
    """(kind or "", label, what it is in words)."""
    method = section.get("quant_method")
    name = _word(method or ("modelopt" if section.get("quant_algo") else "")).lower()
    parts = {
        _word(v).upper(): _word(k)
        for k, v in section.items()
        if str(k).endswith("quant_algo") and not _of_cache(str(k)) and v
    }
    others = sorted(algo for algo in parts if algo not in ("MXFP8", "FP8"))
    if name in ("fp8", "mxfp8") and others:
        stated = ", ".join(f"{algo} ({parts[algo]})" for algo in others)
        return "", "+".join([name, *others]).lower(), f"{name.upper()} mixed with {stated}"
    if name == "fp8":
        return _fp8(section)
    if name == "mxfp8":
        block = section.get("weight_block_size")
        if block not in (None, [1, MX_GROUP]):
            return "", "mxfp8", f"MXFP8 with blocks of {described(block)}, not [1, {MX_GROUP}]"
        return MXFP8, "mxfp8", ""
    if name.startswith("modelopt"):
        algorithms = [algo for algo, key in parts.items() if algo not in ("NONE", "NULL")]
        if not algorithms and method == "modelopt" and "quant_algo" in section:
            return PLAIN, "bf16", ""  # a quantized cache alone
        said = ", ".join(algorithms) or "no quant_algo"
        return "", said.lower() if algorithms else "modelopt", f"ModelOpt's {said}"
    if name == "compressed-tensors":
        form = _word(section.get("format"))
        return "", next((algo for algo in ("nvfp4", "mxfp4") if algo in form.lower()), name), f"format {form}"
    return "", name or "quantized", _INTEGERS.get(name, "a format that m3quant does not know")


def _word(value: object) -> str:
    """A value as a word of a message: whoever wrote the file may have put anything there."""
    return "".join(c if c.isprintable() else "?" for c in (value if isinstance(value, str) else described(value))[:60])


def _of_cache(key: str) -> bool:
    """Algorithms of what is computed or cached, not of stored weights."""
    return key.startswith(("kv_cache", "attention", "index"))


def _fp8(section: Mapping[str, Any]) -> tuple[str, str, str]:
    block, form = section.get("weight_block_size"), section.get("fmt")
    if form not in (None, "e4m3", "float8_e4m3fn"):
        return "", "fp8", f"FP8 of {_word(form)}, not E4M3"
    if block is None:
        return "", "fp8-tensor", f"{_ONE_SCALE} (no weight_block_size)"
    if block != [BLOCK, BLOCK]:
        return "", "fp8", f"FP8 in blocks of {described(block)}, not [{BLOCK}, {BLOCK}]"
    if section.get("activation_scheme") == "static":
        return "", "fp8", "FP8 blocks with static activation scales"
    return FP8_BLOCK, "fp8-block", ""


_VAGUE = ("fp8-tensor", "quantized", "modelopt")  # where headers say more


def _refusal(file: str, method: object, what: str, label: str) -> str:
    return f"{file} says quant_method {described(method)}, {what}: {_advice(label)[0].lower()}{_advice(label)[1:]}"


def _advice(label: str) -> str:
    if "fp4" in label:
        return f"This checkpoint is quantized already, and m3quant does not decode 4-bit floats. {REMEDY}"
    if label.startswith(("fp8", "mxfp8")):
        return (
            f"This checkpoint is quantized already, and m3quant reads FP8 in 128x128 blocks and MXFP8 alone. {REMEDY}"
        )
    return f"This checkpoint is quantized already, and quantizing it again would stack two rounding errors. {REMEDY}"


# Leaves that only a quantized checkpoint has.
_FOREIGN = ("weight_packed", "weight_shape", "weight_scale", "weight_scale_2", "weight_zero_point", "weight_global_scale",
            "qweight", "qzeros", "g_idx", "input_scale", "input_global_scale")  # fmt: skip


_UNKNOWN_TOOL = ("quantized", "a quantized checkpoint (compressed-tensors or ModelOpt)")


def header_format(tensors: Mapping[str, TensorInfo]) -> tuple[str, str, TensorInfo] | None:
    """(label, words, the tensor that shows it) of a layout that m3quant does not read, from names, dtypes and shapes; None if none is seen."""
    found: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        if leaf in _FOREIGN and leaf not in found:
            found[leaf] = tensor
    if not found:
        return None
    leaf = next(leaf for leaf in _FOREIGN if leaf in found)
    tensor = found[leaf]
    if leaf in ("qweight", "qzeros", "g_idx"):
        return ("gptq", "GPTQ integers", tensor) if "g_idx" in found else ("awq", "AWQ or GPTQ integers", tensor)
    scale = found.get("weight_scale")
    if scale is None:
        return _UNKNOWN_TOOL[0], _UNKNOWN_TOOL[1], tensor
    stem = scale.name.removesuffix("_scale")
    weight = tensors.get(stem) or tensors.get(f"{stem}_packed")
    dtype = weight.dtype if weight else ""
    if dtype == "U8" and scale.dtype == "F8_E4M3":
        return "nvfp4", "NVFP4 (codes with E4M3 scales)", tensor
    if dtype == "U8":
        return "mxfp4", "MXFP4 (codes with power-of-two scales)", tensor
    if dtype.startswith("F8") and scale.dtype in ("U8", "F8_E8M0"):
        return "mxfp8-modelopt", "MXFP8 under ModelOpt's names (weight_scale, not weight_scale_inv)", scale
    if dtype.startswith("F8"):
        row = len(scale.shape) > 0 and scale.shape[0] > 1
        return (
            "fp8-channel" if row else "fp8-tensor",
            f"FP8 with one scale a {'row' if row else 'tensor'} (weight_scale)",
            scale,
        )
    if dtype.startswith("I"):
        return "compressed-tensors", "compressed-tensors integers", tensor
    return _UNKNOWN_TOOL[0], _UNKNOWN_TOOL[1], tensor


def stored_entries(family: Family, source: SourceFormat) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """(name, dtype, shape, kind) of every tensor that config.json describes, scales left out: what is not kept is in the source's kind."""
    keeps = KeptModules(source.kept, family)
    for name, expected in family.expected_tensors.items():
        role = family.role(name)
        if (
            source.kind != PLAIN
            and role.kind in QUANTIZABLE
            and role.is_weight
            and len(expected.shape) == 2
            and name not in keeps
        ):
            yield name, "F8_E4M3", expected.shape, source.kind
        else:
            yield name, "F32" if expected.float32 else "BF16", expected.shape, PLAIN


_EXPERT = re.compile(r"\.experts\.\d+\.")


class KeptModules:
    """Tensors whose module a config leaves unquantized: `name in KeptModules(entries, family)`.

    An entry is a module's name, a run of its parts ("self_attn", "layers.3.mlp") or a pattern with `*` (ModelOpt); a regex is refused with
    CheckpointError, since it may take any time. All experts of a layer are judged as its first, unless an entry names experts by number.
    """

    def __init__(self, entries: Iterable[str], family: Family) -> None:
        entries = list(entries)
        self._family = family
        if regex := next((entry for entry in entries if entry.startswith("re:")), None):
            raise CheckpointError(
                f"config.json keeps modules by the expression '{regex}', which m3quant does not evaluate: give the folder with the "
                "*.safetensors files, whose headers say which they are."
            )
        self._globs = [entry for entry in entries if "*" in entry]
        self._parts = {entry for entry in entries if "*" not in entry}
        self._each_expert = any(re.search(r"experts\.\\?\d", entry) for entry in entries)
        self._known: dict[str, bool] = {}

    def __contains__(self, name: str) -> bool:
        if not (self._globs or self._parts):
            return False
        key = name if self._each_expert else _EXPERT.sub(".experts.0.", name)
        if key not in self._known:
            self._known[key] = any(
                self._holds(alias) for alias in self._family.recipe_aliases(key.removesuffix(".weight"))
            )
        return self._known[key]

    def _holds(self, module: str) -> bool:
        words = module.split(".")
        runs = (".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
        return any(run in self._parts for run in runs) or any(fnmatchcase(module, glob) for glob in self._globs)
