"""Host memory in vLLM: which releases use it for what, and their flags. By the source of 0.26, 0.32 and 0.33.

Cache (--kv-offloading-size, backend native): full blocks are copied to a buffer in /dev/shm, and come back when a prompt begins like one that the
GPU has dropped (distributed/kv_transfer/kv_connector/v1/offloading). The pool on the GPU stays as it is: every token of a running request is in it.

Weights (--offload-backend uva): parameters are views of pinned memory, and the GPU reads across the link what a step uses. That survives loading only
where the kernel's own format is still a view of what was loaded. After process_weights_after_loading
- Humming registers its packed codes under another name, which model_executor/model_loader/utils.py (device_loading_context) does not move back
  (quantization/utils/humming/moe.py: w13_weight_packed becomes w13_weight), in both releases, for either backend of --offload-backend: nothing but scales is saved (measured with
  0.33 on an H200: of 7.2 GiB 0.2 left the GPU, tests/benchmarks/figures/h200_offload.json);
- Marlin's repacked codes stay on the GPU in 0.33: model_executor/utils.py (replace_parameter) keeps the parameter with its mark of being moved, so
  that it is taken for moved. 0.32 moves them back;
- Triton's codes are a view, in both (fused_moe/oracle/int_wna16.py), and 0.33 has a path for such weights (fused_moe.py: _weights_host_resident).
So experts are run by Triton. The prefetch backend copies all experts of a layer for every step, whatever the router chose, and is not used.
"""

from __future__ import annotations

from ..base import precedes
from ..device import GIB
from ..offload import Offload

FIRST_CACHE, FIRST_WEIGHTS = "0.26.0", "0.32.0"  # the oldest that were read
_FLOATS = {("weight", "BF16"), ("weight", "F16"), ("weight", "F8_E4M3")}
_SCALES = {("weight_scale", dtype) for dtype in ("BF16", "F16", "F32")} | {
    ("weight_scale_inv", "F32"),
    ("weight_scale_inv", "BF16"),
}
_INTEGERS = {("weight_packed", "I32"), ("weight_shape", "I64"), ("weight_shape", "I32")}


def refusal(offload: Offload) -> str:
    """Why this release cannot keep it in host memory, and what to do; '' where it can."""
    for asked, option, first in (
        (offload.cache, "--kv-offload", FIRST_CACHE),
        (offload.weights, "--weight-offload", FIRST_WEIGHTS),
    ):
        if asked and precedes(offload.release, first):
            return f"vLLM {offload.release} was not read for {option}, {first} and newer were: install one, or leave {option} out"
    if not offload.weights:
        return ""
    if not offload.stored:
        return "the model has no routed experts, which alone are moved to host memory: leave --weight-offload out"
    if offload.narrow:
        return (
            "experts of 2, 3, 5 or 6 bits run on Humming alone, which brings all of them back to the GPU while it loads "
            "(vLLM 0.32, 0.33): leave --weight-offload out, or convert to 4 bits"
        )
    if ("weight_zero_point", "I32") in offload.stored:
        return "experts with zero points were not checked in host memory: leave --weight-offload out, or convert to int4-g128"
    if not offload.stored <= _FLOATS | _SCALES | _INTEGERS:
        kinds = ", ".join(sorted(f"{leaf} ({dtype})" for leaf, dtype in offload.stored))
        return f"experts stored as {kinds} were not checked in host memory: leave --weight-offload out"
    return ""


def flags(cache: int, weights: int) -> list[str]:
    """cache: bytes of all ranks, which --kv-offloading-size counts so too; weights: of each rank, as --cpu-offload-gb does."""
    out = ["--kv-offloading-size", _gib(cache)] if cache else []
    if weights:
        out += ["--offload-backend", "uva", "--cpu-offload-gb", _gib(weights), "--cpu-offload-params", "experts"]
        out += ["--moe-backend", "triton"]
    return out


def _gib(size: int) -> str:
    """Both options take GiB; vLLM multiplies and cuts to whole bytes."""
    return f"{size / GIB:.12f}".rstrip("0").rstrip(".")
