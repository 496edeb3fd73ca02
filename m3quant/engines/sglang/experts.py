"""Routed experts of compressed-tensors in SGLang, by the source of 0.5.17 and 0.5.23: what is not loaded, and the flags that others need.

Integer experts run on Marlin by default (compressed_tensors_wNa16_moe.py: CompressedTensorsWNA16MoE), which is handed neither alpha nor limit of
M3's activation: it computes plain SwiGLU, without an error. --moe-runner-backend triton hands both over, for symmetric integers of 4 bits in groups
of 32 or 128. M3's shared expert is made a further routed one unless --disable-shared-experts-fusion says no (models/minimax_m3_vl.py:
shared_experts_fusion_disable_reason), although in these outputs it has a scheme of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...families.spec import SWIGLUOAI
from ..stated import config_schemes, quantization_of

PACKED = "pack-quantized"
TRITON_GROUPS = (32, 128)


def refusal(config: Mapping[str, Any]) -> str:
    """Why SGLang does not run the experts of a checkpoint with this config.json, and what to do; '' where nothing is known against it."""
    integers = sorted((s for s in config_schemes(config, _names_experts) if s.kind == "int"), key=str)
    if not integers:
        return ""
    top = quantization_of(config).get("format")
    if top != PACKED:
        return (
            f"SGLang takes integer experts only where quantization_config states the format {PACKED!r} for all (here {str(top)[:40]!r}): "
            f"set that key to {PACKED!r}, each group keeps its own, or convert again"
        )
    unfit = [s for s in integers if s.bits != 4 or not s.symmetric or s.group_size not in TRITON_GROUPS]
    if _swigluoai(config) and unfit:
        return (
            f"SGLang runs experts of M3's activation in {unfit[0]} without its alpha and limit, so answers would be wrong: convert the experts to "
            "int4-g128 or int4-g32, or use --engine vllm"
        )
    return ""


def flags(config: Mapping[str, Any]) -> list[str]:
    """What the experts of M3's activation need. Empty for others."""
    schemes = config_schemes(config, _names_experts)
    if not schemes or not _swigluoai(config):
        return []
    triton = ["--moe-runner-backend", "triton"] if any(scheme.kind == "int" for scheme in schemes) else []
    return ["--disable-shared-experts-fusion", *triton]


def _swigluoai(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    return (text if isinstance(text, Mapping) else config).get("hidden_act") == SWIGLUOAI


def _names_experts(target: str) -> bool:
    return target == "Linear" or ("experts" in target and "shared_experts" not in target)
