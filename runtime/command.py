"""The engine's command line for a verdict. Pure: nothing is started here."""

from __future__ import annotations

import json

from ..errors import NodeError
from .fit import Fit
from .hardware import CPU

PROGRAM = ("vllm", "serve")


def vllm_arguments(fit: Fit) -> list[str]:
    """Flags after `vllm serve MODEL` that every release with the model takes; version-gated ones are `runtime.serve`'s."""
    setup, split = fit.setup, fit.setup.split
    out = ["--max-model-len", str(fit.context), "--max-num-seqs", str(setup.max_num_seqs)]
    out += ["--max-num-batched-tokens", str(setup.max_num_batched_tokens), "--block-size", str(setup.block_size)]
    if fit.node.gpu.name == CPU:
        out += ["--enforce-eager"]  # compiled graphs cost minutes there and gain nothing
    else:
        out += ["--gpu-memory-utilization", f"{setup.utilization:g}"]
    if split.tp > 1:
        out += ["--tensor-parallel-size", str(split.tp)]
    if split.pp > 1:
        out += ["--pipeline-parallel-size", str(split.pp)]
    if split.expert_parallel:
        out += ["--enable-expert-parallel"]
    if fit.ask.kv_dtype != "auto":
        out += ["--kv-cache-dtype", setup.kv_dtype]
    if setup.index_dtype != "bfloat16" and fit.model.family.kv_geometry.index_layers:
        out += ["--attention-config", json.dumps({"indexer_kv_dtype": setup.index_dtype})]
    if fit.model.config.get("vision_config") and not split.vision:
        out += ["--language-model-only"]
    return [*out, *fit.model.family.serve_flags]


def vllm_command(fit: Fit) -> list[str]:
    """The whole command. Raises NodeError for a verdict that does not fit: there is no command that would work."""
    if not fit.fits:
        raise NodeError(f"{fit.model.where} does not fit on {fit.node.name}: {fit.why_not}.")
    return [*PROGRAM, fit.model.where, *vllm_arguments(fit)]
