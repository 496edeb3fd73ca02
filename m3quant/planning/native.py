"""`--to native`: a source's own weights under a `quantization_config` that more engines read. Torch-free.

MiniMax-M3.1-Flash is released with `quant_method: mxfp8` and `moe_quant_algo: NVFP4`, which vLLM up to 0.33 does not load, although it has
kernels for both formats. compressed-tensors has names for both (its presets NVFP4A16 and MXFP8), and the tensors of the release lie as it
expects them. So every tensor is copied as it is stored, and only config.json is written anew. With vLLM 0.33.0 on an H200 a tiny model in
this layout gives the log-probs of its weights in BF16 (docs/sources.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint import TensorInfo
from ..engines.rules import lookup_problems
from ..errors import PlanError
from ..families import QUANTIZABLE, Family
from ..schemes import KEEP, Scheme
from .engine_kept import add_kept, kept_linears
from .source_layouts import MX_GROUP, MXFP8, NV_GROUP, NVFP4_PACKED, PLAIN, SourceTensor, words

_E4M3, _E8M0 = "torch.float8_e4m3fn", "torch.uint8"
_MXFP8 = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": MX_GROUP, "scale_dtype": _E8M0, "zp_dtype": _E8M0,
}  # fmt: skip
# By layout, a config group without its targets. Experts are read with activations in BF16 (W4A16); MXFP8 asks for activations in MXFP8,
# and an engine without such products, as on Hopper, decodes the weights instead.
_GROUPS: dict[str, dict[str, Any]] = {
    NVFP4_PACKED: {
        "weights": {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": NV_GROUP, "dynamic": False,
            "scale_dtype": _E4M3, "zp_dtype": _E4M3,
        },
        "input_activations": None,
        "output_activations": None,
        "format": "nvfp4-pack-quantized",
    },
    MXFP8: {
        "weights": {**_MXFP8, "dynamic": False},
        "input_activations": {**_MXFP8, "dynamic": True},
        "output_activations": None,
        "format": "mxfp8-quantized",
    },
}  # fmt: skip
NOTE = "weights are the source's own, byte for byte; vLLM 0.33.0 loads this layout on an H200 (older releases and other engines were not tried)"


def native_section(family: Family, tensors: Mapping[str, SourceTensor]) -> dict[str, Any]:
    """The `quantization_config` of a source whose tensors stay as they are.

    Raises PlanError where there is nothing to describe anew: another layout than the two that a release of M3.1 has, or a role in several.
    """
    kinds = _kinds(family, tensors)
    if set(kinds.values()) - {PLAIN} != {NVFP4_PACKED, MXFP8}:
        held = ", ".join(f"{role}: {words(kind)}" for role, kind in kinds.items())
        raise PlanError(
            "recipe 'native' describes NVFP4 experts and MXFP8 of MiniMax-M3.1-Flash to engines that do not read the release, but this "
            f"source has {held}. Serve it as it is, or choose another recipe (--to awq)."
        )
    targets: dict[str, list[str]] = {}
    ignore = list(family.always_ignored)
    for role, kind in kinds.items():
        (ignore if kind == PLAIN else targets.setdefault(kind, [])).extend(family.targets.get(role, ()))
    section: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{n}": {"targets": patterns, **_GROUPS[kind]} for n, (kind, patterns) in enumerate(targets.items())
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
    add_kept(section, family, kept_linears(family, _stored(tensors.values()), "compressed-tensors"))
    _check_names(family, section, tensors)
    return section


def _kinds(family: Family, tensors: Mapping[str, SourceTensor]) -> dict[str, str]:
    """role -> the one layout of its weights, in the order of QUANTIZABLE."""
    found: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        role = family.role(name)
        if role.kind in QUANTIZABLE and role.is_weight:
            found.setdefault(role.kind, {}).setdefault(tensor.kind, name)
    for role_name, kinds in found.items():
        if len(kinds) > 1:
            shown = " and ".join(f"{words(kind)} ('{name}')" for kind, name in kinds.items())
            raise PlanError(
                f"{role_name} of this source are stored in several layouts, {shown}: recipe 'native' gives a role one. Choose another recipe (--to awq)."
            )
    return {role: next(iter(found[role])) for role in QUANTIZABLE if role in found}


def _stored(tensors: Iterable[SourceTensor]) -> Iterable[TensorInfo]:
    return (tensor.info for tensor in tensors if tensor.kind == PLAIN)


def _check_names(family: Family, section: Mapping[str, Any], tensors: Mapping[str, SourceTensor]) -> None:
    """Raise PlanError where an engine would look for other weights under a module's name than are stored there."""
    quantized = Scheme("fp8", 8)  # stands for any: which group a name belongs to follows from the targets
    modules = {}
    for name, tensor in tensors.items():
        role = family.role(name)
        if role.kind in QUANTIZABLE and role.is_weight:
            modules[name.removesuffix(".weight")] = KEEP if tensor.kind == PLAIN else quantized
    if problems := lookup_problems(family, section, modules):
        raise PlanError(problems[0])
