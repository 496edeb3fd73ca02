"""vLLM's command line. Pure, except that the tokenizer is read for the reasoning parser: nothing is started here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ...checkpoint.bounded import TOKENIZER_BYTES, read_bounded
from ...errors import EngineMissing
from ..base import Launch, Serving, StartOptions
from ..device import CPU
from ..installed import Installed
from .drafts import speculative_config
from .offload import flags

NAME = "vllm"
PROGRAM = ("vllm", "serve")
GUARD = "m3quant.runtime.guard.Guard"


def arguments(serving: Serving) -> list[str]:
    """Flags after `vllm serve MODEL` that every release with the model takes; `launch` adds those that depend on the release."""
    out = ["--max-model-len", str(serving.context), "--max-num-seqs", str(serving.max_num_seqs)]
    out += ["--max-num-batched-tokens", str(serving.max_num_batched_tokens), "--block-size", str(serving.block_size)]
    if serving.gpu.name == CPU:
        out += ["--enforce-eager"]  # compiled graphs cost minutes there and gain nothing
    else:
        out += ["--gpu-memory-utilization", f"{serving.utilization:g}"]
    if serving.tp > 1:
        out += ["--tensor-parallel-size", str(serving.tp)]
    if serving.pp > 1:
        out += ["--pipeline-parallel-size", str(serving.pp)]
    if serving.expert_parallel:
        out += ["--enable-expert-parallel"]
    if serving.kv_dtype_asked:
        out += ["--kv-cache-dtype", serving.kv_dtype]
    if serving.index_dtype != "bfloat16" and serving.family.kv_geometry.index_layers:
        out += ["--attention-config", json.dumps({"indexer_kv_dtype": serving.index_dtype})]
    if serving.config.get("vision_config") and not serving.vision:
        out += ["--language-model-only"]
    if serving.draft is not None:
        out += ["--speculative-config", speculative_config(serving.draft, serving.family)]
    out += flags(serving.kv_offload, serving.weight_offload)
    return [*out, *serving.family.in_engine(NAME).flags]


def launch(serving: Serving, options: StartOptions, installed: Installed | None) -> Launch:
    """`vllm serve`. installed None: a release that is not here, so every flag of 0.33 is used.

    Raises EngineMissing where the installed release lacks a flag that the checkpoint or the guard needs.
    """
    needed = [serving.where, *arguments(serving), "--host", options.host, "--port", str(options.port)]
    if options.served_name:
        needed += ["--served-model-name", options.served_name]
    if options.pin is not None:
        needed += ["--kv-cache-memory-bytes", str(options.pin)]
    env, secret, notes = dict[str, str](), set[str](), list[str]()
    guarded = options.guard is not None
    if options.guard is not None:
        needed += ["--middleware", GUARD]
        env |= options.guard
    if options.api_key is not None:
        names = ("VLLM_API_KEY", "M3QUANT_GUARD_API_KEYS") if guarded else ("VLLM_API_KEY",)
        env |= dict.fromkeys(names, options.api_key)
        secret |= set(names)
    optional = [("--shutdown-timeout", str(options.shutdown_timeout)), ("--watermark", f"{options.watermark:g}")]
    if installed is not None:
        missing = [flag for flag in needed if flag.startswith("--") and not installed.takes(flag)]
        if missing:
            raise EngineMissing(
                f"vLLM {installed.version} does not know {', '.join(missing)}, which this checkpoint or the guard needs: install a newer one."
            )
        for flag, _ in optional:
            if not installed.takes(flag):
                notes.append(f"vLLM {installed.version} does not know {flag}: left out")
        optional = [pair for pair in optional if installed.takes(pair[0])]
    if serving.gpu.name == CPU:
        env["VLLM_CPU_KVCACHE_SPACE"] = f"{serving.gpu.total_bytes / 2**30:g}"
    env.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(options.start_timeout))
    program = list(PROGRAM) if installed is None else [installed.python, "-m", "vllm.entrypoints.cli.main", "serve"]
    words = [*needed, *(part for pair in optional for part in pair), *options.extra]
    return _without_reasoning(Launch(program, words, env, frozenset(secret), notes, guarded), serving, options.folder)


def _without_reasoning(launch: Launch, serving: Serving, folder: Path) -> Launch:
    """The launch, without the reasoning parser where the tokenizer lacks the markers that it insists on. Said in a note."""
    tokenizer, wanted = folder / "tokenizer.json", serving.family.in_engine(NAME).reasoning_tokens
    words = launch.arguments
    if not wanted or "--reasoning-parser" not in words or not tokenizer.is_file():
        return launch
    text = read_bounded(tokenizer, TOKENIZER_BYTES).decode("utf-8", errors="replace")
    absent = [token for token in wanted if f'"{token}"' not in text]
    if not absent:
        return launch
    at = words.index("--reasoning-parser")
    note = f"tokenizer.json has no {' and '.join(absent)}, which --reasoning-parser {words[at + 1]} insists on: served without that parser"
    return replace(launch, arguments=words[:at] + words[at + 2 :], notes=[*launch.notes, note])
