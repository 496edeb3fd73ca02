"""Which engines read integers of which width: rules of plan, verify, serve and cards. Torch-free.

Widths that do not divide 32, and 2 bits, are read by one kernel library only, Humming, which vLLM has from 0.29 on
(`fused_moe/oracle/int_wna16.py`, `kernels/linear/mixed_precision/humming.py`). Read in the wheels of vLLM 0.26 to 0.33
and SGLang 0.5.23; 2, 3 and 4 bits were run with vLLM 0.33 on an H200.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import PlanError
from ..schemes import Scheme

FIRST_VLLM = "0.29.0"
COMMON_BITS = (4, 8)  # what every engine reads


def is_humming_only(scheme: Scheme) -> bool:
    """Whether only vLLM >= FIRST_VLLM, on an NVIDIA GPU, reads this scheme."""
    return scheme.kind == "int" and scheme.bits not in COMMON_BITS


def check_expert_scheme(scheme: Scheme) -> None:
    """Raise PlanError for a scheme that no engine runs routed experts in."""
    if is_humming_only(scheme) and scheme.group_size is None:
        asym = "" if scheme.symmetric else "-asym"
        raise PlanError(
            f"routed_experts cannot be {scheme}: the engines' only MoE kernel for {scheme.bits} bits takes scales of groups, not of "
            f"rows; --set routed_experts=int{scheme.bits}-g128{asym}."
        )


def integer_notes(experts: Collection[Scheme], others: Collection[Scheme] = ()) -> tuple[str, ...]:
    """What a person must know of engine releases before serving these schemes of routed experts and of other modules."""
    notes = []
    if narrow := _names(filter(is_humming_only, {*experts, *others})):
        notes.append(
            f"{narrow}: vLLM {FIRST_VLLM} or newer on an NVIDIA GPU reads this width (by Humming's kernels, compiled at the first "
            "start); older ones and SGLang read integers of 4 and 8 bits only, AutoAWQ of 4"
        )
    if symmetric := sorted((s for s in experts if is_humming_only(s) and s.symmetric), key=str):
        notes.append(
            f"{_names(symmetric)}: Humming 0.1.19, which vLLM 0.33 brings, unpacks a whole layer of symmetric experts while loading "
            "(24 GB more for a moment with M3's shapes, 3 GB with zero points): prefer "
            f"{', '.join(f'{scheme}-asym' for scheme in symmetric)}, or install Humming 0.1.20"
        )
    if rows := _names(s for s in experts if s.kind == "int" and s.group_size is None):
        notes.append(
            f"{rows}: vLLM 0.32 and newer run integer experts on Hopper by Humming, whose MoE kernel takes no scales of rows: "
            "serve with --moe-backend marlin, or use groups"
        )
    return tuple(notes)


def zero_point_notes(experts: Collection[Scheme], fmt: str) -> tuple[str, ...]:
    """What a person must know of engine releases before serving routed experts with zero points in compressed-tensors.

    vllm#44025 (Marlin only; 0.28.0rc2 still asserts for every other kernel), vllm#39980 (0.19.0), sglang#27690. AutoAWQ's files go
    another way. Widths that Humming alone reads need a release that is newer than these anyway.
    """
    if fmt != "compressed-tensors" or not any(map(has_common_zero_points, experts)):
        return ()
    return (
        'routed experts with zero points: vLLM without pull request 44025 (0.19 and 0.22.1 among them) stops at "Only symmetric '
        'quantization is supported for MoE"; 0.28 still does where Marlin is not used (other devices than NVIDIA GPUs, '
        "VLLM_BATCH_INVARIANT=1), and so does SGLang without its pull request 27690. Serve with a newer release, or quantize routed "
        "experts without zero points",
    )


def has_common_zero_points(scheme: Scheme) -> bool:
    """Whether this scheme has zero points and a width that every engine reads, if only without them."""
    return scheme.kind == "int" and not scheme.symmetric and not is_humming_only(scheme)


def min_vllm(schemes: Collection[Scheme]) -> str:
    """The first vLLM release that reads all of these, or '' where every known one does."""
    return FIRST_VLLM if any(map(is_humming_only, schemes)) else ""


def scheme_of_group(group: Mapping[str, Any]) -> Scheme:
    """The scheme of one compressed-tensors config group."""
    weights = group["weights"]
    if weights["type"] == "int":
        size = weights.get("group_size") if weights["strategy"] == "group" else None
        return Scheme("int", weights["num_bits"], size, weights["symmetric"])
    return Scheme("fp8", bits=8, block=weights["strategy"] == "block")


def _names(schemes: Any) -> str:
    return ", ".join(sorted(scheme.name for scheme in schemes))
