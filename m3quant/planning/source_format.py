"""How a checkpoint's weights are stored: decided only here, from config.json, hf_quant_config.json and headers. Torch-free.

`plan`, `plan --on`, `convert`, `eval` and `verify` all ask this module, so that they agree on what can be read and what is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_NAME, Checkpoint, TensorInfo
from ..checkpoint.bounded import CONFIG_BYTES, read_bounded
from ..checkpoint.name_list import NameList
from ..checkpoint.patterns import Allowance
from ..checkpoint.strict_json import described, parse_object, shown
from ..errors import CheckpointError
from ..families.base import QUANTIZABLE, Family
from ..families.spec import Expected, LayerSpec
from .integer_kinds import integers_among, words_of
from .source_layouts import PLAIN, stored_parts, words
from .source_sections import Stated, kept_entries, kept_problem, read_section

HF_QUANT_CONFIG = "hf_quant_config.json"  # where ModelOpt wrote it before 0.30; vLLM and SGLang still look there
REMEDY = "Start from the BF16, FP8, MXFP8, NVFP4 or MXFP4 release."
_EXPERT = re.compile(r"\.experts\.\d+\.")


_NOTHING = Stated(PLAIN, "bf16")


@dataclass(frozen=True)
class SourceFormat:
    """kind: of most quantized modules (`source_layouts.KINDS`), PLAIN, or "" for what m3quant does not read. label: short name for
    tables. refused: why it is not read and what to do, or "". section: the quantization section, wherever it stood; file: where; kept:
    entries for modules left as they are; stated: what the section says."""

    kind: str
    label: str
    refused: str = ""
    section: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    stated: Stated = _NOTHING
    file: str = CONFIG_NAME

    def required_kind(self) -> str:
        """The kind. Raises CheckpointError for what m3quant does not read."""
        if self.refused:
            raise CheckpointError(self.refused)
        return self.kind

    @property
    def quantized(self) -> bool:
        """Whether anything is stored quantized."""
        return self.kind != PLAIN

    def kinds_of(self, names: Iterable[str]) -> frozenset[str]:
        """Kinds in which the section says that a module is stored, which goes by these names. What `kept` lists is not looked up here."""
        stated, names = self.stated, list(names)
        if stated.modules:
            return frozenset({next((stated.modules[name] for name in names if name in stated.modules), PLAIN)})
        if stated.experts and any(_EXPERT.search(f"{name}.") for name in names):
            return frozenset({stated.experts})
        return frozenset({self.kind}) | stated.others


def config_format(config: Mapping[str, Any], where: str, hf_quant: Mapping[str, Any] | None = None) -> SourceFormat:
    """What config.json says, or hf_quant_config.json where it says nothing. where: config.json as messages name it.

    Where both say something that m3quant reads, they have to say the same.
    """
    section, file = _section(config), where
    if section is not None and hf_quant is not None and isinstance(section, Mapping):
        one, other = config_format(config, where), config_format({}, where, hf_quant)
        if not one.refused and not other.refused and _claims(one) != _claims(other):
            words = f"{where} says {one.label} ({_said(one)}), {other.file} says {other.label} ({_said(other)})"
            return replace(
                one,
                kind="",
                refused=f"{words}: one of the two is of another checkpoint. Restore both from the release. {REMEDY}",
            )
        return one
    if section is None and hf_quant is not None:
        inner = hf_quant.get("quantization")
        section = {"quant_method": "modelopt", **inner} if isinstance(inner, Mapping) else {"quant_method": "modelopt"}
        file = str(Path(where).with_name(HF_QUANT_CONFIG))
    if section is None:
        return SourceFormat(PLAIN, "bf16", file=where)
    if not isinstance(section, Mapping):
        return SourceFormat(
            "", "quantized", f"{file}: the quantization section is no object: restore the release's own file."
        )
    stated = read_section(section)
    if wrong := kept_problem(section):
        return SourceFormat("", stated.label, f"{file}: {wrong}: restore the release's own file.", section)
    refused = "" if stated.kind else _refusal(file, section.get("quant_method"), stated.words, stated.label)
    return SourceFormat(stated.kind, stated.label, refused, section, kept_entries(section), stated, file)


def _claims(source: SourceFormat) -> tuple[Any, ...]:
    """What a section says of weights, so that two can be compared."""
    stated = source.stated
    return {source.kind, *stated.others, *stated.modules.values()}, stated.experts, dict(stated.modules)


def _said(source: SourceFormat) -> str:
    named = f", for {len(source.stated.modules):,} modules by name" if source.stated.modules else ""
    return " and ".join(words(kind) for kind in sorted(_claims(source)[0] | ({source.stated.experts} - {""}))) + named


def source_format(checkpoint: Checkpoint) -> SourceFormat:
    """The format of a checkpoint, from all three. Raises CheckpointError for a damaged hf_quant_config.json.

    Of layouts that m3quant reads, `source_tensors` compares the headers with what is said here.
    """
    where = f"{checkpoint.root}/{CONFIG_NAME}"
    said = config_format(checkpoint.config, where, hf_quant_of(checkpoint))
    found = header_format(checkpoint.tensors, bool(integers_among({said.kind} | said.stated.others)))
    if found is None or (said.refused and said.label not in _VAGUE):
        return said
    label, what, tensor = found
    shown = f"{checkpoint.root}/{tensor.shard}: tensor '{tensor.name}'"
    return SourceFormat("", label, f"{shown} is of {what}. {_advice(label)}", said.section, said.kept, file=said.file)


def file_format(path: Path, config: Mapping[str, Any]) -> SourceFormat:
    """What a config.json alone says, with the hf_quant_config.json next to it. Raises CheckpointError."""
    beside = path.with_name(HF_QUANT_CONFIG)
    raw = _hf_quant(read_bounded(beside, CONFIG_BYTES, follow=True), str(beside)) if beside.is_file() else None
    return config_format(config, str(path), raw)


def hf_quant_of(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The checkpoint's hf_quant_config.json, None if it has none. Raises CheckpointError for a damaged one."""
    if HF_QUANT_CONFIG not in checkpoint.other_files:
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


_VAGUE = ("quantized", "modelopt", "compressed-tensors")  # where headers say more


def _refusal(file: str, method: object, what: str, label: str) -> str:
    return f"{file} says quant_method {described(method)}, {what}: {_advice(label)[0].lower()}{_advice(label)[1:]}"


def _advice(label: str) -> str:
    if "fp" in label:
        return (
            "This checkpoint is quantized already, and of floats m3quant reads FP8 (E4M3) in 128x128 blocks, rows or whole tensors, "
            f"MXFP8, NVFP4 and MXFP4. {REMEDY}"
        )
    return (
        "This checkpoint is quantized already, and of integers m3quant reads compressed-tensors' pack-quantized (2 to 8 bits, groups or rows) "
        f"and AutoAWQ's gemm. {REMEDY}"
    )


def requantize_problem(root: str, kinds: Iterable[str]) -> str:
    """Why a source whose weights are of these kinds is not converted unless it was asked for; "" for floats."""
    integers = integers_among(kinds)
    if not integers:
        return ""
    return (
        f"{root} is quantized already, to {' and '.join(map(words_of, integers))}, and quantizing it again stacks two rounding errors. {REMEDY} "
        "If there is none, --requantize converts this one all the same."
    )


# Leaves of layouts that are not read, and what they are.
_FOREIGN = {
    "qweight": "AWQ or GPTQ integers", "qzeros": "AWQ or GPTQ integers", "g_idx": "GPTQ integers", "weight_shape": "compressed-tensors integers",
    "weight_g_idx": "compressed-tensors integers in activation order", "weight_zero_point": "compressed-tensors integers", "pre_quant_scale": "AWQ's scales of activations (ModelOpt)",
}  # fmt: skip


# Of them, what is read where the config states integers.
_READ = ("qweight", "qzeros", "weight_shape", "weight_zero_point", "weight_packed")


def header_format(tensors: Mapping[str, TensorInfo], stated: bool = False) -> tuple[str, str, TensorInfo] | None:
    """(label, words, the tensor that shows it) of a layout that m3quant does not read, from names and dtypes; None if none is seen.

    stated: whether the config states integers that are read."""
    found: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        if stated and leaf in _READ:
            continue
        integers = leaf == "weight_packed" and tensor.dtype.startswith("I")
        if (leaf in _FOREIGN or integers) and leaf not in found:
            found[leaf] = tensor
    if not found:
        return None
    if "g_idx" in found:
        return "gptq", _FOREIGN["g_idx"], found["g_idx"]
    leaf = next((leaf for leaf in _FOREIGN if leaf in found), "weight_packed")
    label = {"qweight": "awq", "qzeros": "awq", "pre_quant_scale": "modelopt"}.get(leaf, "compressed-tensors")
    return label, _FOREIGN.get(leaf, "compressed-tensors integers"), found[leaf]


def stored_entries(
    family: Family,
    source: SourceFormat,
    layers: Iterable[LayerSpec] | None = None,
    keeps: KeptModules | None = None,
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor that a release with this config.json stores: what is not kept is in the source's kinds.

    layers: those that are listed, beside the tensors of no layer; all of them by default. keeps: of the source, where it is made already.
    Raises CheckpointError where config.json alone does not tell which modules are quantized to what.
    """
    if source.stated.others:
        raise CheckpointError(
            f"{source.file} describes weights of {' and of '.join(words(k) for k in sorted({source.kind, *source.stated.others}))}; which is "
            "which cannot be seen from it alone: give the folder with the *.safetensors files, whose headers say so."
        )
    keeps = keeps or KeptModules(source.kept, family, source.file)
    alike = not (keeps.names_experts or source.stated.modules)  # the experts of a layer
    kinds: dict[tuple[str, str], str] = {}
    for name, expected in (family.expected_tensors if layers is None else family.expected_of(layers)).items():
        before, experts, after = name.partition(".experts.")
        key = (before, after.partition(".")[2]) if experts and alike else (name, "")
        if (kind := kinds.get(key)) is None:
            kind = kinds[key] = _stored_kind(family, source, keeps, name, expected)
        if kind == PLAIN:
            yield name, "F32" if expected.float32 else "BF16", expected.shape
        else:
            yield from stored_parts(kind, name, expected.shape)


def _stored_kind(family: Family, source: SourceFormat, keeps: KeptModules, name: str, expected: Expected) -> str:
    role = family.role(name)
    quantizable = source.quantized and role.kind in QUANTIZABLE and role.is_weight and len(expected.shape) == 2
    if not quantizable or name in keeps:
        return PLAIN
    (kind,) = source.kinds_of(family.recipe_aliases(name.removesuffix(".weight")))
    return kind


class KeptModules:
    """Tensors whose module a config leaves unquantized: `name in KeptModules(entries, family, file)`.

    An entry is a module's name, a run of its parts ("self_attn", "layers.3.mlp") or a pattern with `*` (ModelOpt); a regex is refused with
    CheckpointError, and so is a list beyond the bounds of `NameList`. All experts of a layer are taken to be like its first, unless an entry
    names experts by number. file: with the list, for errors.
    """

    def __init__(self, entries: Iterable[str], family: Family, file: str = CONFIG_NAME) -> None:
        entries = list(entries)
        self._family = family
        if regex := next((entry for entry in entries if entry.startswith("re:")), None):
            raise CheckpointError(
                f"{file} keeps modules by the expression {shown(regex)}, which m3quant does not evaluate: give the folder with the "
                "*.safetensors files, whose headers say which they are."
            )
        remedy = "A release lists modules by name, or by a few patterns: restore the release's own file."
        self._listed = NameList(
            entries, Allowance(f"{file}, modules left unquantized", remedy, CheckpointError), globs=True
        )
        self._each_expert = any(re.search(r"experts\.\\?\d", entry) for entry in entries)
        self._known: dict[str, bool] = {}

    @property
    def names_experts(self) -> bool:
        """Whether an entry names experts by number, so that those of a layer differ."""
        return self._each_expert

    def __contains__(self, name: str) -> bool:
        if not self._listed.exact:
            return False
        key = name if self._each_expert else _EXPERT.sub(".experts.0.", name)
        if key not in self._known:
            self._known[key] = any(
                self._listed.has_run(alias) or self._listed.names(alias)
                for alias in self._family.recipe_aliases(key.removesuffix(".weight"))
            )
        return self._known[key]
